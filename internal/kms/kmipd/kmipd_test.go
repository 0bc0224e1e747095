package kmipd

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
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

func TestVersions(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	got := do[*payloads.DiscoverVersionsResponsePayload](t, c, 1, &payloads.DiscoverVersionsRequestPayload{}).ProtocolVersion
	if want := []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1, kmip.V1_0}; !slices.Equal(got, want) {
		t.Errorf("versions %v, want %v", got, want)
	}
	got = do[*payloads.DiscoverVersionsResponsePayload](t, c, 4, &payloads.DiscoverVersionsRequestPayload{ProtocolVersion: []kmip.ProtocolVersion{kmip.V2_0, kmip.V1_1, kmip.V1_2}}).ProtocolVersion
	if !slices.Equal(got, []kmip.ProtocolVersion{kmip.V1_2, kmip.V1_1}) {
		t.Errorf("versions in common: %v", got)
	}
	if r := refused(t, c, 0, &payloads.DiscoverVersionsRequestPayload{}); r != kmip.ResultReasonOperationNotSupported {
		t.Errorf("DiscoverVersions in 1.0: %v", r)
	}
	for _, v := range []kmip.ProtocolVersion{{ProtocolVersionMajor: 9, ProtocolVersionMinor: 9}, {ProtocolVersionMajor: 1, ProtocolVersionMinor: 5}, {ProtocolVersionMajor: 1, ProtocolVersionMinor: -1}, {}} {
		c := b.dial(t)
		m := roundTrip(t, c, kmip.NewRequestMessage(v, &payloads.DiscoverVersionsRequestPayload{}))
		if len(m.BatchItem) != 1 || m.BatchItem[0].ResultReason != kmip.ResultReasonInvalidMessage || m.Header.ProtocolVersion != kmip.V1_4 || m.BatchItem[0].Operation != 0 {
			t.Errorf("version %v: %+v", v, m)
		}
	}
	for minor := int32(0); minor <= 4; minor++ {
		q := do[*payloads.QueryResponsePayload](t, c, minor, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{
			kmip.QueryFunctionOperations, kmip.QueryFunctionObjects, kmip.QueryFunctionServerInformation, kmip.QueryFunctionCapabilities, kmip.QueryFunctionRNGs}})
		if q.VendorIdentification != "Mortise" || slices.Contains(q.Operations, kmip.OperationDiscoverVersions) != (minor >= 1) || (len(q.CapabilityInformation) == 1) != (minor >= 3) {
			t.Errorf("Query in 1.%d: %+v", minor, q)
		}
		for _, op := range q.Operations { // what Query lists, works: it is refused for its content only
			m := roundTrip(t, c, request(minor, kmip.NewUnknownPayload(op)))
			if m.BatchItem[0].ResultReason == kmip.ResultReasonOperationNotSupported {
				t.Errorf("Query in 1.%d lists %v, which is not there", minor, op)
			}
		}
		id := do[*payloads.CreateResponsePayload](t, c, minor, createAES(named(fmt.Sprint("n", minor)))).UniqueIdentifier
		if g := do[*payloads.GetResponsePayload](t, c, minor, &payloads.GetRequestPayload{UniqueIdentifier: id}); len(key(t, g)) != 32 {
			t.Errorf("Get in 1.%d: %+v", minor, g)
		}
		all := do[*payloads.GetAttributesResponsePayload](t, c, minor, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id})
		if len(all.Attribute) < 9 {
			t.Errorf("attributes in 1.%d: %+v", minor, all)
		}
		reason := refused4(t, c, minor, kmip.Attribute{AttributeName: kmip.AttributeNameComment, AttributeValue: "a"})
		if (reason == 0) != (minor == 4) {
			t.Errorf("Comment in 1.%d: %v", minor, reason)
		}
	}
}

// refused4 creates a key with an attribute and returns the reason of a refusal,
// 0 for none.
func refused4(t *testing.T, c net.Conn, minor int32, a kmip.Attribute) kmip.ResultReason {
	return roundTrip(t, c, request(minor, createAES(a))).BatchItem[0].ResultReason
}

