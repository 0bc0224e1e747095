package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/pki"
)

// server is a KMIP server and the connection to it.
type server struct {
	address string
	tls     *tls.Config
	conn    *tls.Conn
	cmd     *exec.Cmd // nil: somebody else's
	log     *bytes.Buffer
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

// startServer runs `mortise kms serve` in a folder of its own, as an
// administrator would, and lets one client in.
func startServer(ctx context.Context, binary string) (s *server, err error) {
	dir, err := os.MkdirTemp("", "conformance-")
	if err != nil {
		return nil, err
	}
	s = &server{log: &bytes.Buffer{}, dir: dir}
	defer func() {
		if err != nil {
			s.close()
			err = fmt.Errorf("%w\n%s", err, s.log)
		}
	}()
	in := func(name string) string { return filepath.Join(dir, name) }
	key, err := pki.GenerateKey()
	if err != nil {
		return s, err
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Server: true, Life: 24 * time.Hour, Hosts: []string{"127.0.0.1"}}, "kms", time.Now())
	if err != nil {
		return s, err
	}
	if err := pki.SaveKeyPair(in("kms.pem"), []*x509.Certificate{cert}, key); err != nil {
		return s, err
	}
	mine, myKey, err := pki.NewKMIPClient(24*time.Hour, time.Now())
	if err != nil {
		return s, err
	}
	if err := errors.Join(os.WriteFile(in("passphrase"), []byte("passphrase of the conformance run\n"), 0o600), pki.SaveCertificates(in("client.pem"), mine)); err != nil {
		return s, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return s, err
	}
	s.address = l.Addr().String()
	l.Close()
	if binary, err = filepath.Abs(binary); err != nil {
		return s, err
	}
	s.cmd = exec.Command(binary, "kms", "serve", "--state-dir", in("state"), "--listen", s.address, "--admin-socket", in("kms.sock"), "--admin-listen", "",
		"--passphrase-file", in("passphrase"), "--tls-cert", in("kms.pem"), "--tls-key", in("kms.pem"))
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		return s, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	pair, err := pki.TLSCertificate([]*x509.Certificate{mine}, myKey)
	if err != nil {
		return s, err
	}
	s.tls = &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", Certificates: []tls.Certificate{pair}}
	for deadline := time.Now().Add(wait); ; time.Sleep(50 * time.Millisecond) {
		add := exec.CommandContext(ctx, binary, "kms", "client", "add", in("client.pem"), "--name", "conformance", "--role", "administrator", "--admin-socket", in("kms.sock"))
		out, err := add.CombinedOutput()
		if err == nil {
			return s, nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return s, fmt.Errorf("the key server lets no client in: %w\n%s", err, out)
		}
	}
}

func (s *server) close() {
	if s.conn != nil {
		s.conn.Close()
	}
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(os.Interrupt)
		force := time.AfterFunc(wait, func() { _ = s.cmd.Process.Kill() })
		_ = s.cmd.Wait()
		force.Stop()
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
	answer, err := s.roundTrip(request)
	if err != nil {
		s.conn.Close()
		s.conn = nil
		return nil, fmt.Errorf("no answer: %w", err)
	}
	return answer, nil
}

func (s *server) roundTrip(request []byte) ([]byte, error) {
	if err := s.conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	if _, err := s.conn.Write(request); err != nil {
		return nil, err
	}
	answer := make([]byte, 8)
	if _, err := io.ReadFull(s.conn, answer); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(answer[4:])
	if length > 64<<20 {
		return nil, fmt.Errorf("the answer says it has %d bytes", length)
	}
	answer = append(answer, make([]byte, length)...)
	_, err := io.ReadFull(s.conn, answer[8:])
	return answer, err
}

// clear destroys everything that Locate finds, as a client may, so that a case
// begins as if on an empty server.
func (s *server) clear(context.Context) error {
	found, err := s.ask(item(kmip.OperationLocate))
	if err != nil {
		return fmt.Errorf("clearing: %w", err)
	}
	for _, id := range found.kid(kmip.TagResponsePayload).all(kmip.TagUniqueIdentifier) {
		name := &node{tag: kmip.TagUniqueIdentifier, typ: ttlv.TypeTextString, value: id.value}
		reason := structure(kmip.TagRevocationReason, enumeration(kmip.TagRevocationReasonCode, uint32(kmip.RevocationReasonCodeCessationOfOperation)))
		for _, it := range []*node{
			item(kmip.OperationRecover, name), item(kmip.OperationRevoke, name, reason), item(kmip.OperationDestroy, name),
		} {
			if _, err := s.ask(it); err != nil {
				return fmt.Errorf("clearing: %w", err)
			}
		}
	}
	return nil
}

// ask sends one operation of KMIP 1.4 and returns the batch item of the answer.
func (s *server) ask(it *node) (*node, error) {
	integer := func(tag int, n uint32) *node {
		return &node{tag: tag, typ: ttlv.TypeInteger, value: binary.BigEndian.AppendUint32(nil, n)}
	}
	answer, err := s.send(encode(structure(kmip.TagRequestMessage,
		structure(kmip.TagRequestHeader,
			structure(kmip.TagProtocolVersion, integer(kmip.TagProtocolVersionMajor, 1), integer(kmip.TagProtocolVersionMinor, 4)),
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
