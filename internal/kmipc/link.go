package kmipc

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// maxLinkMessage bounds an answer on a Link, in bytes: a server that cannot
// page a Locate lists all its keys at once.
const maxLinkMessage = 64 << 20

// A LinkConfig says how to reach one server with messages of one's own making:
// a certification plays another client's exact traffic, and a migration asks
// for whatever a server has. Key providers use a [Client].
type LinkConfig struct {
	Address     string // host:port
	Certificate tls.Certificate
	// Trust says whether to go on with the chain that the server shows; nil
	// takes any.
	Trust func(chain []*x509.Certificate) error
	// MaxTLS bounds the version of TLS, 0 for none. At least 1.2 is spoken.
	MaxTLS uint16
	// Timeout is for a handshake, and for each exchange: 30 s if 0.
	Timeout time.Duration
}

// TrustPin trusts the one certificate whose SHA-256 an administrator gave.
func TrustPin(pin [sha256.Size]byte) func([]*x509.Certificate) error {
	return func(chain []*x509.Certificate) error {
		if sha256.Sum256(chain[0].Raw) != pin {
			return &CertificateError{chain[0]}
		}
		return nil
	}
}

// TrustCA trusts what cas have issued, for the host of the address.
func TrustCA(cas []*x509.Certificate, address string) func([]*x509.Certificate) error {
	roots := x509.NewCertPool()
	for _, c := range cas {
		roots.AddCert(c)
	}
	host, _, _ := net.SplitHostPort(address)
	return func(chain []*x509.Certificate) error {
		between := x509.NewCertPool()
		for _, c := range chain[1:] {
			between.AddCert(c)
		}
		_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: host})
		return err
	}
}

// A Link is one connection to a KMIP server. It is for one goroutine.
type Link struct {
	c       *conn
	timeout time.Duration
}

// DialLink connects and shakes hands. Under TLS 1.3 a server that refuses the
// client certificate says so only in answer to the first message.
func DialLink(ctx context.Context, cfg LinkConfig) (*Link, error) {
	setDefault(&cfg.Timeout, 30*time.Second)
	ctx, cancel := context.WithTimeout(ctx, cfg.Timeout)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("kmipc: %w: %w", ErrUnreachable, err)
	}
	t := &tls.Config{
		MinVersion:           tls.VersionTLS12,
		MaxVersion:           cfg.MaxTLS,
		InsecureSkipVerify:   true, // trust is cfg.Trust's, checked by VerifyConnection
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cfg.Certificate, nil },
		VerifyConnection: func(state tls.ConnectionState) error {
			if cfg.Trust == nil {
				return nil
			}
			return cfg.Trust(state.PeerCertificates)
		},
	}
	if host, _, err := net.SplitHostPort(cfg.Address); err == nil && net.ParseIP(host) == nil {
		t.ServerName = host
	}
	c := &conn{raw: raw, tls: tls.Client(raw, t)}
	if err := c.tls.HandshakeContext(ctx); err != nil {
		c.abort()
		return nil, linkError(err)
	}
	return &Link{c: c, timeout: cfg.Timeout}, nil
}

// linkError sorts what broke a connection.
func linkError(err error) error {
	var cert *CertificateError
	var protocol *protocolError
	kind := ErrUnreachable
	switch {
	case errors.As(err, &cert):
		kind = ErrCertificateChanged
	case refusedByTLS(err):
		kind = ErrRefused
	case errors.As(err, &protocol):
		kind = ErrProtocol
	}
	return fmt.Errorf("kmipc: %w: %w", kind, err)
}

// TLS tells what the handshake agreed on, and the server's certificates.
func (l *Link) TLS() tls.ConnectionState { return l.c.tls.ConnectionState() }

// Send sends one message and reads its answer as it is, failures that it
// reports included. An error means that the connection is of no more use, and
// is an ErrUnreachable, ErrRefused or ErrProtocol.
func (l *Link) Send(ctx context.Context, req *kmip.RequestMessage) (*kmip.ResponseMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	msg := ttlv.MarshalTTLV(req)
	defer clear(msg)
	resp, err := l.c.send(ctx, msg, maxLinkMessage)
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, linkError(err)
	}
	return resp, nil
}

// Ask sends one operation in the given version and returns its payload. A
// failure that the server reports wraps a [ResultError] and one of the kinds
// above; the connection stays good.
func (l *Link) Ask(ctx context.Context, v kmip.ProtocolVersion, req kmip.OperationPayload) (kmip.OperationPayload, error) {
	resp, err := l.Send(ctx, &kmip.RequestMessage{
		Header:    kmip.RequestHeader{ProtocolVersion: v, BatchCount: 1},
		BatchItem: []kmip.RequestBatchItem{{Operation: req.Operation(), RequestPayload: req}},
	})
	if err != nil {
		return nil, err
	}
	p, err := payload(resp, req.Operation())
	var result *ResultError
	switch {
	case errors.As(err, &result):
		return nil, fmt.Errorf("kmipc: %s: %w: %w", ttlv.EnumStr(req.Operation()), result.kind(), result)
	case err != nil:
		return nil, fmt.Errorf("kmipc: %s: %w: %w", ttlv.EnumStr(req.Operation()), ErrProtocol, err)
	}
	return p, nil
}

// Versions asks which of KMIP 1.1 to 1.4 the server speaks, best first.
func (l *Link) Versions(ctx context.Context) ([]kmip.ProtocolVersion, error) {
	var resp kmip.OperationPayload
	var err error
	for _, v := range []kmip.ProtocolVersion{kmip.V1_1, kmip.V1_4} { // 1.4 for a server that knows nothing older
		resp, err = l.Ask(ctx, v, &payloads.DiscoverVersionsRequestPayload{})
		var refused *ResultError
		if !errors.As(err, &refused) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	common, err := inCommon(resp)
	if err != nil {
		return nil, fmt.Errorf("kmipc: %w: %w", ErrProtocol, err)
	}
	return common, nil
}

// Close says farewell, as far as the connection can still carry it.
func (l *Link) Close() {
	_ = l.c.raw.SetDeadline(time.Now().Add(time.Second))
	l.c.close()
}

// ParseAddress reads "kmip://HOST:PORT", "HOST:PORT" or "HOST", whose port is
// KMIP's own, 5696.
func ParseAddress(text string) (string, error) {
	bad := fmt.Errorf("kmipc: %.100q is no address of a KMIP server: e.g. kmip://kms.example.com:5696", text)
	rest := strings.TrimSuffix(strings.TrimPrefix(text, "kmip://"), "/")
	if rest == "" || strings.ContainsAny(rest, "/ \t\r\n@?#") {
		return "", bad
	}
	if host, port, err := net.SplitHostPort(rest); err == nil {
		if n, err := net.LookupPort("tcp", port); host == "" || err != nil || n == 0 {
			return "", bad
		}
		return rest, nil
	}
	host := strings.Trim(rest, "[]")
	if host == "" || strings.Contains(host, ":") && net.ParseIP(host) == nil {
		return "", bad
	}
	return net.JoinHostPort(host, "5696"), nil
}

// ThumbprintError is the thumbprint that a [CertificateError] in err names,
// in hexadecimal.
func ThumbprintError(err error) (string, bool) {
	var cert *CertificateError
	if !errors.As(err, &cert) {
		return "", false
	}
	sum := sha256.Sum256(cert.Certificate.Raw)
	return hex.EncodeToString(sum[:]), true
}
