package center

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

type snapshotAct string

const (
	snapshotCreate      snapshotAct = "create"
	snapshotRevert      snapshotAct = "revert"
	snapshotRemove      snapshotAct = "remove"
	snapshotRemoveAll   snapshotAct = "removeAll"
	snapshotRename      snapshotAct = "rename"
	snapshotConsolidate snapshotAct = "consolidate"
)

// merges tells whether the act merges links, which takes time and can be stopped.
func (a snapshotAct) merges() bool {
	return a == snapshotRemove || a == snapshotRemoveAll || a == snapshotConsolidate
}

// snapshotData is what the task knows.
type snapshotData struct {
	Act         snapshotAct `json:"act"`
	ID          int32       `json:"id,omitempty"` // of the snapshot; of the new one when it is there
	Name        string      `json:"name,omitempty"`
	Description string      `json:"description,omitempty"`
	Children    bool        `json:"children,omitempty"`
	Gone        []int32     `json:"gone,omitempty"` // what removing removes

	Off   bool `json:"off,omitempty"`   // the power-off before a revert may have reached the host
	Begun bool `json:"begun,omitempty"` // the host may have changed something
	Done  bool `json:"done,omitempty"`  // and the record says what
}

// SnapshotSpec is a snapshot to be made.
type SnapshotSpec struct {
	Name        string // 1 to 80 characters
	Description string // up to 1000 characters
	Memory      bool   // with the guest's memory: not there yet; ignored when the VM is off
	Quiesce     bool   // with the guest's file systems at rest: not there yet; likewise
}

// CreateSnapshot keeps a VM's disks as they are now. The VM may run: its disks are
// then kept as a power cut would leave them. The task's result is the snapshot.
func (c *Center) CreateSnapshot(ctx context.Context, p Principal, ref Ref, spec SnapshotSpec) (Ref, error) {
	data := snapshotData{Act: snapshotCreate, Name: spec.Name, Description: spec.Description}
	return c.submitSnapshot(ctx, p, ref, authz.VMSnapshotCreate, "VirtualMachine.createSnapshot", &data, func(vm *inventory.VM) error {
		if vm.Power != inventory.PoweredOff && spec.Memory {
			f := fault(task.NotSupported, "VM %q runs, and snapshots of a guest's memory are not there yet: leave the memory out (memory=false; govc snapshot.create -m=false), or power the VM off", vm.Name)
			f.Object, f.Name, f.Field = vm.Ref, vm.Name, "memory"
			return f
		}
		if vm.Power != inventory.PoweredOff && spec.Quiesce {
			f := fault(task.NotSupported, "VM %q runs, and no agent in its guest can bring its file systems to rest: leave quiescing out (quiesce=false), and have the guest sync before, or power it off", vm.Name)
			f.Object, f.Name, f.Field = vm.Ref, vm.Name, "quiesce"
			return f
		}
		return cmp.Or(checkSnapshotName(spec.Name), checkSnapshotDescription(spec.Description))
	})
}

// RevertToSnapshot makes a VM's disks what they were at a snapshot; id 0 means the
// current one. What was written since is lost unless another snapshot has it. A VM
// that runs is powered off first, as in vSphere for a snapshot without memory.
func (c *Center) RevertToSnapshot(ctx context.Context, p Principal, ref Ref, id int32) (Ref, error) {
	data := snapshotData{Act: snapshotRevert, ID: id}
	name := "vm.Snapshot.revert"
	if id == 0 {
		name = "VirtualMachine.revertToCurrentSnapshot"
	}
	return c.submitSnapshot(ctx, p, ref, authz.VMSnapshotRevert, name, &data, func(vm *inventory.VM) error {
		if data.ID == 0 {
			data.ID = vm.CurrentSnapshot
		}
		s, err := snapshotOf(vm, data.ID)
		if err == nil {
			data.Name = s.Name
		}
		return err
	})
}

// RemoveSnapshot forgets a snapshot, with children also all that stand on it. The
// disks stay as they are: links that no snapshot needs are merged, under a running
// guest too.
func (c *Center) RemoveSnapshot(ctx context.Context, p Principal, ref Ref, id int32, children bool) (Ref, error) {
	data := snapshotData{Act: snapshotRemove, ID: id, Children: children}
	return c.submitSnapshot(ctx, p, ref, authz.VMSnapshotRemove, "vm.Snapshot.remove", &data, func(vm *inventory.VM) error {
		s, err := snapshotOf(vm, id)
		if err != nil {
			return err
		}
		data.Name, data.Gone = s.Name, []int32{id}
		for _, s := range vm.Snapshots { // parents are before their children
			if children && slices.Contains(data.Gone, s.Parent) {
				data.Gone = append(data.Gone, s.ID)
			}
		}
		return nil
	})
}

