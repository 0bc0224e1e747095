package center

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"mortise/internal/authz"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/store"
	"mortise/internal/task"
)

// ReconfigureVM changes a VM: its encryption, by spec or by policy, its hardware,
// its disks, its name.
func (c *Center) ReconfigureVM(ctx context.Context, p Principal, ref Ref, spec ReconfigureSpec) (Ref, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return "", err
	}
	vm = c.settleNotes(ctx, vm)
	data, ops, err := c.planReconfigure(ctx, p, vm, &spec)
	if err != nil {
		return "", err
	}
	if data.touchesHost() || len(data.Crypto.Send) > 0 {
		if err := c.mustReach(vm.Host, "reconfiguring a VM"); err != nil {
			return "", err
		}
	}
	task, err := c.tasks.Submit(ctx, task.Spec{Type: taskReconfigure, Name: "VirtualMachine.reconfigure", Entity: ref, User: p.User,
		Locks: lockVM(ref), Cancelable: true, Paceable: data.rewrites(), Data: data, Ops: ops})
	if errors.Is(err, store.ErrExists) {
		other := *vm
		other.Name = data.Name
		return "", c.claimTaken(ctx, &other)
	}
	return task, err
}

// planReconfigure checks a spec and the privileges it needs.
func (c *Center) planReconfigure(ctx context.Context, p Principal, vm *inventory.VM, spec *ReconfigureSpec) (*reconfigureData, []store.Op, error) {
	fail := func(err error) (*reconfigureData, []store.Op, error) { return nil, nil, err }
	data := &reconfigureData{Profiles: map[string]policy.ID{}, Old: vm.Keys()}
	if err := checkDiskChanges(vm, spec); err != nil {
		return fail(err)
	}
	if err := withoutSnapshots(vm, spec); err != nil {
		return fail(err)
	}
	pl := planner{
		vm: vm, spec: spec,
		policy: func(id policy.ID) (Policy, error) { return c.Policy(ctx, id) },
		key:    func(id KeyID, slot string) (plannedKey, error) { return c.planKey(ctx, p, id, slot, vm.Entity, vm.Ref) },
	}
	if err := pl.run(); err != nil {
		return fail(err)
	}
	for _, id := range spec.Crypto.Keys {
		if err := c.mayName(p, id, vm.Ref); err != nil {
			return fail(err)
		}
	}
	if err := c.planDisks(ctx, p, vm, spec, &pl, data); err != nil {
		return fail(err)
	}
	data.Crypto = pl.plan
	if err := c.planRest(p, vm, spec, data); err != nil {
		return fail(err)
	}
	if err := c.mayReconfigure(p, vm, spec, data); err != nil {
		return fail(err)
	}
	if err := data.checkPower(vm); err != nil {
		return fail(err)
	}
	var ops []store.Op
	if data.Name != "" {
		ops = append(ops, c.inv.Take(inventory.ClaimName(vm.Parent, data.Name), vm.Ref))
	}
	return data, ops, nil
}

// checkDiskChanges refuses changes of disks that the VM does not have.
func checkDiskChanges(vm *inventory.VM, spec *ReconfigureSpec) error {
	seen := map[int32]bool{}
	for i, d := range spec.Disks {
		field := fmt.Sprintf("deviceChange[%d]", i)
		switch d.Op {
		case DiskAdd:
			continue
		case DiskEdit, DiskRemove:
		default:
			return invalid(field, "%.40q is no operation on a disk", d.Op)
		}
		disk := vm.Disk(d.Key)
		if disk == nil {
			f := fault(task.InvalidDeviceSpec, "VM %q has no disk with the key %d", vm.Name, d.Key)
			f.Object, f.Name = vm.Ref, vm.Name
			return f
		}
		if seen[d.Key] {
			return invalid(field, "disk %s is changed twice in one request", disk.Path)
		}
		seen[d.Key] = true
		if d.CapacityBytes != 0 && d.CapacityBytes != disk.CapacityBytes && d.Op == DiskEdit {
			return fault(task.NotSupported, "disk %s cannot be resized yet; add another disk", disk.Path)
		}
		if d.Op == DiskRemove && disk.Converting != nil {
			return halfWay(vm, disk)
		}
	}
	return nil
}

