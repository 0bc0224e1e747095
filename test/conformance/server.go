package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/pki"
	"mortise/test/kmsproc"
)

// server is a KMIP server and the connection to it.
type server struct {
	address string
	tls     *tls.Config
	conn    *tls.Conn
	proc    *kmsproc.Server // nil: somebody else's
	dir     string
}

const wait = 30 * time.Second

// openServer connects to o's server, or starts one.
func openServer(ctx context.Context, o options) (*server, error) {
	if o.address == "" {
		return startServer(ctx, o.binary)
	}
	pair, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return nil, err
	}
	ca, err := pki.LoadCertificates(o.ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range ca {
		pool.AddCert(c)
	}
	host, _, err := net.SplitHostPort(o.address)
	if err != nil {
		return nil, err
	}
	return &server{address: o.address, tls: &tls.Config{RootCAs: pool, ServerName: host, Certificates: []tls.Certificate{pair}}}, nil
}

// startServer runs a key server in a folder of its own, as an administrator
// would, and lets one client in that may do everything.
func startServer(ctx context.Context, binary string) (s *server, err error) {
	dir, err := os.MkdirTemp("", "mtsc")
	if err != nil {
		return nil, err
	}
	s = &server{dir: dir}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	proc, err := kmsproc.New(binary, dir, "")
	if err != nil {
		return nil, err
	}
	if err := proc.Start(ctx); err != nil {
		return nil, err
	}
	s.proc = proc
	client, err := proc.Client(ctx, "conformance", "administrator")
	if err != nil {
		return nil, err
	}
	s.address, s.tls = proc.Address, proc.TLS(client)
	return s, nil
}

func (s *server) close() {
	if s.conn != nil {
		s.conn.Close()
	}
	if s.proc != nil {
		if err := s.proc.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "conformance:", err)
		}
	}
	if s.dir != "" {
		os.RemoveAll(s.dir)
	}
}

// send writes a request and reads its response. A server may close the
// connection after one that it refuses as a whole; the next request has a new
// one.
func (s *server) send(request []byte) ([]byte, error) {
	if s.conn == nil {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: wait}, "tcp", s.address, s.tls)
		if err != nil {
			return nil, err
		}
		s.conn = c
	}
	answer, err := kmsproc.RoundTrip(s.conn, request)
	if err != nil {
		s.conn.Close()
		s.conn = nil
		return nil, fmt.Errorf("no answer: %w", err)
	}
	return answer, nil
}

// clear destroys everything that Locate finds, as a client may, so that a case
// begins as if on an empty server.
func (s *server) clear(context.Context) error {
	found, err := s.ask(4, item(kmip.OperationLocate))
	if err != nil {
		return fmt.Errorf("clearing: %w", err)
	}
	for _, id := range found.kid(kmip.TagResponsePayload).all(kmip.TagUniqueIdentifier) {
		name := &node{tag: kmip.TagUniqueIdentifier, typ: ttlv.TypeTextString, value: id.value}
		reason := structure(kmip.TagRevocationReason, enumeration(kmip.TagRevocationReasonCode, uint32(kmip.RevocationReasonCodeCessationOfOperation)))
		for _, it := range []*node{
			item(kmip.OperationRecover, name), item(kmip.OperationRevoke, name, reason), item(kmip.OperationDestroy, name),
		} {
			if _, err := s.ask(4, it); err != nil {
				return fmt.Errorf("clearing: %w", err)
			}
		}
	}
	return nil
}

// ask sends one operation of KMIP 1.minor and returns the batch item of the
// answer.
func (s *server) ask(minor uint32, it *node) (*node, error) {
	integer := func(tag int, n uint32) *node {
		return &node{tag: tag, typ: ttlv.TypeInteger, value: binary.BigEndian.AppendUint32(nil, n)}
	}
	answer, err := s.send(encode(structure(kmip.TagRequestMessage,
		structure(kmip.TagRequestHeader,
			structure(kmip.TagProtocolVersion, integer(kmip.TagProtocolVersionMajor, 1), integer(kmip.TagProtocolVersionMinor, minor)),
			integer(kmip.TagBatchCount, 1)),
		it)))
	if err != nil {
		return nil, err
	}
	m, err := decode(answer)
	if err != nil {
		return nil, err
	}
	if it := m.kid(kmip.TagBatchItem); it != nil {
		return it, nil
	}
	return nil, errors.New("the answer has no batch item")
}

func structure(tag int, kids ...*node) *node {
	return &node{tag: tag, typ: ttlv.TypeStructure, kids: kids}
}

func enumeration(tag int, v uint32) *node {
	return &node{tag: tag, typ: ttlv.TypeEnumeration, value: binary.BigEndian.AppendUint32(nil, v)}
}

func item(op kmip.Operation, payload ...*node) *node {
	return structure(kmip.TagBatchItem, enumeration(kmip.TagOperation, uint32(op)), structure(kmip.TagRequestPayload, payload...))
}
