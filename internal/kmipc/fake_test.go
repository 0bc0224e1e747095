package kmipc

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/pki"
)

// A fake is a small KMIP server in memory whose faults a test chooses. It
// stands beside PyKMIP, whose faults cannot be chosen.
type fake struct {
	t    testing.TB
	l    net.Listener
	cert *x509.Certificate

	mu       sync.Mutex
	store    *fakeStore
	versions []kmip.ProtocolVersion // as listed; requests in others are refused
	fault    func(op kmip.Operation) fault
	slow     func() time.Duration // before a handshake
	admit    *x509.Certificate    // nil: any client
	tlsMax   uint16
	requests []kmip.Operation
	conns    map[net.Conn]bool
	accepted int
}

// fakeStore is what servers that share keys share.
type fakeStore struct {
	mu   sync.Mutex
	keys map[string]*fakeKey
	next int
}

type fakeKey struct {
	material []byte
	name     string
	state    kmip.State
	text     map[string]string
}

type fault int

const (
	none        fault = iota
	closeBefore       // the request is not carried out, the connection closes
	closeAfter        // the request is carried out, the connection closes
	hang              // no answer
	garbage           // an answer that is no TTLV
	generalFailure
)

func newStore() *fakeStore { return &fakeStore{keys: map[string]*fakeKey{}} }

func startFake(t testing.TB, store *fakeStore) *fake {
	t.Helper()
	f := &fake{t: t, store: store, versions: versions(), conns: map[net.Conn]bool{}}
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	f.cert, err = pki.SelfSigned(key, pki.Grant{Server: true, Life: 90 * 24 * time.Hour}, "fake kms", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{f.cert.Raw}, PrivateKey: key}},
		ClientAuth:   tls.RequestClientCert,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.slow != nil {
				d := f.slow()
				f.mu.Unlock()
				time.Sleep(d)
				f.mu.Lock()
			}
			return &tls.Config{
				Certificates: []tls.Certificate{{Certificate: [][]byte{f.cert.Raw}, PrivateKey: key}},
				ClientAuth:   tls.RequestClientCert,
				MaxVersion:   f.tlsMax,
				VerifyConnection: func(s tls.ConnectionState) error {
					if f.admit != nil && (len(s.PeerCertificates) == 0 || !s.PeerCertificates[0].Equal(f.admit)) {
						return fmt.Errorf("unknown client")
					}
					return nil
				},
			}, nil
		},
	}
	if f.l, err = tls.Listen("tcp", "127.0.0.1:0", cfg); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := f.l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns[c] = true
			f.accepted++
			f.mu.Unlock()
			wg.Go(func() {
				f.serve(c)
				c.Close()
				f.mu.Lock()
				delete(f.conns, c)
				f.mu.Unlock()
			})
		}
	})
	t.Cleanup(func() { f.stop(); wg.Wait() })
	return f
}

func (f *fake) stop() { f.l.Close(); f.closeConns() }

// closeConns closes every connection, as an idle timeout or a restart does.
func (f *fake) closeConns() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) count(op kmip.Operation) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.requests {
		if o == op {
			n++
		}
	}
	return n
}

func (f *fake) connections() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.accepted
}

// A clock stands still until it is advanced.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) read() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }

func (c *clock) advance(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.now = c.now.Add(d) }

func (f *fake) endpoint(name string) Endpoint {
	return Endpoint{Name: name, Address: f.l.Addr().String(), Pins: [][sha256.Size]byte{sha256.Sum256(f.cert.Raw)}}
}

func (f *fake) serve(c net.Conn) {
	for {
		var header [8]byte
		if _, err := io.ReadFull(c, header[:]); err != nil {
			return
		}
		body := make([]byte, int(header[6])<<8|int(header[7]))
		if _, err := io.ReadFull(c, body); err != nil {
			return
		}
		var req kmip.RequestMessage
		if err := ttlv.UnmarshalTTLV(append(header[:], body...), &req); err != nil {
			f.t.Errorf("the client sent what does not decode: %v", err)
			return
		}
		op := req.BatchItem[0].Operation
		f.mu.Lock()
		f.requests = append(f.requests, op)
		what := none
		if f.fault != nil {
			what = f.fault(op)
		}
		known := slices.Contains(f.versions, req.Header.ProtocolVersion)
		f.mu.Unlock()
		if what == closeBefore {
			return
		}
		item := kmip.ResponseBatchItem{Operation: op}
		if !known {
			refuse(&item, kmip.ResultReasonInvalidMessage)
		} else if what == generalFailure {
			refuse(&item, kmip.ResultReasonGeneralFailure)
		} else {
			f.handle(req.BatchItem[0].RequestPayload, &item)
		}
		switch what {
		case closeAfter:
			return
		case hang:
			io.Copy(io.Discard, c) // until the client leaves
			return
		case garbage:
			c.Write(bytes.Repeat([]byte("garbage!"), 8))
			return
		}
		c.Write(ttlv.MarshalTTLV(&kmip.ResponseMessage{
			Header:    kmip.ResponseHeader{ProtocolVersion: req.Header.ProtocolVersion, TimeStamp: time.Now(), BatchCount: 1},
			BatchItem: []kmip.ResponseBatchItem{item},
		}))
	}
}

