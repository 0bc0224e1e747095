package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
)

// Sync returns once the cache holds everything that was committed before the
// call. After it, Peek is linearizable.
func (s *Store) Sync(ctx context.Context) error {
	if err := s.sync(ctx); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// Peek returns the record called key as the cache has it, without asking etcd
// whether that is the newest: for who follows a [Watcher], or has called Sync.
// ok is false when there is none or when it is damaged.
func (c *Collection[T]) Peek(key string) (e Entry[T], ok bool) {
	if c.uncached {
		e, err := c.peek(key)
		return e, err == nil
	}
	c.s.cache.mu.RLock()
	r := c.rows[key]
	c.s.cache.mu.RUnlock()
	if r == nil { // usual where it tells that all is well
		return e, false
	}
	e, err := c.entry(r)
	return e, err == nil
}

// Count is how many records the collection has, or how many of them have the
// term, as the cache has it. It costs nothing.
func (c *Collection[T]) Count(term ...IndexTerm) int {
	c.s.cache.mu.RLock()
	defer c.s.cache.mu.RUnlock()
	if len(term) == 0 {
		return len(c.rows)
	}
	return c.index.rowsOf(c.index.hash(term[0].Kind, term[0].Value)).len()
}

// Cached returns the records that are not damaged as the cache has them, in no
// order, without asking etcd.
func (c *Collection[T]) Cached() []Entry[T] {
	c.s.cache.mu.RLock()
	rows := slices.Collect(maps.Values(c.rows))
	c.s.cache.mu.RUnlock()
	list := make([]Entry[T], 0, len(rows))
	for _, r := range rows {
		if e, err := c.entry(r); err == nil {
			list = append(list, e)
		}
	}
	return list
}
