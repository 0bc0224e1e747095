package vdisk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"

	"mortise/internal/vmdk"
)

// A Base is the folder of another VM on whose sealed links a disk may stand.
type Base struct {
	Folder string    // a path
	VM     uuid.UUID // that the links there belong to: their keys are bound to it
}

// A Chain is an open virtual disk: a base and the snapshot links that stand on it,
// each a descriptor and an extent with a key of its own, or none. Requests see the
// newest link that has a unit; what they write goes to the top link, the only one
// that is open for writing.
//
// All methods may be called concurrently. Offsets and lengths are bytes, whole
// sectors inside the disk.
type Chain struct {
	opts Options
	size atomic.Int64

	// op is held for the whole of a conversion, a recrypt, a consolidation, a growth:
	// a chain has one at a time. shape is held, inside op, while links come and go;
	// so a snapshot can be made while one of those runs.
	op    sync.Mutex
	shape sync.Mutex
	goal  *Target // of the conversion under way: new links are born in its form; shape protects it
	held  []*Disk // links that an operation works on, and so keeps exclusive; shape protects it

	// Every request holds gate shared while it runs. Who changes what follows holds
	// it exclusively: requests that saw the old links have ended by then.
	gate   sync.RWMutex
	links  []*Disk       // the base first, the top last
	slots  [256]*Disk    // by number in the index; the base's is 0
	index  *index        // nil while the base is all there is
	under  *Disk         // a commit of the top is under way: its parent gets the units that the top lacks
	frozen span          // changes of it wait for moved
	moved  chan struct{} // closed when frozen has changed

	paced struct {
		sync.Mutex
		Pace
		branch *Disk // of another branch, which a conversion of all links has come to
	}

	settled atomic.Bool // every extent was synced once: what a killed predecessor wrote is durable
}

