package vdisk

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"mortise/internal/vmdk"
)

// A powerFS is a model of files on storage that loses power. Of what was written
// since a file was last synced, a power cut keeps any sectors and drops the
// others, and of several writes to one sector it keeps any: writes are dropped,
// reordered and torn at 512 bytes. Creations, removals and renames are kept or
// dropped each for itself until their folder is synced. A kill keeps everything,
// and still none of it is durable.
//
// Files below powerLive are a tmpfs's: a kill keeps them, a power cut does not.
//
// The crash comes at the n-th change: it and everything after it fails without
// effect.
type powerFS struct {
	mu      sync.Mutex
	r       *rand.Rand
	names   map[string]*entry
	inodes  uint64
	left    int // changes until the crash; < 0: none
	crashed bool

	// lie makes the Sync of files of which it is true do nothing: a bug put in
	// on purpose. "." asks about folders.
	lie func(name string) bool

	// Other bugs: a kill takes live bitmaps too; only the newest
	// link is seen in its folder.
	forgetful, childless bool
}

// An entry is a name and the files that it may have after a power cut: those of
// the changes since the folder was synced.
type entry struct {
	now, durable *powerFile
	pending      []*powerFile
}

// powerLive is the folder of live bitmaps.
const powerLive = "/run/live"

var errPower = errors.New("no power")

func newPowerFS(r *rand.Rand) *powerFS {
	return &powerFS{r: r, names: map[string]*entry{}, left: -1}
}

// change counts a change; it fails once the crash has come. mu is held.
func (p *powerFS) change() error {
	if p.left == 0 {
		p.crashed = true
	}
	if p.left >= 0 {
		p.left--
	}
	return p.up()
}

func (p *powerFS) up() error {
	if p.crashed {
		return errPower
	}
	return nil
}

// reboot ends the crash: after a power cut, or after the kill of the process.
func (p *powerFS) reboot(powerCut bool) {
	p.crashed, p.left = false, -1
	for _, name := range slices.Sorted(maps.Keys(p.names)) { // sorted: a seed repeats
		e := p.names[name]
		if (powerCut || p.forgetful) && filepath.Dir(name) == powerLive {
			delete(p.names, name)
			continue
		}
		if powerCut {
			e.durable = append(e.pending, e.durable)[p.r.IntN(len(e.pending)+1)]
			e.now, e.pending = e.durable, nil
		}
		if e.now != nil {
			e.now.locks = nil
			if powerCut {
				e.now.cut(p.r)
			}
		}
	}
}

func (p *powerFS) set(name string, f *powerFile) {
	e := p.names[name]
	if e == nil {
		e = &entry{}
		p.names[name] = e
	}
	e.now = f
	e.pending = append(e.pending, f)
}

func (p *powerFS) Open(name string, flag int) (file, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.up(); err != nil {
		return nil, err
	}
	e := p.names[name]
	if e == nil || e.now == nil {
		if flag&os.O_CREATE == 0 {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		if err := p.change(); err != nil {
			return nil, err
		}
		p.set(name, p.newFile(name))
	}
	return &powerHandle{powerFile: p.names[name].now}, nil
}

func (p *powerFS) newFile(name string) *powerFile {
	p.inodes++
	return &powerFile{fs: p, name: name, ino: p.inodes}
}

func (p *powerFS) List(dir string) (names []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, e := range p.names {
		if e.now != nil && filepath.Dir(name) == dir {
			names = append(names, filepath.Base(name))
		}
	}
	if p.childless {
		slices.Sort(names)
		newest := "" // of the links: enough for the next one's name
		for _, n := range names {
			if _, _, ok := vmdk.ParseLinkName(n); ok {
				newest = strings.TrimSuffix(n, ".vmdk")
			}
		}
		names = slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, "vm-0") && !strings.HasPrefix(n, newest) })
	}
	return names, p.up()
}

