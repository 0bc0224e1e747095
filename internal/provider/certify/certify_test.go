package certify

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
	"mortise/internal/kmipc/kmipctest"
	"mortise/internal/kms"
	"mortise/internal/kms/kmipd"
	"mortise/internal/pki"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// pair makes a self-signed certificate with its key.
func pair(t testing.TB, g pki.Grant, name string) tls.Certificate {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if g.Life == 0 {
		g.Life = 90 * 24 * time.Hour
	}
	cert, err := pki.SelfSigned(key, g, name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := pki.TLSCertificate([]*x509.Certificate{cert}, key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func serverPair(t testing.TB) tls.Certificate {
	return pair(t, pki.Grant{Server: true, Hosts: []string{"127.0.0.1"}}, "kms")
}

func run1(t *testing.T, cfg Config) *Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r, err := Run(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if t.Failed() || testing.Verbose() {
		for _, s := range r.Steps {
			t.Logf("%-10s %s / %s: %s → %s", s.Result, s.Part, s.Name, s.Found, s.Then)
		}
	}
	return r
}

// steps returns the names of the steps that ended so.
func (r *Report) steps(result Result) (names []string) {
	for _, s := range r.Steps {
		if s.Result == result {
			names = append(names, s.Name)
		}
	}
	return names
}

func startKMS(t *testing.T) (*kms.KMS, string, *x509.Certificate) {
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
	server := serverPair(t)
	credentials, err := pki.NewCredentials([]*x509.Certificate{server.Leaf}, server.PrivateKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- kmipd.Serve(ctx, l, k, kmipd.Options{Credentials: credentials}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		k.Close()
		root.Close()
		s.Close()
	})
	return k, l.Addr().String(), server.Leaf
}

// TestOurs: vCenter's traffic and the certified minimum work with our KMS.
func TestOurs(t *testing.T) {
	k, addr, server := startKMS(t)
	client := pair(t, pki.Grant{Client: true}, "certify")
	if _, err := k.AddClient(t.Context(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: client.Leaf, Role: kms.RoleAdministrator}); err != nil {
		t.Fatal(err)
	}
	seen := 0
	r := run1(t, Config{Address: addr, Certificate: client, Trust: kmipc.TrustPin(sha256.Sum256(server.Raw)), Each: func(Step) { seen++ }})
	if bad := append(r.steps(Fails), r.steps(Skipped)...); len(bad) > 0 || len(r.Steps) < 20 {
		t.Errorf("%d steps; these fail: %q", len(r.Steps), bad)
	}
	// A certificate that may not revoke or destroy is no failing; all else works.
	for _, name := range r.steps(Deviates) {
		if name != "Revoke" && name != "Destroy" && name != "destroy the test keys" {
			t.Errorf("%s deviates", name)
		}
	}
	if seen != len(r.Steps) || r.Thumbprint != fmt.Sprintf("%x", sha256.Sum256(server.Raw)) || r.Vendor == "" || !slices.Contains(r.Versions, "1.1") {
		t.Errorf("report: %+v", r)
	}
	if len(r.Left) != 0 && r.Verdict != Deviates {
		t.Errorf("keys %q stay and the verdict is %s", r.Left, r.Verdict)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}

	// Another thumbprint, and a client that the server does not know.
	r = run1(t, Config{Address: addr, Certificate: client, Trust: kmipc.TrustPin([32]byte{1})})
	if r.Verdict != Fails || len(r.Steps) != 1 || !strings.Contains(r.Steps[0].Found, "thumbprint") {
		t.Errorf("wrong thumbprint: %+v", r)
	}
	r = run1(t, Config{Address: addr, Certificate: pair(t, pki.Grant{Client: true}, "stranger")})
	if r.Verdict != Fails || !slices.Contains(append(r.steps(Fails), "TLS handshake"), "client certificate") && r.Steps[0].Result != Fails {
		t.Errorf("unknown client: %+v", r)
	}
}

// TestPyKMIP: a server that is not ours, which lacks AddAttribute.
func TestPyKMIP(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	client, server := pair(t, pki.Grant{Client: true}, "kmipClient"), serverPair(t)
	if err := errors.Join(
		pki.SaveKeyPair(path("server.pem"), []*x509.Certificate{server.Leaf}, server.PrivateKey.(crypto.Signer)),
		pki.SaveCertificates(path("client.pem"), client.Leaf),
	); err != nil {
		t.Fatal(err)
	}
	s := kmipctest.Start(t, kmipctest.Files{Certificate: path("server.pem"), Key: path("server.pem"), ClientCA: path("client.pem"), Database: path("db")})
	r := run1(t, Config{Address: s.Address, Certificate: client, Trust: kmipc.TrustPin(sha256.Sum256(server.Leaf.Raw))})
	if bad := append(r.steps(Fails), r.steps(Skipped)...); len(bad) > 0 {
		t.Errorf("these fail: %q", bad)
	}
	odd := r.steps(Deviates)
	if r.Verdict != Deviates || !slices.ContainsFunc(odd, func(s string) bool { return strings.Contains(s, "three AddAttribute") }) || !slices.Contains(odd, "AddAttribute") {
		t.Errorf("these deviate: %q", odd)
	}
	if len(r.Left) > 0 {
		t.Errorf("test keys stay: %q", r.Left)
	}
	kept := run1(t, Config{Address: s.Address, Certificate: client, Keep: true})
	if len(kept.Left) != 3 {
		t.Errorf("with Keep these stay: %q", kept.Left)
	}
}

// fake is a KMIP server that is right but for what a test breaks.
type fake struct {
	mu   sync.Mutex
	keys map[string]*fakeKey

	reply func(kmip.OperationPayload, *kmip.ResponseBatchItem) // changes the right answer
	raw   func(net.Conn) bool                                  // answers a message in its own way
}

type fakeKey struct {
	bytes [32]byte
	state kmip.State
	attrs []kmip.Attribute
}

func (f *fake) start(t *testing.T) Config {
	t.Helper()
	f.keys = map[string]*fakeKey{}
	server := serverPair(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(c)
		}
	}()
	return Config{Address: l.Addr().String(), Certificate: pair(t, pki.Grant{Client: true}, "certify"), Timeout: 2 * time.Second}
}

func (f *fake) serve(c net.Conn) {
	defer c.Close()
	for {
		b := make([]byte, 8)
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		b = append(b, make([]byte, binary.BigEndian.Uint32(b[4:]))...)
		if _, err := io.ReadFull(c, b[8:]); err != nil {
			return
		}
		if f.raw != nil {
			if !f.raw(c) {
				return
			}
			continue
		}
		var req kmip.RequestMessage
		if ttlv.UnmarshalTTLV(b, &req) != nil {
			return
		}
		resp := &kmip.ResponseMessage{Header: kmip.ResponseHeader{ProtocolVersion: req.Header.ProtocolVersion, TimeStamp: time.Now(), BatchCount: int32(len(req.BatchItem))}}
		for _, in := range req.BatchItem {
			out := kmip.ResponseBatchItem{Operation: in.Operation, UniqueBatchItemID: in.UniqueBatchItemID}
			f.answer(in.RequestPayload, &out)
			if f.reply != nil {
				f.reply(in.RequestPayload, &out)
			}
			resp.BatchItem = append(resp.BatchItem, out)
		}
		if _, err := c.Write(ttlv.MarshalTTLV(resp)); err != nil {
			return
		}
	}
}

func refuse(out *kmip.ResponseBatchItem, reason kmip.ResultReason) {
	out.ResultStatus, out.ResultReason, out.ResultMessage, out.ResponsePayload = kmip.ResultStatusOperationFailed, reason, "no", nil
}

func (f *fake) answer(in kmip.OperationPayload, out *kmip.ResponseBatchItem) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := func(id string) *fakeKey {
		k := f.keys[id]
		if k == nil {
			refuse(out, kmip.ResultReasonItemNotFound)
		}
		return k
	}
	switch p := in.(type) {
	case *payloads.DiscoverVersionsRequestPayload:
		out.ResponsePayload = &payloads.DiscoverVersionsResponsePayload{ProtocolVersion: []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1, kmip.V1_0}}
	case *payloads.QueryRequestPayload:
		out.ResponsePayload = &payloads.QueryResponsePayload{VendorIdentification: "fake"}
	case *payloads.CreateRequestPayload:
		id := fmt.Sprint("key-", len(f.keys)+1)
		f.keys[id] = &fakeKey{bytes: sha256.Sum256([]byte(id)), state: kmip.StatePreActive, attrs: p.TemplateAttribute.Attribute}
		out.ResponsePayload = &payloads.CreateResponsePayload{ObjectType: p.ObjectType, UniqueIdentifier: id}
	case *payloads.GetRequestPayload:
		if k := key(p.UniqueIdentifier); k != nil {
			b := slices.Clone(k.bytes[:])
			out.ResponsePayload = &payloads.GetResponsePayload{ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: p.UniqueIdentifier, Object: &kmip.SymmetricKey{KeyBlock: kmip.KeyBlock{
				KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
				KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &b}}},
			}}}
		}
	case *payloads.GetAttributesRequestPayload:
		if k := key(p.UniqueIdentifier); k != nil {
			a := &payloads.GetAttributesResponsePayload{UniqueIdentifier: p.UniqueIdentifier}
			all := append([]kmip.Attribute{
				{AttributeName: kmip.AttributeNameObjectType, AttributeValue: kmip.ObjectTypeSymmetricKey},
				{AttributeName: kmip.AttributeNameState, AttributeValue: k.state},
				{AttributeName: kmip.AttributeNameInitialDate, AttributeValue: time.Now()},
			}, k.attrs...)
			for _, attr := range all {
				if len(p.AttributeName) == 0 || slices.Contains(p.AttributeName, attr.AttributeName) {
					a.Attribute = append(a.Attribute, attr)
				}
			}
			out.ResponsePayload = a
		}
	case *payloads.AddAttributeRequestPayload:
		if k := key(p.UniqueIdentifier); k != nil {
			k.attrs = append(k.attrs, p.Attribute)
			out.ResponsePayload = &payloads.AddAttributeResponsePayload{UniqueIdentifier: p.UniqueIdentifier, Attribute: p.Attribute}
		}
	case *payloads.LocateRequestPayload:
		a := &payloads.LocateResponsePayload{}
		for id, k := range f.keys {
			if slices.ContainsFunc(k.attrs, func(have kmip.Attribute) bool { return have.AttributeValue == p.Attribute[0].AttributeValue }) {
				a.UniqueIdentifier = append(a.UniqueIdentifier, id)
			}
		}
		out.ResponsePayload = a
	case *payloads.ActivateRequestPayload:
		if k := key(p.UniqueIdentifier); k != nil {
			k.state = kmip.StateActive
			out.ResponsePayload = &payloads.ActivateResponsePayload{UniqueIdentifier: p.UniqueIdentifier}
		}
	case *payloads.RevokeRequestPayload:
		if k := key(p.UniqueIdentifier); k != nil {
			k.state = kmip.StateDeactivated
			out.ResponsePayload = &payloads.RevokeResponsePayload{UniqueIdentifier: p.UniqueIdentifier}
		}
	case *payloads.DestroyRequestPayload:
		if k := key(p.UniqueIdentifier); k != nil {
			delete(f.keys, p.UniqueIdentifier)
			out.ResponsePayload = &payloads.DestroyResponsePayload{UniqueIdentifier: p.UniqueIdentifier}
		}
	default:
		refuse(out, kmip.ResultReasonOperationNotSupported)
	}
}

// TestFakeIsRight: else the tests of what is broken would prove nothing.
func TestFakeIsRight(t *testing.T) {
	f := &fake{}
	r := run1(t, f.start(t))
	if r.Verdict != Works || len(r.Left) > 0 || len(f.keys) > 0 {
		t.Errorf("verdict %s, deviates %q, fails %q, left %q", r.Verdict, r.steps(Deviates), r.steps(Fails), r.Left)
	}
}

// TestBroken: each way to be broken is found, called by its name and judged as
// vCenter would.
func TestBroken(t *testing.T) {
	stateOnly := func(p kmip.OperationPayload) bool {
		g, ok := p.(*payloads.GetAttributesRequestPayload)
		return ok && slices.Equal(g.AttributeName, []kmip.AttributeName{kmip.AttributeNameState})
	}
	custom := func(p kmip.OperationPayload) bool {
		g, ok := p.(*payloads.GetAttributesRequestPayload)
		return ok && len(g.AttributeName) == 1 && strings.HasPrefix(string(g.AttributeName[0]), "x-")
	}
	is := func(op kmip.Operation) func(kmip.OperationPayload) bool {
		return func(p kmip.OperationPayload) bool { return p.Operation() == op }
	}
	when := func(match func(kmip.OperationPayload) bool, reason kmip.ResultReason) func(kmip.OperationPayload, *kmip.ResponseBatchItem) {
		return func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if match(p) {
				refuse(out, reason)
			}
		}
	}
	var mu sync.Mutex
	gets := byte(0)
	for name, c := range map[string]struct {
		*fake
		verdict Result
		step    string // one that tells
	}{
		"no state":          {&fake{reply: when(stateOnly, kmip.ResultReasonItemNotFound)}, Fails, "fetch the key for a host: Get and state"},
		"missing x- denied": {&fake{reply: when(custom, kmip.ResultReasonItemNotFound)}, Deviates, "tag a VM's key: look for tags that it lacks"},
		"no AddAttribute":   {&fake{reply: when(is(kmip.OperationAddAttribute), kmip.ResultReasonOperationNotSupported)}, Deviates, "tag a VM's key: three AddAttribute in a message"},
		"no Create":         {&fake{reply: when(is(kmip.OperationCreate), kmip.ResultReasonPermissionDenied)}, Fails, "create a VM's key"},
		"no Query":          {&fake{reply: when(is(kmip.OperationQuery), kmip.ResultReasonOperationNotSupported)}, Deviates, "register the provider: Query"},
		"no Activate":       {&fake{reply: when(is(kmip.OperationActivate), kmip.ResultReasonPermissionDenied)}, Fails, "fetch the key for a host: activate"},
		"no Destroy":        {&fake{reply: when(is(kmip.OperationDestroy), kmip.ResultReasonPermissionDenied)}, Deviates, "destroy the test keys"},
		"no 1.1": {&fake{reply: func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if d, ok := out.ResponsePayload.(*payloads.DiscoverVersionsResponsePayload); ok {
				d.ProtocolVersion = []kmip.ProtocolVersion{kmip.V1_4}
			}
		}}, Fails, "health poll: DiscoverVersions twice on a connection"},
		"lowest version first": {&fake{reply: func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if d, ok := out.ResponsePayload.(*payloads.DiscoverVersionsResponsePayload); ok {
				slices.Reverse(d.ProtocolVersion)
			}
		}}, Deviates, "health poll: DiscoverVersions twice on a connection"},
		"another key each time": {&fake{reply: func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if g, ok := out.ResponsePayload.(*payloads.GetResponsePayload); ok {
				mu.Lock()
				defer mu.Unlock()
				gets++
				(*g.Object.(*kmip.SymmetricKey).KeyBlock.KeyValue.Plain.KeyMaterial.Bytes)[0] = gets
			}
		}}, Fails, "the same key twice"},
		"short key": {&fake{reply: func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if g, ok := out.ResponsePayload.(*payloads.GetResponsePayload); ok {
				b := g.Object.(*kmip.SymmetricKey).KeyBlock.KeyValue.Plain.KeyMaterial.Bytes
				*b = (*b)[:16]
			}
		}}, Fails, "fetch the key for a host: Get and state"},
		"Locate ignores names": {&fake{reply: func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if l, ok := out.ResponsePayload.(*payloads.LocateResponsePayload); ok {
				l.UniqueIdentifier = []string{"key-1", "key-2", "key-3"}
			}
		}}, Deviates, "Locate by Name"},
		"items called otherwise": {&fake{reply: func(_ kmip.OperationPayload, out *kmip.ResponseBatchItem) { out.UniqueBatchItemID = []byte("1") }}, Deviates, "tag a VM's key: three AddAttribute in a message"},
		"destroyed keys served": {&fake{reply: func(p kmip.OperationPayload, out *kmip.ResponseBatchItem) {
			if g, ok := p.(*payloads.GetRequestPayload); ok && out.ResultStatus != kmip.ResultStatusSuccess {
				f := &fake{keys: map[string]*fakeKey{g.UniqueIdentifier: {}}}
				*out = kmip.ResponseBatchItem{Operation: out.Operation}
				f.answer(p, out)
			}
		}}, Fails, "Destroy"},
		"garbage":    {&fake{raw: func(c net.Conn) bool { c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")); return false }}, Fails, "health poll: DiscoverVersions twice on a connection"},
		"not a word": {&fake{raw: func(net.Conn) bool { return false }}, Fails, "client certificate"},
		"a crasher": {&fake{raw: func(c net.Conn) bool {
			c.Write([]byte("\x42\x00\x7b\x01\x00\x00\x00\x08\x42\x00\x78\x01\x00\x00\x00\x00"))
			return true
		}}, Fails, "health poll: DiscoverVersions twice on a connection"},
	} {
		t.Run(name, func(t *testing.T) {
			r := run1(t, c.start(t))
			if r.Verdict != c.verdict || !slices.Contains(r.steps(c.verdict), c.step) {
				t.Errorf("verdict %s; fails %q; deviates %q", r.Verdict, r.steps(Fails), r.steps(Deviates))
			}
			for _, s := range r.Steps {
				if s.Result == Fails && s.Then == "" || s.Result != Works && s.Found == "" {
					t.Errorf("%s: says too little: %+v", s.Name, s)
				}
			}
			if name == "no Destroy" && len(r.Left) != 3 {
				t.Errorf("left: %q", r.Left)
			}
		})
	}
}

// TestInterrupted: a run that is interrupted still destroys its test keys.
func TestInterrupted(t *testing.T) {
	f := &fake{}
	cfg := f.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cfg.Each = func(s Step) {
		if s.Name == "create a host's key" {
			cancel()
		}
	}
	r, err := Run(ctx, cfg)
	if !errors.Is(err, context.Canceled) || len(r.Left) > 0 || len(f.keys) > 0 {
		t.Errorf("error %v, left %q", err, r.Left)
	}
}

// TestSilent: a server that never answers is reported and holds nobody up.
func TestSilent(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	f := &fake{raw: func(net.Conn) bool { <-hold; return false }}
	cfg := f.start(t)
	cfg.Timeout = 200 * time.Millisecond
	began := time.Now()
	if r := run1(t, cfg); r.Verdict != Fails || time.Since(began) > 20*time.Second {
		t.Errorf("%s after %s", r.Verdict, time.Since(began))
	}
}
