package secret

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"unsafe"
)

func TestNeverPrints(t *testing.T) {
	k, err := Copy([]byte("super-secret-key-material-000000"))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", k, "in", struct{ K *Key }{k})
	for _, s := range []string{
		fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %s %q %x %X %d", k, k, k, k, k, k, k, k),
		fmt.Sprintf("%v %+v", struct{ K *Key }{k}, []*Key{k}), log.String(),
	} {
		if strings.Contains(s, "super") || strings.Contains(s, fmt.Sprintf("%x", "super")) || strings.Contains(s, "115 117 112") {
			t.Errorf("key bytes in %q", s)
		}
	}
	if _, err := json.Marshal(map[string]any{"k": k}); !errors.Is(err, ErrMarshal) {
		t.Errorf("json.Marshal: %v, want ErrMarshal", err)
	}
	if err := gob.NewEncoder(&log).Encode(k); !errors.Is(err, ErrMarshal) {
		t.Errorf("gob: %v, want ErrMarshal", err)
	}
}

func TestTakeClearsAndWipeZeroes(t *testing.T) {
	src := []byte("0123456789abcdef")
	k, err := Take(src)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(src, make([]byte, 16)) {
		t.Error("Take left the source bytes")
	}
	other, _ := Copy([]byte("keeps the page mapped"))
	defer other.Wipe()
	var raw []byte
	k.Use(func(b []byte) { raw = unsafe.Slice(&b[0], len(b)) })
	if string(raw) != "0123456789abcdef" {
		t.Fatalf("Use gave %q", raw)
	}
	k.Wipe()
	k.Wipe()
	if !bytes.Equal(raw, make([]byte, 16)) {
		t.Error("Wipe left bytes in memory")
	}
	defer func() {
		if recover() != ErrWiped {
			t.Error("Use after Wipe did not panic with ErrWiped")
		}
	}()
	k.Use(func([]byte) {})
}

func TestLengths(t *testing.T) {
	for _, n := range []int{0, -1, MaxLen + 1} {
		if _, err := Random(nil, n); err == nil {
			t.Errorf("Random(%d) succeeded", n)
		}
	}
	for _, n := range []int{1, 32, 63, 64, 65, 128, 4095, 4096, 4097, MaxLen - 1, MaxLen} {
		k, err := Random(nil, n)
		if err != nil {
			t.Fatalf("Random(%d): %v", n, err)
		}
		c, err := k.Clone()
		if err != nil || !c.Equal(k) || c.Len() != n {
			t.Errorf("clone of %d bytes: %v", n, err)
		}
		k.Wipe()
		if c.Equal(k) || k.Len() != 0 {
			t.Errorf("a wiped key of %d bytes still compares", n)
		}
		c.Wipe()
	}
}

// TestSlotsDoNotOverlap makes and wipes keys from many goroutines and checks
// that each keeps its own pattern.
func TestSlotsDoNotOverlap(t *testing.T) {
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var held []*Key
			for i := range 300 {
				n := 1 + (i*37+g*11)%300
				k, err := Copy(bytes.Repeat([]byte{byte(n)}, n))
				if err != nil {
					t.Error(err)
					return
				}
				held = append(held, k)
				if len(held) > 20 {
					held[0].Use(func(b []byte) {
						if !bytes.Equal(b, bytes.Repeat([]byte{byte(len(b))}, len(b))) {
							t.Error("a key's bytes changed under it")
						}
					})
					held[0].Wipe()
					held = held[1:]
				}
			}
			for _, k := range held {
				k.Wipe()
			}
		}()
	}
	wg.Wait()
}