func key(t testing.TB, g *payloads.GetResponsePayload) []byte {
	t.Helper()
	b, err := g.SymmetricKey()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestVCenter sends what vCenter 7.0.3 sends, message by message: KMIP 1.1, no
// time stamp, batch item ids "QLKC" and a counter, and for every action a new
// TCP and TLS connection that begins with an empty DiscoverVersions.
func TestVCenter(t *testing.T) {
	b := serve(t, Options{})
	counter := 0
	message := func(list ...kmip.OperationPayload) kmip.RequestMessage {
		m := kmip.RequestMessage{Header: kmip.RequestHeader{ProtocolVersion: kmip.V1_1, BatchCount: int32(len(list))}}
		for _, p := range list {
			counter++
			m.BatchItem = append(m.BatchItem, kmip.RequestBatchItem{Operation: p.Operation(), UniqueBatchItemID: fmt.Appendf(nil, "QLKC%d", counter), RequestPayload: p})
		}
		return m
	}
	send := func(t *testing.T, c net.Conn, list ...kmip.OperationPayload) []kmip.OperationPayload {
		t.Helper()
		req := message(list...)
		m := roundTrip(t, c, req)
		if m.Header.ProtocolVersion != kmip.V1_1 || int(m.Header.BatchCount) != len(list) || len(m.BatchItem) != len(list) {
			t.Fatalf("response header %+v with %d items", m.Header, len(m.BatchItem))
		}
		var answers []kmip.OperationPayload
		for i, it := range m.BatchItem {
			if it.Err() != nil || it.Operation != req.BatchItem[i].Operation || !bytes.Equal(it.UniqueBatchItemID, req.BatchItem[i].UniqueBatchItemID) {
				t.Fatalf("item %d: %+v, %v", i, it, it.Err())
			}
			answers = append(answers, it.ResponsePayload)
		}
		return answers
	}
	action := func(t *testing.T, list ...kmip.OperationPayload) []kmip.OperationPayload {
		t.Helper()
		c := b.dial(t)
		defer c.Close()
		send(t, c, &payloads.DiscoverVersionsRequestPayload{})
		return send(t, c, list...)
	}

	// Register the provider, then the health poll.
	if q := action(t, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}}); q[0].(*payloads.QueryResponsePayload).VendorIdentification == "" {
		t.Error("no server information")
	}
	b.dial(t).Close()
	poll := b.dial(t)
	send(t, poll, &payloads.DiscoverVersionsRequestPayload{})
	send(t, poll, &payloads.DiscoverVersionsRequestPayload{})
	poll.Close()

	tag := func(t *testing.T, id string, tags ...kmip.Attribute) {
		t.Helper()
		var adds []kmip.OperationPayload
		for _, a := range tags {
			got := action(t, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{a.AttributeName}})[0].(*payloads.GetAttributesResponsePayload)
			if got.UniqueIdentifier != id || len(got.Attribute) != 0 {
				t.Errorf("a missing attribute: %+v; want Success with nothing", got)
			}
			adds = append(adds, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: a})
		}
		action(t, adds...)
		for _, a := range tags {
			got := action(t, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{a.AttributeName}})[0].(*payloads.GetAttributesResponsePayload)
			if len(got.Attribute) != 1 || got.Attribute[0].AttributeValue.(ttlv.Value).Value != a.AttributeValue {
				t.Errorf("after tagging: %+v", got)
			}
		}
	}
	for _, tags := range [][]kmip.Attribute{
		{custom("x-Product_Version", "7.0.3 build-21477706"), custom("x-Vendor", "VMware, Inc."), custom("x-Product", "VMware vSphere")},
		{custom("x-Identifier", "host-1015"), custom("x-Component", "ESXi Server"), custom("x-Name", "esx1.example.com")},
	} {
		// No Name and no Activation Date.
		made := action(t, &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		}}})[0].(*payloads.CreateResponsePayload)
		id := made.UniqueIdentifier
		tag(t, id, tags...)

		fetched := action(t, &payloads.GetRequestPayload{UniqueIdentifier: id})[0].(*payloads.GetResponsePayload)
		block := fetched.Object.(*kmip.SymmetricKey).KeyBlock
		if len(key(t, fetched)) != 32 || block.KeyFormatType != kmip.KeyFormatTypeRaw || block.CryptographicAlgorithm != kmip.CryptographicAlgorithmAES || block.CryptographicLength != 256 {
			t.Errorf("key block %+v", block)
		}
		state := func() kmip.State {
			return action(t, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState}})[0].(*payloads.GetAttributesResponsePayload).Attribute[0].AttributeValue.(kmip.State)
		}
		if got := state(); got != kmip.StatePreActive {
			t.Errorf("state %v, want Pre-Active", got)
		}
		action(t, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
		if got := state(); got != kmip.StateActive {
			t.Errorf("state %v, want Active", got)
		}
		again := action(t, &payloads.GetRequestPayload{UniqueIdentifier: id})[0].(*payloads.GetResponsePayload)
		if !bytes.Equal(key(t, again), key(t, fetched)) {
			t.Error("the key is another one")
		}
	}
}

