package center_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// treeIs compares a VM's snapshots with "1<0 a on, 2<1 b off; current 2; consolidate".
func treeIs(vm *inventory.VM, want string) string {
	var list []string
	for _, s := range vm.Snapshots {
		power := "off"
		if s.PoweredOn {
			power = "on"
		}
		list = append(list, fmt.Sprintf("%d<%d %s %s", s.ID, s.Parent, s.Name, power))
	}
	got := fmt.Sprintf("%s; current %d", strings.Join(list, ", "), vm.CurrentSnapshot)
	if vm.ConsolidationNeeded {
		got += "; consolidate"
	}
	if vm.SnapshotsChanging {
		got += "; changing"
	}
	if got == want {
		return ""
	}
	return fmt.Sprintf("the snapshots are %q, want %q", got, want)
}

func twoSnapshots(w *world, vm inventory.Ref) {
	w.t.Helper()
	for _, name := range []string{"a", "b"} {
		w.ok(w.c.CreateSnapshot(context.Background(), w.p, vm, center.SnapshotSpec{Name: name}))
	}
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	ref := w.createVM("web", policy.VMEncryption)
	is := func(want string) {
		t.Helper()
		if wrong := treeIs(w.vm(ref), want); wrong != "" {
			t.Error(wrong)
		}
	}
	was := w.vm(ref)
	r := w.ok(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "a", Description: "before the update", Memory: true, Quiesce: true})) // it is off
	if vm, id, ok := r.Result.Snapshot(); vm != ref || id != 1 || !ok || r.Name != "VirtualMachine.createSnapshot" {
		t.Errorf("the task %s made %s", r.Name, r.Result)
	}
	vm := w.vm(ref)
	s := vm.Snapshot(1)
	if s.Description != "before the update" || time.Since(s.Created).Abs() > time.Minute || vm.Disks[0].Path == was.Disks[0].Path || sameCrypto(was, vm) != "" {
		t.Errorf("the snapshot is %+v of %+v", s, vm)
	}

	// Under a running guest, whose memory no snapshot keeps.
	w.ok(w.c.PowerOn(ctx, w.p, ref))
	w.faulted(task.NotSupported, "memory=false -m=false web", second(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "b", Memory: true})))
	w.faulted(task.NotSupported, "quiesce=false web", second(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "b", Quiesce: true})))
	w.ok(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "b"}))
	w.ok(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "b"})) // names need not differ
	is("1<0 a off, 2<1 b on, 3<2 b on; current 3")

	// Reverting pulls the plug first.
	w.ok(w.c.RevertToSnapshot(ctx, w.p, ref, 1))
	if vm := w.vm(ref); vm.Power != inventory.PoweredOff || w.host.Running(vm.UUID) || !w.sawEvent(event.VMPoweredOff) {
		t.Errorf("after the revert the VM is %s", vm.Power)
	}
	w.ok(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "c"}))
	is("1<0 a off, 2<1 b on, 3<2 b on, 4<1 c off; current 4")
	w.ok(w.c.RevertToSnapshot(ctx, w.p, ref, 0))
	is("1<0 a off, 2<1 b on, 3<2 b on, 4<1 c off; current 4")

	name, text, long, control := "the first", "", strings.Repeat("ä", 81), "a\x1bb"
	w.ok(w.c.RenameSnapshot(ctx, w.p, ref, 1, &name, nil))
	if s := w.vm(ref).Snapshot(1); s.Name != name || s.Description == "" {
		t.Errorf("after renaming: %+v", s)
	}
	w.ok(w.c.RenameSnapshot(ctx, w.p, ref, 1, nil, &text))
	if s := w.vm(ref).Snapshot(1); s.Name != name || s.Description != "" {
		t.Errorf("after the description went: %+v", s)
	}
	for _, bad := range []string{text, long, control, "\xff"} {
		w.faulted(task.InvalidArgument, "name", second(w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: bad})))
		w.faulted(task.InvalidArgument, "name", second(w.c.RenameSnapshot(ctx, w.p, ref, 1, &bad, nil)))
	}
	w.faulted(task.InvalidArgument, "description", second(w.c.RenameSnapshot(ctx, w.p, ref, 1, nil, &control)))

	// Disks stay as they are while there are snapshots; their encryption changes.
	for _, d := range []center.DiskChange{{Op: center.DiskAdd, CapacityBytes: 1 << 20}, {Op: center.DiskRemove, Key: 2000}, {Op: center.DiskAdd, Path: "[ds1] x/x.vmdk"}} {
		w.faulted(task.InvalidState, "4 snapshots delete web --all", second(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Disks: []center.DiskChange{d}})))
	}
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoShallow}}))

	w.ok(w.c.RemoveSnapshot(ctx, w.p, ref, 2, false))
	is("1<0 the first off, 3<1 b on, 4<1 c off; current 4")
	w.ok(w.c.RemoveSnapshot(ctx, w.p, ref, 1, true))
	is("; current 0")
	for _, f := range []func() (inventory.Ref, error){
		func() (inventory.Ref, error) { return w.c.RevertToSnapshot(ctx, w.p, ref, 1) },
		func() (inventory.Ref, error) { return w.c.RevertToSnapshot(ctx, w.p, ref, 0) },
		func() (inventory.Ref, error) { return w.c.RemoveSnapshot(ctx, w.p, ref, 1, true) },
		func() (inventory.Ref, error) { return w.c.RenameSnapshot(ctx, w.p, ref, 1, &name, nil) },
	} {
		w.faulted(task.NotFound, "web snapshot", second(f()))
	}
	twoSnapshots(w, ref)
	is("5<0 a off, 6<5 b off; current 6")

	// They go with the VM out of the inventory, and come back with it.
	w.must(w.c.UnregisterVM(ctx, w.p, ref))
	ref = w.ok(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] web/web.vmx"})).Result
	is("5<0 a off, 6<5 b off; current 6")
	w.ok(w.c.RemoveAllSnapshots(ctx, w.p, ref))
	w.ok(w.c.RemoveAllSnapshots(ctx, w.p, ref)) // of none
	is("; current 0")
	if vm := w.vm(ref); vm.Disks[0].Path != was.Disks[0].Path {
		t.Errorf("the disk is %s again", vm.Disks[0].Path)
	}
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskRemove, Key: 2001}}}))
	types, _ := w.events()
	for _, want := range []string{event.VMSnapshotCreated, event.VMReverted, event.VMSnapshotRenamed, event.VMSnapshotRemoved} {
		if !strings.Contains(strings.Join(types, " "), want) {
			t.Errorf("no event %s", want)
		}
	}
}

