package vimapi

import (
	"fmt"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/center"
	"mortise/internal/inventory"
)

// snapshotMethods are the methods of VMs and of their snapshots. A snapshot is a
// managed object, snapshot-13-2, that the inventory keeps in its VM's record.
func snapshotMethods() []method {
	snapshot := string(inventory.KindSnapshot)
	return []method{
		row("VirtualMachine", "CreateSnapshot_Task", "", (*call).createSnapshot).small(),
		row("VirtualMachine", "CreateSnapshotEx_Task", "", (*call).createSnapshotEx).small(),
		row("VirtualMachine", "RevertToCurrentSnapshot_Task", "", (*call).revertToCurrentSnapshot).small(),
		row("VirtualMachine", "RemoveAllSnapshots_Task", "", (*call).removeAllSnapshots).small(),
		row("VirtualMachine", "ConsolidateVMDisks_Task", "", (*call).consolidateDisks).small(),
		row(snapshot, "RevertToSnapshot_Task", "", (*call).revertToSnapshot).small(),
		row(snapshot, "RemoveSnapshot_Task", "", (*call).removeSnapshot).small(),
		row(snapshot, "RenameSnapshot", "", (*call).renameSnapshot).small(),
	}
}

func (c *call) createSnapshot(q *types.CreateSnapshot_Task) (*types.CreateSnapshot_TaskResponse, error) {
	t, err := c.s.center.CreateSnapshot(c.ctx, c.principal(), ref(q.This),
		center.SnapshotSpec{Name: q.Name, Description: q.Description, Memory: q.Memory, Quiesce: q.Quiesce})
	return &types.CreateSnapshot_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) createSnapshotEx(q *types.CreateSnapshotEx_Task) (*types.CreateSnapshotEx_TaskResponse, error) {
	t, err := c.s.center.CreateSnapshot(c.ctx, c.principal(), ref(q.This),
		center.SnapshotSpec{Name: q.Name, Description: q.Description, Memory: q.Memory, Quiesce: q.QuiesceSpec != nil})
	return &types.CreateSnapshotEx_TaskResponse{Returnval: moref(t)}, err
}

// A VM that was reverted is off: no snapshot has the memory of a guest. So there
// is no power-on to suppress, and host says where there would be one.
func (c *call) revertToCurrentSnapshot(q *types.RevertToCurrentSnapshot_Task) (*types.RevertToCurrentSnapshot_TaskResponse, error) {
	t, err := c.s.center.RevertToSnapshot(c.ctx, c.principal(), ref(q.This), 0)
	return &types.RevertToCurrentSnapshot_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) revertToSnapshot(q *types.RevertToSnapshot_Task) (*types.RevertToSnapshot_TaskResponse, error) {
	vm, id, err := snapshotOf(q.This)
	if err != nil {
		return nil, err
	}
	t, err := c.s.center.RevertToSnapshot(c.ctx, c.principal(), vm, id)
	return &types.RevertToSnapshot_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) removeSnapshot(q *types.RemoveSnapshot_Task) (*types.RemoveSnapshot_TaskResponse, error) {
	vm, id, err := snapshotOf(q.This)
	if err != nil {
		return nil, err
	}
	if err := mustConsolidate(q.Consolidate); err != nil {
		return nil, err
	}
	t, err := c.s.center.RemoveSnapshot(c.ctx, c.principal(), vm, id, q.RemoveChildren)
	return &types.RemoveSnapshot_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) removeAllSnapshots(q *types.RemoveAllSnapshots_Task) (*types.RemoveAllSnapshots_TaskResponse, error) {
	if err := mustConsolidate(q.Consolidate); err != nil {
		return nil, err
	}
	t, err := c.s.center.RemoveAllSnapshots(c.ctx, c.principal(), ref(q.This))
	return &types.RemoveAllSnapshots_TaskResponse{Returnval: moref(t)}, err
}

func mustConsolidate(consolidate *bool) error {
	if consolidate != nil && !*consolidate {
		return notSupported("a snapshot cannot be removed without consolidating the disks (consolidate=false): leave it out, or cancel the task when the snapshot is gone and consolidate later")
	}
	return nil
}

