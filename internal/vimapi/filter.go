package vimapi

import (
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
)

// filter is a PropertyFilter: what a client wants to know of which objects, and
// what it knows already.
type filter struct {
	ref     types.ManagedObjectReference
	pc      *collector
	partial bool
	spec    *filterSpec
	source  types.PropertyFilterSpec

	// Used by the one call that works for the collector.
	started bool
	members map[types.ManagedObjectReference]*member

	// Guarded by the hub's lock.
	through map[types.ManagedObjectReference]struct{}
	dirty   map[inventory.Ref]struct{}
	again   bool // select anew
}

// member is what the client knows of one object: a fingerprint for each path of
// the filter's wants, 0 for what is not set or cannot be read.
type member struct {
	prints []uint64
}

// update tells what has changed since the last update; everything at first.
func (f *filter) update(r *reader) ([]types.ObjectUpdate, error) {
	dirty, again := f.pc.client.s.hub.take(f)
	var out []types.ObjectUpdate
	if !f.started || again {
		changed, err := f.choose(r)
		if err != nil {
			return nil, err
		}
		out = changed
		f.started = true
	}
	for id := range dirty {
		if id == "" { // something outside the inventory
			for ref := range f.members {
				if inventory.Ref(ref.Value).Kind() == "" {
					out = f.modified(out, r, ref)
				}
			}
			continue
		}
		out = f.modified(out, r, moref(id))
	}
	return out, nil
}

// choose selects anew: what has come enters, what has gone leaves.
func (f *filter) choose(r *reader) ([]types.ObjectUpdate, error) {
	hub := f.pc.client.s.hub
	// The index first: a change from here on marks the filter, and what it
	// marks is read again.
	now, err := r.choose(f.spec)
	if err != nil {
		if !f.started {
			return nil, err
		}
		now = chosen{through: f.through} // the object that it began at is gone
	}
	if hub.route(f, now.through) {
		// Changes of what is new on the way may have come before it was marked.
		now, err = r.choose(f.spec)
		if err == nil && hub.route(f, now.through) {
			hub.again(f)
		}
	}
	var out []types.ObjectUpdate
	keep := make(map[types.ManagedObjectReference]bool, len(now.objects))
	for _, o := range now.objects {
		keep[o.ref] = true
		if f.members[o.ref] != nil {
			continue
		}
		hub.enter(f, o.ref)
		fresh, ok := r.lookup(o.ref) // once more, now that changes are marked
		if !ok {
			continue
		}
		res := r.read(f.spec, fresh)
		m := &member{prints: f.prints(fresh.kind, res)}
		f.members[o.ref] = m
		u := types.ObjectUpdate{Kind: types.ObjectUpdateKindEnter, Obj: o.ref, MissingSet: res.missing}
		for _, p := range res.values {
			u.ChangeSet = append(u.ChangeSet, types.PropertyChange{Name: p.Name, Op: types.PropertyChangeOpAssign, Val: p.Val})
		}
		out = append(out, u)
	}
	for ref := range f.members {
		if !keep[ref] {
			out = append(out, f.left(ref))
		}
	}
	return out, nil
}

func (f *filter) left(ref types.ManagedObjectReference) types.ObjectUpdate {
	f.pc.client.s.hub.leave(f, ref)
	delete(f.members, ref)
	return types.ObjectUpdate{Kind: types.ObjectUpdateKindLeave, Obj: ref}
}

// modified appends what is new of ref.
func (f *filter) modified(out []types.ObjectUpdate, r *reader, ref types.ManagedObjectReference) []types.ObjectUpdate {
	m := f.members[ref]
	if m == nil {
		return out
	}
	o, ok := r.lookup(ref)
	if !ok {
		return append(out, f.left(ref))
	}
	res := r.read(f.spec, o)
	prints := f.prints(o.kind, res)
	values := map[string]any{}
	for _, p := range res.values {
		values[p.Name] = p.Val
	}
	u := types.ObjectUpdate{Kind: types.ObjectUpdateKindModify, Obj: ref, MissingSet: res.missing}
	for i, p := range f.spec.wants(o.kind).paths {
		if m.prints[i] != prints[i] {
			u.ChangeSet = append(u.ChangeSet, types.PropertyChange{Name: p.text, Op: types.PropertyChangeOpAssign, Val: values[p.text]})
		}
	}
	m.prints = prints
	if len(u.ChangeSet) == 0 {
		return out
	}
	return append(out, u)
}

func (f *filter) prints(k *kind, res result) []uint64 {
	paths := f.spec.wants(k).paths
	prints := make([]uint64, len(paths))
	next := 0
	for i, p := range paths { // values are in the order of paths
		if next < len(res.values) && res.values[next].Name == p.text {
			prints[i] = fingerprint(f.pc.seed, res.values[next].Val)
			next++
		}
	}
	return prints
}

// reset forgets what the client knows.
func (f *filter) reset() {
	f.pc.client.s.hub.forget(f)
	f.started = false
	f.members = map[types.ManagedObjectReference]*member{}
	f.through = nil
}

func newFilter(pc *collector, ref types.ManagedObjectReference, spec *filterSpec, source types.PropertyFilterSpec, partial bool) *filter {
	return &filter{
		ref: ref, pc: pc, partial: partial, spec: spec, source: source,
		members: map[types.ManagedObjectReference]*member{}, dirty: map[inventory.Ref]struct{}{},
	}
}