// TestHandshake: who may connect (S3).
func TestHandshake(t *testing.T) {
	b := serve(t, Options{HandshakeTimeout: time.Second})
	try := func(client tls.Certificate, version uint16) error {
		cfg := b.config(client, version)
		if client.Certificate == nil {
			cfg.Certificates = nil
		}
		c, err := tls.Dial("tcp", b.addr, cfg)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		req := request(1, &payloads.DiscoverVersionsRequestPayload{})
		c.Write(ttlv.MarshalTTLV(&req))
		_, _, err = receive(c) // in TLS 1.3 the refusal comes with the first read
		return err
	}
	expired := newClient(t, time.Now().Add(-48*time.Hour), 24*time.Hour)
	removed := newClient(t, time.Now(), time.Hour)
	if _, err := b.AddClient(t.Context(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: removed.Leaf}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.RemoveClient(t.Context(), kms.Actor{}, kms.DefaultInstance, pki.Thumbprint(removed.Leaf)); err != nil {
		t.Fatal(err)
	}
	stolen := b.client // the certificate is public; the key is not
	stolen.PrivateKey = newClient(t, time.Now(), time.Hour).PrivateKey.(crypto.Signer)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := try(b.client, version); err != nil {
			t.Errorf("TLS %x: the known client: %v", version, err)
		}
		for what, c := range map[string]tls.Certificate{
			"none": {}, "unknown": newClient(t, time.Now(), time.Hour), "expired": expired, "removed": removed, "stolen": stolen,
		} {
			if err := try(c, version); err == nil {
				t.Errorf("TLS %x: client certificate %s was taken", version, what)
			}
		}
	}
	if err := try(b.client, tls.VersionTLS11); err == nil {
		t.Error("TLS 1.1 was taken")
	}
	if log := b.log.String(); !strings.Contains(log, "mortise kms client add") || !strings.Contains(log, "expired") {
		t.Errorf("the log does not say why and what to do: %s", log)
	}

	// A handshake that never comes, and one that stops half way.
	for _, first := range []string{"", "\x16\x03\x01\x02\x00\x01"} {
		c, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, first)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		begin := time.Now()
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > 5*time.Second {
			t.Errorf("a handshake of %d bytes was waited for %v", len(first), time.Since(begin))
		}
	}
}

// TestRemovedInMidConnection: an open connection ends with its certificate.
func TestRemovedInMidConnection(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	id := newKey(t, c)
	if _, err := b.RemoveClient(t.Context(), kms.Actor{}, kms.DefaultInstance, pki.Thumbprint(b.client.Leaf)); err != nil {
		t.Fatal(err)
	}
	m := roundTrip(t, c, request(4, &payloads.GetRequestPayload{UniqueIdentifier: id}))
	if len(m.BatchItem) != 1 || m.BatchItem[0].ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("after removal: %+v", m)
	}
	if _, _, err := receive(c); !errors.Is(err, io.EOF) {
		t.Errorf("the connection goes on: %v", err)
	}
}

