package center

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/store"
	"mortise/internal/task"
	"slices"
)

// reconfigureData is what the task knows: a plan that was made once, from the VM
// as it was, and how far it is.
type reconfigureData struct {
	Crypto cryptoPlan `json:"crypto"`

	Name     string               `json:"name,omitempty"`
	Hardware *inventory.Hardware  `json:"hardware,omitempty"` // as it will be; nil: unchanged
	Add      []inventory.Disk     `json:"add,omitempty"`
	AddSlots []string             `json:"addSlots,omitempty"`
	Attach   []attachDisk         `json:"attach,omitempty"`
	Remove   []string             `json:"remove,omitempty"`   // UUIDs
	Delete   bool                 `json:"delete,omitempty"`   // the files of what is removed
	Profiles map[string]policy.ID `json:"profiles,omitempty"` // by disk UUID; "" is the VM files'
	Migrate  string               `json:"migrate,omitempty"`

	Old   []KeyID `json:"old,omitempty"`   // keys before
	Begun bool    `json:"begun,omitempty"` // the host may have changed something
	Done  bool    `json:"done,omitempty"`  // and the record says what
	Undo  bool    `json:"undo,omitempty"`  // it was cancelled: what the host changed is taken back
	Late  bool    `json:"late,omitempty"`  // it was cancelled when all but the end was done

	Failed *Fault `json:"failed,omitempty"` // why it has ended early
}

type attachDisk struct {
	UUID       string `json:"uuid"`
	Datastore  string `json:"datastore"` // the host's name
	Path       string `json:"path"`
	Controller string `json:"controller,omitempty"`
}

// reconfigureVM is the task. Its steps: make keys; prove them; note in the
// inventory what is about to change; have the host change it; take over the
// result. What was noted is cleared only with the result.
func (c *Center) reconfigureVM(ctx context.Context, run *task.Run) error {
	var data reconfigureData
	if err := run.Load(&data); err != nil {
		return err
	}
	vm, err := c.vmOfTask(run)
	if err != nil {
		return err
	}
	if data.Failed != nil { // a former process got here
		return c.failedReconfigure(ctx, run, vm, &data)
	}
	if !data.Undo && !data.Late {
		err = c.reconfigure(ctx, run, vm, &data)
		if err == nil || run.Stopping(ctx) {
			return err
		}
	}
	canceled := errors.Is(context.Cause(ctx), task.ErrCanceled)
	ctx, stop := undoing(ctx, run)
	defer stop()
	if data.Begun && canceled || data.Undo || data.Late {
		err = c.cancelReconfigure(ctx, run, vm, &data)
		if err == nil || run.Stopping(ctx) || data.Failed != nil {
			return err
		}
	}
	data.Failed = canceledFault(run, err)
	if err := run.Save(ctx, "failed", data); err != nil {
		return err
	}
	return c.failedReconfigure(ctx, run, vm, &data)
}

func (c *Center) reconfigure(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) error {
	if data.Done {
		c.reconfigured(ctx, run, vm.Ref, data)
		return nil
	}
	if !data.Begun {
		if err := c.prepareKeys(ctx, run, vm, data); err != nil {
			return err
		}
	}
	if !data.touchesHost() {
		return c.reconfigureRecord(ctx, run, vm, data)
	}
	info, at, mark, err := c.changeOnHost(ctx, run, vm, data)
	if err != nil {
		c.foreignKeys(ctx, vm, err)
		return err
	}
	if err := data.checkResult(vm, info); err != nil {
		return err
	}
	var release []store.Op
	if data.Name != "" {
		release = append(release, c.inv.Release(inventory.ClaimName(vm.Parent, vm.Name)))
	}
	data.Done = true
	at.recording.Lock()
	err = c.saveVM(ctx, run, "done", data, vm.Ref, func(n *inventory.VM) error {
		takeInfo(n, info)
		takeCrypto(n, info)
		n.Converting = nil
		data.settle(n)
		at.runtimeAfter(mark, n, info.GetRuntime())
		return nil
	}, release...)
	at.recording.Unlock()
	if err != nil {
		return err
	}
	c.reconfigured(ctx, run, vm.Ref, data)
	return nil
}

// changeOnHost has the VM's host do it, or take it back. Its answer is of the link
// at, as of mark.
func (c *Center) changeOnHost(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) (info *hostapi.VMInfo, at *link, mark uint64, err error) {
	err = c.onHost(ctx, vm.Host, "reconfiguring a VM", func(l *link, h *inventory.Host, client hostapi.HostClient) error {
		if err := c.sendForReconfigure(ctx, run, vm, data, h, client); err != nil {
			return err
		}
		if !data.Begun {
			data.Begun = true
			if err := c.saveVM(ctx, run, "begin", data, vm.Ref, data.note); err != nil {
				data.Begun = false
				return err
			}
		}
		now, err := c.vmOfTask(run)
		if err != nil {
			return err
		}
		at, mark = l, l.runtimeMark(vm.UUID)
		info, err = c.callReconfigure(ctx, run, now, data, client)
		return hostFault(h, vm, fmt.Sprintf("reconfiguring VM %q", vm.Name), err)
	})
	return info, at, mark, err
}

