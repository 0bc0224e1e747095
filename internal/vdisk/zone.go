package vdisk

import (
	"bytes"
	"errors"
	"fmt"
	"sync"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"mortise/internal/xts"
)

// zoneSize is how much a conversion rewrites between two durable steps, in
// bytes, while no guest asks for anything: enough that the two syncs of a step do
// not show. busyZone is the same beside a guest, whose writes to a zone wait until
// it is done.
const (
	zoneSize = 8 << 20
	busyZone = 1 << 20
)

// manySpans is where a sync of the file is taken to be cheaper than as many
// writes that are durable each for itself.
const manySpans = 4

// A zone is the piece of an extent that is converted in one step: [start, end),
// on units. The boundary passes more with it, lo to hi, which has nothing but
// holes besides.
type zone struct {
	lo, start, end, hi int64
	from, to           *xts.Cipher // old and new form
	data               []span
	buf                []byte   // new form of [start, end)
	sums               []uint64 // of its sectors
	failed             error    // of fill

	mu    sync.Mutex
	dirty []span // written by requests since it was laid out
	stale bool   // it must be filled anew, or laid out anew
}

// span is a range of an extent in bytes, on sectors.
type span struct{ off, end int64 }

// with is the range of s and o, which lie side by side.
func (s span) with(o span) span {
	if s.off == s.end {
		return o
	}
	return span{min(s.off, o.off), max(s.end, o.end)}
}

func (s span) touches(off, n int64) bool { return off < s.end && off+n > s.off }

// maxDirty is how many notes a zone takes before it is filled anew instead.
const maxDirty = 256

// note records a request that changes [off, off+n) while the zone is being
// filled.
func (z *zone) note(off, n int64, hole bool) {
	if !(span{z.lo, z.hi}).touches(off, n) {
		return
	}
	sp := span{max(off, z.lo), min(off+n, z.hi)}
	z.mu.Lock()
	defer z.mu.Unlock()
	if hole || sp.off < z.start || sp.end > z.end || len(z.dirty) == maxDirty {
		z.stale = true
		return
	}
	z.dirty = append(z.dirty, sp)
}

func (z *zone) empty() bool { return z.start == z.end }

// sum is the checksum of a sector's stored bytes. Equal sums must mean equal
// sectors by far more than chance; nobody can aim at a collision, because one of
// the two is always ciphertext that neither guest nor attacker chooses.
func sum(sector []byte) uint64 { return xxhash.Sum64(sector) }

// layout decides what the next zone is: from the data next to the boundary at, in
// the direction that it goes, at most length bytes. From here on changes of it,
// and of the hole skipped before it, are noted.
func (d *Disk) layout(at, length int64, buf []byte) (z *zone, err error) {
	d.ext.set(func() {
		if z, err = d.find(at, length, buf); err == nil {
			d.ext.next = z
		}
	})
	return z, err
}

// find returns a zone with its limits set.
func (d *Disk) find(at, length int64, buf []byte) (*zone, error) {
	z := &zone{lo: at, hi: at}
	if d.state.cur.Load().back {
		end, err := d.dataBefore(at)
		if err != nil {
			return nil, err
		}
		z.end, z.start = end, max(end-length, 0)
		z.lo = z.start
	} else {
		data, err := d.nextData(at)
		if err != nil {
			return nil, err
		}
		z.start = max(at, min(roundDown(data, UnitSize), d.end()))
		z.end = min(z.start+length, d.end())
		z.hi = z.end
	}
	z.from, z.to = d.forms()
	z.buf = buf[:z.end-z.start]
	return z, nil
}

// forms returns what a conversion makes of what, in the direction that it goes.
func (d *Disk) forms() (from, to *xts.Cipher) {
	if d.state.cur.Load().back {
		return d.next.cipher(), d.key.cipher()
	}
	return d.key.cipher(), d.next.cipher()
}