func TestSnapshotPrivileges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	ref := w.createVM("web", "")
	twoSnapshots(w, ref)
	auditor, admin := w.user("auditor", authz.RoleReadOnly, inventory.RootFolder), w.user("operator", authz.RoleNoCryptoAdmin, inventory.RootFolder)
	name := "x"
	for _, c := range []struct {
		privilege string
		f         func(p center.Principal) (inventory.Ref, error)
	}{
		{authz.VMSnapshotCreate, func(p center.Principal) (inventory.Ref, error) {
			return w.c.CreateSnapshot(ctx, p, ref, center.SnapshotSpec{Name: name})
		}},
		{authz.VMSnapshotRevert, func(p center.Principal) (inventory.Ref, error) { return w.c.RevertToSnapshot(ctx, p, ref, 1) }},
		{authz.VMSnapshotRename, func(p center.Principal) (inventory.Ref, error) { return w.c.RenameSnapshot(ctx, p, ref, 1, &name, nil) }},
		{authz.VMSnapshotRemove, func(p center.Principal) (inventory.Ref, error) { return w.c.RemoveSnapshot(ctx, p, ref, 1, false) }},
		{authz.VMSnapshotRemove, func(p center.Principal) (inventory.Ref, error) { return w.c.RemoveAllSnapshots(ctx, p, ref) }},
		{authz.VMSnapshotRemove, func(p center.Principal) (inventory.Ref, error) { return w.c.ConsolidateDisks(ctx, p, ref) }},
	} {
		if f := w.faulted(task.NoPermission, c.privilege, second(c.f(auditor))); f.Privilege != c.privilege {
			t.Errorf("the fault names %s", f.Privilege)
		}
		w.faulted(task.NotFound, "vm-999", second(w.c.RevertToSnapshot(ctx, w.p, "vm-999", 1)))
		w.ok(c.f(admin))
	}
}

