package admin

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// bed is a KMS with its API on a socket and, by https, over the network.
type bed struct {
	*kms.KMS
	t      testing.TB
	api    *Server
	socket *Client
	path   string // of the socket
	clock  *clock
	stop   func()
}

type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.at }
func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func start(t testing.TB) *bed {
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
	b := &bed{t: t, clock: &clock{at: time.Now()}}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	if b.KMS, err = kms.Open(t.Context(), s, kms.Options{Logger: log, Now: b.clock.now}); err != nil {
		t.Fatal(err)
	}
	if err := b.Unlock(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	b.api = New(Options{KMS: b.KMS, Logger: log, Now: b.clock.now, Version: "test"})
	sockets, err := os.MkdirTemp("", "mtka") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	b.path = filepath.Join(sockets, "admin.sock")
	l, err := Listen(b.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- b.api.ServeSocket(ctx, l) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("ServeSocket: %v", err)
		}
	})
	b.socket = DialSocket(b.path)
	t.Cleanup(func() { b.stop(); b.Close(); s.Close(); root.Close(); os.RemoveAll(sockets) })
	return b
}

func certificate(t testing.TB, life time.Duration, now time.Time) *x509.Certificate {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Life: life}, "kmipClient20161127094708", now)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func pemOf(cert *x509.Certificate) string { return string(pki.EncodeCertificates(cert)) }

func second[T any](_ T, err error) error { return err }

// TestClients drives the admin socket as the command line does: add, list,
// remove, and what each does to a session, at once (S3).
func TestClients(t *testing.T) {
	b, ctx := start(t), t.Context()
	if st, err := os.Stat(b.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode: %v, %v", st, err)
	}
	if _, err := Listen(b.path); err == nil {
		t.Error("a second process took the socket")
	}
	cert := certificate(t, time.Hour, b.clock.now())
	if _, err := b.Session(ctx, kms.DefaultInstance, cert, ""); !errors.Is(err, kms.ErrUnknownClient) {
		t.Fatalf("before it is added: %v", err)
	}
	c, err := b.socket.AddClient(ctx, kms.DefaultInstance, AddClient{Name: "vc1", Certificate: pemOf(cert)})
	if err != nil || c.Name != "vc1" || len(c.Fingerprint) != 64 || c.Role != kms.RoleKeyManager {
		t.Fatalf("add: %+v, %v", c, err)
	}
	if s, err := b.Session(ctx, kms.DefaultInstance, cert, "192.0.2.1:4"); err != nil || s.Name != "vc1" || s.From != "192.0.2.1:4" || s.Role != kms.RoleKeyManager {
		t.Errorf("after it is added: %+v, %v", s.Actor, err)
	}
	if _, err := b.Session(ctx, "other", cert, ""); !errors.Is(err, kms.ErrUnknownInstance) {
		t.Errorf("of another instance: %v", err)
	}
	list, err := b.socket.Clients(ctx, kms.DefaultInstance)
	if err != nil || len(list) != 1 || list[0].Fingerprint != c.Fingerprint || !list[0].NotAfter.Equal(cert.NotAfter) {
		t.Errorf("list: %+v, %v", list, err)
	}
	for _, which := range []string{"vc1", c.Fingerprint, c.Fingerprint[:8], pki.Thumbprint(cert)} {
		if one, err := b.socket.Client(ctx, kms.DefaultInstance, which); err != nil || one.Fingerprint != c.Fingerprint {
			t.Errorf("by %q: %+v, %v", which, one, err)
		}
	}
	fresh := pemOf(certificate(t, time.Hour, b.clock.now()))
	add := func(instance, text string) error {
		return second(b.socket.AddClient(ctx, instance, AddClient{Certificate: text}))
	}
	for _, c := range []struct {
		name   string
		err    error
		status int
		words  string
	}{
		{"known", add(kms.DefaultInstance, pemOf(cert)), http.StatusConflict, "known already"},
		{"no PEM", add(kms.DefaultInstance, "hello"), http.StatusBadRequest, "no certificate"},
		{"private key", add(kms.DefaultInstance, fresh+"-----BEGIN PRIVATE KEY-----\n"), http.StatusBadRequest, "private key"},
		{"bad DER", add(kms.DefaultInstance, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), http.StatusBadRequest, "malformed"},
		{"no instance", add("other", fresh), http.StatusNotFound, "no such instance"},
		{"expired", add(kms.DefaultInstance, pemOf(certificate(t, time.Hour, b.clock.now().Add(-48*time.Hour)))), http.StatusBadRequest, "outside its validity"},
		{"role", second(b.socket.AddClient(ctx, kms.DefaultInstance, AddClient{Certificate: fresh, Role: "root"})), http.StatusBadRequest, "no role"},
		{"label", second(b.socket.AddClient(ctx, kms.DefaultInstance, AddClient{Certificate: fresh, Name: "a\x1b[2J"})), http.StatusBadRequest, "control characters"},
		{"no fingerprint", second(b.socket.RemoveClient(ctx, kms.DefaultInstance, "12:34")), http.StatusNotFound, "neither a fingerprint"},
		{"not known", second(b.socket.RemoveClient(ctx, kms.DefaultInstance, strings.Repeat("ab", 32))), http.StatusNotFound, "not known"},
	} {
		var e *Error
		if !errors.As(c.err, &e) || e.Status != c.status || !strings.Contains(e.Message, c.words) {
			t.Errorf("%s: %v (%+v), want %d with %q", c.name, c.err, e, c.status, c.words)
		}
	}
	b.clock.pass(2 * time.Hour)
	if _, err := b.Session(ctx, kms.DefaultInstance, cert, ""); !errors.Is(err, kms.ErrExpired) {
		t.Errorf("after its expiry: %v", err)
	}
	if cert = certificate(t, time.Hour, b.clock.now()); second(b.socket.AddClient(ctx, kms.DefaultInstance, AddClient{Certificate: pemOf(cert)})) != nil {
		t.Error("a certificate with the name of an expired one was refused")
	}
	session, err := b.Session(ctx, kms.DefaultInstance, cert, "")
	if err != nil || session.Begin(kmip.OperationGet) != nil {
		t.Errorf("before it is removed: %v", err)
	}
	if _, err := b.socket.RemoveClient(ctx, kms.DefaultInstance, pki.Thumbprint(cert)); err != nil {
		t.Errorf("remove: %v", err)
	}
	if _, err := b.Session(ctx, kms.DefaultInstance, cert, ""); !errors.Is(err, kms.ErrUnknownClient) {
		t.Errorf("after it is removed: %v", err)
	}
	b.stop()
	if _, err := b.socket.Clients(ctx, kms.DefaultInstance); err == nil || !strings.Contains(err.Error(), b.path) {
		t.Errorf("calling a socket that nobody serves: %v", err)
	}
	l, err := Listen(b.path) // a stale socket is replaced
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
