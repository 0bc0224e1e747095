package center

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/secret"
	"mortise/internal/task"
)

// uses says which keys a host needs, and for which VMs (by UUID); a host key is
// for none.
type uses map[KeyID][]string

func (u uses) add(id KeyID, vm string) {
	if vm == "" {
		u[id] = u[id][:len(u[id]):len(u[id])]
	} else if !slices.Contains(u[id], vm) {
		u[id] = append(u[id], vm)
	}
}

// ids lists the keys, sorted.
func (u uses) ids() []KeyID {
	var ids []KeyID
	for id := range u {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b KeyID) int { return compare(a.String(), b.String()) })
	return ids
}

// header is in every command to a host.
func (c *Center) header(operation string) *hostapi.Header {
	return &hostapi.Header{OperationId: operation, Term: c.term}
}

// push fetches keys by id from their providers and sends them to a host in one
// message. Keys that cannot be had are in failed, with the reason; the others
// are sent all the same. Every copy of center's is cleared before push returns
// (K2). why is for the event: each push is one.
func (c *Center) push(ctx context.Context, host *inventory.Host, client hostapi.HostClient, operation string, need uses, why string) (failed map[KeyID]error, err error) {
	keys, failed := c.fetch(ctx, need.ids())
	defer func() {
		for _, k := range keys {
			k.Wipe()
		}
	}()
	if len(keys) == 0 {
		return failed, nil
	}
	request := &hostapi.PushKeysRequest{Header: c.header(operation)}
	defer func() {
		for _, k := range request.Keys {
			clear(k.Bytes)
		}
	}()
	var sent []KeyID
	for _, id := range need.ids() {
		if k := keys[id]; k != nil {
			k.Use(func(b []byte) {
				request.Keys = append(request.Keys, &hostapi.KEK{Id: wireKeyID(&id), Bytes: slices.Clone(b), VmUuids: need[id]})
			})
			sent = append(sent, id)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if _, err := client.PushKeys(ctx, request); err != nil {
		err = hostFault(host, nil, "sending keys", err)
		c.events.Post(ctx, Event{Type: event.SendKeyError, Severity: event.Error, Entity: host.Ref, Keys: sent,
			Message: fmt.Sprintf("%s not sent to host %q: %v", were(len(sent), "key"), host.Name, err)})
		return failed, err
	}
	c.events.Post(ctx, Event{Type: event.KeyPushed, Entity: host.Ref, Keys: sent,
		Message: fmt.Sprintf("%s sent to host %q: %s", were(len(sent), "key"), host.Name, why)})
	return failed, nil
}

// fetch gets keys by id, several at a time. The caller wipes them.
func (c *Center) fetch(ctx context.Context, ids []KeyID) (keys map[KeyID]*secret.Key, failed map[KeyID]error) {
	keys, failed = map[KeyID]*secret.Key{}, map[KeyID]error{}
	var mu sync.Mutex
	var group sync.WaitGroup
	for _, id := range ids {
		group.Go(func() {
			k, err := c.providers.kek(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed[id] = err
				return
			}
			keys[id] = k
		})
	}
	group.Wait()
	return keys, failed
}

// ensureKeys makes sure that a host holds keys for a VM: its cache is asked
// first (K8: with the key there, nobody needs the KMS), what is missing is
// fetched and sent. The error is that of the first key that cannot be had.
func (c *Center) ensureKeys(ctx context.Context, host *inventory.Host, client hostapi.HostClient, operation, uuid string, ids []KeyID, why string) error {
	need := uses{}
	for _, id := range ids {
		need.add(id, uuid)
	}
	if err := c.subtractHeld(ctx, host, client, need); err != nil || len(need) == 0 {
		return err
	}
	failed, err := c.push(ctx, host, client, operation, need, why)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := failed[id]; err != nil {
			return err
		}
	}
	return nil
}

// subtractHeld takes from need what the host holds already.
func (c *Center) subtractHeld(ctx context.Context, host *inventory.Host, client hostapi.HostClient, need uses) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	held, err := client.ListKeys(ctx, &hostapi.ListKeysRequest{})
	if err != nil {
		return hostFault(host, nil, "asking for the keys", err)
	}
	for _, k := range held.GetKeys() {
		id := *keyID(k.GetId())
		vms, needed := need[id]
		if !needed {
			continue
		}
		vms = slices.DeleteFunc(vms, func(vm string) bool { return slices.Contains(k.GetVmUuids(), vm) })
		if need[id] = vms; len(vms) == 0 {
			delete(need, id)
		}
	}
	return nil
}

const (
	firstKeyRetry = 2 * time.Second
	lastKeyRetry  = time.Minute
)

// keepKeys brings the host's cache to what the inventory says, when the host
// has reported, and again while something is missing or whenever it is woken.
// Running VMs are not hindered meanwhile (K8).
func (l *link) keepKeys(ctx context.Context, client hostapi.HostClient) {
	pause := firstKeyRetry
	for ctx.Err() == nil {
		complete, err := l.syncKeys(ctx, client)
		if err != nil && ctx.Err() == nil {
			l.c.log.Warn("keys of a host could not be synchronised", "host", l.host, "error", err)
		}
		var retry <-chan time.Time
		if !complete || err != nil {
			timer := time.NewTimer(pause)
			defer timer.Stop()
			retry = timer.C
			pause = min(2*pause, lastKeyRetry)
		} else {
			pause = firstKeyRetry
		}
		select {
		case <-retry:
		case <-l.wake:
			pause = firstKeyRetry
		case <-ctx.Done():
		}
	}
}

