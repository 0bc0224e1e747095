package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func newBitmapFor(t testing.TB, name string, disk *memDisk) *Bitmap {
	t.Helper()
	b, err := CreateBitmap(filepath.Join(t.TempDir(), name), BitmapSpec{Name: name, Size: disk.Size()}, "session 1", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close("session 1"); err != nil {
			t.Error(err)
		}
	})
	return b
}

// connectWith is a client that has chosen these contexts.
func connectWith(t testing.TB, path, export string, contexts ...string) *client {
	t.Helper()
	c := dial(t, path)
	c.structuredReplies()
	if r := c.option(optSetMetaContext, metaQuery(export, contexts...)); r.kind != repAck || len(r.infos) != len(contexts) {
		t.Fatalf("SET_META_CONTEXT: %+v", r)
	}
	c.transmit(export)
	return c
}

// Changes show in the bitmap, and on other exports that offer it, and nothing else.
func TestBitmap(t *testing.T) {
	disk := newMemDisk(t, 4<<20)
	s, exp, path := serve(t, disk, Options{}, false)
	b := newBitmapFor(t, "b1", disk)
	connect(t, path, true).mustWrite(2<<20, make([]byte, 4096)) // before it is kept
	if err := exp.Track(b); err != nil {
		t.Fatal(err)
	}
	backup, err := s.Add("backup", disk, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := backup.Offer(b); err != nil {
		t.Fatal(err)
	}
	c := connectWith(t, path, "disk", metaAllocation, metaBitmap+"b1")
	if r := c.do(cmdBlockStatus, 0, 0, 4<<20, nil); !slices.Equal(r.changed, []extent{{4 << 20, 0}}) || len(r.extents) != 3 {
		t.Errorf("at first: %+v, %+v", r.changed, r.extents)
	}
	c.mustWrite(64<<10-512, make([]byte, 1024)) // two granules
	for _, cmd := range []command{cmdTrim, cmdWriteZeroes} {
		if r := c.do(cmd, 0, uint64(cmd)<<18, 512, nil); r.err != 0 {
			t.Errorf("%v: %+v", cmd, r)
		}
	}
	c.mustWrite(3<<20, make([]byte, 300<<10)) // in pieces
	c.mustRead(512<<10, 4096)
	want := []extent{
		{128 << 10, 1}, {1<<20 - 128<<10, 0},
		{64 << 10, 1}, {512<<10 - 64<<10, 0}, // trimmed at 1 MiB
		{64 << 10, 1}, {1<<20 + 512<<10 - 64<<10, 0}, // zeroed at 1.5 MiB
		{320 << 10, 1}, {704 << 10, 0},
	}
	for _, export := range []string{"disk", "backup"} {
		c := connectWith(t, path, export, metaBitmap+"b1")
		if r := c.do(cmdBlockStatus, 0, 0, 4<<20, nil); !slices.Equal(r.changed, want) || r.extents != nil {
			t.Errorf("%s: %+v", export, r.changed)
		}
		if r := c.do(cmdBlockStatus, cmdFlagReqOne, 64<<10+512, 1<<20, nil); !slices.Equal(r.changed, []extent{{64<<10 - 512, 1}}) {
			t.Errorf("%s, one extent: %+v", export, r.changed)
		}
	}
	if b.Dirty() != (128+64+64+320)<<10 {
		t.Errorf("%d bytes dirty", b.Dirty())
	}
	exp.Withdraw(b)
	c.mustWrite(2<<20, make([]byte, 4096))
	if b.Dirty() != (128+64+64+320)<<10 {
		t.Error("a bitmap was kept after it was withdrawn")
	}
	if r := dialStructured(t, path).option(optListMetaContext, metaQuery("disk")); len(r.infos) != 1 {
		t.Errorf("%d contexts after the withdrawal", len(r.infos))
	}
}

func dialStructured(t testing.TB, path string) *client {
	c := dial(t, path)
	c.structuredReplies()
	return c
}

func TestBitmapContexts(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, exp, path := serve(t, disk, Options{}, false)
	for _, name := range []string{"b1", "b2"} {
		if err := exp.Track(newBitmapFor(t, name, disk)); err != nil {
			t.Fatal(err)
		}
	}
	if err := exp.Track(newBitmapFor(t, "b1", disk)); err == nil {
		t.Error("two bitmaps of one name")
	}
	for _, tt := range []struct {
		opt     option
		queries []string
		want    string
	}{
		{optListMetaContext, nil, "0 base:allocation,0 qemu:dirty-bitmap:b1,0 qemu:dirty-bitmap:b2"},
		{optListMetaContext, []string{"qemu:"}, "0 qemu:dirty-bitmap:b1,0 qemu:dirty-bitmap:b2"},
		{optListMetaContext, []string{"qemu:dirty-bitmap:"}, "0 qemu:dirty-bitmap:b1,0 qemu:dirty-bitmap:b2"},
		{optListMetaContext, []string{"qemu:dirty-bitmap:b2", "base:"}, "0 base:allocation,0 qemu:dirty-bitmap:b2"},
		{optListMetaContext, []string{"qemu:allocation-depth"}, ""},
		{optSetMetaContext, []string{"qemu:dirty-bitmap:"}, ""},
		{optSetMetaContext, []string{"qemu:dirty-bitmap:b2", "qemu:dirty-bitmap:b2"}, "2 qemu:dirty-bitmap:b2"},
		{optSetMetaContext, []string{"qemu:dirty-bitmap:b2", "base:allocation", "qemu:dirty-bitmap:b1"}, "1 base:allocation,2 qemu:dirty-bitmap:b1,3 qemu:dirty-bitmap:b2"},
		{optSetMetaContext, []string{"qemu:dirty-bitmap:b3"}, ""},
	} {
		r := dialStructured(t, path).option(tt.opt, metaQuery("disk", tt.queries...))
		var got []string
		for _, i := range r.infos {
			got = append(got, fmt.Sprintf("%d %s", i[3], i[4:]))
		}
		if r.kind != repAck || strings.Join(got, ",") != tt.want {
			t.Errorf("option %d, %q: %q", tt.opt, tt.queries, got)
		}
	}
}

// What is behind the end that the disk had has changed.
func TestBitmapGrow(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, exp, path := serve(t, disk, Options{}, false)
	b := newBitmapFor(t, "b", disk)
	if err := exp.Track(b); err != nil {
		t.Fatal(err)
	}
	disk.grow(1 << 20)
	c := connectWith(t, path, "disk", metaBitmap+"b")
	c.mustWrite(1<<20, make([]byte, 4096))
	if r := c.do(cmdBlockStatus, 0, 0, 2<<20, nil); !slices.Equal(r.changed, []extent{{1 << 20, 0}, {1 << 20, 1}}) {
		t.Errorf("%+v", r.changed)
	}
}

// A bitmap lives on in its file, unless the disk was changed without it.
func TestBitmapReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm-flat.vmdk.b.dirty")
	const size = 10 << 30
	b, err := CreateBitmap(path, BitmapSpec{Name: "b", Size: size, Granularity: 128 << 10}, "opening 7", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := CreateBitmap(path, BitmapSpec{Name: "b", Size: size}, "opening 7", nil); !errors.Is(err, os.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	mark := func(b *Bitmap, off, n int64) {
		t.Helper()
		if err := b.mark(off, n); err != nil {
			t.Fatal(err)
		}
	}
	mark(b, 5<<30, 1)
	mark(b, 0, 1<<30)
	if err := b.Close("opening 7"); err != nil {
		t.Fatal(err)
	}
	if b, err = OpenBitmap(path, size, "opening 7", "opening 8", nil); err != nil {
		t.Fatal(err)
	}
	if b.Name() != "b" || b.Granularity() != 128<<10 || b.Dirty() != 1<<30+128<<10 {
		t.Errorf("%q, granularity %d, %d dirty", b.Name(), b.Granularity(), b.Dirty())
	}
	mark(b, 6<<30, 1)
	// As if the process had died: the file stays as it is.
	crashed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Close("opening 8"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, crashed, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() (*Bitmap, error){
		"older disk":   func() (*Bitmap, error) { return OpenBitmap(path, size, "opening 7", "opening 8", nil) },
		"newer disk":   func() (*Bitmap, error) { return OpenBitmap(path, size, "opening 9", "opening 10", nil) },
		"unknown disk": func() (*Bitmap, error) { return OpenBitmap(path, size, "", "opening 10", nil) },
		"smaller disk": func() (*Bitmap, error) { return OpenBitmap(path, size-512, "opening 8", "opening 9", nil) },
	} {
		if _, err := open(); !errors.Is(err, ErrBitmapStale) || !strings.Contains(err.Error(), "full backup") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if b, err = OpenBitmap(path, 2*size, "opening 8", "", nil); err != nil {
		t.Fatal(err)
	}
	if want := int64(1<<30 + (1+granulesPerRegion)*128<<10); b.Dirty() != want {
		t.Errorf("after a crash %d bytes are dirty, want %d: what was marked, and the region of what was marked since", b.Dirty(), want)
	}
	if !b.dirtyAt(6<<30) || b.dirtyAt(3<<30) || !b.dirtyAt(size) {
		t.Error("the wrong regions")
	}
	if err := b.Delete(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBitmap(path, size, "opening 8", "", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after its deletion: %v", err)
	}
}

func TestBitmapRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, spec := range map[string]BitmapSpec{
		"no name":               {Size: 1 << 20},
		"a name with a slash":   {Name: "a/b", Size: 1 << 20},
		"a long name":           {Name: strings.Repeat("x", 65), Size: 1 << 20},
		"no size":               {Name: "b"},
		"no whole sectors":      {Name: "b", Size: 1000},
		"odd granularity":       {Name: "b", Size: 1 << 20, Granularity: 65000},
		"small granularity":     {Name: "b", Size: 1 << 20, Granularity: 512},
		"large granularity":     {Name: "b", Size: 1 << 40, Granularity: 1 << 30},
		"too fine for the disk": {Name: "b", Size: 1 << 50, Granularity: 4096},
	} {
		if _, err := CreateBitmap(filepath.Join(dir, "x"), spec, "s", nil); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	// The largest disk has a bitmap of a few MiB.
	h, err := newBitmapHeader(BitmapSpec{Name: "b", Size: 62 << 40}, "s")
	if err != nil || recordOffset(h.records()) > 8<<20 {
		t.Errorf("62 TiB: %d records, %v", h.records(), err)
	}
}

// lossyFile is a bitmap's file that loses power: what is not durable may be there
// or not, sector by sector.
type lossyFile struct {
	mu      sync.Mutex
	now     []byte // what a read sees
	durable []byte

	lies   bool  // a planted bug: WriteDurably is not
	fail   error // of writes
	stuck  error // of Remove
	gone   bool
	writes int
}

func newLossyFile(h bitmapHeader) *lossyFile {
	f := &lossyFile{now: make([]byte, recordOffset(h.records()))}
	copy(f.now, h.encode())
	for i := range h.records() {
		p := make([]byte, recordSize)
		p[offIndex], p[offIndex+1] = byte(i), byte(i>>8)
		copy(f.now[recordOffset(i):], putCRC(p))
	}
	f.durable = bytes.Clone(f.now)
	return f
}

func (f *lossyFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if off >= int64(len(f.now)) {
		return 0, io.EOF
	}
	return copy(p, f.now[off:]), nil
}

func (f *lossyFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writes++
	if f.fail != nil {
		return 0, f.fail
	}
	return copy(f.now[off:], p), nil
}

func (f *lossyFile) WriteDurably(p []byte, off int64) error {
	n, err := f.WriteAt(p, off)
	if err == nil && !f.lies {
		f.mu.Lock()
		defer f.mu.Unlock()
		copy(f.durable[off:], p[:n])
	}
	return err
}

func (f *lossyFile) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.durable, f.now)
	return f.fail
}

func (f *lossyFile) Remove() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stuck == nil {
		f.gone = true
	}
	return f.stuck
}

func (f *lossyFile) Close() error { return nil }

// cut is what another process finds after a power cut; with damage a sector that
// was on its way is neither old nor new.
func (f *lossyFile) cut(r *rand.Rand, damage bool) *lossyFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	after := &lossyFile{now: bytes.Clone(f.durable), lies: f.lies}
	for off := 0; off < len(f.now); off += recordSize {
		if bytes.Equal(f.now[off:off+recordSize], f.durable[off:off+recordSize]) {
			continue
		}
		switch r.IntN(3) {
		case 0:
			copy(after.now[off:], f.now[off:off+recordSize])
		case 1:
			if damage && off > 0 {
				after.now[off+r.IntN(recordSize)] ^= 0x10
			}
		}
	}
	after.durable = bytes.Clone(after.now)
	return after
}

// loseBits runs a bitmap through many lives, that end in power cuts or as they
// should, and returns what was lost: a granule that was marked and is not dirty.
func loseBits(t *testing.T, seed uint64, lies bool) error {
	const size, shift = 3<<30 + 512, 16 // 13 records
	r := rand.New(rand.NewPCG(seed, 1))
	h, err := newBitmapHeader(BitmapSpec{Name: "b", Size: size}, "0")
	if err != nil {
		t.Fatal(err)
	}
	f := newLossyFile(h)
	f.lies = lies
	marked := make([]bool, (size-1)>>shift+1)
	for life := range 12 {
		b, err := loadBitmap(f, "b", size, fmt.Sprint(life), fmt.Sprint(life+1), nil)
		if err != nil {
			return err
		}
		for g, is := range marked {
			dirty := b.dirtyAt(int64(g) << shift)
			if is && !dirty {
				return fmt.Errorf("life %d: granule %d was lost", life, g)
			}
			if dirty && !is {
				marked[g] = true // and never taken away again
			}
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		for worker := range uint64(2) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				r := rand.New(rand.NewPCG(seed, 100*uint64(life)+worker))
				for range 40 {
					off := r.Int64N(size/512) * 512
					n := min(512<<r.IntN(14), size-off)
					if r.IntN(40) == 0 {
						n = min(1<<30, size-off)
					}
					if err := b.mark(off, n); err != nil {
						t.Error(err)
					}
					mu.Lock()
					for g := off >> shift; g <= (off+n-1)>>shift; g++ {
						marked[g] = true
					}
					mu.Unlock()
					if r.IntN(10) == 0 {
						b.checkpoint()
					}
				}
			}()
		}
		wg.Wait()
		if r.IntN(3) == 0 {
			if err := b.Close(fmt.Sprint(life + 1)); err != nil {
				return err
			}
			before := b.Dirty()
			if b, err = loadBitmap(f, "b", size, fmt.Sprint(life+1), fmt.Sprint(life+1), nil); err != nil {
				return err
			}
			if b.Dirty() != before {
				return fmt.Errorf("life %d: %d bytes dirty, before a clean stop %d", life, b.Dirty(), before)
			}
		}
		b.end()
		f = f.cut(r, true)
	}
	return nil
}

