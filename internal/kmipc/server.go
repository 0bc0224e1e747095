package kmipc

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// Rest of a server that failed, before requests try it first again: it doubles
// with each failure.
const (
	minRest = 5 * time.Second
	maxRest = 5 * time.Minute
)

// alarmAfter is how many failures in a row make a server unreachable: one slow
// handshake raises no alarm (K2).
const alarmAfter = 2

// A Server is one endpoint with its connections. Its operations go to that
// server alone. They may be called concurrently.
type Server struct {
	operations
	cfg      *Config
	endpoint Endpoint
	slots    chan struct{} // one for each connection in use

	mu       sync.Mutex
	idle     []*conn // most recently used last
	closed   bool
	failures int       // in a row
	restedBy time.Time // until then other servers are asked first
}

func newServer(cfg *Config, e Endpoint) *Server {
	s := &Server{cfg: cfg, endpoint: e, slots: make(chan struct{}, cfg.MaxConnections)}
	s.operations = operations{s.call}
	return s
}

// Name is the endpoint's.
func (s *Server) Name() string { return s.endpoint.Name }

// call runs one request. A kept connection that turns out dead is replaced by
// a fresh one, once, if the request cannot have been carried out on it.
func (s *Server) call(ctx context.Context, req kmip.OperationPayload) (kmip.OperationPayload, error) {
	op := req.Operation()
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, s.fail(op, ErrUnreachable, ctx.Err())
	}
	defer func() { <-s.slots }()

	if c := s.takeIdle(); c != nil {
		resp, err := s.use(ctx, c, req)
		if err == nil || ctx.Err() != nil || isAnswer(err) {
			return resp, s.asError(ctx, op, err, true)
		}
		s.dropIdle() // they are as old or older
		if !idempotent(op) {
			return nil, s.asError(ctx, op, err, true)
		}
	}
	c, err := s.dial(ctx)
	if err != nil {
		return nil, s.asError(ctx, op, err, false)
	}
	resp, err := s.use(ctx, c, req)
	return resp, s.asError(ctx, op, err, true)
}

// use sends a request on a connection and keeps the connection if it is still good.
func (s *Server) use(ctx context.Context, c *conn, req kmip.OperationPayload) (kmip.OperationPayload, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	resp, err := c.exchange(ctx, req)
	if err != nil && !isAnswer(err) {
		c.abort()
		return nil, err
	}
	s.keep(c)
	return resp, err
}

// isAnswer tells the server's own refusals from broken connections.
func isAnswer(err error) bool {
	var r *ResultError
	return errors.As(err, &r)
}

// asError records how the server did and says what an error means. sent: the
// request may have reached the server.
func (s *Server) asError(ctx context.Context, op kmip.Operation, err error, sent bool) error {
	var result *ResultError
	var cert *CertificateError
	var protocol *protocolError
	switch {
	case err == nil:
		s.worked()
		return nil
	case errors.As(err, &result):
		s.worked()
		return s.fail(op, result.kind(), result)
	}
	kind := ErrUnreachable
	switch {
	case errors.As(err, &cert):
		kind = ErrCertificateChanged
	case refusedByTLS(err):
		kind = ErrRefused
	case sent && !idempotent(op):
		kind = ErrOutcomeUnknown
	case errors.As(err, &protocol):
		kind = ErrProtocol
	}
	if ctx.Err() != nil {
		return s.fail(op, kind, context.Cause(ctx)) // the caller's doing, not the server's
	}
	s.failed(err)
	return s.fail(op, kind, err)
}

func (s *Server) fail(op kmip.Operation, kind, err error) error {
	return &Error{Server: s.endpoint.Name, Address: s.endpoint.Address, Operation: ttlv.EnumStr(op), Kind: kind, Err: err}
}

// takeIdle returns a kept connection that looks alive, or nil.
func (s *Server) takeIdle() *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.idle) > 0 {
		c := s.idle[len(s.idle)-1]
		s.idle = s.idle[:len(s.idle)-1]
		if s.cfg.Now().Sub(c.idle) <= s.cfg.IdleTimeout && !c.dead() {
			return c
		}
		c.abort()
	}
	return nil
}

func (s *Server) keep(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || c.spoiled || len(s.idle) >= s.cfg.MaxIdle {
		go c.close() // its farewell may block
		return
	}
	c.idle = s.cfg.Now()
	s.idle = append(s.idle, c)
}

func (s *Server) dropIdle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.idle {
		c.abort()
	}
	s.idle = nil
}

func (s *Server) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.dropIdle()
}

func (s *Server) worked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failures >= alarmAfter {
		s.cfg.Log.Info("key server is back", "server", s.endpoint.Name, "address", s.endpoint.Address)
	}
	s.failures, s.restedBy = 0, time.Time{}
}

func (s *Server) failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rest := minRest << min(s.failures, 10)
	s.restedBy = s.cfg.Now().Add(min(rest, maxRest))
	s.failures++
	if s.failures == alarmAfter {
		s.cfg.Log.Warn("key server is unreachable", "server", s.endpoint.Name, "address", s.endpoint.Address, "error", err)
	}
}

func (s *Server) resting(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Before(s.restedBy)
}
