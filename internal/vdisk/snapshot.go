package vdisk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// Why a link is sealed, as its descriptor says it. Two links in its own folder can
// be counted again; who knows of linked clones in other folders is the inventory.
const (
	sealedForLinks  = "more than one snapshot link stands on it"
	sealedForClones = "linked clones stand on it"
)

// A LinkSpec says how a new link is made.
type LinkSpec struct {
	// Path of its descriptor, in the folder of the disk; "": the next free name,
	// vm-000001.vmdk and so on.
	Path string

	// Commit records durably, in the VMX, that the link of this path is the disk's
	// top; nil: it needs no record. Of a live disk, requests wait meanwhile. After an
	// error everything is as before: then it must not have recorded anything, or must
	// say that it does not know (ErrUndecided).
	Commit func(path string) error
}

// Snapshot freezes the disk as it is: a new link is put on the top, and takes what
// is written from now on. It returns the path of the new link's descriptor.
//
// Requests go on, and wait only while the last of what was written is made durable
// and Commit runs. A crash leaves the disk without the new link before Commit, and
// with it after. The new link has a DEK of its own, under the KEK of the top; while
// a conversion is under way, in the form and under the KEK that this leads to.
func (c *Chain) Snapshot(ctx context.Context, s LinkSpec) (path string, err error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if c.opts.ReadOnly {
		return "", &Error{Kind: ErrReadOnly, File: c.Path(), Fix: "open it for writing"}
	}
	if err := c.thawed(); err != nil {
		return "", err
	}
	c.shape.Lock()
	defer c.shape.Unlock()
	parent := c.top()
	if dead := parent.ext.dead.Load(); dead != nil {
		return "", dead
	}
	if len(c.links) == maxLinks {
		return "", fmt.Errorf("%s: it has %d links, the most there can be: consolidate some", parent.path, maxLinks)
	}
	key, epoch := parent.birth(c.goal)
	path, err = parent.makeLink(ctx, s.Path, key, epoch, 0)
	if err != nil {
		return "", err
	}
	d, err := openLink(ctx, path, c.linkOptions())
	if err != nil {
		return "", errors.Join(err, deleteIn(ctx, c.opts.fs, path))
	}
	parent.at("snapshot.made")
	err = c.Flush(ctx) // most of it before requests have to wait
	recorded := false
	if err == nil {
		c.change(func() { recorded, err = c.putOn(d, s.Commit) })
	}
	if err != nil && recorded { // somebody knows the link by its name
		return "", errors.Join(err, d.Close())
	}
	if err != nil {
		return "", errors.Join(err, d.Close(), deleteIn(context.WithoutCancel(ctx), c.opts.fs, path))
	}
	c.opts.Log.Info("snapshot link made", "disk", parent.path, "link", path, "encrypted", key != keysafe.KeyID{})
	return path, nil
}

// linkOptions are for a link that this process has made, which is what it should
// be whatever was expected when the disk was opened.
func (c *Chain) linkOptions() Options {
	o := c.opts
	o.ReadOnly, o.parent, o.Expect = true, true, Expect{}
	return o
}

// putOn makes d the top, and tells whether that is recorded, or may be. The caller
// holds gate exclusively.
func (c *Chain) putOn(d *Disk, commit func(string) error) (recorded bool, err error) {
	if err := c.flush(); err != nil {
		return false, err
	}
	parent := c.top()
	parent.at("snapshot.quiet")
	if commit != nil {
		err := commit(d.path)
		if errors.Is(err, ErrUndecided) {
			return true, parent.ext.fail(err)
		}
		if err != nil {
			return false, fmt.Errorf("recording the snapshot link %s: %w", d.path, err)
		}
		recorded = true
	}
	parent.at("snapshot.committed")
	if err := d.promote(); err != nil {
		// The record names a link that cannot be written: going on with the parent
		// would lose what is written from now on.
		return recorded, parent.ext.fail(err)
	}
	if c.index == nil {
		c.index = newIndex(d.size)
	}
	c.under = nil
	c.links = append(slices.Clone(c.links), d)
	c.paced.Lock()
	d.SetPace(c.paced.Pace)
	c.paced.Unlock()
	d.slot = uint8(slices.Index(c.slots[:], nil))
	c.slots[d.slot] = d
	if !slices.Contains(c.held, parent) {
		if err := parent.demote(); err != nil { // all of it is durable: only the lock stays
			c.opts.Log.Warn("sharing the lock of a snapshot's parent", "link", parent.path, "error", err)
		}
	}
	parent.at("snapshot.switched")
	return recorded, nil
}

