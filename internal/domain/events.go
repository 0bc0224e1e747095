package domain

import (
	"context"
	"fmt"
	"sync"

	"github.com/digitalocean/go-libvirt"
)

// A subscription is one reader of Events. Its queue is unbounded: events are few,
// and a guest's end must not be lost to a slow reader.
type subscription struct {
	mu     sync.Mutex // protects queue and ended
	queue  []Event
	ended  bool
	signal chan struct{} // holds one token when there is something to look at
}

func (s *subscription) push(ev Event) {
	s.mu.Lock()
	s.queue = append(s.queue, ev)
	s.mu.Unlock()
	s.wake()
}

func (s *subscription) wake() {
	select {
	case s.signal <- struct{}{}:
	default:
	}
}

// Events tells of every change of our guests' states until ctx ends or the Conn
// is closed; the channel is closed then. It begins with the state of each guest
// that runs, and after libvirtd was away it says what changed meanwhile, ends
// included.
func (c *Conn) Events(ctx context.Context) <-chan Event {
	s := &subscription{signal: make(chan struct{}, 1)}
	out := make(chan Event)
	c.mu.Lock()
	for id, st := range c.known {
		if st != Off {
			s.queue = append(s.queue, Event{UUID: id, State: st})
		}
	}
	if c.ctx.Err() != nil {
		s.ended = true
	}
	c.subs[s] = true
	c.mu.Unlock()
	s.wake()
	go func() {
		defer close(out)
		defer func() {
			c.mu.Lock()
			delete(c.subs, s)
			c.mu.Unlock()
		}()
		for {
			s.mu.Lock()
			queue, ended := s.queue, s.ended
			s.queue = nil
			s.mu.Unlock()
			for _, ev := range queue {
				select {
				case out <- ev:
				case <-ctx.Done():
					return
				}
			}
			if ended {
				return
			}
			select {
			case <-s.signal:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (c *Conn) endSubscriptions() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		s.mu.Lock()
		s.ended = true
		s.mu.Unlock()
		s.wake()
	}
}

// expect makes a guest known before it starts, so that its end is told however
// soon it comes.
func (c *Conn) expect(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.known[id]; !ok {
		c.known[id] = Off
	}
}

func (c *Conn) unexpect(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known[id] == Off {
		delete(c.known, id)
	}
}

// tell passes an event on unless it says nothing new.
func (c *Conn) tell(ev Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was, ours := c.known[ev.UUID]
	if !ours || was == ev.State {
		return
	}
	if ev.State == Off {
		delete(c.known, ev.UUID)
	} else {
		c.known[ev.UUID] = ev.State
	}
	for s := range c.subs {
		s.push(ev)
	}
}

// follow subscribes to the events of a new session, then tells what changed
// while there was none.
func (c *Conn) follow(s *session) error {
	ctx, cancel := context.WithTimeout(c.ctx, patience)
	defer cancel()
	life, err := subscribe(ctx, s, libvirt.DomainEventIDLifecycle)
	if err != nil {
		return fmt.Errorf("life cycle: %w", err)
	}
	c.tasks.Go(func() {
		for raw := range life {
			m, ok := raw.(*libvirt.DomainEventCallbackLifecycleMsg)
			if !ok {
				continue
			}
			ev, ok := eventOf(m.Msg)
			if !ok {
				continue
			}
			if ev.State != Off && !c.isKnown(ev.UUID) && ours(s, m.Msg.Dom) {
				c.expect(ev.UUID) // it came from elsewhere, e.g. by migration
			}
			c.tell(ev)
		}
	})
	errs, err := subscribe(ctx, s, libvirt.DomainEventIDIoErrorReason)
	if err != nil {
		return fmt.Errorf("I/O errors: %w", err)
	}
	c.tasks.Go(func() {
		for raw := range errs {
			if m, ok := raw.(*libvirt.DomainEventCallbackIOErrorReasonMsg); ok && c.isKnown(uuidText(m.Msg.Dom.UUID)) {
				c.cfg.Log.Warn("a guest's disk answered with an error", "vm", uuidText(m.Msg.Dom.UUID), "disk", placeOf(m.Msg.DevAlias), "reason", m.Msg.Reason)
			}
		}
	})

	guests, err := listOurs(ctx, s)
	if err != nil {
		return fmt.Errorf("listing guests: %w", err)
	}
	c.mu.Lock()
	var gone []string
	for id := range c.known {
		if _, runs := guests[id]; !runs {
			gone = append(gone, id)
		}
	}
	c.mu.Unlock()
	for id, st := range guests {
		c.expect(id)
		c.tell(Event{UUID: id, State: st})
	}
	for _, id := range gone {
		c.tell(Event{UUID: id, State: Off, Reason: "it ended while libvirtd was away"})
	}
	return nil
}

// subscribe lasts as long as the session: cancelling a subscription would stop
// the library's reader when an event is just arriving.
func subscribe(ctx context.Context, s *session, id libvirt.DomainEventID) (<-chan any, error) {
	return callOn(ctx, s, func(v *libvirt.Libvirt) (<-chan any, error) {
		return v.SubscribeEvents(context.Background(), id, nil)
	})
}

func (c *Conn) isKnown(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.known[id]
	return ok
}
