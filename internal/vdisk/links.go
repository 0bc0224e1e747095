package vdisk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// This file does to every link of a disk what convert.go and shallow.go do to one:
// those of the chain, and those of the other branches in its folder, which snapshots
// keep. What the disk is a linked clone of belongs to another VM and is left to it.

// Convert gives all links another form, one after the other, the base first, while
// requests go on (rules R2, R3). See [Disk.Convert] for what one link goes through.
//
// It is one task: after an error, a crash or the end of ctx, Convert with the same
// target goes on, and links that have arrived are passed over. Until then the old
// KEK and the new one together open the disk. Links made meanwhile are born in the
// target's form. A target without an Epoch is one more than the lowest link's.
func (c *Chain) Convert(ctx context.Context, t Target, report func(Progress)) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	c.shape.Lock()
	err := c.accepts(&t)
	if err == nil {
		c.goal = &t
	}
	c.shape.Unlock()
	if err != nil {
		return err
	}
	defer func() {
		c.shape.Lock()
		c.goal = nil
		c.shape.Unlock()
	}()
	sum := &sumReport{c: c, report: report}
	return c.each(ctx, t.wants, func(d *Disk) error {
		to := t
		if t.Kind == Recrypting {
			to.Epoch = 0 // one more than the link's; below, until it has that of t
		}
		err := d.Convert(ctx, to, sum.of(d))
		for err == nil && t.wants(d) && t.Kind == Recrypting {
			err = d.Convert(ctx, to, sum.of(d))
		}
		return err
	})
}

// accepts completes a target, and refuses what cannot be made of the chain.
func (c *Chain) accepts(t *Target) error {
	if t.Kind < Encrypting || t.Kind > Recrypting {
		return fmt.Errorf("%s: cannot %s: there is no such conversion", c.top().path, t.Kind)
	}
	lowest := uint64(0)
	for _, d := range c.links {
		enc, encrypted := d.desc.Encryption()
		switch {
		case !c.own(d) && t.Kind == Encrypting && !encrypted:
			return fmt.Errorf("%s: cannot %s: it is a linked clone of %s, which is in clear: encrypt that first, or clone it in full", c.top().path, t.Kind, d.path)
		case !c.own(d):
		case t.Kind == Recrypting && !encrypted:
			return fmt.Errorf("%s: cannot %s: link %s is in clear; encrypt the disk instead", c.top().path, t.Kind, filepath.Base(d.path))
		case encrypted && (lowest == 0 || enc.Epoch < lowest):
			lowest = enc.Epoch
		}
	}
	if t.Epoch == 0 && t.Kind == Recrypting {
		t.Epoch = lowest + 1
	}
	return nil
}

// wants says whether a link is not yet what t makes of it.
func (t *Target) wants(d *Disk) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	enc, encrypted := d.desc.Encryption()
	switch {
	case d.kind != NotConverting:
		return true
	case t.Kind == Encrypting:
		return !encrypted
	case t.Kind == Decrypting:
		return encrypted
	}
	return encrypted && (enc.Epoch < t.Epoch || !slices.Contains(enc.KeySafe.KeyIDs(), t.Key))
}

// ConvertLink converts one link of the chain, by name or path.
func (c *Chain) ConvertLink(ctx context.Context, link string, t Target, report func(Progress)) error {
	return c.one(ctx, link, func(d *Disk) error { return d.Convert(ctx, t, report) })
}

// Resume goes on with every conversion of a link that was interrupted, in the
// direction that it had. It does not begin those of other links: Convert does.
func (c *Chain) Resume(ctx context.Context, report func(Progress)) error {
	return c.interrupted(ctx, report, (*Disk).Resume)
}

// Cancel undoes the conversion that was interrupted, of the link that is in the
// middle of it. Links that have arrived stay as they are: convert the disk back to
// what it was to undo those too.
func (c *Chain) Cancel(ctx context.Context, report func(Progress)) error {
	return c.interrupted(ctx, report, (*Disk).Cancel)
}

func (c *Chain) interrupted(ctx context.Context, report func(Progress), do func(*Disk, context.Context, func(Progress)) error) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	sum := &sumReport{c: c, report: report}
	converting := func(d *Disk) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.kind != NotConverting
	}
	return c.each(ctx, converting, func(d *Disk) error { return do(d, ctx, sum.of(d)) })
}

// ShallowRecrypt wraps the DEK of every encrypted link under the KEK to, and then no
// longer under any other (rules R1, R3). See [Disk.ShallowRecrypt]. It is one task as
// Convert is.
func (c *Chain) ShallowRecrypt(ctx context.Context, to keysafe.KeyID) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	found := false
	wants := func(d *Disk) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		enc, encrypted := d.desc.Encryption()
		found = found || encrypted
		ids := enc.KeySafe.KeyIDs()
		return encrypted && (len(ids) != 1 || ids[0] != to)
	}
	err := c.each(ctx, wants, func(d *Disk) error { return d.ShallowRecrypt(ctx, to) })
	if err == nil && !found {
		return fmt.Errorf("%s: cannot recrypt: it is in clear; encrypt it instead", c.Path())
	}
	return err
}

