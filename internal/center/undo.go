package center

import (
	"context"
	"fmt"
	"slices"
	"time"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// cancelReconfigure ends a change that was cancelled after the host began with it:
// what was done is taken back, under a running guest too, and the VM is as it was.
// When all was done but the host's answer, it is too late, and the change counts.
// data.Failed says how it ended; it can be called again in a later process.
func (c *Center) cancelReconfigure(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) error {
	if !data.Undo && !data.Late {
		run.Progress(ctx, "cancelling", 0, 0)
		late, err := c.tooLate(ctx, run, vm, data)
		if err != nil {
			return c.notTakenBack(ctx, run, vm, data, err)
		}
		data.Late, data.Undo = late, !late
		if err := run.Undo(ctx, data); err != nil {
			return err
		}
	}
	if data.Late {
		return c.reconfigure(ctx, run, vm, data)
	}
	info, at, mark, err := c.changeOnHost(ctx, run, vm, data)
	if err == nil {
		err = data.checkUndone(vm, info)
	}
	if run.Stopping(ctx) {
		return err
	}
	if err != nil {
		return c.notTakenBack(ctx, run, vm, data, err)
	}
	data.Begun = false // nothing is left of it
	data.Failed = c.canceled(run)
	at.recording.Lock()
	err = c.saveVM(ctx, run, "undone", data, vm.Ref, func(n *inventory.VM) error {
		takeInfo(n, info)
		takeCrypto(n, info)
		n.Converting = nil
		at.runtimeAfter(mark, n, info.GetRuntime())
		return nil
	})
	at.recording.Unlock()
	if err != nil {
		return err
	}
	c.events.Post(ctx, Event{Type: event.VMReconfigured, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Keys: vm.Keys(),
		Message: fmt.Sprintf("A change of VM %q was cancelled and taken back", vm.Name)})
	return c.failedReconfigure(ctx, run, vm, data)
}

func (c *Center) canceled(run *task.Run) *Fault {
	f := fault(task.Canceled, "%s was cancelled", run.What())
	f.Object = run.Entity()
	return f
}

// notTakenBack ends a cancelled change that could not be taken back. What is half
// way keeps its notes and its keys.
func (c *Center) notTakenBack(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData, err error) error {
	if run.Stopping(ctx) {
		return err
	}
	data.Failed = c.canceled(run)
	data.Failed.Message += fmt.Sprintf(", and could not be taken back: %v", err)
	if err := run.Save(ctx, "failed", data); err != nil {
		return err
	}
	return c.failedReconfigure(ctx, run, vm, data)
}

// tooLate tells whether a change that was cancelled has nothing left to stop: all
// encryption is as it was to be, or disks were removed, which comes after it.
func (c *Center) tooLate(ctx context.Context, run *task.Run, vm *inventory.VM, data *reconfigureData) (late bool, err error) {
	err = c.onHost(ctx, vm.Host, "cancelling", func(*link, *inventory.Host, hostapi.HostClient) error {
		now, err := c.vmOfTask(run)
		if err != nil {
			return err
		}
		info, err := c.inspect(ctx, now)
		if err != nil {
			return err
		}
		late = data.reached(now, info)
		return nil
	})
	return late, err
}

func (d *reconfigureData) reached(vm *inventory.VM, info *hostapi.VMInfo) bool {
	for _, id := range d.Remove {
		if !slices.ContainsFunc(info.Disks, func(o *hostapi.DiskInfo) bool { return o.Uuid == id }) {
			return true
		}
	}
	if d.Crypto.Home == "" && len(d.Crypto.Disks) == 0 || len(d.Remove) > 0 {
		return false
	}
	return d.checkResult(vm, info) == nil && !slices.ContainsFunc(info.Disks, func(o *hostapi.DiskInfo) bool { return o.Conversion != "" })
}

// takeBack makes of a request for the change one for undoing it. vm is the record,
// which says until the end what everything was.
func (d *reconfigureData) takeBack(r *hostapi.ReconfigureVMRequest, vm *inventory.VM) {
	before := func(encrypted bool, key *KeyID) *hostapi.Before {
		b := &hostapi.Before{Encrypted: encrypted}
		if encrypted {
			b.Key = wireKeyID(key)
		}
		return b
	}
	r.Undo, r.HomeBefore = true, before(vm.Encrypted, vm.KeyID)
	for _, change := range r.Disks {
		for _, disk := range vm.Disks {
			if disk.UUID == change.DiskUuid {
				change.Before = before(disk.Encrypted, disk.KeyID)
			}
		}
	}
	r.RemoveDiskUuids, r.DeleteRemoved = nil, false
	if r.Hardware != nil {
		r.Hardware = wireHardware(vm.Hardware)
	}
	if r.Name != "" {
		r.Name = vm.Name
	}
}

// checkUndone compares what the host says after undoing with the record, which
// takes nothing over that is less encrypted than it was.
func (d *reconfigureData) checkUndone(vm *inventory.VM, info *hostapi.VMInfo) error {
	wrong := func(what string) error {
		return fault(task.Internal, "host says that VM %q is as it was, but %s; see the VM's log on the host", vm.Name, what)
	}
	is := func(encrypted bool, key *KeyID, now bool, id *hostapi.KeyID) bool {
		return encrypted == now && (!encrypted || id != nil && key != nil && *keyID(id) == *key)
	}
	if !is(vm.Encrypted, vm.KeyID, info.Encrypted, info.Key) {
		return wrong("its files are in another form, or have another key")
	}
	for _, disk := range info.Disks {
		i := slices.IndexFunc(vm.Disks, func(o inventory.Disk) bool { return o.UUID == disk.Uuid })
		planned := slices.ContainsFunc(d.Crypto.Disks, func(p diskPlan) bool { return p.UUID == disk.Uuid })
		switch {
		case i < 0 || disk.Conversion == "" && is(vm.Disks[i].Encrypted, vm.Disks[i].KeyID, disk.Encrypted, disk.KeyId):
		case planned || vm.Disks[i].Converting == nil:
			return wrong("disk " + disk.Path + " is in another form, or has another key")
		}
	}
	return nil
}

// lead tells the host the task's pace, whenever it is another than the one that the
// call began with, until ctx ends.
func (c *Center) lead(ctx context.Context, run *task.Run, vm *hostapi.VMRef, client hostapi.HostClient, told task.Pace) {
	for {
		pace, changed := run.Pace()
		var again <-chan time.Time
		if pace != told {
			_, err := client.SetPace(ctx, &hostapi.PaceRequest{Header: c.header(run.Operation()), Ref: vm, Pace: wirePace(pace)})
			if err == nil {
				told = pace
				continue
			}
			again = time.After(busyPause) // the host may not have begun
		}
		select {
		case <-changed:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

func wirePace(p task.Pace) *hostapi.Pace {
	return &hostapi.Pace{LimitBytesPerSecond: p.Limit, Paused: p.Paused}
}