// OpenChain opens the disk whose top link's descriptor is at path. It opens the link
// and those that it stands on as [Open] does, the top one for writing unless
// o.ReadOnly, the others shared, and checks that they fit together.
//
// A link that other links stand on is not opened for writing (ErrChildren): that
// would change what they show; unless o.Frozen, to convert it. What only a crash while a snapshot was being made has
// left is removed.
func OpenChain(ctx context.Context, path string, o Options) (_ *Chain, err error) {
	o = o.withDefaults()
	o.link = true
	c := &Chain{opts: o, moved: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.closeLinks())
		}
	}()
	top, err := inspect(ctx, path, o)
	if err != nil {
		return nil, err
	}
	c.links = []*Disk{top}
	c.size.Store(top.size)
	for d := top; d.desc.IsDelta(); {
		if d, err = c.openParent(ctx, d); err != nil {
			return nil, err
		}
		c.links = append(c.links, d)
	}
	slices.Reverse(c.links)
	if !o.ReadOnly && !o.Frozen {
		if err := top.leaf(); err != nil {
			return nil, err
		}
	}
	if err := top.ready(); err != nil {
		return nil, err
	}
	if err := c.number(); err != nil {
		return nil, err
	}
	if !o.ReadOnly && !o.Frozen {
		if err := c.forgetMerged(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// openParent opens the link that d stands on, and checks that it does.
func (c *Chain) openParent(ctx context.Context, d *Disk) (*Disk, error) {
	path, o, err := d.parent()
	if err != nil {
		return nil, err
	}
	if len(c.links) == maxLinks || slices.ContainsFunc(c.links, func(l *Disk) bool { return l.path == path }) {
		return nil, &Error{Kind: ErrParent, File: d.path, Why: fmt.Sprintf("the chain is a circle, or longer than %d links", maxLinks), Fix: "restore the descriptors from a backup; " + untouched}
	}
	p, err := openLink(ctx, path, o)
	if err != nil {
		return nil, fmt.Errorf("the parent of %s: %w", filepath.Base(d.path), err)
	}
	why := ""
	switch {
	case p.desc.CID() != d.desc.ParentCID():
		why = fmt.Sprintf("its parent %s has content id %08x, and it was made when that was %08x: the parent was changed since, or is another disk's", filepath.Base(path), p.desc.CID(), d.desc.ParentCID())
	case p.size != d.size:
		why = fmt.Sprintf("it is %d bytes long, and its parent %s %d", d.size, filepath.Base(path), p.size)
	}
	if why != "" {
		return nil, errors.Join(&Error{Kind: ErrParent, File: d.path, Why: why, Fix: "restore both of the same time from a backup; " + untouched}, p.Close())
	}
	return p, nil
}

// parent says where the link is that d stands on, and how it is to be opened.
func (d *Disk) parent() (path string, o Options, err error) {
	o = d.opts
	o.ReadOnly, o.parent = true, true
	hint := d.desc.Parent()
	path = filepath.Join(d.dir(), hint)
	if !strings.Contains(hint, "/") {
		if o.UUID == uuid.Nil {
			o.UUID = d.desc.UUID()
		}
		return path, o, nil
	}
	for _, b := range d.opts.Bases {
		if filepath.Clean(b.Folder) == filepath.Dir(path) {
			// It has epochs, and a UUID, of its own.
			o.VM, o.UUID, o.Expect.Epoch = b.VM, uuid.Nil, 0
			return path, o, nil
		}
	}
	return "", o, &Error{Kind: ErrParent, File: d.path, Why: fmt.Sprintf("it stands on %s, which is not in its folder, nor in one that its VM is known to be a linked clone of", hint), Fix: "register the VM as a linked clone of that one, or restore the descriptor from a backup"}
}

// openLink opens a link that others stand on: shared, and without changing
// anything, unless a process that was killed has left something to settle.
func openLink(ctx context.Context, path string, o Options) (*Disk, error) {
	write := o
	write.ReadOnly = false
	d, err := Open(ctx, path, o)
	if err == nil {
		killed, lerr := d.wasKilled()
		if lerr != nil {
			return nil, errors.Join(lerr, d.Close())
		}
		if !killed {
			return d, nil
		}
		if err := d.Close(); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, ErrConverting) {
		return nil, err
	}
	if d, err = Open(ctx, path, write); err != nil {
		return nil, err
	}
	if err := d.demote(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// number gives every link its number and builds the index from their bitmaps.
func (c *Chain) number() error {
	c.slots = [256]*Disk{}
	c.index = nil
	for i, d := range c.links {
		d.slot = uint8(i)
		c.slots[i] = d
		if i == 0 {
			continue
		}
		if c.index == nil {
			c.index = newIndex(d.size)
		}
		err := d.eachRun(func(from, to int64) { c.index.set(from, to, d.slot) })
		if err != nil {
			return fmt.Errorf("reading the bitmap of %s: %w", d.path, err)
		}
	}
	return nil
}

// eachRun calls found for the runs of units that a snapshot link has.
func (d *Disk) eachRun(found func(from, to int64)) error {
	units := d.end() / UnitSize
	if err := load(d.state.f, bitmapOffset, units, found); err != nil || d.bits != nil {
		return err
	}
	live, err := d.openLive() // only reading: what a killed process has left is used and left
	if err != nil || live == nil {
		return err
	}
	defer live.Close()
	return load(live, liveHeader, units, found)
}

func (c *Chain) top() *Disk { return c.links[len(c.links)-1] }

// child returns the link that stands on the i-th, nil if that is the top.
func (c *Chain) child(d *Disk) *Disk {
	i := slices.Index(c.links, d)
	if i < 0 || i+1 == len(c.links) {
		return nil
	}
	return c.links[i+1]
}

// find returns the link with a descriptor of this name, or path.
func (c *Chain) find(name string) (*Disk, error) {
	for _, d := range c.links {
		if d.path == name || filepath.Base(d.path) == name {
			return d, nil
		}
	}
	return nil, &Error{Kind: ErrMissing, File: name, Why: fmt.Sprintf("it is no link of %s", c.top().path), Fix: "name one that Links lists"}
}

// own says whether a link is the VM's, and not one that it is a linked clone of.
func (c *Chain) own(d *Disk) bool { return d.dir() == c.top().dir() }

// begin starts a structural operation, of which a chain has one at a time, new
// snapshots excepted.
func (c *Chain) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.opts.ReadOnly {
		return &Error{Kind: ErrReadOnly, File: c.Path(), Fix: "open it for writing"}
	}
	if !c.op.TryLock() {
		return &Error{Kind: ErrConverting, File: c.Path(), Why: "another conversion, recrypt or consolidation of this disk is running", Fix: "wait until it ends"}
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	for _, d := range c.links {
		if dead := d.ext.dead.Load(); dead != nil {
			c.op.Unlock()
			return dead
		}
	}
	return nil
}

// Path is the top link's descriptor.
func (c *Chain) Path() string {
	c.gate.RLock()
	defer c.gate.RUnlock()
	return c.top().path
}

// Close ends all requests, wipes the keys and releases the locks. It does not
// flush. See [Disk.Close].
func (c *Chain) Close() error {
	c.op.Lock()
	defer c.op.Unlock()
	c.shape.Lock()
	defer c.shape.Unlock()
	for _, d := range c.links {
		d.ext.dead.CompareAndSwap(nil, &Error{Kind: ErrClosed, File: d.path})
	}
	c.gate.Lock() // requests that run have ended
	defer c.gate.Unlock()
	return c.closeLinks()
}

func (c *Chain) closeLinks() error {
	var err error
	for _, d := range c.links {
		err = errors.Join(err, d.Close())
	}
	return err
}

// Failed returns the failure of storage that ended the disk. See [Disk.Failed].
func (c *Chain) Failed() error {
	c.gate.RLock()
	defer c.gate.RUnlock()
	for _, d := range c.links {
		if err := d.Failed(); err != nil {
			return err
		}
	}
	return nil
}

// change changes what gate protects and wakes the requests that wait.
func (c *Chain) change(f func()) {
	c.gate.Lock()
	defer c.gate.Unlock()
	f()
	close(c.moved)
	c.moved = make(chan struct{})
}

// children are the descriptors in a link's folder that stand on it. If surely, one
// that cannot be read, and might, is an error.
func children(fsys fsys, path string, surely bool) (all []*vmdk.Descriptor, err error) {
	names, err := fsys.List(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("looking for links that stand on %s: %w", path, err)
	}
	slices.Sort(names)
	for _, n := range names {
		if filepath.Ext(n) != ".vmdk" || vmdk.IsExtentName(n) || n == filepath.Base(path) {
			continue
		}
		child := filepath.Join(filepath.Dir(path), n)
		_, desc, err := loadDescriptor(fsys, child)
		if err == nil && desc.IsDelta() && desc.Parent() == filepath.Base(path) {
			all = append(all, desc)
		}
		if err != nil && surely {
			if _, serr := fsys.Stat(vmdk.DeltaName(child)); serr == nil {
				return nil, &Error{Kind: ErrChildren, File: path, Why: fmt.Sprintf("snapshot link %s may stand on it, and cannot be read", n), Fix: "repair that one first", Cause: err}
			}
		}
	}
	return all, nil
}

// leaf refuses a link that others stand on, for it is about to be written.
func (d *Disk) leaf() error {
	if why := d.desc.Sealed(); why != "" {
		return &Error{Kind: ErrSealed, File: d.path, Why: why, Fix: "make a linked clone or a snapshot link of it, and use that"}
	}
	kids, err := children(d.opts.fs, d.path, false)
	if err != nil {
		return err
	}
	for _, k := range kids {
		if filepath.Base(k.Name()) == d.desc.Receiving() && d.empty(k, false) {
			continue // it was merged into this one: forgetMerged
		}
		if d.empty(k, true) {
			if err := deleteIn(context.Background(), d.opts.fs, k.Name()); err != nil {
				return err
			}
			continue
		}
		return &Error{Kind: ErrChildren, File: d.path, Why: fmt.Sprintf("snapshot link %s stands on it, and would show something else once this one was changed", filepath.Base(k.Name())), Fix: "open that link, or delete the snapshot"}
	}
	return nil
}

// empty says whether a link that stands on d has nothing; if fresh, also whether it
// was never opened: what a crash in the middle of Snapshot leaves.
func (d *Disk) empty(desc *vmdk.Descriptor, fresh bool) bool {
	name, err := extentName(desc.Name(), desc)
	if err != nil {
		return false
	}
	sf, err := openState(d.opts.fs, nil, name+stateSuffix, false)
	if err != nil {
		return false
	}
	defer sf.f.Close()
	empty := !fresh || sf.cur.Load().opens == 0
	err = load(sf.f, bitmapOffset, d.end()/UnitSize, func(int64, int64) { empty = false })
	return err == nil && empty
}

// forgetMerged finishes consolidations that came to their end but for the last
// marks: a link that says it receives the data of one that no longer stands on it.
func (c *Chain) forgetMerged() error {
	for _, d := range c.links {
		name := d.desc.Receiving()
		child := c.child(d)
		if name == "" || !c.own(d) || child != nil && filepath.Base(child.path) == name {
			continue
		}
		err := d.whilePromoted(func() error { return d.forget(name) })
		if err != nil && !errors.Is(err, ErrInUse) {
			return err
		}
	}
	return nil
}

// forget removes the link that was merged into d, down or up, and the mark that said
// so.
func (d *Disk) forget(name string) error {
	path := filepath.Join(d.dir(), name)
	if _, desc, err := loadDescriptor(d.opts.fs, path); err == nil && desc.IsDelta() && (desc.Parent() == filepath.Base(d.path) || desc.Parent() == d.desc.Parent()) {
		err := deleteIn(context.Background(), d.opts.fs, path)
		if err != nil && !errors.Is(err, ErrChildren) && !errors.Is(err, ErrSealed) && !errors.Is(err, ErrInUse) { // others need it
			return err
		}
	}
	d.at("merge.deleted")
	return d.edit(func(desc *vmdk.Descriptor) { desc.SetReceiving("") })
}
