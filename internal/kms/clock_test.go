package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// twoClocks is a machine's clock and what really passes, which a test moves apart.
type twoClocks struct {
	mu     sync.Mutex
	start  time.Time
	passed time.Duration
	off    time.Duration
}

func (c *twoClocks) wall() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.start.Add(c.passed + c.off)
}

func (c *twoClocks) elapsed() time.Duration { c.mu.Lock(); defer c.mu.Unlock(); return c.passed }
func (c *twoClocks) pass(d time.Duration)   { c.mu.Lock(); defer c.mu.Unlock(); c.passed += d }
func (c *twoClocks) jump(d time.Duration)   { c.mu.Lock(); defer c.mu.Unlock(); c.off += d }

func TestClockBounds(t *testing.T) {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		what     string
		jump     time.Duration
		offsets  map[string]Offset
		earliest time.Duration // after start
		latest   time.Duration
		fit      bool
	}{
		{"steady", 0, nil, 0, 0, true},
		{"an hour on", maxJump, nil, maxJump, maxJump, true},
		{"more than an hour on", 3 * time.Hour, nil, 0, 3 * time.Hour, true},
		{"back a little: it stands still", -time.Minute, nil, 0, 0, true},
		{"back for long", -2 * time.Hour, nil, 0, 0, false},
		{"alike", 0, map[string]Offset{"b": {By: time.Second}, "c": {By: -50 * time.Second}}, 0, 0, true},
		{"one of the others is off", 0, map[string]Offset{"b": {By: 5 * time.Minute}, "c": {}}, 0, 0, true},
		{"it is off itself, ahead", 5 * time.Minute, map[string]Offset{"b": {By: -5 * time.Minute}, "c": {By: -5 * time.Minute}}, 5 * time.Minute, 5 * time.Minute, false},
		{"it is off itself, behind", -5 * time.Minute, map[string]Offset{"b": {By: 5 * time.Minute}, "c": {By: 5 * time.Minute}}, 0, 0, false},
		{"of two, the other is off", 0, map[string]Offset{"b": {By: 5 * time.Minute}}, 0, 0, true},
		{"of two, it is off itself", 5 * time.Minute, map[string]Offset{"b": {By: -5 * time.Minute}}, 5 * time.Minute, 5 * time.Minute, false},
		{"a slow question proves little", 0, map[string]Offset{"b": {By: 61 * time.Second, Within: 2 * time.Second}, "c": {By: 61 * time.Second, Within: 2 * time.Second}}, 0, 0, true},
	} {
		m := &twoClocks{start: start}
		clock := newClock(m.wall, m.elapsed)
		clock.see(clockRecord{Time: start})
		m.jump(c.jump)
		clock.Compare(c.offsets)
		earliest, latest := clock.Bounds()
		if e, l := earliest.Sub(start), latest.Sub(start); e != c.earliest || l != c.latest {
			t.Errorf("%s: bounds %v and %v, want %v and %v", c.what, e, l, c.earliest, c.latest)
		}
		if err := clock.Err(); (err == nil) != c.fit || err != nil && !errors.Is(err, ErrClock) {
			t.Errorf("%s: %v, want fit=%v", c.what, err, c.fit)
		}
	}
}

// TestClockNeverGoesBack: whatever the machine's clock does below an hour.
func TestClockNeverGoesBack(t *testing.T) {
	m := &twoClocks{start: time.Now()}
	clock := newClock(m.wall, m.elapsed)
	clock.see(clockRecord{Time: m.wall()})
	last := clock.Now()
	for i, d := range []time.Duration{time.Minute, -30 * time.Second, -10 * time.Minute, 20 * time.Minute, -time.Hour / 2} {
		m.jump(d)
		m.pass(time.Second)
		now := clock.Now()
		if now.Before(last) {
			t.Errorf("step %d: cluster time went back by %v", i, last.Sub(now))
		}
		last = now
	}
}

func startClocks(t *testing.T, dir string, m *twoClocks) *fixture {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	k, err := Open(t.Context(), s, Options{Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: m.wall, Elapsed: m.elapsed})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close(); s.Close(); r.Close() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // the sweeper wrote the time down
		if _, ok := k.clocks.Peek(clockKey); ok {
			break
		}
		if time.Now().After(end) {
			t.Fatal("cluster time was not written down")
		}
	}
	return &fixture{k, s, nil}
}

