package center

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
	"mortise/internal/task"
)

// checkResult compares what the host says with what it was asked for: the
// inventory takes nothing over that is less encrypted than it should be.
func (d *reconfigureData) checkResult(vm *inventory.VM, info *hostapi.VMInfo) error {
	wrong := func(what string) error {
		return fault(task.Internal, "host says it is done with VM %q, but %s; see the VM's log on the host", vm.Name, what)
	}
	want := func(kind, slot string, encrypted bool, key *hostapi.KeyID) string {
		switch {
		case kind == "":
		case encrypted != (kind != inventory.ConvertDecrypt):
			return fmt.Sprintf("encrypted is %v after the %s", encrypted, kind)
		case encrypted && *keyID(key) != *d.Crypto.Keys.id(slot):
			return fmt.Sprintf("the key is %s after the %s", keyID(key), kind)
		}
		return ""
	}
	if info.Encrypted && info.Key == nil || info.Encrypted != d.Crypto.endsEncrypted(vm) {
		return wrong(fmt.Sprintf("its files are encrypted: %v", info.Encrypted))
	}
	if w := want(d.Crypto.Home, d.Crypto.Slot, info.Encrypted, info.Key); w != "" {
		return wrong(w)
	}
	for _, disk := range info.Disks {
		planned := diskPlan{}
		for _, p := range d.Crypto.Disks {
			if p.UUID == disk.Uuid {
				planned = p
			}
		}
		if disk.Encrypted && disk.KeyId == nil {
			return wrong("disk " + disk.Path + " has no key")
		}
		if w := want(planned.Kind, planned.Slot, disk.Encrypted, disk.KeyId); w != "" {
			return wrong("of disk " + disk.Path + " " + w)
		}
		if planned.Kind == "" {
			i := slices.IndexFunc(vm.Disks, func(o inventory.Disk) bool { return o.UUID == disk.Uuid })
			if i >= 0 && vm.Disks[i].Encrypted && !disk.Encrypted && vm.Disks[i].Converting == nil {
				return wrong("disk " + disk.Path + " is not encrypted any more")
			}
		}
	}
	for i, add := range d.Add {
		j := slices.IndexFunc(info.Disks, func(o *hostapi.DiskInfo) bool { return o.Uuid == add.UUID })
		if j < 0 || info.Disks[j].Encrypted != (d.AddSlots[i] != "") {
			return wrong("a new disk is missing or in another form")
		}
	}
	return nil
}

// endsEncrypted tells whether the VM files are encrypted when the plan is done.
func (p *cryptoPlan) endsEncrypted(vm *inventory.VM) bool {
	switch p.Home {
	case inventory.ConvertDecrypt:
		return false
	case "":
		return vm.Encrypted
	}
	return true
}

// failedReconfigure finds out how far the host came: what is done is recorded as
// done, what was not begun as untouched, and what is half way stays noted, with
// both keys, so that asking again finishes it (R3, R4).
func (c *Center) failedReconfigure(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) error {
	why := data.Failed
	if data.Name != "" {
		c.releaseName(ctx, vm, data.Name)
	}
	if data.Begun {
		if err := c.takeStock(ctx, vm.Ref, true); err != nil {
			c.log.Warn("how far a VM's change came is not known yet", "vm", vm.Ref, "error", err)
		}
	}
	now, ok := inventory.Lookup[inventory.VM](c.view, vm.Ref)
	if ok && why.Kind == task.Canceled && hasNotes(now) {
		why.Message += "; what is half way stays usable, and asking for the same again finishes it"
	}
	if ok {
		tried := append(slices.Clone(data.Old), data.Crypto.Keys.ids()...)
		c.dropKeys(ctx, now.Host, now.UUID, slices.DeleteFunc(tried, func(k KeyID) bool { return k.Key == "" || slices.Contains(now.Keys(), k) }))
	}
	c.orphaned(ctx, run, vm.Ref, data.Crypto.Keys, why)
	switch {
	case why.Kind == task.NoDiskSpace && len(data.Crypto.Disks) > 0:
		c.events.Post(ctx, Event{Type: event.NoDiskSpace, Severity: event.Error, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Message: why.Error()})
	case len(data.Crypto.Keys) > 0 && why.Kind != task.Canceled:
		c.events.Post(ctx, Event{Type: event.RekeyFail, Severity: event.Error, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Message: why.Error()})
	}
	return why
}

// releaseName gives back the name that a VM was to have.
func (c *Center) releaseName(ctx context.Context, vm *inventory.VM, name string) {
	now, ok := inventory.Lookup[inventory.VM](c.view, vm.Ref)
	if ok && now.Name == name {
		return
	}
	claim := inventory.ClaimName(vm.Parent, name)
	owner, taken, err := c.inv.Owner(ctx, claim)
	if err == nil && taken && owner == vm.Ref {
		err = c.inv.Commit(ctx, c.inv.Release(claim))
	}
	if err != nil {
		c.log.Warn("the new name of a VM is still taken", "vm", vm.Ref, "name", name, "error", err)
	}
}

// settleNotes looks anew at what an earlier change left half way, when the host
// could perhaps not be asked, or was still at it.
func (c *Center) settleNotes(ctx context.Context, vm *inventory.VM) *inventory.VM {
	if !hasNotes(vm) {
		return vm
	}
	if err := c.takeStock(ctx, vm.Ref, false); err != nil {
		c.log.Info("a VM's unfinished change could not be looked at", "vm", vm.Ref, "error", err)
	}
	if now, ok := inventory.Lookup[inventory.VM](c.view, vm.Ref); ok {
		return now
	}
	return vm
}

