package kmipd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// Which instance a client means is settled once, inside the handshake: by the
// port it came to, if that is an instance's own, or else by the TLS server name
// that it sends (S2).

// handshaking lets choose find the connection that a handshake belongs to.
type handshaking struct {
	net.Conn
	c *conn
}

// choose settles the instance of a connection and returns the configuration for
// its clients.
func (s *server) choose(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	c := hello.Conn.(*handshaking).c
	if c.instance == "" {
		ctx, cancel := context.WithTimeout(hello.Context(), s.HandshakeTimeout)
		defer cancel()
		var err error
		if c.instance, err = s.kms.Route(ctx, hello.ServerName); err != nil {
			return nil, err
		}
	}
	if config, ok := s.configs.Load(c.instance); ok {
		return config.(*tls.Config), nil
	}
	instance := c.instance
	config := pki.KMIPServer(s.Credentials, s.now, func(cert *x509.Certificate) error { return s.admit(instance, cert) })
	known, _ := s.configs.LoadOrStore(instance, config)
	return known.(*tls.Config), nil
}

// admit pins: it is asked inside the handshake. Whose certificates belong to an
// instance that is locked cannot be known; each of their messages is answered
// with that.
func (s *server) admit(instance string, cert *x509.Certificate) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.HandshakeTimeout)
	defer cancel()
	err := s.kms.Admit(ctx, instance, cert)
	if errors.Is(err, kms.ErrInstanceLocked) {
		return nil
	}
	return err
}

// retryListen is how often a port is tried again that could not be had.
const retryListen = 5 * time.Second

// servePorts listens on the ports that instances have of their own, beside the
// shared one at the same address, as they come and go, until ctx ends.
func (s *server) servePorts(ctx context.Context, shared net.Addr) {
	host, _, err := net.SplitHostPort(shared.String())
	if err != nil {
		return // not TCP: there are no ports
	}
	type open struct {
		instance string
		stop     context.CancelFunc
		ended    chan struct{}
	}
	ports := map[int]open{}
	s.kms.FollowPorts(ctx, func(wanted map[int]string) {
		for port, o := range ports {
			if wanted[port] != o.instance {
				o.stop()
				<-o.ended
				delete(ports, port)
			}
		}
		for port, instance := range wanted {
			if _, ok := ports[port]; ok {
				continue
			}
			run, stop := context.WithCancel(ctx)
			o := open{instance, stop, make(chan struct{})}
			ports[port] = o
			go func() {
				defer close(o.ended)
				s.servePort(run, net.JoinHostPort(host, strconv.Itoa(port)), instance)
			}()
		}
	})
	for _, o := range ports {
		o.stop()
		<-o.ended
	}
}

// servePort serves one instance's port, waiting for it if another program has
// it.
func (s *server) servePort(ctx context.Context, addr, instance string) {
	for told := false; ; told = true {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		if err == nil {
			s.log.Info("kmip: instance has its own port", "instance", instance, "address", addr)
			err = s.accept(ctx, l, instance)
		}
		if ctx.Err() != nil {
			return
		}
		if !told {
			s.log.Error("kmip: an instance's own port cannot be served; it is tried again", "instance", instance, "address", addr, "error", fmt.Sprint(err))
		}
		select {
		case <-time.After(retryListen):
		case <-ctx.Done():
			return
		}
	}
}
