package vimapi

import (
	"context"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/inventory"
)

// vmMethods change VMs and what they are in.
func vmMethods() []method {
	return []method{
		row("Folder", "CreateVM_Task", "", (*call).createVM),
		row("Folder", "RegisterVM_Task", "", (*call).registerVM).small(),
		row("VirtualMachine", "ReconfigVM_Task", "", (*call).reconfigureVM),
		row("VirtualMachine", "PowerOnVM_Task", authz.VMPowerOn, (*call).powerOn).small(),
		row("VirtualMachine", "PowerOffVM_Task", authz.VMPowerOff, (*call).powerOff).small(),
		row("VirtualMachine", "ResetVM_Task", authz.VMReset, (*call).resetVM).small(),
		row("VirtualMachine", "ShutdownGuest", authz.VMPowerOff, (*call).shutdownGuest).small(),
		row("VirtualMachine", "CryptoUnlock_Task", authz.CryptoRegisterVM, (*call).cryptoUnlock).small(),
		row("VirtualMachine", "UnregisterVM", authz.VMUnregister, (*call).unregisterVM).small(),
		row("Datacenter", "PowerOnMultiVM_Task", "", (*call).powerOnMulti).small(),
		row("ManagedEntity", "Destroy_Task", "", (*call).destroyEntity).small(),
		row("ManagedEntity", "Rename_Task", "", (*call).renameEntity).small(),
	}
}

func (c *call) createVM(q *types.CreateVM_Task) (*types.CreateVM_TaskResponse, error) {
	spec, err := c.createSpec(q)
	if err != nil {
		return nil, err
	}
	t, err := c.s.center.CreateVM(c.ctx, c.principal(), spec)
	return &types.CreateVM_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) registerVM(q *types.RegisterVM_Task) (*types.RegisterVM_TaskResponse, error) {
	if q.AsTemplate {
		return nil, notSupported("templates are not supported; register %q as a VM", clip(q.Path))
	}
	t, err := c.register(q.This, q.Path, q.Name, q.Pool, q.Host, false)
	return &types.RegisterVM_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) reconfigureVM(q *types.ReconfigVM_Task) (*types.ReconfigVM_TaskResponse, error) {
	vm, spec, err := c.changeOf(q.This, &q.Spec)
	if err != nil {
		return nil, err
	}
	t, err := c.s.center.ReconfigureVM(c.ctx, c.principal(), vm.Ref, spec)
	return &types.ReconfigVM_TaskResponse{Returnval: moref(t)}, err
}

// changeOf reads what is to change of a VM that the caller may see.
func (c *call) changeOf(m types.ManagedObjectReference, conf *types.VirtualMachineConfigSpec) (*inventory.VM, center.ReconfigureSpec, error) {
	vm, ok := inventory.Lookup[inventory.VM](c.s.view, ref(m))
	if !ok {
		return nil, center.ReconfigureSpec{}, objectNotFound(m)
	}
	if err := c.s.auth.Check(c.principal(), authz.View, vm.Ref); err != nil {
		return nil, center.ReconfigureSpec{}, err
	}
	spec, err := c.reconfigureSpec(vm, conf)
	return vm, spec, err
}

func (c *call) powerOn(q *types.PowerOnVM_Task) (*types.PowerOnVM_TaskResponse, error) {
	if host := optionalRef(q.Host); host != "" {
		if vm, ok := inventory.Lookup[inventory.VM](c.s.view, ref(q.This)); ok && vm.Host != host {
			return nil, notSupported("VM %q is on another host than %s; powering on does not move it", vm.Name, describe(*q.Host))
		}
	}
	t, err := c.s.center.PowerOn(c.ctx, c.principal(), ref(q.This))
	return &types.PowerOnVM_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) powerOff(q *types.PowerOffVM_Task) (*types.PowerOffVM_TaskResponse, error) {
	t, err := c.s.center.PowerOff(c.ctx, c.principal(), ref(q.This))
	return &types.PowerOffVM_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) resetVM(q *types.ResetVM_Task) (*types.ResetVM_TaskResponse, error) {
	t, err := c.s.center.Reset(c.ctx, c.principal(), ref(q.This))
	return &types.ResetVM_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) shutdownGuest(q *types.ShutdownGuest) (*types.ShutdownGuestResponse, error) {
	return &types.ShutdownGuestResponse{}, c.s.center.ShutdownGuest(c.ctx, c.principal(), ref(q.This))
}

func (c *call) cryptoUnlock(q *types.CryptoUnlock_Task) (*types.CryptoUnlock_TaskResponse, error) {
	t, err := c.s.center.CryptoUnlock(c.ctx, c.principal(), ref(q.This))
	return &types.CryptoUnlock_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) unregisterVM(q *types.UnregisterVM) (*types.UnregisterVMResponse, error) {
	return &types.UnregisterVMResponse{}, c.s.center.UnregisterVM(c.ctx, c.principal(), ref(q.This))
}

// powerOnMulti powers several VMs on, each with a task of its own; the answer's
// task tells which were begun.
func (c *call) powerOnMulti(q *types.PowerOnMultiVM_Task) (*types.PowerOnMultiVM_TaskResponse, error) {
	p := c.principal()
	vms := q.Vm
	t, err := c.background("Datacenter.powerOnVm", q.This, func(ctx context.Context) (any, error) {
		res := &types.ClusterPowerOnVmResult{}
		for _, vm := range vms {
			t, err := c.s.center.PowerOn(ctx, p, ref(vm))
			if err != nil {
				res.NotAttempted = append(res.NotAttempted, types.ClusterNotAttemptedVmInfo{Vm: vm, Fault: localized(err)})
				continue
			}
			res.Attempted = append(res.Attempted, types.ClusterAttemptedVmInfo{Vm: vm, Task: reference(t)})
		}
		return res, nil
	})
	return &types.PowerOnMultiVM_TaskResponse{Returnval: t}, err
}

// destroyEntity deletes a VM with its files, or removes a host.
func (c *call) destroyEntity(q *types.Destroy_Task) (*types.Destroy_TaskResponse, error) {
	p := c.principal()
	switch id := ref(q.This); id.Kind() {
	case inventory.KindVM:
		t, err := c.s.center.DestroyVM(c.ctx, p, id)
		return &types.Destroy_TaskResponse{Returnval: moref(t)}, err
	case inventory.KindHost:
		t, err := c.background("HostSystem.destroy", q.This, func(ctx context.Context) (any, error) {
			return nil, c.s.center.RemoveHost(ctx, p, id)
		})
		return &types.Destroy_TaskResponse{Returnval: t}, err
	}
	return nil, notSupported("%s cannot be deleted", describe(q.This))
}

func (c *call) renameEntity(q *types.Rename_Task) (*types.Rename_TaskResponse, error) {
	id := ref(q.This)
	if id.Kind() != inventory.KindVM {
		return nil, notSupported("%s cannot be renamed", describe(q.This))
	}
	var spec types.VirtualMachineConfigSpec
	spec.Name = q.NewName
	if spec.Name == "" {
		return nil, invalidArgument("newName", "a VM needs a name")
	}
	res, err := c.reconfigureVM(&types.ReconfigVM_Task{This: q.This, Spec: spec})
	if err != nil {
		return nil, err
	}
	return &types.Rename_TaskResponse{Returnval: res.Returnval}, nil
}
