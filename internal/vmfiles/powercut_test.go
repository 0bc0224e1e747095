package vmfiles

import (
	"bytes"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"mortise/internal/secret"
)

// A flakyDisk remembers what was written since the last sync, to tell what a power
// cut may leave: any of the sectors written, old, new or torn, and any of the
// changes of length.
type flakyDisk struct {
	disk
	path    string
	durable []byte
	pending []func(*rand.Rand, []byte) []byte
	cut     func() // called when something was done to the disk
}

func (d *flakyDisk) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.disk.WriteAt(p, off)
	for at := 0; at < n; at += sector {
		data, at := bytes.Clone(p[at:min(at+sector, n)]), int(off)+at
		d.pending = append(d.pending, func(r *rand.Rand, image []byte) []byte {
			if r.Intn(2) == 0 {
				return image
			}
			if len(image) < at+len(data) {
				image = append(image, make([]byte, at+len(data)-len(image))...)
			}
			n := len(data)
			if at < dataOffset && r.Intn(3) == 0 {
				n = r.Intn(min(n, 128)) // not even a header's sector is written in one piece
			}
			copy(image[at:], data[:n])
			return image
		})
	}
	d.cut()
	return n, err
}

func (d *flakyDisk) Truncate(size int64) error {
	err := d.disk.Truncate(size)
	d.pending = append(d.pending, func(r *rand.Rand, image []byte) []byte {
		if r.Intn(2) == 0 {
			return image
		}
		if int(size) <= len(image) {
			return image[:size]
		}
		return append(image, make([]byte, int(size)-len(image))...)
	})
	d.cut()
	return err
}

func (d *flakyDisk) Sync() error {
	d.cut()
	b, err := os.ReadFile(d.path)
	d.durable, d.pending = b, nil
	return err
}

// after is one image that a power cut now may leave.
func (d *flakyDisk) after(r *rand.Rand) []byte {
	image := bytes.Clone(d.durable)
	for _, apply := range d.pending {
		image = apply(r, image)
	}
	return image
}

// TestPowerCut cuts the power at every single access to the disk: the file opens,
// has a length that it had since the last sync, and holds every byte that was
// synced and not touched since.
func TestPowerCut(t *testing.T) {
	for seed := range int64(12) {
		powerCut(t, rand.New(rand.NewSource(seed)))
	}
}

func powerCut(t *testing.T, r *rand.Rand) {
	dir := ramDisk(t)
	path, left, k := filepath.Join(dir, "vm.nvram"), filepath.Join(dir, "left.nvram"), newKey(t)
	f, m := create(t, path, k), &model{}
	var (
		synced  []byte
		touched = make([]bool, 1<<20)
		lengths = map[int64]bool{0: true}
		cuts    int
	)
	d := &flakyDisk{disk: f.d, path: path}
	d.durable, _ = os.ReadFile(path)
	d.cut = func() {
		for range 3 {
			cuts++
			if err := os.WriteFile(left, d.after(r), 0o600); err != nil {
				t.Fatal(err)
			}
			checkLeft(t, left, k, lengths, synced, touched)
		}
	}
	f.d = d
	for range 60 {
		plan := r.Int63()
		// What the step will touch is noted before it begins.
		dry := rand.New(rand.NewSource(plan))
		from, to, length := dryStep(dry, len(m.data))
		for i := from; i < to; i++ {
			touched[i] = true
		}
		lengths[int64(length)] = true
		step(t, rand.New(rand.NewSource(plan)), f, m)
		if r.Intn(5) == 0 { // the process is killed, and starts again
			kill(f)
			f = &File{path: path}
			if err := f.openFile(k, os.O_RDWR); err != nil {
				t.Fatal(err)
			}
			d.disk, f.d = f.d, d
			if err := f.load(); err != nil {
				t.Fatal(err)
			}
		}
		if r.Intn(5) == 0 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			synced = bytes.Clone(m.data)
			clear(touched)
			lengths = map[int64]bool{int64(len(synced)): true}
		}
	}
	kill(f)
	if cuts < 300 {
		t.Errorf("the power was cut only %d times", cuts)
	}
}

// dryStep says what step will touch, and the length it will leave.
func dryStep(r *rand.Rand, size int) (from, to, length int) {
	m := &model{make([]byte, size)}
	from, to = stepOn(nil, r, nil, m)
	return from, to, len(m.data)
}

func checkLeft(t *testing.T, path string, k *secret.Key, lengths map[int64]bool, synced []byte, touched []bool) {
	t.Helper()
	f, err := Open(path, k, false)
	if err != nil {
		t.Fatalf("after a power cut: %v", err)
	}
	defer kill(f)
	if !lengths[f.Size()] {
		t.Fatalf("after a power cut the length is %d, of %v", f.Size(), lengths)
	}
	got := content0(t, f)
	if len(got) < len(synced) && !touched[len(got)] {
		t.Fatalf("after a power cut %d bytes of %d are left", len(got), len(synced))
	}
	for i := range min(len(got), len(synced)) {
		if !touched[i] && got[i] != synced[i] {
			t.Fatalf("after a power cut, byte %d of %d was synced and is lost", i, len(synced))
		}
	}
}
