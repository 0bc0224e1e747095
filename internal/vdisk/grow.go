package vdisk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"mortise/internal/vmdk"
)

// Grow makes the disk longer, up to size bytes; what is new reads as zeros. As in
// vSphere, a disk with snapshots is refused, for those have the old length.
//
// Order: the extent, the state, the descriptor, which has the last word: a crash
// leaves the old length or the new one, and Grow can be called again.
func (c *Chain) Grow(ctx context.Context, size int64) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	c.shape.Lock()
	defer c.shape.Unlock()
	d := c.top()
	if err := c.thawed(); err != nil {
		return err
	}
	switch {
	case len(c.links) > 1:
		return &Error{Kind: ErrChildren, File: d.path, Why: fmt.Sprintf("it cannot grow: it stands on %s, which has the old length", filepath.Base(c.links[len(c.links)-2].path)), Fix: "delete its snapshots, or clone it in full, first"}
	case d.kind != NotConverting:
		return &Error{Kind: ErrConverting, File: d.path, Why: "it cannot grow in the middle of: " + d.kind.String(), Fix: "finish that first: resume it"}
	case size == d.size:
		return nil
	case size < d.size:
		return fmt.Errorf("%s: a disk of %d bytes cannot shrink to %d: what is behind would be lost", d.path, d.size, size)
	case size%SectorSize != 0 || size > MaxSize:
		return fmt.Errorf("%s: a disk cannot have %d bytes: it has whole sectors of %d bytes, at most %d", d.path, size, SectorSize, MaxSize)
	}
	if err := d.leaf(); err != nil {
		return err
	}
	if err := d.lengthen(size); err != nil {
		return fmt.Errorf("growing %s: %w", d.path, err)
	}
	c.change(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.size = size
	})
	c.size.Store(size)
	c.opts.Log.Info("disk grown", "disk", d.path, "bytes", size)
	return nil
}

func (d *Disk) lengthen(size int64) error {
	end := size
	if d.state != nil {
		end = roundUp(size, UnitSize)
	}
	st, err := d.ext.f.Stat()
	if err != nil {
		return err
	}
	if st.size > d.size {
		// A foreign extent may be longer than its disk, and what is there is not the
		// guest's.
		if err := d.ext.zero(d.size, roundUp(st.size-d.size, SectorSize), true); err != nil {
			return err
		}
	}
	if st.size < end {
		if err := d.extend(st.size, end); err != nil {
			return err
		}
	}
	if err := d.ext.sync(); err != nil {
		return err
	}
	d.at("grow.extent")
	if d.state != nil {
		s := *d.state.cur.Load()
		s.size = size
		if err := d.writeState(&s); err != nil {
			return err
		}
	}
	var edited error
	err = d.edit(func(desc *vmdk.Descriptor) { edited = desc.SetSize(size) })
	return errors.Join(edited, err)
}
