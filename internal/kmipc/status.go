package kmipc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ovh/kmip-go"
)

// A Status is how one server does (K13).
type Status struct {
	Server, Address string
	Reachable       bool          // false only after two failures in a row (K2)
	Err             error         // of the latest try; may be set while Reachable
	Latency         time.Duration // to connect, handshake and agree on a version
	Version         string        // of KMIP, as in "1.4"
	Vendor          string        // the server's own words
	Certificate     *x509.Certificate
	ClientExpires   time.Time // when our own certificate there ends
}

// Thumbprint is the SHA-256 of the certificate that the server showed, in
// vSphere's form; empty if it showed none.
func (s Status) Thumbprint() string {
	if s.Certificate == nil {
		return ""
	}
	return thumbprint(s.Certificate)
}

// Status connects afresh, whatever connections are kept, as vCenter's health
// check does. A first failure is tried once more at once.
func (s *Server) Status(ctx context.Context) Status {
	st := Status{Server: s.endpoint.Name, Address: s.endpoint.Address, ClientExpires: s.clientExpires()}
	for range alarmAfter {
		if st.Err = s.probe(ctx, &st); st.Err == nil || ctx.Err() != nil {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Reachable = s.failures < alarmAfter
	return st
}

func (s *Server) probe(ctx context.Context, st *Status) error {
	begin := time.Now()
	c, err := s.dial(ctx)
	var unconfirmed *CertificateError
	if errors.As(err, &unconfirmed) {
		st.Certificate = unconfirmed.Certificate
	}
	if err != nil {
		return s.asError(ctx, kmip.OperationDiscoverVersions, err, false)
	}
	st.Latency = time.Since(begin)
	st.Version = fmt.Sprintf("%d.%d", c.version.ProtocolVersionMajor, c.version.ProtocolVersionMinor)
	st.Certificate = c.tls.ConnectionState().PeerCertificates[0]
	s.worked()
	s.keep(c)
	// What a server is called is no matter of health: some refuse to tell.
	if info, err := s.Query(ctx); err == nil {
		st.Vendor = info.Vendor
	}
	return nil
}

func (s *Server) clientExpires() time.Time {
	leaf := s.cfg.Certificate.Leaf
	if leaf == nil {
		leaf, _ = x509.ParseCertificate(s.cfg.Certificate.Certificate[0])
	}
	if leaf == nil {
		return time.Time{}
	}
	return leaf.NotAfter
}

// FetchServerCertificate asks a server for its certificate, for an
// administrator to compare and confirm (K13). It proves nothing of the server.
// The thumbprint is the leaf's, SHA-256 in vSphere's form. The server need not
// know us: that it refuses us afterwards does not matter.
func FetchServerCertificate(ctx context.Context, address string) (chain []*x509.Certificate, thumb string, err error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, "", fmt.Errorf("kmipc: address %q is not host:port: %w", address, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, "", fmt.Errorf("kmipc: fetching the certificate of %s: %w: %w", address, ErrUnreachable, err)
	}
	defer raw.Close()
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // a person will verify
		VerifyConnection: func(s tls.ConnectionState) error {
			chain = s.PeerCertificates
			return nil
		},
	}
	if net.ParseIP(host) == nil {
		cfg.ServerName = host
	}
	err = tls.Client(raw, cfg).HandshakeContext(ctx)
	if len(chain) == 0 {
		return nil, "", fmt.Errorf("kmipc: %s does not complete a TLS handshake; is it the KMIP port?: %w: %w", address, ErrUnreachable, err)
	}
	return chain, thumbprint(chain[0]), nil
}

// printable replaces what could corrupt a log or a screen, and cuts what is
// endless.
func printable(s string) string {
	if len(s) > maxID {
		s = s[:maxID]
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "�")
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '�'
	}, s)
}
