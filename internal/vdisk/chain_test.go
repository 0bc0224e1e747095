package vdisk

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mortise/internal/keysafe"
)

// chainOptions keep live bitmaps in a folder of the test's own.
func (w world) chainOptions(t testing.TB) Options {
	o := w.options()
	o.Live = filepath.Join(t.TempDir(), "live")
	return o
}

func openChain(t testing.TB, path string, o Options) *Chain {
	t.Helper()
	c, err := OpenChain(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func closeChain(t testing.TB, c *Chain) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func takeSnapshot(t testing.TB, c *Chain) string {
	t.Helper()
	path, err := c.Snapshot(t.Context(), LinkSpec{})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A device is a Disk or a Chain.
type device interface {
	Size() int64
	ReadAt(p []byte, off int64) error
	WriteAt(p []byte, off int64) error
	Trim(off, n int64) error
	WriteZeroes(off, n int64, punch bool) error
	BlockStatus(off, n int64, emit func(n int64, s Status) bool) error
}

// A chain shows what was written to it, across snapshots, openings and forms of its
// links, and BlockStatus calls nothing zero that is not.
func TestChainReadsWhatWasWritten(t *testing.T) { testChainReadsWhatWasWritten(t, newWorld(t)) }

func testChainReadsWhatWasWritten(t *testing.T, w world) {
	for _, c := range []struct {
		name string
		size int64
		key  keysafe.KeyID
	}{
		{"clear", 18 << 20, keysafe.KeyID{}},
		{"encrypted", 18 << 20, kekA},
		{"encrypted, last unit partial", 17<<20 + 5*SectorSize, kekA},
		{"clear, last unit partial", 1<<20 + SectorSize, keysafe.KeyID{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := diskPath(t)
			create(t, path, w.spec(c.size, c.key))
			o := w.chainOptions(t)
			d := openChain(t, path, o)
			r := rand.New(rand.NewPCG(5, 6))
			model := make([]byte, c.size)
			for round := range 12 {
				scribble(t, d, model, r, 60)
				// The end of the disk, and the border between two regions.
				for _, at := range []int64{c.size - SectorSize, min(16<<20-SectorSize, c.size-2*SectorSize)} {
					b := randomBytes(r.Uint64(), SectorSize*min(2, (c.size-at)/SectorSize))
					copy(model[at:], b)
					if err := d.WriteAt(b, at); err != nil {
						t.Fatal(err)
					}
				}
				compare(t, d, model)
				checkStatus(t, d, model)
				switch round % 3 {
				case 0:
					path = takeSnapshot(t, d)
				case 1:
					if err := d.Flush(t.Context()); err != nil {
						t.Fatal(err)
					}
					closeChain(t, d)
					ro := o
					ro.ReadOnly = true
					d = openChain(t, path, ro)
					compare(t, d, model)
					if err := d.WriteAt(make([]byte, SectorSize), 0); !errors.Is(err, ErrReadOnly) {
						t.Fatal(err)
					}
					closeChain(t, d)
					d = openChain(t, path, o)
				case 2: // not flushed: the live bitmap has what the next one needs
					closeChain(t, d)
					d = openChain(t, path, o)
				}
				compare(t, d, model)
			}
			if len(d.links) != 5 {
				t.Fatalf("%d links", len(d.links))
			}
		})
	}
}

func checkStatus(t testing.TB, d device, model []byte) {
	t.Helper()
	off := int64(0)
	err := d.BlockStatus(0, d.Size(), func(n int64, s Status) bool {
		if s&Zero != 0 && !bytes.Equal(model[off:off+n], make([]byte, n)) {
			t.Fatalf("%d bytes at %d are said to be zero and are not", n, off)
		}
		off += n
		return true
	})
	if err != nil || off != d.Size() {
		t.Fatalf("block status ends at %d: %v", off, err)
	}
}

// Each snapshot keeps what it froze, whatever is written above it.
func TestRevertShowsWhatWasFrozen(t *testing.T) {
	w := newWorld(t)
	for _, key := range []keysafe.KeyID{{}, kekA} {
		path := diskPath(t)
		create(t, path, w.spec(2<<20, key))
		o := w.chainOptions(t)
		d := openChain(t, path, o)
		r := rand.New(rand.NewPCG(7, 8))
		model := make([]byte, d.Size())
		links, frozen := []string{path}, [][]byte{}
		for range 6 {
			scribble(t, d, model, r, 30)
			frozen = append(frozen, slices.Clone(model))
			links = append(links, takeSnapshot(t, d))
		}
		scribble(t, d, model, r, 30)
		closeChain(t, d)
		for i, want := range frozen {
			if _, err := OpenChain(t.Context(), links[i], o); !errors.Is(err, ErrChildren) && !errors.Is(err, ErrSealed) {
				t.Fatalf("a snapshot's link opened for writing: %v", err)
			}
			link, err := Revert(t.Context(), links[i], o, LinkSpec{})
			if err != nil {
				t.Fatal(err)
			}
			d := openChain(t, link, o)
			compare(t, d, want)
			scribble(t, d, want, r, 30)
			compare(t, d, want)
			closeChain(t, d)
			if err := Delete(t.Context(), links[i]); !errors.Is(err, ErrChildren) {
				t.Fatalf("deleting a link that others stand on: %v", err)
			}
			if i%2 == 0 {
				if err := Delete(t.Context(), link); err != nil {
					t.Fatal(err)
				}
			}
		}
		compare(t, openChain(t, links[len(links)-1], o), model)
	}
}

// Requests go on while snapshots are made, and each reader sees its own writes.
func TestSnapshotsUnderLoad(t *testing.T) { testSnapshotsUnderLoad(t, newWorld(t)) }

func testSnapshotsUnderLoad(t *testing.T, w world) {
	path := diskPath(t)
	const workers, piece = 4, 1 << 20
	create(t, path, w.spec(workers*piece, kekA))
	o := w.chainOptions(t)
	d := openChain(t, path, o)
	model := make([]byte, workers*piece)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 9))
			mine := model[i*piece:][:piece]
			for {
				select {
				case <-stop:
					return
				default:
				}
				off := r.Int64N(piece/SectorSize) * SectorSize
				n := min(piece-off, (1+r.Int64N(30))*SectorSize)
				b := randomBytes(r.Uint64(), n)
				copy(mine[off:], b)
				if err := d.WriteAt(b, int64(i*piece)+off); err != nil {
					t.Error(err)
					return
				}
				if err := d.ReadAt(b, int64(i*piece)+off); err != nil || !bytes.Equal(b, mine[off:off+n]) {
					t.Errorf("read back: %v", err)
					return
				}
				time.Sleep(200 * time.Microsecond)
			}
		})
	}
	for range 12 {
		path = takeSnapshot(t, d)
	}
	close(stop)
	wg.Wait()
	compare(t, d, model)
	closeChain(t, d)
	compare(t, openChain(t, path, o), model)
}