// TestLimits: slow and silent clients, too many connections.
func TestLimits(t *testing.T) {
	b := serve(t, Options{MaxConnections: 3, ReadTimeout: 300 * time.Millisecond, IdleTimeout: 1500 * time.Millisecond})
	req := request(1, &payloads.DiscoverVersionsRequestPayload{})
	bytesOf := ttlv.MarshalTTLV(&req)

	slow := b.dial(t)
	begin := time.Now()
	go func() {
		for _, x := range bytesOf {
			if _, err := slow.Write([]byte{x}); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	if _, _, err := receive(slow); err == nil || time.Since(begin) > 3*time.Second {
		t.Errorf("a request a byte at a time: %v after %v", err, time.Since(begin))
	}
	silent := b.dial(t)
	time.Sleep(700 * time.Millisecond) // longer than the read time, shorter than the idle time
	do[*payloads.DiscoverVersionsResponsePayload](t, silent, 1, &payloads.DiscoverVersionsRequestPayload{})
	begin = time.Now()
	if _, _, err := receive(silent); !errors.Is(err, io.EOF) || time.Since(begin) < time.Second {
		t.Errorf("a silent client: %v after %v", err, time.Since(begin))
	}
	time.Sleep(300 * time.Millisecond) // both are forgotten
	var open []net.Conn
	for range 3 {
		open = append(open, b.dial(t))
	}
	if c, err := tls.Dial("tcp", b.addr, b.config(b.client, tls.VersionTLS13)); err == nil {
		c.Close()
		t.Error("a fourth connection was taken")
	}
	open[0].Close()
	time.Sleep(300 * time.Millisecond)
	do[*payloads.DiscoverVersionsResponsePayload](t, b.dial(t), 1, &payloads.DiscoverVersionsRequestPayload{})
}

// TestDrain: Serve ends at once for idle connections, and after the request for
// the others.
func TestDrain(t *testing.T) {
	b := serve(t, Options{})
	for range 20 {
		b.dial(t)
	}
	busy := b.dial(t)
	var creates []kmip.OperationPayload
	for range 500 {
		creates = append(creates, createAES())
	}
	req := request(4, creates...)
	if _, err := busy.Write(ttlv.MarshalTTLV(&req)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	begin := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- b.stop() }()
	m, _, err := receive(busy)
	if err != nil || len(m.BatchItem) != 500 || m.BatchItem[499].Err() != nil {
		t.Errorf("the request under way: %d items, %v", len(m.BatchItem), err)
	}
	if err := <-stopped; err != nil || time.Since(begin) > 5*time.Second {
		t.Errorf("drained with %v after %v", err, time.Since(begin))
	}
	if c, err := net.Dial("tcp", b.addr); err == nil {
		c.Close()
		t.Error("the listener is still open")
	}
}

// depthBomb nests n structures in a request header.
func depthBomb(n int) []byte {
	var b []byte
	for range n {
		b = append([]byte{0x42, 0x00, 0x77, 1, 0, 0, 0, 0}, b...)
		binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	}
	return append(binary.BigEndian.AppendUint32([]byte{0x42, 0x00, 0x78, 1}, uint32(len(b))), b...)
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// badMessages are wrong as a whole.
func badMessages() map[string][]byte {
	good := request(1, &payloads.DiscoverVersionsRequestPayload{})
	wire := ttlv.MarshalTTLV(&good)
	noHeader := bytes.Clone(wire)
	noHeader[10] = 0x0F // a batch item stands where the header should
	textual := request(1, createAES())
	notUTF8 := bytes.Replace(ttlv.MarshalTTLV(&textual), []byte("Algorithm"), []byte("Algo\xffithm"), 1)
	return map[string][]byte{
		"the 16 bytes that crash kmip-go's server": unhex("42007801000000013030303030303030"),
		"1 GiB announced":                          unhex("4200780140000000"),
		"4 GiB announced":                          unhex("42007801ffffffff"),
		"HTTP":                                     []byte("GET / HTTP/1.1\r\nHost: kms\r\n\r\n"),
		"a response":                               append([]byte{0x42, 0x00, 0x7B, 1, 0, 0, 0, 0}, wire[8:]...),
		"a depth bomb":                             depthBomb(10_000),
		"nesting at the limit":                     depthBomb(40),
		"an empty structure":                       unhex("4200780100000000"),
		"no header":                                noHeader,
		"a text that is not UTF":                   notUTF8,
	}
}

func TestBadMessages(t *testing.T) {
	b := serve(t, Options{})
	for what, wire := range badMessages() {
		c := b.dial(t)
		c.Write(wire)
		m, _, err := receive(c)
		if err != nil || len(m.BatchItem) != 1 || m.BatchItem[0].ResultReason != kmip.ResultReasonInvalidMessage {
			t.Errorf("%s: %+v, %v", what, m, err)
		}
		if _, _, err := receive(c); err == nil {
			t.Errorf("%s: the connection goes on", what)
		}
	}
	// Truncated at every length: no answer, and no harm.
	good := request(1, createAES())
	wire := ttlv.MarshalTTLV(&good)
	for n := 0; n < len(wire); n += 13 {
		c := b.dial(t)
		c.Write(wire[:n])
		c.(*tls.Conn).CloseWrite()
		if m, _, err := receive(c); err == nil {
			t.Errorf("truncated to %d of %d bytes: %+v", n, len(wire), m)
		}
		c.Close()
	}
	if g := newKey(t, b.dial(t)); g == "" {
		t.Error("the server does not go on")
	}
}

// TestBadRequests are well-formed TTLV and wrong KMIP. The connection survives.
func TestBadRequests(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	id := newKey(t, c)
	no, yes := false, true
	header := func(change func(*kmip.RequestHeader)) kmip.RequestMessage {
		m := request(1, &payloads.DiscoverVersionsRequestPayload{})
		change(&m.Header)
		return m
	}
	payload := func(op kmip.Operation, fields ...ttlv.Value) kmip.RequestMessage {
		return request(4, kmip.NewUnknownPayload(op, fields...))
	}
	uid := ttlv.Value{Tag: kmip.TagUniqueIdentifier, Value: id}
	var huge []kmip.OperationPayload
	for range maxBatch + 1 {
		huge = append(huge, &payloads.DiscoverVersionsRequestPayload{})
	}
	critical := request(1, &payloads.DiscoverVersionsRequestPayload{})
	critical.BatchItem[0].MessageExtension = &kmip.MessageExtension{VendorIdentification: "v", CriticalityIndicator: true, VendorExtension: ttlv.Struct{}}
	for what, x := range map[string]struct {
		m    kmip.RequestMessage
		want kmip.ResultReason
	}{
		"asynchronous":         {header(func(h *kmip.RequestHeader) { h.AsynchronousIndicator = &yes }), kmip.ResultReasonFeatureNotSupported},
		"unknown continuation": {header(func(h *kmip.RequestHeader) { h.BatchErrorContinuationOption = 9 }), kmip.ResultReasonInvalidField},
		"negative size":        {header(func(h *kmip.RequestHeader) { h.MaximumResponseSize = -1 }), kmip.ResultReasonInvalidField},
		"batch count 2 of 1":   {header(func(h *kmip.RequestHeader) { h.BatchCount = 2 }), kmip.ResultReasonInvalidMessage},
		"batch count -1":       {header(func(h *kmip.RequestHeader) { h.BatchCount = -1 }), kmip.ResultReasonInvalidMessage},
		"no batch":             {kmip.RequestMessage{Header: kmip.RequestHeader{ProtocolVersion: kmip.V1_1}}, kmip.ResultReasonInvalidMessage},
		"oversized batch":      {request(1, huge...), kmip.ResultReasonInvalidMessage},
		"critical extension":   {critical, kmip.ResultReasonFeatureNotSupported},
		"unknown operation":    {payload(0x7777), kmip.ResultReasonOperationNotSupported},
		"Poll":                 {payload(kmip.OperationPoll), kmip.ResultReasonOperationNotSupported},
		"Encrypt in KMIP 1.1":  {request(1, &payloads.EncryptRequestPayload{UniqueIdentifier: id, Data: make([]byte, 16)}), kmip.ResultReasonOperationNotSupported},
		"Sign":                 {request(4, &payloads.SignRequestPayload{UniqueIdentifier: id, Data: make([]byte, 16)}), kmip.ResultReasonOperationNotSupported},
		"Get of nothing":       {payload(kmip.OperationGet), kmip.ResultReasonItemNotFound},
		"Get of a guess":       {payload(kmip.OperationGet, ttlv.Value{Tag: kmip.TagUniqueIdentifier, Value: "../default/" + id}), kmip.ResultReasonItemNotFound},
		"Get twice over":       {payload(kmip.OperationGet, uid, uid), kmip.ResultReasonInvalidMessage},
		"Get with a mistyped id": {payload(kmip.OperationGet, ttlv.Value{Tag: kmip.TagUniqueIdentifier, Value: int32(1)}),
			kmip.ResultReasonInvalidMessage},
		"Get with an unknown field": {payload(kmip.OperationGet, uid, ttlv.Value{Tag: kmip.TagComment, Value: "x"}), kmip.ResultReasonInvalidField},
		"Get with wrapping after a stray field": {payload(kmip.OperationGet, uid, ttlv.Value{Tag: kmip.TagKeyWrappingSpecification, Value: ttlv.Struct{}},
			ttlv.Value{Tag: kmip.TagKeyFormatType, Value: ttlv.Enum(1)}), kmip.ResultReasonInvalidField},
		"Get wrapped":              {request(4, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyWrappingSpecification: &kmip.KeyWrappingSpecification{WrappingMethod: kmip.WrappingMethodMACSign}}), kmip.ResultReasonFeatureNotSupported},
		"Get as PKCS#8":            {request(4, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypePKCS_8}), kmip.ResultReasonKeyFormatTypeNotSupported},
		"Get compressed":           {request(4, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyCompressionType: kmip.KeyCompressionTypeECPublicKeyTypeUncompressed}), kmip.ResultReasonKeyCompressionTypeNotSupported},
		"Create by template":       {request(1, &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Name: []kmip.Name{{NameValue: "t", NameType: 1}}}}), kmip.ResultReasonItemNotFound},
		"Create of a y- attribute": {request(1, createAES(custom("y-a", "b"))), kmip.ResultReasonInvalidField},
		"Create twice a length": {request(1, createAES(kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(128)})),
			kmip.ResultReasonInvalidField},
		"Register of a certificate": {request(1, &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeCertificate, Object: &kmip.Certificate{CertificateType: kmip.CertificateTypeX_509, CertificateValue: []byte{1}}}), kmip.ResultReasonInvalidField},
		"Register of an unknown":    {payload(kmip.OperationRegister, ttlv.Value{Tag: kmip.TagObjectType, Value: ttlv.Enum(99)}, ttlv.Value{Tag: kmip.TagTemplateAttribute, Value: ttlv.Struct{}}), kmip.ResultReasonInvalidMessage},
		"Register without a value":  {request(1, registration(kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw})), kmip.ResultReasonInvalidField},
		"Locate by member":          {request(1, &payloads.LocateRequestPayload{ObjectGroupMember: kmip.ObjectGroupMemberDefault}), kmip.ResultReasonInvalidField},
		"Query of nothing":          {payload(kmip.OperationQuery), kmip.ResultReasonInvalidMessage},
		"AddAttribute of State":     {request(1, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: kmip.Attribute{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateActive}}), kmip.ResultReasonPermissionDenied},
	} {
		m := roundTrip(t, c, x.m)
		if len(m.BatchItem) != 1 || m.BatchItem[0].ResultStatus != kmip.ResultStatusOperationFailed || m.BatchItem[0].ResultReason != x.want {
			t.Errorf("%s: %+v, want %v", what, m.BatchItem, x.want)
		}
	}
	if m := roundTrip(t, c, header(func(h *kmip.RequestHeader) { h.AsynchronousIndicator = &no; h.BatchOrderOption = &yes })); m.BatchItem[0].Err() != nil {
		t.Errorf("synchronous and in order: %v", m.BatchItem[0].Err())
	}
	// An unknown Operation Policy Name is no reason to refuse.
	if r := refused4(t, c, 1, kmip.Attribute{AttributeName: "Operation Policy Name", AttributeValue: "anything"}); r != 0 {
		t.Errorf("Operation Policy Name: %v", r)
	}
}

