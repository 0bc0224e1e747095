package center

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
)

// apply brings what a host says of itself into the inventory: its own record,
// its datastores and its networks. Nothing is written when nothing changed.
func (l *link) apply(ctx context.Context, info *hostapi.HostInfo) error {
	c := l.c
	h, ok := inventory.Lookup[inventory.Host](c.view, l.host)
	if !ok {
		return errors.New("the host has been removed")
	}
	if info.GetUuid() == "" {
		return fmt.Errorf("host %q does not say its UUID", h.Name)
	}
	if h.UUID != "" && h.UUID != info.Uuid {
		// The certificate is the one it joined with, so its key was copied or its
		// disk cloned: two machines must not pass for one.
		return fmt.Errorf("host %q was the machine %s and is now %s; remove it and join the new machine with a token of its own", h.Name, h.UUID, info.Uuid)
	}
	datastores, err := c.applyDatastores(ctx, h, info.GetDatastores())
	if err != nil {
		return err
	}
	networks, err := c.applyNetworks(ctx, h, info.GetNetworks())
	if err != nil {
		return err
	}
	change := func(h *inventory.Host) {
		h.UUID, h.Datastores, h.Networks = info.Uuid, datastores, networks
		boot := time.Unix(info.BootTimeUnix, 0).UTC()
		if d := boot.Sub(h.Info.BootTime).Abs(); d < 5*time.Second {
			boot = h.Info.BootTime // it is computed from an uptime, and jitters
		}
		h.Info = inventory.HostInfo{
			Version: info.Version, Hypervisor: info.Hypervisor, OS: info.Os, CPUModel: info.CpuModel, CPUCores: info.CpuCores, CPUMHz: info.CpuMhz,
			MemoryBytes: info.MemoryBytes, KVM: info.Kvm, AES: info.Aes, XTS: info.Xts, BootTime: boot,
		}
		h.CryptoReasons = info.IncapableReasons
		switch {
		case h.HostKey != nil:
			h.CryptoState = inventory.HostSafe
		case len(h.CryptoReasons) > 0 && !c.cfg.AllowIncapableHosts:
			h.CryptoState = inventory.HostIncapable
		default:
			h.CryptoState = inventory.HostPrepared
		}
	}
	next := *h
	change(&next)
	if reflect.DeepEqual(*h, next) {
		return nil
	}
	if _, err = c.inv.EditHost(ctx, l.host, func(h *inventory.Host) error { change(h); return nil }); err != nil {
		return err
	}
	if h.UUID != "" && !next.Info.BootTime.Equal(h.Info.BootTime) { // H2
		c.events.Post(ctx, Event{Type: event.HostRestarted, Severity: event.Warning, Entity: l.host,
			Message: fmt.Sprintf("Host %q has restarted, at %s; the keys that it needs are sent again", h.Name, next.Info.BootTime.Format(time.RFC3339))})
	}
	return nil
}