// birth says under which KEK a link is born that stands on d, none if in clear, and
// in which epoch: that of d, or that which a conversion under way leads to.
func (d *Disk) birth(goal *Target) (keysafe.KeyID, uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	enc, encrypted := d.desc.Encryption()
	last := func(s keysafe.Safe) keysafe.KeyID { ids := s.KeyIDs(); return ids[len(ids)-1] }
	back := d.state != nil && d.state.cur.Load().back
	switch {
	case goal != nil && goal.Kind == Decrypting:
		return keysafe.KeyID{}, 0
	case goal != nil && d.kind == NotConverting && encrypted && slices.Contains(enc.KeySafe.KeyIDs(), goal.Key):
		return goal.Key, enc.Epoch // it has arrived
	case goal != nil:
		return goal.Key, max(goal.Epoch, enc.Epoch+1)
	case !encrypted, d.kind == Encrypting && back, d.kind == Decrypting && !back:
		return keysafe.KeyID{}, 0
	case d.kind == Recrypting && !back && !enc.Target.Empty():
		return last(enc.Target), enc.Epoch + 1
	}
	return last(enc.KeySafe), enc.Epoch
}

// makeLink makes a link that stands on d. One that counts no opening is removed if
// its parent is opened for writing: Snapshot did not come to its end.
func (d *Disk) makeLink(ctx context.Context, path string, key keysafe.KeyID, epoch, opens uint64) (string, error) {
	if path == "" {
		var err error
		if path, err = nextLink(d.opts.fs, d.path); err != nil {
			return "", err
		}
	} else if filepath.Dir(path) != d.dir() {
		return "", fmt.Errorf("%s: a snapshot link stands in the folder of its disk, %s", path, d.dir())
	}
	d.mu.Lock()
	desc := d.desc
	d.mu.Unlock()
	adapter, _ := desc.Get("ddb.adapterType")
	id := desc.UUID()
	if id == uuid.Nil {
		return "", &Error{Kind: ErrUnsupported, File: d.path, Why: "it has no ddb.uuid, by which the links of a disk know each other", Fix: `import it with "mortise vm import"`}
	}
	return path, Create(ctx, path, Spec{
		Size: d.size, UUID: id, Adapter: adapter, VM: d.opts.VM, Key: key, KEKs: d.opts.KEKs, Epoch: epoch, Random: d.opts.Random,
		parent: filepath.Base(d.path), parentCID: desc.CID(), opens: opens, fs: d.opts.fs, at: d.opts.at,
	})
}

// NextLink is a free name for a link of the disk to which the descriptor at path
// belongs: the one that it is given when a LinkSpec has no Path.
func NextLink(path string) (string, error) { return nextLink(osFS{}, path) }

// nextLink is the next free name of a link of the disk to which path belongs.
func nextLink(fsys fsys, path string) (string, error) {
	names, err := fsys.List(filepath.Dir(path))
	if err != nil {
		return "", fmt.Errorf("looking for a name of a snapshot link: %w", err)
	}
	base := path
	if of, _, ok := vmdk.ParseLinkName(path); ok {
		base = of
	}
	last := 0
	for _, n := range names {
		n = strings.TrimSuffix(n, stateSuffix)
		if of, i, ok := vmdk.ParseLinkName(strings.Replace(n, "-delta.vmdk", ".vmdk", 1)); ok && of == filepath.Base(base) {
			last = max(last, i)
		}
	}
	if last == 999999 {
		return "", fmt.Errorf("%s: the numbers of its links are used up: name the new link", base)
	}
	return vmdk.LinkName(base, last+1), nil
}

// Revert makes a new link on the link whose descriptor is at path, which has the
// disk as a snapshot froze it, and returns the new one's path: who opens that
// instead of the present top has gone back. The disk must be closed. What stood on
// the link stays; without another snapshot's need, delete it.
//
// The link is sealed if something stands on it already: from then on it has two
// children, and is not changed before that has ended.
func Revert(ctx context.Context, path string, o Options, s LinkSpec) (string, error) {
	c, d, err := openToStandOn(ctx, path, o)
	if err != nil {
		return "", err
	}
	defer c.Close()
	kids, err := children(d.opts.fs, path, false)
	if err != nil {
		return "", err
	}
	if len(kids) > 0 && d.desc.Sealed() == "" {
		if err := d.seal(sealedForLinks); err != nil {
			return "", err
		}
	}
	key, epoch := d.birth(nil)
	link, err := d.makeLink(ctx, s.Path, key, epoch, 1)
	if err != nil {
		return "", err
	}
	if s.Commit != nil {
		if err := s.Commit(link); err != nil {
			return "", errors.Join(fmt.Errorf("recording the snapshot link %s: %w", link, err), deleteIn(ctx, d.opts.fs, link))
		}
	}
	d.opts.Log.Info("disk reverted", "to", path, "link", link)
	return link, nil
}

