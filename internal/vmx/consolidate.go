package vmx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
	"mortise/internal/vmsd"
	"mortise/internal/vmxfile"
)

// consolidate works off the links that no snapshot needs: it deletes one that nothing
// stands on, and, if merge, merges one that a single link stands on with that. One
// that two branches share stays until one of them has gone. Interrupted, it goes on
// where it was when it is called again.
func (v *vm) consolidate(ctx context.Context, t *vmsd.Tree, disks map[uuid.UUID]*vdisk.Chain, merge bool, tell report) error {
	for again := true; again; {
		again = false
		for _, file := range slices.Clone(t.Released) {
			if !slices.Contains(t.Released, file) {
				continue
			}
			done, err := v.workOff(ctx, t, file, disks, merge, tell)
			if err != nil {
				return faultOf(err)
			}
			again = again || done
		}
	}
	return nil
}

// workOff deletes or merges one released link, if that is possible now.
func (v *vm) workOff(ctx context.Context, t *vmsd.Tree, file string, disks map[uuid.UUID]*vdisk.Chain, merge bool, tell report) (done bool, err error) {
	dir := filepath.Dir(v.path)
	links, err := vdisk.DescribeFolder(dir)
	if err != nil {
		return false, err
	}
	path := filepath.Join(dir, file)
	var kids []vdisk.Info
	var id uuid.UUID
	for _, l := range links {
		if l.Parent == file {
			kids = append(kids, l)
		}
		if l.Path == path {
			id = l.UUID
		}
	}
	stays := func(why error) (bool, error) {
		v.log.Warn("a link that no snapshot needs stays", "link", path, "reason", why)
		return false, nil
	}
	switch {
	case len(kids) == 0:
		err := vdisk.Delete(ctx, path)
		if errors.Is(err, vdisk.ErrSealed) {
			return stays(err)
		}
		if err != nil && !errors.Is(err, vdisk.ErrMissing) {
			return false, err
		}
		v.at("consolidate.deleted")
		v.log.Info("a link that no snapshot needs is deleted", "link", path)
		t.Released = slices.DeleteFunc(t.Released, func(f string) bool { return f == file })
		return true, v.saveTree(t)
	case len(kids) > 1 || !merge:
		return false, nil
	case kids[0].UUID != id:
		return stays(fmt.Errorf("%s, another disk, stands on it", kids[0].Path))
	}
	t.Merge = vmsd.Merge{Link: filepath.Base(kids[0].Path), Parent: file}
	if err := v.saveTree(t); err != nil {
		return false, err
	}
	v.at("consolidate.begin")
	err = v.merge(ctx, kids[0], links, disks, func(done, total int64) {
		tell(fmt.Sprintf("merging %s", t.Merge.Link), vdisk.Progress{Done: done, Total: total})
	})
	if errors.Is(err, vdisk.ErrUndecided) {
		return false, err // who opens the VM next sees
	}
	serr := v.settleInto(t)
	v.at("consolidate.done")
	if errors.Is(err, vdisk.ErrSealed) && serr == nil {
		return stays(err)
	}
	return err == nil && serr == nil, errors.Join(err, serr)
}

// merge makes one link of link and its parent: in the chain of a disk, which a guest
// may have, or else in that of another branch.
func (v *vm) merge(ctx context.Context, link vdisk.Info, links []vdisk.Info, disks map[uuid.UUID]*vdisk.Chain, report func(done, total int64)) error {
	spec := vdisk.MergeSpec{Link: link.Path, Report: report, Commit: func(top string) error {
		return v.replaceDisk(filepath.Base(link.Path), filepath.Base(top))
	}}
	if c := disks[link.UUID]; c != nil && slices.ContainsFunc(c.Links(), func(l vdisk.Info) bool { return l.Path == link.Path }) {
		return c.Consolidate(ctx, spec)
	}
	all, err := v.disks()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(m member) bool { return m.id == link.UUID })
	if i < 0 {
		return foreignDisk(link.Path, link.UUID, "the VM")
	}
	top := link.Path
	for range links {
		i := slices.IndexFunc(links, func(l vdisk.Info) bool { return l.Parent == filepath.Base(top) && l.UUID == link.UUID })
		if i < 0 {
			break
		}
		top = links[i].Path
	}
	c, err := vdisk.OpenChain(ctx, top, v.diskOptions(all[i]))
	if err != nil {
		return err
	}
	err = c.Consolidate(ctx, spec)
	return errors.Join(err, c.Flush(context.WithoutCancel(ctx)), c.Close())
}

// replaceDisk makes another link a disk of the VM, if the first one is. It may have
// been done.
func (v *vm) replaceDisk(file, by string) error {
	err := v.edit(func(f *vmxfile.File, _ *keysafe.Bundle) error {
		slots, err := diskSlots(f)
		if err != nil {
			return err
		}
		for _, s := range slots {
			if s.file == file {
				return f.Set(s.controller+".fileName", by)
			}
		}
		return nil
	})
	return v.undecided(err, func(s slot) bool { return s.file == by })
}

// settleInto notes in t, durably, what the merge that it has noted has come to.
func (v *vm) settleInto(t *vmsd.Tree) error {
	top, err := v.tops()
	if err != nil {
		return err
	}
	if _, err := v.settleMerge(t, top); err != nil {
		return err
	}
	return v.saveTree(t)
}

// settleMerge notes what a merge has come to. It is decided when one of its links is
// gone, or when something stands on the parent, or is a disk of the VM, in the place
// of the link: then the parent has what the link had. Otherwise it is to be gone on
// with.
func (v *vm) settleMerge(t *vmsd.Tree, top func(file string) bool) (changed bool, err error) {
	m := t.Merge
	if m == (vmsd.Merge{}) {
		return false, nil
	}
	dir := filepath.Dir(v.path)
	there := map[string]bool{}
	for _, file := range []string{m.Link, m.Parent} {
		_, err := os.Lstat(filepath.Join(dir, file))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err // it may be there
		}
		there[file] = err == nil
	}
	links, err := vdisk.DescribeFolder(dir)
	if err != nil {
		return false, faultOf(err)
	}
	repointed := top(m.Parent) || slices.ContainsFunc(links, func(l vdisk.Info) bool {
		return l.Parent == m.Parent && filepath.Base(l.Path) != m.Link
	})
	drop := func(file string) {
		t.Released = slices.DeleteFunc(t.Released, func(f string) bool { return f == file })
	}
	switch {
	case there[m.Parent] && (repointed || !there[m.Link]):
		drop(m.Parent)
		t.Replace(m.Link, m.Parent)
		if there[m.Link] {
			t.Release(m.Link)
		}
	case !there[m.Parent]:
		drop(m.Parent) // the link has both
	}
	t.Merge = vmsd.Merge{}
	return true, nil
}
