package center

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/pki"
	"mortise/internal/store"
	"mortise/internal/task"
)

// providerName: what fits into a key locator without escaping.
var providerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9 ._:-]{0,79}$`)

func checkProviderName(id string) error {
	if !providerName.MatchString(id) {
		return invalid("clusterId", "key provider name %.100q: use 1 to 80 letters, digits, spaces and . _ : -, beginning with a letter or digit. VMs remember it", id)
	}
	return nil
}

func checkServer(s KmipServer) error {
	switch {
	case s.Name == "" || len(s.Name) > 80:
		return invalid("server.name", "a key server's name has 1 to 80 bytes, %.100q has %d", s.Name, len(s.Name))
	case s.Address == "" || len(s.Address) > 255 || strings.ContainsAny(s.Address, " /@\t\r\n"):
		return invalid("server.address", "address %.100q of key server %q is no host name or IP address", s.Address, s.Name)
	case strings.Contains(s.Address, ":") && net.ParseIP(s.Address) == nil:
		return invalid("server.address", "address %.100q of key server %q holds a colon; give the port by itself", s.Address, s.Name)
	case s.Port < 0 || s.Port > 65535:
		return invalid("server.port", "port %d of key server %q is not within 1 to 65535", s.Port, s.Name)
	case s.ProxyAddress != "":
		return fault(task.NotSupported, "key server %q: proxies between center and a key server are not supported; open port %d for center", s.Name, s.port())
	}
	return nil
}

// RegisterProvider makes a key provider without servers.
func (c *Center) RegisterProvider(ctx context.Context, p Principal, id string) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	if err := checkProviderName(id); err != nil {
		return err
	}
	_, err := c.store.Commit(ctx, c.providers.records.Create(id, providerRecord{ID: id}))
	if errors.Is(err, store.ErrExists) {
		return existing("key provider", id)
	}
	if err != nil {
		return storeFault("adding the key provider", err)
	}
	return c.providerAdded(ctx, p, id)
}

func existing(what, name string) *Fault {
	f := fault(task.AlreadyExists, "there is a %s %q already; choose another name", what, name)
	f.Name = name
	return f
}

// providerAdded makes the first provider the default, and lets hosts ask again
// for keys that the provider may have (K6).
func (c *Center) providerAdded(ctx context.Context, p Principal, id string) error {
	c.events.Post(ctx, Event{Type: event.ProviderChanged, User: p.User, Entity: inventory.RootFolder, Message: fmt.Sprintf("Key provider %q was added", id)})
	_, err := c.store.Commit(ctx, c.providers.defaults.Create(globalDefault, defaultRecord{Provider: id}))
	if err != nil && !errors.Is(err, store.ErrExists) {
		return storeFault("making the provider the default", err)
	}
	c.links.wakeKeys()
	return nil
}

// RegisterKmipServer adds a KMS server to a provider, which is made when there
// is none of the name (K13). The server still needs to be trusted, and to trust
// center's client certificate.
func (c *Center) RegisterKmipServer(ctx context.Context, p Principal, id string, server KmipServer) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	if err := errors.Join(checkProviderName(id), checkServer(server)); err != nil {
		return err
	}
	server.Port = server.port()
	created := false
	_, err := c.store.Commit(ctx, c.providers.records.Create(id, providerRecord{ID: id, Servers: []serverRecord{{KmipServer: server}}}))
	switch {
	case err == nil:
		created = true
	case errors.Is(err, store.ErrExists):
		_, err = c.providers.records.Edit(ctx, id, func(r *providerRecord) error {
			if slices.ContainsFunc(r.Servers, func(s serverRecord) bool { return s.Name == server.Name }) {
				return existing("key server", server.Name)
			}
			r.Servers = append(r.Servers, serverRecord{KmipServer: server})
			return nil
		})
	}
	if err != nil {
		return storeFault("adding the key server", err)
	}
	c.events.Post(ctx, Event{Type: event.ProviderChanged, User: p.User, Entity: inventory.RootFolder,
		Message: fmt.Sprintf("Key server %q (%s) was added to key provider %q", server.Name, server.address(), id)})
	if created {
		return c.providerAdded(ctx, p, id)
	}
	return nil
}

// UpdateKmipServer changes a server's address. Its certificate stays trusted.
func (c *Center) UpdateKmipServer(ctx context.Context, p Principal, id string, server KmipServer) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	if err := checkServer(server); err != nil {
		return err
	}
	server.Port = server.port()
	return c.editProvider(ctx, p, id, fmt.Sprintf("Key server %q was changed", server.Name), func(r *providerRecord) error {
		for i := range r.Servers {
			if r.Servers[i].Name == server.Name {
				r.Servers[i].KmipServer = server
				return nil
			}
		}
		return noServer(id, server.Name)
	})
}

func noServer(id, name string) *Fault {
	f := fault(task.NotFound, "key provider %q has no key server %q; list its servers (provider ls)", id, trim(name, 100))
	f.Name = name
	return f
}

// editProvider changes a provider's record, and posts said. The client is made
// anew with the next use.
func (c *Center) editProvider(ctx context.Context, p Principal, id, said string, change func(*providerRecord) error) error {
	if _, err := c.providers.record(ctx, id); err != nil {
		return err
	}
	if _, err := c.providers.records.Edit(ctx, id, change); err != nil {
		return storeFault("changing the key provider", err)
	}
	c.events.Post(ctx, Event{Type: event.ProviderChanged, User: p.User, Entity: inventory.RootFolder, Message: fmt.Sprintf("%s (key provider %q)", said, id)})
	c.links.wakeKeys()
	return nil
}

// RemoveKmipServer takes a server out of its provider. The last one of a
// provider whose keys VMs need is refused, like the provider's removal.
func (c *Center) RemoveKmipServer(ctx context.Context, p Principal, id, name string) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	return c.editProvider(ctx, p, id, fmt.Sprintf("Key server %q was removed", name), func(r *providerRecord) error {
		i := slices.IndexFunc(r.Servers, func(s serverRecord) bool { return s.Name == name })
		if i < 0 {
			return noServer(id, name)
		}
		if len(r.Servers) == 1 {
			if err := c.providerNeeded(id); err != nil {
				return err
			}
		}
		r.Servers = slices.Delete(r.Servers, i, i+1)
		return nil
	})
}

// WhatLocks lists the VMs and hosts that need keys of a provider: what would be
// locked, sooner or later, without it (K6, K12).
func (c *Center) WhatLocks(id string) (vms, hosts []Ref) {
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		if slices.ContainsFunc(vm.Keys(), func(k KeyID) bool { return k.Provider == id }) {
			vms = append(vms, vm.Ref)
		}
		return true
	})
	inventory.Each(c.view, func(h *inventory.Host) bool {
		if h.HostKey != nil && h.HostKey.Provider == id {
			hosts = append(hosts, h.Ref)
		}
		return true
	})
	slices.Sort(vms)
	slices.Sort(hosts)
	return vms, hosts
}

// providerNeeded is the fault of removing a provider that VMs need.
func (c *Center) providerNeeded(id string) error {
	vms, _ := c.WhatLocks(id)
	if len(vms) == 0 {
		return nil
	}
	f := fault(task.ResourceInUse, "key provider %q cannot be removed: it would lock %s. Recrypt them with keys of another provider first", id, c.names(vms, 10))
	f.Name = id
	return f
}

// names lists records by name, at most max of them.
func (c *Center) names(refs []Ref, max int) string {
	var names []string
	for i, ref := range refs {
		if i == max {
			names = append(names, fmt.Sprintf("and %d more", len(refs)-max))
			break
		}
		if r, ok := c.view.Get(ref); ok {
			names = append(names, fmt.Sprintf("%q", r.Self().Name))
		}
	}
	return strings.Join(names, ", ")
}

// RemoveProvider removes a provider and its servers; refused while VMs need its
// keys. The keys themselves stay at the key servers.
func (c *Center) RemoveProvider(ctx context.Context, p Principal, id string) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	if err := c.providerNeeded(id); err != nil {
		return err
	}
	return c.removeProvider(ctx, p, id)
}

// RemoveProviderAnyway removes a provider that VMs need. They go on where their
// host holds the keys and become locked elsewhere, until the provider is added
// again under its name (K6). lost must be what [Center.WhatLocks] says of VMs:
// who confirms has seen the list.
func (c *Center) RemoveProviderAnyway(ctx context.Context, p Principal, id string, lost []Ref) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	vms, _ := c.WhatLocks(id)
	if !slices.Equal(vms, lost) {
		return fault(task.InvalidState, "the VMs that removing key provider %q would lock have changed; look at the list again: %s", id, c.names(vms, 20))
	}
	if err := c.removeProvider(ctx, p, id); err != nil {
		return err
	}
	if len(vms) > 0 {
		c.events.Post(ctx, Event{Type: event.ProviderChanged, Severity: event.Warning, User: p.User, Entity: inventory.RootFolder,
			Message: fmt.Sprintf("Key provider %q was removed although VMs need its keys: %s", id, c.names(vms, 20))})
	}
	return nil
}

func (c *Center) removeProvider(ctx context.Context, p Principal, id string) error {
	e, err := c.providers.record(ctx, id)
	if err != nil {
		return err
	}
	ops := []store.Op{c.providers.records.Delete(id, e.Revision)}
	defaults, err := c.providers.defaults.List(ctx, "")
	if err != nil {
		return storeFault("reading the default providers", err)
	}
	for _, d := range defaults {
		if d.Value.Provider == id {
			ops = append(ops, c.providers.defaults.Delete(d.Key, d.Revision))
		}
	}
	if _, err := c.store.Commit(ctx, ops...); err != nil {
		return storeFault("removing the key provider", err)
	}
	c.providers.mu.Lock()
	if open, ok := c.providers.open[id]; ok {
		open.Close()
		delete(c.providers.open, id)
	}
	c.providers.mu.Unlock()
	c.events.Post(ctx, Event{Type: event.ProviderChanged, User: p.User, Entity: inventory.RootFolder, Message: fmt.Sprintf("Key provider %q was removed", id)})
	return nil
}

// ListProviders lists the key providers, by name.
func (c *Center) ListProviders(ctx context.Context, p Principal) ([]ProviderInfo, error) {
	if err := c.Check(p, authz.CryptoReadKeyServersInfo, inventory.RootFolder); err != nil {
		return nil, err
	}
	records, err := c.providers.records.List(ctx, "")
	if err != nil {
		return nil, storeFault("reading the key providers", err)
	}
	defaults, err := c.providers.defaults.List(ctx, "")
	if err != nil {
		return nil, storeFault("reading the default providers", err)
	}
	var list []ProviderInfo
	for _, e := range records {
		r := e.Value
		info := ProviderInfo{ID: r.ID, Kind: "vCenter", TrustedThumbprints: slices.Clone(r.Trusted)}
		for _, d := range defaults {
			switch {
			case d.Value.Provider != r.ID:
			case d.Key == globalDefault:
				info.Default = true
			default:
				info.DefaultFor = append(info.DefaultFor, Ref(d.Key))
			}
		}
		for _, s := range r.Servers {
			info.Servers = append(info.Servers, s.KmipServer)
			info.TrustedThumbprints = append(info.TrustedThumbprints, s.Trusted...)
		}
		for i, t := range info.TrustedThumbprints {
			info.TrustedThumbprints[i] = colons(t)
		}
		if leaf := r.Client.leaf(); leaf != nil {
			info.ClientCertThumbprint, info.ClientCertNotAfter = pki.Thumbprint(leaf), leaf.NotAfter
		}
		list = append(list, info)
	}
	return list, nil
}
