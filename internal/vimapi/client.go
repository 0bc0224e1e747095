package vimapi

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
)

// maxOwned bounds the collectors, filters and views of one session: real
// clients keep a handful.
const maxOwned = 1000

// sweepEvery is how often what dead sessions have left is freed.
const sweepEvery = time.Minute

// client is what a session owns: property collectors, filters, views, pages of
// results still to be fetched. It dies with the session.
type client struct {
	s     *Server
	key   string // the session's
	token string
	ended chan struct{} // closed when the session is over
	once  sync.Once

	mu    sync.Mutex
	owned map[types.ManagedObjectReference]any // *collector, *filter, *containerView, *history
	pages map[string]*page
	std   *collector // the collector that every session has
}

// clients are the sessions that have owned something, by session key.
type clients struct {
	s    *Server
	mu   sync.Mutex
	open map[string]*client
}

func (cs *clients) init(s *Server) { cs.s, cs.open = s, map[string]*client{} }

// of returns what session owns.
func (cs *clients) of(session *authz.Session) *client {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.open[session.Key]
	if c == nil {
		c = &client{
			s: cs.s, key: session.Key, token: session.Token, ended: make(chan struct{}),
			owned: map[types.ManagedObjectReference]any{}, pages: map[string]*page{},
		}
		c.std = newCollector(c, propertyCollectorRef())
		cs.open[session.Key] = c
	}
	return c
}

func (cs *clients) end(key string) {
	cs.mu.Lock()
	c := cs.open[key]
	delete(cs.open, key)
	cs.mu.Unlock()
	if c != nil {
		c.end()
	}
}

func (cs *clients) closeAll() {
	cs.mu.Lock()
	open := cs.open
	cs.open = map[string]*client{}
	cs.mu.Unlock()
	for _, c := range open {
		c.end()
	}
}

// sweep frees what sessions have left that ended without a word.
func (cs *clients) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		live := map[string]bool{}
		for _, s := range cs.s.auth.Sessions() {
			live[s.Key] = true
		}
		cs.mu.Lock()
		var dead []string
		for key := range cs.open {
			if !live[key] {
				dead = append(dead, key)
			}
		}
		cs.mu.Unlock()
		for _, key := range dead {
			cs.end(key)
		}
	}
}

func (c *client) end() {
	c.once.Do(func() { close(c.ended) })
	c.mu.Lock()
	owned := c.owned
	c.owned = map[types.ManagedObjectReference]any{}
	c.pages = map[string]*page{}
	c.mu.Unlock()
	c.std.destroy()
	for _, o := range owned {
		if pc, ok := o.(*collector); ok {
			pc.destroy()
		}
	}
}

// own keeps o under a new reference of a type.
func (c *client) own(kind string, make func(ref types.ManagedObjectReference) any) (any, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.owned) >= maxOwned {
		return nil, fault(&types.LimitExceeded{}, "the session has %d property filters, collectors and views, the most it may; destroy some", maxOwned)
	}
	ref := types.ManagedObjectReference{Type: kind, Value: fmt.Sprintf("session[%s]%s", c.key, uuid.NewString())}
	o := make(ref)
	c.owned[ref] = o
	return o, nil
}

func (c *client) disown(ref types.ManagedObjectReference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.owned, ref)
}

// get finds something that the session owns.
func (c *client) get(ref types.ManagedObjectReference) (any, bool) {
	if ref == c.std.ref {
		return c.std, true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	o, ok := c.owned[ref]
	return o, ok
}

// ownedBy finds what the call's session owns under the call's own reference.
func ownedBy[T any](c *call, ref types.ManagedObjectReference) (T, error) {
	o, _ := c.client.get(ref)
	t, ok := o.(T)
	if !ok {
		return t, objectNotFound(ref)
	}
	return t, nil
}

// owned lists what the session owns of a Go type.
func owned[T any](c *client) []T {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []T
	for _, o := range c.owned {
		if t, ok := o.(T); ok {
			all = append(all, t)
		}
	}
	return all
}