// planDisks plans what is added and removed, and which profile each disk gets.
func (c *Center) planDisks(ctx context.Context, p Principal, vm *inventory.VM, spec *ReconfigureSpec, pl *planner, data *reconfigureData) error {
	if spec.Profile != nil {
		data.Profiles[""] = *spec.Profile
		for _, d := range pl.plan.Disks { // those that follow the VM
			if pl.changeOf(d.Key) == nil {
				data.Profiles[d.UUID] = *spec.Profile
			}
		}
	}
	count := len(vm.Disks)
	for i := range spec.Disks {
		change := &spec.Disks[i]
		switch change.Op {
		case DiskEdit:
			if change.Profile != nil {
				data.Profiles[vm.Disk(change.Key).UUID] = *change.Profile
			}
		case DiskRemove:
			data.Remove = append(data.Remove, vm.Disk(change.Key).UUID)
			if len(data.Remove) > 1 && data.Delete != change.Destroy {
				return fault(task.NotSupported, "disks whose files stay and disks whose files go cannot be removed in one request; use two")
			}
			data.Delete = change.Destroy
		case DiskAdd:
			if count++; count > maxDisks {
				return invalid("deviceChange", "a VM has at most %d disks", maxDisks)
			}
			if change.Path != "" {
				a, err := c.planAttach(ctx, p, vm, change, pl)
				if err != nil {
					return err
				}
				data.Attach = append(data.Attach, *a)
				continue
			}
			if n := change.CapacityBytes; n <= 0 || n > maxCapacity || n%512 != 0 {
				return invalid(fmt.Sprintf("deviceChange[%d]", i), "a new disk has %d bytes; a disk has a multiple of 512, up to 62 TiB", n)
			}
			slot, err := pl.newDisk(change, fmt.Sprintf("add-%d", i))
			if err != nil {
				return err
			}
			disk := inventory.Disk{UUID: uuid.NewString(), CapacityBytes: change.CapacityBytes, Controller: change.Controller, Thick: change.Thick}
			if change.Profile != nil {
				disk.Profile = *change.Profile
			} else if slot != "" {
				disk.Profile = vm.Profile
			}
			data.Add, data.AddSlots = append(data.Add, disk), append(data.AddSlots, slot)
		}
	}
	return nil
}

// planAttach looks at an existing disk: an encrypted one cannot go into a VM in
// clear (E6), and its key belongs to whom the key belongs.
func (c *Center) planAttach(ctx context.Context, p Principal, vm *inventory.VM, change *DiskChange, pl *planner) (*attachDisk, error) {
	name, file, err := parsePath(change.Path)
	if err != nil {
		return nil, err
	}
	ds, err := c.datastoreNamed(name)
	if err != nil {
		return nil, err
	}
	if err := c.Check(p, authz.DatastoreBrowse, ds.Ref); err != nil {
		return nil, err
	}
	mount, err := c.mountName(ds.Ref, vm.Host)
	if err != nil {
		return nil, err
	}
	if err := c.mustReach(vm.Host, "attaching a disk"); err != nil {
		return nil, err
	}
	_, client, err := c.links.wait(ctx, vm.Host, time.Second, "attaching a disk")
	if err != nil {
		return nil, err
	}
	h, _ := inventory.Lookup[inventory.Host](c.view, vm.Host)
	info, err := client.InspectDisk(ctx, &hostapi.InspectDiskRequest{Datastore: mount, Path: file})
	if err != nil {
		return nil, hostFault(h, vm, fmt.Sprintf("reading disk %s", change.Path), err)
	}
	var other *inventory.VM
	inventory.Each(c.view, func(o *inventory.VM) bool {
		if slices.ContainsFunc(o.Disks, func(d inventory.Disk) bool { return d.UUID == info.Uuid }) {
			other = o
		}
		return other == nil
	})
	if other != nil {
		f := fault(task.InvalidDeviceSpec, "disk %s belongs to VM %q; remove it there first", change.Path, other.Name)
		f.MessageKey, f.Object, f.Name = "msg.hostd.deviceSpec.enc.sharedBacking", other.Ref, other.Name
		return nil, f
	}
	if info.Encrypted {
		if !pl.plan.Final {
			return nil, plainVM("disk " + change.Path)
		}
		if id := keyID(info.KeyId); id != nil {
			if err := c.mayName(p, *id, vm.Ref); err != nil {
				return nil, err
			}
			pl.plan.Send = append(pl.plan.Send, *id)
		}
	}
	return &attachDisk{UUID: info.Uuid, Datastore: mount, Path: file, Controller: change.Controller}, nil
}