// TestDatesAreCommitted: a date's change is in the store before a client hears of
// it, so a member whose clock is behind says the same.
func TestDatesAreCommitted(t *testing.T) {
	m := &twoClocks{start: time.Now().Truncate(time.Second)}
	f := startClocks(t, t.TempDir(), m)
	s := f.session()
	until := m.wall().Add(10 * time.Minute)
	id := create(t, s, attr(kmip.AttributeNameActivationDate, m.wall()), attr(kmip.AttributeNameDeactivationDate, until))
	if got := state(t, s, id); got != kmip.StateActive {
		t.Fatalf("before its date: %v", got)
	}
	m.pass(10 * time.Minute)
	if got := state(t, s, id); got != kmip.StateDeactivated {
		t.Fatalf("at its date: %v", got)
	}
	e, err := s.inst.objects.Get(t.Context(), id)
	if err != nil || e.Value.State != kmip.StateDeactivated {
		t.Errorf("in the store: %v, %v: another member would not know", e.Value.State, err)
	}
	// Another member's clock, five minutes behind.
	behind := &KMS{log: f.log, store: f.store, clock: newClock(func() time.Time { return until.Add(-5 * time.Minute) }, nil)}
	if e, err := behind.settle(t.Context(), s.inst, e); err != nil || e.Value.State != kmip.StateDeactivated {
		t.Errorf("by a clock that is behind: %v, %v", e.Value.State, err)
	}
}

// TestClockJump: dates in a jump wait for a person, and everything else goes on;
// nothing is purged by a clock that lies.
func TestClockJump(t *testing.T) {
	m := &twoClocks{start: time.Now().Truncate(time.Second)}
	dir := t.TempDir()
	f := startClocks(t, dir, m)
	s := f.session()
	dated := create(t, s, attr(kmip.AttributeNameActivationDate, m.wall()), attr(kmip.AttributeNameDeactivationDate, m.wall().Add(24*time.Hour)))
	plain := create(t, s)
	gone := create(t, s)
	if err := s.Destroy(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	m.jump(365 * 24 * time.Hour)
	if _, err := f.session().Get(t.Context(), dated); !errors.Is(err, ErrClockJump) {
		t.Errorf("a key whose date lies in the jump: %v", err)
	}
	if got, err := f.session().Get(t.Context(), plain); err != nil {
		t.Errorf("a key without dates: %v", err)
	} else {
		got.Bytes.Wipe()
	}
	if err := f.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if e, err := s.inst.objects.Get(t.Context(), gone); err != nil || e.Value.material == 0 {
		t.Errorf("purged by an unconfirmed jump: %+v, %v", e.Value, err)
	}
	if st := f.Clock().Status(); !st.Jump || f.Ready() != nil {
		t.Errorf("status: %+v, %v", st, f.Ready())
	}
	if _, err := f.ConfirmClock(t.Context(), tester); err != nil {
		t.Fatal(err)
	}
	if got := state(t, f.session(), dated); got != kmip.StateDeactivated {
		t.Errorf("after confirming: %v", got)
	}
	if err := f.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if e, err := s.inst.objects.Get(t.Context(), gone); err != nil || e.Value.material != 0 {
		t.Errorf("not purged after confirming: %v", err)
	}
	// The clock was wrong after all. It is set back, and serves nobody until
	// somebody says that it is right.
	m.jump(-365 * 24 * time.Hour)
	if err := f.Ready(); !errors.Is(err, ErrClock) || !strings.Contains(err.Error(), "behind cluster time") {
		t.Errorf("a year back: %v", err)
	}
	if _, err := f.ConfirmClock(t.Context(), tester); err != nil {
		t.Fatal(err)
	}
	if err := f.Ready(); err != nil {
		t.Errorf("after confirming: %v", err)
	}
	if now := f.Clock().Now(); now.After(m.wall()) {
		t.Errorf("cluster time stays ahead by %v", now.Sub(m.wall()))
	}
}

// TestSettleFailsClosed: without a place to write the change, the key is not served.
func TestSettleFailsClosed(t *testing.T) {
	m := &twoClocks{start: time.Now().Truncate(time.Second)}
	f := startClocks(t, t.TempDir(), m)
	s := f.session()
	id := create(t, s, attr(kmip.AttributeNameActivationDate, m.wall()), attr(kmip.AttributeNameDeactivationDate, m.wall().Add(time.Minute)))
	e, err := s.inst.objects.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	m.pass(2 * time.Minute)
	ended, cancel := context.WithCancelCause(t.Context())
	cancel(fmt.Errorf("cut off"))
	if _, err := f.settle(ended, s.inst, e); err == nil {
		t.Error("a state that could not be committed was served")
	}
}
