package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

// Options tune a server; a zero field takes the value it names.
type Options struct {
	Logger           *slog.Logger
	HandshakeTimeout time.Duration // for the whole negotiation; 10 s
	MaxConns         int           // connections at once, over all exports; 64
	Parallel         int           // requests of one connection that are served at once; 16

	// deafTo is a bug that tests put in to see that they find it: a flush of
	// these connections, counted from 0, is acknowledged and not done.
	deafTo func(conn int) bool
}

// Server serves exports to any number of connections. Its methods may be
// called from any goroutine.
type Server struct {
	opt    Options
	pool   buffers
	wholes sync.Pool // *whole

	mu        sync.Mutex
	exports   map[string]*Export
	listeners map[net.Listener]bool
	conns     map[*conn]bool
	strangers []*conn // those of conns that have not shown who they are, oldest first
	started   int     // connections so far
	shut      bool

	refusals throttle
}

var errShutdown = errors.New("nbd: server is shut down")

// New returns a server without exports.
func New(opt Options) *Server {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.HandshakeTimeout <= 0 {
		opt.HandshakeTimeout = 10 * time.Second
	}
	if opt.MaxConns <= 0 {
		opt.MaxConns = 64
	}
	if opt.Parallel <= 0 {
		opt.Parallel = 16
	}
	return &Server{
		opt:       opt,
		exports:   map[string]*Export{},
		listeners: map[net.Listener]bool{},
		conns:     map[*conn]bool{},
	}
}

// Export is a device that a server offers under a name.
type Export struct {
	srv      *Server
	name     string
	dev      Device
	readOnly bool
	gate     gate
	faults   throttle
	tracked  bitmapList // marked before every change
	offered  bitmapList // what clients may ask for; holds tracked
}

// Add offers dev under name; the empty name is what a client gets that asks
// for none. The device stays its owner's, who closes it after Remove or
// Shutdown. A read-only export refuses every change with EPERM.
func (s *Server) Add(name string, dev Device, readOnly bool) (*Export, error) {
	if len(name) > maxName {
		return nil, fmt.Errorf("nbd: export name of %d bytes, at most %d are possible", len(name), maxName)
	}
	if size := dev.Size(); size <= 0 || size%SectorSize != 0 {
		return nil, fmt.Errorf("nbd: export %q has %d bytes, which is no positive multiple of %d", name, size, SectorSize)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut {
		return nil, errShutdown
	}
	if s.exports[name] != nil {
		return nil, fmt.Errorf("nbd: export %q exists", name)
	}
	e := &Export{srv: s, name: name, dev: dev, readOnly: readOnly}
	s.exports[name] = e
	return e, nil
}

// Pause waits until no request of this export is at the device and holds new
// ones until Resume; clients see only a delay. Pauses nest. When ctx ends first
// the export goes on as before.
func (e *Export) Pause(ctx context.Context) error {
	if err := e.gate.hold(ctx); err != nil {
		return fmt.Errorf("nbd: pausing export %q: %w", e.name, err)
	}
	return nil
}

// Resume ends one Pause.
func (e *Export) Resume() { e.gate.release() }

// Disconnect ends the export's connections: requests that have been read are
// answered, then each is closed. A client that reconnects gets in again and
// sees the disk's new size. When ctx ends first the connections are cut.
func (e *Export) Disconnect(ctx context.Context) error {
	return e.srv.drain(ctx, func(c *conn) bool { return c.exp == e })
}

// Remove withdraws the export and disconnects its clients. When it returns nil
// nobody uses the device any more.
func (e *Export) Remove(ctx context.Context) error {
	e.srv.mu.Lock()
	if e.srv.exports[e.name] == e {
		delete(e.srv.exports, e.name)
	}
	e.srv.mu.Unlock()
	return e.Disconnect(ctx)
}

// claim looks an export up for a connection that is about to be told its size,
// so that Disconnect reaches that connection from here on.
func (s *Server) claim(name string, c *conn) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.exp = s.exports[name]
	return c.exp
}

func (s *Server) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name := range s.exports {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (s *Server) draining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shut
}

