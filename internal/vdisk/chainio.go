package vdisk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Size is the length of the disk in bytes, a multiple of SectorSize.
func (c *Chain) Size() int64 { return c.size.Load() }

func (c *Chain) check(verb string, off, n int64, write bool) error {
	size := c.size.Load()
	if off < 0 || n < 0 || off > size || n > size-off || (off|n)%SectorSize != 0 {
		return fmt.Errorf("%s: cannot %s %d bytes at %d: a request is whole sectors of %d bytes inside the disk of %d", c.Path(), verb, n, off, SectorSize, size)
	}
	if write && c.opts.ReadOnly {
		return &Error{Kind: ErrReadOnly, File: c.Path(), Fix: "open it for writing"}
	}
	if write {
		return c.thawed()
	}
	return nil
}

// thawed refuses what would change what a frozen link shows.
func (c *Chain) thawed() error {
	if c.opts.Frozen {
		return &Error{Kind: ErrSealed, File: c.Path(), Why: "it was opened as a frozen link, for conversions only", Fix: "make a linked clone or a snapshot link of it, and use that"}
	}
	return nil
}

// ReadAt fills p with the sectors at off.
func (c *Chain) ReadAt(p []byte, off int64) error {
	if err := c.check("read", off, int64(len(p)), false); err != nil {
		return err
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	if c.index == nil {
		return c.links[0].ext.read(p, off)
	}
	for asked := false; len(p) > 0; {
		d, n := c.at(off, int64(len(p)))
		if n == int64(len(p)) {
			return d.ext.read(p, off)
		}
		began := time.Now()
		if err := d.ext.read(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
		if !asked && time.Since(began) > slowRead+time.Duration(n) {
			// It came from storage: the other pieces are fetched at once, and not one
			// after the other.
			c.prefetch(off, int64(len(p)))
			asked = true
		}
	}
	return nil
}

// slowRead, and a nanosecond for each byte, is what a read from the page cache takes
// at most.
const slowRead = 50 * time.Microsecond

func (c *Chain) prefetch(off, n int64) {
	for n > 0 {
		d, run := c.at(off, n)
		d.ext.f.Prefetch(off, run)
		off, n = off+run, n-run
	}
}

// at returns the link that has the sector at off, and how many of n bytes it has.
func (c *Chain) at(off, n int64) (*Disk, int64) {
	slot, end := c.index.run(off/UnitSize, roundUp(off+n, UnitSize)/UnitSize)
	return c.slots[slot], min(n, end*UnitSize-off)
}

// target returns the link to which a change of the unit that d has goes: the top;
// but while the top is being committed, what it lacks goes to its parent at once.
func (c *Chain) target(d *Disk) *Disk {
	top := c.links[len(c.links)-1]
	if c.under != nil && d != top {
		return c.under
	}
	return top
}

// enter waits until [off, off+n) may be changed and holds gate shared.
func (c *Chain) enter(off, n int64) {
	for {
		c.gate.RLock()
		if !c.frozen.touches(off, n) {
			return
		}
		moved := c.moved
		c.gate.RUnlock()
		<-moved
	}
}

// WriteAt writes the sectors of p at off. They are durable after the next Flush.
// It may change p: encryption is in place.
func (c *Chain) WriteAt(p []byte, off int64) error {
	if err := c.check("write", off, int64(len(p)), true); err != nil {
		return err
	}
	c.enter(off, int64(len(p)))
	defer c.gate.RUnlock()
	if c.index == nil {
		return c.links[0].ext.write(p, off)
	}
	for len(p) > 0 {
		to, n, whole, present := c.piece(off, int64(len(p)))
		var err error
		switch {
		case present:
			err = to.ext.write(p[:n], off)
		case whole:
			err = c.writeUnits(to, p[:n], off)
		default:
			err = c.writePart(to, p[:n], off, n)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// piece says how the beginning of a change of [off, off+n) is to be made: in which
// link, how much of it at once, and whether that is whole units, or such as the
// link has already.
func (c *Chain) piece(off, n int64) (to *Disk, length int64, whole, present bool) {
	d, run := c.at(off, n)
	to = c.target(d)
	if d == to {
		return to, run, false, true
	}
	// Not there yet. A unit that is not changed whole is for itself.
	end := roundDown(off, UnitSize) + UnitSize
	if off%UnitSize != 0 || n < UnitSize && off+n != c.size.Load() {
		return to, min(n, end-off), false, false
	}
	length = n
	if off+n != c.size.Load() {
		length = roundDown(n, UnitSize)
	}
	if c.under != nil {
		length = min(length, run) // behind it may be units of the top
	}
	regionEnd := (off/UnitSize/regionUnits + 1) * regionUnits * UnitSize
	return to, min(length, regionEnd-off), true, false
}

// writeUnits writes whole units of one region, some of which the link may lack.
func (c *Chain) writeUnits(to *Disk, p []byte, off int64) error {
	n := int64(len(p))
	lock := to.bits.freshLock(off / UnitSize)
	lock.RLock()
	defer lock.RUnlock()
	if err := to.ext.write(p, off); err != nil {
		return err
	}
	return c.claim(to, off, n)
}

// claim notes that a link has the units of [off, off+n), which were written.
func (c *Chain) claim(to *Disk, off, n int64) error {
	from, end := off/UnitSize, roundUp(off+n, UnitSize)/UnitSize
	if err := to.bits.set(from, end); err != nil {
		return fmt.Errorf("noting that %s has units %d to %d: %w", to.path, from, end-1, err)
	}
	c.index.set(from, end, to.slot)
	return nil
}

var unitBuffers = sync.Pool{New: func() any { return new([UnitSize]byte) }}

// writePart writes a part of a unit that the link lacks, completed with what is
// below: a link has whole units. Without p the part is zeroed.
func (c *Chain) writePart(to *Disk, p []byte, off, n int64) error {
	buf := unitBuffers.Get().(*[UnitSize]byte)
	defer unitBuffers.Put(buf)
	start := roundDown(off, UnitSize)
	unit := buf[:min(UnitSize, c.size.Load()-start)]
	from, _ := c.at(start, int64(len(unit)))
	if err := from.ext.read(unit, start); err != nil {
		return err
	}
	part := unit[off-start:][:n]
	if p == nil {
		clear(part)
	} else {
		copy(part, p)
	}
	lock := to.bits.freshLock(start / UnitSize)
	lock.Lock()
	defer lock.Unlock()
	if to.bits.has(start / UnitSize) { // meanwhile: then only the part is ours
		return to.ext.write(part, off)
	}
	if err := to.ext.write(unit, start); err != nil {
		return err
	}
	return c.claim(to, start, int64(len(unit)))
}

// Trim gives the space of n bytes at off back where storage can do that; they
// then read as zeros. It is a hint.
func (c *Chain) Trim(off, n int64) error {
	if err := c.check("trim", off, n, true); err != nil || n == 0 {
		return err
	}
	if err := c.zero(off, n, true); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// WriteZeroes makes n bytes at off read as zeros; if punch, it gives their space
// back. Where storage has no fast way it returns an error that wraps
// [errors.ErrUnsupported]: the caller then writes zeros.
func (c *Chain) WriteZeroes(off, n int64, punch bool) error {
	if err := c.check("zero", off, n, true); err != nil || n == 0 {
		return err
	}
	return c.zero(off, n, punch)
}

func (c *Chain) zero(off, n int64, punch bool) error {
	c.enter(off, n)
	defer c.gate.RUnlock()
	if c.index == nil {
		return c.links[0].ext.zero(off, n, punch)
	}
	for n > 0 {
		to, length, whole, present := c.piece(off, n)
		var err error
		switch {
		case present:
			err = to.ext.zero(off, length, punch)
		case whole:
			length, err = c.zeroUnits(to, off, length, punch)
		default:
			err = c.writePart(to, nil, off, length)
		}
		if err != nil {
			return err
		}
		off, n = off+length, n-length
	}
	return nil
}

// zeroUnits zeroes whole units of one region, and says how many bytes it did.
// Where the base is all there is and it has a hole, they are zero as they are: a
// guest that trims an empty disk must not fill bitmap and index.
func (c *Chain) zeroUnits(to *Disk, off, n int64, punch bool) (int64, error) {
	if d, run := c.at(off, n); d == c.links[0] {
		hole := int64(0)
		err := d.ext.status(off, run, func(n int64, s Status) bool {
			if s&Zero != 0 {
				hole = n
			} else {
				run = n
			}
			return false
		})
		if err != nil {
			return 0, err
		}
		if hole = roundDown(hole, UnitSize); hole > 0 || off+hole == c.size.Load() {
			return hole, nil
		}
		n = min(n, max(roundDown(run, UnitSize), UnitSize)) // the hole behind it is for the next call
	}
	lock := to.bits.freshLock(off / UnitSize)
	lock.RLock()
	defer lock.RUnlock()
	// First the hole and then the bit: what an earlier write that was never noted
	// has left in the extent must not show.
	if err := to.ext.zero(off, n, punch); err != nil {
		return 0, err
	}
	return n, c.claim(to, off, n)
}

// Flush makes durable every write, trim and zeroing that returned before it was
// called. When it fails the disk refuses everything from then on ([ErrFailed]). The
// first one syncs every link: a process that was killed may have acknowledged what
// is not durable.
func (c *Chain) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.opts.ReadOnly {
		return nil
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	return c.flush()
}

// flush is Flush; the caller holds gate.
func (c *Chain) flush() error {
	first := !c.settled.Load()
	for i, d := range c.links {
		if !first && i+1 < len(c.links) && d != c.under {
			continue
		}
		if err := d.sync(); err != nil {
			return err
		}
	}
	c.settled.Store(true)
	return nil
}

// BlockStatus calls emit for the data and the holes of n bytes at off in turn,
// until emit returns false or the range is covered.
func (c *Chain) BlockStatus(off, n int64, emit func(n int64, s Status) bool) error {
	if err := c.check("map", off, n, false); err != nil {
		return err
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	if c.index == nil {
		return c.links[0].ext.status(off, n, emit)
	}
	var same int64 // bytes of the same status, of links that follow each other
	var status Status
	more := true
	for n > 0 && more {
		d, run := c.at(off, n)
		err := d.ext.status(off, run, func(n int64, s Status) bool {
			if same > 0 && s != status {
				more = emit(same, status)
				same = 0
			}
			same, status = same+n, s
			return more
		})
		if err != nil {
			return err
		}
		off, n = off+run, n-run
	}
	if more && same > 0 {
		emit(same, status)
	}
	return nil
}
