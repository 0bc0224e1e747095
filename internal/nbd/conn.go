package nbd

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// conn is one client. Its workers take turns: the one with the token reads the
// next request. A request that is quick is served by the worker that read it,
// which keeps the token, and its reply waits for others until there is nothing
// more to read: then a burst of small requests costs one read and one write on
// the socket and no switch of goroutines. Before a request that may take long
// the worker passes the token on, so that requests run in parallel and replies
// leave as they finish.
type conn struct {
	srv   *Server
	nc    net.Conn      // during the handshake
	exp   *Export       // guarded by srv.mu during the handshake, fixed after it
	stop  chan struct{} // closed when no further request may begin
	ended chan struct{} // closed when everything is over

	structured, meta bool

	mu      sync.Mutex // guards the fields below
	w       wire       // nil before the transmission phase and after its end
	stopped bool
	cancel  context.CancelFunc

	ctx     context.Context // ends when the connection is cut
	token   chan struct{}   // holds the token while nobody does
	idle    atomic.Int32    // workers that wait for the token
	wary    atomic.Int32    // requests to come that are not trusted to be quick
	workers sync.WaitGroup
	done    chan struct{} // closed when nothing more is read
	in      inbox
	out     outbox

	// What the holder of the token knows.
	running int   // workers started
	err     error // why reading ended
}

func newConn(s *Server, nc net.Conn) *conn {
	return &conn{
		srv: s, nc: nc,
		stop:  make(chan struct{}),
		ended: make(chan struct{}),
		done:  make(chan struct{}),
		token: make(chan struct{}, 1),
	}
}

// run serves the client until it leaves or the connection is ended.
func (c *conn) run(ctx context.Context) {
	log := c.srv.opt.Logger
	left, err := c.negotiate()
	if err != nil {
		_ = c.nc.Close() // nothing is owed to the client
		if !hungUp(err) && !c.stopping() {
			log.Warn("nbd: negotiation failed", "error", err)
		}
		return
	}
	if err := c.begin(ctx, left); err != nil {
		_ = c.nc.Close()
		log.Warn("nbd: taking over a connection failed", "export", c.exp.name, "error", err)
		return
	}
	log.Info("nbd: client connected", "export", c.exp.name)
	c.passToken()
	c.workers.Wait()
	c.flush()
	c.finish()
	if !hungUp(c.err) {
		log.Warn("nbd: client disconnected", "export", c.exp.name, "error", c.err)
	} else {
		log.Info("nbd: client disconnected", "export", c.exp.name)
	}
}

// negotiate runs the handshake and returns the reader, which may hold bytes
// that follow it.
func (c *conn) negotiate() (*bufio.Reader, error) {
	if err := c.nc.SetDeadline(time.Now().Add(c.srv.opt.HandshakeTimeout)); err != nil {
		return nil, err
	}
	h := handshake{conn: c, srv: c.srv, r: bufio.NewReader(c.nc), w: c.nc}
	a, err := h.run()
	if err != nil {
		return nil, err
	}
	c.structured, c.meta = a.structured, a.meta
	return h.r, c.nc.SetDeadline(time.Time{})
}

// begin enters the transmission phase.
func (c *conn) begin(ctx context.Context, left *bufio.Reader) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return errShutdown
	}
	w, err := newWire(c.nc)
	if err != nil {
		return err
	}
	c.w = w
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.out.init()
	return c.in.init(left)
}

// finish leaves the transmission phase, in which nobody is any more.
func (c *conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel()
	c.w.Close()
	c.w = nil
}

func (c *conn) stopping() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// drain lets the requests that were read finish and the connection end.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped {
		c.stopped = true
		close(c.stop)
	}
	if c.w != nil {
		c.w.StopReading()
	} else {
		_ = c.nc.Close() // still in the handshake, or over
	}
}

// cut ends the connection at once; what is at the device finishes unheard.
func (c *conn) cut() {
	c.drain()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.w != nil {
		c.cancel()
		c.w.Break()
	}
}

// errDrained ends the reading of a connection that was asked to end.
var errDrained = errors.New("nbd: connection drained")

// hungUp reports whether err is a connection that ended as it may.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, errDrained) || errors.Is(err, errHangUp) || errors.Is(err, net.ErrClosed)
}

const (
	// A request of more bytes is served while another worker reads on.
	smallRequest = 32 << 10

	// A small request that took longer made others wait; for the next
	// waryFor requests the token is passed on.
	slowService = 40 * time.Microsecond
	waryFor     = 16

	// Replies are sent when so many wait, though there is more to read.
	maxBatch = 8
)

// work serves requests whenever this worker gets the token, until reading ends.
func (c *conn) work() {
	defer c.workers.Done()
	for c.awaitToken() {
		r, err := c.next()
		for err == nil && c.quick(r) {
			c.timed(r)
			if c.answer(r) >= maxBatch {
				c.flush()
			}
			r, err = c.next()
		}
		if err != nil {
			c.err = err
			close(c.done)
			return
		}
		c.passToken()
		c.timed(r)
		c.answer(r)
		c.flush()
	}
}

// quick reports whether serving r is expected to take less than waking another
// worker is worth.
func (c *conn) quick(r *request) bool {
	if r.errno != 0 {
		return true
	}
	if !r.small() {
		return false
	}
	return c.wary.Load() <= 0 || c.wary.Add(-1) < 0
}

// timed serves r and remembers if a small request was slow.
func (c *conn) timed(r *request) {
	if !r.small() {
		c.serve(r)
		return
	}
	began := time.Now()
	c.serve(r)
	if time.Since(began) > slowService {
		c.wary.Store(waryFor)
	}
}

// passToken lets another worker read, and starts one if all are busy.
func (c *conn) passToken() {
	if c.idle.Load() == 0 && c.running < c.srv.opt.Parallel {
		c.running++
		c.workers.Add(1)
		go c.work()
	}
	c.token <- struct{}{}
}

// awaitToken returns false when there is nothing more to read.
func (c *conn) awaitToken() bool {
	c.idle.Add(1)
	defer c.idle.Add(-1)
	select {
	case <-c.token:
		return true
	case <-c.done:
		return false
	}
}
