// Package kmipc is a KMIP client (OASIS KMIP 1.1 to 1.4, TTLV over mutual TLS)
// for the servers of one key provider: it keeps connections to each, fails over
// among them (K2, K5), and reports their status (K13).
//
// A server is trusted because an administrator confirmed its certificate's
// thumbprint, not because a CA or a host name says so. What a server sends is
// checked for structure before a decoder sees it, and its size is bounded.
//
// Place in the flow: level 1; used by provider/standard. It imports secret, and
// for the codec github.com/ovh/kmip-go; nothing of the KMIP server.
package kmipc

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sort"
	"time"

	"github.com/ovh/kmip-go"
)

// An Endpoint is one key server.
type Endpoint struct {
	Name    string // as the administrator calls it
	Address string // host:port; KMIP's port is 5696

	// Pins are the SHA-256 sums of the server certificates (DER) that the
	// administrator confirmed: one, or two while the server renews its own.
	// An expired certificate that is pinned is still accepted, since no CA
	// vouches for its dates; Status shows them.
	Pins [][sha256.Size]byte
}

// A Config describes a Client. Zero durations and limits mean the defaults.
type Config struct {
	Endpoints   []Endpoint      // in order of preference
	Certificate tls.Certificate // the client's

	HandshakeTimeout time.Duration // to connect, handshake and agree on a version: 10 s
	RequestTimeout   time.Duration // for one request on a connection: 30 s
	IdleTimeout      time.Duration // how long an unused connection is kept: 60 s
	MaxConnections   int           // per server: 16, so that a boot herd does not melt it
	MaxIdle          int           // of them kept when unused: 4

	Dial func(ctx context.Context, network, address string) (net.Conn, error) // nil: a net.Dialer
	Now  func() time.Time                                                     // nil: time.Now
	Log  *slog.Logger
}

// A Client talks to the servers of one key provider. Its operations go to the
// first server that answers. They may be called concurrently.
type Client struct {
	operations
	cfg     Config
	servers []*Server
}

// New checks a Config and makes a Client. It does not connect.
func New(cfg Config) (*Client, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, errors.New("kmipc: a key provider needs at least one server")
	}
	if len(cfg.Certificate.Certificate) == 0 || cfg.Certificate.PrivateKey == nil {
		return nil, errors.New("kmipc: no client certificate; key servers know their clients by one")
	}
	setDefault(&cfg.HandshakeTimeout, 10*time.Second)
	setDefault(&cfg.RequestTimeout, 30*time.Second)
	setDefault(&cfg.IdleTimeout, 60*time.Second)
	setDefault(&cfg.MaxConnections, 16)
	setDefault(&cfg.MaxIdle, 4)
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{cfg: cfg}
	c.operations = operations{c.call}
	names := map[string]bool{}
	for _, e := range cfg.Endpoints {
		if _, _, err := net.SplitHostPort(e.Address); err != nil {
			return nil, fmt.Errorf("kmipc: address %q of server %q is not host:port: %w", e.Address, e.Name, err)
		}
		if len(e.Pins) == 0 {
			return nil, fmt.Errorf("kmipc: server %q is not trusted yet: confirm its certificate's thumbprint", e.Name)
		}
		if e.Name == "" || names[e.Name] {
			return nil, fmt.Errorf("kmipc: two servers are called %q, or one has no name", e.Name)
		}
		names[e.Name] = true
		c.servers = append(c.servers, newServer(&c.cfg, e))
	}
	return c, nil
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Servers lists the servers, in the order of the Config. What is asked of one
// of them is not failed over.
func (c *Client) Servers() []*Server { return c.servers }

// Close closes the idle connections; others close when their request ends.
func (c *Client) Close() {
	for _, s := range c.servers {
		s.close()
	}
}

// call asks one server after the other until one answers.
func (c *Client) call(ctx context.Context, req kmip.OperationPayload) (kmip.OperationPayload, error) {
	var failed failures
	for _, s := range c.order() {
		resp, err := s.call(ctx, req)
		if err == nil {
			return resp, nil
		}
		failed = append(failed, err)
		if ctx.Err() != nil || !mayAskAnother(req.Operation(), err) {
			break
		}
		c.cfg.Log.Info("key server failed, asking the next", "server", s.endpoint.Name, "error", err)
	}
	if len(failed) == 1 {
		return nil, failed[0]
	}
	return nil, failed
}

// order puts servers that failed lately behind the others, and otherwise keeps
// the configured order.
func (c *Client) order() []*Server {
	now := c.cfg.Now()
	resting := map[*Server]bool{}
	for _, s := range c.servers {
		resting[s] = s.resting(now)
	}
	order := append([]*Server(nil), c.servers...)
	sort.SliceStable(order, func(i, j int) bool { return !resting[order[i]] && resting[order[j]] })
	return order
}

// mayAskAnother says whether an error of one server is no reason to give up.
// An operation that changes something moves on only if it cannot have happened.
func mayAskAnother(op kmip.Operation, err error) bool {
	for _, nothingHappened := range []error{ErrUnreachable, ErrRefused, ErrCertificateChanged} {
		if errors.Is(err, nothingHappened) {
			return true
		}
	}
	if !idempotent(op) {
		return false
	}
	// A key may be missing where replication is behind.
	return errors.Is(err, ErrProtocol) || errors.Is(err, ErrNotFound) || isReason(err, kmip.ResultReasonGeneralFailure)
}

// idempotent operations read; repeating one changes nothing.
func idempotent(op kmip.Operation) bool {
	switch op {
	case kmip.OperationDiscoverVersions, kmip.OperationQuery, kmip.OperationLocate, kmip.OperationGet, kmip.OperationGetAttributes:
		return true
	}
	return false
}