// planRest plans name, hardware and the vMotion setting.
func (c *Center) planRest(p Principal, vm *inventory.VM, spec *ReconfigureSpec, data *reconfigureData) error {
	if spec.Name != "" && spec.Name != vm.Name {
		if err := checkVMName(spec.Name); err != nil {
			return err
		}
		data.Name = spec.Name
	}
	if err := checkMigrate(spec.MigrateEncryption, data.Crypto.Final); err != nil {
		return err
	}
	if data.Migrate = spec.MigrateEncryption; data.Crypto.Final && !vm.Encrypted {
		data.Migrate = inventory.MigrateRequired // V3, and it stays so after decryption
	}
	if err := checkHardware(spec.Hardware); err != nil {
		return err
	}
	h, s := vm.Hardware, spec.Hardware
	setIf(&h.MemoryMiB, s.MemoryMiB)
	setIf(&h.CPUs, s.CPUs)
	setIf(&h.Firmware, s.Firmware)
	setIf(&h.GuestOS, s.GuestOS)
	setIf(&h.Annotation, s.Annotation)
	if s.NICs != nil {
		for _, old := range vm.Hardware.NICs {
			if !slices.ContainsFunc(s.NICs, func(n inventory.NIC) bool { return n.Key == old.Key }) {
				return fault(task.NotSupported, "network card %d of VM %q cannot be removed yet; connect it to another network instead", old.Key, vm.Name)
			}
		}
		host, ok := inventory.Lookup[inventory.Host](c.view, vm.Host)
		if !ok {
			return c.mustReach(vm.Host, "changing network cards")
		}
		var err error
		if h.NICs, err = c.planNICs(p, host, s.NICs); err != nil {
			return err
		}
	}
	if !sameHardware(h, vm.Hardware) {
		data.Hardware = &h
	}
	return nil
}

func setIf[T comparable](to *T, v T) {
	var zero T
	if v != zero {
		*to = v
	}
}

func sameHardware(a, b inventory.Hardware) bool {
	return slices.Equal(a.NICs, b.NICs) && a.MemoryMiB == b.MemoryMiB && a.CPUs == b.CPUs && a.Firmware == b.Firmware && a.GuestOS == b.GuestOS && a.Annotation == b.Annotation
}

