package xts

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"reflect"
	"sync"
	"testing"
	"unsafe"

	"mortise/internal/secret"
)

// makeKey returns a locked copy of b that the test wipes at its end.
func makeKey(t testing.TB, b []byte) *secret.Key {
	t.Helper()
	k, err := secret.Copy(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func makeCipher(t testing.TB, key []byte, impl implementation) *Cipher {
	t.Helper()
	c, err := newCipher(makeKey(t, key), impl)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

// randomBytes is reproducible: a failure names its seed.
func randomBytes(seed uint64, n int) []byte {
	var chacha [32]byte
	binary.LittleEndian.PutUint64(chacha[:], seed)
	b := make([]byte, n)
	rand.NewChaCha8(chacha).Read(b)
	return b
}

// everywhere runs f for each implementation that this CPU has.
func everywhere(t *testing.T, f func(t *testing.T, impl implementation)) {
	for _, impl := range available() {
		t.Run(impl.String(), func(t *testing.T) { f(t, impl) })
	}
}

func mustPanic(t *testing.T, want any, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if got := recover(); got != want {
			t.Errorf("panic %v, want %v", got, want)
		}
	}()
	f()
}

func TestNewRefuses(t *testing.T) {
	for _, n := range []int{1, 16, 32, 63, 65, 128} {
		if _, err := New(makeKey(t, randomBytes(1, n))); err == nil {
			t.Errorf("New took a key of %d bytes", n)
		}
	}
	wiped, err := secret.Copy(randomBytes(1, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	wiped.Wipe()
	if _, err := New(wiped); err == nil {
		t.Error("New took a wiped key")
	}
	half := randomBytes(2, KeySize/2)
	if _, err := New(makeKey(t, append(half, half...))); !errors.Is(err, ErrEqualHalves) {
		t.Errorf("equal halves: %v, want ErrEqualHalves", err)
	}
}

func TestImplementationIsTheFastestOrTheForced(t *testing.T) {
	all := available()
	if got, want := Implementation(), all[len(all)-1].String(); got != want {
		t.Errorf("Implementation() = %q, want %q", got, want)
	}
	key := makeKey(t, randomBytes(3, KeySize))
	for _, impl := range all {
		t.Setenv(Env, impl.String())
		c, err := New(key)
		if err != nil {
			t.Fatal(err)
		}
		if Implementation() != impl.String() || c.impl != impl {
			t.Errorf("%s=%s: Implementation() = %q, New made %q", Env, impl, Implementation(), c.impl)
		}
		c.Wipe()
	}
	t.Setenv(Env, "quantum")
	if _, err := New(key); err == nil || Implementation() != "" {
		t.Errorf("%s=quantum: New %v, Implementation %q", Env, err, Implementation())
	}
}

func TestMisusePanics(t *testing.T) {
	everywhere(t, func(t *testing.T, impl implementation) {
		c := makeCipher(t, randomBytes(4, KeySize), impl)
		buf := make([]byte, 3*UnitSize)
		for _, f := range []func(dst, src []byte, unit uint64){c.Encrypt, c.Decrypt} {
			mustPanic(t, "xts: input is not whole units", func() { f(buf, buf[:UnitSize+SectorSize], 0) })
			mustPanic(t, "xts: output is shorter than input", func() { f(buf[:UnitSize], buf[:2*UnitSize], 0) })
			mustPanic(t, "xts: invalid buffer overlap", func() { f(buf[1:], buf[:UnitSize], 0) })
			mustPanic(t, "xts: invalid buffer overlap", func() { f(buf[:2*UnitSize], buf[UnitSize:], 0) })
			f(nil, nil, 0)
			f(buf[UnitSize:], buf[:UnitSize], 0) // neighbours do not overlap
		}
		for _, f := range []func(dst, src []byte, unit uint64, offset int){c.EncryptAt, c.DecryptAt} {
			mustPanic(t, "xts: input is not whole sectors", func() { f(buf, buf[:SectorSize+16], 0, 0) })
			for _, offset := range []int{-SectorSize, 16, UnitSize} {
				mustPanic(t, "xts: offset is not that of a sector in a unit", func() { f(buf, buf[:SectorSize], 0, offset) })
			}
			mustPanic(t, "xts: invalid buffer overlap", func() { f(buf[16:], buf[:SectorSize], 0, 0) })
		}
	})
}

func TestWipe(t *testing.T) {
	everywhere(t, func(t *testing.T, impl implementation) {
		c, err := newCipher(makeKey(t, randomBytes(6, KeySize)), impl)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Wipe()
		var raw []byte
		c.keys.Use(func(b []byte) { raw = b })
		if bytes.Equal(raw, make([]byte, len(raw))) {
			t.Fatal("the expanded keys are not in the locked memory")
		}
		// Something on the same page keeps it mapped after the wipe.
		var neighbours []*secret.Key
		page := func(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) &^ 4095 }
		for len(neighbours) < 1000 {
			k := makeKey(t, []byte{1})
			neighbours = append(neighbours, k)
			same := false
			k.Use(func(b []byte) { same = page(b) == page(raw) })
			if same {
				break
			}
		}
		if len(neighbours) == 1000 {
			t.Fatal("no neighbour on the page of the expanded keys")
		}
		c.Wipe()
		c.Wipe()
		if !bytes.Equal(raw, make([]byte, len(raw))) {
			t.Error("Wipe left key bytes")
		}
		buf := make([]byte, UnitSize)
		mustPanic(t, secret.ErrWiped, func() { c.Encrypt(buf, buf, 0) })
		(*Cipher)(nil).Wipe()
	})
}

// TestHeapCopyIsCleared checks that generic leaves nothing of the key schedule
// where crypto/aes made it.
func TestHeapCopyIsCleared(t *testing.T) {
	b, err := aes.NewCipher(randomBytes(9, KeySize/2))
	if err != nil {
		t.Fatal(err)
	}
	want, got := make([]byte, aes.BlockSize), make([]byte, aes.BlockSize)
	b.Encrypt(want, want)
	typ := reflect.TypeOf(b).Elem()
	heap := unsafe.Slice((*byte)(reflect.ValueOf(b).UnsafePointer()), typ.Size())
	room := make([]uint64, (len(heap)+7)/8)
	moved := move(b, typ, unsafe.Slice((*byte)(unsafe.Pointer(&room[0])), 8*len(room)))
	if !bytes.Equal(heap, make([]byte, len(heap))) {
		t.Error("the heap's copy is not cleared")
	}
	moved.Encrypt(got, got)
	if !bytes.Equal(got, want) {
		t.Error("the moved cipher is another one")
	}
}

// TestConcurrentUse lets the race detector look at one Cipher in many goroutines.
func TestConcurrentUse(t *testing.T) {
	everywhere(t, func(t *testing.T, impl implementation) {
		c := makeCipher(t, randomBytes(13, KeySize), impl)
		plain := randomBytes(14, 4*UnitSize)
		want := make([]byte, len(plain))
		c.Encrypt(want, plain, 100)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				buf := make([]byte, len(plain))
				for range 20 {
					c.Encrypt(buf, plain, 100)
					if !bytes.Equal(buf, want) {
						t.Error("another goroutine changed the result")
						return
					}
					c.Decrypt(buf, buf, 100)
					if !bytes.Equal(buf, plain) {
						t.Error("another goroutine changed the result")
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// TestKeyIsNotKept checks that a Cipher works after its key is gone.
func TestKeyIsNotKept(t *testing.T) {
	everywhere(t, func(t *testing.T, impl implementation) {
		key := makeKey(t, randomBytes(7, KeySize))
		c, err := newCipher(key, impl)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Wipe()
		want, got := make([]byte, UnitSize), make([]byte, UnitSize)
		c.Encrypt(want, want, 9)
		key.Wipe()
		c.Encrypt(got, got, 9)
		if !bytes.Equal(got, want) {
			t.Error("wiping the key changed the cipher")
		}
	})
}

func TestDoesNotAllocate(t *testing.T) {
	everywhere(t, func(t *testing.T, impl implementation) {
		c := makeCipher(t, randomBytes(8, KeySize), impl)
		dst, src := make([]byte, 2*UnitSize), make([]byte, 2*UnitSize)
		for name, f := range map[string]func(){
			"Encrypt":   func() { c.Encrypt(dst, src, 1) },
			"Decrypt":   func() { c.Decrypt(dst, dst, 1) },
			"EncryptAt": func() { c.EncryptAt(dst, src[:SectorSize], 1, SectorSize) },
			"DecryptAt": func() { c.DecryptAt(dst, src[:SectorSize], 1, SectorSize) },
		} {
			if n := testing.AllocsPerRun(100, f); n != 0 {
				t.Errorf("%s allocates %v times", name, n)
			}
		}
	})
}
