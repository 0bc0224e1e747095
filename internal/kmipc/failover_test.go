package kmipc

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
)

func TestDeadIdleConnections(t *testing.T) {
	f := startFake(t, newStore())
	now := newClock()
	c := connect(t, nil, func(cfg *Config) { cfg.Now = now.read }, f)
	id := create(t, c, "a")
	f.closeConns()
	waitGone(t, f)
	create(t, c, "b") // not idempotent: works, since nothing was sent on the dead connection
	f.closeConns()
	waitGone(t, f)
	if _, err := c.Get(ctx(t), id); err != nil {
		t.Error(err)
	}
	if f.count(kmip.OperationCreate) != 2 {
		t.Errorf("%d creates arrived", f.count(kmip.OperationCreate))
	}
	old := f.connections()
	now.advance(time.Hour) // past the idle time
	if _, err := c.Get(ctx(t), id); err != nil || f.connections() != old+1 {
		t.Errorf("a connection idle for an hour: %v, %d connections", err, f.connections()-old)
	}
}

// waitGone waits until the closed connections' FINs are with the client.
func waitGone(t testing.TB, f *fake) {
	t.Helper()
	for range 200 {
		f.mu.Lock()
		n := len(f.conns)
		f.mu.Unlock()
		if n == 0 {
			time.Sleep(5 * time.Millisecond)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("connections stay")
}

// once returns a fault for the first request of an operation.
func once(op kmip.Operation, what fault) func(kmip.Operation) fault {
	var done bool
	return func(o kmip.Operation) fault {
		if o == op && !done {
			done = true
			return what
		}
		return none
	}
}

func TestBrokenConnections(t *testing.T) {
	for _, what := range []fault{closeBefore, closeAfter} {
		f := startFake(t, newStore())
		c := connect(t, nil, nil, f)
		id := create(t, c, "a")
		f.set(func() { f.fault = once(kmip.OperationGet, what) })
		if _, err := c.Get(ctx(t), id); err != nil {
			t.Errorf("%d: a read on a kept connection is not repeated: %v", what, err)
		}
		f.set(func() { f.fault = once(kmip.OperationCreate, what) })
		if _, err := c.Create(ctx(t), "b"); !errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("%d: Create: %v, want ErrOutcomeUnknown", what, err)
		}
		if n := f.count(kmip.OperationCreate); n != 2 {
			t.Errorf("%d: Create was sent %d times", what, n)
		}
		ids, err := c.Locate(ctx(t), "b", 10)
		if want := int(what - closeBefore); err != nil || len(ids) != want {
			t.Errorf("%d: located %v, %v; want %d", what, ids, err, want)
		}
	}
}

func TestFreshConnectionIsNotRetried(t *testing.T) {
	f := startFake(t, newStore())
	c := connect(t, nil, nil, f)
	f.set(func() {
		f.fault = func(op kmip.Operation) fault {
			if op == kmip.OperationQuery {
				return closeBefore
			}
			return none
		}
	})
	if _, err := c.Query(ctx(t)); !errors.Is(err, ErrUnreachable) || f.count(kmip.OperationQuery) != 1 {
		t.Errorf("%v after %d tries", err, f.count(kmip.OperationQuery))
	}
}

func TestFailover(t *testing.T) {
	store := newStore()
	a, b := startFake(t, store), startFake(t, store)
	var log lockedBuffer
	now := newClock()
	c := connect(t, &log, func(cfg *Config) { cfg.Now = now.read }, a, b)
	id := create(t, c, "x")
	if a.count(kmip.OperationCreate) != 1 || b.connections() != 0 {
		t.Error("the first server is not preferred")
	}

	addr := a.l.Addr().String()
	a.stop()
	waitGone(t, a)
	if _, err := c.Get(ctx(t), id); err != nil {
		t.Fatal(err)
	}
	if create(t, c, "y"); b.count(kmip.OperationCreate) != 1 {
		t.Error("the second server was not asked")
	}
	if strings.Count(log.String(), "asking the next") != 1 {
		t.Errorf("a resting server is asked again at once:\n%s", log.String())
	}

	// The first server comes back; after its rest it is preferred again.
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialed := make(chan struct{}, 10)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			dialed <- struct{}{}
			conn.Close()
		}
	}()
	now.advance(minRest + time.Second)
	if _, err := c.Get(ctx(t), id); err != nil {
		t.Fatal(err)
	}
	select {
	case <-dialed:
	case <-time.After(time.Second):
		t.Error("the first server was not tried again")
	}

	b.stop()
	waitGone(t, b)
	_, err = c.Get(ctx(t), id)
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "kms-1") || !strings.Contains(err.Error(), "kms-2") {
		t.Errorf("both down: %v", err)
	}
}

