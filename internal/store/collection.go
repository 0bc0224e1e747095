package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxKey is the longest key of a record, in bytes.
const maxKey = 512

// An Entry is a record as it is at Revision.
type Entry[T any] struct {
	Key string
	// Value is shared with every other reader: what it points to (slices, maps)
	// must not be changed. [Collection.Edit] gives a private copy.
	Value T
	// Revision of the last write; what Update and Delete compare.
	Revision int64
	// Created is the revision of the record's creation.
	Created int64
}

// A Collection is the records under one name, decoded and cached in memory.
type Collection[T any] struct {
	s     *Store
	name  string
	codec Codec[T]
	rows  map[string]row[T] // guarded by s.cache.mu
}

type row[T any] struct {
	entry Entry[T]
	err   error // ErrDamaged; entry.Value is then not set
}

// NewCollection loads the collection called name (lower-case letters, digits,
// hyphens) and keeps it current. A second one of the same name is an error.
func NewCollection[T any](ctx context.Context, s *Store, name string, codec Codec[T]) (*Collection[T], error) {
	if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return nil, fmt.Errorf("store: %q is no name for a collection", name)
	}
	c := &Collection[T]{s: s, name: name, codec: codec, rows: map[string]row[T]{}}
	if err := s.load(ctx, name, c); err != nil {
		return nil, fmt.Errorf("store: loading collection %s: %w", name, err)
	}
	return c, nil
}

// Close forgets the collection: its records stay in the store, and the name may
// be loaded again. Reads after it find nothing.
func (c *Collection[T]) Close() {
	c.s.cache.loading.Lock()
	defer c.s.cache.loading.Unlock()
	c.s.cache.mu.Lock()
	defer c.s.cache.mu.Unlock()
	if c.s.cache.tables[c.name] == table(c) {
		delete(c.s.cache.tables, c.name)
	}
	c.rows = map[string]row[T]{}
}

func (c *Collection[T]) at(key string) string { return "/" + c.name + "/" + key }

// Get returns the record called key as it is now: linearizable. ErrNotFound and
// ErrDamaged are the errors of the record itself.
func (c *Collection[T]) Get(ctx context.Context, key string) (Entry[T], error) {
	if err := c.s.sync(ctx); err != nil {
		return Entry[T]{}, fmt.Errorf("store: reading %s: %w", c.at(key), err)
	}
	c.s.cache.mu.RLock()
	r, ok := c.rows[key]
	c.s.cache.mu.RUnlock()
	if !ok {
		return Entry[T]{}, fmt.Errorf("store: %s: %w", c.at(key), ErrNotFound)
	}
	return r.entry, r.err
}

// List returns the records whose keys begin with prefix, in key order, all as of
// one revision: linearizable. If some are damaged it returns the others with an
// error that wraps ErrDamaged and names them.
func (c *Collection[T]) List(ctx context.Context, prefix string) ([]Entry[T], error) {
	if err := c.s.sync(ctx); err != nil {
		return nil, fmt.Errorf("store: listing %s: %w", c.at(prefix), err)
	}
	var (
		list    []Entry[T]
		damaged []error
	)
	c.s.cache.mu.RLock()
	for key, r := range c.rows {
		switch {
		case !strings.HasPrefix(key, prefix):
		case r.err != nil:
			damaged = append(damaged, r.err)
		default:
			list = append(list, r.entry)
		}
	}
	c.s.cache.mu.RUnlock()
	slices.SortFunc(list, func(a, b Entry[T]) int { return cmp.Compare(a.Key, b.Key) })
	return list, errors.Join(damaged...)
}

// Create writes a new record; ErrExists if there is one.
func (c *Collection[T]) Create(key string, v T) Op { return c.put(key, v, mustNotExist, 0) }

// Update replaces the record that was read at revision; ErrConflict if it has
// changed since, ErrNotFound if it is gone.
func (c *Collection[T]) Update(key string, revision int64, v T) Op {
	return c.put(key, v, mustBeAt, revision)
}

// Put writes the record whether or not it exists.
func (c *Collection[T]) Put(key string, v T) Op { return c.put(key, v, anything, 0) }

