package event

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"mortise/internal/store"
)

// Keep is how many events a Log holds; the oldest go.
const Keep = 10_000

// Log is the list of events. Its methods may be called concurrently.
type Log struct {
	store   *store.Store
	records *store.Collection[Event]
	logger  *slog.Logger
	clock   func() time.Time
	keep    int64

	mu     sync.Mutex // held while an event is written: ids and times rise together
	first  int64      // the oldest that is kept
	next   int64
	posted chan struct{} // closed and replaced with each event
}

// Open loads the events in s.
func Open(ctx context.Context, s *store.Store, logger *slog.Logger, clock func() time.Time) (*Log, error) {
	l := &Log{store: s, logger: logger, clock: clock, keep: Keep, first: 1, next: 1, posted: make(chan struct{})}
	var err error
	if l.records, err = store.NewCollection(ctx, s, "event", store.JSON[Event](1)); err != nil {
		return nil, fmt.Errorf("event: %w", err)
	}
	// An event that cannot be read is lost; it must not keep center from starting.
	entries, _ := l.records.List(ctx, "")
	if n := len(entries); n > 0 {
		l.first, l.next = entries[0].Value.ID, entries[n-1].Value.ID+1
	}
	return l, nil
}

// Post records that something happened, now, and logs it. It fills in ID and
// Time. That it cannot be written is logged and stops nobody's work.
func (l *Log) Post(ctx context.Context, e Event) {
	// Who waits for the deed may be gone; the deed happened nevertheless.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	l.mu.Lock()
	defer l.mu.Unlock()
	e.ID, e.Time = l.next, l.clock()
	if e.Severity == "" {
		e.Severity = Info
	}
	l.print(e)
	ops := []store.Op{l.records.Put(key(e.ID), e)}
	first := l.first
	for ; e.ID-first >= l.keep && len(ops) < 64; first++ {
		if _, ok := l.records.Peek(key(first)); ok {
			ops = append(ops, l.records.Delete(key(first), 0))
		}
	}
	if _, err := l.store.Commit(ctx, ops...); err != nil {
		l.logger.Error("an event could not be written", "type", e.Type, "error", err)
		return
	}
	l.first, l.next = first, l.next+1
	close(l.posted)
	l.posted = make(chan struct{})
}

func key(id int64) string { return fmt.Sprintf("%016d", id) }

func (l *Log) print(e Event) {
	level := slog.LevelInfo
	switch e.Severity {
	case Warning:
		level = slog.LevelWarn
	case Error:
		level = slog.LevelError
	}
	args := []any{"event", e.Type}
	for _, a := range []struct{ name, value string }{{"user", e.User}, {"entity", string(e.Entity)}, {"task", string(e.Task)}} {
		if a.value != "" {
			args = append(args, a.name, a.value)
		}
	}
	if len(e.Keys) > 0 {
		args = append(args, "keys", e.Keys)
	}
	l.logger.Log(context.Background(), level, e.Message, args...)
}

// After returns the events after id, oldest first, the newest max of them.
func (l *Log) After(ctx context.Context, id int64, max int) ([]Event, error) {
	entries, err := l.records.List(ctx, "")
	if len(entries) == 0 && err != nil {
		return nil, fmt.Errorf("event: %w", err)
	}
	from, _ := slices.BinarySearchFunc(entries, id+1, func(e store.Entry[Event], id int64) int { return int(e.Value.ID - id) })
	entries = entries[from:]
	if len(entries) > max {
		entries = entries[len(entries)-max:]
	}
	list := make([]Event, len(entries))
	for i, e := range entries {
		list[i] = e.Value
	}
	return list, nil
}

// Posted returns a channel that closes with the next event.
func (l *Log) Posted() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.posted
}
