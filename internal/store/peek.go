package store

import (
	"context"
	"fmt"
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
	e, err := c.peek(key)
	return e, err == nil
}
