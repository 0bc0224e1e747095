package center

import (
	"context"
	"fmt"

	"mortise/internal/authz"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// CryptoUnlock tries again to get a locked VM's keys onto its host.
func (c *Center) CryptoUnlock(ctx context.Context, p Principal, ref Ref) (Ref, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return "", err
	}
	if err := c.Check(p, authz.CryptoRegisterVM, ref); err != nil {
		return "", err
	}
	if !vm.Encrypted {
		f := fault(task.NotSupported, "VM %q is not encrypted; there is nothing to unlock", vm.Name)
		f.Object, f.Name = ref, vm.Name
		return "", f
	}
	if err := c.mustReach(vm.Host, "unlocking a VM"); err != nil {
		return "", err
	}
	return c.tasks.Submit(ctx, task.Spec{Type: taskUnlock, Name: "VirtualMachine.cryptoUnlock", Entity: ref, User: p.User, Locks: lockVM(ref), Cancelable: true, Data: struct{}{}})
}

// unlockVM is the task.
func (c *Center) unlockVM(ctx context.Context, run *task.Run) error {
	vm, err := c.vmOfTask(run)
	if err != nil {
		return err
	}
	if vm.KeyID == nil {
		return nil // decrypted meanwhile
	}
	return c.onHost(ctx, vm.Host, "unlocking a VM", func(_ *link, h *inventory.Host, client hostapi.HostClient) error {
		why := fmt.Sprintf("VM %q is unlocked", vm.Name)
		if err := c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, []KeyID{*vm.KeyID}, why); err != nil {
			if lockable(err) {
				c.lock(ctx, vm.Ref, err)
			}
			return err
		}
		c.unlock(ctx, vm.Ref)
		return c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, vm.Keys(), why)
	})
}
