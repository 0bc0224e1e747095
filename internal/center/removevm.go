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

// UnregisterVM takes a VM out of the inventory and leaves its files. Its keys
// leave the host's cache where nothing else uses them (K9), and stay at the KMS.
func (c *Center) UnregisterVM(ctx context.Context, p Principal, ref Ref) error {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return err
	}
	if err := c.Check(p, authz.VMUnregister, ref); err != nil {
		return err
	}
	if vm.Power != inventory.PoweredOff && !vm.Orphaned {
		return wrongPower(vm, inventory.PoweredOff, "unregistering")
	}
	spec := task.Spec{Name: "VirtualMachine.unregister", Entity: ref, User: p.User, Locks: lockVM(ref)}
	return c.tasks.Do(ctx, spec, func(ctx context.Context, run *task.Run) error {
		if err := run.Reached(ctx, "unregister"); err != nil {
			return err
		}
		if _, client, ok := c.links.connected(vm.Host); ok {
			if r, err := c.vmRef(vm); err == nil {
				// A host that fails here wipes the keys when dropKeys reaches it.
				_, err = client.Release(ctx, &hostapi.PowerRequest{Header: c.header(run.Operation()), Ref: r})
				if f, _ := hostapi.AsFault(err); err != nil && f.Kind == hostapi.Fault_WRONG_POWER_STATE {
					return hostFault(&inventory.Host{Entity: inventory.Entity{Ref: vm.Host, Name: string(vm.Host)}}, vm, "unregistering", err)
				}
			}
		}
		if err := c.forget(ctx, vm, c.known.Put(vm.UUID, remember(vm))); err != nil {
			return err
		}
		c.removed(ctx, run, vm, "unregistered")
		return nil
	})
}

// forget deletes a VM's record and claims. When they are gone already it does
// nothing.
func (c *Center) forget(ctx context.Context, vm *inventory.VM, more ...store.Op) error {
	for {
		e, err := c.inv.VMs.Get(ctx, string(vm.Ref))
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return storeFault("removing the VM from the inventory", err)
		}
		ops := append(slices.Clone(more), c.inv.VMs.Delete(e.Key, e.Revision))
		for _, claim := range claimsOf(&e.Value) {
			owner, taken, err := c.inv.Owner(ctx, claim)
			if err != nil {
				return storeFault("removing the VM from the inventory", err)
			}
			if taken && owner == vm.Ref {
				ops = append(ops, c.inv.Release(claim))
			}
		}
		err = c.inv.Commit(ctx, ops...)
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrNotFound) {
			return storeFault("removing the VM from the inventory", err)
		}
	}
}

// claimsOf lists what is claimed for a VM.
func claimsOf(vm *inventory.VM) []inventory.Claim {
	return []inventory.Claim{inventory.ClaimName(vm.Parent, vm.Name), inventory.ClaimUUID(vm.UUID), inventory.ClaimPath(vm.Datastore, path.Dir(vm.Path))}
}

// removed wipes a gone VM's keys from its host's cache and says which keys
// nothing needs any more: their deletion is a deliberate, separate act (K9).
func (c *Center) removed(ctx context.Context, run *task.Run, vm *inventory.VM, how string) {
	if vm.Host != "" {
		c.dropKeys(ctx, vm.Host, vm.UUID, vm.Keys())
	}
	c.events.Post(ctx, Event{Type: event.VMRemoved, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Message: fmt.Sprintf("VM %q was %s", vm.Name, how)})
	var unused []KeyID
	for _, id := range vm.Keys() {
		if len(c.vmsUsing(id)) == 0 && len(c.hostsUsing(id)) == 0 {
			unused = append(unused, id)
		}
	}
	if len(unused) > 0 {
		c.events.Post(ctx, Event{Type: event.KeyOrphaned, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Keys: unused,
			Message: fmt.Sprintf("%s used by VM %q only. It stays at the key provider, for backups; delete it there when none is left", were(len(unused), "key"), vm.Name)})
	}
}

type destroyData struct {
	VM    inventory.VM `json:"vm"` // as it was
	Begun bool         `json:"begun,omitempty"`
}

// DestroyVM deletes a VM and its files. Its keys stay at the KMS (K9).
func (c *Center) DestroyVM(ctx context.Context, p Principal, ref Ref) (Ref, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return "", err
	}
	if err := c.Check(p, authz.VMDelete, ref); err != nil {
		return "", err
	}
	if vm.Power != inventory.PoweredOff {
		return "", wrongPower(vm, inventory.PoweredOff, "deleting")
	}
	if err := c.mustReach(vm.Host, "deleting a VM"); err != nil {
		return "", err
	}
	return c.tasks.Submit(ctx, task.Spec{Type: taskDestroy, Name: "VirtualMachine.destroy", Entity: ref, User: p.User, Locks: lockVM(ref), Data: destroyData{VM: *vm}})
}

// destroyVM is the task.
func (c *Center) destroyVM(ctx context.Context, run *task.Run) error {
	var data destroyData
	if err := run.Load(&data); err != nil {
		return err
	}
	vm := &data.VM
	if now, ok := inventory.Lookup[inventory.VM](c.view, vm.Ref); ok {
		vm = now
	} else if !data.Begun {
		f := fault(task.NotFound, "VM %q has been removed meanwhile", vm.Name)
		f.Object = vm.Ref
		return f
	}
	if !data.Begun {
		data.Begun = true
		if err := run.Save(ctx, "begin", data); err != nil {
			return err
		}
	}
	var left []string
	err := c.onHost(ctx, vm.Host, "deleting a VM", func(_ *link, h *inventory.Host, client hostapi.HostClient) error {
		ref, err := c.vmRef(vm)
		if err != nil {
			return err
		}
		// Whatever is in the folder now, only this VM is deleted.
		info, err := client.InspectVM(ctx, &hostapi.InspectVMRequest{Ref: &hostapi.VMRef{Datastore: ref.Datastore, Path: ref.Path}})
		if f, _ := hostapi.AsFault(err); err != nil && f.Kind == hostapi.Fault_NOT_FOUND {
			return nil
		}
		if err == nil && info.GetRef().GetUuid() != vm.UUID {
			return fault(task.GenericVMConfig, "%s holds another VM (%s) than the inventory says; unregister VM %q instead of deleting it", vm.Path, info.GetRef().GetUuid(), vm.Name)
		}
		// A VMX that cannot be read is the host's to judge: it deletes what is
		// certainly the VM's.
		reply, err := client.DeleteVM(ctx, &hostapi.PowerRequest{Header: c.header(run.Operation()), Ref: ref})
		if f, _ := hostapi.AsFault(err); err != nil && f.Kind == hostapi.Fault_NOT_FOUND {
			return nil
		}
		left = reply.GetLeftBehind()
		return hostFault(h, vm, fmt.Sprintf("deleting VM %q", vm.Name), err)
	})
	if err != nil {
		return err
	}
	if err := run.Reached(ctx, "forget"); err != nil {
		return err
	}
	if err := c.forget(ctx, vm); err != nil {
		return err
	}
	c.removed(ctx, run, vm, "deleted")
	if len(left) > 0 {
		c.events.Post(ctx, Event{Type: event.HostAlarm, Severity: event.Warning, Entity: vm.Host, Task: run.Ref(),
			Message: fmt.Sprintf("Files that are not of VM %q were left in its folder %s: %s", vm.Name, path.Dir(vm.Path), trim(strings.Join(left, ", "), 500))})
	}
	return nil
}
