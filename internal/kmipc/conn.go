package kmipc

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// versions that we speak, best first. 1.0 lacks DiscoverVersions.
func versions() []kmip.ProtocolVersion {
	return []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1}
}

// A conn is one connection, used by one request at a time.
type conn struct {
	raw     net.Conn
	tls     *tls.Conn
	version kmip.ProtocolVersion
	idle    time.Time // since when it is unused
	spoiled bool      // not to be kept
}

// A CertificateError has the certificate that a server shows and nobody
// confirmed.
type CertificateError struct {
	Certificate *x509.Certificate
}

func (e *CertificateError) Error() string {
	return fmt.Sprintf("its thumbprint is %s; compare it with the server's own, then confirm it", thumbprint(e.Certificate))
}

// dial connects, checks the pin, and agrees on a version. That first exchange
// also shows whether the server takes our certificate, which under TLS 1.3 the
// handshake does not.
func (s *Server) dial(ctx context.Context) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	raw, err := s.cfg.Dial(ctx, "tcp", s.endpoint.Address)
	if err != nil {
		return nil, err
	}
	c := &conn{raw: raw, tls: tls.Client(raw, s.tlsConfig())}
	if err := c.tls.HandshakeContext(ctx); err != nil {
		c.abort()
		return nil, err
	}
	if c.version, err = c.negotiate(ctx); err != nil {
		c.abort()
		return nil, err
	}
	return c, nil
}

func (s *Server) tlsConfig() *tls.Config {
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // trust is the pin, checked by VerifyConnection
		// Presented whatever CAs the server names: a self-signed one is never among them.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &s.cfg.Certificate, nil },
		VerifyConnection: func(state tls.ConnectionState) error {
			leaf := state.PeerCertificates[0]
			sum := sha256.Sum256(leaf.Raw)
			for _, pin := range s.endpoint.Pins {
				if sum == pin {
					return nil
				}
			}
			return &CertificateError{leaf}
		},
	}
	if host, _, err := net.SplitHostPort(s.endpoint.Address); err == nil && net.ParseIP(host) == nil {
		cfg.ServerName = host // for a server that holds many instances
	}
	return cfg
}

// negotiate picks the best common version, whatever order the server lists
// them in. It asks in version 1.1, as vCenter does, and then in 1.4 for a server
// that knows nothing older.
func (c *conn) negotiate(ctx context.Context) (kmip.ProtocolVersion, error) {
	var resp kmip.OperationPayload
	var err error
	for _, c.version = range []kmip.ProtocolVersion{kmip.V1_1, kmip.V1_4} {
		resp, err = c.exchange(ctx, &payloads.DiscoverVersionsRequestPayload{ProtocolVersion: versions()})
		var refused *ResultError
		if !errors.As(err, &refused) || refused.kind() == ErrRefused {
			break
		}
	}
	if err != nil {
		return kmip.ProtocolVersion{}, err
	}
	common, err := inCommon(resp)
	if err != nil {
		return kmip.ProtocolVersion{}, err
	}
	return common[0], nil
}

// inCommon lists the versions that we and the server speak, the best first.
func inCommon(resp kmip.OperationPayload) (common []kmip.ProtocolVersion, err error) {
	discovered, ok := resp.(*payloads.DiscoverVersionsResponsePayload)
	if !ok {
		return nil, malformed("no list of versions")
	}
	for _, v := range versions() {
		if slices.Contains(discovered.ProtocolVersion, v) {
			common = append(common, v)
		}
	}
	if len(common) == 0 {
		return nil, malformed("it speaks none of KMIP 1.1 to 1.4")
	}
	return common, nil
}

// exchange sends one request and reads its answer, until ctx ends. A failure
// that the server reports is a *ResultError and leaves the connection usable;
// after any other error it is not.
func (c *conn) exchange(ctx context.Context, req kmip.OperationPayload) (kmip.OperationPayload, error) {
	// No TimeStamp: vCenter sends none, and clocks may differ.
	msg := ttlv.MarshalTTLV(&kmip.RequestMessage{
		Header:    kmip.RequestHeader{ProtocolVersion: c.version, BatchCount: 1},
		BatchItem: []kmip.RequestBatchItem{{Operation: req.Operation(), RequestPayload: req}},
	})
	resp, err := c.send(ctx, msg, maxMessage)
	if err != nil {
		return nil, err
	}
	return payload(resp, req.Operation())
}

// send sends an encoded message and reads its answer of at most limit bytes,
// until ctx ends.
func (c *conn) send(ctx context.Context, msg []byte, limit int) (*kmip.ResponseMessage, error) {
	deadline, _ := ctx.Deadline() // zero: none
	if err := c.raw.SetDeadline(deadline); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.raw.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() { // the function may yet run, under the next request
			c.spoiled = true
		}
	}()
	if _, err := c.tls.Write(msg); err != nil {
		if _, rerr := readMessage(c.tls, limit); refusedByTLS(rerr) { // the alert that came before the reset
			err = rerr
		}
		return nil, err
	}
	answer, err := readMessage(c.tls, limit)
	if err != nil {
		return nil, err
	}
	defer clear(answer)
	return decode(answer)
}

// payload checks that a response answers the operation, and takes its payload.
func payload(resp *kmip.ResponseMessage, op kmip.Operation) (kmip.OperationPayload, error) {
	if len(resp.BatchItem) != 1 || resp.Header.BatchCount != 1 {
		return nil, malformed("%d items in answer to one", len(resp.BatchItem))
	}
	item := &resp.BatchItem[0]
	switch {
	case item.ResultStatus == kmip.ResultStatusOperationFailed:
		return nil, resultError(item) // some servers leave out the operation here
	case item.Operation != op:
		return nil, malformed("it answers %s, not %s", ttlv.EnumStr(item.Operation), ttlv.EnumStr(op))
	case item.ResultStatus != kmip.ResultStatusSuccess:
		return nil, malformed("result status %s, which was not asked for", ttlv.EnumStr(item.ResultStatus))
	case item.ResponsePayload == nil && op == kmip.OperationDiscoverVersions:
		return &payloads.DiscoverVersionsResponsePayload{}, nil
	case item.ResponsePayload == nil:
		return nil, malformed("success without a payload")
	}
	return item.ResponsePayload, nil
}

// dead looks, without waiting, whether the server has closed an idle
// connection, or sent what nobody asked for.
func (c *conn) dead() bool {
	sc, ok := c.raw.(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	alive := false
	err = rc.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		alive = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err != nil || !alive
}

func (c *conn) close() { c.tls.Close() }

// abort closes without the farewell that a broken connection cannot carry.
func (c *conn) abort() { c.raw.Close() }

// refusedByTLS tells whether err is an alert from the server that concerns our
// certificate.
func refusedByTLS(err error) bool {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return false
	}
	text := op.Err.Error()
	return strings.Contains(text, "certificate") || strings.Contains(text, "access denied")
}

func thumbprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return strings.ReplaceAll(strings.ToUpper(fmt.Sprintf("% x", sum[:])), " ", ":")
}