// prepareKeys makes the new keys, and proves those that replace others: read
// back from every server, before anything old goes.
func (c *Center) prepareKeys(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) error {
	if len(data.Crypto.Keys) == 0 {
		return nil
	}
	run.Progress(ctx, "making keys", 0, 0)
	save := func(step string) error { return run.Save(ctx, step, data) }
	if err := c.complete(ctx, run, data.Crypto.Keys, vm.UUID, save); err != nil {
		return err
	}
	recrypt := func(kind string) bool { return kind == inventory.ConvertShallow || kind == inventory.ConvertDeep }
	var replace []KeyID
	if recrypt(data.Crypto.Home) {
		replace = append(replace, *data.Crypto.Keys.id(data.Crypto.Slot))
	}
	for _, d := range data.Crypto.Disks {
		if id := data.Crypto.Keys.id(d.Slot); recrypt(d.Kind) && !slices.Contains(replace, *id) {
			replace = append(replace, *id)
		}
	}
	for _, id := range replace {
		run.Progress(ctx, "reading keys back", 0, 0)
		if err := c.providers.readBack(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// sendForReconfigure gets onto the host the keys that open the VM, and the new
// ones.
func (c *Center) sendForReconfigure(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData, h *inventory.Host, client hostapi.HostClient) error {
	ids := append(vm.Keys(), data.Crypto.Keys.ids()...)
	ids = append(ids, data.Crypto.Send...)
	if len(ids) == 0 {
		return nil
	}
	if data.Crypto.Final || len(data.Crypto.Keys) > 0 {
		if err := c.ensureSafe(ctx, h.Ref, client); err != nil {
			return err
		}
	}
	run.Progress(ctx, "sending keys", 0, 0)
	return c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, ids, fmt.Sprintf("VM %q is reconfigured", vm.Name))
}

// note writes into the record what is about to change: from now on, and until
// the result is stored, either form is right (E8).
func (d *reconfigureData) note(vm *inventory.VM) error {
	target := func(slot string) *KeyID {
		if slot == "" {
			return nil
		}
		id := *d.Crypto.Keys.id(slot)
		return &id
	}
	if d.Crypto.Home != "" {
		vm.Converting = &inventory.Conversion{Kind: d.Crypto.Home, Target: target(d.Crypto.Slot)}
	}
	for i := range vm.Disks {
		disk := &vm.Disks[i]
		for _, p := range d.Crypto.Disks {
			if p.UUID == disk.UUID {
				disk.Converting = &inventory.Conversion{Kind: p.Kind, Target: target(p.Slot)}
			}
		}
		if slices.Contains(d.Remove, disk.UUID) {
			disk.Converting = &inventory.Conversion{Kind: inventory.DiskRemoving}
		}
	}
	for i, disk := range d.Add {
		disk.Converting = &inventory.Conversion{Kind: inventory.DiskAdding, Target: target(d.AddSlots[i])}
		vm.Disks = append(vm.Disks, disk)
	}
	for _, a := range d.Attach {
		vm.Disks = append(vm.Disks, inventory.Disk{UUID: a.UUID, Path: a.Path, Controller: a.Controller, Converting: &inventory.Conversion{Kind: inventory.DiskAdding}})
	}
	return nil
}

// callReconfigure has the host do it, and reports progress.
func (c *Center) callReconfigure(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData, client hostapi.HostClient) (*hostapi.VMInfo, error) {
	ref, err := c.vmRef(vm)
	if err != nil {
		return nil, err
	}
	pace, _ := run.Pace()
	change := func(kind, slot string) *hostapi.CryptoChange {
		w := &hostapi.CryptoChange{Kind: wireConversion(kind)}
		if slot != "" {
			w.Key = wireKeyID(data.Crypto.Keys.id(slot))
		}
		return w
	}
	r := &hostapi.ReconfigureVMRequest{Header: c.header(run.Operation()), Ref: ref, RemoveDiskUuids: data.Remove, DeleteRemoved: data.Delete, Name: data.Name, Pace: wirePace(pace)}
	if data.Crypto.Home != "" {
		r.Home = change(data.Crypto.Home, data.Crypto.Slot)
	}
	for _, d := range data.Crypto.Disks {
		r.Disks = append(r.Disks, &hostapi.DiskCryptoChange{DiskUuid: d.UUID, Change: change(d.Kind, d.Slot)})
	}
	if data.Hardware != nil {
		r.Hardware = wireHardware(*data.Hardware)
	}
	for i, d := range data.Add {
		n := &hostapi.NewDisk{Uuid: d.UUID, CapacityBytes: d.CapacityBytes, Controller: d.Controller, Thick: d.Thick}
		if slot := data.AddSlots[i]; slot != "" {
			n.KeyId = wireKeyID(data.Crypto.Keys.id(slot))
		}
		r.AddDisks = append(r.AddDisks, n)
	}
	for _, a := range data.Attach {
		r.AttachDisks = append(r.AttachDisks, &hostapi.AttachDisk{Datastore: a.Datastore, Path: a.Path, Controller: a.Controller})
	}
	if data.Undo {
		data.takeBack(r, vm)
		run.Progress(ctx, "running back", 0, 0)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go c.lead(ctx, run, ref, client, pace)
	stream, err := client.ReconfigureVM(ctx, r)
	if err != nil {
		return nil, err
	}
	return follow(ctx, run, stream)
}

// follow reports what a host tells of a change, until its result.
func follow(ctx context.Context, run *task.Run, stream interface {
	Recv() (*hostapi.Progress, error)
}) (*hostapi.VMInfo, error) {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, hostapi.Faultf(hostapi.Fault_BUSY, "the host ended without a result")
		}
		if err != nil {
			return nil, err
		}
		if m.GetResult() != nil {
			return m.Result, nil
		}
		run.Report(ctx, task.Progress{Stage: m.GetStage(), Done: m.GetDoneBytes(), Total: m.GetTotalBytes(),
			Rate: m.GetBytesPerSecond(), Left: int64(m.GetLeftSeconds())})
	}
}

func wireConversion(kind string) hostapi.CryptoChange_Kind {
	switch kind {
	case inventory.ConvertEncrypt:
		return hostapi.CryptoChange_ENCRYPT
	case inventory.ConvertDecrypt:
		return hostapi.CryptoChange_DECRYPT
	case inventory.ConvertShallow:
		return hostapi.CryptoChange_SHALLOW_RECRYPT
	case inventory.ConvertDeep:
		return hostapi.CryptoChange_DEEP_RECRYPT
	}
	return hostapi.CryptoChange_NONE
}

// settle writes into the record what only center knows of the change.
func (d *reconfigureData) settle(vm *inventory.VM) {
	if d.Name != "" {
		vm.Name = d.Name
	}
	if d.Migrate != "" {
		vm.MigrateEncryption = d.Migrate
	}
	if p, ok := d.Profiles[""]; ok {
		vm.Profile = p
	}
	for i := range vm.Disks {
		disk := &vm.Disks[i]
		if p, ok := d.Profiles[disk.UUID]; ok {
			disk.Profile = p
		}
		for _, a := range d.Add {
			if a.UUID == disk.UUID {
				disk.Profile = a.Profile
			}
		}
	}
}

// reconfigureRecord makes a change that the VM's files have no part in.
func (c *Center) reconfigureRecord(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) error {
	if len(data.Crypto.Send) > 0 {
		err := c.onHost(ctx, vm.Host, "sending keys", func(_ *link, h *inventory.Host, client hostapi.HostClient) error {
			return c.sendForReconfigure(ctx, run, vm, data, h, client)
		})
		if err != nil {
			return err
		}
		if vm.Encrypted {
			c.unlock(ctx, vm.Ref)
		}
	}
	data.Done = true
	err := c.saveVM(ctx, run, "record", data, vm.Ref, func(n *inventory.VM) error { data.settle(n); return nil })
	if err == nil {
		c.reconfigured(ctx, run, vm.Ref, data)
	}
	return err
}

// reconfigured wipes from the host the keys that the VM needs no more, and says
// what was done.
func (c *Center) reconfigured(ctx context.Context, run *task.Run, ref Ref, data *reconfigureData) {
	vm, ok := inventory.Lookup[inventory.VM](c.view, ref)
	if !ok {
		return
	}
	gone := slices.DeleteFunc(slices.Clone(data.Old), func(k KeyID) bool { return slices.Contains(vm.Keys(), k) })
	c.dropKeys(ctx, vm.Host, vm.UUID, gone)
	what := "reconfigured"
	if data.Crypto.Home != "" {
		what = data.Crypto.Home + "ed"
	} else if len(data.Crypto.Disks) > 0 {
		what = fmt.Sprintf("changed: %s of %d disks", data.Crypto.Disks[0].Kind, len(data.Crypto.Disks))
	}
	c.events.Post(ctx, Event{Type: event.VMReconfigured, User: run.User(), Entity: ref, Task: run.Ref(), Keys: vm.Keys(), Message: fmt.Sprintf("VM %q was %s", vm.Name, what)})
}