func registration(b kmip.KeyBlock, attributes ...kmip.Attribute) *payloads.RegisterRequestPayload {
	return &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, Object: &kmip.SymmetricKey{KeyBlock: b}, TemplateAttribute: kmip.TemplateAttribute{Attribute: attributes}}
}

// TestNoDetailsReachTheClient: internal errors are logged, and the client hears
// that there was one.
func TestNoDetailsReachTheClient(t *testing.T) {
	b := serve(t, Options{RequestTimeout: time.Nanosecond})
	c := b.dial(t)
	m := roundTrip(t, c, request(4, createAES()))
	it := m.BatchItem[0]
	if it.ResultReason != kmip.ResultReasonGeneralFailure || strings.Contains(it.ResultMessage, "context") || strings.Contains(it.ResultMessage, "/") {
		t.Errorf("answer %+v", it)
	}
	if !strings.Contains(b.log.String(), "deadline exceeded") {
		t.Errorf("the log does not have the cause: %s", b.log)
	}
}

func TestBatches(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	send := func(option kmip.BatchErrorContinuationOption, list ...kmip.OperationPayload) []kmip.ResponseBatchItem {
		req := request(1, list...)
		req.Header.BatchErrorContinuationOption = option
		m := roundTrip(t, c, req)
		if int(m.Header.BatchCount) != len(m.BatchItem) {
			t.Errorf("batch count %d of %d items", m.Header.BatchCount, len(m.BatchItem))
		}
		return m.BatchItem
	}
	// The placeholder carries the new key through the batch.
	got := send(0, createAES(named("batch")), &payloads.ActivateRequestPayload{}, &payloads.AddAttributeRequestPayload{Attribute: custom("x-a", "b")},
		&payloads.GetRequestPayload{}, &payloads.GetAttributesRequestPayload{AttributeName: []kmip.AttributeName{kmip.AttributeNameState, "x-a"}})
	if len(got) != 5 || got[4].Err() != nil {
		t.Fatalf("%+v", got)
	}
	if a := got[4].ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute; len(a) != 2 || a[0].AttributeValue != kmip.StateActive {
		t.Errorf("attributes by placeholder: %+v", a)
	}
	// Locate sets it when one object is found.
	got = send(0, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{named("batch")}}, &payloads.GetRequestPayload{})
	if len(got) != 2 || got[1].Err() != nil {
		t.Errorf("locate and get: %+v", got)
	}
	fail := &payloads.GetRequestPayload{UniqueIdentifier: "none"}
	if got := send(0, createAES(), fail, createAES()); len(got) != 2 || got[1].ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("without an option: %+v", got)
	}
	if got := send(kmip.BatchErrorContinuationOptionStop, fail, createAES()); len(got) != 1 {
		t.Errorf("Stop: %+v", got)
	}
	got = send(kmip.BatchErrorContinuationOptionContinue, createAES(), fail, &payloads.ActivateRequestPayload{}, createAES())
	if len(got) != 4 || got[3].Err() != nil || got[2].ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("Continue: %+v; the placeholder must not outlive a failure", got)
	}
}

