package center

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/provider"
	"mortise/internal/store"
	"mortise/internal/task"
)

// SetDefaultProvider makes a provider the default of an entity and what is
// below it; an empty entity means everywhere. An empty id takes the entity's
// own default away (K5).
func (c *Center) SetDefaultProvider(ctx context.Context, p Principal, id string, entity Ref) error {
	at, key := inventory.RootFolder, globalDefault
	if entity != "" && entity != inventory.RootFolder {
		if _, ok := c.view.Get(entity); !ok {
			f := fault(task.NotFound, "there is no object %s to set a default key provider on", entity)
			f.Object = entity
			return f
		}
		at, key = entity, string(entity)
	}
	if err := c.Check(p, authz.CryptoManageKeyServers, at); err != nil {
		return err
	}
	if id == "" {
		_, err := c.store.Commit(ctx, c.providers.defaults.Delete(key, 0))
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return storeFault("removing the default provider", err)
		}
		return nil
	}
	e, err := c.providers.record(ctx, id)
	if err != nil {
		return err
	}
	// The provider must not be removed between the look and the write.
	_, err = c.store.Commit(ctx, c.providers.records.Unchanged(id, e.Revision), c.providers.defaults.Put(key, defaultRecord{Provider: id}))
	if err != nil {
		return storeFault("setting the default provider", err)
	}
	c.events.Post(ctx, Event{Type: event.ProviderChanged, User: p.User, Entity: at, Message: "Key provider " + id + " is the default here"})
	return nil
}

// DefaultProvider looks up the default along entity → parent → global; ok is
// false when there is none. exact asks for the entity's own only; an empty
// entity for the global one.
func (c *Center) DefaultProvider(ctx context.Context, p Principal, entity Ref, exact bool) (id string, ok bool, err error) {
	if err := c.Check(p, authz.CryptoReadKeyServersInfo, inventory.RootFolder); err != nil {
		return "", false, err
	}
	if exact {
		key := globalDefault
		if entity != "" && entity != inventory.RootFolder {
			key = string(entity)
		}
		return c.defaultOf(ctx, key)
	}
	return c.defaultProvider(ctx, entity)
}

// defaultProvider is the look-up itself. A VM has two ways up, its folder and
// its host; the host's cluster is asked first, as vSphere does.
func (c *Center) defaultProvider(ctx context.Context, entity Ref) (id string, ok bool, err error) {
	var path []Ref
	up := func(at Ref) {
		for n := 0; at != "" && n < 64; n++ {
			path = append(path, at)
			at, _ = c.view.Parent(at)
		}
	}
	if vm, isVM := inventory.Lookup[inventory.VM](c.view, entity); isVM {
		path = append(path, vm.Ref)
		up(vm.Host)
	}
	up(entity)
	for _, at := range path {
		if at == inventory.RootFolder {
			continue
		}
		if id, ok, err = c.defaultOf(ctx, string(at)); err != nil || ok {
			return id, ok, err
		}
	}
	return c.defaultOf(ctx, globalDefault)
}

func (c *Center) defaultOf(ctx context.Context, key string) (string, bool, error) {
	e, err := c.providers.defaults.Get(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return "", false, nil
	}
	if err != nil {
		return "", false, storeFault("reading the default provider", err)
	}
	return e.Value.Provider, true, nil
}

func noDefault(e inventory.Entity) *Fault {
	f := fault(task.ProviderError, "no key provider is named, and there is no default one for %q; add one (provider add) or set the default (provider default)", e.Name)
	f.Object = e.Ref
	return f
}

// GenerateKey makes a key that nothing uses yet, at a provider or the default
// one, and returns its id.
func (c *Center) GenerateKey(ctx context.Context, p Principal, name string) (KeyID, error) {
	if err := c.Check(p, authz.CryptoManageKeys, inventory.RootFolder); err != nil {
		return KeyID{}, err
	}
	if name == "" {
		id, ok, err := c.defaultOf(ctx, globalDefault)
		if err != nil {
			return KeyID{}, err
		}
		if !ok {
			return KeyID{}, noDefault(inventory.Entity{Ref: inventory.RootFolder, Name: "Datacenters"})
		}
		name = id
	}
	id, err := c.providers.newKEK(ctx, name, "mortise-key-"+uuid.NewString())
	if err != nil {
		c.events.Post(ctx, Event{Type: event.KeyGenerateFail, Severity: event.Error, User: p.User, Entity: inventory.RootFolder, Message: "A key could not be made: " + err.Error()})
		return KeyID{}, err
	}
	c.events.Post(ctx, Event{Type: event.KeyGenerated, User: p.User, Entity: inventory.RootFolder, Keys: []KeyID{id}, Message: "Key " + id.String() + " was made"})
	return id, nil
}