// applyDatastores finds or makes the record of each datastore, by the UUID of
// its marker file: hosts that mount one folder share one record.
func (c *Center) applyDatastores(ctx context.Context, h *inventory.Host, list []*hostapi.DatastoreInfo) ([]Ref, error) {
	var refs []Ref
	for _, d := range list {
		if d.GetUuid() == "" || d.GetName() == "" {
			continue // it never was mounted: it has no marker to know it by
		}
		mount := inventory.DatastoreMount{Host: h.Ref, Name: d.Name, Path: d.Path, Problem: d.Problem}
		ref, err := c.datastoreRecord(ctx, d)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
		err = editIfChanged(ctx, c, c.inv.Datastores, ref, func(r *inventory.Datastore) {
			r.Mounts = slices.DeleteFunc(slices.Clone(r.Mounts), func(m inventory.DatastoreMount) bool { return m.Host == h.Ref })
			r.Mounts = append(r.Mounts, mount)
			slices.SortFunc(r.Mounts, func(a, b inventory.DatastoreMount) int { return compare(string(a.Host), string(b.Host)) })
			if d.Problem == "" {
				r.Type, r.Capacity, r.Free = d.Type, d.CapacityBytes, d.FreeBytes
			}
			r.Accessible = slices.ContainsFunc(r.Mounts, func(m inventory.DatastoreMount) bool { return m.Problem == "" })
		})
		if err != nil {
			return nil, err
		}
	}
	// A datastore that the host has no more loses the host, and its record when
	// nothing is left that needs it.
	for _, old := range h.Datastores {
		if slices.Contains(refs, old) {
			continue
		}
		if err := c.unmounted(ctx, h.Ref, old); err != nil {
			return nil, err
		}
	}
	slices.Sort(refs)
	return slices.Compact(refs), nil
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// datastoreRecord finds the record of a datastore or makes one. A name that
// another datastore has gets a number.
func (c *Center) datastoreRecord(ctx context.Context, d *hostapi.DatastoreInfo) (Ref, error) {
	claim := inventory.Claim("datastore-uuid/" + d.Uuid)
	for try := 0; ; try++ {
		if ref, ok, err := c.inv.Owner(ctx, claim); err != nil || ok {
			return ref, err
		}
		ref, err := c.inv.NextRef(ctx, "datastore")
		if err != nil {
			return "", err
		}
		name := trim(d.Name, 60)
		if try > 0 {
			name = fmt.Sprintf("%s (%d)", name, try)
		}
		err = c.inv.Commit(ctx, c.inv.Take(claim, ref), c.inv.Take(inventory.ClaimName(inventory.DefaultDatastores, name), ref),
			c.inv.Datastores.Create(string(ref), inventory.Datastore{
				Entity: inventory.Entity{Ref: ref, Name: name, Parent: inventory.DefaultDatastores}, UUID: d.Uuid, Type: d.Type}))
		if err == nil {
			c.events.Post(ctx, Event{Type: event.DatastoreAdded, Entity: ref, Message: fmt.Sprintf("Datastore %q (%s) is new", name, d.Uuid)})
			return ref, nil
		}
		if !errors.Is(err, store.ErrExists) || try > 1000 {
			return "", err
		}
	}
}

func (c *Center) unmounted(ctx context.Context, host, datastore Ref) error {
	err := editIfChanged(ctx, c, c.inv.Datastores, datastore, func(r *inventory.Datastore) {
		r.Mounts = slices.DeleteFunc(slices.Clone(r.Mounts), func(m inventory.DatastoreMount) bool { return m.Host == host })
		r.Accessible = slices.ContainsFunc(r.Mounts, func(m inventory.DatastoreMount) bool { return m.Problem == "" })
	})
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// applyNetworks finds or makes the record of each network, by name.
func (c *Center) applyNetworks(ctx context.Context, h *inventory.Host, list []*hostapi.NetworkInfo) ([]Ref, error) {
	var refs []Ref
	for _, n := range list {
		if n.GetName() == "" || len(n.GetName()) > 200 {
			continue
		}
		ref, err := c.networkRecord(ctx, n.Name)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
		err = editIfChanged(ctx, c, c.inv.Networks, ref, func(r *inventory.Network) {
			if !slices.Contains(r.Hosts, h.Ref) {
				r.Hosts = append(slices.Clone(r.Hosts), h.Ref)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	for _, old := range h.Networks {
		if slices.Contains(refs, old) {
			continue
		}
		err := editIfChanged(ctx, c, c.inv.Networks, old, func(r *inventory.Network) {
			r.Hosts = slices.DeleteFunc(slices.Clone(r.Hosts), func(ref Ref) bool { return ref == h.Ref })
		})
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
	}
	slices.Sort(refs)
	return slices.Compact(refs), nil
}

func (c *Center) networkRecord(ctx context.Context, name string) (Ref, error) {
	claim := inventory.ClaimName(inventory.DefaultNetworks, name)
	for {
		if ref, ok, err := c.inv.Owner(ctx, claim); err != nil || ok {
			return ref, err
		}
		ref, err := c.inv.NextRef(ctx, "network")
		if err != nil {
			return "", err
		}
		err = c.inv.Commit(ctx, c.inv.Take(claim, ref),
			c.inv.Networks.Create(string(ref), inventory.Network{Entity: inventory.Entity{Ref: ref, Name: name, Parent: inventory.DefaultNetworks}}))
		if err == nil || !errors.Is(err, store.ErrExists) {
			return ref, err
		}
	}
}

// editIfChanged writes a record only when change makes a difference to what the
// view shows. change must not alter what the record's slices hold.
func editIfChanged[T any](ctx context.Context, c *Center, records *store.Collection[T], ref Ref, change func(*T)) error {
	if now, ok := inventory.Lookup[T](c.view, ref); ok {
		next := *now
		change(&next)
		if reflect.DeepEqual(*now, next) {
			return nil
		}
	}
	_, err := inventory.Edit(ctx, c.inv, records, ref, func(t *T) error { change(t); return nil })
	return err
}