func (p *powerFS) Mkdir(string) error         { return nil }
func (p *powerFS) Free(string) (int64, error) { return 1 << 40, nil }

func (p *powerFS) Stat(name string) (fileStat, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.up(); err != nil {
		return fileStat{}, err
	}
	if e := p.names[name]; e != nil && e.now != nil {
		return e.now.stat(), nil
	}
	return fileStat{}, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
}

func (p *powerFS) ReadFile(name string, limit int) ([]byte, error) {
	f, err := p.Open(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(st.size, int64(limit)))
	n, err := f.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return b[:n], err
}

func (p *powerFS) ReplaceFile(name string, content []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.newFile(name)
	f.write(content, 0, false)
	f.size = int64(len(content))
	f.sync()
	if err := p.change(); err != nil {
		return err
	}
	p.set(name, f)
	if err := p.change(); err != nil {
		return err
	}
	p.syncDir(filepath.Dir(name))
	return nil
}

func (p *powerFS) Remove(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.names[name]; e == nil || e.now == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	if err := p.change(); err != nil {
		return err
	}
	p.set(name, nil)
	return nil
}

func (p *powerFS) SyncDir(dir string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.change(); err != nil {
		return err
	}
	p.syncDir(dir)
	return nil
}

func (p *powerFS) syncDir(dir string) {
	if p.lie != nil && p.lie(".") {
		return
	}
	for name, e := range p.names {
		if filepath.Dir(name) == dir {
			e.durable, e.pending = e.now, nil
		}
	}
}

// A powerFile is a file's content, by sectors; fs.mu protects it.
type powerFile struct {
	fs      *powerFS
	name    string
	ino     uint64
	size    int64
	sectors []powerSector

	durableSize  int64
	pendingSizes []int64
	locks        []*powerHandle
	exclusive    bool
}

type powerSector struct {
	now, durable sectorValue
	pending      []sectorValue // written since the sync, the newest last
}

type sectorValue struct {
	b    [SectorSize]byte
	data bool // false: a hole
}

func (f *powerFile) sector(i int64) *powerSector {
	for int64(len(f.sectors)) <= i {
		f.sectors = append(f.sectors, powerSector{})
	}
	return &f.sectors[i]
}

func (f *powerFile) put(i int64, v sectorValue) {
	s := f.sector(i)
	s.now = v
	s.pending = append(s.pending, v)
}

// write writes p at off, or makes that range a hole.
func (f *powerFile) write(p []byte, off int64, hole bool) {
	for len(p) > 0 {
		i, in := off/SectorSize, off%SectorSize
		v := f.sector(i).now
		n := copy(v.b[in:], p)
		v.data = !hole || n < SectorSize && v.data
		f.put(i, v)
		p, off = p[n:], off+int64(n)
	}
}

func (f *powerFile) sync() {
	for i := range f.sectors {
		s := &f.sectors[i]
		s.durable, s.pending = s.now, nil
	}
	f.durableSize, f.pendingSizes = f.size, nil
}

// cut is what a power cut does to the file.
func (f *powerFile) cut(r *rand.Rand) {
	for i := range f.sectors {
		s := &f.sectors[i]
		if n := len(s.pending); n > 0 {
			s.durable = append(s.pending, s.durable)[r.IntN(n+1)]
			s.pending = nil
		}
		s.now = s.durable
	}
	if n := len(f.pendingSizes); n > 0 {
		f.durableSize = append(f.pendingSizes, f.durableSize)[r.IntN(n+1)]
		f.pendingSizes = nil
	}
	f.size = f.durableSize
	for i := range f.sectors {
		if int64(i)*SectorSize >= f.size {
			f.sectors[i] = powerSector{}
		}
	}
}

func (f *powerFile) stat() fileStat {
	st := fileStat{size: f.size, ino: f.ino}
	for _, s := range f.sectors {
		if s.now.data {
			st.allocated += SectorSize
		}
	}
	return st
}

// A powerHandle is an open file.
type powerHandle struct {
	*powerFile
}

