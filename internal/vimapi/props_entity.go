package vimapi

import (
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

func ptr[T any](v T) *T { return &v }

// entityProps are the properties that everything in the inventory has.
func entityProps() map[string]prop {
	record := func(f func(*reader, inventory.Entity) any) prop {
		return func(r *reader, o object) any {
			rec, ok := o.of.(inventory.Record)
			if !ok {
				return nil
			}
			return f(r, rec.Self())
		}
	}
	none := func(v any) prop { return func(*reader, object) any { return v } }
	return map[string]prop{
		"name":   record(func(_ *reader, e inventory.Entity) any { return e.Name }),
		"parent": record(func(_ *reader, e inventory.Entity) any { return reference(e.Parent) }),
		"recentTask": record(func(r *reader, e inventory.Entity) any {
			return morefs(r.relations().recent[e.Ref])
		}),
		"effectiveRole":       record(func(r *reader, e inventory.Entity) any { return r.effectiveRole(e.Ref) }),
		"overallStatus":       none(types.ManagedEntityStatusGreen),
		"configStatus":        none(types.ManagedEntityStatusGreen),
		"configIssue":         none([]types.BaseEvent{}),
		"permission":          none([]types.Permission{}),
		"disabledMethod":      none([]string{}),
		"declaredAlarmState":  none([]types.AlarmState{}),
		"triggeredAlarmState": none([]types.AlarmState{}),
		"alarmActionsEnabled": none(true),
		"tag":                 none([]types.Tag{}),
		"customValue":         none([]types.BaseCustomFieldValue{}),
		"value":               none([]types.BaseCustomFieldValue{}),
		"availableField":      none([]types.CustomFieldDef{}),
	}
}

// effectiveRole tells clients in one number what the reader may: the built-in
// role that fits best.
func (r *reader) effectiveRole(entity inventory.Ref) []int32 {
	may := func(privilege string) bool { return r.s.auth.Check(r.principal(), privilege, entity) == nil }
	switch {
	case may(authz.CryptoManageKeys) && may(authz.AuthModifyPermissions):
		return []int32{authz.RoleAdmin}
	case may(authz.AuthModifyPermissions):
		return []int32{authz.RoleNoCryptoAdmin}
	case may(authz.Read):
		return []int32{authz.RoleReadOnly}
	case may(authz.View):
		return []int32{authz.RoleView}
	}
	return []int32{authz.RoleNoAccess}
}

// recentTasks is how many of an entity's tasks it shows.
const recentTasks = 10

// relations computes who refers to whom, in one pass over the inventory.
func (r *reader) relations() *relations {
	if r.links != nil {
		return r.links
	}
	l := &relations{vms: map[inventory.Ref][]inventory.Ref{}, recent: map[inventory.Ref][]inventory.Ref{}}
	r.links = l
	inventory.Each(r.view, func(vm *inventory.VM) bool {
		for _, at := range []inventory.Ref{vm.Host, vm.Pool, vm.Datastore} {
			if at != "" {
				l.vms[at] = append(l.vms[at], vm.Ref)
			}
		}
		for _, at := range r.networksOf(vm) {
			l.vms[at] = append(l.vms[at], vm.Ref)
		}
		return true
	})
	inventory.Each(r.view, func(t *task.Record) bool {
		if t.Entity != "" {
			l.recent[t.Entity] = append(l.recent[t.Entity], t.Ref)
		}
		return true
	})
	sortRefs(l.vms)
	sortRefs(l.recent)
	for entity, tasks := range l.recent {
		if len(tasks) > recentTasks {
			l.recent[entity] = tasks[len(tasks)-recentTasks:]
		}
	}
	return l
}

// networksOf lists the networks that a VM's cards name, each once.
func (r *reader) networksOf(vm *inventory.VM) []inventory.Ref {
	var refs []inventory.Ref
	for _, n := range vm.Hardware.NICs {
		ref, ok := r.network(n.Network)
		if !ok {
			continue
		}
		known := false
		for _, have := range refs {
			known = known || have == ref
		}
		if !known {
			refs = append(refs, ref)
		}
	}
	return refs
}

// network finds a network by name.
func (r *reader) network(name string) (inventory.Ref, bool) {
	if r.nets == nil {
		r.nets = map[string]inventory.Ref{}
		for _, ref := range r.view.All(inventory.KindNetwork) {
			if n, ok := inventory.Lookup[inventory.Network](r.view, ref); ok {
				r.nets[n.Name] = ref
			}
		}
	}
	ref, ok := r.nets[name]
	return ref, ok
}

// existing drops what is not in the inventory any more.
func (r *reader) existing(refs []inventory.Ref) []types.ManagedObjectReference {
	all := []types.ManagedObjectReference{}
	for _, ref := range refs {
		if _, ok := r.view.Get(ref); ok {
			all = append(all, moref(ref))
		}
	}
	return all
}

// childrenOf lists the children of one kind.
func (r *reader) childrenOf(parent inventory.Ref, kind inventory.Kind) []inventory.Ref {
	var refs []inventory.Ref
	for _, c := range r.view.Children(parent) {
		if c.Kind() == kind {
			refs = append(refs, c)
		}
	}
	return refs
}

func folderProps() map[string]prop {
	return map[string]prop{
		"childType": on(func(_ *reader, f *inventory.Folder) any {
			kinds := []string{}
			for _, k := range f.ChildKinds {
				if k == inventory.KindCluster {
					k = "ComputeResource"
				}
				kinds = append(kinds, string(k))
			}
			return kinds
		}),
		"childEntity": on(func(r *reader, f *inventory.Folder) any { return morefs(r.view.Children(f.Ref)) }),
	}
}

func datacenterProps() map[string]prop {
	folder := func(f func(*inventory.Datacenter) inventory.Ref) prop {
		return on(func(_ *reader, d *inventory.Datacenter) any { return moref(f(d)) })
	}
	return map[string]prop{
		"vmFolder":        folder(func(d *inventory.Datacenter) inventory.Ref { return d.VMFolder }),
		"hostFolder":      folder(func(d *inventory.Datacenter) inventory.Ref { return d.HostFolder }),
		"datastoreFolder": folder(func(d *inventory.Datacenter) inventory.Ref { return d.DatastoreFolder }),
		"networkFolder":   folder(func(d *inventory.Datacenter) inventory.Ref { return d.NetworkFolder }),
		"datastore":       on(func(r *reader, d *inventory.Datacenter) any { return morefs(r.view.Children(d.DatastoreFolder)) }),
		"network":         on(func(r *reader, d *inventory.Datacenter) any { return morefs(r.view.Children(d.NetworkFolder)) }),
		"configuration":   always(func(*reader) any { return types.DatacenterConfigInfo{DefaultHardwareVersionKey: hardwareVersion} }),
	}
}
