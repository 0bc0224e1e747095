package vdisk

import (
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
)

// This file is what a thick disk is: one whose extent has all its space, so that a
// guest's write never meets a full storage. What nobody wrote is allocated without
// being written (fallocate); file systems call that a hole when they are asked for
// data, and so nothing else here has to tell the two apart.

// allocate gives the first size bytes of an extent their space, more of which are
// new. It looks first: a file system that is filled up for nothing fails others, too.
func allocate(fsys fsys, name string, f file, size, more int64) error {
	const fix = "free space, choose other storage, or a thin disk, which takes space as it is written to"
	free, err := fsys.Free(filepath.Dir(name))
	if err != nil {
		return fmt.Errorf("looking for the space of a thick disk: %w", err)
	}
	if more > free {
		return fmt.Errorf("%s: a thick disk takes %d bytes more at once, and %d are free: %w; %s", name, more, free, syscall.ENOSPC, fix)
	}
	err = f.Allocate(size)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return &Error{Kind: ErrUnsupported, File: name, Why: "its file system cannot reserve space, which a thick disk needs", Cause: err,
			Fix: "make it thin, or put it on ext4, XFS or NFS 4.2"}
	case err != nil:
		return fmt.Errorf("%s: reserving the space of a thick disk: %w; %s", name, err, fix)
	}
	return nil
}

// thicken gives a thick disk the space that it lacks: one that was restored from a
// backup with holes, or where a crash came between the two halves of a zeroing. It is
// no reason to refuse the disk, if there is no space.
func (d *Disk) thicken() {
	if !d.ext.thick {
		return
	}
	st, err := d.ext.f.Stat()
	if err != nil || st.allocated >= st.size {
		return
	}
	if err := allocate(d.opts.fs, d.ext.name, d.ext.f, st.size, st.size-st.allocated); err != nil {
		d.opts.Log.Warn("a thick disk has less than its space", "disk", d.path, "bytes", st.size, "allocated", st.allocated, "error", err)
	}
}

// extend makes the extent longer, from its present size.
func (d *Disk) extend(from, to int64) error {
	if !d.ext.thick {
		return d.ext.f.Truncate(to)
	}
	err := allocate(d.opts.fs, d.ext.name, d.ext.f, to, to-from)
	if err != nil { // a part of it may be there
		err = errors.Join(err, d.ext.f.Truncate(from))
	}
	return err
}

// data is how many bytes of a range a conversion rewrites, about: what is allocated,
// in proportion; of a thick disk, where all is, what was written.
func (d *Disk) data(in span) (n int64, err error) {
	st, err := d.ext.f.Stat()
	if err != nil {
		return 0, err
	}
	if !d.ext.thick {
		part := float64(in.end-in.off) / float64(d.end())
		return int64(float64(min(st.allocated, d.end())) * part), nil
	}
	// What was never written counts as data as long as the page cache has it, because
	// somebody read it.
	in.end = max(in.off, min(in.end, st.size))
	d.ext.f.Forget(in.off, in.end-in.off)
	err = d.ext.status(in.off, in.end-in.off, func(run int64, s Status) bool {
		if s&Zero == 0 {
			n += run
		}
		return true
	})
	return n, err
}
