package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"mortise/internal/store"
)

// Time in a cluster (design §5, Dates).
//
// Dates change states, and members have clocks of their own. Three things make
// that safe:
//
//  1. What clients are told is what the store says. A date only causes a write:
//     who finds, by its clock, that an object's date has come, commits the new
//     state before it answers ([KMS.settle]). So the instant of the change is one
//     revision of the store, the same for all members, and a key that one member
//     has called Deactivated is not called Active by another whose clock is
//     behind. No bound on clocks is needed for that, only the store.
//
//  2. How early or late that instant is, against true time, is bounded: a member
//     whose clock is more than maxSkew off the others' serves nobody
//     ([Clock.Err]).
//
//  3. A jump may be a wrong clock. Cluster time is written down, a record every
//     few seconds, and a member that finds itself more than maxJump after the
//     last record does not know whether the cluster slept or the clock lies. Until
//     an administrator confirms, it knows two bounds of the time
//     ([Clock.Bounds]), and what would come out differently by the one and by the
//     other is refused: neither is a key served after its date, nor one purged by
//     a clock in the next century. Everything else is served as ever.
//
// Cluster time never goes back: a clock that is set back by less than maxJump
// stands still until it has come to where it was; more than that must be
// confirmed, and the member serves nobody until then.
const (
	maxSkew = time.Minute
	maxJump = time.Hour
	// recordEvery is how often cluster time is written down.
	recordEvery = 10 * time.Second
)

var (
	// ErrClock: this member's clock cannot be relied on, so it serves nobody.
	ErrClock = errors.New("this member's clock is not fit")
	// ErrClockJump: what was asked depends on a jump of time that nobody has
	// confirmed.
	ErrClockJump = errors.New("the clock jumped by more than an hour; if it is right now, confirm it: mortise kms clock confirm")
)

// clockRecord is cluster time as it is written down.
type clockRecord struct {
	Time time.Time
	// Confirmed counts the confirmations. With a new one, time may go back.
	Confirmed int
}

const clockKey = "cluster"

// Offset is how far another member's clock is ahead of this one's.
type Offset struct {
	By     time.Duration
	Within time.Duration // half of what the question took: the error of By
}

// A Clock is cluster time as one member knows it. Its methods may be called
// concurrently.
type Clock struct {
	wall    func() time.Time     // the machine's clock, which may jump
	elapsed func() time.Duration // since the start; does not jump. Nil: wall does not either

	mu        sync.Mutex
	last      time.Time // Now goes back behind it only by a confirmation
	record    clockRecord
	recordAt  time.Duration // elapsed when the record was first seen
	offsets   map[string]Offset
	complains bool
}

func newClock(wall func() time.Time, elapsed func() time.Duration) *Clock {
	if wall == nil {
		wall = time.Now
		if elapsed == nil {
			start := time.Now()
			elapsed = func() time.Duration { return time.Since(start) }
		}
	}
	return &Clock{wall: wall, elapsed: elapsed}
}

// Wall is the machine's own clock.
func (c *Clock) Wall() time.Time { return c.wall() }

// Now is cluster time: the latest that it may be.
func (c *Clock) Now() time.Time {
	_, latest := c.Bounds()
	return latest
}

// Bounds returns the earliest and the latest that cluster time may be. They
// differ only after a jump that nobody has confirmed.
func (c *Clock) Bounds() (earliest, latest time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall := c.wall()
	if by := c.estimate(); !by.IsZero() && wall.Sub(by) > maxJump {
		return later(by, c.last), wall
	}
	if wall.Before(c.last) {
		return c.last, c.last
	}
	c.last = wall
	return wall, wall
}

// estimate is where the last record and the time since say that it is; zero
// without a record. The lock is held.
func (c *Clock) estimate() time.Time {
	if c.record.Time.IsZero() || c.elapsed == nil {
		return time.Time{}
	}
	return c.record.Time.Add(c.elapsed() - c.recordAt)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// see takes a record that is newer than the one before.
func (c *Clock) see(r clockRecord) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.Confirmed > c.record.Confirmed {
		c.last = r.Time
	}
	if c.elapsed == nil {
		return
	}
	c.record, c.recordAt = r, c.elapsed()
	c.last = later(c.last, r.Time)
}

// Compare takes the offsets of the other members' clocks, those that could be
// asked.
func (c *Clock) Compare(offsets map[string]Offset) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offsets = maps.Clone(offsets)
}

// Err is nil while this member's clock is fit to decide by. Other members vote
// about it, and so does the record of cluster time, which speaks for those that
// cannot be asked now: of two members that differ, the one is wrong that differs
// from it.
func (c *Clock) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall := c.wall()
	if back := c.record.Time.Sub(wall); back > maxJump {
		return fmt.Errorf("%w: it is %v behind cluster time; set it right, or if it is right, confirm it: mortise kms clock confirm", ErrClock, back.Round(time.Second))
	}
	if len(c.offsets) == 0 {
		return nil
	}
	var agree, differ int
	var worst time.Duration
	vote := func(o Offset) {
		if o.By.Abs() <= maxSkew+o.Within {
			agree++
			return
		}
		differ++
		if o.By.Abs() > worst.Abs() {
			worst = o.By
		}
	}
	for _, o := range c.offsets {
		vote(o)
	}
	if by := c.estimate(); !by.IsZero() {
		vote(Offset{By: by.Sub(wall)})
	}
	if differ > agree {
		return fmt.Errorf("%w: it is off by %v from the other members'; set it right (NTP)", ErrClock, worst.Abs().Round(time.Second))
	}
	return nil
}

