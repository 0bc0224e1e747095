package vdisk

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// goal is where a conversion's boundary goes.
func (d *Disk) goal() int64 {
	if d.state.cur.Load().back {
		return 0
	}
	return d.end()
}

// behind is the boundary once a zone is done.
func (z *zone) behind(back bool) int64 {
	if back {
		return z.start
	}
	return z.end
}

// moveBoundary moves the boundary from where it is to its goal.
//
// A step is:
//
//  1. The zone's new form is computed in memory. Writes to it go on; they are
//     noted, and once no more are let in, what they changed is computed again.
//  2. The state is made durable: boundary at the zone's start, and the checksums
//     of the new form. This also records the zone before as done.
//  3. The new form is written over the old one, made durable and read back;
//     meanwhile step 1 of the next zone goes on. Reads come from memory.
//
// Killed in 3, each sector of the zone has its old or its new form, and the
// checksums tell which: see recoverZone. Holes have no form and are not written;
// a long one is skipped by starting the next zone behind it.
//
// A cancelled conversion does the same from its boundary down, making the old
// form the new one.
//
// Beside a busy guest, or where it is held back, zones are small, each is recorded
// as done at once, and the conversion rests before the next one.
func (d *Disk) moveBoundary(ctx context.Context, report func(Progress)) error {
	if d.state.cur.Load().hotLen > 0 { // left by a failed write of this process
		if err := d.recoverZone(); err != nil {
			return err
		}
	}
	back := d.state.cur.Load().back
	p := d.startProgress(report)
	bufs := [2][]byte{make([]byte, d.opts.zone), make([]byte, d.opts.zone)}
	// A trim of this process's predecessor that made a hole must not be undone by
	// a power cut once the boundary is behind it.
	if err := d.ext.sync(); err != nil {
		return d.interrupt(err)
	}
	if err := d.pace.hold(ctx, 0); err != nil {
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
		d.ext.set(func() { d.ext.boundary, d.ext.frozen, d.ext.hot = z.start, span{z.start, z.end}, z })
		d.at("convert.hot")

		now := d.ext.requests.Load()
		busy := now != guest
		guest = now
		slow := busy || d.pace.held()
		length = d.opts.zone
		if slow {
			length = min(length, busyZone)
		}
		var next *zone
		filled := make(chan struct{})
		if !slow {
			if next, err = d.layout(z.behind(back), length, bufs[i%2]); err != nil {
				return d.interrupt(err)
			}
			d.at("convert.laid")
			go func() { d.fill(next); close(filled) }()
		}
		err = d.put(z, z.data, busy)
		if !slow {
			<-filled
		}
		if err != nil {
			return d.interrupt(err)
		}
		p.zoneDone(z, z.behind(back))
		if slow {
			if err := d.advance(z.behind(back)); err != nil {
				return err
			}
			if busy {
				rest(ctx, min(courtesy*time.Since(began), maxRest))
			}
			if d.pace.hold(ctx, z.bytes()) != nil {
				break
			}
			if next, err = d.layout(z.behind(back), length, bufs[i%2]); err != nil {
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
		done := s.boundary
		if !back {
			done += s.hotLen
		}
		if err := d.advance(done); err != nil {
			return err
		}
		return d.interrupt(why)
	}
	return d.advance(d.goal())
}

// advance records a boundary with no hot zone, and lets waiting requests go.
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
		d.ext.boundary, d.ext.frozen, d.ext.hot, d.ext.next, d.ext.stuck = s.boundary, span{s.hot, s.hot + s.hotLen}, nil, nil, nil
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
	z.from, z.to = d.forms()
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
		reform(p, sp.off, z.from, z.to)
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
	return d.advance(z.behind(s.back))
}