// Delete removes the record that was read at revision; revision 0 means
// whatever is there. ErrNotFound if nothing is.
func (c *Collection[T]) Delete(key string, revision int64) Op {
	del := clientv3.OpDelete(c.at(key))
	o := Op{at: c.at(key), need: mustBeAt, rev: revision, op: &del, err: checkKey(key)}
	if revision == 0 {
		o.need = mustExist
	}
	return o
}

// Unchanged writes nothing and makes the transaction fail with ErrConflict if
// the record has changed since revision; revision 0 means that it must not
// exist.
func (c *Collection[T]) Unchanged(key string, revision int64) Op {
	o := Op{at: c.at(key), need: mustBeAt, rev: revision, err: checkKey(key)}
	if revision == 0 {
		o.need = mustNotExist
	}
	return o
}

// Edit reads the record, lets change alter a private copy and writes it, again
// from the start when somebody else was faster. An error from change ends it
// and is returned as it is.
func (c *Collection[T]) Edit(ctx context.Context, key string, change func(*T) error) (Entry[T], error) {
	for {
		e, err := c.Get(ctx, key)
		if err != nil {
			return e, err
		}
		stored, err := c.codec.Encode(c.at(key), e.Value)
		if err != nil {
			return e, fmt.Errorf("store: %w", err)
		}
		if e.Value, err = c.codec.Decode(c.at(key), stored); err != nil {
			return e, fmt.Errorf("store: %w", err)
		}
		if err := change(&e.Value); err != nil {
			return e, err
		}
		rev, err := c.s.Commit(ctx, c.Update(key, e.Revision, e.Value))
		if err == nil {
			e.Revision = rev
		}
		if !errors.Is(err, ErrConflict) {
			return e, err
		}
	}
}

func (c *Collection[T]) put(key string, v T, need condition, rev int64) Op {
	o := Op{at: c.at(key), need: need, rev: rev, err: checkKey(key)}
	if o.err != nil {
		return o
	}
	stored, err := c.codec.Encode(o.at, v)
	if err != nil {
		o.err = err
		return o
	}
	put := clientv3.OpPut(o.at, string(stored))
	o.op = &put
	return o
}

func checkKey(key string) error {
	if key == "" || len(key) > maxKey || strings.ContainsRune(key, 0) {
		return fmt.Errorf("a record's key has 1 to %d bytes and no NUL; %.40q does not fit", maxKey, key)
	}
	return nil
}

// decode makes a row of what etcd holds.
func (c *Collection[T]) decode(kv *mvccpb.KeyValue) (string, row[T]) {
	key := string(kv.Key[len(c.name)+2:])
	r := row[T]{entry: Entry[T]{Key: key, Revision: kv.ModRevision, Created: kv.CreateRevision}}
	v, err := c.codec.Decode(string(kv.Key), kv.Value)
	if err != nil {
		r.err = fmt.Errorf("store: %w: %w", ErrDamaged, err)
		c.s.log.Error("record is damaged", "collection", c.name, "key", key, "revision", kv.ModRevision, "error", err)
		return key, r
	}
	r.entry.Value = v
	return key, r
}

// A table is a collection as the cache sees it. apply and replace are called
// with the cache's lock held; stage without.
type table interface {
	apply(ev *clientv3.Event)
	// stage decodes a whole new content; replace puts it in place and reports
	// the keys whose revision differs.
	stage(kvs []*mvccpb.KeyValue) (replace func() (changed []string))
}

func (c *Collection[T]) apply(ev *clientv3.Event) {
	if ev.Type == clientv3.EventTypeDelete {
		delete(c.rows, string(ev.Kv.Key[len(c.name)+2:]))
		return
	}
	key, r := c.decode(ev.Kv)
	c.rows[key] = r
}

func (c *Collection[T]) stage(kvs []*mvccpb.KeyValue) func() []string {
	rows := make(map[string]row[T], len(kvs))
	for _, kv := range kvs {
		key, r := c.decode(kv)
		rows[key] = r
	}
	return func() (changed []string) {
		for key, r := range rows {
			if old, ok := c.rows[key]; !ok || old.entry.Revision != r.entry.Revision {
				changed = append(changed, key)
			}
		}
		for key := range c.rows {
			if _, ok := rows[key]; !ok {
				changed = append(changed, key)
			}
		}
		c.rows = rows
		return changed
	}
}