// wakeKeys has the keys of every connected host synchronised now.
func (s *links) wakeKeys() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.byHost {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// syncKeys wipes what waits to be wiped, sends in one batch every key that the
// host's VMs need and it lacks, and settles which of the VMs are locked.
func (l *link) syncKeys(ctx context.Context, client hostapi.HostClient) (complete bool, err error) {
	c := l.c
	if err := c.replayRemovals(ctx, l.host, client); err != nil {
		return false, err
	}
	host, ok := inventory.Lookup[inventory.Host](c.view, l.host)
	if !ok {
		return true, nil
	}
	need, vms := uses{}, []*inventory.VM{}
	if host.HostKey != nil {
		need.add(*host.HostKey, "")
	}
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		if vm.Host == l.host && len(vm.Keys()) > 0 {
			vms = append(vms, vm)
			for _, id := range vm.Keys() {
				need.add(id, vm.UUID)
			}
		}
		return true
	})
	if len(need) == 0 {
		return true, nil
	}
	if err := c.subtractHeld(ctx, host, client, need); err != nil {
		return false, err
	}
	failed := map[KeyID]error{}
	if len(need) > 0 {
		if failed, err = c.push(ctx, host, client, "", need, "needed by VMs placed there"); err != nil {
			return false, err
		}
	}
	c.dropOvertaken(ctx, l.host, need)
	for _, vm := range vms {
		if vm.KeyID == nil {
			continue
		}
		if err := failed[*vm.KeyID]; err != nil {
			c.lock(ctx, vm.Ref, err)
		} else {
			c.unlock(ctx, vm.Ref)
		}
	}
	if len(failed) > 0 {
		c.reportFailed(ctx, host, failed)
		return false, nil
	}
	return true, editIfChanged(ctx, c, c.inv.Hosts, l.host, func(h *inventory.Host) {
		if h.Connection == inventory.Connected {
			h.Problem = ""
		}
	})
}

// dropOvertaken wipes what was sent for a VM that was removed, or lost the key,
// while the keys were on their way.
func (c *Center) dropOvertaken(ctx context.Context, host Ref, sent uses) {
	for id, uuids := range sent {
		for _, uuid := range uuids {
			if vm := c.vmByUUID(uuid); vm == nil || vm.Host != host || !slices.Contains(vm.Keys(), id) {
				c.dropKeys(ctx, host, uuid, []KeyID{id})
			}
		}
	}
}

// reportFailed says once for each try which keys cannot be had, and why.
func (c *Center) reportFailed(ctx context.Context, host *inventory.Host, failed map[KeyID]error) {
	need := uses{}
	var why []string
	for id, err := range failed {
		need.add(id, "")
		if !slices.Contains(why, err.Error()) {
			why = append(why, err.Error())
		}
	}
	slices.Sort(why)
	if len(why) > 3 {
		why = append(why[:3], fmt.Sprintf("and %d more reasons", len(why)-3))
	}
	message := fmt.Sprintf("%s not sent that VMs on host %q need: %s", were(len(failed), "key"), host.Name, strings.Join(why, "; "))
	_, err := c.inv.EditHost(ctx, host.Ref, func(h *inventory.Host) error {
		if h.Problem == message {
			return errSaid
		}
		h.Problem = message
		return nil
	})
	if err != nil {
		return // said before, or nobody can be told
	}
	c.events.Post(ctx, Event{Type: event.SendKeyError, Severity: event.Error, Entity: host.Ref, Keys: need.ids(), Message: message})
}

var errSaid = errors.New("said already")

// lock records that a VM's configuration key is not on its host, and why (K6).
func (c *Center) lock(ctx context.Context, ref Ref, why error) {
	kind := event.VMLockedHost
	switch f := task.AsFault(why); f.Kind {
	case task.KeyRequired, task.KeyState:
		kind = event.VMLockedKMS
	case task.ProviderDown, task.ProviderError:
		kind = event.VMLockedCluster
	}
	reason := trim(why.Error(), 1000)
	vm, err := c.inv.EditVM(ctx, ref, func(vm *inventory.VM) error {
		if !vm.Encrypted || vm.CryptoState == inventory.Locked && vm.LockedReason == reason {
			return errSaid
		}
		vm.CryptoState, vm.LockedReason = inventory.Locked, reason
		return nil
	})
	if err == nil {
		c.events.Post(ctx, Event{Type: kind, Severity: event.Error, Entity: ref, Keys: []KeyID{*vm.KeyID},
			Message: fmt.Sprintf("VM %q is locked: %s", vm.Name, reason)})
	}
}

