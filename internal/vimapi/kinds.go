package vimapi

import (
	"reflect"
	"slices"
	"sort"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// A kind is a managed object type: the properties that the server fills in.
// Which others exist, and the static types of all, govmomi's mo package knows.
type kind struct {
	name  string
	typ   reflect.Type // the struct of package mo
	bases []string     // what it is besides, "ManagedEntity"
	props map[string]prop
	names []string // of props, sorted
	fixed string   // of a singleton: its id
	open  bool     // may be read before log-in
}

// A prop computes one property. A nil result, or a nil pointer, is a property
// that is not set; an error one that cannot be read.
type prop func(*reader, object) any

// object is a managed object as it is at the moment of a read.
type object struct {
	ref  types.ManagedObjectReference
	kind *kind
	of   any            // a record of the inventory, something a session owns, or nil
	memo map[string]any // properties computed so far, if they are kept
}

// on makes a property of a function on the object's record.
func on[T any](f func(*reader, *T) any) prop {
	return func(r *reader, o object) any {
		t, ok := o.of.(*T)
		if !ok {
			return nil
		}
		return f(r, t)
	}
}

// always makes a property that is the same for every object.
func always(f func(*reader) any) prop { return func(r *reader, _ object) any { return f(r) } }

func kindTable() map[string]*kind {
	all := map[string]*kind{}
	for name, props := range map[string]map[string]prop{
		"Folder": folderProps(), "Datacenter": datacenterProps(), "ClusterComputeResource": clusterProps(), "ResourcePool": poolProps(),
		"HostSystem": hostProps(), "Datastore": datastoreProps(), "Network": networkProps(), "VirtualMachine": vmProps(),
	} {
		for n, p := range entityProps() {
			if props[n] == nil {
				props[n] = p
			}
		}
		all[name] = newKind(name, props)
	}
	all["Task"] = newKind("Task", taskProps())
	all[string(inventory.KindSnapshot)] = newKind(string(inventory.KindSnapshot), snapshotProps())
	all["PropertyCollector"] = newKind("PropertyCollector", collectorProps())
	all["PropertyFilter"] = newKind("PropertyFilter", filterProps())
	all["ContainerView"] = newKind("ContainerView", containerViewProps())
	all["ListView"] = newKind("ListView", listViewProps())
	all["TaskHistoryCollector"] = newKind("TaskHistoryCollector", taskHistoryProps())
	all["EventHistoryCollector"] = newKind("EventHistoryCollector", eventHistoryProps())
	for _, k := range singletons() {
		all[k.name] = k
	}
	return all
}

func newKind(name string, props map[string]prop) *kind {
	k := &kind{name: name, typ: moType(name), props: props}
	for n := range props {
		k.names = append(k.names, n)
	}
	sort.Strings(k.names)
	if k.typ != nil {
		k.bases = embedded(k.typ)
	}
	return k
}

func newSingleton(name, id string, props map[string]prop) *kind {
	k := newKind(name, props)
	k.fixed = id
	return k
}

// moType is the struct of package mo for a managed object type; nil when there
// is none.
func moType(name string) reflect.Type {
	if !mo.IsManagedObjectType(name) {
		return nil
	}
	v, err := mo.ObjectContentToType(types.ObjectContent{Obj: types.ManagedObjectReference{Type: name}})
	if err != nil {
		return nil
	}
	return reflect.TypeOf(v)
}

// embedded lists the types that t extends.
func embedded(t reflect.Type) []string {
	var all []string
	for i := range t.NumField() {
		if f := t.Field(i); f.Anonymous && f.Type.Kind() == reflect.Struct {
			all = append(append(all, f.Type.Name()), embedded(f.Type)...)
		}
	}
	return all
}

// isA tells whether managed object type name is base or extends it.
func (s *Server) isA(name, base string) bool {
	if name == base || base == "ManagedObject" {
		return true
	}
	k := s.kinds[name]
	return k != nil && slices.Contains(k.bases, base)
}

// A reader reads properties for one caller. It lives for one call or one round
// of updates, and keeps what is costly to compute for that time.
type reader struct {
	s       *Server
	view    *inventory.View
	session *authz.Session // nil before log-in
	client  *client
	links   *relations
	nets    map[string]inventory.Ref
}

func (s *Server) reader(session *authz.Session, c *client) *reader {
	return &reader{s: s, view: s.view, session: session, client: c}
}

func (c *call) reader() *reader { return c.s.reader(c.session, c.client) }

func (r *reader) principal() authz.Principal {
	if r.session == nil {
		return authz.Principal{}
	}
	return r.session.Principal
}

// lookup finds an object.
func (r *reader) lookup(ref types.ManagedObjectReference) (object, bool) {
	k := r.s.kinds[ref.Type]
	if k == nil {
		return object{}, false
	}
	if k.fixed != "" && ref.Value == k.fixed {
		return object{ref: ref, kind: k}, true
	}
	id := inventory.Ref(ref.Value)
	if string(id.Kind()) == ref.Type {
		rec, ok := r.view.Get(id)
		return object{ref: ref, kind: k, of: rec}, ok
	}
	if ref.Type == string(inventory.KindSnapshot) {
		s, ok := r.snapshot(ref)
		return object{ref: ref, kind: k, of: s}, ok
	}
	if r.client != nil {
		o, ok := r.client.get(ref)
		return object{ref: ref, kind: k, of: o}, ok
	}
	return object{}, false
}

func (c *call) lookup(ref types.ManagedObjectReference) (object, bool) { return c.reader().lookup(ref) }

// guard is the entity whose permissions count for an object; "" for what needs
// a session only. A task whose entity is gone counts as the root folder's.
func (r *reader) guard(o object) inventory.Ref {
	switch rec := o.of.(type) {
	case *task.Record:
		if _, ok := r.view.Get(rec.Entity); !ok {
			return inventory.RootFolder
		}
		return rec.Entity
	case *snapshotObject:
		return rec.vm.Ref
	case inventory.Record:
		return rec.Self().Ref
	}
	return ""
}

// may tells whether the reader has a privilege on an object. Everybody sees the
// tasks that are their own.
func (r *reader) may(privilege string, o object) error {
	if r.session == nil {
		if o.kind.open {
			return nil
		}
		ref := o.ref
		return fault(&types.NotAuthenticated{NoPermission: types.NoPermission{Object: &ref, PrivilegeId: privilege}}, "the session is not authenticated: log in first")
	}
	if t, ok := o.of.(*task.Record); ok && t.User == r.principal().User {
		return nil
	}
	entity := r.guard(o)
	if entity == "" {
		return nil
	}
	return r.s.auth.Check(r.principal(), privilege, entity)
}
