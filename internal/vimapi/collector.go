package vimapi

import (
	"hash/maphash"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

func propertyCollectorRef() types.ManagedObjectReference {
	return singleton("PropertyCollector", "propertyCollector")
}

// keepAlive is how often a waiting call counts as a use of its session, and
// learns that it has ended.
const keepAlive = time.Minute

// collector is a PropertyCollector: filters, and the version of what its client
// knows. One call at a time works for it; others wait for their turn.
type collector struct {
	client *client
	ref    types.ManagedObjectReference
	seed   maphash.Seed
	turn   chan struct{} // holds one token
	news   chan struct{} // a filter has been marked

	mu      sync.Mutex
	filters []*filter
	removed []*filter     // still in the hub's index
	gone    chan struct{} // closed by destroy
	cancel  chan struct{} // closed and replaced by CancelWaitForUpdates
	dead    bool

	// Used by the call whose turn it is.
	version int64
	pending []pendingUpdate
	last    *types.UpdateSet // the answer that made version
}

// pendingUpdate has not been sent yet.
type pendingUpdate struct {
	filter *filter
	update types.ObjectUpdate
}

func newCollector(c *client, ref types.ManagedObjectReference) *collector {
	pc := &collector{
		client: c, ref: ref, seed: maphash.MakeSeed(), turn: make(chan struct{}, 1), news: make(chan struct{}, 1),
		gone: make(chan struct{}), cancel: make(chan struct{}),
	}
	pc.turn <- struct{}{}
	return pc
}

// wake tells a waiting call that there may be news.
func (pc *collector) wake() {
	select {
	case pc.news <- struct{}{}:
	default:
	}
}

func (pc *collector) list() []*filter {
	pc.mu.Lock()
	defer pc.mu.Unlock()
	return slices.Clone(pc.filters)
}

func (pc *collector) add(f *filter) {
	pc.mu.Lock()
	pc.filters = append(pc.filters, f)
	pc.mu.Unlock()
	pc.wake()
}

// remove takes a filter away. What a working call still does with it is undone
// when that call releases its turn.
func (pc *collector) remove(f *filter) {
	pc.client.disown(f.ref)
	pc.mu.Lock()
	defer pc.mu.Unlock()
	pc.filters = slices.DeleteFunc(pc.filters, func(g *filter) bool { return g == f })
	pc.removed = append(pc.removed, f)
	pc.wake()
	select {
	case <-pc.turn:
		pc.purge()
		pc.turn <- struct{}{}
	default:
	}
}

// release gives the turn to the next call.
func (pc *collector) release() {
	pc.mu.Lock()
	defer pc.mu.Unlock()
	pc.purge()
	pc.turn <- struct{}{}
}

// purge takes removed filters out of the hub's index. Both the lock and the
// turn are held.
func (pc *collector) purge() {
	for _, f := range pc.removed {
		pc.client.s.hub.forget(f)
	}
	pc.removed = nil
}

// destroy ends waiting calls and forgets the filters.
func (pc *collector) destroy() {
	pc.mu.Lock()
	if pc.dead {
		pc.mu.Unlock()
		return
	}
	pc.dead = true
	close(pc.gone)
	pc.mu.Unlock()
	for _, f := range pc.list() {
		pc.remove(f)
	}
}

func (pc *collector) cancelled() chan struct{} {
	pc.mu.Lock()
	defer pc.mu.Unlock()
	return pc.cancel
}

func (pc *collector) cancelWait() {
	pc.mu.Lock()
	defer pc.mu.Unlock()
	close(pc.cancel)
	pc.cancel = make(chan struct{})
}

// waiting says how long a call waits for news, and how many it takes.
type waiting struct {
	version string
	most    time.Duration // negative: for ever
	objects int           // 0: all
}

// wait returns what is new since w.version; nil when nothing was until w.most.
func (pc *collector) wait(c *call, w waiting) (*types.UpdateSet, error) {
	cancelled := pc.cancelled()
	stop := func() error {
		select {
		case <-pc.gone:
			return objectNotFound(pc.ref)
		case <-cancelled:
			return fault(&types.RequestCanceled{}, "the wait for updates was cancelled")
		case <-pc.client.ended:
			return c.notAuthenticated("")
		default:
			return c.ctx.Err()
		}
	}
	select {
	case <-pc.turn:
		defer pc.release()
	case <-pc.gone:
		return nil, stop()
	case <-cancelled:
		return nil, stop()
	case <-pc.client.ended:
		return nil, stop()
	case <-c.ctx.Done():
		return nil, stop()
	}
	if again, err := pc.begin(w.version); again != nil || err != nil {
		return again, err
	}
	var deadline <-chan time.Time
	if w.most >= 0 {
		t := time.NewTimer(w.most)
		defer t.Stop()
		deadline = t.C
	}
	alive := time.NewTicker(keepAlive)
	defer alive.Stop()
	for {
		if err := pc.gather(c); err != nil {
			return nil, err
		}
		if len(pc.pending) > 0 {
			return pc.answer(w.objects), nil
		}
		select {
		case <-pc.news:
		case <-alive.C:
			if _, ok := c.s.auth.Session(c.token); !ok {
				c.s.clients.end(pc.client.key)
				return nil, c.notAuthenticated("")
			}
		case <-deadline:
			return nil, nil
		case <-pc.gone:
			return nil, stop()
		case <-cancelled:
			return nil, stop()
		case <-pc.client.ended:
			return nil, stop()
		case <-c.ctx.Done():
			return nil, stop()
		}
	}
}

// begin checks the version that the client says it has. One that has missed the
// last answer gets it once more.
func (pc *collector) begin(version string) (again *types.UpdateSet, err error) {
	if version == "" {
		for _, f := range pc.list() {
			f.reset()
		}
		pc.pending, pc.last = nil, nil
		return nil, nil
	}
	n, err := strconv.ParseInt(version, 10, 64)
	switch {
	case err == nil && n == pc.version:
		return nil, nil
	case err == nil && n == pc.version-1 && pc.last != nil:
		return pc.last, nil
	}
	return nil, fault(&types.InvalidCollectorVersion{}, "the version %q is not one that this property collector gave last; begin anew with an empty one", clip(version))
}

// gather makes what the filters know pending.
func (pc *collector) gather(c *call) error {
	if err := c.s.hub.catchUp(c.ctx); err != nil {
		return err
	}
	select {
	case <-pc.news: // whatever it told is read now
	default:
	}
	pc.mu.Lock()
	pc.purge()
	pc.mu.Unlock()
	filters := pc.list()
	pc.pending = slices.DeleteFunc(pc.pending, func(p pendingUpdate) bool { return !slices.Contains(filters, p.filter) })
	r := c.s.reader(c.session, pc.client)
	for _, f := range filters {
		updates, err := f.update(r)
		if err != nil {
			return err
		}
		for _, u := range updates {
			pc.pending = append(pc.pending, pendingUpdate{f, u})
		}
	}
	return nil
}

// answer takes up to most pending updates as the next version.
func (pc *collector) answer(most int) *types.UpdateSet {
	n := len(pc.pending)
	if most > 0 && most < n {
		n = most
	}
	pc.version++
	set := &types.UpdateSet{Version: strconv.FormatInt(pc.version, 10)}
	for _, p := range pc.pending[:n] {
		last := len(set.FilterSet) - 1
		if last < 0 || set.FilterSet[last].Filter != p.filter.ref {
			set.FilterSet = append(set.FilterSet, types.PropertyFilterUpdate{Filter: p.filter.ref})
			last++
		}
		set.FilterSet[last].ObjectSet = append(set.FilterSet[last].ObjectSet, p.update)
	}
	pc.pending = slices.Clone(pc.pending[n:])
	if len(pc.pending) > 0 {
		truncated := true
		set.Truncated = &truncated
	}
	pc.last = set
	return set
}

// collectorOf is the collector that a call is about.
func (c *call) collectorOf(ref types.ManagedObjectReference) (*collector, error) {
	return ownedBy[*collector](c, ref)
}

func (c *call) createPropertyCollector(*types.CreatePropertyCollector) (*types.CreatePropertyCollectorResponse, error) {
	o, err := c.client.own("PropertyCollector", func(ref types.ManagedObjectReference) any { return newCollector(c.client, ref) })
	if err != nil {
		return nil, err
	}
	return &types.CreatePropertyCollectorResponse{Returnval: o.(*collector).ref}, nil
}

func (c *call) destroyPropertyCollector(q *types.DestroyPropertyCollector) (*types.DestroyPropertyCollectorResponse, error) {
	pc, err := c.collectorOf(q.This)
	if err != nil {
		return nil, err
	}
	if pc == c.client.std {
		return nil, notSupported("the session's own property collector cannot be destroyed")
	}
	pc.destroy()
	c.client.disown(pc.ref)
	return &types.DestroyPropertyCollectorResponse{}, nil
}

func (c *call) createFilter(q *types.CreateFilter) (*types.CreateFilterResponse, error) {
	pc, err := c.collectorOf(q.This)
	if err != nil {
		return nil, err
	}
	spec, err := c.s.compile(&q.Spec)
	if err != nil {
		return nil, err
	}
	r := c.reader()
	for _, o := range spec.objects {
		if _, ok := r.lookup(o.ref); !ok && !spec.reportMissing {
			return nil, objectNotFound(o.ref)
		}
	}
	o, err := c.client.own("PropertyFilter", func(ref types.ManagedObjectReference) any {
		return newFilter(pc, ref, spec, q.Spec, q.PartialUpdates)
	})
	if err != nil {
		return nil, err
	}
	pc.add(o.(*filter))
	return &types.CreateFilterResponse{Returnval: o.(*filter).ref}, nil
}

func (c *call) destroyPropertyFilter(q *types.DestroyPropertyFilter) (*types.DestroyPropertyFilterResponse, error) {
	f, err := ownedBy[*filter](c, q.This)
	if err != nil {
		return nil, err
	}
	f.pc.remove(f)
	return &types.DestroyPropertyFilterResponse{}, nil
}

func (c *call) waitForUpdates(q *types.WaitForUpdates) (*types.WaitForUpdatesResponse, error) {
	pc, err := c.collectorOf(q.This)
	if err != nil {
		return nil, err
	}
	set, err := pc.wait(c, waiting{version: q.Version, most: -1})
	if err != nil {
		return nil, err
	}
	return &types.WaitForUpdatesResponse{Returnval: *set}, nil
}

// maxWait bounds a wait, in seconds; clients ask again.
const maxWait = 24 * 60 * 60

func (c *call) waitForUpdatesEx(q *types.WaitForUpdatesEx) (*types.WaitForUpdatesExResponse, error) {
	pc, err := c.collectorOf(q.This)
	if err != nil {
		return nil, err
	}
	w := waiting{version: q.Version, most: -1}
	if q.Options != nil {
		if s := q.Options.MaxWaitSeconds; s != nil {
			if *s < 0 {
				return nil, invalidArgument("options.maxWaitSeconds", "maxWaitSeconds is negative: %d", *s)
			}
			w.most = time.Duration(min(*s, maxWait)) * time.Second
		}
		if q.Options.MaxObjectUpdates < 0 {
			return nil, invalidArgument("options.maxObjectUpdates", "maxObjectUpdates is negative: %d", q.Options.MaxObjectUpdates)
		}
		w.objects = int(q.Options.MaxObjectUpdates)
	}
	set, err := pc.wait(c, w)
	return &types.WaitForUpdatesExResponse{Returnval: set}, err
}

func (c *call) checkForUpdates(q *types.CheckForUpdates) (*types.CheckForUpdatesResponse, error) {
	pc, err := c.collectorOf(q.This)
	if err != nil {
		return nil, err
	}
	set, err := pc.wait(c, waiting{version: q.Version, most: 0})
	return &types.CheckForUpdatesResponse{Returnval: set}, err
}

func (c *call) cancelWaitForUpdates(q *types.CancelWaitForUpdates) (*types.CancelWaitForUpdatesResponse, error) {
	pc, err := c.collectorOf(q.This)
	if err != nil {
		return nil, err
	}
	pc.cancelWait()
	return &types.CancelWaitForUpdatesResponse{}, nil
}

func collectorProps() map[string]prop {
	return map[string]prop{"filter": on(func(r *reader, pc *collector) any {
		refs := []types.ManagedObjectReference{}
		for _, f := range pc.list() {
			refs = append(refs, f.ref)
		}
		return refs
	})}
}

func filterProps() map[string]prop {
	return map[string]prop{
		"spec":           on(func(_ *reader, f *filter) any { return f.source }),
		"partialUpdates": on(func(_ *reader, f *filter) any { return f.partial }),
	}
}
