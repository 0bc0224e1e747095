// Package kmipd is the KMIP front of the KMS: TLS, TTLV messages, batches and
// operations of KMIP 1.0 to 1.4, over the objects of internal/kms (S1).
//
// Place in the flow: level 2, over kms. It imports kms, pki, secret, and
// kmip-go's codec and payload types; connections, routing and the check of a
// message's structure are its own.
//
// A client is who holds the private key of a certificate that is pinned for the
// instance. It is looked up inside the handshake, and again for each message,
// so that a certificate that is removed is refused at once (S3).
package kmipd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// Port is the one that IANA gave to KMIP.
const Port = 5696

// Options of a listener. Zero values are the defaults in brackets.
type Options struct {
	// Instance whose keys are served; [the one that the client's TLS server name
	// means, and on ports of their own those that have one].
	Instance    string
	Credentials *pki.Credentials // the server's certificate; needed
	Logger      *slog.Logger     // [none]
	Now         func() time.Time // [time.Now]
	Watcher     Watcher          // is told what happens [nobody]

	MaxConnections   int           // open at once; more are closed [10000]
	MaxMessage       int           // bytes of one request [1 MiB]
	HandshakeTimeout time.Duration // [10 s]
	ReadTimeout      time.Duration // from a request's first byte to its last [30 s]
	WriteTimeout     time.Duration // of a response [30 s]
	RequestTimeout   time.Duration // of the work between the two [30 s]
	IdleTimeout      time.Duration // between requests; long, or it breaks clients' pools [1 h]
	DrainTimeout     time.Duration // for requests under way when the context ends [10 s]
}

func (o *Options) defaults() error {
	if o.Credentials == nil {
		return errors.New("kmip: the listener has no server certificate")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Watcher == nil {
		o.Watcher = nobody{}
	}
	number := func(n *int, d int) {
		if *n <= 0 {
			*n = d
		}
	}
	duration := func(p *time.Duration, d time.Duration) {
		if *p <= 0 {
			*p = d
		}
	}
	number(&o.MaxConnections, 10_000)
	number(&o.MaxMessage, 1<<20)
	duration(&o.HandshakeTimeout, 10*time.Second)
	duration(&o.ReadTimeout, 30*time.Second)
	duration(&o.WriteTimeout, 30*time.Second)
	duration(&o.RequestTimeout, 30*time.Second)
	duration(&o.IdleTimeout, time.Hour)
	duration(&o.DrainTimeout, 10*time.Second)
	return nil
}

type server struct {
	Options
	kms        *kms.KMS
	log        *slog.Logger
	now        func() time.Time
	tls        *tls.Config
	configs    sync.Map // of *tls.Config, by instance
	operations map[kmip.Operation]operation
	encoders   sync.Pool // of *encoder

	mu       sync.Mutex
	conns    map[*conn]struct{}
	draining bool
	done     sync.WaitGroup
	shed     time.Time // when a connection over the limit was last logged
}

func newServer(k *kms.KMS, o Options) (*server, error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	s := &server{
		Options:    o,
		kms:        k,
		log:        o.Logger,
		now:        o.Now,
		operations: map[kmip.Operation]operation{},
		encoders:   sync.Pool{New: newEncoder},
		conns:      map[*conn]struct{}{},
	}
	for _, op := range operations() {
		s.operations[op.code] = op
	}
	// The base has no admission of its own: no client gets past choosing an
	// instance. Its ticket keys are every instance's; whom a ticket is of is looked
	// up again for each connection and each message.
	s.tls = pki.KMIPServer(o.Credentials, o.Now, func(*x509.Certificate) error { return errors.New("kmip: no instance was chosen") })
	s.tls.GetConfigForClient = s.choose
	return s, nil
}

// Serve answers KMIP on l until ctx ends, then closes l and idle connections,
// lets requests under way finish, and returns nil.
func Serve(ctx context.Context, l net.Listener, k *kms.KMS, o Options) error {
	s, err := newServer(k, o)
	if err != nil {
		return err
	}
	defer s.drain()
	if s.Instance == "" {
		var own sync.WaitGroup
		defer own.Wait()
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		own.Go(func() { s.servePorts(ctx, l.Addr()) })
	}
	return s.accept(ctx, l, s.Instance)
}

// accept serves what connects to l until ctx ends or l fails. instance is the
// one that l is for, "" for whichever the client names.
func (s *server) accept(ctx context.Context, l net.Listener, instance string) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for pause := time.Duration(0); ; {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("kmip: the listener was closed: %w", err)
			}
			// Out of file descriptors, say: waiting is all that helps.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Error("kmip: accepting a connection failed", "error", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		pause = 0
		s.begin(c, instance)
	}
}

// begin serves c on a goroutine of its own, or closes it when there are too
// many.
func (s *server) begin(raw net.Conn, instance string) {
	c := &conn{s: s, raw: raw, from: raw.RemoteAddr().String(), instance: instance}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || len(s.conns) >= s.MaxConnections {
		raw.Close()
		s.Watcher.Shed()
		if now := time.Now(); !s.draining && now.Sub(s.shed) > time.Second {
			s.shed = now
			s.log.Warn("kmip: connection closed: too many are open", "from", c.from, "limit", s.MaxConnections)
		}
		return
	}
	s.conns[c] = struct{}{}
	s.Watcher.Opened()
	s.done.Go(func() {
		defer s.Watcher.Closed()
		c.serve()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
	})
}

func (s *server) drain() {
	s.mu.Lock()
	s.draining = true
	for c := range s.conns {
		c.finish()
	}
	s.mu.Unlock()
	force := time.AfterFunc(s.DrainTimeout, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			c.raw.Close()
		}
	})
	defer force.Stop()
	s.done.Wait()
}
