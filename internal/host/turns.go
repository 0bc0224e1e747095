package host

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// Conversions says how many disks may be converted at once; more wait their turn.
// Zero fields are the defaults.
//
// A conversion rewrites as fast as its datastore reads and writes: a second one on
// the same storage makes both slower, gains nothing, and takes twice from the
// guests. So the default is one for each datastore. Two on a host keep two
// datastores busy and leave it processors for its guests.
type Conversions struct {
	PerHost      int `toml:"per_host"`      // 0: 2
	PerDatastore int `toml:"per_datastore"` // of this host's; 0: 1
}

// turns hands out turns in the order of arrival. Who waits for a datastore does not
// hold up who could use another one.
type turns struct {
	limits Conversions
	host   string

	mu    sync.Mutex // protects what follows
	taken map[string]int
	total int
	line  []*waiter // in order of arrival
}

type waiter struct {
	store   string
	granted chan struct{} // closed when the turn has come
	moved   chan struct{} // the line has moved
}

func newTurns(host string, limits Conversions) *turns {
	if limits.PerHost <= 0 {
		limits.PerHost = 2
	}
	if limits.PerDatastore <= 0 {
		limits.PerDatastore = 1
	}
	return &turns{limits: limits, host: host, taken: map[string]int{}}
}

// wait returns when it is the caller's turn on a datastore, which lasts until done
// is called; or with ctx's error. tell hears how far the line is.
func (t *turns) wait(ctx context.Context, store string, tell func(text string)) (done func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w := &waiter{store: store, granted: make(chan struct{}), moved: make(chan struct{}, 1)}
	t.mu.Lock()
	t.line = append(t.line, w)
	t.move()
	t.mu.Unlock()
	for told := ""; ; {
		select {
		case <-w.granted:
			return t.leave(store), nil
		default:
		}
		if text := t.place(w); text != "" && text != told {
			told = text
			tell(text)
		}
		select {
		case <-w.granted:
		case <-w.moved:
		case <-ctx.Done():
			t.mu.Lock()
			defer t.mu.Unlock()
			select {
			case <-w.granted: // too late to be asked for
				t.free(store)
			default:
				t.line = slices.DeleteFunc(t.line, func(o *waiter) bool { return o == w })
			}
			t.move()
			return nil, ctx.Err()
		}
	}
}

// take is a turn for who must not wait: what is undone holds up others, and is not
// held up by them.
func (t *turns) take(store string) (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.taken[store]++
	t.total++
	return t.leave(store)
}

func (t *turns) leave(store string) func() {
	return sync.OnceFunc(func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.free(store)
		t.move()
	})
}

// free gives a turn back. The lock is held.
func (t *turns) free(store string) {
	t.total--
	if t.taken[store]--; t.taken[store] == 0 {
		delete(t.taken, store)
	}
}

// move lets begin who can, and wakes the others. The lock is held.
func (t *turns) move() {
	t.line = slices.DeleteFunc(t.line, func(w *waiter) bool {
		if t.total >= t.limits.PerHost || t.taken[w.store] >= t.limits.PerDatastore {
			return false
		}
		t.total++
		t.taken[w.store]++
		close(w.granted)
		return true
	})
	for _, w := range t.line {
		select {
		case w.moved <- struct{}{}:
		default:
		}
	}
}

// place says in words what w waits for; empty when it does not wait any more.
func (t *turns) place(w *waiter) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	at := slices.Index(t.line, w)
	if at < 0 {
		return ""
	}
	before := t.taken[w.store]
	for _, o := range t.line[:at] {
		if o.store == w.store {
			before++
		}
	}
	if before >= t.limits.PerDatastore {
		return fmt.Sprintf("waiting for its turn on datastore %s: %d before it", w.store, before)
	}
	return fmt.Sprintf("waiting for its turn on host %s: %d before it", t.host, t.total+at)
}
