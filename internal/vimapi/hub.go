package vimapi

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
	"mortise/internal/task"
)

// hub follows the inventory's changes and tells the filters that they concern.
// It keeps an index from objects to filters, so that a change costs as much as
// the filters that see it, however many others there are. It only marks:
// properties are computed in the call that waits for them, so that one slow
// client slows nobody down and changes in quick succession are read once.
type hub struct {
	s *Server

	mu        sync.Mutex
	revision  int64
	moved     chan struct{} // closed and replaced when revision rises
	links     map[inventory.Ref]links
	members   map[inventory.Ref]map[*filter]struct{} // filters that report an object
	passing   map[inventory.Ref]map[*filter]struct{} // filters whose traversals go through it
	viewing   map[*filter]struct{}                   // filters whose traversals go through something outside the inventory: views, managers
	singleton map[*filter]struct{}                   // filters that report an object outside the inventory
}

// links are an object's references to others whose properties mention it.
type links struct {
	name  string
	state string // what others show of it besides its name
	to    [4]inventory.Ref
	more  []inventory.Ref
}

func newHub(s *Server) *hub {
	h := &hub{
		s: s, moved: make(chan struct{}), links: map[inventory.Ref]links{},
		members: map[inventory.Ref]map[*filter]struct{}{}, passing: map[inventory.Ref]map[*filter]struct{}{},
		viewing: map[*filter]struct{}{}, singleton: map[*filter]struct{}{},
	}
	h.load()
	return h
}

var allKinds = [...]inventory.Kind{
	inventory.KindFolder, inventory.KindDatacenter, inventory.KindCluster, inventory.KindResourcePool, inventory.KindHost,
	inventory.KindDatastore, inventory.KindNetwork, inventory.KindVM, inventory.KindTask,
}

// load reads the whole inventory.
func (h *hub) load() {
	h.revision = h.s.view.Revision()
	clear(h.links)
	for _, k := range allKinds {
		for _, ref := range h.s.view.All(k) {
			if rec, ok := h.s.view.Get(ref); ok {
				h.links[ref] = linksOf(rec)
			}
		}
	}
}

// run follows the changes until ctx ends.
func (h *hub) run(ctx context.Context) {
	h.mu.Lock()
	at := h.revision
	h.mu.Unlock()
	for {
		refs, now, gap, err := h.s.view.Changes(ctx, at)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			h.s.log.Error("vimapi: following the inventory", "err", err)
			time.Sleep(time.Second)
			continue
		}
		h.mu.Lock()
		if gap {
			h.load()
			h.markAll()
		} else {
			for _, ref := range refs {
				h.changed(ref)
			}
			// Managers and history collectors sum up everything; events have no
			// record in the inventory but come with changes.
			h.mark(h.singleton, "")
		}
		at, h.revision = now, now
		close(h.moved)
		h.moved = make(chan struct{})
		h.mu.Unlock()
	}
}

// catchUp waits until the filters know of everything that the view showed when
// the call began.
func (h *hub) catchUp(ctx context.Context) error {
	want := h.s.view.Revision()
	for {
		h.mu.Lock()
		at, moved := h.revision, h.moved
		h.mu.Unlock()
		if at >= want {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// changed marks whom a change of ref concerns. The lock is held.
func (h *hub) changed(ref inventory.Ref) {
	before, had := h.links[ref]
	rec, have := h.s.view.Get(ref)
	h.mark(h.members[ref], ref)
	var after links
	if have {
		after = linksOf(rec)
		h.links[ref] = after
	} else {
		delete(h.links, ref)
	}
	if ref.Kind() == inventory.KindHost {
		h.touch(after.to[0]) // the cluster sums it up
	}
	if had == have && before.equal(after) {
		return
	}
	// What the object is part of, or was, has other properties now, and
	// traversals may lead elsewhere.
	h.reselect(h.passing[ref])
	for _, other := range before.all() {
		h.touch(other)
	}
	for _, other := range after.all() {
		h.touch(other)
	}
	if had != have || before.to != after.to {
		h.reselect(h.viewing)
	}
	if had && have && (before.name != after.name || before.state != after.state) {
		h.shown(ref)
	}
}

// touch marks an object whose relations have changed, and what sums it up.
func (h *hub) touch(ref inventory.Ref) {
	if name, ok := strings.CutPrefix(string(ref), byName); ok {
		for _, n := range h.s.view.All(inventory.KindNetwork) {
			if h.links[n].name == name {
				h.mark(h.members[n], n)
				h.reselect(h.passing[n])
			}
		}
		return
	}
	h.mark(h.members[ref], ref)
	h.reselect(h.passing[ref])
	for range 3 { // a cluster sums up its hosts, a datacenter its folders
		parent, ok := h.s.view.Parent(ref)
		if !ok {
			return
		}
		h.mark(h.members[parent], parent)
		h.reselect(h.passing[parent])
		ref = parent
	}
}

// shown marks the VMs that show something of ref: their datastore's name in
// paths, their networks' names, whether their host is connected.
func (h *hub) shown(ref inventory.Ref) {
	switch ref.Kind() {
	case inventory.KindDatastore, inventory.KindNetwork, inventory.KindHost:
		for vm, l := range h.links {
			if vm.Kind() == inventory.KindVM && (ref.Kind() == inventory.KindNetwork || slices.Contains(l.to[:], ref)) {
				h.mark(h.members[vm], vm)
			}
		}
	}
}

func (h *hub) mark(filters map[*filter]struct{}, ref inventory.Ref) {
	for f := range filters {
		f.dirty[ref] = struct{}{}
		f.pc.wake()
	}
}

func (h *hub) reselect(filters map[*filter]struct{}) {
	for f := range filters {
		f.again = true
		f.pc.wake()
	}
}

// outside marks filters that report something outside the inventory.
func (h *hub) outside() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mark(h.singleton, "")
}

// viewed makes filters select anew that go through a view.
func (h *hub) viewed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reselect(h.viewing)
}

// again makes a filter select anew at its next turn.
func (h *hub) again(f *filter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f.again = true
	f.pc.wake()
}

func (h *hub) markAll() {
	for _, index := range []map[inventory.Ref]map[*filter]struct{}{h.members, h.passing} {
		for ref, filters := range index {
			h.mark(filters, ref)
			h.reselect(filters)
		}
	}
	h.mark(h.singleton, "")
	h.reselect(h.viewing)
}

// take returns what has been marked since the last take.
func (h *hub) take(f *filter) (dirty map[inventory.Ref]struct{}, again bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	// The map that is handed out is never marked in again, an empty one neither.
	if len(f.dirty) > 0 {
		dirty, f.dirty = f.dirty, map[inventory.Ref]struct{}{}
	}
	again, f.again = f.again, false
	return dirty, again
}

// enter and leave keep the index of what a filter reports.
func (h *hub) enter(f *filter, ref types.ManagedObjectReference) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if id := inventory.Ref(ref.Value); string(id.Kind()) == ref.Type {
		add(h.members, id, f)
	} else {
		h.singleton[f] = struct{}{}
	}
}

