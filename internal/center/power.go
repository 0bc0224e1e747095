package center

import (
	"context"
	"fmt"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

type powerOp string

const (
	powerOn  powerOp = "powerOn"
	powerOff powerOp = "powerOff"
	reset    powerOp = "reset"
)

type powerData struct {
	Op   powerOp `json:"op"`
	Sent bool    `json:"sent,omitempty"` // the command may have reached the host
}

// PowerOn starts a VM. The host's key cache is asked first; what it lacks is
// fetched by id. A VM whose configuration key cannot be had is locked, and says
// why (K6, K8).
func (c *Center) PowerOn(ctx context.Context, p Principal, vm Ref) (Ref, error) {
	return c.submitPower(ctx, p, vm, powerOn, authz.VMPowerOn, inventory.PoweredOff, "powering on")
}

// PowerOff pulls a VM's plug.
func (c *Center) PowerOff(ctx context.Context, p Principal, vm Ref) (Ref, error) {
	return c.submitPower(ctx, p, vm, powerOff, authz.VMPowerOff, inventory.PoweredOn, "powering off")
}

// Reset restarts a VM without asking its guest.
func (c *Center) Reset(ctx context.Context, p Principal, vm Ref) (Ref, error) {
	return c.submitPower(ctx, p, vm, reset, authz.VMReset, inventory.PoweredOn, "resetting")
}

func (c *Center) submitPower(ctx context.Context, p Principal, ref Ref, op powerOp, privilege string, need inventory.PowerState, doing string) (Ref, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return "", err
	}
	if err := c.Check(p, privilege, ref); err != nil {
		return "", err
	}
	if vm.Power != need {
		return "", wrongPower(vm, need, doing)
	}
	if err := c.mustReach(vm.Host, doing); err != nil {
		return "", err
	}
	return c.tasks.Submit(ctx, task.Spec{Type: taskPower, Name: "VirtualMachine." + string(op), Entity: ref, User: p.User,
		Locks: lockVM(ref), Cancelable: op == powerOn, Data: powerData{Op: op}})
}

// powerVM is the task.
func (c *Center) powerVM(ctx context.Context, run *task.Run) error {
	var data powerData
	if err := run.Load(&data); err != nil {
		return err
	}
	vm, err := c.vmOfTask(run)
	if err != nil {
		return err
	}
	switch data.Op {
	case powerOn:
		return c.runPowerOn(ctx, run, vm, &data)
	case powerOff, reset:
		return c.runPowerOff(ctx, run, vm, &data)
	}
	return fault(task.NotSupported, "this version of center knows no power operation %q", data.Op)
}

// vmOfTask reads the VM that a task works on, as it is now.
func (c *Center) vmOfTask(run *task.Run) (*inventory.VM, error) {
	vm, ok := inventory.Lookup[inventory.VM](c.view, run.Entity())
	if !ok {
		f := fault(task.NotFound, "VM %s has been removed meanwhile", run.Entity())
		f.Object = run.Entity()
		return nil, f
	}
	return vm, nil
}

func (c *Center) runPowerOn(ctx context.Context, run *task.Run, vm *inventory.VM, data *powerData) error {
	for _, d := range vm.Disks {
		if d.Encrypted && !vm.Encrypted && vm.Converting == nil {
			return plainVM("disk " + d.Path) // the inventory itself forbids it (E6)
		}
	}
	err := c.onHost(ctx, vm.Host, "powering on", func(l *link, h *inventory.Host, client hostapi.HostClient) error {
		// When the answer to an earlier try was lost, the host's report tells.
		now, err := c.vmOfTask(run)
		if err != nil {
			return err
		}
		if data.Sent && now.Power == inventory.PoweredOn {
			return nil
		}
		if err := c.keysForPowerOn(ctx, run, now, h, client); err != nil {
			return err
		}
		if !data.Sent {
			data.Sent = true
			if err := run.Save(ctx, "send", data); err != nil {
				return err
			}
		}
		run.Progress(ctx, "starting the guest on host "+h.Name, 0, 0)
		ref, err := c.vmRef(now)
		if err != nil {
			return err
		}
		mark := l.runtimeMark(vm.UUID)
		info, err := client.PowerOn(ctx, &hostapi.PowerRequest{Header: c.header(run.Operation()), Ref: ref})
		if err != nil {
			return hostFault(h, vm, fmt.Sprintf("powering on VM %q", vm.Name), err)
		}
		return c.afterPower(ctx, l, mark, vm.Ref, info)
	})
	if err != nil {
		c.foreignKeys(ctx, vm, err)
		return err
	}
	c.events.Post(ctx, Event{Type: event.VMPoweredOn, User: run.User(), Entity: vm.Ref, Task: run.Ref(),
		Message: fmt.Sprintf("VM %q is powered on, on host %s", vm.Name, c.names([]Ref{vm.Host}, 1))})
	return nil
}

