package inventory

import (
	"context"
	"slices"
	"sync"
)

// changeLog is how many changes a View remembers for [View.Changes].
const changeLog = 16384

// View is every record in memory. Its methods may be called concurrently; the
// records it returns must not be changed.
type View struct {
	mu       sync.RWMutex
	rows     map[Ref]row
	children map[Ref]map[Ref]struct{}
	kinds    map[Kind]map[Ref]struct{}

	revision int64
	log      []change // in rising order of revision; the newest changeLog of them
	dropped  int64    // highest revision that has left the log
	moved    chan struct{}
}

type row struct {
	record Record
	stored int64 // the store's revision of it
}

type change struct {
	revision int64
	ref      Ref
}

func newView() *View {
	return &View{
		rows:     map[Ref]row{},
		children: map[Ref]map[Ref]struct{}{},
		kinds:    map[Kind]map[Ref]struct{}{},
		moved:    make(chan struct{}),
	}
}

// Revision rises with every change. It counts from the start of the process.
func (v *View) Revision() int64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.revision
}

// Get returns the record of ref: a pointer to one of the package's records or
// to a task.Record.
func (v *View) Get(ref Ref) (Record, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	r, ok := v.rows[ref]
	return r.record, ok
}

// Lookup returns the record of ref if there is one and it is a T.
func Lookup[T any](v *View, ref Ref) (*T, bool) {
	r, ok := v.Get(ref)
	if !ok {
		return nil, false
	}
	t, ok := any(r).(*T)
	return t, ok
}

// Children lists the records whose parent is ref, sorted.
func (v *View) Children(ref Ref) []Ref {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return sorted(v.children[ref])
}

// All lists the records of a kind, sorted.
func (v *View) All(kind Kind) []Ref {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return sorted(v.kinds[kind])
}

// Each calls f with every record of type T, in no order, as they are at one
// revision, until f returns false.
func Each[T any](v *View, f func(*T) bool) {
	v.mu.RLock()
	var list []*T
	for _, r := range v.rows {
		if t, ok := any(r.record).(*T); ok {
			list = append(list, t)
		}
	}
	v.mu.RUnlock()
	for _, t := range list {
		if !f(t) {
			return
		}
	}
}

// Parent returns the parent of ref; ok is false for the root, for tasks and for
// what is not there.
func (v *View) Parent(ref Ref) (Ref, bool) {
	r, ok := v.Get(ref)
	if !ok {
		return "", false
	}
	p := r.Self().Parent
	return p, p != ""
}

// Changes waits until something has changed after revision after, or ctx ends,
// and names what, each record once, with the revision that the answer reaches.
// gap tells that after lies too far back: read everything anew.
func (v *View) Changes(ctx context.Context, after int64) (refs []Ref, now int64, gap bool, err error) {
	for {
		v.mu.RLock()
		now, moved := v.revision, v.moved
		if after < v.dropped {
			v.mu.RUnlock()
			return nil, now, true, nil
		}
		if now > after {
			refs = v.since(after)
			v.mu.RUnlock()
			return refs, now, false, nil
		}
		v.mu.RUnlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, now, false, ctx.Err()
		}
	}
}

// since lists what changed after revision after. The lock is held.
func (v *View) since(after int64) []Ref {
	from, _ := slices.BinarySearchFunc(v.log, after+1, func(c change, rev int64) int { return int(c.revision - rev) })
	seen := make(map[Ref]bool, len(v.log)-from)
	var refs []Ref
	for _, c := range v.log[from:] {
		if !seen[c.ref] {
			seen[c.ref] = true
			refs = append(refs, c.ref)
		}
	}
	return refs
}

// update is a record as the store has it; a nil record is a deletion.
type update struct {
	ref    Ref
	record Record
	stored int64
}

// apply makes a batch of updates one new revision.
func (v *View) apply(batch []update) {
	v.mu.Lock()
	defer v.mu.Unlock()
	next := v.revision + 1
	before := len(v.log)
	for _, u := range batch {
		old, had := v.rows[u.ref]
		if u.record == nil && !had || had && u.record != nil && old.stored == u.stored {
			continue
		}
		if had {
			v.unlink(old.record.Self())
			delete(v.rows, u.ref)
		}
		if u.record != nil {
			v.rows[u.ref] = row{u.record, u.stored}
			v.link(u.record.Self())
		}
		v.log = append(v.log, change{next, u.ref})
	}
	if len(v.log) == before {
		return
	}
	v.revision = next
	if over := len(v.log) - changeLog; over > 0 {
		// A revision leaves as a whole, so that no reader gets half of one.
		v.dropped = v.log[over-1].revision
		for over < len(v.log) && v.log[over].revision == v.dropped {
			over++
		}
		v.log = slices.Clone(v.log[over:])
	}
	close(v.moved)
	v.moved = make(chan struct{})
}

func (v *View) link(e Entity) {
	add := func(m map[Ref]struct{}) map[Ref]struct{} {
		if m == nil {
			m = map[Ref]struct{}{}
		}
		m[e.Ref] = struct{}{}
		return m
	}
	v.kinds[e.Ref.Kind()] = add(v.kinds[e.Ref.Kind()])
	if e.Parent != "" {
		v.children[e.Parent] = add(v.children[e.Parent])
	}
}

func (v *View) unlink(e Entity) {
	delete(v.kinds[e.Ref.Kind()], e.Ref)
	if delete(v.children[e.Parent], e.Ref); len(v.children[e.Parent]) == 0 {
		delete(v.children, e.Parent)
	}
}

// sorted lists refs by their numbers, so that listings are stable and old
// before new.
func sorted(set map[Ref]struct{}) []Ref {
	refs := make([]Ref, 0, len(set))
	for r := range set {
		refs = append(refs, r)
	}
	slices.SortFunc(refs, compareRefs)
	return refs
}

func compareRefs(a, b Ref) int {
	pa, na := a.split()
	pb, nb := b.split()
	switch {
	case pa != pb && pa < pb, pa == pb && na < nb:
		return -1
	case a == b:
		return 0
	}
	return 1
}
