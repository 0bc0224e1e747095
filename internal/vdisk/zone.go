package vdisk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

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

// courtesy is how long a conversion rests beside a busy guest, in times that its
// last step took: that leaves the guest the greater part of processor and storage.
const (
	courtesy = 4
	maxRest  = 250 * time.Millisecond
)

// manySpans is where a sync of the file is taken to be cheaper than as many
// writes that are durable each for itself.
const manySpans = 4

// A zone is the piece of an extent that is converted in one step.
type zone struct {
	from, start, end int64 // start and end on units; nothing but holes in [from, start)
	data             []span
	buf              []byte   // new form of [start, end)
	sums             []uint64 // of its sectors
	failed           error    // of fill

	mu    sync.Mutex
	dirty []span // written by requests since it was laid out
	stale bool   // it must be filled anew, or laid out anew
}

// span is a range of an extent in bytes, on sectors.
type span struct{ off, end int64 }

// maxDirty is how many notes a zone takes before it is filled anew instead.
const maxDirty = 256

// note records a request that changes [off, off+n) while the zone is being
// filled.
func (z *zone) note(off, n int64, hole bool) {
	if off >= z.end || off+n <= z.from {
		return
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	if hole || off < z.start || len(z.dirty) == maxDirty {
		z.stale = true
		return
	}
	z.dirty = append(z.dirty, span{off, min(off+n, z.end)})
}

func (z *zone) empty() bool { return z.start == z.end }

// sum is the checksum of a sector's stored bytes. Equal sums must mean equal
// sectors by far more than chance; nobody can aim at a collision, because one of
// the two is always ciphertext that neither guest nor attacker chooses.
func sum(sector []byte) uint64 { return xxhash.Sum64(sector) }

// convertLoop moves the boundary from where it is to the end of the extent.
//
// A step is:
//
//  1. The zone's new form is computed in memory. Writes to it go on; they are
//     noted, and once no more are let in, what they changed is computed again.
//  2. The state is made durable: boundary at the zone's start, and the checksums
//     of the new form. This also records the zone before as done.
//  3. The new form is written over the old one and made durable; meanwhile step 1
//     of the next zone goes on. Reads come from memory.
//
// Killed in 3, each sector of the zone has its old or its new form, and the
// checksums tell which: see recoverZone. Holes have no form and are not written;
// a long one is skipped by starting the next zone behind it.
//
// Beside a busy guest zones are small, each is recorded as done at once, and the
// conversion rests before the next one.
func (d *Disk) convertLoop(ctx context.Context, report func(Progress)) error {
	if d.state.cur.Load().hotLen > 0 { // left by a failed write of this process
		if err := d.recoverZone(); err != nil {
			return err
		}
	}
	p := d.startProgress(report)
	bufs := [2][]byte{make([]byte, d.opts.zone), make([]byte, d.opts.zone)}
	// A trim of this process's predecessor that made a hole must not be undone by
	// a power cut once the boundary is behind it.
	if err := d.ext.sync(); err != nil {
		return d.interrupt(err)
	}
	guest := d.ext.requests.Load()
	length := d.opts.zone
	z, err := d.layout(d.state.cur.Load().boundary, length, bufs[0])
	if err != nil {
		return d.interrupt(err)
	}
	d.fill(z)
	for i := 1; z.failed == nil && ctx.Err() == nil; i++ {
		began := time.Now()
		if z.failed = d.freeze(z); z.failed != nil || z.empty() {
			break
		}
		s := *d.state.cur.Load()
		s.boundary, s.hot, s.hotLen, s.sums = z.start, z.start, z.end-z.start, z.sums
		if err := d.writeState(&s); err != nil {
			return d.interrupt(err)
		}
		d.ext.set(func() { d.ext.boundary, d.ext.hot = z.start, z })
		d.at("convert.hot")

		now := d.ext.requests.Load()
		busy := now != guest
		guest = now
		length = d.opts.zone
		if busy {
			length = min(length, busyZone)
		}
		var next *zone
		filled := make(chan struct{})
		if !busy {
			if next, err = d.layout(z.end, length, bufs[i%2]); err != nil {
				return d.interrupt(err)
			}
			d.at("convert.laid")
			go func() { d.fill(next); close(filled) }()
		}
		err = d.put(z, z.data, busy)
		if !busy {
			<-filled
		}
		if err != nil {
			return d.interrupt(err)
		}
		p.zoneDone(z)
		if busy {
			if err := d.advance(z.end); err != nil {
				return err
			}
			rest(ctx, min(courtesy*time.Since(began), maxRest))
			if next, err = d.layout(z.end, length, bufs[i%2]); err != nil {
				return d.interrupt(err)
			}
			d.fill(next)
			d.at("convert.laid")
		}
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

func rest(ctx context.Context, t time.Duration) {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// layout decides what the next zone is: from the first data at or behind at, at
// most length bytes. From here on changes of it, and of the hole skipped before
// it, are noted.
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
	data, err := d.ext.f.NextData(at)
	if err != nil {
		return nil, fmt.Errorf("%s: looking for data behind byte %d: %w", d.ext.name, at, err)
	}
	z := &zone{from: at, start: max(at, min(roundDown(data, UnitSize), d.end()))}
	z.end = min(z.start+length, d.end())
	z.buf = buf[:z.end-z.start]
	return z, nil
}

// freeze makes changes of a zone wait from now on, and its new form that of what
// they have left.
func (d *Disk) freeze(z *zone) error {
	e := d.ext
	e.set(func() { e.next, e.hotEnd = nil, z.end })
	d.at("convert.frozen")
	if z.stale {
		// The skipped hole may have got data: then the zone begins there. Its end
		// does not move forward, for behind it nothing is frozen.
		length := max(z.end-z.start, UnitSize)
		anew, err := d.find(z.from, length, z.buf[:cap(z.buf)])
		if err != nil {
			return err
		}
		z.start = min(anew.start, z.start)
		z.end = min(z.start+length, z.end)
		z.buf, z.data, z.dirty = z.buf[:z.end-z.start], nil, nil
		e.set(func() { e.hotEnd = z.end })
		d.fill(z)
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

// refill computes the new form of a span once more.
func (d *Disk) refill(z *zone, sp span) error {
	p := z.buf[sp.off-z.start : sp.end-z.start]
	if err := readFull(d.ext.f, p, sp.off); err != nil {
		return fmt.Errorf("%s: reading %d bytes at %d: %w", d.ext.name, len(p), sp.off, err)
	}
	reform(p, sp.off, d.key.cipher(), d.next.cipher())
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

// put writes spans of a zone's new form and makes them durable: with a sync of
// the file, or beside a busy guest, whose own writes it would have to wait for,
// each for itself.
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
	if !busy {
		d.ext.f.Forget(z.start, z.end-z.start)
	}
	d.at("convert.synced")
	return nil
}

// advance records that everything below boundary has its new form, and lets
// waiting requests go.
func (d *Disk) advance(boundary int64) error {
	if err := d.ext.settle(); err != nil {
		return d.interrupt(err)
	}
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
		d.ext.boundary, d.ext.hotEnd, d.ext.hot, d.ext.next, d.ext.stuck = s.boundary, s.hot+s.hotLen, nil, nil, nil
		if s.hotLen > 0 {
			d.ext.stuck = why
		}
	})
}

// recoverZone finishes the hot zone that a crash, or a failed write, has left. A
// sector that matches its checksum has its new form; anything else is in the old
// one and is converted.
//
// The old form need not be what the checksum was made from: a power cut takes a
// write that nobody has flushed, and then the sector is still in the old form,
// only older. So before converted sectors are written, their own checksums are
// made durable: otherwise, after a crash in here, such a sector would match
// nothing and be converted twice.
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
		s.sums = sums
		if err := d.writeState(&s); err != nil {
			return err
		}
	}
	d.at("recover.sums")
	if err := d.put(z, old, false); err != nil {
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
