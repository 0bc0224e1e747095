package vdisk

import (
	"context"
	"sync"
	"time"
)

// courtesy is how long a conversion rests beside a busy guest, in times that its
// last step took: that leaves the guest the greater part of processor and storage.
const (
	courtesy = 4
	maxRest  = 250 * time.Millisecond
)

// A Pace holds a disk's conversions back. The zero Pace lets them go as fast as
// storage and courtesy to the guest allow.
type Pace struct {
	Limit  int64 // bytes per second to rewrite at most; 0: no limit
	Paused bool  // rest at a durable boundary, where requests are as fast as ever
}

// SetPace sets the pace of the conversion that runs, and of those to come while
// the disk is open.
func (d *Disk) SetPace(p Pace) { d.pace.set(p) }

// pace is a Pace that somebody may be waiting on.
type pace struct {
	mu      sync.Mutex
	Pace    // what is wanted
	changed chan struct{}
	free    time.Time // when the limit lets the next zone begin
}

func (p *pace) set(to Pace) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Pace, p.free = to, time.Time{}
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

func (p *pace) held() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.Pace != Pace{}
}

// hold returns when the pace allows to go on after n bytes, or with the error of
// ctx.
func (p *pace) hold(ctx context.Context, n int64) error {
	p.mu.Lock()
	if p.Limit > 0 {
		now := time.Now()
		if p.free.Before(now.Add(-time.Second)) { // a rest is not made up for
			p.free = now
		}
		p.free = p.free.Add(time.Duration(float64(n) / float64(p.Limit) * float64(time.Second)))
	}
	p.mu.Unlock()
	for ctx.Err() == nil {
		p.mu.Lock()
		wait := time.Until(p.free)
		if !p.Paused && (p.Limit <= 0 || wait <= 0) {
			p.mu.Unlock()
			return nil
		}
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed, paused := p.changed, p.Paused
		p.mu.Unlock()
		var timer <-chan time.Time
		if !paused {
			timer = time.After(wait)
		}
		select {
		case <-changed:
		case <-timer:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func rest(ctx context.Context, t time.Duration) {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