// ClockStatus is how cluster time stands, for administrators.
type ClockStatus struct {
	Time     time.Time                `json:"time"`              // cluster time, the latest it may be
	Earliest time.Time                `json:"earliest"`          // the earliest it may be
	Machine  time.Time                `json:"machine"`           // this machine's clock
	Offsets  map[string]time.Duration `json:"offsets,omitempty"` // of other members, nanoseconds
	Jump     bool                     `json:"jump"`              // a jump waits to be confirmed
	Problem  string                   `json:"problem,omitempty"` // why this member serves nobody
}

// Status returns how cluster time stands.
func (c *Clock) Status() ClockStatus {
	earliest, latest := c.Bounds()
	s := ClockStatus{Time: latest.UTC(), Earliest: earliest.UTC(), Machine: c.wall().UTC(), Jump: !earliest.Equal(latest)}
	if err := c.Err(); err != nil {
		s.Problem = err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.offsets) > 0 {
		s.Offsets = map[string]time.Duration{}
		for name, o := range c.offsets {
			s.Offsets[name] = o.By
		}
	}
	return s
}

// Clock is the cluster's time.
func (k *KMS) Clock() *Clock { return k.clock }

// ConfirmClock makes this machine's clock cluster time, after a jump that was
// right, or to end one that was not. Dates between are acted upon from then on.
func (k *KMS) ConfirmClock(ctx context.Context, by Actor) (time.Time, error) {
	for {
		e, err := k.clocks.Get(ctx, clockKey)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return time.Time{}, fmt.Errorf("kms: reading cluster time: %w", err)
		}
		now := k.clock.Wall().UTC()
		op := k.clocks.Update(clockKey, e.Revision, clockRecord{now, e.Value.Confirmed + 1})
		if e.Revision == 0 {
			op = k.clocks.Create(clockKey, clockRecord{now, 1})
		}
		err = k.commitAs(ctx, by, nil, "clock confirm", now.Format(time.RFC3339), op)
		if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrExists) {
			continue // the sweeper wrote it down just now
		}
		if err != nil {
			return time.Time{}, fmt.Errorf("kms: confirming the clock: %w", err)
		}
		k.log.Warn("kms: an administrator confirmed the clock", "time", now, "by", by.Name)
		return now, k.lookAtClock(ctx)
	}
}

func (k *KMS) lookAtClock(ctx context.Context) error {
	e, err := k.clocks.Get(ctx, clockKey)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil
	case err != nil:
		return fmt.Errorf("kms: reading cluster time: %w", err)
	}
	k.clock.see(e.Value)
	return nil
}

// followClock keeps the clock's record current and says aloud when the clock is
// not fit, and when it is again.
func (k *KMS) followClock(ctx context.Context) {
	w := k.store.Watch("clock")
	defer w.Close()
	for ctx.Err() == nil {
		wait, cancel := context.WithTimeout(ctx, recordEvery)
		changed, err := w.Next(wait)
		cancel()
		if err == nil && len(changed) > 0 {
			if e, ok := k.clocks.Peek(clockKey); ok {
				k.clock.see(e.Value)
			}
		} else if errors.Is(err, store.ErrUnavailable) {
			return // the store is closed
		}
		k.complain()
	}
}

func (k *KMS) complain() {
	status := k.clock.Status()
	bad := status.Problem != "" || status.Jump
	k.clock.mu.Lock()
	said := k.clock.complains
	k.clock.complains = bad
	k.clock.mu.Unlock()
	switch {
	case bad && !said && status.Problem != "":
		k.log.Error("kms: no requests are served", "reason", status.Problem)
	case bad && !said:
		k.log.Warn("kms: the clock jumped; dates in between wait until it is confirmed: mortise kms clock confirm", "from", status.Earliest, "to", status.Time)
	case !bad && said:
		k.log.Info("kms: the clock is fit again", "time", status.Time)
	}
}

// Ready tells why this member should not be given requests: it is locked, cut
// off from the majority, or its clock is not fit. Nil: it serves.
func (k *KMS) Ready() error {
	select {
	case <-k.unlocked:
	default:
		return ErrLocked
	}
	if !k.store.Led() {
		return fmt.Errorf("kms: %w: no majority of the cluster is in reach", store.ErrUnavailable)
	}
	return k.clock.Err()
}

// keepTime writes cluster time down, on the member that holds the office, for as
// long as its own clock is fit.
func (k *KMS) keepTime(ctx context.Context, term store.Term) error {
	if err := k.clock.Err(); err != nil {
		return err // another member may hold the office better
	}
	earliest, latest := k.clock.Bounds()
	if !earliest.Equal(latest) {
		return nil // not before it is confirmed
	}
	e, err := k.clocks.Get(ctx, clockKey)
	switch {
	case errors.Is(err, store.ErrNotFound):
		_, err = k.store.Commit(ctx, term.Guard(), k.clocks.Create(clockKey, clockRecord{Time: latest.UTC()}))
	case err == nil && latest.Sub(e.Value.Time) >= recordEvery/2:
		_, err = k.store.Commit(ctx, term.Guard(), k.clocks.Update(clockKey, e.Revision, clockRecord{latest.UTC(), e.Value.Confirmed}))
	}
	if err != nil && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrExists) {
		return fmt.Errorf("writing cluster time down: %w", err)
	}
	return nil
}
