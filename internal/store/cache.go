package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
)

// maxBatch is how many events are applied in one go, at least.
const maxBatch = 512

// cache is what all collections share: how far they have come, and who waits.
type cache struct {
	mu       sync.RWMutex // guards every collection's rows and the watchers
	tables   map[string]table
	watchers map[*Watcher]struct{}

	loading sync.Mutex // held while tables come, go and are prepared for events

	revision atomic.Int64  // all events up to here are in the tables
	soleIn   atomic.Uint64 // see Store.sole
	closed   atomic.Bool
	waitMu   sync.Mutex
	waiting  []waiter // for a revision that is not here yet
}

type waiter struct {
	need int64
	here chan struct{}
}

func (c *cache) init(revision int64) {
	c.tables = map[string]table{}
	c.watchers = map[*Watcher]struct{}{}
	c.revision.Store(revision)
}

func (c *cache) close() {
	c.closed.Store(true)
	c.wake(math.MaxInt64)
	c.mu.Lock()
	defer c.mu.Unlock()
	for w := range c.watchers {
		w.wake()
	}
}

// reach records that the tables are at revision and wakes those who wait for
// it. It is called with mu held, so that who finds the revision finds the rows.
func (c *cache) reach(revision int64) {
	c.revision.Store(revision)
	c.wake(revision)
}

func (c *cache) wake(revision int64) {
	c.waitMu.Lock()
	defer c.waitMu.Unlock()
	c.waiting = slices.DeleteFunc(c.waiting, func(w waiter) bool {
		if w.need > revision {
			return false
		}
		close(w.here)
		return true
	})
}

