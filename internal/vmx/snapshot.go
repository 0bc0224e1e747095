package vmx

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
	"mortise/internal/vmsd"
	"mortise/internal/vmxfile"
)

// A VM's snapshots are in its VMSD, the links that they froze in its folder, and which
// links are its disks in its VMX. Making one and going back to one change all three,
// and one save of the VMX decides, for all disks at once: what is to be done stands in
// the VMSD before, and settledTree sees by the VMX whether it was. Forgetting one
// changes the VMSD first: from then on nobody can go back to it, and its links may be
// merged (consolidate.go).

func vmsdPath(vmx string) string {
	return filepath.Join(filepath.Dir(vmx), baseName(vmx)+".vmsd")
}

// changeSnapshots does what r asks for. A guest uses the disks through live; they are
// closed if it is nil.
func (v *vm) changeSnapshots(ctx context.Context, r *hostapi.SnapshotRequest, running bool, live map[uuid.UUID]*vdisk.Chain, tell report) error {
	if r.Act == hostapi.SnapshotRequest_REVERT {
		if live != nil {
			return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s goes back to a snapshot while it is powered off", v.id)
		}
		return v.revert(ctx, int(r.Id))
	}
	return v.withDisks(ctx, live, func(disks map[uuid.UUID]*vdisk.Chain) error {
		return v.changeTree(ctx, r, running, disks, tell)
	})
}

func (v *vm) changeTree(ctx context.Context, r *hostapi.SnapshotRequest, running bool, disks map[uuid.UUID]*vdisk.Chain, tell report) error {
	t, err := v.settledTree()
	if err != nil {
		return err
	}
	id := int(r.Id)
	switch r.Act {
	case hostapi.SnapshotRequest_CREATE:
		return v.makeSnapshot(ctx, t, r, running, disks)
	case hostapi.SnapshotRequest_RENAME:
		s := t.Find(id)
		if s == nil {
			return v.noSnapshot(id)
		}
		if err := checkName(r.Name); err != nil {
			return err
		}
		s.Name, s.Description = r.Name, r.Description
		return v.saveTree(t)
	case hostapi.SnapshotRequest_REMOVE:
		t.Remove(id, r.Children) // or an earlier call did
	case hostapi.SnapshotRequest_REMOVE_ALL:
		for len(t.Snapshots) > 0 {
			t.Remove(t.Snapshots[0].UID, true)
		}
	case hostapi.SnapshotRequest_CONSOLIDATE:
	default:
		return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "act %v on snapshots is of a newer version: upgrade this host", r.Act)
	}
	if err := v.saveTree(t); err != nil {
		return err
	}
	v.at("snapshot.removed")
	return v.consolidate(ctx, t, disks, true, tell)
}

func (v *vm) noSnapshot(id int) error {
	return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "VM %s has no snapshot %d", v.id, id)
}

// withDisks does something with the VM's disks, which it opens if nobody has.
func (v *vm) withDisks(ctx context.Context, live map[uuid.UUID]*vdisk.Chain, do func(map[uuid.UUID]*vdisk.Chain) error) error {
	if live != nil {
		return do(live)
	}
	o, err := v.openAll(ctx)
	if err != nil {
		return err
	}
	err = do(o.disks)
	for _, d := range o.disks {
		err = errors.Join(err, faultOf(d.Flush(context.WithoutCancel(ctx))))
	}
	return errors.Join(err, o.closeDisks())
}

func (v *vm) saveTree(t *vmsd.Tree) error { return faultOf(t.Save(vmsdPath(v.path))) }

// maxSnapshotName is how long a snapshot's name is, in characters, as in vSphere.
const maxSnapshotName = 80

func checkName(name string) error {
	if name == "" || utf8.RuneCountInString(name) > maxSnapshotName || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return hostapi.Faultf(hostapi.Fault_INVALID, "a snapshot's name %.100q: it has 1 to %d characters, and no control characters", name, maxSnapshotName)
	}
	return nil
}

// makeSnapshot freezes all disks at one instant.
func (v *vm) makeSnapshot(ctx context.Context, t *vmsd.Tree, r *hostapi.SnapshotRequest, running bool, disks map[uuid.UUID]*vdisk.Chain) error {
	op := r.Header.GetOperationId()
	if op != "" && slices.ContainsFunc(t.Snapshots, func(s vmsd.Snapshot) bool { return s.Operation == op }) {
		return nil // an earlier call got here; its answer was lost
	}
	if err := checkName(r.Name); err != nil {
		return err
	}
	all, err := v.disks()
	if err != nil {
		return err
	}
	s := vmsd.Snapshot{Name: r.Name, Description: r.Description, Created: time.Now().UTC().Truncate(time.Microsecond), PoweredOn: running, Operation: op}
	for _, m := range all {
		s.Disks = append(s.Disks, vmsd.Disk{Node: m.controller, File: m.file})
	}
	uid, err := t.Add(s)
	if err != nil {
		return hostapi.Faultf(hostapi.Fault_INVALID, "%w: delete some", err)
	}
	t.Making = uid
	if err := v.saveTree(t); errors.Is(err, vmsd.ErrFull) {
		return hostapi.Faultf(hostapi.Fault_INVALID, "%w: delete some", err)
	} else if err != nil {
		return err
	}
	v.at("snapshot.begin")
	if err := v.freeze(ctx, all, disks); errors.Is(err, vdisk.ErrUndecided) {
		return faultOf(err) // who opens the VM next sees
	} else if err != nil {
		_, serr := v.settledTree()
		return errors.Join(faultOf(err), serr)
	}
	v.at("snapshot.made")
	t.Current, t.Making = uid, 0
	return v.saveTree(t)
}

