package vdisk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"mortise/internal/vmdk"
)

// A MergeSpec says which links become one.
type MergeSpec struct {
	// Link is the snapshot link, by name or path, that is merged with its parent: the
	// result shows what it shows, and what the parent froze is gone.
	Link string

	// Commit records durably, in the VMX, that the link of this path is now the disk's
	// top: of a merge of the top into its parent. Requests wait meanwhile. It may be
	// called again after a crash. For errors see LinkSpec.Commit.
	Commit func(top string) error

	// Report, which may be nil, tells how far it is, in bytes of data.
	Report func(done, total int64)
}

// How much is moved between two durable steps, in units: of a link that nobody
// writes to, and of the top, whose guest waits for as long.
const (
	mergeUnits     = 4096
	mergeUnitsLive = 256
)

// Consolidate merges a link with its parent, while requests go on. It picks the
// direction that is possible, and of two the one with less to copy:
//
//   - down: the link's units are moved into the parent, and the link goes. Not if
//     the parent is sealed or another VM's, or if the link has another child.
//   - up: what the link lacks is copied into it from the parent, and the parent goes
//     unless others stand on it. Not if the parent is the base.
//
// Data is encrypted anew between the keys of the two. Before a merge, the caller
// marks the parent's snapshot in the VMSD as one that cannot be reverted to: down
// changes it from the first byte.
//
// When ctx ends, Consolidate stops at a durable point and returns its error. After
// that, or a crash, the disk works as it is, and Consolidate with the same link goes
// on. Links can have any form, and be in the middle of a conversion.
func (c *Chain) Consolidate(ctx context.Context, s MergeSpec) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	if err := c.thawed(); err != nil {
		return err
	}
	m, down, err := c.plan(s)
	if err != nil {
		return err
	}
	run, name := m.up, "up"
	if down {
		run, name = m.down, "down"
	}
	log := c.opts.Log.With("link", m.link.path, "parent", m.parent.path, "direction", name)
	log.Info("disk consolidation begins")
	if err := run(ctx); err != nil {
		log.Warn("disk consolidation stops", "error", err)
		return err
	}
	log.Info("disk consolidation ends")
	return nil
}

// plan finds the links of a merge and its direction.
func (c *Chain) plan(s MergeSpec) (m *merge, down bool, err error) {
	c.shape.Lock()
	defer c.shape.Unlock()
	link, err := c.find(s.Link)
	if err != nil {
		return nil, false, err
	}
	i := slices.Index(c.links, link)
	if i == 0 {
		return nil, false, fmt.Errorf("%s: it is the base: name the snapshot link that is to be merged into it", link.path)
	}
	m = &merge{c: c, spec: s, link: link, parent: c.links[i-1]}
	down, err = m.direction()
	return m, down, err
}

// A merge is one consolidation.
type merge struct {
	c            *Chain
	spec         MergeSpec
	link, parent *Disk
	done, total  int64
}

// direction says whether the link is merged down, or up.
func (m *merge) direction() (down bool, err error) {
	fsys := m.c.opts.fs
	name := filepath.Base(m.link.path)
	noDown, err := m.noDown(fsys)
	if err != nil {
		return false, err
	}
	noUp := ""
	switch {
	case !m.parent.desc.IsDelta():
		noUp = "its parent is the base, which has no parent that could take its place"
	case !m.c.own(m.parent):
		noUp = "its parent is another VM's"
	case m.link.desc.Sealed() == sealedForClones:
		noUp = sealedForClones
	case m.parent.desc.Receiving() == name:
		noUp = "it is being merged down already"
	}
	if noDown != "" && noUp != "" {
		return false, &Error{Kind: ErrSealed, File: m.link.path, Why: fmt.Sprintf("it can be merged neither down (%s) nor up (%s)", noDown, noUp), Fix: "delete the other links first"}
	}
	if noDown != "" || noUp != "" {
		return noDown == "", nil
	}
	mine, err := m.link.units()
	if err != nil {
		return false, err
	}
	theirs, err := m.parent.units()
	return mine <= theirs, err
}

// noDown says why the link cannot be merged into its parent, "" if it can.
func (m *merge) noDown(fsys fsys) (string, error) {
	if !m.c.own(m.parent) || !m.c.own(m.link) {
		return "its parent is another VM's", nil
	}
	if m.parent.desc.Sealed() == sealedForClones || m.link.desc.Sealed() == sealedForClones {
		return sealedForClones, nil
	}
	for _, d := range []*Disk{m.parent, m.link} {
		kids, err := children(fsys, d.path, true)
		if err != nil {
			return "", err
		}
		for _, k := range kids {
			if next := m.c.child(d); next == nil || filepath.Base(k.Name()) != filepath.Base(next.path) {
				return fmt.Sprintf("%s stands on %s too", filepath.Base(k.Name()), filepath.Base(d.path)), nil
			}
		}
	}
	return "", nil
}

// units counts what a snapshot link has.
func (d *Disk) units() (n int64, err error) {
	err = d.eachRun(func(from, to int64) { n += to - from })
	return n, err
}

