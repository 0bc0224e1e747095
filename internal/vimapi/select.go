package vimapi

import (
	"reflect"
	"sort"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// Bounds of one property filter spec.
const (
	maxSpecs   = 1000 // specs of a call, property specs and traversal specs of a spec
	maxObjects = 50_000
)

// filterSpec is a PropertyFilterSpec made ready: names resolved, paths parsed
// and checked.
type filterSpec struct {
	s             *Server
	props         []propSpec
	objects       []objectSpec
	reportMissing bool
	byKind        map[*kind]*wanted
}

type propSpec struct {
	kind  string
	all   bool
	paths []namedPath
}

type namedPath struct {
	text string
	path propPath
}

type objectSpec struct {
	ref     types.ManagedObjectReference
	skip    bool
	selects []*selection
}

// selection is a TraversalSpec: from an object of a type along a property to
// the objects that it names, and on from there. Selections may form a cycle.
type selection struct {
	kind string
	path propPath
	skip bool
	next []*selection
}

// wanted is what a filter wants of objects of one kind.
type wanted struct {
	matched bool // by any property spec; others are not reported
	paths   []namedPath
}

func (s *Server) compile(spec *types.PropertyFilterSpec) (*filterSpec, error) {
	f := &filterSpec{s: s, reportMissing: spec.ReportMissingObjectsInResults != nil && *spec.ReportMissingObjectsInResults, byKind: map[*kind]*wanted{}}
	if len(spec.PropSet) > maxSpecs || len(spec.ObjectSet) > maxObjects {
		return nil, invalidArgument("specSet", "a filter has at most %d property specs and %d object specs", maxSpecs, maxObjects)
	}
	for _, p := range spec.PropSet {
		t := moType(p.Type)
		if t == nil && p.Type != "ManagedObject" {
			return nil, invalidArgument("specSet.propSet.type", "%q is no managed object type", clip(p.Type))
		}
		n := propSpec{kind: p.Type, all: p.All != nil && *p.All}
		for _, text := range p.PathSet {
			parsed, err := parsePath(text)
			if err != nil {
				return nil, err
			}
			if t == nil {
				return nil, fault(&types.InvalidProperty{Name: clip(text)}, "ManagedObject has no property %q", clip(text))
			}
			if err := s.checkPath(p.Type, t, text, parsed); err != nil {
				return nil, err
			}
			n.paths = append(n.paths, namedPath{text, parsed})
		}
		f.props = append(f.props, n)
	}
	c := &compiler{s: s, named: map[string]*selection{}}
	for _, o := range spec.ObjectSet {
		selects, err := c.all(o.SelectSet)
		if err != nil {
			return nil, err
		}
		f.objects = append(f.objects, objectSpec{o.Obj, o.Skip != nil && *o.Skip, selects})
	}
	return f, c.resolve()
}

// compiler turns selection specs into a graph. What refers to a traversal by
// name is filled in at the end, because the name may come later.
type compiler struct {
	s     *Server
	n     int
	named map[string]*selection
	later []func() error
}

func (c *compiler) all(specs []types.BaseSelectionSpec) ([]*selection, error) {
	list := make([]*selection, len(specs))
	for i, spec := range specs {
		if c.n++; c.n > maxSpecs {
			return nil, invalidArgument("specSet.objectSet.selectSet", "a filter has at most %d traversal specs", maxSpecs)
		}
		switch t := spec.(type) {
		case *types.TraversalSpec:
			sel, err := c.traversal(t)
			if err != nil {
				return nil, err
			}
			list[i] = sel
		case *types.SelectionSpec:
			c.later = append(c.later, func() error {
				if list[i] = c.named[t.Name]; list[i] == nil {
					return invalidArgument("specSet.objectSet.selectSet.name", "no traversal spec has the name %q", clip(t.Name))
				}
				return nil
			})
		default:
			return nil, invalidArgument("specSet.objectSet.selectSet", "a selection spec is missing")
		}
	}
	return list, nil
}

func (c *compiler) traversal(t *types.TraversalSpec) (*selection, error) {
	typ := moType(t.Type)
	if typ == nil {
		return nil, invalidArgument("specSet.objectSet.selectSet.type", "%q is no managed object type", clip(t.Type))
	}
	p, err := parsePath(t.Path)
	if err != nil {
		return nil, err
	}
	if err := c.s.checkPath(t.Type, typ, t.Path, p); err != nil {
		return nil, err
	}
	sel := &selection{kind: t.Type, path: p, skip: t.Skip != nil && *t.Skip}
	if t.Name != "" {
		c.named[t.Name] = sel
	}
	sel.next, err = c.all(t.SelectSet)
	return sel, err
}

func (c *compiler) resolve() error {
	for _, f := range c.later {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// wants tells what the filter wants of objects of kind k.
func (f *filterSpec) wants(k *kind) *wanted {
	if w := f.byKind[k]; w != nil {
		return w
	}
	w := &wanted{}
	seen := map[string]bool{}
	add := func(p namedPath) {
		if !seen[p.text] {
			seen[p.text] = true
			w.paths = append(w.paths, p)
		}
	}
	for _, spec := range f.props {
		if !f.s.isA(k.name, spec.kind) {
			continue
		}
		w.matched = true
		if spec.all {
			for _, name := range k.names {
				add(namedPath{name, propPath{{name: name}}})
			}
		}
		for _, p := range spec.paths {
			add(p)
		}
	}
	f.byKind[k] = w
	return w
}

// chosen is what a filter selects at a moment.
type chosen struct {
	objects []object // in the order they were reached, each once
	through map[types.ManagedObjectReference]struct{}
}

// choose walks the filter's traversals. Objects that the reader may not see are
// passed over, unless the filter names them.
func (r *reader) choose(f *filterSpec) (chosen, error) {
	c := chosen{through: map[types.ManagedObjectReference]struct{}{}}
	taken := map[types.ManagedObjectReference]bool{}
	take := func(o object) {
		if !taken[o.ref] && f.wants(o.kind).matched {
			taken[o.ref] = true
			c.objects = append(c.objects, o)
		}
	}
	type step struct {
		ref types.ManagedObjectReference
		sel *selection
	}
	type place struct {
		o    object
		sels []*selection
	}
	seen := map[step]bool{}
	var queue []place
	for _, spec := range f.objects {
		o, ok := r.lookup(spec.ref)
		if !ok {
			if f.reportMissing {
				continue
			}
			if r.session == nil {
				return c, r.may(authz.View, object{ref: spec.ref, kind: &kind{}})
			}
			return c, objectNotFound(spec.ref)
		}
		if r.session == nil && !o.kind.open {
			return c, r.may(authz.View, o)
		}
		if !spec.skip {
			take(o)
		}
		if len(spec.selects) > 0 {
			queue = append(queue, place{o, spec.selects})
		}
	}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		for _, sel := range at.sels {
			if !r.s.isA(at.o.ref.Type, sel.kind) || seen[step{at.o.ref, sel}] {
				continue
			}
			seen[step{at.o.ref, sel}] = true
			c.through[at.o.ref] = struct{}{}
			v, err := r.raw(at.o, sel.path)
			if err != nil {
				continue
			}
			for _, target := range references(v) {
				o, ok := r.lookup(target)
				if !ok || r.may(authz.View, o) != nil {
					continue
				}
				if !sel.skip {
					take(o)
				}
				if len(sel.next) > 0 {
					queue = append(queue, place{o, sel.next})
				}
			}
		}
	}
	return c, nil
}

// references reads a property that names objects.
func references(v reflect.Value) []types.ManagedObjectReference {
	if v = pointee(v); !v.IsValid() {
		return nil
	}
	switch t := v.Interface().(type) {
	case types.ManagedObjectReference:
		return []types.ManagedObjectReference{t}
	case []types.ManagedObjectReference:
		return t
	}
	return nil
}

// result is one object's properties as a filter wants them.
type result struct {
	values  []types.DynamicProperty
	missing []types.MissingProperty
}

// read computes what a filter wants of o.
func (r *reader) read(f *filterSpec, o object) result {
	var res result
	paths := f.wants(o.kind).paths
	if err := r.may(authz.Read, o); err != nil {
		for _, p := range paths {
			res.missing = append(res.missing, types.MissingProperty{Path: p.text, Fault: localized(err)})
		}
		return res
	}
	o.memo = map[string]any{} // several paths often lead into one property
	for _, p := range paths {
		val, err := r.property(o, p.path)
		switch {
		case err != nil:
			res.missing = append(res.missing, types.MissingProperty{Path: p.text, Fault: localized(err)})
		case val != nil:
			res.values = append(res.values, types.DynamicProperty{Name: p.text, Val: val})
		}
	}
	return res
}

// relations are the references that records of others make: the VMs of a host,
// the recent tasks of a VM. They are computed at most once by a reader.
type relations struct {
	vms    map[inventory.Ref][]inventory.Ref // of a host, a datastore, a pool, a network
	recent map[inventory.Ref][]inventory.Ref // tasks of an entity
}

func sortRefs(m map[inventory.Ref][]inventory.Ref) {
	for _, list := range m {
		sort.Slice(list, func(i, j int) bool {
			if len(list[i]) != len(list[j]) {
				return len(list[i]) < len(list[j])
			}
			return list[i] < list[j]
		})
	}
}
