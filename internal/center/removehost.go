package center

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
	"mortise/internal/task"
)

// RemoveHost takes a host out of the inventory: center calls it no more, and its
// certificate is worth nothing. Its VMs stay as orphans. Because the machine has
// held their keys, the event lists what to deep recrypt should it not be trusted
// any more.
func (c *Center) RemoveHost(ctx context.Context, p Principal, ref Ref) error {
	host, err := lookup[inventory.Host](c, p, ref)
	if err != nil {
		return err
	}
	if err := c.Check(p, authz.HostRemove, ref); err != nil {
		return err
	}
	var vms, running, encrypted []*inventory.VM
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		if vm.Host != ref {
			return true
		}
		vms = append(vms, vm)
		if vm.Power != inventory.PoweredOff {
			running = append(running, vm)
		}
		if vm.AnyEncrypted() {
			encrypted = append(encrypted, vm)
		}
		return true
	})
	locks := []string{string(ref)}
	for _, vm := range vms {
		locks = append(locks, string(vm.Ref))
	}
	_, client, connected := c.links.connected(ref)
	if connected && len(running) > 0 {
		f := fault(task.ResourceInUse, "host %q runs VMs: %s; power them off first", host.Name, c.names(refsOf(running), 10))
		f.Object, f.Name = ref, host.Name
		return f
	}
	spec := task.Spec{Name: "HostSystem.destroy", Entity: ref, User: p.User, Locks: locks}
	return c.tasks.Do(ctx, spec, func(ctx context.Context, run *task.Run) error {
		if connected {
			c.wipeHost(ctx, host, client)
		}
		for _, vm := range vms {
			if _, err := c.inv.EditVM(ctx, vm.Ref, func(vm *inventory.VM) error {
				vm.Host, vm.Orphaned, vm.Problem = "", true, fmt.Sprintf("host %q was removed; unregister the VM and register it on another host", host.Name)
				return nil
			}); err != nil && !errors.Is(err, store.ErrNotFound) {
				return storeFault("marking the host's VMs", err)
			}
		}
		for _, ds := range host.Datastores {
			if err := c.unmounted(ctx, ref, ds); err != nil {
				return storeFault("detaching the host's datastores", err)
			}
		}
		if _, err := c.applyNetworks(ctx, host, nil); err != nil {
			return storeFault("detaching the host's networks", err)
		}
		if err := c.inv.Commit(ctx, c.inv.Hosts.Delete(string(ref), 0), c.inv.Release(inventory.ClaimName(host.Parent, host.Name))); err != nil {
			return storeFault("removing the host", err)
		}
		message := fmt.Sprintf("Host %q was removed", host.Name)
		if len(encrypted) > 0 {
			message += "; it has held keys of " + c.names(refsOf(encrypted), 50) + ": deep recrypt them if the machine is no longer trusted"
		}
		c.events.Post(ctx, Event{Type: event.HostRemoved, Severity: event.Warning, User: p.User, Entity: ref, Task: run.Ref(), Message: message})
		return nil
	})
}

func refsOf(vms []*inventory.VM) []Ref {
	var refs []Ref
	for _, vm := range vms {
		refs = append(refs, vm.Ref)
	}
	slices.Sort(refs)
	return refs
}

// wipeHost empties the key cache of a host that is leaving, as far as it
// answers.
func (c *Center) wipeHost(ctx context.Context, host *inventory.Host, client hostapi.HostClient) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	held, err := client.ListKeys(ctx, &hostapi.ListKeysRequest{})
	if err == nil && len(held.GetKeys()) > 0 {
		r := &hostapi.RemoveKeysRequest{Header: c.header("")}
		for _, k := range held.Keys {
			r.Keys = append(r.Keys, k.Id)
		}
		_, err = client.RemoveKeys(ctx, r)
	}
	if err != nil {
		c.log.Warn("the key cache of a host that leaves could not be emptied; restart it", "host", host.Name, "error", err)
	}
}
