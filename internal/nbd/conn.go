package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// conn is one client: first its handshake, then its workers (see worker.go).
type conn struct {
	srv   *Server
	nc    net.Conn      // as it was accepted; in the transmission phase w has it
	tls   *tls.Config   // what a client must do first; nil on a unix socket
	exp   *Export       // guarded by srv.mu during the handshake, fixed after it
	stop  chan struct{} // closed when no further request may begin
	ended chan struct{} // closed when everything is over

	number int // counts the server's connections

	structured bool
	contexts   contexts

	mu      sync.Mutex // guards the fields below
	w       wire       // nil before the transmission phase and after its end
	stopped bool
	cancel  context.CancelFunc

	ctx context.Context // ends when the connection is cut
	crew
	in  inbox
	out outbox
}

func newConn(s *Server, nc net.Conn, secure *tls.Config) *conn {
	return &conn{
		srv: s, nc: nc, tls: secure,
		stop:  make(chan struct{}),
		ended: make(chan struct{}),
		crew:  newCrew(),
	}
}

// run serves the client until it leaves or the connection is ended.
func (c *conn) run(ctx context.Context) {
	log := c.srv.opt.Logger
	h, err := c.negotiate()
	if err != nil {
		_ = c.nc.Close() // nothing is owed to the client
		if !hungUp(err) && !c.stopping() {
			c.srv.warn("nbd: negotiation failed", "error", err)
		}
		return
	}
	if err := c.begin(ctx, h); err != nil {
		_ = c.nc.Close()
		log.Warn("nbd: taking over a connection failed", "export", c.exp.name, "error", err)
		return
	}
	log.Info("nbd: client connected", "export", c.exp.name, "peer", h.peer)
	c.transmit()
	c.finish()
	if !hungUp(c.err) && !c.stopping() {
		log.Warn("nbd: client disconnected", "export", c.exp.name, "error", c.err)
	} else {
		log.Info("nbd: client disconnected", "export", c.exp.name)
	}
}

// negotiate runs the handshake and returns it; its reader may hold bytes that
// follow it.
func (c *conn) negotiate() (*handshake, error) {
	if err := c.nc.SetDeadline(time.Now().Add(c.srv.opt.HandshakeTimeout)); err != nil {
		return nil, err
	}
	h := &handshake{conn: c, srv: c.srv, stream: c.nc, r: bufio.NewReader(c.nc)}
	a, err := h.run()
	if err != nil {
		return nil, err
	}
	c.structured, c.contexts = a.structured, a.contexts
	return h, c.nc.SetDeadline(time.Time{})
}

// begin enters the transmission phase.
func (c *conn) begin(ctx context.Context, h *handshake) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return errShutdown
	}
	w, err := newWire(h.stream)
	if err != nil {
		return err
	}
	c.w = w
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.out.init()
	return c.in.init(h.r)
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