// RemoveAllSnapshots forgets all of a VM's snapshots. The disks stay as they are.
func (c *Center) RemoveAllSnapshots(ctx context.Context, p Principal, ref Ref) (Ref, error) {
	data := snapshotData{Act: snapshotRemoveAll}
	return c.submitSnapshot(ctx, p, ref, authz.VMSnapshotRemove, "VirtualMachine.removeAllSnapshots", &data, func(vm *inventory.VM) error {
		for _, s := range vm.Snapshots {
			data.Gone = append(data.Gone, s.ID)
		}
		return nil
	})
}

// RenameSnapshot gives a snapshot another name or description; nil leaves one as
// it is.
func (c *Center) RenameSnapshot(ctx context.Context, p Principal, ref Ref, id int32, name, description *string) (Ref, error) {
	data := snapshotData{Act: snapshotRename, ID: id}
	return c.submitSnapshot(ctx, p, ref, authz.VMSnapshotRename, "vm.Snapshot.rename", &data, func(vm *inventory.VM) error {
		s, err := snapshotOf(vm, id)
		if err != nil {
			return err
		}
		data.Name, data.Description = s.Name, s.Description
		if name != nil {
			data.Name = *name
		}
		if description != nil {
			data.Description = *description
		}
		return cmp.Or(checkSnapshotName(data.Name), checkSnapshotDescription(data.Description))
	})
}

// ConsolidateDisks merges the links that removing snapshots has left, because it
// was cancelled or failed.
func (c *Center) ConsolidateDisks(ctx context.Context, p Principal, ref Ref) (Ref, error) {
	data := snapshotData{Act: snapshotConsolidate}
	return c.submitSnapshot(ctx, p, ref, authz.VMSnapshotRemove, "VirtualMachine.consolidateDisks", &data, func(*inventory.VM) error { return nil })
}

// submitSnapshot begins the task after check has looked at the VM and completed
// data. What has stopped half way is finished before (R4).
func (c *Center) submitSnapshot(ctx context.Context, p Principal, ref Ref, privilege, name string, data *snapshotData, check func(*inventory.VM) error) (Ref, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return "", err
	}
	if err := c.Check(p, privilege, ref); err != nil {
		return "", err
	}
	vm = c.settleNotes(ctx, vm)
	if err := check(vm); err != nil {
		return "", err
	}
	if vm.Converting != nil {
		return "", halfWayHome(vm)
	}
	for i := range vm.Disks {
		if vm.Disks[i].Converting != nil {
			return "", halfWay(vm, &vm.Disks[i])
		}
	}
	if err := c.mustReach(vm.Host, "changing snapshots"); err != nil {
		return "", err
	}
	return c.tasks.Submit(ctx, task.Spec{Type: taskSnapshot, Name: name, Entity: ref, User: p.User,
		Locks: lockVM(ref), Cancelable: data.Act.merges(), Data: data})
}

// snapshotOf finds a snapshot of a VM.
func snapshotOf(vm *inventory.VM, id int32) (*inventory.Snapshot, error) {
	if s := vm.Snapshot(id); s != nil {
		return s, nil
	}
	f := fault(task.NotFound, "VM %q has no snapshot %d; it may have been removed", vm.Name, id)
	if id == 0 {
		f = fault(task.NotFound, "VM %q has no current snapshot to go back to; create one first", vm.Name)
	}
	f.Object, f.Name = inventory.SnapshotRef(vm.Ref, id), vm.Name
	return nil, f
}

func checkSnapshotName(name string) error {
	switch n := utf8.RuneCountInString(name); {
	case name == "":
		return invalid("name", "a snapshot needs a name")
	case n > 80 || !utf8.ValidString(name):
		return invalid("name", "a snapshot's name has at most 80 characters; %.60q… is longer or no UTF-8", name)
	case strings.ContainsFunc(name, unicode.IsControl):
		return invalid("name", "a snapshot's name has no control characters; %q does", name)
	}
	return nil
}

