package vimapi

import (
	"slices"
	"sync"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// containerView is a ContainerView: the objects of some types in a container,
// as they are whenever they are read.
type containerView struct {
	ref       types.ManagedObjectReference
	container types.ManagedObjectReference
	types     []string // empty: all
	recursive bool
}

func (c *call) createContainerView(q *types.CreateContainerView) (*types.CreateContainerViewResponse, error) {
	o, ok := c.lookup(q.Container)
	if !ok {
		return nil, objectNotFound(q.Container)
	}
	if err := c.reader().may(authz.View, o); err != nil {
		return nil, err
	}
	if !slices.Contains([]string{"Folder", "Datacenter", "ClusterComputeResource", "ResourcePool", "HostSystem"}, q.Container.Type) {
		return nil, invalidArgument("container", "%s holds no other objects", describe(q.Container))
	}
	for _, t := range q.Type {
		if moType(t) == nil {
			return nil, invalidArgument("type", "%q is no managed object type", clip(t))
		}
	}
	v, err := c.client.own("ContainerView", func(ref types.ManagedObjectReference) any {
		return &containerView{ref, q.Container, q.Type, q.Recursive}
	})
	if err != nil {
		return nil, err
	}
	return &types.CreateContainerViewResponse{Returnval: v.(*containerView).ref}, nil
}

func (c *call) destroyView(q *types.DestroyView) (*types.DestroyViewResponse, error) {
	o, _ := c.client.get(q.This)
	switch o.(type) {
	case *containerView, *listView:
		c.client.disown(q.This)
		return &types.DestroyViewResponse{}, nil
	}
	return nil, objectNotFound(q.This)
}

// listView is a ListView: objects that the client has listed.
type listView struct {
	ref types.ManagedObjectReference
	mu  sync.Mutex
	on  []types.ManagedObjectReference
}

func (v *listView) list() []types.ManagedObjectReference {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.on)
}

// change removes and adds objects, and returns those to be added that are not
// there.
func (v *listView) change(r *reader, add, remove []types.ManagedObjectReference) (missing []types.ManagedObjectReference, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	have := map[types.ManagedObjectReference]bool{}
	list := slices.DeleteFunc(slices.Clone(v.on), func(m types.ManagedObjectReference) bool { return slices.Contains(remove, m) })
	for _, m := range list {
		have[m] = true
	}
	for _, m := range add {
		o, ok := r.lookup(m)
		switch {
		case !ok || r.may(authz.View, o) != nil:
			missing = append(missing, m)
		case !have[m]:
			have[m] = true
			list = append(list, m)
		}
	}
	if len(list) > maxObjects {
		return nil, fault(&types.LimitExceeded{}, "a list view holds at most %d objects", maxObjects)
	}
	v.on = list
	r.s.hub.outside()
	r.s.hub.viewed()
	return missing, nil
}

func (c *call) createListView(q *types.CreateListView) (*types.CreateListViewResponse, error) {
	o, err := c.client.own("ListView", func(ref types.ManagedObjectReference) any { return &listView{ref: ref} })
	if err != nil {
		return nil, err
	}
	v := o.(*listView)
	if _, err := v.change(c.reader(), q.Obj, nil); err != nil {
		c.client.disown(v.ref)
		return nil, err
	}
	return &types.CreateListViewResponse{Returnval: v.ref}, nil
}

func (c *call) modifyListView(q *types.ModifyListView) (*types.ModifyListViewResponse, error) {
	v, err := ownedBy[*listView](c, q.This)
	if err != nil {
		return nil, err
	}
	missing, err := v.change(c.reader(), q.Add, q.Remove)
	return &types.ModifyListViewResponse{Returnval: missing}, err
}

func (c *call) resetListView(q *types.ResetListView) (*types.ResetListViewResponse, error) {
	v, err := ownedBy[*listView](c, q.This)
	if err != nil {
		return nil, err
	}
	missing, err := v.change(c.reader(), q.Obj, v.list())
	return &types.ResetListViewResponse{Returnval: missing}, err
}

func listViewProps() map[string]prop {
	return map[string]prop{"view": on(func(_ *reader, v *listView) any { return v.list() })}
}

func containerViewProps() map[string]prop {
	return map[string]prop{
		"container": on(func(_ *reader, v *containerView) any { return v.container }),
		"type":      on(func(_ *reader, v *containerView) any { return v.types }),
		"recursive": on(func(_ *reader, v *containerView) any { return v.recursive }),
		"view":      on((*reader).contained),
	}
}

// contained lists what a container view shows.
func (r *reader) contained(v *containerView) any {
	refs := []types.ManagedObjectReference{}
	seen := map[inventory.Ref]bool{}
	var walk func(at inventory.Ref, depth int)
	walk = func(at inventory.Ref, depth int) {
		for _, child := range r.content(at) {
			if seen[child] {
				continue
			}
			seen[child] = true
			if v.shows(r, child) {
				refs = append(refs, moref(child))
			}
			if v.recursive && depth < maxDepth {
				walk(child, depth+1)
			}
		}
	}
	walk(ref(v.container), 0)
	return refs
}

// content lists what is directly in an object: vSphere's containment, which is
// wider than parent and child, as VMs are also in hosts and pools.
func (r *reader) content(at inventory.Ref) []inventory.Ref {
	switch at.Kind() {
	case inventory.KindFolder, inventory.KindDatacenter:
		return r.view.Children(at)
	case inventory.KindCluster:
		return r.view.Children(at) // hosts and the root pool
	case inventory.KindResourcePool, inventory.KindHost:
		return r.relations().vms[at]
	}
	return nil
}

func (v *containerView) shows(r *reader, id inventory.Ref) bool {
	if len(v.types) == 0 {
		return true
	}
	for _, t := range v.types {
		if r.s.isA(string(id.Kind()), t) {
			return true
		}
	}
	return false
}
