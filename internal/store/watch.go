package store

import (
	"context"
	"fmt"
)

// A Change names a record that was written or deleted.
type Change struct{ Collection, Key string }

// A Watcher collects changes between two calls of Next. A record that changes
// often meanwhile is named once, so a slow reader costs no more memory than
// there are records. Next is for one goroutine at a time.
type Watcher struct {
	s       *Store
	names   map[string]bool // the collections to watch; empty means all
	changed map[Change]struct{}
	order   []Change // of first change; both guarded by s.cache.mu
	ready   chan struct{}
}

// Watch collects changes of the named collections, of all when none is named,
// from now on. Close it when done.
func (s *Store) Watch(collections ...string) *Watcher {
	w := &Watcher{s: s, names: map[string]bool{}, changed: map[Change]struct{}{}, ready: make(chan struct{}, 1)}
	for _, name := range collections {
		w.names[name] = true
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.cache.watchers[w] = struct{}{}
	return w
}

// Next waits until something has changed and returns what, in order of first
// change. Reads made after it see at least those changes.
func (w *Watcher) Next(ctx context.Context) ([]Change, error) {
	for {
		w.s.cache.mu.Lock()
		list, closed := w.order, w.s.cache.closed.Load()
		w.order, w.changed = nil, map[Change]struct{}{}
		w.s.cache.mu.Unlock()
		if len(list) > 0 {
			return list, nil
		}
		if closed {
			return nil, fmt.Errorf("store: watching: %w: it is closed", ErrUnavailable)
		}
		select {
		case <-w.ready:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the collecting.
func (w *Watcher) Close() {
	w.s.cache.mu.Lock()
	defer w.s.cache.mu.Unlock()
	delete(w.s.cache.watchers, w)
}

func (w *Watcher) wake() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// note tells the watchers of a change. The lock is held.
func (c *cache) note(name, key string) {
	for w := range c.watchers {
		if len(w.names) > 0 && !w.names[name] {
			continue
		}
		ch := Change{name, key}
		if _, ok := w.changed[ch]; !ok {
			w.changed[ch] = struct{}{}
			w.order = append(w.order, ch)
		}
		w.wake()
	}
}