func (d *Disk) nextData(at int64) (int64, error) {
	data, err := d.ext.f.NextData(at)
	if err != nil {
		return 0, fmt.Errorf("%s: looking for data behind byte %d: %w", d.ext.name, at, err)
	}
	return data, nil
}

// dataBefore returns where the last data below at ends, rounded up to a unit; 0 if
// there is none. File systems look forward only: it looks into windows that grow
// as long as they are empty.
func (d *Disk) dataBefore(at int64) (int64, error) {
	for window := int64(zoneSize); at > 0; window = min(4*window, 1<<40) {
		from, end := max(0, at-window), int64(0)
		for off := from; off < at; {
			data, err := d.nextData(off)
			if err != nil {
				return 0, err
			}
			if data >= at {
				break
			}
			hole, err := d.ext.f.NextHole(data)
			if err != nil {
				return 0, fmt.Errorf("%s: looking for a hole behind byte %d: %w", d.ext.name, data, err)
			}
			off = max(hole, data+1)
			end = min(roundUp(off, UnitSize), at)
		}
		if end > 0 {
			return end, nil
		}
		at = from
	}
	return 0, nil
}

// freeze makes changes of a zone wait from now on, beside those of the zone before
// as long as that is not recorded as done, and makes its new form that of what they
// have left.
func (d *Disk) freeze(z *zone) error {
	e := d.ext
	e.set(func() { e.next, e.frozen = nil, e.frozen.with(span{z.lo, z.hi}) })
	d.at("convert.frozen")
	if z.stale {
		if err := d.layoutAnew(z); err != nil {
			return err
		}
	}
	for _, sp := range z.dirty {
		if err := d.refill(z, sp); err != nil {
			return err
		}
	}
	if z.failed != nil {
		return z.failed
	}
	return e.settle()
}

// layoutAnew is for a frozen zone of which the holes have changed: the hole that
// was skipped may have got data, and then the zone begins there. Its far end moves
// no further, for what is behind is not frozen.
func (d *Disk) layoutAnew(z *zone) error {
	length := max(z.end-z.start, UnitSize)
	if d.state.cur.Load().back {
		anew, err := d.find(z.hi, length, z.buf[:cap(z.buf)])
		if err != nil {
			return err
		}
		z.end = max(anew.end, z.end)
		z.start = max(z.end-length, z.lo)
		z.lo = z.start
	} else {
		anew, err := d.find(z.lo, length, z.buf[:cap(z.buf)])
		if err != nil {
			return err
		}
		z.start = min(anew.start, z.start)
		z.end = min(z.start+length, z.hi)
		z.hi = z.end
	}
	z.buf, z.data, z.dirty = z.buf[:z.end-z.start], nil, nil
	d.ext.set(func() {
		if e := d.ext; d.state.cur.Load().back {
			e.frozen.off = z.lo
		} else {
			e.frozen.end = z.hi
		}
	})
	d.fill(z)
	return nil
}

// refill computes the new form of a span once more.
func (d *Disk) refill(z *zone, sp span) error {
	p := z.buf[sp.off-z.start : sp.end-z.start]
	if err := readFull(d.ext.f, p, sp.off); err != nil {
		return fmt.Errorf("%s: reading %d bytes at %d: %w", d.ext.name, len(p), sp.off, err)
	}
	reform(p, sp.off, z.from, z.to)
	for a := int64(0); a < int64(len(p)); a += SectorSize {
		z.sums[(sp.off-z.start+a)/SectorSize] = sum(p[a:][:SectorSize])
	}
	for _, have := range z.data {
		if have.off <= sp.off && sp.end <= have.end {
			return nil
		}
	}
	z.data = append(z.data, sp)
	return nil
}

