package kmipd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// bed is a KMS behind a listener, and one client that it knows.
type bed struct {
	*kms.KMS
	addr   string
	server *x509.Certificate
	client tls.Certificate
	log    *syncBuffer
	stop   func() error // drains the listener
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

func openKMS(t testing.TB) *kms.KMS {
	t.Helper()
	dir := t.TempDir()
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	root, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kms.Open(t.Context(), s, kms.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close(); s.Close(); root.Close() })
	return k
}

// serve starts a listener with o's limits over a fresh KMS.
func serve(t testing.TB, o Options) *bed {
	t.Helper()
	b := serveOver(t, openKMS(t), o)
	b.client = newClient(t, time.Now(), 24*time.Hour)
	letIn(t, b.KMS, b.client)
	return b
}

// letIn pins a client's certificate.
func letIn(t testing.TB, k *kms.KMS, client tls.Certificate) {
	t.Helper()
	if _, err := k.AddClient(t.Context(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: client.Leaf, Role: kms.RoleAdministrator}); err != nil {
		t.Fatal(err)
	}
}

// serveOver starts a listener with o's limits over k.
func serveOver(t testing.TB, k *kms.KMS, o Options) *bed {
	t.Helper()
	b := &bed{KMS: k, log: &syncBuffer{}}
	if o.Credentials == nil {
		key, err := pki.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		b.server, err = pki.SelfSigned(key, pki.Grant{Server: true, Life: 24 * time.Hour, Hosts: []string{"127.0.0.1", "localhost"}}, "kms", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if o.Credentials, err = pki.NewCredentials([]*x509.Certificate{b.server}, key); err != nil {
			t.Fatal(err)
		}
	}
	o.Logger = slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, b.KMS, o) }()
	b.stop = sync.OnceValue(func() error { cancel(); return <-served })
	t.Cleanup(func() {
		if err := b.stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		if strings.Contains(b.log.String(), "panic") {
			t.Errorf("the server panicked: %s", b.log)
		}
	})
	return b
}

// newClient makes a self-signed certificate without extended key usage, as
// vCenter's may be.
func newClient(t testing.TB, from time.Time, life time.Duration) tls.Certificate {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Life: life}, "kmipClient20161127094708", from)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (b *bed) config(client tls.Certificate, version uint16) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(b.server)
	return &tls.Config{RootCAs: pool, ServerName: "localhost", MinVersion: version, MaxVersion: version, Certificates: []tls.Certificate{client}}
}

// dial opens a connection as the known client.
func (b *bed) dial(t testing.TB) net.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", b.addr, b.config(b.client, tls.VersionTLS13))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

func receive(c net.Conn) (kmip.ResponseMessage, []byte, error) {
	var m kmip.ResponseMessage
	raw := make([]byte, 8)
	if _, err := io.ReadFull(c, raw); err != nil {
		return m, nil, err
	}
	raw = append(raw, make([]byte, binary.BigEndian.Uint32(raw[4:]))...)
	if _, err := io.ReadFull(c, raw[8:]); err != nil {
		return m, nil, err
	}
	if err := check(raw, 0); err != nil {
		return m, raw, fmt.Errorf("the response is no TTLV: %w", err)
	}
	return m, raw, ttlv.UnmarshalTTLV(raw, &m)
}

func roundTrip(t testing.TB, c net.Conn, req kmip.RequestMessage) kmip.ResponseMessage {
	t.Helper()
	if _, err := c.Write(ttlv.MarshalTTLV(&req)); err != nil {
		t.Fatal(err)
	}
	m, _, err := receive(c)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// request is what a client of version 1.minor sends.
func request(minor int32, list ...kmip.OperationPayload) kmip.RequestMessage {
	return kmip.NewRequestMessage(kmip.ProtocolVersion{ProtocolVersionMajor: 1, ProtocolVersionMinor: minor}, list...)
}

// do sends one operation and wants it to succeed.
func do[Answer kmip.OperationPayload](t testing.TB, c net.Conn, minor int32, p kmip.OperationPayload) Answer {
	t.Helper()
	m := roundTrip(t, c, request(minor, p))
	if len(m.BatchItem) != 1 || m.BatchItem[0].Err() != nil {
		t.Fatalf("%T: %+v", p, m.BatchItem)
	}
	return m.BatchItem[0].ResponsePayload.(Answer)
}

// refused sends one operation and returns the reason of its refusal.
func refused(t testing.TB, c net.Conn, minor int32, p kmip.OperationPayload) kmip.ResultReason {
	t.Helper()
	m := roundTrip(t, c, request(minor, p))
	if len(m.BatchItem) != 1 || m.BatchItem[0].ResultStatus != kmip.ResultStatusOperationFailed {
		t.Fatalf("%T was not refused: %+v", p, m.BatchItem)
	}
	return m.BatchItem[0].ResultReason
}

func createAES(more ...kmip.Attribute) *payloads.CreateRequestPayload {
	return &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: append([]kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
	}, more...)}}
}

func named(name string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}}
}

func custom(name, value string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeName(name), AttributeValue: value}
}

func newKey(t testing.TB, c net.Conn, more ...kmip.Attribute) string {
	t.Helper()
	return do[*payloads.CreateResponsePayload](t, c, 4, createAES(more...)).UniqueIdentifier
}

func key(t testing.TB, g *payloads.GetResponsePayload) []byte {
	t.Helper()
	b, err := g.SymmetricKey()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