func TestMaximumResponseSize(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	id := newKey(t, c)
	send := func(max int32, list ...kmip.OperationPayload) (kmip.ResponseMessage, int) {
		req := request(1, list...)
		req.Header.MaximumResponseSize = max
		if _, err := c.Write(ttlv.MarshalTTLV(&req)); err != nil {
			t.Fatal(err)
		}
		m, raw, err := receive(c)
		if err != nil {
			t.Fatal(err)
		}
		return m, len(raw)
	}
	big, small := &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}, &payloads.ActivateRequestPayload{UniqueIdentifier: id}
	m, n := send(512, big)
	if n > 512 || m.BatchItem[0].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("%d bytes: %+v", n, m)
	}
	m, n = send(512, small, big)
	if n > 512 || m.BatchItem[0].Err() != nil || m.BatchItem[1].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("%d bytes: %+v", n, m)
	}
	if m, _ := send(1, big); m.BatchItem[0].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("a size that nothing fits into: %+v", m)
	}
	if m, _ := send(1<<20, big); m.BatchItem[0].Err() != nil {
		t.Errorf("a size that is enough: %+v", m)
	}
}

// TestLocateInTemplate: a filter inside a template attribute filters.
func TestLocateInTemplate(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	want := newKey(t, c, named("wanted"))
	newKey(t, c, named("other"))
	filter := kmip.TemplateAttribute{Attribute: []kmip.Attribute{named("wanted")}}
	enc := ttlv.NewTTLVEncoder()
	enc.TagAny(kmip.TagTemplateAttribute, &filter)
	dec, err := ttlv.NewTTLVDecoder(enc.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	var v ttlv.Value
	if err := dec.Any(&v); err != nil {
		t.Fatal(err)
	}
	m := roundTrip(t, c, request(1, kmip.NewUnknownPayload(kmip.OperationLocate, v)))
	if got := m.BatchItem[0].ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier; !slices.Equal(got, []string{want}) {
		t.Errorf("found %v, want %s alone", got, want)
	}
	l := do[*payloads.LocateResponsePayload](t, c, 4, &payloads.LocateRequestPayload{MaximumItems: 1, OffsetItems: 1})
	if !slices.Equal(l.UniqueIdentifier, []string{want}) || *l.LocatedItems != 2 {
		t.Errorf("the second of two: %+v", l)
	}
}

func TestRegister(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	value := bytes.Repeat([]byte{7}, 32)
	mask := kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt}
	for what, block := range map[string]kmip.KeyBlock{
		"raw": {KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &value}}}},
		"transparent": {KeyFormatType: kmip.KeyFormatTypeTransparentSymmetricKey, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{TransparentSymmetricKey: &kmip.TransparentSymmetricKey{Key: value}}}}},
	} {
		id := do[*payloads.RegisterResponsePayload](t, c, 2, registration(block, mask)).UniqueIdentifier
		if g := do[*payloads.GetResponsePayload](t, c, 2, &payloads.GetRequestPayload{UniqueIdentifier: id}); !bytes.Equal(key(t, g), value) {
			t.Errorf("%s: got another key back", what)
		}
		do[*payloads.ActivateResponsePayload](t, c, 2, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
		if r := refused(t, c, 2, &payloads.DestroyRequestPayload{UniqueIdentifier: id}); r != kmip.ResultReasonPermissionDenied {
			t.Errorf("%s: destroyed while Active: %v", what, r)
		}
		occurred := time.Unix(6, 0)
		do[*payloads.RevokeResponsePayload](t, c, 2, &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}, CompromiseOccurrenceDate: &occurred})
		do[*payloads.DestroyResponsePayload](t, c, 2, &payloads.DestroyRequestPayload{UniqueIdentifier: id})
		if r := refused(t, c, 2, &payloads.GetRequestPayload{UniqueIdentifier: id}); r != kmip.ResultReasonItemNotFound {
			t.Errorf("%s: Get when destroyed: %v", what, r)
		}
		a := do[*payloads.GetAttributesResponsePayload](t, c, 2, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState, kmip.AttributeNameCompromiseOccurrenceDate}})
		if a.Attribute[0].AttributeValue != kmip.StateDestroyedCompromised || !a.Attribute[1].AttributeValue.(time.Time).Equal(occurred) {
			t.Errorf("%s: attributes when destroyed: %+v", what, a)
		}
	}
	too := make([]byte, kms.MaxMaterial+1)
	big := do[*payloads.RegisterResponsePayload](t, c, 2, &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeOpaqueObject, Object: &kmip.OpaqueObject{OpaqueDataType: 1, OpaqueDataValue: too[1:]}})
	if g := do[*payloads.GetResponsePayload](t, c, 2, &payloads.GetRequestPayload{UniqueIdentifier: big.UniqueIdentifier}); len(g.Object.(*kmip.OpaqueObject).OpaqueDataValue) != kms.MaxMaterial {
		t.Error("an opaque object of the largest size came back changed")
	}
	if r := refused(t, c, 2, &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeOpaqueObject, Object: &kmip.OpaqueObject{OpaqueDataType: 1, OpaqueDataValue: too}}); r != kmip.ResultReasonInvalidField {
		t.Errorf("an opaque object that is too large: %v", r)
	}
}

func TestManyClientsAtOnce(t *testing.T) {
	b := serve(t, Options{})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			c, err := tls.Dial("tcp", b.addr, b.config(b.client, tls.VersionTLS12))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for range 25 {
				req := request(4, createAES(custom("x-g", fmt.Sprint(g))), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{})
				if _, err := c.Write(ttlv.MarshalTTLV(&req)); err != nil {
					t.Error(err)
					return
				}
				m, _, err := receive(c)
				if err != nil || len(m.BatchItem) != 3 || m.BatchItem[2].Err() != nil {
					t.Errorf("%+v, %v", m, err)
					return
				}
			}
		})
	}
	wg.Wait()
	l := do[*payloads.LocateResponsePayload](t, b.dial(t), 4, &payloads.LocateRequestPayload{})
	if *l.LocatedItems != 200 {
		t.Errorf("%d keys, want 200", *l.LocatedItems)
	}
}