// Serve accepts connections from l, a unix socket, until ctx ends or the server
// is shut down, and closes l. Who may connect is what the socket's folder and mode
// say. It returns nil when the server is shut down, before or during it. The end
// of ctx cuts every connection of the server.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if network := l.Addr().Network(); network != "unix" {
		_ = l.Close() // never used
		return fmt.Errorf("nbd: a disk is not served in clear over %s (%s): use TLS, or a unix socket", network, l.Addr())
	}
	return s.serve(ctx, l, nil)
}

// serve is Serve and ServeTLS.
func (s *Server) serve(ctx context.Context, l net.Listener, secure *tls.Config) error {
	defer func() { _ = l.Close() }() // it may be closed already
	s.mu.Lock()
	if s.shut {
		s.mu.Unlock()
		return nil
	}
	s.listeners[l] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close()
		s.cut()
	})
	defer stop()
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			s.start(ctx, c, secure)
		case ctx.Err() != nil:
			return ctx.Err()
		case s.draining():
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: listener was closed: %w", err)
		default: // out of descriptors, or a client that left in the queue
			s.warn("nbd: accepting a connection failed", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

// start runs a connection; secure is nil on a unix socket.
func (s *Server) start(ctx context.Context, nc net.Conn, secure *tls.Config) {
	c := newConn(s, nc, secure)
	s.mu.Lock()
	if s.shut {
		s.mu.Unlock()
		_ = nc.Close() // never used
		return
	}
	c.number = s.started
	s.started++
	s.conns[c] = true
	s.strangers = append(s.strangers, c)
	var oldest *conn
	if secure == nil {
		if !s.admitLocked(c) {
			delete(s.conns, c)
			s.mu.Unlock()
			_ = nc.Close() // never used
			s.warn("nbd: connection refused, too many are open", "limit", s.opt.MaxConns)
			return
		}
	} else if len(s.strangers) > maxStrangers {
		oldest = s.strangers[0]
		s.strangers = s.strangers[1:]
	}
	s.mu.Unlock()
	if oldest != nil {
		oldest.cut()
		s.warn("nbd: too many connections wait for TLS, the oldest was closed", "limit", maxStrangers)
	}
	go func() {
		c.run(ctx)
		s.mu.Lock()
		delete(s.conns, c)
		s.forgetLocked(c)
		s.mu.Unlock()
		close(c.ended)
	}()
}

// maxStrangers bounds the connections that have not shown a certificate. They do
// not count as connections of clients: who has none cannot keep those out who
// have. When there are more, the oldest goes.
const maxStrangers = 64

// admit counts a connection as a client's, if there is room.
func (s *Server) admit(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admitLocked(c)
}

func (s *Server) admitLocked(c *conn) bool {
	s.forgetLocked(c)
	clients := len(s.conns) - len(s.strangers) // c among them
	return clients <= s.opt.MaxConns
}

func (s *Server) forgetLocked(c *conn) {
	if i := slices.Index(s.strangers, c); i >= 0 {
		s.strangers = slices.Delete(s.strangers, i, i+1)
	}
}

// warn logs what strangers can cause as often as they like, once a second.
func (s *Server) warn(text string, args ...any) {
	if similar, ok := s.refusals.pass(time.Now()); ok {
		s.opt.Logger.Warn(text, append(args, "similar", similar)...)
	}
}

// Shutdown stops accepting, lets every connection answer the requests that it
// has read, and closes them; a client that sent more finds its connection
// closed and may send them again to the next server. When ctx ends first the
// connections are cut and its error is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.shut = true
	for l := range s.listeners {
		_ = l.Close() // Serve sees it
	}
	s.mu.Unlock()
	return s.drain(ctx, func(*conn) bool { return true })
}

// drain ends the chosen connections and waits for them.
func (s *Server) drain(ctx context.Context, chosen func(*conn) bool) error {
	var list []*conn
	s.mu.Lock()
	for c := range s.conns {
		if chosen(c) {
			list = append(list, c)
		}
	}
	s.mu.Unlock()
	for _, c := range list {
		c.drain()
	}
	var err error
	for _, c := range list {
		select {
		case <-c.ended:
		case <-ctx.Done():
			err = ctx.Err()
			c.cut()
		}
	}
	return err
}

func (s *Server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.cut()
	}
}