// fill reads a zone and computes its new form and the checksums.
func (d *Disk) fill(z *zone) {
	z.failed = func() error {
		clear(z.buf)
		for off := z.start; off < z.end; {
			data, err := d.ext.f.NextData(off)
			if err != nil {
				return err
			}
			data = roundDown(data, SectorSize)
			if data >= z.end {
				break
			}
			hole, err := d.ext.f.NextHole(data)
			if err != nil {
				return err
			}
			sp := span{data, min(roundUp(max(hole, data+1), SectorSize), z.end)}
			if n := len(z.data); n > 0 && z.data[n-1].end >= sp.off {
				z.data[n-1].end = sp.end
			} else {
				z.data = append(z.data, sp)
			}
			off = sp.end
		}
		for _, sp := range z.data {
			p := z.buf[sp.off-z.start : sp.end-z.start]
			if err := readFull(d.ext.f, p, sp.off); err != nil {
				return fmt.Errorf("%s: reading %d bytes at %d: %w", d.ext.name, len(p), sp.off, err)
			}
			reform(p, sp.off, z.from, z.to)
		}
		z.sums = make([]uint64, len(z.buf)/SectorSize)
		for i := range z.sums {
			z.sums[i] = sum(z.buf[i*SectorSize:][:SectorSize])
		}
		return nil
	}()
}

// reform turns stored sectors at off from one form into another. Out of a key, a
// sector that is zero has no content and stays zero. From clear, every sector is
// encrypted, also one of zeros: only holes of the file stay holes.
func reform(p []byte, off int64, from, to *xts.Cipher) {
	if from == nil {
		to.EncryptAt(p, p, unitOf(off), offsetInUnit(off))
		return
	}
	forRuns(p, func(a, b int) {
		at := off + int64(a)
		from.DecryptAt(p[a:b], p[a:b], unitOf(at), offsetInUnit(at))
		if to != nil {
			to.EncryptAt(p[a:b], p[a:b], unitOf(at), offsetInUnit(at))
		}
	})
}

// put writes spans of a zone's new form and makes them durable: with a sync of
// the file, or beside a busy guest, whose own writes it would have to wait for,
// each for itself. It reads back what storage then has.
func (d *Disk) put(z *zone, spans []span, busy bool) error {
	alone := busy && len(spans) <= manySpans
	for _, sp := range spans {
		p := z.buf[sp.off-z.start : sp.end-z.start]
		if alone {
			if err := d.ext.f.WriteDurably(p, sp.off); errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
				return err // nothing that storage took was lost
			} else if err != nil {
				return d.ext.fail(err)
			}
		} else if _, err := d.ext.f.WriteAt(p, sp.off); err != nil {
			return fmt.Errorf("%s: writing %d bytes at %d: %w", d.ext.name, sp.end-sp.off, sp.off, err)
		}
		d.at("convert.span")
	}
	d.at("convert.written")
	if !alone {
		if err := d.ext.sync(); err != nil {
			return err
		}
	}
	d.at("convert.synced")
	if err := d.verify(z, spans); err != nil {
		return err
	}
	if !busy {
		d.ext.f.Forget(z.start, z.end-z.start)
	}
	return nil
}

// verify compares storage with what was written to it. The page cache, if there is
// one between, is told to forget that, so that it cannot answer.
func (d *Disk) verify(z *zone, spans []span) error {
	d.ext.f.Forget(z.start, z.end-z.start)
	chunk := d.ext.chunk()
	buf := make([]byte, min(chunk, z.end-z.start))
	for _, sp := range spans {
		for off := sp.off; off < sp.end; off += chunk {
			p := buf[:min(chunk, sp.end-off)]
			if err := readFull(d.ext.f, p, off); err != nil {
				return fmt.Errorf("%s: reading back %d bytes at %d: %w", d.ext.name, len(p), off, err)
			}
			if !bytes.Equal(p, z.buf[off-z.start:][:len(p)]) {
				return d.ext.fail(fmt.Errorf("storage returns other bytes at %d to %d than it was given", off, off+int64(len(p))))
			}
		}
	}
	return nil
}
