package vdisk

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

	"mortise/internal/xts"
)

// zoneSize is how much a conversion rewrites between two durable steps, in
// bytes: enough that the two fsyncs of a step do not show, little enough that a
// guest's request waits for tens of milliseconds at most on a disk of today. It
// may have to wait for two zones.
const zoneSize = 8 << 20

// A zone is the piece of an extent that is converted in one step.
type zone struct {
	start, end int64 // on units
	data       []span
	buf        []byte   // new form of [start, end)
	sums       []uint64 // of its sectors
	failed     error    // of fill
}

// span is a range of an extent in bytes, on sectors.
type span struct{ off, end int64 }

func (z *zone) empty() bool { return z.start == z.end }

// sum is the checksum of a sector's stored bytes. Equal sums must mean equal
// sectors by far more than chance; nobody can aim at a collision, because one of
// the two is always ciphertext that neither guest nor attacker chooses.
func sum(sector []byte) uint64 { return xxhash.Sum64(sector) }

// convertLoop moves the boundary from where it is to the end of the extent.
//
// A step is:
//
//  1. The zone's new form is computed in memory. Requests to it wait.
//  2. The state is made durable: boundary at the zone's start, and the checksums
//     of the new form. This also records the zone before as done.
//  3. The new form is written over the old one and synced; meanwhile step 1 of
//     the next zone goes on.
//
// Killed in 3, each sector of the zone has its old or its new form, and the
// checksums tell which: see recoverZone. Holes have no form and are not written;
// a long one is skipped by starting the next zone behind it.
func (d *Disk) convertLoop(ctx context.Context, report func(Progress)) error {
	if d.state.cur.Load().hotLen > 0 { // left by a failed write of this process
		if err := d.recoverZone(); err != nil {
			return err
		}
	}
	p := d.startProgress(report)
	bufs := [2][]byte{make([]byte, d.opts.zone), make([]byte, d.opts.zone)}
	z, err := d.layout(d.state.cur.Load().boundary, bufs[0])
	if err != nil {
		return d.interrupt(err)
	}
	// A trim that made a hole which the first zone skips must not be undone by
	// a power cut once the boundary is behind it. Later zones are laid out before
	// the sync of the zone before.
	if err := d.ext.sync(); err != nil {
		return d.interrupt(err)
	}
	d.fill(z)
	for i := 1; !z.empty() && z.failed == nil && ctx.Err() == nil; i++ {
		s := *d.state.cur.Load()
		s.boundary, s.hot, s.hotLen, s.sums = z.start, z.start, z.end-z.start, z.sums
		if err := d.writeState(&s); err != nil {
			return d.interrupt(err)
		}
		d.ext.set(func() { d.ext.boundary = z.start })
		d.at("convert.hot")

		next, err := d.layout(z.end, bufs[i%2])
		if err != nil {
			return d.interrupt(err)
		}
		filled := make(chan struct{})
		go func() { d.fill(next); close(filled) }()
		err = d.put(z, z.data)
		<-filled
		if err != nil {
			return d.interrupt(err)
		}
		p.zoneDone(z)
		z = next
	}
	// The zone before z is durable.
	if why := cmp.Or(z.failed, ctx.Err()); why != nil {
		s := d.state.cur.Load()
		if err := d.advance(s.boundary + s.hotLen); err != nil {
			return err
		}
		return d.interrupt(why)
	}
	return d.advance(d.end())
}