func (h *powerHandle) ReadAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.up(); err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) && off < h.size {
		i, in := off/SectorSize, off%SectorSize
		v := h.sector(i).now
		c := copy(p[n:], v.b[in:min(SectorSize, in+h.size-off)])
		n, off = n+c, off+int64(c)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *powerHandle) WriteAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	down := h.fs.crashed
	if err := h.fs.change(); err != nil {
		if !down { // the crash comes in the middle of this write
			n := roundDown(h.fs.r.Int64N(int64(len(p))+1), SectorSize)
			h.write(p[:n], off, false)
			h.grow(off + n)
		}
		return 0, err
	}
	h.write(p, off, false)
	h.grow(off + int64(len(p)))
	return len(p), nil
}

func (f *powerFile) grow(size int64) {
	if size > f.size {
		f.size = size
		f.pendingSizes = append(f.pendingSizes, size)
	}
}

func (h *powerHandle) WriteDurably(p []byte, off int64) error {
	if _, err := h.WriteAt(p, off); err != nil {
		return err
	}
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.change(); err != nil {
		return err
	}
	if h.fs.lie == nil || !h.fs.lie(h.name) {
		for i := off / SectorSize; i < (off+int64(len(p)))/SectorSize; i++ {
			s := h.sector(i)
			s.durable, s.pending = s.now, nil
		}
		// Its own length is part of it; so is, on the file systems that we know,
		// every change of length before.
		h.durableSize, h.pendingSizes = h.size, nil
	}
	return nil
}

func (h *powerHandle) Sync() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.change(); err != nil {
		return err
	}
	if h.fs.lie == nil || !h.fs.lie(h.name) {
		h.sync()
	}
	return nil
}

func (h *powerHandle) Truncate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.change(); err != nil {
		return err
	}
	for i := roundUp(size, SectorSize) / SectorSize; i < int64(len(h.sectors)); i++ {
		h.put(i, sectorValue{})
	}
	h.size = size
	h.pendingSizes = append(h.pendingSizes, size)
	return nil
}

func (h *powerHandle) Allocate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.change(); err != nil {
		return err
	}
	h.grow(size)
	return nil
}

func (h *powerHandle) Punch(off, n int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.change(); err != nil {
		return err
	}
	h.write(make([]byte, n), off, true)
	return nil
}

func (h *powerHandle) Zero(off, n int64) error {
	_, err := h.WriteAt(make([]byte, n), off)
	return err
}

// The holes of a file system are those of whole blocks.
const powerBlock = 4096

func (h *powerHandle) find(off int64, data bool) (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.fs.up(); err != nil {
		return 0, err
	}
	for ; off < h.size; off = roundDown(off, powerBlock) + powerBlock {
		has := false
		for i := roundDown(off, powerBlock); i < roundDown(off, powerBlock)+powerBlock; i += SectorSize {
			has = has || h.sector(i/SectorSize).now.data
		}
		if has == data {
			return off, nil
		}
	}
	return max(off, h.size), nil
}

func (h *powerHandle) NextData(off int64) (int64, error) { return h.find(off, true) }
func (h *powerHandle) NextHole(off int64) (int64, error) { return h.find(off, false) }

func (h *powerHandle) Stat() (fileStat, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	return h.stat(), h.fs.up()
}

func (h *powerHandle) Lock(exclusive bool) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	others := slices.DeleteFunc(slices.Clone(h.locks), func(o *powerHandle) bool { return o == h })
	if len(others) > 0 && (exclusive || h.exclusive) {
		return errLocked
	}
	h.locks, h.exclusive = append(others, h), exclusive
	return h.fs.up()
}

func (h *powerHandle) Forget(int64, int64)   {}
func (h *powerHandle) Prefetch(int64, int64) {}

func (h *powerHandle) Close() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	h.locks = slices.DeleteFunc(h.locks, func(o *powerHandle) bool { return o == h })
	return nil
}