func (h *hub) leave(f *filter, ref types.ManagedObjectReference) {
	h.mu.Lock()
	defer h.mu.Unlock()
	drop(h.members, inventory.Ref(ref.Value), f)
}

// route replaces the objects that a filter's traversals go through, and tells
// whether some are new.
func (h *hub) route(f *filter, through map[types.ManagedObjectReference]struct{}) (grown bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ref := range f.through {
		if _, still := through[ref]; !still {
			drop(h.passing, inventory.Ref(ref.Value), f)
		}
	}
	delete(h.viewing, f)
	for ref := range through {
		if _, before := f.through[ref]; !before {
			grown = true
		}
		if id := inventory.Ref(ref.Value); string(id.Kind()) == ref.Type {
			add(h.passing, id, f)
		} else {
			h.viewing[f] = struct{}{}
		}
	}
	f.through = through
	return grown
}

// forget takes a filter out of the index.
func (h *hub) forget(f *filter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ref := range f.members {
		drop(h.members, inventory.Ref(ref.Value), f)
	}
	for ref := range f.through {
		drop(h.passing, inventory.Ref(ref.Value), f)
	}
	delete(h.viewing, f)
	delete(h.singleton, f)
}

func add(index map[inventory.Ref]map[*filter]struct{}, ref inventory.Ref, f *filter) {
	if index[ref] == nil {
		index[ref] = map[*filter]struct{}{}
	}
	index[ref][f] = struct{}{}
}

func drop(index map[inventory.Ref]map[*filter]struct{}, ref inventory.Ref, f *filter) {
	if delete(index[ref], f); len(index[ref]) == 0 {
		delete(index, ref)
	}
}

// byName begins the links to networks, which VMs refer to by name.
const byName = "name:"

// linksOf lists what a record refers to.
func linksOf(rec inventory.Record) links {
	e := rec.Self()
	l := links{name: e.Name, to: [4]inventory.Ref{0: e.Parent}}
	switch r := rec.(type) {
	case *inventory.VM:
		l.to[1], l.to[2], l.to[3] = r.Host, r.Datastore, r.Pool
		l.state = snapshotState(r)
		for _, n := range r.Hardware.NICs {
			l.more = append(l.more, byName+inventory.Ref(n.Network))
		}
	case *inventory.Host:
		l.state = r.Connection
		l.more = append(append(l.more, r.Datastores...), r.Networks...)
	case *inventory.Datastore:
		l.more = append(l.more, r.Hosts()...)
	case *inventory.Network:
		l.more = append(l.more, r.Hosts...)
	case *task.Record:
		l.to[1] = r.Entity
	}
	return l
}

func (l links) equal(o links) bool {
	return l.name == o.name && l.state == o.state && l.to == o.to && slices.Equal(l.more, o.more)
}

func (l links) all() []inventory.Ref {
	var all []inventory.Ref
	for _, r := range l.to {
		if r != "" {
			all = append(all, r)
		}
	}
	return append(all, l.more...)
}