func TestFailoverOnlyWhenSafe(t *testing.T) {
	store := newStore()
	a, b := startFake(t, store), startFake(t, store)
	c := connect(t, nil, nil, a, b)
	a.set(func() { a.fault = once(kmip.OperationCreate, closeAfter) })
	if _, err := c.Create(ctx(t), "x"); !errors.Is(err, ErrOutcomeUnknown) || b.count(kmip.OperationCreate) != 0 {
		t.Errorf("Create was repeated elsewhere, or %v", err)
	}
	c.Servers()[0].worked()
	a.set(func() { a.fault = once(kmip.OperationCreate, generalFailure) })
	if _, err := c.Create(ctx(t), "x"); !errors.Is(err, ErrFailed) || b.count(kmip.OperationCreate) != 0 {
		t.Errorf("Create was repeated elsewhere, or %v", err)
	}
	a.set(func() { a.fault = once(kmip.OperationQuery, generalFailure) })
	if _, err := c.Query(ctx(t)); err != nil {
		t.Errorf("a read is not repeated elsewhere: %v", err)
	}
	a.set(func() { a.fault = once(kmip.OperationQuery, garbage) })
	if _, err := c.Query(ctx(t)); err != nil {
		t.Errorf("a read is not repeated elsewhere: %v", err)
	}
}

func TestMissingOnOneServer(t *testing.T) {
	a, b := startFake(t, newStore()), startFake(t, newStore())
	c := connect(t, nil, nil, a, b)
	id := create(t, c.Servers()[1], "only there")
	if _, err := c.Get(ctx(t), id); err != nil {
		t.Errorf("a key that one server has: %v", err)
	}
	if _, err := c.Servers()[0].Get(ctx(t), id); !errors.Is(err, ErrNotFound) {
		t.Errorf("asked of the other server: %v", err)
	}
	if _, err := c.Get(ctx(t), "nowhere"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a key that none has: %v", err)
	}
}

func TestSlowHandshakeRaisesNoAlarm(t *testing.T) {
	f := startFake(t, newStore())
	var log lockedBuffer
	c := connect(t, &log, func(cfg *Config) { cfg.HandshakeTimeout = 600 * time.Millisecond }, f)
	slow := func(n int) func() time.Duration {
		return func() time.Duration {
			if n--; n >= 0 {
				return 1500 * time.Millisecond
			}
			return 0
		}
	}
	f.set(func() { f.slow = slow(1) })
	if st := c.Servers()[0].Status(ctx(t)); !st.Reachable || st.Err != nil {
		t.Errorf("one slow handshake: %+v", st)
	}
	if strings.Contains(log.String(), "unreachable") {
		t.Errorf("an alarm after one slow handshake:\n%s", log.String())
	}
	c.Servers()[0].dropIdle()
	f.set(func() { f.slow = slow(2) })
	if st := c.Servers()[0].Status(ctx(t)); st.Reachable || !errors.Is(st.Err, ErrUnreachable) {
		t.Errorf("two slow handshakes: %+v", st)
	}
	if !strings.Contains(log.String(), "key server is unreachable") {
		t.Errorf("no alarm after two:\n%s", log.String())
	}
	f.set(func() { f.slow = nil })
	if st := c.Servers()[0].Status(ctx(t)); !st.Reachable || st.Vendor != "fake�[31m" {
		t.Errorf("afterwards: %+v", st)
	}
	if !strings.Contains(log.String(), "key server is back") {
		t.Errorf("no word of its return:\n%s", log.String())
	}
}

func TestHangingServer(t *testing.T) {
	f := startFake(t, newStore())
	quick := func(cfg *Config) { cfg.RequestTimeout = time.Second }
	c := connect(t, nil, quick, f)
	if _, err := c.Query(ctx(t)); err != nil {
		t.Fatal(err)
	}
	f.set(func() {
		f.fault = func(op kmip.Operation) fault {
			if op == kmip.OperationQuery {
				return hang
			}
			return none
		}
	})
	begin := time.Now()
	if _, err := c.Query(ctx(t)); !errors.Is(err, ErrUnreachable) || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	canceled, cancel := context.WithCancel(ctx(t))
	c = connect(t, nil, func(cfg *Config) { cfg.RequestTimeout = time.Minute }, f)
	time.AfterFunc(100*time.Millisecond, cancel)
	begin = time.Now()
	if _, err := c.Query(canceled); !errors.Is(err, context.Canceled) || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	if c.Servers()[0].resting(time.Now()) {
		t.Error("a caller's cancellation counts as a failure of the server")
	}
}