func checkSnapshotDescription(text string) error {
	control := func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }
	switch {
	case utf8.RuneCountInString(text) > 1000 || !utf8.ValidString(text):
		return invalid("description", "a snapshot's description has at most 1000 characters of UTF-8")
	case strings.ContainsFunc(text, control):
		return invalid("description", "a snapshot's description has no control characters but line ends and tabs; %.60q does", text)
	}
	return nil
}

// withoutSnapshots refuses to add and remove disks while snapshots name the VM's.
func withoutSnapshots(vm *inventory.VM, spec *ReconfigureSpec) error {
	if !slices.ContainsFunc(spec.Disks, func(d DiskChange) bool { return d.Op == DiskAdd || d.Op == DiskRemove }) {
		return nil
	}
	var f *Fault
	switch n := len(vm.Snapshots); {
	case n > 0:
		f = fault(task.InvalidState, "VM %q has %d snapshots, which are of the disks that it has: disks cannot be added or removed until they are gone; delete them first (mortise vm snapshot delete %s --all)", vm.Name, n, vm.Name)
	case vm.ConsolidationNeeded:
		f = fault(task.InvalidState, "the disks of VM %q stand on links of snapshots that are gone: none can be added or removed until these are merged (mortise vm snapshot consolidate %s)", vm.Name, vm.Name)
	default:
		return nil
	}
	f.Object, f.Name = vm.Ref, vm.Name
	return f
}

// snapshotVM is the task. Its steps: power the VM off, if it is to be reverted;
// note that its snapshots change; have the host change them; take over the result.
func (c *Center) snapshotVM(ctx context.Context, run *task.Run) error {
	var data snapshotData
	if err := run.Load(&data); err != nil {
		return err
	}
	vm, err := c.vmOfTask(run)
	if err != nil {
		return err
	}
	if !data.Done {
		err = c.changeSnapshots(ctx, run, vm, &data)
	}
	switch {
	case err == nil:
		return c.changedSnapshots(ctx, run, vm, &data)
	case run.Stopping(ctx):
		return err
	}
	return c.brokenOffSnapshots(ctx, run, vm, &data, err)
}

func (c *Center) changeSnapshots(ctx context.Context, run *task.Run, vm *inventory.VM, data *snapshotData) error {
	var info *hostapi.VMInfo
	var at *link
	var mark uint64
	err := c.onHost(ctx, vm.Host, "changing snapshots", func(l *link, h *inventory.Host, client hostapi.HostClient) error {
		if keys := vm.Keys(); len(keys) > 0 {
			run.Progress(ctx, "sending keys", 0, 0)
			if err := c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, keys, fmt.Sprintf("a snapshot of VM %q is changed", vm.Name)); err != nil {
				return err
			}
		}
		if err := c.powerOffToRevert(ctx, run, vm, data, l, h, client); err != nil {
			return err
		}
		if !data.Begun {
			data.Begun = true
			if err := c.saveVM(ctx, run, "begin", data, vm.Ref, func(n *inventory.VM) error { n.SnapshotsChanging = true; return nil }); err != nil {
				data.Begun = false
				return err
			}
		}
		var err error
		at, mark = l, l.runtimeMark(vm.UUID)
		info, err = c.callSnapshots(ctx, run, vm, data, client)
		return hostFault(h, vm, fmt.Sprintf("%s of VM %q", data.doing(), vm.Name), err)
	})
	if err != nil {
		c.foreignKeys(ctx, vm, err)
		return err
	}
	if err := sameCrypto(vm, info); err != nil {
		return err
	}
	if data.Act == snapshotCreate {
		data.ID = info.CurrentSnapshot
	}
	data.Done = true
	at.recording.Lock()
	defer at.recording.Unlock()
	return c.saveVM(ctx, run, "done", data, vm.Ref, func(n *inventory.VM) error {
		takeInfo(n, info)
		n.SnapshotsChanging = false
		at.runtimeAfter(mark, n, info.GetRuntime())
		return nil
	})
}