// layout decides what the next zone is: from the first data at or behind at, up
// to a zone's length. From here on requests wait to everything from the boundary
// to the zone's end, skipped holes included, so that no hole gets data under the
// old key while it is being skipped.
func (d *Disk) layout(at int64, buf []byte) (z *zone, err error) {
	z = &zone{buf: buf}
	e := d.ext
	e.set(func() {
		var data int64
		if data, err = e.f.NextData(at); err != nil {
			return
		}
		z.start = max(at, min(roundDown(data, UnitSize), d.end()))
		z.end = min(z.start+d.opts.zone, d.end())
		z.buf = buf[:z.end-z.start]
		e.hotEnd = z.end
	})
	if err != nil {
		return nil, fmt.Errorf("%s: looking for data behind byte %d: %w", d.ext.name, at, err)
	}
	return z, nil
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
			reform(p, sp.off, d.key.cipher(), d.next.cipher())
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

// put writes spans of a zone's new form and makes them durable.
func (d *Disk) put(z *zone, spans []span) error {
	for _, sp := range spans {
		if _, err := d.ext.f.WriteAt(z.buf[sp.off-z.start:sp.end-z.start], sp.off); err != nil {
			return fmt.Errorf("%s: writing %d bytes at %d: %w", d.ext.name, sp.end-sp.off, sp.off, err)
		}
		d.at("convert.span")
	}
	d.at("convert.written")
	if err := d.ext.sync(); err != nil {
		return err
	}
	d.ext.f.Forget(z.start, z.end-z.start)
	d.at("convert.synced")
	return nil
}

// advance records that everything below boundary has its new form, and lets
// waiting requests go.
func (d *Disk) advance(boundary int64) error {
	s := *d.state.cur.Load()
	s.boundary, s.hot, s.hotLen, s.sums = boundary, 0, 0, nil
	if err := d.writeState(&s); err != nil {
		return d.interrupt(err)
	}
	d.release(nil)
	d.at("convert.advanced")
	return nil
}

// interrupt ends a conversion that cannot go on. If the last zone may be
// half-written, requests to it fail with why until the conversion is resumed:
// only the checksums can tell its sectors apart.
func (d *Disk) interrupt(why error) error {
	d.release(why)
	if dead := d.ext.dead.Load(); dead != nil {
		return why
	}
	return &Error{Kind: ErrConverting, File: d.ext.name, Why: fmt.Sprintf("its conversion stopped at byte %d", d.state.cur.Load().boundary), Cause: why,
		Fix: "remove the cause and resume the conversion; nothing is lost"}
}

// release makes the limits those of the durable state. Requests to a hot zone
// that is left fail with why.
func (d *Disk) release(why error) {
	s := d.state.cur.Load()
	d.ext.set(func() {
		d.ext.boundary, d.ext.hotEnd, d.ext.stuck = s.boundary, s.hot+s.hotLen, nil
		if s.hotLen > 0 {
			d.ext.stuck = why
		}
	})
}

// recoverZone finishes the hot zone that a crash, or a failed write, has left. A
// sector that matches its checksum has its new form; anything else is in the old
// one and is converted.
//
// The old form should be what the checksum was made from: convertLoop syncs the
// extent between the two. Should storage have lost that all the same, the sector
// is still in the old form, only older. So before converted sectors are written,
// their own checksums are made durable: otherwise, after a crash in here, such a
// sector would match nothing and be converted twice.
func (d *Disk) recoverZone() error {
	s := *d.state.cur.Load()
	z := &zone{start: s.hot, end: s.hot + s.hotLen, buf: make([]byte, s.hotLen)}
	if err := readFull(d.ext.f, z.buf, z.start); err != nil {
		return fmt.Errorf("%s: reading the hot zone at %d: %w", d.ext.name, z.start, err)
	}
	var old []span
	for i, want := range s.sums {
		a := int64(i) * SectorSize
		if sum(z.buf[a:][:SectorSize]) == want {
			continue
		}
		if n := len(old); n > 0 && old[n-1].end == z.start+a {
			old[n-1].end += SectorSize
		} else {
			old = append(old, span{z.start + a, z.start + a + SectorSize})
		}
	}
	sums := slices.Clone(s.sums)
	for _, sp := range old {
		p := z.buf[sp.off-z.start : sp.end-z.start]
		reform(p, sp.off, d.key.cipher(), d.next.cipher())
		for a := 0; a < len(p); a += SectorSize {
			sums[(sp.off-z.start)/SectorSize+int64(a/SectorSize)] = sum(p[a:][:SectorSize])
		}
	}
	if !slices.Equal(sums, s.sums) {
		d.opts.Log.Warn("storage lost writes that it had reported durable, in the zone that was being converted", "disk", d.path, "offset", z.start, "length", s.hotLen)
		s.sums = sums
		if err := d.writeState(&s); err != nil {
			return err
		}
	}
	d.at("recover.sums")
	if err := d.put(z, old); err != nil {
		return err
	}
	return d.advance(z.end)
}

// Progress says how far a conversion is.
type Progress struct {
	Kind        Conversion
	Done, Total int64   // bytes of the extent, holes included
	Rate        float64 // bytes per second that were really rewritten, since it was started or resumed
}

type progress struct {
	report    func(Progress)
	kind      Conversion
	total     int64
	began     time.Time
	rewritten int64
}

func (d *Disk) startProgress(report func(Progress)) *progress {
	p := &progress{report: report, kind: d.kind, total: d.end(), began: time.Now()}
	p.say(d.state.cur.Load().boundary)
	return p
}

func (p *progress) zoneDone(z *zone) {
	for _, sp := range z.data {
		p.rewritten += sp.end - sp.off
	}
	p.say(z.end)
}

func (p *progress) say(done int64) {
	if p.report != nil {
		elapsed := max(time.Since(p.began), time.Millisecond)
		p.report(Progress{p.kind, done, p.total, float64(p.rewritten) / elapsed.Seconds()})
	}
}