// hold makes links exclusive for as long as the merge runs.
func (m *merge) hold(ds ...*Disk) error {
	m.c.shape.Lock()
	defer m.c.shape.Unlock()
	return m.c.hold(ds...)
}

// down moves the link's units into its parent, piece by piece: copy, make that
// durable, take the units away from the link durably, and look for them in the
// parent from then on. So the two together always show the same, a crash needs no
// record to go on from, and what a guest writes to what the top lacks can go to the
// parent at once: the top only shrinks.
func (m *merge) down(ctx context.Context) (err error) {
	if err := m.hold(m.parent, m.link); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.c.letGo()) }()
	if err := m.stillDown(); err != nil {
		return err
	}
	if name := filepath.Base(m.link.path); m.parent.desc.Receiving() != name || m.parent.desc.Sealed() != "" {
		err := m.parent.edit(func(desc *vmdk.Descriptor) {
			desc.SetReceiving(name)
			desc.SetSealed("") // two links stood on it; one does
		})
		if err != nil {
			return err
		}
	}
	m.link.at("merge.begun")
	m.c.change(func() {
		if m.link == m.c.top() {
			m.c.under = m.parent
		}
	})
	defer func() {
		m.c.change(func() {
			// The next flush no longer looks at what the guest has written to the parent.
			if m.c.under != nil {
				err = errors.Join(err, m.c.flush())
			}
			m.c.under, m.c.frozen = nil, span{}
		})
	}()
	if m.total, err = m.link.units(); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for u := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("consolidating %s: %w", m.link.path, err)
		}
		from, _ := m.link.bits.next(u)
		if from >= m.link.end()/UnitSize {
			break
		}
		if u, err = m.move(from, buf); err != nil {
			return fmt.Errorf("consolidating %s: %w", m.link.path, err)
		}
	}
	return m.endDown()
}

// stillDown looks again whether the link can be merged down: until it was held,
// somebody could put another link on one of the two.
func (m *merge) stillDown() error {
	m.c.shape.Lock()
	defer m.c.shape.Unlock()
	why, err := m.noDown(m.c.opts.fs)
	if err == nil && why != "" {
		err = &Error{Kind: ErrSealed, File: m.link.path, Why: "it cannot be merged down: " + why, Fix: "try again: up may be possible"}
	}
	return err
}

// move moves the units of the piece that begins at from, and returns its end.
func (m *merge) move(from int64, buf []byte) (int64, error) {
	c := m.c
	c.gate.RLock()
	live := m.link == c.top()
	c.gate.RUnlock()
	end := from + mergeUnits
	if live {
		end = from + mergeUnitsLive
	}
	if c.opts.piece > 0 {
		end = from + c.opts.piece
	}
	end = min(end, m.link.end()/UnitSize)
	if live {
		c.change(func() { c.frozen = span{from * UnitSize, end * UnitSize} })
	}
	thaw := func(then func()) { c.change(func() { then(); c.frozen = span{} }) }
	var runs []span // of units
	err := func() error {
		for u := from; u < end; {
			a, b := m.link.bits.next(u)
			if u = min(b, end); a >= end {
				break
			}
			runs = append(runs, span{a, u})
			if err := m.copy(m.link, m.parent, a, u, buf); err != nil {
				return err
			}
		}
		m.link.at("merge.copied")
		if err := m.parent.sync(); err != nil {
			return err
		}
		m.link.at("merge.durable")
		if err := m.link.bits.remove(from, end); err != nil {
			// Some bits may be gone from one of their three copies: what was written
			// next to those units would not be noted again. Opening it anew makes the
			// copies one.
			return m.link.ext.fail(err)
		}
		return nil
	}()
	if err != nil {
		thaw(func() {})
		return 0, err
	}
	thaw(func() {
		for _, r := range runs {
			c.index.move(r.off, r.end, m.link.slot, m.parent.slot)
		}
	})
	m.link.at("merge.moved")
	for _, r := range runs { // nobody reads these any more
		off, n := r.off*UnitSize, (r.end-r.off)*UnitSize
		_ = m.link.ext.zero(off, n, true) // else the link's whole file goes at the end
		m.done += r.end - r.off
	}
	m.tell()
	return end, nil
}

func (m *merge) tell() {
	if m.spec.Report != nil {
		m.spec.Report(m.done*UnitSize, max(m.done, m.total)*UnitSize)
	}
}

// copy copies the units [a, b) and notes, if to is a snapshot link, that it has
// them. Holes stay holes.
func (m *merge) copy(from, to *Disk, a, b int64, buf []byte) error {
	size := m.c.size.Load()
	for off, end := a*UnitSize, min(b*UnitSize, size); off < end; {
		n := min(int64(len(buf)), end-off)
		var status Status
		err := from.ext.status(off, n, func(run int64, s Status) bool {
			n, status = run, s
			return false
		})
		if err != nil {
			return err
		}
		if status&Zero != 0 {
			err = to.ext.zero(off, n, true)
		}
		if status&Zero == 0 || errors.Is(err, errors.ErrUnsupported) {
			if err = from.ext.read(buf[:n], off); err == nil {
				err = to.ext.write(buf[:n], off)
			}
		}
		if err != nil {
			return err
		}
		off += n
	}
	if to.bits == nil {
		return nil
	}
	for a < b {
		end := min(b, (a/regionUnits+1)*regionUnits)
		if err := to.bits.set(a, end); err != nil {
			return err
		}
		a = end
	}
	return nil
}

