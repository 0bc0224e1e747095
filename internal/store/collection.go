package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
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

// A Collection is the records under one name, cached in memory.
type Collection[T any] struct {
	s        *Store
	name     string
	codec    Codec[T]
	lazy     bool               // see DecodeOnRead
	uncached bool               // see Uncached
	rows     map[string]*row[T] // guarded by s.cache.mu
	index    *index[T]          // nil without IndexBy; guarded alike
}

// largeLoad is how many records are many.
const largeLoad = 100_000

// An Option says how a collection is kept in memory.
type Option[T any] func(*Collection[T])

// DecodeOnRead keeps records as they are stored, and decodes them each time they
// are read: for collections so large that memory counts, and for values that
// should not lie about in clear. Every record is still decoded once when it
// comes, so that damage is reported then.
func DecodeOnRead[T any]() Option[T] { return func(c *Collection[T]) { c.lazy = true } }

// Uncached keeps nothing in memory: reads ask etcd's database. It is for large
// collections that are written and hardly read, such as an index whose only use
// is that a place in it is taken once.
func Uncached[T any]() Option[T] { return func(c *Collection[T]) { c.uncached = true } }

// NewCollection loads the collection called name (lower-case letters, digits,
// hyphens) and keeps it current. A second one of the same name is an error.
func NewCollection[T any](ctx context.Context, s *Store, name string, codec Codec[T], options ...Option[T]) (*Collection[T], error) {
	if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return nil, fmt.Errorf("store: %q is no name for a collection", name)
	}
	c := &Collection[T]{s: s, name: name, codec: codec, rows: map[string]*row[T]{}}
	for _, o := range options {
		o(c)
	}
	if err := s.load(ctx, name, c); err != nil {
		return nil, fmt.Errorf("store: loading collection %s: %w", name, err)
	}
	s.cache.mu.RLock()
	many := len(c.rows) > largeLoad
	s.cache.mu.RUnlock()
	if many {
		debug.FreeOSMemory() // a load leaves as much garbage as it loads
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
	c.rows = map[string]*row[T]{}
	if c.index != nil {
		c.index.reset()
	}
}

func (c *Collection[T]) at(key string) string { return "/" + c.name + "/" + key }

// Get returns the record called key as it is now: linearizable. ErrNotFound and
// ErrDamaged are the errors of the record itself.
func (c *Collection[T]) Get(ctx context.Context, key string) (Entry[T], error) {
	if err := c.s.sync(ctx); err != nil {
		return Entry[T]{}, fmt.Errorf("store: reading %s: %w", c.at(key), err)
	}
	return c.peek(key)
}

func (c *Collection[T]) peek(key string) (Entry[T], error) {
	if c.uncached {
		return c.ask(key)
	}
	c.s.cache.mu.RLock()
	r := c.rows[key]
	c.s.cache.mu.RUnlock()
	if r == nil {
		return Entry[T]{}, fmt.Errorf("store: %s: %w", c.at(key), ErrNotFound)
	}
	return c.entry(r)
}

// List returns the records whose keys begin with prefix, in key order, all as of
// one revision: linearizable. If some are damaged it returns the others with an
// error that wraps ErrDamaged and names them.
func (c *Collection[T]) List(ctx context.Context, prefix string) ([]Entry[T], error) {
	if err := c.s.sync(ctx); err != nil {
		return nil, fmt.Errorf("store: listing %s: %w", c.at(prefix), err)
	}
	var (
		rows    []*row[T]
		damaged []error
	)
	if c.uncached {
		var err error
		if rows, err = c.askAll(ctx, prefix); err != nil {
			return nil, fmt.Errorf("store: listing %s: %w", c.at(prefix), err)
		}
	}
	c.s.cache.mu.RLock()
	for key, r := range c.rows {
		if strings.HasPrefix(key, prefix) {
			rows = append(rows, r)
		}
	}
	c.s.cache.mu.RUnlock()
	slices.SortFunc(rows, func(a, b *row[T]) int { return cmp.Compare(a.key, b.key) })
	list := make([]Entry[T], 0, len(rows))
	for _, r := range rows {
		if e, err := c.entry(r); err != nil {
			damaged = append(damaged, err)
		} else {
			list = append(list, e)
		}
	}
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
	o := Op{at: c.at(key), need: mustBeAt, rev: revision, err: checkKey(key)}
	o.op = &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(o.at)}}}
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
	o.op = &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(o.at), Value: stored}}}
	return o
}

func checkKey(key string) error {
	if key == "" || len(key) > maxKey || strings.ContainsRune(key, 0) {
		return fmt.Errorf("a record's key has 1 to %d bytes and no NUL; %.40q does not fit", maxKey, key)
	}
	return nil
}