func refuse(item *kmip.ResponseBatchItem, reason kmip.ResultReason) {
	item.ResultStatus, item.ResultReason, item.ResultMessage = kmip.ResultStatusOperationFailed, reason, "refused by the fake"
}

func (f *fake) handle(req kmip.OperationPayload, item *kmip.ResponseBatchItem) {
	s := f.store
	s.mu.Lock()
	defer s.mu.Unlock()
	find := func(id string) *fakeKey {
		k := s.keys[id]
		if k == nil {
			refuse(item, kmip.ResultReasonItemNotFound)
		}
		return k
	}
	switch req := req.(type) {
	case *payloads.DiscoverVersionsRequestPayload:
		f.mu.Lock()
		defer f.mu.Unlock()
		item.ResponsePayload = &payloads.DiscoverVersionsResponsePayload{ProtocolVersion: f.versions}
	case *payloads.QueryRequestPayload:
		item.ResponsePayload = &payloads.QueryResponsePayload{VendorIdentification: "fake\x1b[31m"}
	case *payloads.CreateRequestPayload:
		s.next++
		id := fmt.Sprintf("key-%d", s.next)
		k := &fakeKey{state: kmip.StatePreActive, text: map[string]string{}, material: make([]byte, 32)}
		rand.Read(k.material)
		for _, a := range req.TemplateAttribute.Attribute {
			if n, ok := a.AttributeValue.(kmip.Name); ok {
				k.name = n.NameValue
			}
		}
		s.keys[id] = k
		item.ResponsePayload = &payloads.CreateResponsePayload{ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: id}
	case *payloads.LocateRequestPayload:
		resp := &payloads.LocateResponsePayload{}
		for id, k := range s.keys {
			if k.name == req.Attribute[0].AttributeValue.(kmip.Name).NameValue {
				resp.UniqueIdentifier = append(resp.UniqueIdentifier, id)
			}
		}
		item.ResponsePayload = resp
	case *payloads.GetRequestPayload:
		if k := find(req.UniqueIdentifier); k != nil {
			material := bytes.Clone(k.material)
			item.ResponsePayload = &payloads.GetResponsePayload{
				ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: req.UniqueIdentifier,
				Object: &kmip.SymmetricKey{KeyBlock: kmip.KeyBlock{
					KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: int32(8 * len(material)),
					KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &material}}},
				}},
			}
		}
	case *payloads.GetAttributesRequestPayload:
		if k := find(req.UniqueIdentifier); k != nil {
			resp := &payloads.GetAttributesResponsePayload{UniqueIdentifier: req.UniqueIdentifier}
			for _, n := range req.AttributeName {
				switch v, custom := k.text[string(n)]; {
				case n == kmip.AttributeNameState:
					resp.Attribute = append(resp.Attribute, kmip.Attribute{AttributeName: n, AttributeValue: k.state})
				case n == kmip.AttributeNameName:
					resp.Attribute = append(resp.Attribute, nameAttribute(k.name))
				case custom:
					resp.Attribute = append(resp.Attribute, kmip.Attribute{AttributeName: n, AttributeValue: v})
				}
			}
			item.ResponsePayload = resp
		}
	case *payloads.AddAttributeRequestPayload:
		if k := find(req.UniqueIdentifier); k != nil {
			k.text[string(req.Attribute.AttributeName)] = req.Attribute.AttributeValue.(ttlv.Value).Value.(string)
			item.ResponsePayload = &payloads.AddAttributeResponsePayload{UniqueIdentifier: req.UniqueIdentifier, Attribute: req.Attribute}
		}
	case *payloads.ActivateRequestPayload:
		if k := find(req.UniqueIdentifier); k != nil {
			if k.state != kmip.StatePreActive {
				refuse(item, kmip.ResultReasonPermissionDenied)
				return
			}
			k.state = kmip.StateActive
			item.ResponsePayload = &payloads.ActivateResponsePayload{UniqueIdentifier: req.UniqueIdentifier}
		}
	default:
		refuse(item, kmip.ResultReasonOperationNotSupported)
	}
}

// clientCert is a self-signed client certificate, as center makes one.
func clientCert(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := pki.GenerateKey() // faster than NewKMIPClient's RSA
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Client: true, Life: 365 * 24 * time.Hour}, pki.KMIPClientName(time.Now()), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// connect makes a client of fakes, with short timeouts. The log goes to log,
// if that is not nil.
func connect(t testing.TB, log io.Writer, change func(*Config), fakes ...*fake) *Client {
	t.Helper()
	cfg := Config{Certificate: clientCert(t), HandshakeTimeout: 10 * time.Second, RequestTimeout: 10 * time.Second}
	if log != nil {
		cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	}
	for i, f := range fakes {
		cfg.Endpoints = append(cfg.Endpoints, f.endpoint(fmt.Sprintf("kms-%d", i+1)))
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}