// endDown takes the link, which has nothing any more, out of the chain.
func (m *merge) endDown() error {
	c := m.c
	c.shape.Lock()
	defer c.shape.Unlock()
	var err error
	if next := c.child(m.link); next != nil {
		err = next.whilePromoted(func() error {
			return next.edit(func(desc *vmdk.Descriptor) {
				_ = desc.SetParent(filepath.Base(m.parent.path), m.parent.desc.CID()) // a name of this folder
			})
		})
		m.link.at("merge.repointed")
		if err == nil {
			c.change(func() { c.take(m.link) })
		}
	} else {
		c.change(func() {
			if err = c.flush(); err != nil || m.spec.Commit == nil {
				return
			}
			if err = m.spec.Commit(m.parent.path); errors.Is(err, ErrUndecided) {
				err = m.link.ext.fail(err)
			}
			m.link.at("merge.committed")
		})
		if err == nil {
			c.change(func() { c.under = nil; c.take(m.link) })
		}
	}
	if err != nil {
		return fmt.Errorf("ending the consolidation of %s: %w", m.link.path, err)
	}
	if err := errors.Join(m.link.sync(), m.link.Close()); err != nil {
		return err
	}
	return m.parent.forget(filepath.Base(m.link.path))
}

// take takes a link out of the chain. The caller holds gate exclusively.
func (c *Chain) take(d *Disk) {
	c.links = slices.DeleteFunc(slices.Clone(c.links), func(l *Disk) bool { return l == d })
	c.slots[d.slot] = nil
	if len(c.links) == 1 {
		c.index = nil
	}
}

// up copies what the link lacks into it. It shows the same all the time, so
// nothing needs a record either.
func (m *merge) up(ctx context.Context) (err error) {
	if err := m.hold(m.link); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.c.letGo()) }()
	var runs []span
	err = m.parent.eachRun(func(from, to int64) {
		runs = append(runs, span{from, to})
		m.total += to - from
	})
	if err != nil {
		return err
	}
	m.link.at("merge.begun")
	piece := int64(64) // units: how long a guest's write to a unit that the link lacks may wait
	if m.c.opts.piece > 0 {
		piece = m.c.opts.piece
	}
	buf := make([]byte, piece*UnitSize)
	for _, r := range runs {
		for u := r.off; u < r.end; {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("consolidating %s: %w", m.link.path, err)
			}
			end := min(u+piece, r.end, (u/regionUnits+1)*regionUnits)
			if err := m.lift(u, end, buf); err != nil {
				return fmt.Errorf("consolidating %s: %w", m.link.path, err)
			}
			m.done += end - u
			u = end
			m.link.at("merge.lifted")
			m.tell()
		}
	}
	m.link.at("merge.copied")
	if err := m.link.sync(); err != nil {
		return err
	}
	m.link.at("merge.durable")
	return m.endUp()
}

// lift copies those units of [from, to), of one region, that the link lacks.
func (m *merge) lift(from, to int64, buf []byte) error {
	lock := m.link.bits.freshLock(from)
	lock.Lock()
	defer lock.Unlock()
	for u := from; u < to; u++ {
		if m.link.bits.has(u) {
			continue
		}
		end := u + 1
		for end < to && !m.link.bits.has(end) {
			end++
		}
		if err := m.copy(m.parent, m.link, u, end, buf); err != nil {
			return err
		}
		m.c.index.move(u, end, m.parent.slot, m.link.slot)
		u = end
	}
	return nil
}

// sealBelow seals what the parent stands on, if the parent stays because others
// stand on it: then both stand there.
func (m *merge) sealBelow() error {
	below := m.c.links[slices.Index(m.c.links, m.parent)-1]
	kids, err := children(m.c.opts.fs, m.parent.path, true)
	if err != nil || len(kids) < 2 && m.parent.desc.Sealed() != sealedForClones || !m.c.own(below) {
		return err
	}
	return below.seal(sealedForLinks)
}

// endUp makes the link stand on what its parent stands on. The parent's files go,
// unless others need them.
func (m *merge) endUp() error {
	c := m.c
	c.shape.Lock()
	defer c.shape.Unlock()
	name := filepath.Base(m.parent.path)
	if err := m.sealBelow(); err != nil {
		return fmt.Errorf("ending the consolidation of %s: %w", m.link.path, err)
	}
	err := m.link.edit(func(desc *vmdk.Descriptor) {
		_ = desc.SetParent(m.parent.desc.Parent(), m.parent.desc.ParentCID()) // one that was parsed
		desc.SetReceiving(name)
	})
	if err != nil {
		return fmt.Errorf("ending the consolidation of %s: %w", m.link.path, err)
	}
	m.link.at("merge.repointed")
	c.change(func() { c.take(m.parent) })
	if err := m.parent.Close(); err != nil {
		return err
	}
	return m.link.forget(name)
}
