package center

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
	"mortise/internal/task"
)

// knownVM is what center remembers of the encryption of a VM that has left the
// inventory: its folder may come back, but not less encrypted and not older,
// unless somebody who may says so (E8).
type knownVM struct {
	UUID      string      `json:"uuid"`
	Name      string      `json:"name"`
	Encrypted bool        `json:"encrypted"`
	Epoch     uint64      `json:"epoch,omitempty"`
	Disks     []knownDisk `json:"disks,omitempty"`
}

type knownDisk struct {
	UUID      string `json:"uuid"`
	Encrypted bool   `json:"encrypted"`
	Epoch     uint64 `json:"epoch,omitempty"`
}

func remember(vm *inventory.VM) knownVM {
	k := knownVM{UUID: vm.UUID, Name: vm.Name, Encrypted: vm.Encrypted, Epoch: vm.Epoch}
	for _, d := range vm.Disks {
		k.Disks = append(k.Disks, knownDisk{d.UUID, d.Encrypted, d.Epoch})
	}
	return k
}

// older says in which way a folder is less than what center remembers; empty
// when it is not.
func (k knownVM) older(info *hostapi.VMInfo) string {
	switch {
	case k.Encrypted && !info.Encrypted:
		return "its files were encrypted and are not any more"
	case k.Encrypted && info.Epoch < k.Epoch:
		return fmt.Sprintf("its VMX is of epoch %d, and center last knew %d", info.Epoch, k.Epoch)
	}
	for _, d := range k.Disks {
		for _, now := range info.Disks {
			switch {
			case now.Uuid != d.UUID || !d.Encrypted:
			case !now.Encrypted:
				return fmt.Sprintf("its disk %s was encrypted and is not any more", now.Path)
			case now.Epoch < d.Epoch:
				return fmt.Sprintf("its disk %s is of epoch %d, and center last knew %d", now.Path, now.Epoch, d.Epoch)
			}
		}
	}
	return ""
}

type registerData struct {
	Spec      RegisterVMSpec `json:"spec"`
	VM        Ref            `json:"vm"`
	Datastore Ref            `json:"datastore"`
	Path      string         `json:"path"`
	Host      Ref            `json:"host"`
	Pool      Ref            `json:"pool"`
}

// RegisterVM brings the VM in a folder into the inventory. If its keys cannot be
// had it is registered as locked. The task's result is the VM.
func (c *Center) RegisterVM(ctx context.Context, p Principal, spec RegisterVMSpec) (Ref, error) {
	if spec.Folder == "" {
		spec.Folder = inventory.DefaultVMFolder
	}
	folder, err := lookup[inventory.Folder](c, p, spec.Folder)
	if err != nil {
		return "", err
	}
	if !slices.Contains(folder.ChildKinds, inventory.KindVM) {
		return "", invalid("folder", "folder %q does not hold VMs", folder.Name)
	}
	if err := c.Check(p, authz.VMRegister, folder.Ref); err != nil {
		return "", err
	}
	if spec.Name != "" {
		if err := checkVMName(spec.Name); err != nil {
			return "", err
		}
	}
	name, file, err := parsePath(spec.Path)
	if err != nil {
		return "", err
	}
	if !strings.HasSuffix(file, ".vmx") || path.Dir(file) == "." {
		return "", invalid("path", "%.200q does not name a VMX file in a folder; write [datastore] folder/file.vmx", spec.Path)
	}
	create := CreateVMSpec{Host: spec.Host, Pool: spec.Pool, Datastore: name}
	host, ds, _, err := c.place(p, &create, false)
	if err != nil {
		return "", err
	}
	data := registerData{Spec: spec, Datastore: ds.Ref, Path: file, Host: host.Ref, Pool: create.Pool}
	if data.VM, err = c.inv.NextRef(ctx, "vm"); err != nil {
		return "", err
	}
	return c.tasks.Submit(ctx, task.Spec{Type: taskRegister, Name: "Folder.registerVm", Entity: folder.Ref, User: p.User,
		Locks: append(lockVM(data.VM), "path/"+string(ds.Ref)+"/"+file), Cancelable: true, Data: data})
}

