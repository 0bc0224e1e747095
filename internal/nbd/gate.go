package nbd

import (
	"context"
	"sync"
)

// gate lets requests through to a device unless it is held. Holding it waits
// for those that are inside.
type gate struct {
	mu     sync.Mutex
	inside int
	holds  int           // how many hold calls are not yet released
	open   chan struct{} // closed when the last hold is released; nil unless held
	empty  chan struct{} // closed when the last request leaves; nil unless waited for
}

// enter waits until the gate is open and goes in, or returns false once stop
// is closed.
func (g *gate) enter(stop <-chan struct{}) bool {
	for {
		g.mu.Lock()
		if g.holds == 0 {
			g.inside++
			g.mu.Unlock()
			return true
		}
		open := g.open
		g.mu.Unlock()
		select {
		case <-open:
		case <-stop:
			return false
		}
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	g.inside--
	if g.inside == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
	g.mu.Unlock()
}

// hold closes the gate and waits until nothing is inside. When ctx ends first
// the gate is as it was before.
func (g *gate) hold(ctx context.Context) error {
	g.mu.Lock()
	g.holds++
	if g.holds == 1 {
		g.open = make(chan struct{})
	}
	if g.inside == 0 {
		g.mu.Unlock()
		return nil
	}
	if g.empty == nil {
		g.empty = make(chan struct{})
	}
	empty := g.empty
	g.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		g.release()
		return ctx.Err()
	}
}

func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.holds == 0 {
		panic("nbd: Resume without Pause")
	}
	g.holds--
	if g.holds == 0 {
		close(g.open)
		g.open = nil
	}
}
