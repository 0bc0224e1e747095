package vimapi

import (
	"net/url"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// visible is the reference for an answer: nil for what is not there, or not for
// this reader.
func (r *reader) visible(id inventory.Ref) *types.ManagedObjectReference {
	m := reference(id)
	if m == nil {
		return nil
	}
	o, ok := r.lookup(*m)
	if !ok || r.may(authz.View, o) != nil {
		return nil
	}
	return m
}

func (c *call) findByUUID(q *types.FindByUuid) (*types.FindByUuidResponse, error) {
	found, err := c.byUUID(q.Uuid, q.VmSearch, q.InstanceUuid)
	res := &types.FindByUuidResponse{}
	if len(found) > 0 {
		res.Returnval = &found[0]
	}
	return res, err
}

func (c *call) findAllByUUID(q *types.FindAllByUuid) (*types.FindAllByUuidResponse, error) {
	found, err := c.byUUID(q.Uuid, q.VmSearch, q.InstanceUuid)
	return &types.FindAllByUuidResponse{Returnval: found}, err
}

func (c *call) byUUID(uuid string, vm bool, instance *bool) ([]types.ManagedObjectReference, error) {
	var ids []inventory.Ref
	if vm {
		inventory.Each(c.s.view, func(v *inventory.VM) bool {
			have := v.UUID
			if instance != nil && *instance {
				have = v.InstanceUUID
			}
			if strings.EqualFold(have, uuid) && uuid != "" {
				ids = append(ids, v.Ref)
			}
			return true
		})
	} else {
		inventory.Each(c.s.view, func(h *inventory.Host) bool {
			if strings.EqualFold(h.UUID, uuid) && uuid != "" {
				ids = append(ids, h.Ref)
			}
			return true
		})
	}
	r := c.reader()
	var found []types.ManagedObjectReference
	for _, id := range ids {
		if m := r.visible(id); m != nil {
			found = append(found, *m)
		}
	}
	return found, nil
}

// findByInventoryPath follows names from the root folder, which itself is not
// named: "Datacenter/vm/web1".
func (c *call) findByInventoryPath(q *types.FindByInventoryPath) (*types.FindByInventoryPathResponse, error) {
	at := inventory.RootFolder
	for _, name := range strings.Split(strings.Trim(q.InventoryPath, "/"), "/") {
		if name == "" {
			continue
		}
		next, ok := c.child(at, name)
		if !ok {
			return &types.FindByInventoryPathResponse{}, nil
		}
		at = next
	}
	return &types.FindByInventoryPathResponse{Returnval: c.reader().visible(at)}, nil
}

// child finds a child by name; names in paths may be escaped as in URLs.
func (c *call) child(parent inventory.Ref, name string) (inventory.Ref, bool) {
	plain, err := url.PathUnescape(name)
	if err != nil {
		plain = name
	}
	for _, id := range c.s.view.Children(parent) {
		if rec, ok := c.s.view.Get(id); ok && (rec.Self().Name == name || rec.Self().Name == plain) {
			return id, true
		}
	}
	return "", false
}

func (c *call) findChild(q *types.FindChild) (*types.FindChildResponse, error) {
	parent := ref(q.Entity)
	if _, ok := c.s.view.Get(parent); !ok {
		return nil, objectNotFound(q.Entity)
	}
	id, _ := c.child(parent, q.Name)
	return &types.FindChildResponse{Returnval: c.reader().visible(id)}, nil
}

// findByDatastorePath finds a VM by "[datastore] folder/name.vmx".
func (c *call) findByDatastorePath(q *types.FindByDatastorePath) (*types.FindByDatastorePathResponse, error) {
	r := c.reader()
	var found inventory.Ref
	inventory.Each(c.s.view, func(vm *inventory.VM) bool {
		if r.vmPath(vm) == q.Path {
			found = vm.Ref
		}
		return found == ""
	})
	return &types.FindByDatastorePathResponse{Returnval: r.visible(found)}, nil
}

// findByDNSName finds a host by its name. Guests' names are not known.
func (c *call) findByDNSName(q *types.FindByDnsName) (*types.FindByDnsNameResponse, error) {
	if q.VmSearch {
		return &types.FindByDnsNameResponse{}, nil
	}
	var found inventory.Ref
	inventory.Each(c.s.view, func(h *inventory.Host) bool {
		if strings.EqualFold(h.Name, q.DnsName) {
			found = h.Ref
		}
		return found == ""
	})
	return &types.FindByDnsNameResponse{Returnval: c.reader().visible(found)}, nil
}
