package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"mortise/internal/pki"
	"mortise/internal/store"
)

const (
	handshakeTime = 10 * time.Second
	// maxPeerConns bounds the connections of the peers' port. Raft keeps a few
	// for each pair of members.
	maxPeerConns = 256
)

// front is the peers' port.
type front struct {
	n                             *Node
	calls, joins, farewells       *http.Server
	toCalls, toJoins, toFarewells *queue
	slots                         chan struct{}

	mu       sync.Mutex
	listener net.Listener
	run      context.Context // ends with the front
	stop     context.CancelFunc
	conns    map[net.Conn]string // raft and calls, by member
	wg       sync.WaitGroup
}

func newFront(n *Node) *front {
	f := &front{n: n, conns: map[net.Conn]string{}, slots: make(chan struct{}, maxPeerConns), toCalls: newQueue(), toJoins: newQueue(), toFarewells: newQueue()}
	f.run, f.stop = context.WithCancel(context.Background())
	server := func(h http.Handler, q *queue) *http.Server {
		s := &http.Server{Handler: h, ReadTimeout: 20 * time.Second, WriteTimeout: 60 * time.Second, IdleTimeout: time.Minute,
			MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(n.log.Handler(), slog.LevelDebug)}
		f.wg.Go(func() { s.Serve(q) })
		return s
	}
	f.calls = server(n.callHandler(), f.toCalls)
	f.joins = server(n.joinHandler(), f.toJoins)
	f.farewells = server(farewell(), f.toFarewells)
	return f
}

// config says by ALPN what a caller must show.
func (f *front) config() *tls.Config {
	m := pki.Mutual{Credentials: f.n.creds, CAs: []*x509.Certificate{f.n.ca}, Now: f.n.now}
	peers := m.Server(f.n.admit) // raft
	// A caller that is no member any more is told so, in serve.
	calls := m.Server(func(pki.Identity, *x509.Certificate) error { return nil })
	calls.NextProtos = []string{protoCalls}
	joins := pki.HTTPSServer(f.n.creds)
	joins.MinVersion, joins.NextProtos, joins.Time = tls.VersionTLS13, []string{protoJoin}, f.n.now
	pick := &tls.Config{MinVersion: tls.VersionTLS13}
	pick.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(hello.SupportedProtos, protoJoin) {
			return joins, nil
		}
		if slices.Contains(hello.SupportedProtos, protoCalls) {
			return calls, nil
		}
		return peers, nil
	}
	return pick
}

func (f *front) listen(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("cluster: listening for peers: %w", err)
	}
	f.mu.Lock()
	f.listener = l
	f.mu.Unlock()
	config := f.config()
	f.wg.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				f.n.log.Warn("peer port: accepting failed", "error", err)
				time.Sleep(100 * time.Millisecond)
				continue
			}
			select {
			case f.slots <- struct{}{}:
				f.wg.Go(func() {
					defer func() { <-f.slots }()
					f.serve(raw, config)
				})
			default:
				raw.Close()
			}
		}
	})
	return nil
}

// serve lives as long as a connection.
func (f *front) serve(raw net.Conn, config *tls.Config) {
	if t, ok := raw.(*net.TCPConn); ok { // a peer whose machine is gone is noticed
		t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3})
	}
	conn := tls.Server(raw, config)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(f.run, handshakeTime)
	err := conn.HandshakeContext(ctx)
	cancel()
	if err != nil {
		f.n.log.Debug("peer port: handshake failed", "from", raw.RemoteAddr().String(), "error", err)
		return
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol == protoJoin {
		f.toJoins.put(conn, f.run)
		return
	}
	id, err := pki.IdentityOf(state.PeerCertificates[0])
	if err != nil { // not reached: verified
		return
	}
	f.mu.Lock()
	f.conns[conn] = id.Name
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.conns, conn)
		f.mu.Unlock()
	}()
	// Asked once end can find the connection: who is removed from now on is cut.
	if err := f.n.admit(id, state.PeerCertificates[0]); err != nil {
		f.n.log.Debug("peer port: caller refused", "from", raw.RemoteAddr().String(), "error", err)
		if state.NegotiatedProtocol == protoCalls {
			f.toFarewells.put(conn, f.run)
		}
		return
	}
	if state.NegotiatedProtocol == protoCalls {
		f.toCalls.put(conn, f.run)
		return
	}
	f.toRaft(conn)
}

// toRaft passes a member's connection on to etcd.
func (f *front) toRaft(conn net.Conn) {
	raft, err := store.DialPeer(f.run, f.n.socket())
	if err != nil {
		f.n.log.Debug("peer port: raft is not there yet", "error", err)
		return
	}
	defer raft.Close()
	stop := context.AfterFunc(f.run, func() { conn.Close(); raft.Close() })
	defer stop()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		io.Copy(conn, raft)
		conn.Close()
	}()
	io.Copy(raft, conn)
	raft.Close()
	<-answered
}

// end cuts a member's connections.
func (f *front) end(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c, who := range f.conns {
		if who == name {
			go c.Close()
		}
	}
}

// deafen stops listening; it may listen again.
func (f *front) deafen() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.listener != nil {
		f.listener.Close()
		f.listener = nil
	}
	for c := range f.conns {
		go c.Close()
	}
}

func (f *front) close() {
	f.stop()
	f.deafen()
	f.toCalls.Close()
	f.toJoins.Close()
	f.toFarewells.Close()
	f.calls.Close()
	f.joins.Close()
	f.farewells.Close()
	f.wg.Wait()
}

// queue is a net.Listener of connections whose handshake is over.
type queue struct {
	conns chan *handed
	once  sync.Once
	ended chan struct{}
}

// handed tells when a connection that was given away is closed.
type handed struct {
	*tls.Conn
	once   sync.Once
	closed chan struct{}
}

func (h *handed) Close() error {
	h.once.Do(func() { close(h.closed) })
	return h.Conn.Close()
}

func newQueue() *queue { return &queue{conns: make(chan *handed), ended: make(chan struct{})} }

// put gives a connection to who accepts from the queue, and waits for its end.
func (q *queue) put(c *tls.Conn, ctx interface{ Done() <-chan struct{} }) {
	h := &handed{Conn: c, closed: make(chan struct{})}
	select {
	case q.conns <- h:
		select {
		case <-h.closed:
		case <-ctx.Done():
		}
	case <-q.ended:
	case <-ctx.Done():
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.ended:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error   { q.once.Do(func() { close(q.ended) }); return nil }
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }
