package vdisk

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

func tempFile(t testing.TB, content []byte) file {
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := (osFS{}).Open(name, os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// A bitmap, its live copy and its durable one agree with a plain model.
func TestBitmap(t *testing.T) {
	const units = 3*regionUnits + 100
	f, live := tempFile(t, nil), tempFile(t, nil)
	b := newBitmap(f, live, units*UnitSize)
	model := make([]bool, units)
	r := rand.New(rand.NewPCG(61, 62))
	equal := func(what string, has func(u int64) bool) {
		t.Helper()
		for u := range model {
			if has(int64(u)) != model[u] {
				t.Fatalf("%s: unit %d is %v", what, u, !model[u])
			}
		}
	}
	stored := func(f file, off int64) func(u int64) bool {
		have := make([]bool, units)
		if err := load(f, off, units, func(from, to int64) {
			for ; from < to; from++ {
				have[from] = true
			}
		}); err != nil {
			t.Fatal(err)
		}
		return func(u int64) bool { return have[u] }
	}
	for range 200 {
		from := r.Int64N(units)
		to := min(from+1+r.Int64N(300), (from/regionUnits+1)*regionUnits, units)
		remove := r.IntN(4) == 0
		if remove {
			if err := b.persist(func() error { return nil }); err != nil { // so that what is removed is durable
				t.Fatal(err)
			}
			to = min(from+1+r.Int64N(6000), units)
			if err := b.remove(from, to); err != nil {
				t.Fatal(err)
			}
		} else if err := b.set(from, to); err != nil {
			t.Fatal(err)
		}
		for u := from; u < to; u++ {
			model[u] = !remove
		}
	}
	equal("in memory", b.has)
	equal("live", stored(live, liveHeader))
	if err := b.persist(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	equal("durable", stored(f, bitmapOffset))
	for u := int64(0); ; {
		from, to := b.next(u)
		for ; u < min(from, units); u++ {
			if model[u] {
				t.Fatalf("next misses unit %d", u)
			}
		}
		if from >= units {
			break
		}
		for ; u < to; u++ {
			if !model[u] {
				t.Fatalf("next has unit %d", u)
			}
		}
	}
}

// The index agrees with a plain table.
func TestIndex(t *testing.T) {
	const units = 3*leafUnits + 77
	x := newIndex(units * UnitSize)
	model := make([]uint8, units)
	r := rand.New(rand.NewPCG(71, 72))
	for range 2000 {
		from := r.Int64N(units)
		to := min(from+1+r.Int64N(1+r.Int64N(3000)), units)
		slot := uint8(r.IntN(5))
		if r.IntN(5) == 0 {
			old := uint8(1 + r.IntN(4))
			x.move(from, to, old, slot)
			for u := from; u < to; u++ {
				if model[u] == old {
					model[u] = slot
				}
			}
		} else {
			x.set(from, to, slot)
			for u := from; u < to; u++ {
				model[u] = slot
			}
		}
		for u, end := from, min(to+50, units); u < end; {
			got, next := x.run(u, end)
			for v := u; v < next; v++ {
				if model[v] != got {
					t.Fatalf("unit %d: link %d, want %d", v, got, model[v])
				}
			}
			if next <= u || next < end && model[next] == got {
				t.Fatalf("the run of unit %d ends at %d", u, next)
			}
			u = next
		}
	}
}

// Whatever stands in a bitmap, reading it gives runs in order inside the disk, with
// as many units as there are bits.
func FuzzBitmapLoad(f *testing.F) {
	f.Add([]byte{0xff, 0, 0x81}, uint16(20))
	f.Add([]byte{}, uint16(5000))
	f.Add(make([]byte, 600), uint16(4097))
	f.Fuzz(func(t *testing.T, content []byte, units uint16) {
		want := 0
		padded := append(append([]byte(nil), content...), make([]byte, 8)...)
		for u := 0; u < int(units) && u/8 < len(content); u += 8 {
			b := padded[u/8]
			if left := int(units) - u; left < 8 {
				b &= 1<<left - 1
			}
			want += bits.OnesCount8(b)
		}
		file := tempFile(t, append(binary.LittleEndian.AppendUint64(nil, 0), content...))
		got, last := 0, int64(-1)
		err := load(file, 8, int64(units), func(from, to int64) {
			if from < last || to <= from || to > int64(units) {
				t.Fatalf("run %d to %d of %d units behind %d", from, to, units, last)
			}
			got, last = got+int(to-from), to
		})
		if err != nil || got != want {
			t.Fatalf("%d units, want %d: %v", got, want, err)
		}
	})
}