// No power cut takes dirtiness away; and the test would see it.
func TestBitmapPowerCut(t *testing.T) {
	for seed := range uint64(20) {
		if err := loseBits(t, seed, false); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	for seed := uint64(0); loseBits(t, seed, true) == nil; seed++ {
		if seed == 20 {
			t.Fatal("intents that are not durable went unnoticed")
		}
	}
}

// A change costs a durable write once in a region, not once a request.
func TestBitmapIsCheap(t *testing.T) {
	h, err := newBitmapHeader(BitmapSpec{Name: "b", Size: 1 << 30}, "0")
	if err != nil {
		t.Fatal(err)
	}
	f := newLossyFile(h)
	b, err := loadBitmap(f, "b", 1<<30, "0", "0", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.end()
	f.writes = 0
	for i := range int64(1 << 18) { // every 4 KiB, from the end
		if err := b.mark((1<<18-1-i)*4096, 4096); err != nil {
			t.Fatal(err)
		}
	}
	if regions := (1 << 30) / (granulesPerRegion << 16); f.writes != regions {
		t.Errorf("%d writes for %d regions", f.writes, regions)
	}
	if b.Dirty() != 1<<30 {
		t.Errorf("%d bytes dirty", b.Dirty())
	}
}

// A bitmap that cannot be kept is dropped for good and the guest goes on; if it
// cannot be dropped the disk is not changed.
func TestBitmapFailure(t *testing.T) {
	for _, stuck := range []error{nil, syscall.EROFS} {
		h, err := newBitmapHeader(BitmapSpec{Name: "b", Size: 1 << 20}, "0")
		if err != nil {
			t.Fatal(err)
		}
		f := newLossyFile(h)
		b, err := loadBitmap(f, "b", 1<<20, "0", "0", nil)
		if err != nil {
			t.Fatal(err)
		}
		disk := newMemDisk(t, 1<<20)
		_, exp, path := serve(t, disk, Options{}, false)
		if err := exp.Track(b); err != nil {
			t.Fatal(err)
		}
		c := connectWith(t, path, "disk", metaBitmap+"b")
		f.mu.Lock()
		f.fail, f.stuck = syscall.EIO, stuck
		f.mu.Unlock()
		for range 2 {
			r := c.do(cmdWrite, cmdFlagFUA, 4096, 512, bytes.Repeat([]byte{1}, 512))
			if (r.err == 0) != (stuck == nil) {
				t.Errorf("remove fails with %v: write answered %d", stuck, r.err)
			}
		}
		f.mu.Lock()
		gone := f.gone
		f.mu.Unlock()
		if changed := !isZero(disk.at(4096, 512)); changed != (stuck == nil) || gone != (stuck == nil) {
			t.Errorf("remove fails with %v: changed %v, file removed %v", stuck, changed, gone)
		}
		if stuck == nil {
			if r := c.do(cmdBlockStatus, 0, 0, 1<<20, nil); !slices.Equal(r.changed, []extent{{1 << 20, 1}}) {
				t.Errorf("a dropped bitmap says %+v", r.changed)
			}
			if r := dialStructured(t, path).option(optListMetaContext, metaQuery("disk")); len(r.infos) != 1 {
				t.Error("a dropped bitmap is offered")
			}
		}
		b.end()
	}
}

func TestFindBitmaps(t *testing.T) {
	dir := t.TempDir()
	extent := filepath.Join(dir, "vm-flat.vmdk")
	for _, name := range []string{"vm-flat.vmdk.b1.dirty", "vm-flat.vmdk.2026-01-01.dirty", "vm-flat.vmdk.state", "vm2-flat.vmdk.b1.dirty", "vm-flat.vmdk..dirty"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	found, err := FindBitmaps(extent)
	if err != nil || !slices.Equal(found, []string{BitmapPath(extent, "2026-01-01"), BitmapPath(extent, "b1")}) {
		t.Errorf("%q, %v", found, err)
	}
}

// FuzzBitmapFile opens any bytes at all.
func FuzzBitmapFile(f *testing.F) {
	h, err := newBitmapHeader(BitmapSpec{Name: "b", Size: 300 << 20}, "s")
	if err != nil {
		f.Fatal(err)
	}
	whole := newLossyFile(h).now
	f.Add(whole)
	f.Add(whole[:recordSize])
	f.Add(whole[:len(whole)-1])
	f.Add([]byte{})
	damaged := bytes.Clone(whole)
	damaged[firstRecord] = 1
	f.Add(damaged)
	f.Fuzz(func(t *testing.T, text []byte) {
		if h, err := decodeBitmapHeader(text[:min(len(text), recordSize)]); err == nil && !bytes.Equal(h.encode(), text[:recordSize]) {
			t.Fatal("a header is not what it prints as")
		}
		file := &lossyFile{now: bytes.Clone(text), durable: bytes.Clone(text)}
		b, err := loadBitmap(file, "b", 1<<62, "s", "s", nil)
		if err != nil {
			return
		}
		defer b.end()
		if d := b.Dirty(); d < 0 || d > b.size {
			t.Fatalf("%d of %d bytes dirty", d, b.size)
		}
		n := int64(0)
		b.status(0, b.size, func(part int64, _ Status) bool { n += part; return true })
		if n != b.size {
			t.Fatalf("extents of %d bytes on a disk of %d", n, b.size)
		}
	})
}

// An incremental backup with the tools of others: a full copy, changes, and then
// only what the bitmap names.
func TestToolsBitmap(t *testing.T) {
	disk := sparseDisk(t, 16<<20)
	_, exp, path := serve(t, disk, Options{}, false)
	copied := filepath.Join(t.TempDir(), "copy")
	if err := exp.Pause(context.Background()); err != nil {
		t.Fatal(err)
	}
	b := newBitmapFor(t, "monday", disk)
	full := disk.all()
	if err := exp.Track(b); err != nil {
		t.Fatal(err)
	}
	exp.Resume()
	if err := os.WriteFile(copied, full, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "qemu-io", "-t", "none", "-f", "raw", "-c", "write -P 7 1M 4k", "-c", "write -P 9 5000k 200k", "-c", "discard 8M 64k", "-c", "write -z 12M 1M", uri(path, "disk"))

	var list []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal(tool(t, "nbdinfo", "--map=qemu:dirty-bitmap:monday", "--json", uri(path, "disk")), &list); err != nil {
		t.Fatal(err)
	}
	dirty := int64(0)
	for _, e := range list {
		dirty += e.Length * e.Type
	}
	if dirty != b.Dirty() || dirty != (64+256+64+1024)<<10 {
		t.Errorf("nbdinfo sees %d bytes changed in %+v, the bitmap has %d", dirty, list, b.Dirty())
	}
	var mapped []struct {
		Start, Length int64
		Data          bool // false: dirty, as x-dirty-bitmap has it
	}
	image := "driver=nbd,server.type=unix,server.path=" + path + ",export=disk,x-dirty-bitmap=qemu:dirty-bitmap:monday"
	if err := json.Unmarshal(tool(t, "qemu-img", "map", "--output=json", "--image-opts", image), &mapped); err != nil {
		t.Fatal(err)
	}
	copyTo, err := os.OpenFile(copied, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer copyTo.Close()
	c := connect(t, path, true)
	seen := int64(0)
	for _, m := range mapped {
		if m.Data {
			continue
		}
		seen += m.Length
		if _, err := copyTo.WriteAt(c.mustRead(uint64(m.Start), int(m.Length)), m.Start); err != nil {
			t.Fatal(err)
		}
	}
	if seen != dirty {
		t.Errorf("qemu-img sees %d bytes changed", seen)
	}
	if !bytes.Equal(readFile(t, copied), disk.all()) {
		t.Error("the incremental backup differs from the disk")
	}
}