// each does something to every link that wants it: first those of the chain, the
// base first, also those that come meanwhile; then those of other branches.
func (c *Chain) each(ctx context.Context, wants func(*Disk) bool, do func(*Disk) error) error {
	for {
		d, err := c.holdNext(wants)
		if err != nil {
			return err
		}
		if d == nil {
			break
		}
		if err := errors.Join(do(d), c.letGo()); err != nil {
			return err
		}
		if wants(d) {
			return fmt.Errorf("%s: it is not what it was to become", d.path)
		}
	}
	paths, err := c.branches()
	if err != nil {
		return err
	}
	for _, path := range paths {
		o := c.linkOptions()
		o.ReadOnly, o.parent = false, false
		d, err := Open(ctx, path, o)
		if err != nil {
			return fmt.Errorf("another branch of %s: %w", c.Path(), err)
		}
		if wants(d) {
			c.keepPace(d)
			err = do(d)
			c.keepPace(nil)
		}
		if err == nil {
			err = d.sync()
		}
		if err = errors.Join(err, d.Close()); err != nil {
			return err
		}
	}
	return nil
}

// holdNext makes the first link that wants it exclusive.
func (c *Chain) holdNext(wants func(*Disk) bool) (*Disk, error) {
	c.shape.Lock()
	defer c.shape.Unlock()
	for _, d := range c.links {
		if c.own(d) && wants(d) {
			return d, c.hold(d)
		}
	}
	return nil, nil
}

// hold makes links exclusive for as long as an operation runs. The caller holds
// shape.
func (c *Chain) hold(ds ...*Disk) error {
	for _, d := range ds {
		if err := d.promote(); err != nil {
			return errors.Join(err, c.release())
		}
		c.held = append(c.held, d)
	}
	return nil
}

// release lets held links be shared again, but for the top. The caller holds shape.
func (c *Chain) release() error {
	var err error
	for _, d := range c.held {
		if slices.Contains(c.links, d) && d != c.top() && !d.opts.ReadOnly {
			err = errors.Join(err, d.demote())
		}
	}
	c.held = nil
	return err
}

func (c *Chain) letGo() error {
	c.shape.Lock()
	defer c.shape.Unlock()
	return c.release()
}

// one does something to one link.
func (c *Chain) one(ctx context.Context, link string, do func(*Disk) error) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	c.shape.Lock()
	d, err := c.find(link)
	if err == nil && !c.own(d) {
		err = &Error{Kind: ErrParent, File: d.path, Why: "it is another VM's, of which this one is a linked clone", Fix: "do it there"}
	}
	if err == nil {
		err = c.hold(d)
	}
	c.shape.Unlock()
	if err != nil {
		return err
	}
	return errors.Join(do(d), c.letGo())
}

// branches are the descriptors of the disk's other links in its folder.
func (c *Chain) branches() ([]string, error) {
	c.shape.Lock()
	defer c.shape.Unlock()
	dir, id := c.top().dir(), c.top().desc.UUID()
	names, err := c.opts.fs.List(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for other branches of %s: %w", c.top().path, err)
	}
	slices.Sort(names)
	var all []string
	for _, n := range names {
		path := filepath.Join(dir, n)
		if filepath.Ext(n) != ".vmdk" || vmdk.IsExtentName(n) || slices.ContainsFunc(c.links, func(d *Disk) bool { return d.path == path }) {
			continue
		}
		_, desc, err := loadDescriptor(c.opts.fs, path)
		if err != nil {
			if err := unreadable(c.opts.fs, path, err); err != nil {
				return nil, err
			}
			continue
		}
		if id != uuid.Nil && desc.UUID() == id && desc.IsDelta() { // a base is in the chain; another one is a copy
			all = append(all, path)
		}
	}
	return all, nil
}

// unreadable says that a descriptor that cannot be read is perhaps a branch's; nil if
// it has no delta.
func unreadable(fsys fsys, path string, err error) error {
	if _, serr := fsys.Stat(vmdk.DeltaName(path)); serr != nil {
		return nil
	}
	return &Error{Kind: ErrParent, File: path, Why: "it may be a link of the same disk, of another branch, and cannot be read", Cause: err, Fix: `repair it ("mortise crypto-util disk repair") or restore it from a backup`}
}

// A sumReport adds the progress of links up.
type sumReport struct {
	c      *Chain
	report func(Progress)
	done   int64
}