// keysForPowerOn gets onto the host what the VM needs to start. That the VM's
// configuration key cannot be had locks the VM; a missing key of one disk only
// fails the power-on, by name (K6).
func (c *Center) keysForPowerOn(ctx context.Context, run *task.Run, vm *inventory.VM, h *inventory.Host, client hostapi.HostClient) error {
	if len(vm.Keys()) == 0 {
		return nil
	}
	if h.CryptoState == inventory.HostIncapable {
		return c.ensureSafe(ctx, h.Ref, client) // says why
	}
	run.Progress(ctx, "checking keys", 0, 0)
	why := fmt.Sprintf("VM %q is powered on", vm.Name)
	if vm.KeyID != nil {
		err := c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, []KeyID{*vm.KeyID}, why)
		if err != nil && lockable(err) {
			c.lock(ctx, vm.Ref, err)
			f := *task.AsFault(err)
			f.Message = fmt.Sprintf("VM %q is locked: %s", vm.Name, f.Message)
			return f.Because(err)
		}
		if err != nil {
			return err
		}
		c.unlock(ctx, vm.Ref)
	}
	for _, d := range vm.Disks {
		if d.KeyID == nil && d.Converting == nil {
			continue
		}
		var ids []KeyID
		if d.KeyID != nil {
			ids = append(ids, *d.KeyID)
		}
		if d.Converting != nil && d.Converting.Target != nil {
			ids = append(ids, *d.Converting.Target)
		}
		if err := c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, ids, why); err != nil {
			f := *task.AsFault(err)
			f.Message = fmt.Sprintf("disk %s of VM %q: %s", d.Path, vm.Name, f.Message)
			return f.Because(err)
		}
	}
	return nil
}

func (c *Center) runPowerOff(ctx context.Context, run *task.Run, vm *inventory.VM, data *powerData) error {
	err := c.onHost(ctx, vm.Host, "powering off", func(l *link, h *inventory.Host, client hostapi.HostClient) error {
		now, err := c.vmOfTask(run)
		if err != nil {
			return err
		}
		if data.Sent && data.Op == powerOff && now.Power == inventory.PoweredOff {
			return nil
		}
		if !data.Sent {
			data.Sent = true
			if err := run.Save(ctx, "send", data); err != nil {
				return err
			}
		}
		ref, err := c.vmRef(now)
		if err != nil {
			return err
		}
		request := &hostapi.PowerRequest{Header: c.header(run.Operation()), Ref: ref}
		mark := l.runtimeMark(vm.UUID)
		var info *hostapi.VMInfo
		if data.Op == reset {
			info, err = client.Reset(ctx, request)
		} else {
			info, err = client.PowerOff(ctx, request)
		}
		if err != nil {
			return hostFault(h, vm, fmt.Sprintf("%s of VM %q", data.Op, vm.Name), err)
		}
		return c.afterPower(ctx, l, mark, vm.Ref, info)
	})
	if err == nil && data.Op == reset {
		c.events.Post(ctx, Event{Type: event.VMReset, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Message: fmt.Sprintf("VM %q was reset", vm.Name)})
	}
	return err
}

// afterPower records what a power operation's answer says.
func (c *Center) afterPower(ctx context.Context, l *link, mark uint64, ref Ref, info *hostapi.VMInfo) error {
	l.recording.Lock()
	defer l.recording.Unlock()
	was := inventory.PoweredOff
	vm, err := c.inv.EditVM(ctx, ref, func(vm *inventory.VM) error {
		was = vm.Power
		vm.Epoch = max(vm.Epoch, info.GetEpoch())
		l.runtimeAfter(mark, vm, info.GetRuntime())
		return nil
	})
	if err != nil {
		return storeFault("recording the VM's power state", err)
	}
	if was == inventory.PoweredOn && vm.Power == inventory.PoweredOff {
		c.events.Post(ctx, Event{Type: event.VMPoweredOff, Entity: ref, Message: fmt.Sprintf("VM %q is powered off", vm.Name)})
	}
	return nil
}

// ShutdownGuest asks a VM's guest to shut down, and does not wait for it.
func (c *Center) ShutdownGuest(ctx context.Context, p Principal, ref Ref) error {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return err
	}
	if err := c.Check(p, authz.VMPowerOff, ref); err != nil {
		return err
	}
	if vm.Power != inventory.PoweredOn {
		return wrongPower(vm, inventory.PoweredOn, "shutting down the guest")
	}
	if err := c.mustReach(vm.Host, "shutting down the guest"); err != nil {
		return err
	}
	spec := task.Spec{Name: "VirtualMachine.shutdownGuest", Entity: ref, User: p.User, Locks: lockVM(ref)}
	return c.tasks.Do(ctx, spec, func(ctx context.Context, run *task.Run) error {
		r, err := c.vmRef(vm)
		if err != nil {
			return err
		}
		return c.onHost(ctx, vm.Host, "shutting down the guest", func(_ *link, h *inventory.Host, client hostapi.HostClient) error {
			_, err := client.Shutdown(ctx, &hostapi.PowerRequest{Header: c.header(run.Operation()), Ref: r})
			if err == nil {
				c.events.Post(ctx, Event{Type: event.VMGuestShutdown, User: p.User, Entity: ref, Message: fmt.Sprintf("The guest of VM %q was asked to shut down", vm.Name)})
			}
			return hostFault(h, vm, fmt.Sprintf("shutting down the guest of VM %q", vm.Name), err)
		})
	})
}