// freeze puts a new link on every disk. Each disk's guest waits while the next ones
// are frozen, until the VMX names all the new links.
func (v *vm) freeze(ctx context.Context, all []member, disks map[uuid.UUID]*vdisk.Chain) error {
	var saved bool
	var failed error // after that: the links are the disks, and none of them may be taken away
	tops := map[string]string{}
	var next func(i int) error
	next = func(i int) error {
		if i == len(all) {
			err := v.setDisks(tops)
			saved = err == nil
			return err
		}
		d := disks[all[i].id]
		if d == nil {
			return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "disk %s is not open: power the VM off and on", all[i].id)
		}
		_, err := d.Snapshot(ctx, vdisk.LinkSpec{Commit: func(path string) error {
			tops[all[i].controller] = filepath.Base(path)
			return next(i + 1)
		}})
		if saved {
			failed = errors.Join(failed, err)
			return nil
		}
		return err // of ErrUndecided no disk's link is taken away, and every disk has failed
	}
	return errors.Join(next(0), failed)
}

// setDisks makes links the disks of the VM, by place, in one save. After
// vdisk.ErrUndecided the VMX names them, and may not after a power cut.
func (v *vm) setDisks(tops map[string]string) error {
	v.at("snapshot.commit")
	err := v.edit(func(f *vmxfile.File, _ *keysafe.Bundle) error {
		for place, file := range tops {
			if err := f.Set(place+".fileName", file); err != nil {
				return err
			}
		}
		return nil
	})
	v.at("snapshot.committed")
	return v.undecided(err, func(s slot) bool { return tops[s.controller] == s.file })
}

// undecided looks, after an edit of the VMX that failed, whether it is there all the
// same: its file was put in place, and that was not made durable. as tells of a disk
// that it is as the edit makes it.
func (v *vm) undecided(err error, as func(slot) bool) error {
	if err == nil {
		return nil
	}
	f, lerr := vmxfile.Load(v.path)
	if lerr != nil {
		return fmt.Errorf("%w: %w", vdisk.ErrUndecided, errors.Join(err, lerr))
	}
	slots, lerr := diskSlots(f)
	if lerr != nil || slices.ContainsFunc(slots, as) {
		return fmt.Errorf("%w: %w", vdisk.ErrUndecided, errors.Join(err, lerr))
	}
	return err
}

// disks lists the VM's disks as members does.
func (v *vm) disks() ([]member, error) {
	f, err := loadVMX(v.path)
	if err != nil {
		return nil, err
	}
	b, err := v.open(f)
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	return v.members(f, b)
}

// revert makes new links on what a snapshot froze, and these the VM's disks. What
// was written since the last snapshot is deleted.
func (v *vm) revert(ctx context.Context, id int) error {
	// Nobody, on whatever host, has the VM's disks.
	o, err := v.openAll(ctx)
	if err != nil {
		return fmt.Errorf("going back needs the disks as they are now: %w", err)
	}
	if err := o.closeDisks(); err != nil {
		return err
	}
	t, err := v.settledTree()
	if err != nil {
		return err
	}
	s := t.Find(id)
	if s == nil {
		return v.noSnapshot(id)
	}
	all, err := v.disks()
	if err != nil {
		return err
	}
	frozen := map[string]string{}
	for _, d := range s.Disks {
		frozen[d.Node] = d.File
	}
	if err := v.sameDisks(all, s); err != nil {
		return err
	}
	tops := map[string]string{}
	for _, m := range all {
		path, err := vdisk.NextLink(filepath.Join(filepath.Dir(v.path), frozen[m.controller]))
		if err != nil {
			return faultOf(err)
		}
		tops[m.controller] = filepath.Base(path)
		t.New = append(t.New, filepath.Base(path))
		t.Release(m.file)
	}
	t.Reverting = id
	if err := v.saveTree(t); err != nil {
		return err
	}
	v.at("revert.begin")
	err = func() error {
		dir := filepath.Dir(v.path)
		for _, m := range all {
			if _, err := vdisk.Revert(ctx, filepath.Join(dir, frozen[m.controller]), v.diskOptions(m), vdisk.LinkSpec{Path: filepath.Join(dir, tops[m.controller])}); err != nil {
				return err
			}
			v.at("revert.link")
		}
		return v.setDisks(tops)
	}()
	if errors.Is(err, vdisk.ErrUndecided) {
		return faultOf(err) // who opens the VM next sees
	}
	settled, serr := v.settledTree()
	if err != nil || serr != nil {
		return errors.Join(faultOf(err), serr)
	}
	v.log.Info("VM reverted", "snapshot", id, "name", s.Name)
	err = v.withDisks(ctx, nil, func(disks map[uuid.UUID]*vdisk.Chain) error {
		return v.consolidate(ctx, settled, disks, false, func(string, vdisk.Progress) {})
	})
	if err != nil {
		v.log.Warn("what a revert has left is not deleted yet", "error", err)
	}
	return nil
}