// settleHost does so for every VM of a host that has come back.
func (c *Center) settleHost(ctx context.Context, host Ref) {
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		if vm.Host == host {
			c.settleNotes(ctx, vm)
		}
		return ctx.Err() == nil
	})
}

func hasNotes(vm *inventory.VM) bool {
	return vm.Converting != nil || vm.SnapshotsChanging || slices.ContainsFunc(vm.Disks, func(d inventory.Disk) bool { return d.Converting != nil })
}

// takeStock reads a VM's folder, after a change was broken off, and clears the
// notes of everything that is wholly in one form or the other. mine says that
// the caller's task has the VM; otherwise a VM that a task works on is left
// alone. What was read is written only onto the record that it was read for: a
// task that begins meanwhile makes notes that are not to be cleared.
func (c *Center) takeStock(ctx context.Context, ref Ref, mine bool) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	for {
		e, err := c.inv.VMs.Get(ctx, string(ref))
		if err != nil {
			return storeFault("reading the VM's record", err)
		}
		if _, locked := c.tasks.Locked(string(ref)); locked && !mine {
			return nil
		}
		vm := cloneVM(&e.Value)
		info, err := c.inspect(ctx, vm)
		if err != nil {
			return err
		}
		stockOf(vm, info)
		err = c.inv.Commit(ctx, c.inv.VMs.Update(e.Key, e.Revision, *vm))
		if !errors.Is(err, store.ErrConflict) {
			return storeFault("recording how far the change came", err)
		}
	}
}

// inspect has its host read a VM's folder.
func (c *Center) inspect(ctx context.Context, vm *inventory.VM) (*hostapi.VMInfo, error) {
	h, _ := inventory.Lookup[inventory.Host](c.view, vm.Host)
	_, client, up := c.links.connected(vm.Host)
	if h == nil {
		return nil, c.mustReach(vm.Host, "reading the VM")
	}
	if !up {
		return nil, hostDown(h, "reading the VM")
	}
	r, err := c.vmRef(vm)
	if err != nil {
		return nil, err
	}
	info, err := client.InspectVM(ctx, &hostapi.InspectVMRequest{Ref: r})
	if err != nil {
		return nil, hostFault(h, vm, fmt.Sprintf("reading VM %q", vm.Name), err)
	}
	if info.GetRef().GetUuid() != vm.UUID {
		return nil, fault(task.GenericVMConfig, "folder %s holds another VM than %q; restore it from a backup", path.Dir(vm.Path), vm.Name)
	}
	return info, nil
}

// stockOf decides for each note in vm by what the folder says.
func stockOf(vm *inventory.VM, info *hostapi.VMInfo) {
	if c := vm.Converting; c != nil {
		if done, begun := stock(c, vm.KeyID, info.Encrypted, info.Key, ""); done {
			vm.Encrypted, vm.KeyID, vm.Epoch, vm.Converting = info.Encrypted, keyID(info.Key), info.Epoch, nil
			if !vm.Encrypted {
				vm.KeyID, vm.CryptoState, vm.LockedReason = nil, "", ""
			} else {
				vm.CryptoState, vm.MigrateEncryption = inventory.Unlocked, inventory.MigrateRequired
			}
		} else if !begun {
			vm.Converting = nil
		}
	}
	var disks []inventory.Disk
	for _, d := range vm.Disks {
		i := slices.IndexFunc(info.Disks, func(o *hostapi.DiskInfo) bool { return o.Uuid == d.UUID })
		if c := d.Converting; c != nil {
			switch {
			case c.Kind == inventory.DiskAdding || c.Kind == inventory.DiskRemoving:
				if i < 0 {
					continue // it was not added, or is gone
				}
				if c.Kind == inventory.DiskAdding {
					takeDiskCrypto(&d, info.Disks[i])
				}
				d.Converting = nil
			case i < 0: // its descriptor is gone: nothing to decide by
			default:
				done, begun := stock(c, d.KeyID, info.Disks[i].Encrypted, info.Disks[i].KeyId, info.Disks[i].Conversion)
				if done {
					takeDiskCrypto(&d, info.Disks[i])
				} else if !begun {
					d.Converting = nil
				}
			}
		}
		disks = append(disks, d)
	}
	vm.Disks = disks
	known := slices.DeleteFunc(slices.Clone(info.Disks), func(o *hostapi.DiskInfo) bool {
		return !slices.ContainsFunc(vm.Disks, func(d inventory.Disk) bool { return d.UUID == o.Uuid })
	})
	if len(known) == len(vm.Disks) { // else the folder is not as it should be: leave the record as it is
		copied := &hostapi.VMInfo{Hardware: info.Hardware, SizeBytes: info.SizeBytes, Disks: known,
			Snapshots: info.Snapshots, CurrentSnapshot: info.CurrentSnapshot, ConsolidationNeeded: info.ConsolidationNeeded}
		takeInfo(vm, copied)
		vm.SnapshotsChanging = false
	}
}

// stock tells of one conversion whether it is done, and if not, whether it was
// begun. converting is what the folder says is under way.
func stock(c *inventory.Conversion, old *KeyID, encrypted bool, key *hostapi.KeyID, converting string) (done, begun bool) {
	if converting != "" {
		return false, true
	}
	is := func(k *KeyID) bool { return key != nil && k != nil && *keyID(key) == *k }
	switch c.Kind {
	case inventory.ConvertEncrypt:
		return encrypted && is(c.Target), false
	case inventory.ConvertDecrypt:
		return !encrypted, false
	case inventory.ConvertDeep:
		return encrypted && is(c.Target), false
	case inventory.ConvertShallow:
		// Until only the new key is left both may be in the key safe.
		return encrypted && is(c.Target), true
	}
	return false, true
}