// await returns when the tables are at revision need.
func (c *cache) await(ctx context.Context, need int64) error {
	for c.revision.Load() < need && !c.closed.Load() {
		w := waiter{need, make(chan struct{})}
		c.waitMu.Lock()
		if c.revision.Load() >= need || c.closed.Load() { // it came before it was waited for
			c.waitMu.Unlock()
			continue
		}
		c.waiting = append(c.waiting, w)
		c.waitMu.Unlock()
		select {
		case <-w.here:
		case <-ctx.Done():
			c.waitMu.Lock()
			defer c.waitMu.Unlock()
			c.waiting = slices.DeleteFunc(c.waiting, func(o waiter) bool { return o.here == w.here })
			return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
	if c.closed.Load() {
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
	}
	return nil
}

// sync returns when the cache holds everything that was committed when sync was
// called. Asking after the call is what makes it linearizable: an answer that
// was already under way could be older than a write that came before the call.
func (s *Store) sync(ctx context.Context) error {
	if err := s.readIndex(ctx); err != nil {
		return err
	}
	// Every revision has an event, so the watch will reach this one.
	return s.cache.await(ctx, s.etcd.Server.KV().Rev())
}

// readIndex waits until this member has applied all that was committed when it
// was called. An election in between is waited out: asking again changes nothing.
func (s *Store) readIndex(ctx context.Context) error {
	term, sole := s.sole()
	if sole && s.cache.soleIn.Load() == term && s.etcd.Server.AppliedIndex() >= s.etcd.Server.CommittedIndex() {
		return nil
	}
	if err := s.askRaft(ctx); err != nil {
		return err
	}
	if sole {
		s.cache.soleIn.Store(term)
	}
	return nil
}

// sole tells whether this member is the leader of itself alone, and the term that
// it is in: then nothing is committed that it does not know of, and it can spare
// raft the question, which takes four goroutines and is a third of what a read
// costs.
//
// For somebody else to commit anything, there must be a second voting member. One
// comes as a learner first, and raft takes the change that lets it vote only from a
// leader that has applied the one before: this one, which then sees two members
// here. What the learner applies, and may answer for, this member has committed
// before it tells the learner so; hence the look at the two indexes. A leader that
// has just been elected does not know how much its predecessors have committed, so
// in each term raft is asked once (raft thesis §6.4, its own short cut likewise).
func (s *Store) sole() (term uint64, is bool) {
	e := s.etcd.Server
	term = e.Term()
	members := e.Cluster().Members()
	return term, term != 0 && len(members) == 1 && members[0].ID == e.MemberID() && s.Leader() == uint64(e.MemberID())
}

// askRaft is readIndex by way of raft.
func (s *Store) askRaft(ctx context.Context) error {
	for {
		asking, done, err := s.led(ctx)
		if err != nil {
			return err
		}
		err = s.etcd.Server.LinearizableReadNotify(asking)
		cause := context.Cause(asking)
		done()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !errors.Is(err, rpctypes.ErrLeaderChanged) && !errors.Is(err, etcderrors.ErrLeaderChanged) && !errors.Is(cause, errLeaderChanged) {
			return fmt.Errorf("%w: %w", ErrUnavailable, cmp.Or(cause, err))
		}
	}
}

// follow feeds the tables from the watch until ctx ends. A watch that ends for
// another reason is begun again where the tables are; when those revisions are
// compacted away the tables are rebuilt first, and reads wait meanwhile.
func (s *Store) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.watchOnce(ctx)
		if errors.Is(err, rpctypes.ErrCompacted) {
			s.log.Warn("store cache fell behind compaction; rebuilding it")
			err = s.rebuild(ctx)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("store watch ended; beginning again", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
}

// watchOnce takes events from etcd's key space itself, without the hops of a
// client's watch: reads wait for them.
func (s *Store) watchOnce(ctx context.Context) error {
	stream := s.etcd.Server.Watchable().NewWatchStream()
	defer stream.Close()
	id, err := stream.Watch(ctx, clientv3.AutoWatchID, []byte{0}, []byte{}, s.cache.revision.Load()+1)
	if err != nil {
		return err
	}
	defer stream.Cancel(id)
	for {
		select {
		case answer, ok := <-stream.Chan():
			events, err := eventsOf(answer, ok)
			// What has come meanwhile is taken along, in one go.
			for more := err == nil; more && len(events) < maxBatch; {
				select {
				case answer, ok = <-stream.Chan():
					var next []*mvccpb.Event
					next, err = eventsOf(answer, ok)
					events = append(events, next...)
					more = err == nil
				default:
					more = false
				}
			}
			if len(events) > 0 {
				s.apply(events)
			}
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func eventsOf(answer mvcc.WatchResponse, ok bool) ([]*mvccpb.Event, error) {
	switch {
	case !ok:
		return nil, errors.New("etcd has ended it")
	case answer.CompactRevision != 0:
		return nil, rpctypes.ErrCompacted
	}
	return answer.Events, nil
}

// apply takes the events of one or more whole revisions: etcd does not split a
// revision over two answers. Decoding is done before readers are locked out.
func (s *Store) apply(events []*mvccpb.Event) {
	s.cache.loading.Lock()
	defer s.cache.loading.Unlock()
	type step struct {
		name, key string
		table     table // nil: nobody keeps it
		prepared  any   // nil: deleted
	}
	at := s.cache.revision.Load()
	steps := make([]step, 0, len(events))
	for _, ev := range events {
		name, key, ok := split(ev.Kv.Key)
		if !ok {
			continue
		}
		st := step{name: name, key: key}
		if ev.Kv.ModRevision > at {
			if st.table = s.cache.tables[name]; st.table != nil && ev.Type == mvccpb.Event_PUT {
				st.prepared = st.table.prepare(key, ev.Kv)
			}
		}
		steps = append(steps, st)
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	for _, st := range steps {
		if st.table != nil {
			st.table.install(st.key, st.prepared)
		}
		s.cache.note(st.name, st.key)
	}
	s.cache.reach(events[len(events)-1].Kv.ModRevision)
}

// split cuts "/collection/key".
func split(at []byte) (name, key string, ok bool) {
	rest, ok := strings.CutPrefix(string(at), "/")
	if !ok {
		return "", "", false
	}
	name, key, ok = strings.Cut(rest, "/")
	return name, key, ok && key != ""
}

// load reads a collection as of the revision that the other tables are at, and
// adds it to them.
func (s *Store) load(ctx context.Context, name string, t table) error {
	if err := s.sync(ctx); err != nil {
		return err
	}
	s.cache.loading.Lock()
	defer s.cache.loading.Unlock()
	if s.cache.tables[name] != nil {
		return errors.New("it is open already")
	}
	replace, err := t.stage(s.pages(ctx, "/"+name+"/", s.cache.revision.Load()))
	if err != nil {
		return err
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	replace()
	s.cache.tables[name] = t
	return nil
}

// rebuild reads every table anew, as of one revision.
func (s *Store) rebuild(ctx context.Context) error {
	s.cache.loading.Lock()
	defer s.cache.loading.Unlock()
	at := s.etcd.Server.KV().Rev()
	replace := map[string]func() []string{}
	for name, t := range s.cache.tables { // written only under loading
		var err error
		if replace[name], err = t.stage(s.pages(ctx, "/"+name+"/", at)); err != nil {
			return fmt.Errorf("rebuilding collection %s: %w", name, err)
		}
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	for name, f := range replace {
		for _, key := range f() {
			s.cache.note(name, key)
		}
	}
	s.cache.reach(at)
	return nil
}