// mayReconfigure checks every privilege that the plan needs.
func (c *Center) mayReconfigure(p Principal, vm *inventory.VM, spec *ReconfigureSpec, data *reconfigureData) error {
	need := map[string]bool{}
	kinds := []string{data.Crypto.Home}
	for _, d := range data.Crypto.Disks {
		kinds = append(kinds, d.Kind)
	}
	for _, k := range kinds {
		switch k {
		case inventory.ConvertEncrypt:
			need[authz.CryptoEncrypt] = true
		case inventory.ConvertDecrypt:
			need[authz.CryptoDecrypt] = true
		case inventory.ConvertShallow, inventory.ConvertDeep:
			need[authz.CryptoRecrypt] = true
		}
	}
	if need[authz.CryptoEncrypt] {
		if host, ok := inventory.Lookup[inventory.Host](c.view, vm.Host); ok {
			if err := c.mayMakeSafe(p, host); err != nil {
				return err
			}
		}
	}
	if spec.Crypto.Kind == CryptoRegister {
		need[authz.CryptoRegisterVM] = true
	}
	if len(data.Add) > 0 {
		need[authz.VMAddNewDisk] = true
	}
	if len(data.Attach) > 0 {
		need[authz.VMAddExistingDisk] = true
	}
	if len(data.Add)+len(data.Attach) > 0 && data.Crypto.Final {
		need[authz.CryptoAddDisk] = true
	}
	if len(data.Remove) > 0 {
		need[authz.VMRemoveDisk] = true
	}
	if len(data.Profiles) > 0 {
		need[authz.VMEditDevice] = true
	}
	if data.Name != "" {
		need[authz.VMRename] = true
	}
	if data.Migrate != vm.MigrateEncryption && spec.MigrateEncryption != "" {
		need[authz.VMSettings] = true
	}
	if h := data.Hardware; h != nil {
		need[authz.VMMemory] = need[authz.VMMemory] || h.MemoryMiB != vm.Hardware.MemoryMiB
		need[authz.VMCPUCount] = need[authz.VMCPUCount] || h.CPUs != vm.Hardware.CPUs
		need[authz.VMSettings] = need[authz.VMSettings] || h.Firmware != vm.Hardware.Firmware || h.GuestOS != vm.Hardware.GuestOS
		need[authz.VMEditDevice] = need[authz.VMEditDevice] || !slices.Equal(h.NICs, vm.Hardware.NICs)
		need[authz.VMAnnotation] = need[authz.VMAnnotation] || h.Annotation != vm.Hardware.Annotation
	}
	for _, privilege := range authz.Privileges() { // in a stable order
		if need[privilege] {
			if err := c.Check(p, privilege, vm.Ref); err != nil {
				return err
			}
		}
	}
	// An empty change still needs the right to make one.
	if len(need) == 0 {
		return c.Check(p, authz.VMSettings, vm.Ref)
	}
	return nil
}

// checkPower refuses what a running VM cannot have done to it. Its disks change
// under it in every way (R1, R2), and its files when the guest has none of them
// open, which is so with a BIOS; of others only the KEK changes.
func (d *reconfigureData) checkPower(vm *inventory.VM) error {
	if vm.Power == inventory.PoweredOff {
		return nil
	}
	doing := ""
	switch {
	case d.Crypto.Home == "" || d.Crypto.Home == inventory.ConvertShallow:
	case vm.Power != inventory.PoweredOn:
		doing = "the " + d.Crypto.Home
	case vm.Hardware.Firmware == "efi":
		doing = "the " + d.Crypto.Home + " of VM files, of which an EFI guest has its firmware's variables open,"
	}
	if len(d.Add)+len(d.Attach)+len(d.Remove) > 0 {
		doing = "adding and removing disks"
	}
	if h := d.Hardware; h != nil {
		n := *h
		n.Annotation = vm.Hardware.Annotation
		if !sameHardware(n, vm.Hardware) {
			doing = "changing hardware"
		}
	}
	if doing != "" {
		return wrongPower(vm, inventory.PoweredOff, doing)
	}
	return nil
}

// rewrites tells whether disks are converted.
func (d *reconfigureData) rewrites() bool {
	return slices.ContainsFunc(d.Crypto.Disks, func(p diskPlan) bool { return p.Kind != inventory.ConvertShallow })
}

// touchesHost tells whether the VM's files change.
func (d *reconfigureData) touchesHost() bool {
	return d.Crypto.Home != "" || len(d.Crypto.Disks) > 0 || d.Name != "" || d.Hardware != nil || len(d.Add)+len(d.Attach)+len(d.Remove) > 0
}