func (c *call) consolidateDisks(q *types.ConsolidateVMDisks_Task) (*types.ConsolidateVMDisks_TaskResponse, error) {
	t, err := c.s.center.ConsolidateDisks(c.ctx, c.principal(), ref(q.This))
	return &types.ConsolidateVMDisks_TaskResponse{Returnval: moref(t)}, err
}

// renameSnapshot answers when it is done, as vSphere does.
func (c *call) renameSnapshot(q *types.RenameSnapshot) (*types.RenameSnapshotResponse, error) {
	vm, id, err := snapshotOf(q.This)
	if err != nil {
		return nil, err
	}
	var name, description *string
	if q.Name != "" {
		name = &q.Name
	}
	if q.Description != "" {
		description = &q.Description
	}
	t, err := c.s.center.RenameSnapshot(c.ctx, c.principal(), vm, id, name, description)
	if err != nil {
		return nil, err
	}
	return &types.RenameSnapshotResponse{}, c.s.center.WaitTask(c.ctx, t)
}

// snapshotOf reads the reference of a snapshot.
func snapshotOf(m types.ManagedObjectReference) (vm inventory.Ref, id int32, err error) {
	vm, id, ok := inventory.Ref(m.Value).Snapshot()
	if !ok || m.Type != string(inventory.KindSnapshot) {
		return "", 0, objectNotFound(m)
	}
	return vm, id, nil
}

func snapshotMoref(vm inventory.Ref, id int32) types.ManagedObjectReference {
	return singleton(string(inventory.KindSnapshot), string(inventory.SnapshotRef(vm, id)))
}

// snapshotObject is a snapshot as an object to be read.
type snapshotObject struct {
	vm *inventory.VM
	id int32
}

func (r *reader) snapshot(m types.ManagedObjectReference) (*snapshotObject, bool) {
	ref, id, err := snapshotOf(m)
	if err != nil {
		return nil, false
	}
	vm, ok := inventory.Lookup[inventory.VM](r.view, ref)
	if !ok || vm.Snapshot(id) == nil {
		return nil, false
	}
	return &snapshotObject{vm, id}, true
}

// snapshotProps lacks config: what hardware the VM had then is not kept.
func snapshotProps() map[string]prop {
	return map[string]prop{
		"vm":            on(func(_ *reader, s *snapshotObject) any { return moref(s.vm.Ref) }),
		"childSnapshot": on(func(_ *reader, s *snapshotObject) any { return snapshotsOn(s.vm, s.id) }),
	}
}

func snapshotsOn(vm *inventory.VM, id int32) []types.ManagedObjectReference {
	refs := []types.ManagedObjectReference{}
	for _, s := range vm.SnapshotsOn(id) {
		refs = append(refs, snapshotMoref(vm.Ref, s.ID))
	}
	return refs
}

// vmSnapshots is not set while there are none.
func vmSnapshots(vm *inventory.VM) any {
	if len(vm.Snapshots) == 0 {
		return nil
	}
	info := &types.VirtualMachineSnapshotInfo{RootSnapshotList: snapshotTree(vm, 0)}
	if vm.CurrentSnapshot != 0 {
		info.CurrentSnapshot = ptr(snapshotMoref(vm.Ref, vm.CurrentSnapshot))
	}
	return info
}

func snapshotTree(vm *inventory.VM, on int32) []types.VirtualMachineSnapshotTree {
	var list []types.VirtualMachineSnapshotTree
	for _, s := range vm.SnapshotsOn(on) {
		power := inventory.PoweredOff
		if s.PoweredOn {
			power = inventory.PoweredOn
		}
		list = append(list, types.VirtualMachineSnapshotTree{
			Snapshot: snapshotMoref(vm.Ref, s.ID), Vm: moref(vm.Ref), Name: s.Name, Description: s.Description, Id: s.ID,
			CreateTime: s.Created.UTC(), State: powerState(power), ReplaySupported: ptr(false), ChildSnapshotList: snapshotTree(vm, s.ID),
		})
	}
	return list
}

// snapshotState is what traversals from a VM to its snapshots depend on.
func snapshotState(vm *inventory.VM) string {
	var b strings.Builder
	for _, s := range vm.Snapshots {
		fmt.Fprintf(&b, "%d<%d ", s.ID, s.Parent)
	}
	fmt.Fprintf(&b, "%d", vm.CurrentSnapshot)
	return b.String()
}
