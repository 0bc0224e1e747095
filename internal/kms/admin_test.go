package kms

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mortise/internal/pki"
)

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

// TestClients drives the admin socket as the command line does: add, list,
// remove, and what each does to a session, at once (S3).
func TestClients(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	socket := filepath.Join(dir, "admin.sock")
	l, err := ListenAdmin(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- f.ServeAdmin(ctx, l) }()
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode: %v, %v", st, err)
	}
	if _, err := ListenAdmin(socket); err == nil {
		t.Error("a second process took the socket")
	}
	admin := DialAdmin(socket)
	cert := certificate(t, time.Hour, f.clock.now())
	text := pki.EncodeCertificates(cert)

	if _, err := f.Session(ctx, DefaultInstance, cert, ""); !errors.Is(err, ErrUnknownClient) {
		t.Fatalf("before it is added: %v", err)
	}
	c, err := admin.AddClient(ctx, DefaultInstance, "vc1", text)
	if err != nil || c.Name != "vc1" || len(c.Fingerprint) != 64 {
		t.Fatalf("add: %+v, %v", c, err)
	}
	if s, err := f.Session(ctx, DefaultInstance, cert, ""); err != nil || s.Name != "vc1" {
		t.Errorf("after it is added: %v", err)
	}
	if _, err := f.Session(ctx, "other", cert, ""); !errors.Is(err, ErrUnknownInstance) {
		t.Errorf("of another instance: %v", err)
	}
	list, err := admin.Clients(ctx, DefaultInstance)
	if err != nil || len(list) != 1 || list[0].Fingerprint != c.Fingerprint || !list[0].NotAfter.Equal(cert.NotAfter) {
		t.Errorf("list: %+v, %v", list, err)
	}
	for what, err := range map[string]error{
		"known already": second(admin.AddClient(ctx, DefaultInstance, "", text)),
		"no PEM":        second(admin.AddClient(ctx, DefaultInstance, "", []byte("hello"))),
		"private key":   second(admin.AddClient(ctx, DefaultInstance, "", append(text, "-----BEGIN PRIVATE KEY-----\n"...))),
		"bad DER":       second(admin.AddClient(ctx, DefaultInstance, "", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))),
		"no such instance": second(admin.AddClient(ctx, "other", "",
			pki.EncodeCertificates(certificate(t, time.Hour, f.clock.now())))),
		"outside its validity": second(admin.AddClient(ctx, DefaultInstance, "",
			pki.EncodeCertificates(certificate(t, time.Hour, f.clock.now().Add(-48*time.Hour))))),
		"no SHA-256": admin.RemoveClient(ctx, DefaultInstance, "12:34"),
		"not known":  admin.RemoveClient(ctx, DefaultInstance, strings.Repeat("ab", 32)),
	} {
		words := map[string]string{"private key": "private key", "bad DER": "reading the certificate"}[what]
		if words == "" {
			words = what
		}
		if err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", what, err)
		}
	}
	f.clock.pass(2 * time.Hour)
	if _, err := f.Session(ctx, DefaultInstance, cert, ""); !errors.Is(err, ErrExpired) {
		t.Errorf("after its expiry: %v", err)
	}
	f.clock.pass(-2 * time.Hour)
	if err := admin.RemoveClient(ctx, DefaultInstance, pki.Thumbprint(cert)); err != nil {
		t.Errorf("remove: %v", err)
	}
	if _, err := f.Session(ctx, DefaultInstance, cert, ""); !errors.Is(err, ErrUnknownClient) {
		t.Errorf("after it is removed: %v", err)
	}
	stop()
	if err := <-served; err != nil {
		t.Errorf("ServeAdmin: %v", err)
	}
	if _, err := admin.Clients(t.Context(), DefaultInstance); err == nil || !strings.Contains(err.Error(), socket) {
		t.Errorf("calling a socket that nobody serves: %v", err)
	}
	l, err = ListenAdmin(socket) // a stale socket is replaced
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func second[T any](_ T, err error) error { return err }
