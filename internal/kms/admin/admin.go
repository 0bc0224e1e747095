// Package admin is the administration API of a KMS: HTTP with JSON, over a unix
// socket that only its owner can open and over HTTPS for everybody with a
// client certificate or an API key, and the client of both.
//
// Place in the flow: level 2, over kms and everything under it but its KMIP
// front; cli/kmscli and cmd/mortise use it. It decides who may call what and
// words the answers; what a call does is kms's.
//
// # One table
//
// Every call is a row: method, path, least role, whether only the socket has
// it, the types of its request and its answer, and the function. The servers and
// the OpenAPI description (GET /v1/openapi.json) are made of the rows, so that
// neither can say what the other does not do. A new area adds a file with its
// rows, its request and response types, and its methods of [Client].
//
// # Who may call what
//
// On the socket: root, everything (design §1). Over HTTPS a caller has a role
// (S7): that of a pinned client certificate or of an API key, in its own
// instance only; an API key made for the whole server has its role everywhere.
// A row whose path has {instance} wants the role in that instance, any other row
// in the whole server. Somebody else's instance is answered as one that does
// not exist (S2).
package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/cluster"
	"mortise/internal/pki"
)

// Port is where the API is served over HTTPS unless another is configured.
const Port = 5697

// maxBody bounds a JSON request, in bytes: the longest holds a certificate.
const maxBody = 256 << 10

// maxCallers bounds the connections of one HTTPS listener.
const maxCallers = 1000

// Options are the parts that the API gives access to.
type Options struct {
	KMS *kms.KMS // needed
	// Cluster has the other members; nil where there cannot be any.
	Cluster *cluster.Node
	Logger  *slog.Logger     // nil: none
	Now     func() time.Time // nil: time.Now; checks TLS certificates
	// Version of the program, for the status.
	Version string
	// RootKeys opens the root-key providers; nil: nobody does so here.
	RootKeys RootKeys
}

// A Server answers the administration API of one KMS.
type Server struct {
	Options
	table []row
}

// New makes a server of the API.
func New(o Options) *Server {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Server{Options: o, table: rows()}
}

// Listen makes the admin socket at path with mode 0600. A socket left by a dead
// process is replaced; one that answers is not.
func Listen(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("admin: socket %s is in use by another process", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("admin: removing the socket of a dead process: %w", err)
		}
	}
	// Bound under another name and mode first, so that nobody connects before
	// the mode is right.
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("admin: making the socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("admin: making the socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("admin: making the socket: %w", err)
	}
	return l, nil
}

// ServeSocket serves the socket that [Listen] made until ctx ends.
func (s *Server) ServeSocket(ctx context.Context, l net.Listener) error {
	return s.serve(ctx, l, s.handler(true))
}

// ServeHTTPS serves callers from the network until ctx ends.
func (s *Server) ServeHTTPS(ctx context.Context, l net.Listener, c *pki.Credentials) error {
	config := pki.HTTPSServer(c)
	// Which certificates count is decided for each call, so that one that was
	// revoked is refused at once; TLS proves that the caller has its key.
	config.ClientAuth = tls.RequestClientCert
	config.Time = s.Now
	config.NextProtos = []string{"http/1.1"}
	return s.serve(ctx, tls.NewListener(&limited{Listener: l, free: make(chan struct{}, maxCallers)}, config), s.handler(false))
}

func (s *Server) serve(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler:           h,
		ConnContext:       withPeer,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(quiet{s.Logger.Handler()}, slog.LevelDebug),
	}
	stopped := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		defer close(stopped)
		last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if srv.Shutdown(last) != nil {
			srv.Close()
		}
	})()
	if err := srv.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("admin: serving %s: %w", l.Addr(), err)
	}
	<-stopped
	return nil
}

// quiet logs what net/http has to say about clients' TLS errors as debug lines.
type quiet struct{ slog.Handler }

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Message = "admin: " + strings.TrimSpace(r.Message)
	return q.Handler.Handle(ctx, r)
}

// limited closes connections over a number instead of holding them.
type limited struct {
	net.Listener
	free chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.free <- struct{}{}:
			return &limitedConn{Conn: c, l: l}, nil
		default:
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	l    *limited
	once sync.Once
}

func (c *limitedConn) Close() error {
	c.once.Do(func() { <-c.l.free })
	return c.Conn.Close()
}