// QueryKeys tells of each key its state and who needs it (K12). Hosts that do
// not answer within seconds are left out.
func (c *Center) QueryKeys(ctx context.Context, p Principal, keys []KeyID) ([]KeyInfo, error) {
	if err := c.Check(p, authz.CryptoManageKeys, inventory.RootFolder); err != nil {
		return nil, err
	}
	if len(keys) > 1000 {
		return nil, invalid("keyIds", "at most 1000 keys can be asked for at once, not %d", len(keys))
	}
	infos := make([]KeyInfo, len(keys))
	var group sync.WaitGroup
	for i, id := range keys {
		infos[i] = KeyInfo{ID: id, VMs: c.vmsUsing(id), Hosts: c.hostsUsing(id)}
		group.Go(func() { c.keyState(ctx, &infos[i]) })
	}
	var mu sync.Mutex
	for _, ref := range c.view.All(inventory.KindHost) {
		_, client, ok := c.links.connected(ref)
		if !ok {
			continue
		}
		group.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			held, err := client.ListKeys(ctx, &hostapi.ListKeysRequest{})
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, k := range held.GetKeys() {
				i := slices.Index(keys, *keyID(k.GetId()))
				if i >= 0 && !slices.Contains(infos[i].Hosts, ref) {
					infos[i].Hosts = append(infos[i].Hosts, ref)
				}
			}
		})
	}
	group.Wait()
	for i := range infos {
		slices.Sort(infos[i].Hosts)
	}
	return infos, nil
}

// keyState asks the provider. Reasons are vSphere's.
func (c *Center) keyState(ctx context.Context, info *KeyInfo) {
	pr, err := c.providers.get(ctx, info.ID.Provider)
	if err != nil {
		info.Reason, info.Message = "KeyStateClusterInvalid", err.Error()
		return
	}
	var state provider.State
	err = c.providers.limited(ctx, func(ctx context.Context) (err error) {
		state, err = pr.KeyState(ctx, info.ID.Key)
		return err
	})
	if state != 0 {
		info.State = state.String()
	}
	switch {
	case err == nil && state.Usable():
		info.Available = true
		return
	case err == nil:
		err = &provider.StateError{Provider: info.ID.Provider, KeyID: info.ID.Key, State: state}
		info.Reason = "KeyStateNotActiveOrEnabled"
	case errors.Is(err, provider.ErrNotFound):
		info.Reason = "KeyStateMissingInKMS"
	default:
		info.Reason = "KeyStateClusterUnreachable"
	}
	info.Message = providerFault(info.ID, "looking up", err).Error()
}

// vmsUsing lists the VMs that need a key, or are on their way to it.
func (c *Center) vmsUsing(id KeyID) []Ref {
	var refs []Ref
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		if slices.Contains(vm.Keys(), id) {
			refs = append(refs, vm.Ref)
		}
		return true
	})
	slices.Sort(refs)
	return refs
}

// hostsUsing lists the hosts whose host key it is.
func (c *Center) hostsUsing(id KeyID) []Ref {
	var refs []Ref
	inventory.Each(c.view, func(h *inventory.Host) bool {
		if h.HostKey != nil && *h.HostKey == id {
			refs = append(refs, h.Ref)
		}
		return true
	})
	slices.Sort(refs)
	return refs
}

// mayName checks that p has a right to a key that p's spec or file names for
// the VM self (design: naming a key gives no right to it). Whoever gets a KEK
// onto a VM of their own could open with it what others encrypted under it, so
// a key in use needs the right to the data of every VM that uses it; a host key
// is nobody's to name.
func (c *Center) mayName(p Principal, id KeyID, self Ref) error {
	for _, ref := range c.vmsUsing(id) {
		if ref == self {
			continue
		}
		if err := c.Check(p, authz.CryptoAccess, ref); err != nil {
			f := task.AsFault(err)
			n := *f
			n.Message = "key " + id.String() + " is in use; naming it needs a right to what uses it: " + f.Message
			n.Keys = []KeyID{id}
			return n.Because(err)
		}
	}
	if hosts := c.hostsUsing(id); len(hosts) > 0 {
		f := fault(task.NoPermission, "key %s is the host key of %s and cannot encrypt a VM; name another key, or none to have one made", id, c.names(hosts, 5))
		f.Object, f.Privilege, f.Keys = hosts[0], authz.CryptoRegisterHost, []KeyID{id}
		return f
	}
	return nil
}