// TestCancelMerge: what is cancelled while links are merged has removed the
// snapshot; consolidating does the rest.
func TestCancelMerge(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	ref := w.createVM("web", policy.VMEncryption)
	twoSnapshots(w, ref)
	w.ok(w.c.PowerOn(ctx, w.p, ref))
	at := make(chan bool)
	w.host.OnStep(func(step int) {
		if step == 3 {
			at <- true
			<-at
		}
	})
	cancel := func(taskRef inventory.Ref, err error) *center.Fault {
		t.Helper()
		w.must(err)
		<-at
		w.eventually("progress is shown", func() bool {
			r, _ := inventory.Lookup[task.Record](w.c.View(), taskRef)
			return r.TotalBytes > 0 && r.Stage == "consolidating"
		})
		w.must(w.c.CancelTask(ctx, w.p, taskRef))
		time.Sleep(50 * time.Millisecond) // until the host hears of it
		at <- true
		return w.faulted(task.Canceled, "consolidate web", second2(w.end(taskRef, nil)))
	}
	cancel(w.c.RemoveSnapshot(ctx, w.p, ref, 2, false))
	if wrong := treeIs(w.vm(ref), "1<0 a off; current 1; consolidate"); wrong != "" || !w.sawEvent(event.VMUnconsolidated) {
		t.Error(wrong)
	}
	cancel(w.c.ConsolidateDisks(ctx, w.p, ref))
	w.host.OnStep(nil)
	w.ok(w.c.ConsolidateDisks(ctx, w.p, ref))
	if wrong := treeIs(w.vm(ref), "1<0 a off; current 1"); wrong != "" || !w.host.Running(w.vm(ref).UUID) {
		t.Error(wrong)
	}
	taskRef, err := w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "c"})
	w.must(err)
	if err := w.c.CancelTask(ctx, w.p, taskRef); !task.Is(err, task.NotSupported) && !task.Is(err, task.InvalidState) {
		t.Errorf("cancelling what takes a moment: %v", err)
	}
	w.end(taskRef, nil)
}

// TestSnapshotHostLost: a host that goes away in the middle, for longer than
// center waits, is asked when it is back.
func TestSnapshotHostLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	ref := w.createVM("web", policy.VMEncryption)
	w.host.OnCall(func(method string) error {
		if method == "ChangeSnapshots" {
			return errors.New("the disk has caught fire")
		}
		return nil
	})
	taskRef, err := w.c.CreateSnapshot(ctx, w.p, ref, center.SnapshotSpec{Name: "a"})
	w.fails(task.Internal, "web fire", taskRef, err)
	if wrong := treeIs(w.vm(ref), "; current 0"); wrong != "" {
		t.Error(wrong)
	}
	w.host.OnCall(nil)
	twoSnapshots(w, ref)
	begun := make(chan bool)
	w.host.OnStep(func(step int) {
		if step == 2 {
			begun <- true
			time.Sleep(100 * time.Millisecond)
		}
	})
	taskRef, err = w.c.RemoveSnapshot(ctx, w.p, ref, 1, false)
	w.must(err)
	<-begun
	w.host.OnStep(nil)
	w.host.Stop()
	w.fails(task.HostDown, "esx1", taskRef, nil)
	w.host.Start()
	w.eventually("what the host did is known", func() bool { return treeIs(w.vm(ref), "2<0 b off; current 2; consolidate") == "" })
	w.ok(w.c.ConsolidateDisks(ctx, w.p, ref))
	if wrong := treeIs(w.vm(ref), "2<0 b off; current 2"); wrong != "" {
		t.Error(wrong)
	}
}