func (s *sumReport) of(*Disk) func(Progress) {
	if s.report == nil {
		return nil
	}
	s.c.gate.RLock()
	links := int64(len(s.c.links))
	s.c.gate.RUnlock()
	before := s.done
	return func(p Progress) {
		s.done = before + p.Done
		p.Done, p.Total = s.done, max(p.Total*links, s.done+p.Total-p.Done)
		s.report(p)
	}
}

// SetPace sets the pace of conversions of all links. See [Disk.SetPace].
func (c *Chain) SetPace(p Pace) {
	c.gate.RLock()
	defer c.gate.RUnlock()
	c.paced.Lock()
	defer c.paced.Unlock()
	c.paced.Pace = p
	for _, d := range c.links {
		d.SetPace(p)
	}
	if c.paced.branch != nil {
		c.paced.branch.SetPace(p)
	}
}

// keepPace gives a link of another branch the chain's pace while it is worked on;
// nil: none is.
func (c *Chain) keepPace(d *Disk) {
	c.paced.Lock()
	defer c.paced.Unlock()
	if c.paced.branch = d; d != nil {
		d.SetPace(c.paced.Pace)
	}
}

// Links describes the links of the chain, the base first.
func (c *Chain) Links() []Info {
	c.gate.RLock()
	defer c.gate.RUnlock()
	var all []Info
	for _, d := range c.links {
		all = append(all, d.Info())
	}
	return all
}

// Info describes the disk as a whole: see [DescribeChain].
func (c *Chain) Info() Info { return overall(c.Links()) }

// DescribeChain describes the disk whose top link's descriptor is at path, without
// its keys and locks as [Describe] does, and its links, the base first. In other
// folders it looks only where bases are.
//
// Of the whole, Encrypted says that a link is, Keys are those of all of them, and
// Epoch is the lowest. Where some of the disk's own links are encrypted and others
// are not, a conversion of the disk was begun and is not done, and Conversion is
// Encrypting.
func DescribeChain(path string, bases []Base) (Info, []Info, error) {
	var all []Info
	for len(all) < maxLinks {
		i, err := Describe(path)
		if err != nil {
			return Info{}, nil, err
		}
		all = append(all, i)
		if i.Parent == "" {
			slices.Reverse(all)
			return overall(all), all, nil
		}
		d := &Disk{path: path, opts: Options{Bases: bases}}
		if d.text, d.desc, err = loadDescriptor(osFS{}, path); err != nil {
			return Info{}, nil, err
		}
		if path, _, err = d.parent(); err != nil {
			return Info{}, nil, err
		}
	}
	return Info{}, nil, &Error{Kind: ErrParent, File: path, Why: fmt.Sprintf("the chain is a circle, or longer than %d links", maxLinks), Fix: "restore the descriptors from a backup; " + untouched}
}

// DescribeFolder describes every link in a folder, of whatever disk and branch, in the
// order of their names. When a snapshot link's descriptor cannot be read, it returns
// the others with an error that names it.
func DescribeFolder(dir string) ([]Info, error) { return describeFolder(osFS{}, dir) }

func describeFolder(fsys fsys, dir string) ([]Info, error) {
	names, err := fsys.List(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for disks: %w", err)
	}
	slices.Sort(names)
	var all []Info
	var bad []error
	for _, n := range names {
		if filepath.Ext(n) != ".vmdk" || vmdk.IsExtentName(n) {
			continue
		}
		path := filepath.Join(dir, n)
		if i, err := describeIn(fsys, path); err == nil {
			all = append(all, i)
		} else if err := unreadable(fsys, path, err); err != nil {
			bad = append(bad, err)
		}
	}
	return all, errors.Join(bad...)
}

// overall describes a chain.
func overall(links []Info) Info {
	i := links[len(links)-1]
	i.Allocated, i.Keys, i.TargetKeys = 0, nil, nil
	mixed := false
	for _, l := range links {
		i.Allocated += l.Allocated
		for _, id := range l.Keys {
			if !slices.Contains(i.Keys, id) {
				i.Keys = append(i.Keys, id)
			}
		}
		for _, id := range l.TargetKeys {
			if !slices.Contains(i.TargetKeys, id) {
				i.TargetKeys = append(i.TargetKeys, id)
			}
		}
		if filepath.Dir(l.Path) != filepath.Dir(i.Path) {
			continue
		}
		i.Thick = i.Thick || l.Thick
		mixed = mixed || l.Encrypted != i.Encrypted
		if l.Encrypted {
			if !i.Encrypted || l.Epoch < i.Epoch {
				i.Cipher, i.Epoch = l.Cipher, l.Epoch
			}
			i.Encrypted = true
		}
		if l.Conversion != NotConverting {
			i.Conversion, i.Back, i.Boundary = l.Conversion, l.Back, l.Boundary
		}
	}
	if mixed && i.Conversion == NotConverting {
		i.Conversion = Encrypting
	}
	return i
}
