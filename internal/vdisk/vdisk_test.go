package vdisk

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// world is a VM's keys.
type world struct {
	vm   uuid.UUID
	keks keysafe.KEKSet

	direct bool // round the page cache
}

var (
	kekA = keysafe.KeyID{Provider: "kms", Key: "a"}
	kekB = keysafe.KeyID{Provider: "kms", Key: "b"}
)

func newWorld(t testing.TB) world {
	w := world{vm: uuid.New(), keks: keysafe.KEKSet{}}
	for _, id := range []keysafe.KeyID{kekA, kekB} {
		k, err := secret.Random(nil, keysafe.KEKSize)
		if err != nil {
			t.Fatal(err)
		}
		w.keks[id] = k
	}
	return w
}

func (w world) spec(size int64, key keysafe.KeyID) Spec {
	return Spec{Size: size, VM: w.vm, Key: key, KEKs: w.keks}
}

func (w world) options() Options { return Options{VM: w.vm, KEKs: w.keks, Direct: w.direct} }

func create(t testing.TB, path string, s Spec) {
	t.Helper()
	if err := Create(t.Context(), path, s); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string, o Options) *Disk {
	t.Helper()
	d, err := Open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func diskPath(t testing.TB) string { return filepath.Join(t.TempDir(), "vm.vmdk") }

// randomBytes is n bytes that repeat for a seed.
func randomBytes(seed uint64, n int64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

// scribble writes random requests to the disk and to the model.
func scribble(t testing.TB, d device, model []byte, r *rand.Rand, n int) {
	t.Helper()
	for range n {
		off := r.Int64N(d.Size()/SectorSize) * SectorSize
		size := min(d.Size()-off, (1+r.Int64N(40))*SectorSize)
		switch r.IntN(6) {
		case 0:
			if err := d.Trim(off, size); err != nil {
				t.Fatal(err)
			}
			clear(model[off : off+size])
		case 1:
			if err := d.WriteZeroes(off, size, r.IntN(2) == 0); err != nil {
				t.Fatal(err)
			}
			clear(model[off : off+size])
		default:
			b := randomBytes(r.Uint64(), size)
			if r.IntN(4) == 0 {
				clear(b[:SectorSize]) // a sector of zeros that is data
			}
			copy(model[off:], b)
			if err := d.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func compare(t testing.TB, d device, model []byte) {
	t.Helper()
	got := make([]byte, len(model))
	if err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(model); i += SectorSize {
		if !bytes.Equal(got[i:i+SectorSize], model[i:i+SectorSize]) {
			t.Fatalf("sector %d differs: read %x…, want %x…", i/SectorSize, got[i:i+16], model[i:i+16])
		}
	}
}

func TestReadWrite(t *testing.T) { testReadWrite(t, newWorld(t)) }

func testReadWrite(t *testing.T, w world) {
	for _, c := range []struct {
		name string
		size int64
		key  keysafe.KeyID
	}{
		{"clear", 3 << 20, keysafe.KeyID{}},
		{"encrypted", 3 << 20, kekA},
		{"encrypted, last unit partial", 1<<20 + 3*SectorSize, kekA},
		{"one sector", SectorSize, kekA},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := diskPath(t)
			create(t, path, w.spec(c.size, c.key))
			d := open(t, path, w.options())
			if d.Size() != c.size {
				t.Fatalf("size %d, want %d", d.Size(), c.size)
			}
			model := make([]byte, c.size)
			compare(t, d, model)
			scribble(t, d, model, rand.New(rand.NewPCG(1, 2)), 200)
			compare(t, d, model)
			if err := d.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := d.ReadAt(make([]byte, SectorSize), 0); !errors.Is(err, ErrClosed) {
				t.Fatalf("read from a closed disk: %v", err)
			}
			compare(t, open(t, path, w.options()), model)
		})
	}
}

func TestRequestsOutsideTheDisk(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	d := open(t, path, w.options())
	for _, c := range []struct{ off, n int64 }{{-512, 512}, {1 << 20, 512}, {1<<20 - 512, 1024}, {1, 512}, {0, 100}, {1 << 62, 512}} {
		b := make([]byte, c.n)
		for verb, err := range map[string]error{
			"read": d.ReadAt(b, c.off), "write": d.WriteAt(b, c.off), "trim": d.Trim(c.off, c.n),
			"zero": d.WriteZeroes(c.off, c.n, true), "map": d.BlockStatus(c.off, c.n, func(int64, Status) bool { return true }),
		} {
			if err == nil {
				t.Errorf("%s of %d bytes at %d succeeded", verb, c.n, c.off)
			}
		}
	}
	if err := d.ReadAt(nil, 1<<20); err != nil {
		t.Errorf("reading nothing at the end: %v", err)
	}
}

func TestCreateRefusesAndRepeats(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	spec := w.spec(1<<20, kekA)
	spec.KEKs = keysafe.KEKSet{}
	if err := Create(t.Context(), path, spec); !errors.Is(err, ErrKeysRequired) {
		t.Fatalf("without the KEK: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Fatalf("a failed Create left %v", left)
	}
	create(t, path, w.spec(1<<20, kekA))
	if err := Create(t.Context(), path, w.spec(1<<20, kekA)); !errors.Is(err, ErrExists) {
		t.Fatalf("over a disk: %v", err)
	}
	d := open(t, path, w.options())
	if err := d.WriteAt(randomBytes(1, 4096), 0); err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := Create(t.Context(), path, w.spec(1<<20, kekA)); !errors.Is(err, ErrExists) {
		t.Fatalf("over an extent with data: %v", err)
	}
	if err := Delete(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Fatalf("Delete left %v", left)
	}
	create(t, path, w.spec(1<<20, kekA))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, path, w.options()); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