// powerOffToRevert pulls the plug of a running VM that is to be reverted.
func (c *Center) powerOffToRevert(ctx context.Context, run *task.Run, vm *inventory.VM, data *snapshotData, l *link, h *inventory.Host, client hostapi.HostClient) error {
	now, err := c.vmOfTask(run)
	if err != nil || data.Act != snapshotRevert || data.Begun || now.Power != inventory.PoweredOn {
		return err
	}
	if !data.Off {
		data.Off = true
		if err := run.Save(ctx, "power off", data); err != nil {
			return err
		}
	}
	run.Progress(ctx, "powering off", 0, 0)
	ref, err := c.vmRef(now)
	if err != nil {
		return err
	}
	mark := l.runtimeMark(vm.UUID)
	info, err := client.PowerOff(ctx, &hostapi.PowerRequest{Header: c.header(run.Operation()), Ref: ref})
	if f, _ := hostapi.AsFault(err); err != nil && f.Kind == hostapi.Fault_WRONG_POWER_STATE {
		return nil // it is off, by itself or by an earlier try; if not, the host refuses the revert
	}
	if err != nil {
		return hostFault(h, vm, fmt.Sprintf("powering off VM %q", vm.Name), err)
	}
	return c.afterPower(ctx, l, mark, vm.Ref, info)
}

// callSnapshots has the host do it, and reports progress.
func (c *Center) callSnapshots(ctx context.Context, run *task.Run, vm *inventory.VM, data *snapshotData, client hostapi.HostClient) (*hostapi.VMInfo, error) {
	ref, err := c.vmRef(vm)
	if err != nil {
		return nil, err
	}
	r := &hostapi.SnapshotRequest{Header: c.header(run.Operation()), Ref: ref, Act: data.wire(), Id: data.ID, Children: data.Children}
	switch r.Act {
	case hostapi.SnapshotRequest_UNKNOWN:
		return nil, fault(task.NotSupported, "this version of center knows nothing of %q with snapshots", data.Act)
	case hostapi.SnapshotRequest_CREATE, hostapi.SnapshotRequest_RENAME:
		r.Name, r.Description = data.Name, data.Description
	}
	run.Progress(ctx, data.doing(), 0, 0)
	stream, err := client.ChangeSnapshots(ctx, r)
	if err != nil {
		return nil, err
	}
	return follow(ctx, run, stream)
}

// wire is the act as hosts know it.
func (d *snapshotData) wire() hostapi.SnapshotRequest_Act {
	return map[snapshotAct]hostapi.SnapshotRequest_Act{
		snapshotCreate: hostapi.SnapshotRequest_CREATE, snapshotRevert: hostapi.SnapshotRequest_REVERT, snapshotRemove: hostapi.SnapshotRequest_REMOVE,
		snapshotRemoveAll: hostapi.SnapshotRequest_REMOVE_ALL, snapshotRename: hostapi.SnapshotRequest_RENAME, snapshotConsolidate: hostapi.SnapshotRequest_CONSOLIDATE,
	}[d.Act]
}

// doing is the act in words.
func (d *snapshotData) doing() string {
	switch d.Act {
	case snapshotCreate:
		return "creating a snapshot"
	case snapshotRevert:
		return "reverting to snapshot " + d.Name
	case snapshotRemove:
		return "removing snapshot " + d.Name
	case snapshotRemoveAll:
		return "removing all snapshots"
	case snapshotRename:
		return "renaming a snapshot"
	}
	return "consolidating the disks"
}

// sameCrypto refuses a result in which a VM's encryption is not what it was:
// snapshots change none (E8).
func sameCrypto(vm *inventory.VM, info *hostapi.VMInfo) error {
	is := func(encrypted bool, key *KeyID, now bool, id *hostapi.KeyID) bool {
		return encrypted == now && (!encrypted || id != nil && key != nil && *keyID(id) == *key)
	}
	ok := is(vm.Encrypted, vm.KeyID, info.GetEncrypted(), info.GetKey()) && len(info.GetDisks()) == len(vm.Disks)
	for _, d := range vm.Disks {
		i := slices.IndexFunc(info.GetDisks(), func(o *hostapi.DiskInfo) bool { return o.Uuid == d.UUID })
		ok = ok && i >= 0 && is(d.Encrypted, d.KeyID, info.Disks[i].Encrypted, info.Disks[i].KeyId)
	}
	if !ok {
		return fault(task.Internal, "host says that the snapshots of VM %q are changed, but now its disks are others, or in another form, or have another key; see the VM's log on the host", vm.Name)
	}
	return nil
}