// sameDisks checks that a snapshot is of the disks that the VM has.
func (v *vm) sameDisks(all []member, s *vmsd.Snapshot) error {
	for _, m := range all {
		i := slices.IndexFunc(s.Disks, func(d vmsd.Disk) bool { return d.Node == m.controller })
		if i < 0 || len(s.Disks) != len(all) {
			return hostapi.Faultf(hostapi.Fault_INVALID, "snapshot %q has other disks than VM %s: restore %s of the time of the snapshot", s.Name, v.id, v.path)
		}
		path := filepath.Join(filepath.Dir(v.path), s.Disks[i].File)
		info, err := vdisk.Describe(path)
		if err != nil {
			return faultOf(err)
		}
		if info.UUID != m.id {
			return foreignDisk(path, info.UUID, fmt.Sprintf("snapshot %q", s.Name))
		}
	}
	return nil
}

// settledTree reads the VM's snapshots, and finishes or takes back what was begun
// with them when a process ended: the VMX says which. It is for who has had the disks'
// locks: a process that dies has them until it is dead.
func (v *vm) settledTree() (*vmsd.Tree, error) {
	path := vmsdPath(v.path)
	t, err := vmsd.Load(path)
	if err != nil {
		return nil, faultOf(err)
	}
	top, err := v.tops()
	if err != nil {
		return nil, err
	}
	changed := settleMaking(t, top)
	changed = settleReverting(t, top) || changed
	merged, err := v.settleMerge(t, top)
	if err != nil {
		return nil, err
	}
	changed = merged || changed
	n := len(t.Released)
	t.Released = slices.DeleteFunc(t.Released, func(file string) bool { return top(file) || t.Needs(file) })
	if !changed && n == len(t.Released) {
		return t, nil
	}
	v.at("snapshot.settle")
	return t, v.saveTree(t)
}

// tops tells of a link whether the VMX names it: whether it is a disk of the VM.
func (v *vm) tops() (func(file string) bool, error) {
	f, err := loadVMX(v.path)
	if err != nil {
		return nil, err
	}
	slots, err := diskSlots(f)
	if err != nil {
		return nil, faultOf(err)
	}
	return func(file string) bool {
		return slices.ContainsFunc(slots, func(s slot) bool { return s.file == file })
	}, nil
}

func settleMaking(t *vmsd.Tree, top func(string) bool) bool {
	if t.Making == 0 {
		return false
	}
	s := t.Find(t.Making)
	if slices.ContainsFunc(s.Disks, func(d vmsd.Disk) bool { return top(d.File) }) {
		t.Remove(t.Making, false)
	} else {
		t.Current = t.Making
	}
	t.Making = 0
	return true
}

func settleReverting(t *vmsd.Tree, top func(string) bool) bool {
	if t.Reverting == 0 {
		return false
	}
	if slices.ContainsFunc(t.New, top) {
		t.Current = t.Reverting
	} else {
		for _, file := range t.New {
			t.Release(file)
		}
	}
	t.Reverting, t.New = 0, nil
	return true
}

// inspectSnapshots adds what the VMSD says.
func inspectSnapshots(path string, slots []slot, info *hostapi.VMInfo) error {
	t, err := vmsd.Load(vmsdPath(path))
	if err != nil {
		return err
	}
	for _, s := range t.Snapshots {
		if s.UID == t.Making {
			continue
		}
		info.Snapshots = append(info.Snapshots, &hostapi.Snapshot{
			Id: int32(s.UID), Parent: int32(s.Parent), Name: s.Name, Description: s.Description, CreatedUnix: s.Created.Unix(), PoweredOn: s.PoweredOn,
		})
	}
	info.CurrentSnapshot = int32(t.Current)
	if len(t.Released) == 0 {
		return nil
	}
	links, err := vdisk.DescribeFolder(filepath.Dir(path))
	info.ConsolidationNeeded = slices.ContainsFunc(t.Released, func(file string) bool {
		stays := slices.ContainsFunc(links, func(l vdisk.Info) bool {
			return l.Cloned() && (filepath.Base(l.Path) == file || l.Parent == file)
		})
		return !stays && !t.Needs(file) && !slices.ContainsFunc(slots, func(s slot) bool { return s.file == file })
	})
	return err
}
