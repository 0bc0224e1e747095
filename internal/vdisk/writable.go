package vdisk

import (
	"errors"
	"fmt"
)

// This file is how a link becomes one that is written, and how it is left: what a
// killed process has acknowledged is made durable, the bitmap read, the lock changed.

// wasKilled says whether a killed process has left bits that are not durable.
func (d *Disk) wasKilled() (bool, error) {
	if !d.desc.IsDelta() {
		return false, nil
	}
	live, err := d.openLive()
	if err != nil || live == nil {
		return false, err
	}
	return true, live.Close()
}

// recoverLive makes durable what a killed process has acknowledged: its data, then
// the bits that its live bitmap has.
func (d *Disk) recoverLive() error {
	live, err := d.openLive()
	if err != nil || live == nil {
		return err
	}
	defer live.Close()
	b := newBitmap(d.state.f, live, d.size)
	mark := func(from, to int64) {
		for u := from; u < to; u++ {
			n := u / regionUnits
			r := b.region(n)
			w := &r.words[u%regionUnits/bitsPerWord]
			w.Store(w.Load() | 1<<(u%bitsPerWord))
			b.note(n, r)
		}
	}
	units := d.end() / UnitSize
	if err := load(live, liveHeader, units, mark); err != nil {
		return fmt.Errorf("reading a live bitmap: %w", err)
	}
	if len(b.list.dirty) == 0 {
		return nil
	}
	if err := load(d.state.f, bitmapOffset, units, mark); err != nil {
		return fmt.Errorf("reading the bitmap of %s: %w", d.path, err)
	}
	d.at("live.read")
	return d.persist(b)
}

// openBits prepares a snapshot link for writing. What its predecessor acknowledged
// is durable, and its state says which opening this is.
func (d *Disk) openBits() error {
	live, err := d.createLive()
	if err != nil {
		return err
	}
	b := newBitmap(d.state.f, live, d.size)
	err = load(d.state.f, bitmapOffset, d.end()/UnitSize, func(from, to int64) {
		for from < to {
			n := from / regionUnits
			end := min(to, (n+1)*regionUnits)
			for w := from % regionUnits / bitsPerWord; w <= (end-1)%regionUnits/bitsPerWord; w++ {
				word := &b.region(n).words[w]
				word.Store(word.Load() | wordMask(n, w, from, end))
			}
			from = end
		}
	})
	if err != nil {
		return errors.Join(fmt.Errorf("reading the bitmap of %s: %w", d.path, err), live.Close())
	}
	d.bits = b
	d.at("live.created")
	return nil
}

// persist makes what was written to the link durable, and that it was.
func (d *Disk) persist(b *bitmap) error {
	err := b.persist(d.ext.sync)
	if err != nil && d.ext.dead.Load() == nil && errors.As(err, new(*syncError)) {
		return d.ext.fail(err)
	}
	return err
}

// sync makes everything written to the link durable.
func (d *Disk) sync() error {
	if d.bits == nil {
		return d.ext.sync()
	}
	return d.persist(d.bits)
}

// closeBits lets go of the live bitmap; it is removed if all of it is durable.
func (d *Disk) closeBits() error {
	if d.bits == nil {
		return nil
	}
	d.bits.list.Lock()
	clean := len(d.bits.list.dirty) == 0
	d.bits.list.Unlock()
	err := d.bits.live.Close()
	if clean {
		err = errors.Join(err, d.dropLive())
	}
	return err
}

// promote makes a link that others stand on one that can be written, converted or
// removed, if nobody else has it open.
func (d *Disk) promote() (err error) {
	if !d.opts.ReadOnly {
		return nil
	}
	if err := lock(d.opts.fs, d.ext.name, d.ext.f, true); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.demote())
		}
	}()
	d.opts.ReadOnly = false
	if d.state != nil {
		sf, err := openState(d.opts.fs, d.at, d.stateName(), true)
		if err != nil {
			return stateError(d.stateName(), err)
		}
		old := d.state
		d.setState(sf)
		if err := old.f.Close(); err != nil {
			return err
		}
		if err := d.settle(); err != nil {
			return err
		}
	}
	if d.desc.IsDelta() {
		return d.openBits()
	}
	return nil
}

// demote makes everything durable and the lock one that is shared again.
func (d *Disk) demote() error {
	if d.bits != nil {
		if err := d.sync(); err != nil {
			return err
		}
	}
	err := d.closeBits()
	d.bits = nil
	d.opts.ReadOnly = true
	return errors.Join(err, d.ext.f.Lock(false))
}