// changedSnapshots says what was done.
func (c *Center) changedSnapshots(ctx context.Context, run *task.Run, vm *inventory.VM, data *snapshotData) error {
	if data.Act == snapshotCreate {
		if err := run.SetResult(ctx, inventory.SnapshotRef(vm.Ref, data.ID)); err != nil {
			return err
		}
	}
	e := Event{User: run.User(), Entity: vm.Ref, Task: run.Ref()}
	switch data.Act {
	case snapshotCreate:
		e.Type, e.Message = event.VMSnapshotCreated, fmt.Sprintf("Snapshot %q (%d) of VM %q was created", data.Name, data.ID, vm.Name)
	case snapshotRevert:
		e.Type, e.Message = event.VMReverted, fmt.Sprintf("VM %q is as it was at snapshot %q (%d)", vm.Name, data.Name, data.ID)
	case snapshotRemove, snapshotRemoveAll:
		e.Type, e.Message = event.VMSnapshotRemoved, fmt.Sprintf("%s removed from VM %q", were(len(data.Gone), "snapshot"), vm.Name)
	case snapshotRename:
		e.Type, e.Message = event.VMSnapshotRenamed, fmt.Sprintf("Snapshot %d of VM %q is called %q", data.ID, vm.Name, data.Name)
	case snapshotConsolidate:
		e.Type, e.Message = event.VMConsolidated, fmt.Sprintf("The disks of VM %q were consolidated", vm.Name)
	}
	c.events.Post(ctx, e)
	return nil
}

// stopTries is how often it is looked whether a host that was told to stop has got
// as far as it had to.
const stopTries = 5

// brokenOffSnapshots ends a change that failed or was cancelled: the record says
// how far the host came. A merge goes on when somebody consolidates.
func (c *Center) brokenOffSnapshots(ctx context.Context, run *task.Run, vm *inventory.VM, data *snapshotData, err error) error {
	canceled := errors.Is(context.Cause(ctx), task.ErrCanceled)
	ctx, stop := undoing(ctx, run)
	defer stop()
	if !data.Begun {
		return canceledFault(run, err)
	}
	why := canceledFault(run, err)
	var now *inventory.VM
	for try := 0; try < stopTries; try++ {
		if stockErr := c.takeStock(ctx, vm.Ref, true); stockErr != nil {
			c.log.Warn("how far a change of snapshots came is not known yet", "vm", vm.Ref, "error", stockErr)
			break
		}
		if now, err = c.vmOfTask(run); err != nil {
			return err
		}
		left := slices.ContainsFunc(data.Gone, func(id int32) bool { return now.Snapshot(id) != nil })
		if !canceled || !left {
			break
		}
		// The host drops snapshots first of all; it may hear of the stop after.
		select {
		case <-time.After(busyPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	switch {
	case now == nil || !data.Act.merges():
	case canceled && !now.ConsolidationNeeded && !slices.ContainsFunc(data.Gone, func(id int32) bool { return now.Snapshot(id) != nil }):
		return c.changedSnapshots(ctx, run, vm, data) // it was too late to stop
	case now.ConsolidationNeeded:
		why.Message += fmt.Sprintf("; VM %q works, and its disks still have links that no snapshot needs: consolidate them (mortise vm snapshot consolidate %s)", vm.Name, vm.Name)
		c.events.Post(ctx, Event{Type: event.VMUnconsolidated, Severity: event.Warning, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Message: why.Message})
	}
	return why
}

// takeSnapshots brings a VM's snapshots into the record. A tree that is none, with
// ids twice or parents that come later, comes in as far as it is one.
func takeSnapshots(vm *inventory.VM, info *hostapi.VMInfo) {
	vm.Snapshots, vm.CurrentSnapshot = nil, 0
	for _, s := range info.GetSnapshots() {
		if s.GetId() <= 0 || vm.Snapshot(s.Id) != nil {
			continue
		}
		n := inventory.Snapshot{ID: s.Id, Name: s.Name, Description: s.Description, Created: time.Unix(s.CreatedUnix, 0).UTC(), PoweredOn: s.PoweredOn}
		if vm.Snapshot(s.Parent) != nil {
			n.Parent = s.Parent
		}
		vm.Snapshots = append(vm.Snapshots, n)
	}
	if vm.Snapshot(info.GetCurrentSnapshot()) != nil {
		vm.CurrentSnapshot = info.CurrentSnapshot
	}
	vm.ConsolidationNeeded = info.GetConsolidationNeeded()
}