// unlock records that a VM's configuration key is on its host.
func (c *Center) unlock(ctx context.Context, ref Ref) {
	was := ""
	vm, err := c.inv.EditVM(ctx, ref, func(vm *inventory.VM) error {
		if was = vm.CryptoState; !vm.Encrypted || was == inventory.Unlocked {
			return errSaid
		}
		vm.CryptoState, vm.LockedReason = inventory.Unlocked, ""
		return nil
	})
	if err == nil && was == inventory.Locked {
		c.events.Post(ctx, Event{Type: event.VMUnlocked, Entity: ref, Message: fmt.Sprintf("VM %q is unlocked", vm.Name)})
	}
}

// dropKeys ends a VM's use of keys in a host's cache; the host wipes what
// nobody else uses (K9). A host that is away does it when it is back.
func (c *Center) dropKeys(ctx context.Context, host Ref, uuid string, keys []KeyID) {
	if len(keys) == 0 {
		return
	}
	_, err := c.inv.EditHost(ctx, host, func(h *inventory.Host) error {
		for _, k := range keys {
			if u := (inventory.KeyUse{Key: k, VMUUID: uuid}); !slices.Contains(h.RemoveKeys, u) {
				h.RemoveKeys = append(h.RemoveKeys, u)
			}
		}
		return nil
	})
	if err != nil {
		c.log.Warn("keys to wipe could not be recorded", "host", host, "vm", uuid, "error", err)
		return
	}
	if _, client, ok := c.links.connected(host); ok {
		if err := c.replayRemovals(ctx, host, client); err != nil {
			c.log.Info("keys will be wiped when the host is back", "host", host, "error", err)
		}
	}
}

// replayRemovals has a host wipe what waits to be wiped. A use that exists again
// meanwhile is left alone.
func (c *Center) replayRemovals(ctx context.Context, ref Ref, client hostapi.HostClient) error {
	host, ok := inventory.Lookup[inventory.Host](c.view, ref)
	if !ok || len(host.RemoveKeys) == 0 {
		return nil
	}
	byVM := map[string][]*hostapi.KeyID{}
	var removed []KeyID
	for _, u := range host.RemoveKeys {
		if vm := c.vmByUUID(u.VMUUID); vm != nil && vm.Host == ref && slices.Contains(vm.Keys(), u.Key) {
			continue
		}
		byVM[u.VMUUID] = append(byVM[u.VMUUID], wireKeyID(&u.Key))
		removed = append(removed, u.Key)
	}
	for uuid, keys := range byVM {
		cctx, cancel := context.WithTimeout(ctx, answerTime)
		_, err := client.RemoveKeys(cctx, &hostapi.RemoveKeysRequest{Header: c.header(""), Keys: keys, VmUuid: uuid})
		cancel()
		if err != nil {
			return hostFault(host, nil, "removing keys", err)
		}
	}
	_, err := c.inv.EditHost(ctx, ref, func(h *inventory.Host) error {
		h.RemoveKeys = slices.DeleteFunc(h.RemoveKeys, func(u inventory.KeyUse) bool { return slices.Contains(host.RemoveKeys, u) })
		return nil
	})
	if len(removed) > 0 && err == nil {
		c.events.Post(ctx, Event{Type: event.KeyRemoved, Entity: ref, Keys: removed,
			Message: fmt.Sprintf("%s removed from host %q", were(len(removed), "key use"), host.Name)})
	}
	return err
}

// ensureSafe gives a host its host key when the first encrypted VM arrives (H1).
// A host that cannot be made safe refuses encrypted VMs, and says why.
func (c *Center) ensureSafe(ctx context.Context, ref Ref, client hostapi.HostClient) error {
	host, ok := inventory.Lookup[inventory.Host](c.view, ref)
	if !ok {
		return fault(task.NotFound, "host %s has been removed", ref)
	}
	switch host.CryptoState {
	case inventory.HostSafe:
		return nil
	case inventory.HostIncapable:
		f := fault(task.InvalidState, "host %q cannot hold encrypted VMs: %s", host.Name, strings.Join(host.CryptoReasons, "; "))
		f.Object = ref
		return f
	}
	provider, ok, err := c.defaultProvider(ctx, ref)
	if err != nil {
		return err
	}
	if !ok {
		return noDefault(host.Entity)
	}
	// The operation id names the host: whatever cuts this off, the next try
	// finds the same key.
	id, err := c.providers.newKEK(ctx, provider, "mortise-host-key-"+host.UUID, keyTag{Name: "x-Component", Value: "Mortise host"}, keyTag{Name: "x-Name", Value: host.Name})
	if err != nil {
		return err
	}
	host, err = c.inv.EditHost(ctx, ref, func(h *inventory.Host) error {
		if h.HostKey == nil {
			h.HostKey = &id
		}
		h.CryptoState = inventory.HostSafe
		return nil
	})
	if err != nil {
		return storeFault("recording the host key", err)
	}
	c.events.Post(ctx, Event{Type: event.HostCryptoEnabled, Entity: ref, Keys: []KeyID{id}, Message: fmt.Sprintf("Host %q is safe: it has a host key", host.Name)})
	failed, err := c.push(ctx, host, client, "", uses{id: nil}, "its host key")
	return errors.Join(err, failed[id])
}
