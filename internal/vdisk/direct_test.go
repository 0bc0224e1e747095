package vdisk

import (
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// directWorld is a world whose disks go round the page cache, if they can here.
func directWorld(t testing.TB) world {
	w, path := newWorld(t), diskPath(t)
	w.direct = true
	create(t, path, w.spec(1<<20, kekA))
	d, err := Open(t.Context(), path, w.options())
	if errors.Is(err, ErrUnsupported) {
		t.Skipf("the folder for tests has no direct I/O: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	return w
}

// Everything holds round the page cache too.
func TestDirect(t *testing.T) {
	w := directWorld(t)
	for name, test := range map[string]func(*testing.T, world){
		"read and write": testReadWrite, "chain": testChainReadsWhatWasWritten, "snapshots under load": testSnapshotsUnderLoad,
		"everything at once": testEverythingAtOnce, "parts of a unit": testPartsOfAUnitAtOnce, "cancel and resume": testCancelAndResume,
		"consolidate": testConsolidateEachLink, "consolidate under load": testConsolidateUnderLoad, "block status": testBlockStatus, "thick": testThick,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, w)
		})
	}
}

// Buffers at any address will do; who reads through the page cache sees the same.
func TestDirectAnyBuffer(t *testing.T) {
	w, path := directWorld(t), diskPath(t)
	const size = 4<<20 - SectorSize
	create(t, path, w.spec(size, kekA))
	d := open(t, path, w.options())
	r := rand.New(rand.NewPCG(1, 2))
	model, raw := make([]byte, size), make([]byte, size+bounceAlign)
	for range 300 {
		off := r.Int64N(size/SectorSize) * SectorSize
		n := min(size-off, SectorSize*(1+r.Int64N([]int64{4, 100, 4000}[r.IntN(3)])))
		p := raw[r.IntN(bounceAlign):][:n]
		switch r.IntN(3) {
		case 0:
			if err := d.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
			if string(p) != string(model[off:off+n]) {
				t.Fatalf("%d bytes at %d differ", n, off)
			}
		case 1:
			copy(p, randomBytes(r.Uint64(), n))
			copy(model[off:], p)
			if err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		default: // as a conversion writes, in the stored form
			if err := readFull(d.ext.f, p, off); err != nil {
				t.Fatal(err)
			}
			if err := d.ext.f.WriteDurably(p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(d.Flush(t.Context()), d.Close()); err != nil {
		t.Fatal(err)
	}
	w.direct = false
	compare(t, open(t, path, w.options()), model)
}

func TestDirectAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates, and empties pools")
	}
	w, path := directWorld(t), diskPath(t)
	create(t, path, w.spec(4<<20, kekA))
	d := open(t, path, w.options())
	for name, p := range map[string][]byte{"on a page": alignedBuffer(64 << 10), "beside one": alignedBuffer(65 << 10)[1 : 64<<10+1]} {
		if n := testing.AllocsPerRun(50, func() {
			if err := errors.Join(d.WriteAt(p, 0), d.ReadAt(p, 64<<10)); err != nil {
				t.Fatal(err)
			}
		}); n >= 1 {
			t.Errorf("buffer %s: %v allocations", name, n)
		}
	}
}

// Storage that cannot do it with single sectors is refused, and says why.
func TestDirectRefused(t *testing.T) {
	for name, c := range map[string]struct{ sector, options, says string }{
		"large sectors":   {"4096", "defaults", "4096 bytes"},
		"data in journal": {"512", "data=journal", "file system has none"},
	} {
		t.Run(name, func(t *testing.T) {
			w, dir := newWorld(t), t.TempDir()
			image, point := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
			if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20), os.Mkdir(point, 0o700)); err != nil {
				t.Fatal(err)
			}
			loop, err := exec.Command("losetup", "-f", "--show", "-b", c.sector, image).CombinedOutput()
			if err != nil {
				t.Skipf("no loop device here: %s", loop)
			}
			device := strings.TrimSpace(string(loop))
			t.Cleanup(func() { _ = exec.Command("losetup", "-d", device).Run() })
			if out, err := exec.Command("mkfs.ext4", "-q", "-b", "4096", device).CombinedOutput(); err != nil {
				t.Skipf("mkfs.ext4: %s", out)
			}
			if out, err := exec.Command("mount", "-o", c.options, device, point).CombinedOutput(); err != nil {
				t.Skipf("mount: %s", out)
			}
			t.Cleanup(func() { _ = exec.Command("umount", point).Run() })
			path := filepath.Join(point, "vm.vmdk")
			create(t, path, w.spec(1<<20, kekA))
			w.direct = true
			if _, err := Open(t.Context(), path, w.options()); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "without direct I/O") {
				t.Errorf("%v", err)
			}
			w.direct = false
			open(t, path, w.options()).Close()
		})
	}
}