// Conversions, consolidations, snapshots and flushes at once, under a guest: links
// come and go while others are rewritten.
func TestEverythingAtOnce(t *testing.T) { testEverythingAtOnce(t, newWorld(t)) }

func testEverythingAtOnce(t *testing.T, w world) {
	path := diskPath(t)
	const workers, piece = 3, 1 << 20
	create(t, path, w.spec(workers*piece, keysafe.KeyID{}))
	o := w.chainOptions(t)
	o.zone = 512 << 10
	d := openChain(t, path, o)
	model := make([]byte, workers*piece)
	stop := make(chan struct{})
	done := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 99))
			mine := model[i*piece:][:piece]
			for !done() {
				off := r.Int64N(piece/SectorSize) * SectorSize
				b := randomBytes(r.Uint64(), min(piece-off, (1+r.Int64N(30))*SectorSize))
				copy(mine[off:], b)
				err := d.WriteAt(b, int64(i*piece)+off)
				if err == nil {
					err = d.ReadAt(b, int64(i*piece)+off)
				}
				if err == nil && !bytes.Equal(b, mine[off:][:len(b)]) {
					err = errors.New("not what was written")
				}
				if err == nil && r.IntN(10) == 0 {
					err = d.Flush(context.Background())
				}
				if err != nil {
					t.Error(err)
					return
				}
				d.Info()
				time.Sleep(time.Millisecond)
			}
		})
	}
	var top atomic.Pointer[string] // what a VMX would say
	top.Store(&path)
	record := func(p string) error { top.Store(&p); return nil }
	wg.Go(func() {
		for range 6 {
			if _, err := d.Snapshot(context.Background(), LinkSpec{Commit: record}); err != nil {
				t.Error(err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	for _, target := range []Target{{Kind: Encrypting, Key: kekA, Epoch: 1}, {Kind: Recrypting, Key: kekB}} {
		if err := d.Convert(t.Context(), target, nil); err != nil {
			t.Fatal(err)
		}
		links := d.Links()
		for _, l := range links[max(1, len(links)-3):] {
			if err := d.Consolidate(t.Context(), MergeSpec{Link: l.Path, Commit: record}); err != nil && !errors.Is(err, ErrMissing) {
				t.Fatal(err)
			}
		}
	}
	close(stop)
	wg.Wait()
	compare(t, d, model)
	if err := d.ShallowRecrypt(t.Context(), kekA); err != nil {
		t.Fatal(err)
	}
	closeChain(t, d)
	o.Expect = Expect{Encrypted: true, Epoch: 2}
	compare(t, openChain(t, *top.Load(), o), model)
}

// Two parts of one unit, and the whole of it, written at once to a link that lacks
// it: nothing that was acknowledged is lost.
func TestPartsOfAUnitAtOnce(t *testing.T) { testPartsOfAUnitAtOnce(t, newWorld(t)) }

func testPartsOfAUnitAtOnce(t *testing.T, w world) {
	path := diskPath(t)
	create(t, path, w.spec(8<<20, kekA))
	d := openChain(t, path, w.chainOptions(t))
	base := randomBytes(1, d.Size())
	if err := d.WriteAt(slices.Clone(base), 0); err != nil {
		t.Fatal(err)
	}
	takeSnapshot(t, d)
	for u := int64(0); u < d.Size(); u += UnitSize {
		var wg sync.WaitGroup
		want := slices.Clone(base[u : u+UnitSize])
		for s := int64(0); s < 8; s += 2 {
			wg.Go(func() {
				b := bytes.Repeat([]byte{byte(s) + 1}, SectorSize)
				copy(want[s*SectorSize:], b)
				if err := d.WriteAt(b, u+s*SectorSize); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		got := make([]byte, UnitSize)
		if err := d.ReadAt(got, u); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("unit %d: %v", u/UnitSize, err)
		}
	}
}

// The data path allocates nothing, whatever it touches.
func TestRequestsAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates, and empties pools")
	}
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(64<<20, kekA))
	d := openChain(t, path, w.chainOptions(t))
	buf := make([]byte, 64<<10)
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		if err := d.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	takeSnapshot(t, d)
	if err := d.WriteAt(buf[:4096], 0); err != nil { // region and leaf are there
		t.Fatal(err)
	}
	next := int64(4096)
	for name, request := range map[string]func() error{
		"read":                    func() error { return d.ReadAt(buf, 0) },
		"write":                   func() error { return d.WriteAt(buf[:4096], 0) },
		"write of an absent unit": func() error { next += 4096; return d.WriteAt(buf[:4096], next) },
		"write of a part":         func() error { next += 4096; return d.WriteAt(buf[:512], next+512) },
	} {
		if n := testing.AllocsPerRun(100, func() {
			if err := request(); err != nil {
				t.Fatal(err)
			}
		}); n >= 1 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// What is wrong with a chain is said, and changes nothing.
func TestChainRefuses(t *testing.T) {
	w := newWorld(t)
	o := w.chainOptions(t)
	build := func(t *testing.T, key keysafe.KeyID) (dir string) {
		dir = t.TempDir()
		path := filepath.Join(dir, "vm.vmdk")
		create(t, path, w.spec(1<<20, key))
		d := openChain(t, path, o)
		scribble(t, d, make([]byte, 1<<20), rand.New(rand.NewPCG(1, 1)), 10)
		takeSnapshot(t, d)
		scribble(t, d, make([]byte, 1<<20), rand.New(rand.NewPCG(1, 2)), 10)
		takeSnapshot(t, d)
		scribble(t, d, make([]byte, 1<<20), rand.New(rand.NewPCG(1, 3)), 10)
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		closeChain(t, d)
		return dir
	}
	replace := func(name, old, new string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			p := filepath.Join(dir, name)
			b, err := os.ReadFile(p)
			if err != nil || !bytes.Contains(b, []byte(old)) {
				t.Fatalf("%s has no %q: %v", name, old, err)
			}
			if err := os.WriteFile(p, bytes.ReplaceAll(b, []byte(old), []byte(new)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	copyOver := func(from, to string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, from))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, to), b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	const top = "vm-000002.vmdk"
	for _, c := range []struct {
		name  string
		key   keysafe.KeyID
		do    func(t *testing.T, dir string)
		kind  error
		want  Expect
		other bool // opened as a disk of another VM
	}{
		{name: "parent missing", do: remove("vm-000001.vmdk"), kind: ErrMissing},
		{name: "parent's extent missing", do: remove("vm-000001-delta.vmdk"), kind: ErrMissing},
		{name: "parent's state missing", do: remove("vm-000001-delta.vmdk.state"), kind: ErrState},
		{name: "parent left out", do: replace(top, "vm-000001.vmdk", "vm.vmdk"), kind: ErrParent},
		{name: "parent changed", do: replace("vm.vmdk", "\nCID=", "\nCID=0000000e\nx="), kind: ErrParent},
		{name: "circle", do: replace("vm-000001.vmdk", `"vm.vmdk"`, `"vm-000002.vmdk"`), kind: ErrParent},
		{name: "in another folder", do: replace(top, `"vm-000001.vmdk"`, `"../other/vm-000001.vmdk"`), kind: ErrParent},
		{name: "out of the datastore", do: replace(top, `"vm-000001.vmdk"`, `"../../etc/x.vmdk"`), kind: ErrTampered},
		{name: "older link in the newer's place", do: copyOver("vm-000001.vmdk", top), kind: ErrTampered},
		{name: "encrypted: parent left out", key: kekA, do: replace(top, "vm-000001.vmdk", "vm.vmdk"), kind: ErrTampered},
		{name: "encrypted: older link in the newer's place", key: kekA, do: copyOver("vm-000001.vmdk", top), kind: ErrTampered},
		{name: "encrypted: another link's state", key: kekA, do: copyOver("vm-000001-delta.vmdk.state", top[:9]+"-delta.vmdk.state"), kind: ErrState},
		{name: "encrypted: another link's key safe", key: kekA, do: func(t *testing.T, dir string) {
			other, err := os.ReadFile(filepath.Join(dir, "vm-000001.vmdk"))
			if err != nil {
				t.Fatal(err)
			}
			mine, err := os.ReadFile(filepath.Join(dir, top))
			if err != nil {
				t.Fatal(err)
			}
			safe := regexp.MustCompile(`encryption.keySafe = ".*"`)
			if err := os.WriteFile(filepath.Join(dir, top), safe.ReplaceAll(mine, safe.Find(other)), 0o600); err != nil {
				t.Fatal(err)
			}
		}, kind: ErrTampered},
		{name: "encrypted: sealed by hand", key: kekA, do: replace(top, "\nCID=", "\nmortise.sealed=\"x\"\nCID="), kind: ErrTampered},
		{name: "in clear, should be encrypted", do: func(*testing.T, string) {}, want: Expect{Encrypted: true}, kind: ErrNotEncrypted},
		{name: "older epoch", key: kekA, do: func(*testing.T, string) {}, want: Expect{Encrypted: true, Epoch: 2}, kind: ErrStale},
		{name: "link's file cut", key: kekA, do: func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "vm-000001-delta.vmdk"), 4096); err != nil {
				t.Fatal(err)
			}
		}, kind: ErrShort},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := build(t, c.key)
			c.do(t, dir)
			before := folderContent(t, dir)
			o := o
			o.Expect = c.want
			d, err := OpenChain(t.Context(), filepath.Join(dir, top), o)
			if err == nil {
				d.Close()
			}
			var e *Error
			if !errors.Is(err, c.kind) || !errors.As(err, &e) || !strings.Contains(err.Error(), "restore") && e.Fix == "" {
				t.Fatalf("%v, want %v with a way out", err, c.kind)
			}
			if !reflect.DeepEqual(before, folderContent(t, dir)) {
				t.Error("the refusal changed a file")
			}
		})
	}
}

func folderContent(t *testing.T, dir string) map[string]string {
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		all[p] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// What a crash in the middle of Snapshot leaves is removed when its parent is opened
// for writing; what Revert has made, or was used, is not.
func TestLeftoverOfSnapshot(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	o := w.chainOptions(t)
	d := openChain(t, path, o)
	no := errors.New("no")
	if _, err := d.Snapshot(t.Context(), LinkSpec{Commit: func(string) error { return no }}); !errors.Is(err, no) {
		t.Fatal(err)
	}
	if left := linkStems(t, filepath.Dir(path)); len(left) != 1 || len(d.links) != 1 {
		t.Fatalf("a snapshot that was not recorded left %v", left)
	}
	if _, err := d.links[0].makeLink(t.Context(), "", kekA, 1, 0); err != nil { // as far as a crash lets Snapshot get
		t.Fatal(err)
	}
	closeChain(t, d)
	d = openChain(t, path, o)
	if left := linkStems(t, filepath.Dir(path)); len(left) != 1 {
		t.Fatalf("a crash left %v", left)
	}
	closeChain(t, d)
	if _, err := Revert(t.Context(), path, o, LinkSpec{}); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenChain(t.Context(), path, o); !errors.Is(err, ErrChildren) {
		t.Fatalf("opened under a link that is in use: %v", err)
	}
}
