package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
)

// loadPage is how many records one read of a load brings.
const loadPage = 10_000

// cache is what all collections share: how far they have come, and who waits.
type cache struct {
	mu       sync.RWMutex // guards what follows and every collection's rows
	tables   map[string]table
	revision int64         // all events up to here are in the tables
	moved    chan struct{} // closed and replaced when revision moves
	watchers map[*Watcher]struct{}
	closed   bool

	loading sync.Mutex // held while a table is loaded, so that events wait
}

func (c *cache) init(revision int64) {
	c.tables = map[string]table{}
	c.watchers = map[*Watcher]struct{}{}
	c.revision = revision
	c.moved = make(chan struct{})
}

func (c *cache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	close(c.moved)
	for w := range c.watchers {
		w.wake()
	}
}

// reach records that the tables are at revision and wakes those who wait. The
// lock is held.
func (c *cache) reach(revision int64) {
	if c.closed {
		return
	}
	c.revision = revision
	close(c.moved)
	c.moved = make(chan struct{})
}

// sync returns when the cache holds everything that was committed when sync was
// called. Asking after the call is what makes it linearizable: an answer that
// was already under way could be older than a write that came before the call.
func (s *Store) sync(ctx context.Context) error {
	if err := s.readIndex(ctx); err != nil {
		return err
	}
	// Every revision has an event, so the watch will reach this one.
	need := s.etcd.Server.KV().Rev()
	for {
		s.cache.mu.RLock()
		at, moved, closed := s.cache.revision, s.cache.moved, s.cache.closed
		s.cache.mu.RUnlock()
		if closed {
			return fmt.Errorf("%w: it is closed", ErrUnavailable)
		}
		if at >= need {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// readIndex waits until this member has applied all that was committed when it
// was called. An election in between is waited out: asking again changes nothing.
func (s *Store) readIndex(ctx context.Context) error {
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

func (s *Store) watchOnce(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.cache.mu.RLock()
	from := s.cache.revision + 1
	s.cache.mu.RUnlock()
	for answer := range s.client.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if err := answer.Err(); err != nil {
			return err
		}
		if len(answer.Events) > 0 {
			s.apply(answer.Events)
		}
	}
	return ctx.Err()
}

// apply takes the events of one or more whole revisions: etcd does not split a
// revision over two answers unless asked to.
func (s *Store) apply(events []*clientv3.Event) {
	s.cache.loading.Lock()
	defer s.cache.loading.Unlock()
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	for _, ev := range events {
		name, key, ok := split(ev.Kv.Key)
		if !ok {
			continue
		}
		if t := s.cache.tables[name]; t != nil && ev.Kv.ModRevision > s.cache.revision {
			t.apply(ev)
		}
		s.cache.note(name, key)
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
	s.cache.mu.RLock()
	at, taken := s.cache.revision, s.cache.tables[name] != nil
	s.cache.mu.RUnlock()
	if taken {
		return errors.New("it is open already")
	}
	kvs, err := s.readAll(ctx, "/"+name+"/", at)
	if err != nil {
		return err
	}
	replace := t.stage(kvs)
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
		kvs, err := s.readAll(ctx, "/"+name+"/", at)
		if err != nil {
			return fmt.Errorf("rebuilding collection %s: %w", name, err)
		}
		replace[name] = t.stage(kvs)
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

// readAll reads the records under prefix as of revision.
func (s *Store) readAll(ctx context.Context, prefix string, revision int64) ([]*mvccpb.KeyValue, error) {
	var all []*mvccpb.KeyValue
	end := clientv3.GetPrefixRangeEnd(prefix)
	for from := prefix; ; {
		answer, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithRev(revision),
			clientv3.WithLimit(loadPage), clientv3.WithSerializable())
		if err != nil {
			return nil, fromEtcd(err)
		}
		all = append(all, answer.Kvs...)
		if !answer.More {
			return all, nil
		}
		from = string(all[len(all)-1].Key) + "\x00"
	}
}
