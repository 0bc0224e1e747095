package nbd

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// soon is a context for what must not take long.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestPause(t *testing.T) {
	disk := newMemDisk(t, 4<<20)
	var paused atomic.Bool
	disk.failWith(func(string, int64) error {
		if paused.Load() {
			t.Error("a request reached the device during a pause")
		}
		return nil
	})
	_, exp, path := serve(t, disk, Options{}, false)
	const clients, rounds = 4, 200
	done := make(chan struct{})
	go func() {
		defer close(done)
		together(clients, func(i int) {
			c := connect(t, path, true)
			for n := range rounds {
				c.mustWrite(uint64(i)<<20, bytes.Repeat([]byte{byte(n)}, 4096<<(n%5)))
			}
		})
	}()
	pauses := 0
	for running := true; running; pauses++ {
		if err := exp.Pause(soon(t)); err != nil {
			t.Fatal(err)
		}
		if err := exp.Pause(soon(t)); err != nil { // they nest
			t.Fatal(err)
		}
		paused.Store(true)
		time.Sleep(2 * time.Millisecond)
		exp.Resume()
		time.Sleep(2 * time.Millisecond)
		paused.Store(false)
		exp.Resume()
		select {
		case <-done:
			running = false
		case <-time.After(time.Millisecond):
		}
	}
	if pauses < 3 {
		t.Errorf("only %d pauses", pauses)
	}
}

// A pause that cannot be had leaves everything as it was.
func TestPauseGivesUp(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	release, entered := make(chan struct{}), make(chan struct{}, 1)
	disk.failWith(func(_ string, off int64) error {
		if off == 0 {
			entered <- struct{}{}
			<-release
		}
		return nil
	})
	_, exp, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	c.send(1, cmdRead, 0, 0, 512, nil)
	<-entered
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := exp.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Pause: %v", err)
	}
	other := connect(t, path, true)
	other.mustRead(512, 512)
	close(release)
	c.receive(0)
}

// Growing a disk: hold requests, drop the connections, go on; the client comes
// back to a larger disk.
func TestDisconnectWhilePaused(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, exp, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	c.mustWrite(0, make([]byte, 512))
	if err := exp.Pause(soon(t)); err != nil {
		t.Fatal(err)
	}
	calls := disk.calls.Load()
	c.send(1, cmdWrite, 0, 0, 512, make([]byte, 512)) // held, then dropped
	time.Sleep(20 * time.Millisecond)
	if err := exp.Disconnect(soon(t)); err != nil {
		t.Fatal(err)
	}
	c.closed()
	if disk.calls.Load() != calls {
		t.Error("a held request was executed")
	}
	disk.grow(1 << 20)
	exp.Resume()
	c = connect(t, path, true)
	if c.size != 2<<20 {
		t.Errorf("the client sees %d bytes", c.size)
	}
	c.mustRead(2<<20-512, 512)
}

func TestRemove(t *testing.T) {
	s, exp, path := serve(t, newMemDisk(t, 1<<20), Options{}, false)
	if _, err := s.Add("other", newMemDisk(t, 1<<20), false); err != nil {
		t.Fatal(err)
	}
	c := connect(t, path, true)
	half := dial(t, path) // in the middle of its handshake
	half.option(optInfo, infoRequest("disk"))
	other := dial(t, path)
	other.transmit("other")
	if err := exp.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	c.closed()
	half.closed()
	other.mustRead(0, 512)
	if r := dial(t, path).option(optGo, infoRequest("disk")); r.kind != repErrUnknown {
		t.Errorf("a removed export is still offered: %+v", r)
	}
}

// Shutdown answers what it has begun, and nothing is half done.
func TestShutdownDrains(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	release, entered := make(chan struct{}), make(chan struct{}, 8)
	disk.failWith(func(string, int64) error {
		entered <- struct{}{}
		<-release
		return nil
	})
	s, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	handshaking := dial(t, path)
	const n = 4
	for i := range uint64(n) {
		c.send(i, cmdWrite, 0, i*65536, 65536, bytes.Repeat([]byte{1}, 65536))
	}
	for range n {
		<-entered
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(soon(t)) }()
	handshaking.closed()
	select {
	case err := <-ended:
		t.Fatalf("Shutdown has not waited: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("a connection after Shutdown began")
	}
	close(release)
	for range n {
		if r := c.receive(0); r.err != 0 {
			t.Errorf("error %d", r.err)
		}
	}
	c.closed()
	if err := <-ended; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := s.Add("late", newMemDisk(t, 512), false); err == nil {
		t.Error("an export was added after Shutdown")
	}
}

// A flush that hangs is told when the connection is cut.
func TestCutCancelsFlush(t *testing.T) {
	disk := &hungDisk{memDisk: newMemDisk(t, 1<<20), entered: make(chan struct{})}
	s, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	c.send(1, cmdFlush, 0, 0, 0, nil)
	<-disk.entered
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v", err)
	}
	c.closed()
	if err := s.Shutdown(soon(t)); err != nil {
		t.Errorf("second Shutdown: %v", err)
	}
}

type hungDisk struct {
	*memDisk
	entered chan struct{}
}

func (d *hungDisk) Flush(ctx context.Context) error {
	close(d.entered)
	<-ctx.Done()
	return ctx.Err()
}

// The end of Serve's context ends everything.
func TestServeContext(t *testing.T) {
	s := New(Options{})
	if _, err := s.Add("disk", newMemDisk(t, 1<<20), false); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	c := connect(t, path, true)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Serve: %v", err)
	}
	c.closed()
	if err := s.Shutdown(soon(t)); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if l, err := Listen(path); err != nil {
		t.Errorf("the socket is not free: %v", err)
	} else if err := s.Serve(context.Background(), l); err != nil {
		t.Errorf("Serve after Shutdown: %v", err)
	} else if _, err := l.Accept(); err == nil {
		t.Error("Serve has not closed its listener")
	}
}
