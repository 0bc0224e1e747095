package store

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
)

// A row is a record in memory. It does not change: a write puts another in its
// place, so that whoever has one may keep it without a lock.
type row[T any] struct {
	key               string
	revision, created int64
	value             T        // unless the collection decodes on read
	stored            []byte   // only if it does
	terms             []uint64 // under which the index has it
	damage            *damage  // why it has no value
}

type damage struct{ err error }

// entry is the row as readers get it.
func (c *Collection[T]) entry(r *row[T]) (Entry[T], error) {
	e := Entry[T]{Key: r.key, Revision: r.revision, Created: r.created}
	if r.damage != nil {
		return e, r.damage.err
	}
	e.Value = r.value
	if c.lazy {
		var err error
		if e.Value, err = c.codec.Decode(c.at(r.key), r.stored); err != nil { // it was whole when it came
			return Entry[T]{Key: r.key, Revision: r.revision, Created: r.created}, fmt.Errorf("store: %w: %w", ErrDamaged, err)
		}
	}
	return e, nil
}

// row makes a row of what etcd holds.
func (c *Collection[T]) row(key string, kv *mvccpb.KeyValue) *row[T] {
	r := &row[T]{key: key, revision: kv.ModRevision, created: kv.CreateRevision}
	v, err := c.codec.Decode(string(kv.Key), kv.Value)
	if err != nil {
		r.damage = &damage{fmt.Errorf("store: %w: %w", ErrDamaged, err)}
		c.s.log.Error("record is damaged", "collection", c.name, "key", key, "revision", kv.ModRevision, "error", err)
		return r
	}
	if c.lazy {
		r.stored = kv.Value
	} else {
		r.value = v
	}
	if c.index != nil {
		r.terms = c.index.termsOf(v)
	}
	return r
}

// A table is a collection as the cache sees it. install, and what stage
// returns, are called with the cache's lock held; prepare and stage without.
type table interface {
	// prepare decodes a record; install puts what it made in place, nil for a
	// record that was deleted.
	prepare(key string, kv *mvccpb.KeyValue) any
	install(key string, prepared any)
	// stage decodes a whole new content; replace puts it in place and reports
	// the keys whose revision differs.
	stage(pages iter.Seq2[[]*mvccpb.KeyValue, error]) (replace func() (changed []string), err error)
}

func (c *Collection[T]) prepare(key string, kv *mvccpb.KeyValue) any {
	if c.uncached {
		return nil
	}
	return c.row(key, kv)
}

func (c *Collection[T]) install(key string, prepared any) {
	if c.uncached {
		return
	}
	old := c.rows[key]
	r, _ := prepared.(*row[T])
	if r == nil {
		delete(c.rows, key)
	} else {
		c.rows[key] = r
	}
	if c.index != nil {
		c.index.replace(old, r)
	}
}

// stage decodes on all cores while further pages are read.
func (c *Collection[T]) stage(pages iter.Seq2[[]*mvccpb.KeyValue, error]) (func() []string, error) {
	if c.uncached {
		return func() []string { return nil }, nil
	}
	many := c.s.count("/" + c.name + "/")
	if many > largeLoad {
		defer giveRoom(loadRoom)()
	}
	var (
		work    = make(chan []*mvccpb.KeyValue, 1)
		workers sync.WaitGroup
		mu      sync.Mutex
		rows    = make(map[string]*row[T], many)
		failed  error
	)
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for page := range work {
				list := make([]*row[T], len(page))
				for i, kv := range page {
					list[i] = c.row(string(kv.Key[len(c.name)+2:]), kv)
				}
				mu.Lock()
				for _, r := range list {
					rows[r.key] = r
				}
				mu.Unlock()
			}
		})
	}
	for page, err := range pages {
		if failed = err; err != nil {
			break
		}
		work <- page
	}
	close(work)
	workers.Wait()
	if failed != nil {
		return nil, fromEtcd(failed)
	}
	var fresh *index[T]
	if c.index != nil {
		fresh = c.index.of(rows)
	}
	return func() (changed []string) {
		for key, r := range rows {
			if old := c.rows[key]; old == nil || old.revision != r.revision {
				changed = append(changed, key)
			}
		}
		for key := range c.rows {
			if rows[key] == nil {
				changed = append(changed, key)
			}
		}
		c.rows, c.index = rows, fresh
		return changed
	}, nil
}

// ask reads a record of an uncached collection as this member has it.
func (c *Collection[T]) ask(key string) (Entry[T], error) {
	r, err := c.s.etcd.Server.KV().Range(context.Background(), []byte(c.at(key)), nil, mvcc.RangeOptions{})
	if err != nil {
		return Entry[T]{}, fmt.Errorf("store: reading %s: %w", c.at(key), fromEtcd(err))
	}
	if len(r.KVs) == 0 {
		return Entry[T]{}, fmt.Errorf("store: %s: %w", c.at(key), ErrNotFound)
	}
	return c.entry(c.row(key, r.KVs[0]))
}

func (c *Collection[T]) askAll(ctx context.Context, prefix string) (rows []*row[T], err error) {
	for page, err := range c.s.pages(ctx, c.at(prefix), c.s.etcd.Server.KV().Rev()) {
		if err != nil {
			return nil, fromEtcd(err)
		}
		for _, kv := range page {
			rows = append(rows, c.row(string(kv.Key[len(c.name)+2:]), kv))
		}
	}
	return rows, nil
}
