package center

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
)

// vmByUUID finds a VM by its uuid.bios; nil if there is none.
func (c *Center) vmByUUID(uuid string) *inventory.VM {
	if uuid == "" {
		return nil
	}
	ref, ok := c.inv.PeekOwner(inventory.ClaimUUID(uuid))
	if !ok {
		return nil
	}
	vm, _ := inventory.Lookup[inventory.VM](c.view, ref)
	return vm
}

// vmChanged takes over what a host says of a VM while it is placed there.
func (l *link) vmChanged(ctx context.Context, r *hostapi.VMRuntime) {
	l.recording.Lock()
	defer l.recording.Unlock()
	l.mu.Lock()
	l.events[r.GetUuid()]++
	l.mu.Unlock()
	vm := l.c.vmByUUID(r.GetUuid())
	if vm == nil || vm.Host != l.host {
		if r.GetPower() == hostapi.PowerState_POWERED_ON {
			l.stranger(ctx, vm, r)
		}
		return
	}
	if err := l.c.setRuntime(ctx, vm.Ref, r); err != nil && ctx.Err() == nil {
		l.c.log.Warn("a VM's state could not be recorded", "vm", vm.Ref, "error", err)
	}
}

// stranger is a guest that runs where the inventory knows nothing of it.
func (l *link) stranger(ctx context.Context, vm *inventory.VM, r *hostapi.VMRuntime) {
	message := fmt.Sprintf("A VM %s runs on the host that is not in the inventory; register it, or power it off on the host", r.GetUuid())
	if vm != nil {
		message = fmt.Sprintf("VM %q runs on this host although it is placed on %s; power one of them off", vm.Name, vm.Host)
	}
	l.c.events.Post(ctx, Event{Type: event.HostAlarm, Severity: event.Warning, Entity: l.host, Message: message})
}

// unreported marks the VMs of which the host, having reported all that it
// holds, said nothing: they do not run.
func (l *link) unreported(ctx context.Context, reported map[string]bool) {
	inventory.Each(l.c.view, func(vm *inventory.VM) bool {
		if vm.Host == l.host && !reported[vm.UUID] {
			l.vmChanged(ctx, &hostapi.VMRuntime{Uuid: vm.UUID, Power: hostapi.PowerState_POWERED_OFF})
		}
		return ctx.Err() == nil
	})
}

// setRuntime writes what changes about a VM without anybody reconfiguring it.
// Whether it is locked is not the host's to say: see lock and unlock.
func (c *Center) setRuntime(ctx context.Context, ref Ref, r *hostapi.VMRuntime) error {
	var before, after inventory.VM
	change := func(vm *inventory.VM) {
		before = *vm
		applyRuntime(vm, r)
		after = *vm
	}
	if err := editIfChanged(ctx, c, c.inv.VMs, ref, change); err != nil {
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		return err
	}
	if after.PausedOnError && !before.PausedOnError {
		c.events.Post(ctx, Event{Type: event.HostAlarm, Severity: event.Error, Entity: ref,
			Message: fmt.Sprintf("VM %q is paused: %s", after.Name, after.Problem)})
	}
	if before.Power == inventory.PoweredOn && after.Power == inventory.PoweredOff {
		c.events.Post(ctx, Event{Type: event.VMPoweredOff, Entity: ref, Message: fmt.Sprintf("VM %q is powered off", after.Name)})
	}
	return nil
}

func applyRuntime(vm *inventory.VM, r *hostapi.VMRuntime) {
	switch r.GetPower() {
	case hostapi.PowerState_POWERED_OFF:
		vm.Power = inventory.PoweredOff
	case hostapi.PowerState_POWERED_ON:
		vm.Power = inventory.PoweredOn
	case hostapi.PowerState_SUSPENDED:
		vm.Power = inventory.Suspended
	}
	vm.BootTime = time.Time{}
	if r.GetBootTimeUnix() != 0 && vm.Power == inventory.PoweredOn {
		vm.BootTime = time.Unix(r.BootTimeUnix, 0).UTC()
	}
	vm.PausedOnError, vm.Problem = r.GetPausedOnError(), trim(r.GetProblem(), 2000)
	missing := keyIDs(r.GetMissing())
	if !slices.Equal(missing, vm.MissingKeys) {
		vm.MissingKeys = missing
	}
}

// runtimeMark remembers how many reports of a VM were taken over, before a call
// that changes it.
func (l *link) runtimeMark(uuid string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events[uuid]
}

// runtimeAfter takes over the runtime in a call's answer unless a report of the
// VM has been taken over since mark: the report may be the newer one, and the
// next report corrects an older one. The caller holds recording until the record
// is written.
func (l *link) runtimeAfter(mark uint64, vm *inventory.VM, r *hostapi.VMRuntime) {
	if r != nil && l.runtimeMark(vm.UUID) == mark {
		applyRuntime(vm, r)
	}
}

func keyIDs(list []*hostapi.KeyID) []KeyID {
	var ids []KeyID
	for _, k := range list {
		ids = append(ids, KeyID{Provider: k.GetProvider(), Key: k.GetKey()})
	}
	return ids
}

func keyID(k *hostapi.KeyID) *KeyID {
	if k == nil {
		return nil
	}
	return &KeyID{Provider: k.GetProvider(), Key: k.GetKey()}
}

func wireKeyID(k *KeyID) *hostapi.KeyID {
	if k == nil {
		return nil
	}
	return &hostapi.KeyID{Provider: k.Provider, Key: k.Key}
}

// cloneVM is a copy of vm that may be changed.
func cloneVM(vm *inventory.VM) *inventory.VM {
	n := *vm
	n.Disks = slices.Clone(vm.Disks)
	n.Snapshots = slices.Clone(vm.Snapshots)
	n.Hardware.NICs = slices.Clone(vm.Hardware.NICs)
	return &n
}