// A CloneSpec says what a linked clone is like.
type CloneSpec struct {
	VM   uuid.UUID     // that it belongs to
	UUID uuid.UUID     // of the new disk; zero: a new one
	Key  keysafe.KeyID // the KEK that wraps its DEK, in Options.KEKs; zero: that of the link it stands on (rule E12)
}

// LinkedClone makes a disk at path that stands on the link at base: another VM's, in
// a folder beside. o are those of the base's VM. First the base is sealed, for ever:
// it is neither written nor committed into nor grown as long as it exists, because
// nobody here knows who else stands on it. It is opened with Options.Bases.
func LinkedClone(ctx context.Context, base, path string, o Options, s CloneSpec) error {
	c, d, err := openToStandOn(ctx, base, o)
	if err != nil {
		return err
	}
	defer c.Close()
	hint := filepath.Base(base)
	if dir := filepath.Dir(path); dir != d.dir() {
		if filepath.Dir(dir) != filepath.Dir(d.dir()) {
			return fmt.Errorf("%s: a linked clone of %s stands in a folder beside %s, on the same datastore", path, base, d.dir())
		}
		hint = "../" + filepath.Base(d.dir()) + "/" + hint
	}
	if err := d.seal(sealedForClones); err != nil {
		return err
	}
	key, epoch := d.birth(nil)
	if s.Key != (keysafe.KeyID{}) {
		key, epoch = s.Key, 1
	}
	adapter, _ := d.desc.Get("ddb.adapterType")
	err = Create(ctx, path, Spec{
		Size: d.size, UUID: s.UUID, Adapter: adapter, VM: s.VM, Key: key, KEKs: o.KEKs, Epoch: epoch, Random: o.Random,
		parent: hint, parentCID: d.desc.CID(), opens: 1, fs: d.opts.fs, at: d.opts.at,
	})
	if err == nil {
		d.opts.Log.Info("linked clone made", "base", base, "clone", path)
	}
	return err
}

// openToStandOn opens a link to make another one that stands on it.
func openToStandOn(ctx context.Context, path string, o Options) (*Chain, *Disk, error) {
	o.ReadOnly, o.parent = true, true
	c, err := OpenChain(ctx, path, o)
	if err != nil {
		return nil, nil, err
	}
	d := c.top()
	if name := d.desc.Receiving(); name != "" {
		// One that is gone, or has nothing left, has been merged.
		kids, err := children(d.opts.fs, path, false)
		if err != nil {
			return nil, nil, errors.Join(err, c.Close())
		}
		for _, k := range kids {
			if filepath.Base(k.Name()) == name && !d.empty(k, false) {
				return nil, nil, errors.Join(&Error{Kind: ErrConverting, File: path, Why: fmt.Sprintf("%s is being merged into it: it no longer has what the snapshot froze", name), Fix: "finish the consolidation"}, c.Close())
			}
		}
	}
	return c, d, nil
}

// Seal marks a link of an open disk that other disks are to stand on, as
// [LinkedClone] does to one that nobody has open. The top cannot be sealed.
func (c *Chain) Seal(ctx context.Context, link string) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.op.Unlock()
	c.shape.Lock()
	defer c.shape.Unlock()
	d, err := c.find(link)
	if err != nil {
		return err
	}
	switch {
	case d == c.top():
		return &Error{Kind: ErrInUse, File: d.path, Why: "it takes what is written to the disk", Fix: "make a snapshot first"}
	case d.desc.Receiving() != "":
		return &Error{Kind: ErrConverting, File: d.path, Why: fmt.Sprintf("%s is being merged into it", d.desc.Receiving()), Fix: "finish the consolidation"}
	}
	return d.seal(sealedForClones)
}

// seal makes durable why a link is not changed any more.
func (d *Disk) seal(why string) error {
	if now := d.desc.Sealed(); now == why || now == sealedForClones {
		return nil
	}
	return d.whilePromoted(func() error {
		return d.edit(func(desc *vmdk.Descriptor) { desc.SetSealed(why) })
	})
}

// whilePromoted does something to a link that is otherwise shared.
func (d *Disk) whilePromoted(do func() error) error {
	if !d.opts.ReadOnly {
		return do()
	}
	if err := d.promote(); err != nil {
		return err
	}
	return errors.Join(do(), d.demote())
}

// edit changes the descriptor.
func (d *Disk) edit(change func(*vmdk.Descriptor)) error {
	desc, err := vmdk.Parse(d.path, d.text)
	if err != nil {
		return err
	}
	change(desc)
	if enc, encrypted := desc.Encryption(); encrypted {
		enc.Generation++
		k := d.next
		if k == nil {
			k = d.key
		}
		if err := desc.Seal(enc, k.descriptor); err != nil {
			return err
		}
	}
	return d.save(desc)
}
