package kmipc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kmipc/kmipctest"
	"mortise/internal/pki"
)

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return c
}

// create makes a key or fails the test.
func create(t testing.TB, c interface {
	Create(context.Context, string) (string, error)
}, name string) string {
	t.Helper()
	id, err := c.Create(ctx(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func state(t testing.TB, c *Client, id string) kmip.State {
	t.Helper()
	a, err := c.GetAttributes(ctx(t), id, "State")
	if err != nil {
		t.Fatal(err)
	}
	return a.State
}

// TestPyKMIP goes through a key's life on a server that is not ours.
func TestPyKMIP(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	clientC, clientK, err := pki.NewKMIPClient(24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	serverKey, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	serverC, err := pki.SelfSigned(serverKey, pki.Grant{Server: true, Life: 24 * time.Hour}, "pykmip", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(pki.SaveKeyPair(path("server.pem"), []*x509.Certificate{serverC}, serverKey), pki.SaveCertificates(path("client.pem"), clientC)); err != nil {
		t.Fatal(err)
	}
	addr := kmipctest.Start(t, kmipctest.Files{Certificate: path("server.pem"), Key: path("server.pem"), ClientCA: path("client.pem"), Database: path("db")}).Address

	chain, thumb, err := FetchServerCertificate(ctx(t), addr)
	if err != nil || !chain[0].Equal(serverC) || thumb != pki.Thumbprint(serverC) {
		t.Fatalf("FetchServerCertificate: %q, %v", thumb, err)
	}
	pin, err := pki.ParseThumbprint(thumb)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Endpoints:   []Endpoint{{Name: "pykmip", Address: addr, Pins: [][sha256.Size]byte{pin}}},
		Certificate: tls.Certificate{Certificate: [][]byte{clientC.Raw}, PrivateKey: clientK},
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)

	st := c.Servers()[0].Status(ctx(t))
	if !st.Reachable || st.Err != nil || st.Version != "1.4" || !strings.Contains(st.Vendor, "PyKMIP") || !st.Certificate.Equal(serverC) ||
		!st.ClientExpires.Equal(clientC.NotAfter) || st.Latency <= 0 {
		t.Errorf("status %+v", st)
	}

	id := create(t, c, "operation-1")
	create(t, c, "operation-2")
	if ids, err := c.Locate(ctx(t), "operation-1", 10); err != nil || !slices.Equal(ids, []string{id}) {
		t.Errorf("Locate: %v, %v; want %s", ids, err, id)
	}
	if ids, err := c.Locate(ctx(t), "operation-3", 10); err != nil || len(ids) != 0 {
		t.Errorf("Locate of nothing: %v, %v", ids, err)
	}
	a, err := c.GetAttributes(ctx(t), id, "State", "Name", "x-Vendor")
	if err != nil || a.State != kmip.StatePreActive || !slices.Equal(a.Names, []string{"operation-1"}) || len(a.Text) != 0 {
		t.Errorf("attributes %+v, %v", a, err)
	}
	if err := c.AddAttribute(ctx(t), id, "x-Vendor", "Mortise"); !errors.Is(err, ErrFailed) {
		t.Errorf("AddAttribute: %v; PyKMIP has none and calls the message invalid", err)
	}
	if err := c.Activate(ctx(t), id); err != nil {
		t.Error(err)
	}
	if s := state(t, c, id); s != kmip.StateActive {
		t.Errorf("state %v", s)
	}
	if err := c.Activate(ctx(t), id); !errors.Is(err, ErrDenied) {
		t.Errorf("Activate twice: %v", err)
	}
	key, err := c.Get(ctx(t), id)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Get(ctx(t), id)
	if err != nil || !again.Equal(key) || key.Len() != 32 {
		t.Errorf("Get twice: %v", err)
	}
	if err := c.Destroy(ctx(t), id); !errors.Is(err, ErrDenied) {
		t.Errorf("Destroy of an active key: %v", err)
	}
	if err := c.Revoke(ctx(t), id, false); err != nil || state(t, c, id) != kmip.StateDeactivated {
		t.Errorf("Revoke: %v", err)
	}
	if err := c.Destroy(ctx(t), id); err != nil {
		t.Error(err)
	}
	if _, err := c.Get(ctx(t), id); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of a destroyed key: %v", err)
	}

	// A certificate that PyKMIP was not told of.
	cfg.Certificate = clientCert(t)
	stranger, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stranger.Close)
	if _, err := stranger.Query(ctx(t)); !errors.Is(err, ErrRefused) {
		t.Errorf("unknown client: %v, want ErrRefused", err)
	}
}

func TestLife(t *testing.T) {
	f := startFake(t, newStore())
	c := connect(t, nil, nil, f)
	id := create(t, c, "op")
	if err := c.AddAttribute(ctx(t), id, "x-Vendor", "Mortise"); err != nil {
		t.Error(err)
	}
	a, err := c.GetAttributes(ctx(t), id, "State", "Name", "x-Vendor", "x-Product")
	if err != nil || a.State != kmip.StatePreActive || a.Names[0] != "op" || a.Text["x-Vendor"] != "Mortise" || len(a.Text) != 1 {
		t.Errorf("attributes %+v, %v", a, err)
	}
	if ids, err := c.Locate(ctx(t), "op", 5); err != nil || len(ids) != 1 || ids[0] != id {
		t.Errorf("located %v, %v", ids, err)
	}
	if err := c.Activate(ctx(t), id); err != nil || state(t, c, id) != kmip.StateActive {
		t.Error(err)
	}
	k, err := c.Get(ctx(t), id)
	if err != nil {
		t.Fatal(err)
	}
	k.Use(func(b []byte) {
		if !bytes.Equal(b, f.store.keys[id].material) {
			t.Error("another key came back")
		}
	})
	if n := f.connections(); n != 1 {
		t.Errorf("%d connections for requests one after the other", n)
	}
}

func TestConfigErrors(t *testing.T) {
	good := Endpoint{Name: "a", Address: "127.0.0.1:5696", Pins: make([][32]byte, 1)}
	cert := clientCert(t)
	for want, cfg := range map[string]Config{
		"at least one": {Certificate: cert},
		"client":       {Endpoints: []Endpoint{good}},
		"host:port":    {Endpoints: []Endpoint{{Name: "a", Address: "kms", Pins: good.Pins}}, Certificate: cert},
		"thumbprint":   {Endpoints: []Endpoint{{Name: "a", Address: good.Address}}, Certificate: cert},
		"two servers":  {Endpoints: []Endpoint{good, good}, Certificate: cert},
		"has no name":  {Endpoints: []Endpoint{{Address: good.Address, Pins: good.Pins}}, Certificate: cert},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestBadNamesAreNotSent(t *testing.T) {
	f := startFake(t, newStore())
	c := connect(t, nil, nil, f)
	for _, bad := range []string{"", "a\nb", "\x00", strings.Repeat("x", maxID+1), "\xff"} {
		_, e1 := c.Create(ctx(t), bad)
		_, e2 := c.Get(ctx(t), bad)
		_, e3 := c.Locate(ctx(t), bad, 1)
		_, e4 := c.GetAttributes(ctx(t), bad, "State")
		for i, err := range []error{e1, e2, e3, e4, c.Activate(ctx(t), bad), c.Revoke(ctx(t), bad, true), c.Destroy(ctx(t), bad), c.AddAttribute(ctx(t), bad, "x-a", "b")} {
			if err == nil {
				t.Errorf("%d: %q was accepted", i, bad)
			}
		}
	}
	if n := f.connections(); n != 0 {
		t.Errorf("%d connections were made", n)
	}
}

func TestPin(t *testing.T) {
	f := startFake(t, newStore())
	c := connect(t, nil, func(cfg *Config) { cfg.Endpoints[0].Pins = [][32]byte{{1}} }, f)
	_, err := c.Query(ctx(t))
	var changed *CertificateError
	if !errors.Is(err, ErrCertificateChanged) || !errors.As(err, &changed) || !changed.Certificate.Equal(f.cert) || !strings.Contains(err.Error(), pki.Thumbprint(f.cert)) {
		t.Errorf("%v", err)
	}
	if n := f.count(kmip.OperationDiscoverVersions); n != 0 {
		t.Errorf("an unconfirmed server was sent %d requests", n)
	}
	st := c.Servers()[0].Status(ctx(t))
	if st.Reachable || !st.Certificate.Equal(f.cert) || !errors.Is(st.Err, ErrCertificateChanged) {
		t.Errorf("status %+v", st)
	}
	// While a server renews its certificate both are pinned.
	c = connect(t, nil, func(cfg *Config) {
		cfg.Endpoints[0].Pins = append([][32]byte{{1}}, cfg.Endpoints[0].Pins...)
	}, f)
	if _, err := c.Query(ctx(t)); err != nil {
		t.Error(err)
	}
}

func TestClientRefused(t *testing.T) {
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		f := startFake(t, newStore())
		f.set(func() { f.tlsMax, f.admit = v, f.cert })
		c := connect(t, nil, nil, f)
		if _, err := c.Query(ctx(t)); !errors.Is(err, ErrRefused) {
			t.Errorf("TLS %x: %v, want ErrRefused", v, err)
		}
		f.set(func() { f.admit = c.cfg.Certificate.Leaf })
		if _, err := c.Query(ctx(t)); err != nil {
			t.Errorf("TLS %x: after it was registered: %v", v, err)
		}
	}
}

func TestVersions(t *testing.T) {
	v := func(minor ...int32) (list []kmip.ProtocolVersion) {
		for _, m := range minor {
			list = append(list, kmip.ProtocolVersion{ProtocolVersionMajor: 1, ProtocolVersionMinor: m})
		}
		return list
	}
	for _, c := range []struct {
		name   string
		server []kmip.ProtocolVersion
		want   string
	}{
		{"lists the lowest first", v(0, 1, 2, 3), "1.3"},
		{"all", v(4, 3, 2, 1, 0), "1.4"},
		{"1.1 only", v(1), "1.1"},
		{"1.4 only", v(4), "1.4"},
		{"2.0 too", append([]kmip.ProtocolVersion{{ProtocolVersionMajor: 2}}, v(4, 1)...), "1.4"},
		{"2.0 only", []kmip.ProtocolVersion{{ProtocolVersionMajor: 2}}, ""},
		{"1.0 only", v(0), ""},
	} {
		f := startFake(t, newStore())
		f.set(func() { f.versions = c.server })
		cl := connect(t, nil, nil, f)
		st := cl.Servers()[0].Status(ctx(t))
		if st.Version != c.want || (c.want == "") != (st.Err != nil) {
			t.Errorf("%s: version %q, %v", c.name, st.Version, st.Err)
		}
		if c.want != "" {
			create(t, cl, "works in it")
		}
	}
}

func TestConnectionLimit(t *testing.T) {
	f := startFake(t, newStore())
	c := connect(t, nil, func(cfg *Config) { cfg.MaxConnections, cfg.MaxIdle = 3, 2 }, f)
	id := create(t, c, "x")
	var most int
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			if _, err := c.Get(ctx(t), id); err != nil {
				t.Error(err)
			}
			f.mu.Lock()
			most = max(most, len(f.conns))
			f.mu.Unlock()
		})
	}
	wg.Wait()
	if most > 3+2 { // those in use, and closed ones that the server has not noticed
		t.Errorf("%d connections at once", most)
	}
	s := c.Servers()[0]
	s.mu.Lock()
	if n := len(s.idle); n > 2 {
		t.Errorf("%d idle connections are kept", n)
	}
	s.mu.Unlock()
	// A request that waits for a connection ends with its context.
	for range cap(s.slots) {
		s.slots <- struct{}{}
	}
	canceled, cancel := context.WithCancel(ctx(t))
	cancel()
	if _, err := c.Get(canceled, id); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestWrongKeys: a server that returns something other than the AES-256 key
// that was asked for, and no byte of it in the error.
func TestWrongKeys(t *testing.T) {
	f := startFake(t, newStore())
	c := connect(t, nil, nil, f)
	id := create(t, c, "x")
	f.store.mu.Lock()
	f.store.keys[id].material = []byte("sixteen byte key")
	f.store.mu.Unlock()
	_, err := c.Get(ctx(t), id)
	if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "128 bits") {
		t.Errorf("a key of 16 bytes: %v", err)
	}
	if strings.Contains(err.Error(), "sixteen") || strings.Contains(err.Error(), fmt.Sprintf("%x", "sixteen")) {
		t.Errorf("key bytes in %v", err)
	}
}

func TestFetchServerCertificateErrors(t *testing.T) {
	if _, _, err := FetchServerCertificate(ctx(t), "kms"); err == nil || !strings.Contains(err.Error(), "host:port") {
		t.Errorf("%v", err)
	}
	if _, _, err := FetchServerCertificate(ctx(t), "127.0.0.1:1"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("%v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Write([]byte("220 smtp.example\r\n"))
			c.Close()
		}
	}()
	if _, _, err := FetchServerCertificate(ctx(t), l.Addr().String()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "KMIP port") {
		t.Errorf("%v", err)
	}
	// A server that refuses us shows its certificate all the same.
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		f := startFake(t, newStore())
		f.set(func() { f.tlsMax, f.admit = v, f.cert })
		chain, _, err := FetchServerCertificate(ctx(t), f.l.Addr().String())
		if err != nil || !chain[0].Equal(f.cert) {
			t.Errorf("TLS %x: %v", v, err)
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *lockedBuffer) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }
