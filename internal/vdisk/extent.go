package vdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"mortise/internal/xts"
)

const (
	// SectorSize is the smallest piece of a disk that is read or written, in
	// bytes: what storage writes whole or not at all.
	SectorSize = 512
	// UnitSize is the length of an XTS data unit, in bytes.
	UnitSize = 4096
)

// chunk is how much of a request is encrypted before it is handed to the kernel,
// in bytes: it is still in the CPU's cache when the kernel copies it.
const chunk = 256 << 10

// directChunk is the same where nothing is copied and each piece is a request to the
// device.
const directChunk = 4 << 20

// An extent is the open file that holds a disk's data. Sectors below boundary
// have one form, those above another: encrypted with a cipher, or in clear where
// the cipher is nil. An extent that is not being converted has one form.
//
// A sector whose stored bytes are all zero reads as zeros in every form: holes,
// trimmed sectors, and sectors of a hole whose first write a power cut has torn.
//
// Every request holds gate shared while it runs. The converter takes it
// exclusively for an instant to move a limit: requests that started under the
// old limits have ended by then.
//
// While a conversion runs, the extent is, from its beginning:
//
//	[0, boundary)      in the target's form
//	frozen             being rewritten: writes wait, reads of what is half
//	                   rewritten come from the zone's buffer
//	next               being read by the converter: writes are noted
//	the rest           in the source's form
//
// frozen and next follow the boundary; where a conversion runs back they lie
// before it.
type extent struct {
	name   string
	f      file
	thick  bool // its space stays allocated
	direct bool // f goes round the page cache

	gate         sync.RWMutex
	below, above *xts.Cipher
	boundary     int64         // bytes, on a unit
	frozen       span          // writes to it wait for moved
	hot          *zone         // that is being written; nil: what is frozen has the form of its side of the boundary
	next         *zone         // laid out and not hot yet
	moved        chan struct{} // closed when the limits have changed
	stuck        error         // why the hot zone will not move; reads of it fail too

	requests atomic.Uint64 // reads, writes and zeroings so far: whether a guest is busy
	holes    atomic.Uint64 // zeroings so far
	settled  atomic.Uint64 // those of holes that are durable

	dead atomic.Pointer[Error] // why every request is refused from now on
}

// fail refuses everything from now on, for the first reason that it was told:
// after a failed fsync nobody knows what is on storage, and the kernel would
// report success the next time.
func (e *extent) fail(err error) error {
	e.dead.CompareAndSwap(nil, &Error{Kind: ErrFailed, File: e.name, Cause: err,
		Fix: "what was written since the last flush may be lost; repair the storage, then power the VM on again"})
	return e.dead.Load()
}

// sync makes everything written so far durable.
func (e *extent) sync() error {
	if dead := e.dead.Load(); dead != nil {
		return dead
	}
	holes := e.holes.Load()
	if err := e.f.Sync(); err != nil {
		return e.fail(err)
	}
	e.settled.Store(max(holes, e.settled.Load()))
	return nil
}

// settle makes the holes durable that requests have made: before the boundary
// passes a hole, for a hole that a power cut takes back would be old data in the
// target's place.
func (e *extent) settle() error {
	if e.holes.Load() == e.settled.Load() {
		return nil
	}
	return e.sync()
}

// close refuses further requests, waits for those that run, and releases the
// lock.
func (e *extent) close() error {
	e.dead.CompareAndSwap(nil, &Error{Kind: ErrClosed, File: e.name})
	var err error
	e.set(func() { err = e.f.Close() })
	return err
}

// form makes the extent one of a single form.
func (e *extent) form(c *xts.Cipher) {
	e.set(func() { e.below, e.above, e.boundary, e.frozen, e.hot, e.next = c, c, 0, span{}, nil, nil })
}

// set changes what gate protects and wakes the requests that wait.
func (e *extent) set(change func()) {
	e.gate.Lock()
	defer e.gate.Unlock()
	change()
	if e.moved != nil {
		close(e.moved)
	}
	e.moved = make(chan struct{})
}

// enter waits until a change of [off, off+n) is outside the hot zone and holds
// gate shared.
func (e *extent) enter(off, n int64) error {
	e.requests.Add(1)
	for {
		e.gate.RLock()
		if dead := e.dead.Load(); dead != nil {
			e.gate.RUnlock()
			return dead
		}
		if !e.frozen.touches(off, n) {
			return nil
		}
		moved, stuck := e.moved, e.stuck
		e.gate.RUnlock()
		if stuck != nil {
			return stuck
		}
		<-moved
	}
}

// look holds gate shared for a read of [off, off+n), which never waits.
func (e *extent) look(off, n int64) error {
	e.requests.Add(1)
	e.gate.RLock()
	var err error
	if dead := e.dead.Load(); dead != nil {
		err = dead
	} else if e.stuck != nil && e.frozen.touches(off, n) {
		err = e.stuck
	}
	if err != nil {
		e.gate.RUnlock()
	}
	return err
}

func (e *extent) read(p []byte, off int64) error {
	if err := e.look(off, int64(len(p))); err != nil {
		return err
	}
	defer e.gate.RUnlock()
	for len(p) > 0 {
		c, n := e.part(len(p), off)
		if z := e.hot; z != nil && off >= z.start && off < z.end {
			c, n = z.to, copy(p[:n], z.buf[off-z.start:])
		} else if err := readFull(e.f, p[:n], off); err != nil {
			return e.readError(err, off)
		}
		if c != nil {
			decrypt(c, p[:n], off)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// write changes p: it encrypts in place.
func (e *extent) write(p []byte, off int64) error {
	if err := e.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer e.gate.RUnlock()
	if e.next != nil {
		e.next.note(off, int64(len(p)), false)
	}
	for len(p) > 0 {
		c, n := e.part(len(p), off)
		if c != nil {
			c.EncryptAt(p[:n], p[:n], unitOf(off), offsetInUnit(off))
		}
		if _, err := e.f.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// part returns the cipher at off and how many of n bytes to process with it at
// once.
func (e *extent) part(n int, off int64) (*xts.Cipher, int) {
	c, limit := e.above, e.chunk()
	if off < e.boundary {
		c, limit = e.below, min(limit, e.boundary-off)
	}
	if c == nil && off >= e.boundary {
		limit = int64(n) // nothing to gain from small pieces
	}
	if z := e.hot; z != nil && off < z.start {
		limit = min(limit, z.start-off)
	} else if z != nil && off < z.end {
		limit = min(limit, z.end-off)
	}
	return c, int(min(int64(n), limit))
}

func (e *extent) chunk() int64 {
	if e.direct {
		return directChunk
	}
	return chunk
}

// zero makes a range read as zeros, in any form; if punch, it gives its space back,
// unless the disk is thick.
func (e *extent) zero(off, n int64, punch bool) error {
	if err := e.enter(off, n); err != nil {
		return err
	}
	defer e.gate.RUnlock()
	if e.next != nil {
		e.next.note(off, n, true)
	}
	defer e.holes.Add(1)
	if punch && !e.thick {
		return e.f.Punch(off, n)
	}
	return e.f.Zero(off, n)
}

// status calls emit for the data and holes of [off, off+n) in turn.
func (e *extent) status(off, n int64, emit func(n int64, s Status) bool) error {
	for end := off + n; off < end; {
		data, err := e.f.NextData(off)
		if err != nil {
			return err
		}
		data = min(roundDown(data, SectorSize), end)
		if data > off {
			if !emit(data-off, Hole|Zero) {
				return nil
			}
			off = data
			continue
		}
		hole, err := e.f.NextHole(off)
		if err != nil {
			return err
		}
		hole = min(max(roundUp(hole, SectorSize), off+SectorSize), end)
		if !emit(hole-off, 0) {
			return nil
		}
		off = hole
	}
	return nil
}

func (e *extent) readError(err error, off int64) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return &Error{Kind: ErrShort, File: e.name, Why: fmt.Sprintf("it ends before byte %d", off), Fix: "it was cut while it was open; restore it from a backup", Cause: syscall.EIO}
	}
	return err
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// decrypt turns the stored sectors p at off into what the guest wrote; those
// that are zero stay zero.
func decrypt(c *xts.Cipher, p []byte, off int64) {
	forRuns(p, func(a, b int) {
		at := off + int64(a)
		c.DecryptAt(p[a:b], p[a:b], unitOf(at), offsetInUnit(at))
	})
}

// forRuns calls f for every run of sectors p[a:b] that are not zero.
func forRuns(p []byte, f func(a, b int)) {
	for a := 0; a < len(p); {
		if isZero(p[a : a+SectorSize]) {
			a += SectorSize
			continue
		}
		b := a + SectorSize
		for b < len(p) && !isZero(p[b:b+SectorSize]) {
			b += SectorSize
		}
		f(a, b)
		a = b
	}
}

// isZero looks at all bytes of a sector only if its first eight are zero.
func isZero(s []byte) bool {
	return binary.NativeEndian.Uint64(s) == 0 && [SectorSize]byte(s) == [SectorSize]byte{}
}

func unitOf(off int64) uint64    { return uint64(off) / UnitSize }
func offsetInUnit(off int64) int { return int(off % UnitSize) }
