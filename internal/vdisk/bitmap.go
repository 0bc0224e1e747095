package vdisk

import (
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

// The presence bitmap of a snapshot link is behind the sums in its state file:
// bit u%8 of byte u/8 says whether the link has unit u.
const (
	bitmapOffset = stateMax
	bitsPerWord  = 64

	// A region is what a sector of the bitmap covers, 16 MiB of disk: the piece in
	// which bits are noted, written and locked.
	regionUnits = SectorSize * 8
	regionWords = regionUnits / bitsPerWord
	stripes     = 64 // locks, each for every 64th region
)

// A bitmap says which units a snapshot link has, while it is open for writing.
// There are three copies: this one; the live one, in a file that outlives the
// process, where a bit is set before the write is acknowledged, so that a kill
// loses nothing; and the durable one in the state file, which a flush brings up to
// date once the data is durable, so that a power cut shows either the data of a
// unit or what is below it.
//
// A bit is only ever set, but for consolidation, which takes away what the parent
// has durably got. The memory is proportional to what is present.
type bitmap struct {
	f       file // the state file
	live    file // its copy outside the process
	regions []atomic.Pointer[region]

	// fresh guards the units that a region does not have yet. Who writes a whole
	// unit holds it shared from the write until the bit is set; who completes a part
	// of one with what is below holds it exclusively while it looks at the bit,
	// writes and sets it. So neither overwrites what the other has acknowledged.
	fresh [stripes]sync.RWMutex
	mu    [stripes]sync.Mutex // held to set bits here and in live alike

	// flush is held while durable bits are written. begun counts what persist has
	// begun, and ended is the last of those that it ended well; flush protects ended.
	flush sync.Mutex
	begun atomic.Uint64
	ended uint64
	list  struct {
		sync.Mutex
		dirty []int64 // regions with bits that are not durable
		spare []int64
	}
}

type region struct {
	words [regionWords]atomic.Uint64
	dirty bool // in list.dirty; list protects it
}

func newBitmap(f, live file, size int64) *bitmap {
	units := roundUp(size, UnitSize) / UnitSize
	return &bitmap{f: f, live: live, regions: make([]atomic.Pointer[region], roundUp(units, regionUnits)/regionUnits)}
}

// freshLock is the lock of the units of u's region that are not there yet.
func (b *bitmap) freshLock(u int64) *sync.RWMutex { return &b.fresh[u/regionUnits%stripes] }

func (b *bitmap) region(n int64) *region {
	r := b.regions[n].Load()
	for r == nil {
		b.regions[n].CompareAndSwap(nil, new(region))
		r = b.regions[n].Load()
	}
	return r
}

func (b *bitmap) has(u int64) bool {
	r := b.regions[u/regionUnits].Load()
	return r != nil && r.words[u%regionUnits/bitsPerWord].Load()&(1<<(u%bitsPerWord)) != 0
}

// set notes that the units [from, to) of one region are there, in the live copy
// first: if that fails, nothing was noted.
func (b *bitmap) set(from, to int64) error {
	n := from / regionUnits
	r := b.region(n)
	lock := &b.mu[n%stripes]
	lock.Lock()
	defer lock.Unlock()
	first, last := from%regionUnits/bitsPerWord, (to-1)%regionUnits/bitsPerWord
	buf := regionBuffers.Get().(*[SectorSize]byte)
	defer regionBuffers.Put(buf)
	changed := false
	for w := first; w <= last; w++ {
		old := r.words[w].Load()
		now := old | wordMask(n, w, from, to)
		changed = changed || now != old
		binary.LittleEndian.PutUint64(buf[w*8:], now)
	}
	if !changed {
		return nil
	}
	if _, err := b.live.WriteAt(buf[first*8:(last+1)*8], liveHeader+n*SectorSize+first*8); err != nil {
		return err
	}
	for w := first; w <= last; w++ {
		r.words[w].Store(binary.LittleEndian.Uint64(buf[w*8:]))
	}
	b.note(n, r) // after the bits: a flush in between takes them, or this note
	return nil
}

func (b *bitmap) note(n int64, r *region) {
	b.list.Lock()
	defer b.list.Unlock()
	if !r.dirty {
		r.dirty = true
		b.list.dirty = append(b.list.dirty, n)
	}
}

var regionBuffers = sync.Pool{New: func() any { return new([SectorSize]byte) }}

// wordMask is the bits of word w of region n that are units of [from, to).
func wordMask(n, w, from, to int64) uint64 {
	base := n*regionUnits + w*bitsPerWord
	lo, hi := max(from-base, 0), min(to-base, bitsPerWord)
	if lo >= hi {
		return 0
	}
	return ^uint64(0) >> (bitsPerWord - uint(hi-lo)) << uint(lo)
}

// persist makes the bits that are set durable, when syncData has made durable what
// was written before: the order is copy the bits, sync the data, write that copy,
// sync it. The caller takes a *syncError for final.
//
// Of several callers that wait for one, the first does it for all.
func (b *bitmap) persist(syncData func() error) error {
	before := b.begun.Load()
	b.flush.Lock()
	defer b.flush.Unlock()
	if b.ended > before {
		return nil // it began after this call, and so has what was written before
	}
	this := b.begun.Add(1)
	copied, buf := b.take()
	err := syncData()
	if err == nil && len(copied) > 0 {
		err = b.write(copied, buf)
	}
	b.list.Lock()
	defer b.list.Unlock()
	if err != nil {
		for _, n := range copied {
			if r := b.region(n); !r.dirty {
				r.dirty = true
				b.list.dirty = append(b.list.dirty, n)
			}
		}
		return err
	}
	b.list.spare = copied[:0]
	b.ended = this
	return nil
}

// take returns the dirty regions in ascending order, and a copy of their bits.
func (b *bitmap) take() (dirty []int64, buf []byte) {
	b.list.Lock()
	defer b.list.Unlock()
	dirty, b.list.dirty = b.list.dirty, b.list.spare[:0]
	b.list.spare = nil
	slices.Sort(dirty)
	if len(dirty) > 0 {
		buf = make([]byte, 0, len(dirty)*SectorSize)
	}
	for _, n := range dirty {
		r := b.region(n)
		r.dirty = false
		for w := range r.words {
			buf = binary.LittleEndian.AppendUint64(buf, r.words[w].Load())
		}
	}
	return dirty, buf
}

// write makes copies of regions durable, neighbours in one write.
func (b *bitmap) write(regions []int64, buf []byte) error {
	for i := 0; i < len(regions); {
		j := i + 1
		for j < len(regions) && regions[j] == regions[j-1]+1 {
			j++
		}
		if _, err := b.f.WriteAt(buf[i*SectorSize:j*SectorSize], bitmapOffset+regions[i]*SectorSize); err != nil {
			return err
		}
		i = j
	}
	if err := b.f.Sync(); err != nil {
		return &syncError{err}
	}
	return nil
}

// remove takes away the units [from, to), durably, then from the live copy, then here. The
// caller has made sure that nobody writes them, and that the parent has them
// durably: a bit that comes back, because the process was killed in here, shows
// the same content.
func (b *bitmap) remove(from, to int64) error {
	b.flush.Lock() // a flush under way would write bits that it copied before
	defer b.flush.Unlock()
	buf := make([]byte, SectorSize)
	wrote := false
	for n := from / regionUnits; n <= (to-1)/regionUnits; n++ {
		if b.regions[n].Load() == nil {
			continue
		}
		at := bitmapOffset + n*SectorSize
		if err := readOrZero(b.f, buf, at); err != nil {
			return err
		}
		// What is durable less what goes: other bits of the region wait for their
		// data.
		for w := int64(0); w < regionWords; w++ {
			binary.LittleEndian.PutUint64(buf[w*8:], binary.LittleEndian.Uint64(buf[w*8:])&^wordMask(n, w, from, to))
		}
		if _, err := b.f.WriteAt(buf, at); err != nil {
			return err
		}
		wrote = true
	}
	if !wrote {
		return nil
	}
	if err := b.f.Sync(); err != nil {
		return &syncError{err}
	}
	for n := from / regionUnits; n <= (to-1)/regionUnits; n++ {
		r := b.regions[n].Load()
		if r == nil {
			continue
		}
		if err := b.removeLive(n, r, from, to, buf); err != nil {
			return err
		}
	}
	return nil
}

func (b *bitmap) removeLive(n int64, r *region, from, to int64, buf []byte) error {
	lock := &b.mu[n%stripes]
	lock.Lock()
	defer lock.Unlock()
	for w := range r.words {
		binary.LittleEndian.PutUint64(buf[w*8:], r.words[w].Load()&^wordMask(n, int64(w), from, to))
	}
	if _, err := b.live.WriteAt(buf, liveHeader+n*SectorSize); err != nil {
		return err
	}
	for w := range r.words {
		r.words[w].Store(binary.LittleEndian.Uint64(buf[w*8:]))
	}
	return nil
}

// next returns the first run of units at or behind u that are there; to is from
// when there is none.
func (b *bitmap) next(u int64) (from, to int64) {
	end := int64(len(b.regions)) * regionUnits
	for from = u; from < end && !b.has(from); {
		r := b.regions[from/regionUnits].Load()
		if r == nil {
			from = roundDown(from, regionUnits) + regionUnits
			continue
		}
		w := r.words[from%regionUnits/bitsPerWord].Load() >> uint(from%bitsPerWord)
		if w == 0 {
			from = roundDown(from, bitsPerWord) + bitsPerWord
		} else {
			from += int64(bits.TrailingZeros64(w))
		}
	}
	for to = from; to < end && b.has(to); to++ {
	}
	return from, to
}

// load reads the bits that are in a file from off on: those of a bitmap in a state
// file, or of a live one. It calls found for every run of units that are there.
func load(f file, off int64, units int64, found func(from, to int64)) error {
	end := off + roundUp(units, regionUnits)/8
	buf := make([]byte, 64<<10)
	for at := off; at < end; {
		data, err := f.NextData(at)
		if err != nil {
			return err
		}
		if at = max(at, off+roundDown(max(data, off)-off, SectorSize)); at >= end {
			return nil
		}
		b := buf[:min(int64(len(buf)), end-at)]
		if err := readOrZero(f, b, at); err != nil {
			return err
		}
		for i := 0; i < len(b); i += 8 {
			u := (at - off + int64(i)) * 8
			for w := binary.LittleEndian.Uint64(b[i:]); w != 0; {
				a := bits.TrailingZeros64(w)
				n := bits.TrailingZeros64(^(w >> a))
				if from := u + int64(a); from < units {
					found(from, min(from+int64(n), units))
				}
				if a+n == bitsPerWord {
					break
				}
				w = w >> (a + n) << (a + n)
			}
		}
		at += int64(len(b))
	}
	return nil
}

// readOrZero reads what a file has, and zeros behind its end.
func readOrZero(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	clear(p[n:])
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