// registerVM is the task: read the folder, check the rights that what is in it
// needs, get its keys, write the record.
func (c *Center) registerVM(ctx context.Context, run *task.Run) error {
	var data registerData
	if err := run.Load(&data); err != nil {
		return err
	}
	if vm, ok := inventory.Lookup[inventory.VM](c.view, data.VM); ok {
		return run.SetResult(ctx, vm.Ref) // a former process got here
	}
	var vm *inventory.VM
	err := c.onHost(ctx, data.Host, "registering a VM", func(l *link, h *inventory.Host, client hostapi.HostClient) error {
		datastore, err := c.mountName(data.Datastore, data.Host)
		if err != nil {
			return err
		}
		info, err := client.InspectVM(ctx, &hostapi.InspectVMRequest{Ref: &hostapi.VMRef{Datastore: datastore, Path: data.Path}})
		if err != nil {
			return hostFault(h, nil, fmt.Sprintf("reading %s", data.Spec.Path), err)
		}
		mark := l.runtimeMark(info.GetRef().GetUuid())
		if vm, err = c.planRegister(ctx, principal(run), &data, info); err != nil {
			return err
		}
		l.runtimeAfter(mark, vm, info.Runtime)
		if len(vm.Keys()) == 0 {
			return nil
		}
		if err := c.ensureSafe(ctx, h.Ref, client); err != nil && !lockable(err) {
			return err
		}
		err = c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, vm.Keys(), fmt.Sprintf("VM %q is registered", vm.Name))
		switch {
		case err == nil:
			vm.CryptoState, vm.LockedReason = inventory.Unlocked, ""
		case lockable(err):
			vm.CryptoState, vm.LockedReason = inventory.Locked, trim(err.Error(), 1000)
		default:
			return err
		}
		if !vm.Encrypted {
			vm.CryptoState, vm.LockedReason = "", ""
		}
		return nil
	})
	if err != nil {
		return err
	}
	claims := []store.Op{c.inv.VMs.Create(string(vm.Ref), *vm)}
	for _, claim := range claimsOf(vm) {
		claims = append(claims, c.inv.Take(claim, vm.Ref))
	}
	if _, err := c.known.Get(ctx, vm.UUID); err == nil {
		claims = append(claims, c.known.Delete(vm.UUID, 0))
	}
	if err := run.Save(ctx, "register", data, claims...); err != nil {
		if !run.Stopping(ctx) {
			c.dropKeys(context.WithoutCancel(ctx), vm.Host, vm.UUID, vm.Keys())
		}
		if errors.Is(err, store.ErrExists) {
			return c.claimTaken(ctx, vm)
		}
		return err
	}
	c.events.Post(ctx, Event{Type: event.VMRegistered, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Keys: vm.Keys(),
		Message: fmt.Sprintf("VM %q was registered", vm.Name)})
	if vm.CryptoState == inventory.Locked {
		c.events.Post(ctx, Event{Type: event.VMLockedKMS, Severity: event.Error, Entity: vm.Ref, Keys: vm.Keys(),
			Message: fmt.Sprintf("VM %q is locked: %s", vm.Name, vm.LockedReason)})
	}
	return run.SetResult(ctx, vm.Ref)
}

// lockable tells whether err is about keys that cannot be had now: a VM can be
// in the inventory without them.
func lockable(err error) bool {
	switch task.AsFault(err).Kind {
	case task.KeyRequired, task.KeyState, task.ProviderDown, task.ProviderError:
		return true
	}
	return false
}

// planRegister makes the record of a VM from its folder.
func (c *Center) planRegister(ctx context.Context, p Principal, data *registerData, info *hostapi.VMInfo) (*inventory.VM, error) {
	vm := &inventory.VM{
		Host: data.Host, Pool: data.Pool, Datastore: data.Datastore, Path: data.Path, UUID: info.GetRef().GetUuid(), InstanceUUID: info.GetRef().GetUuid(),
		CreatedAt: c.now().UTC(), Power: inventory.PoweredOff, MigrateEncryption: inventory.MigrateOpportunistic,
	}
	vm.Ref, vm.Name, vm.Parent = data.VM, data.Spec.Name, data.Spec.Folder
	if vm.Name == "" {
		vm.Name = info.GetName()
	}
	if vm.UUID == "" {
		return nil, fault(task.InvalidVMConfig, "%s has no uuid.bios; give the VM one", data.Spec.Path)
	}
	if err := checkVMName(vm.Name); err != nil {
		return nil, err
	}
	for _, claim := range claimsOf(vm) {
		if _, taken, err := c.inv.Owner(ctx, claim); err != nil {
			return nil, storeFault("looking for the VM", err)
		} else if taken {
			return nil, c.claimTaken(ctx, vm)
		}
	}
	takeInfo(vm, info)
	takeCrypto(vm, info)
	for i := range vm.Disks {
		if vm.Disks[i].Encrypted && !vm.Encrypted {
			f := fault(task.GenericVMConfig, "disk %s is encrypted and the VM's files are not: an encrypted disk belongs to an encrypted VM. Restore the VMX from a backup, or attach the disk to the VM it is from", vm.Disks[i].Path)
			f.MessageKey = "msg.keysafe.locator"
			return nil, f
		}
	}
	if err := c.checkKnown(ctx, p, data, vm, info); err != nil {
		return nil, err
	}
	if len(vm.Keys()) == 0 {
		return vm, nil
	}
	if err := c.Check(p, authz.CryptoRegisterVM, vm.Parent); err != nil {
		return nil, err
	}
	for _, id := range vm.Keys() {
		if err := c.mayName(p, id, vm.Ref); err != nil {
			return nil, err
		}
	}
	return vm, nil
}

// checkKnown compares a folder with what center remembers of the VM.
func (c *Center) checkKnown(ctx context.Context, p Principal, data *registerData, vm *inventory.VM, info *hostapi.VMInfo) error {
	known, err := c.known.Get(ctx, vm.UUID)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return storeFault("reading what is known of the VM", err)
	}
	why := known.Value.older(info)
	if why == "" {
		return nil
	}
	if !data.Spec.AcceptOlderEpoch {
		f := fault(task.GenericVMConfig, "%s is older than what center knows of VM %q: %s. If it was restored from a backup on purpose, register it again and accept the older state", data.Spec.Path, known.Value.Name, why)
		f.MessageKey = "msg.keysafe.locator"
		return f
	}
	return c.Check(p, authz.CryptoRegisterVM, vm.Parent)
}
