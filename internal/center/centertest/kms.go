// Package centertest has what tests of center, and of what stands on it, need
// around it: a real KMS in this process, and hosts that are the real thing made
// small. It is imported by tests only.
package centertest

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/center"
	"mortise/internal/kmipc"
	"mortise/internal/kms"
	"mortise/internal/kms/kmipd"
	"mortise/internal/pki"
	"mortise/internal/provider"
	"mortise/internal/provider/standard"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// RootKey makes a root key, sealed in a file in dir, or opens the one there.
func RootKey(t testing.TB, dir string) *rootkey.Key {
	t.Helper()
	pass, err := secret.Copy([]byte("a passphrase for tests"))
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Wipe()
	path := filepath.Join(dir, "root.key")
	root, err := rootkey.Open(path, pass)
	if err != nil {
		root, err = rootkey.Create(path, pass, 2)
	}
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// OpenProvider is what cmd gives a center to open key providers with.
func OpenProvider(cfg center.ProviderConfig) (provider.Provider, error) {
	k := kmipc.Config{Certificate: cfg.Certificate, HandshakeTimeout: 5 * time.Second, RequestTimeout: 5 * time.Second}
	for _, s := range cfg.Servers {
		k.Endpoints = append(k.Endpoints, kmipc.Endpoint{Name: s.Name, Address: s.Address, Pins: s.Pins})
	}
	return standard.New(standard.Config{ID: cfg.ID, Version: "test", KMIP: k})
}

// KMS is our KMS with its KMIP front, on loopback.
type KMS struct {
	Address string // of the listener, host:port, also while it is stopped
	Port    int32

	t     testing.TB
	kms   *kms.KMS
	creds *pki.Credentials
	admin *kms.Session
	stop  context.CancelFunc
	ended chan error
}

// StartKMS starts a KMS without clients.
func StartKMS(t testing.TB) *KMS {
	t.Helper()
	dir := t.TempDir()
	ring, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	k := &KMS{t: t, Address: "127.0.0.1:0"}
	if k.kms, err = kms.Open(context.Background(), s, kms.Options{Logger: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	if err := k.kms.Unlock(context.Background(), ring); err != nil {
		t.Fatal(err)
	}
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Server: true, Hosts: []string{"127.0.0.1"}, Life: 365 * 24 * time.Hour}, "kms", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if k.creds, err = pki.NewCredentials([]*x509.Certificate{cert}, key); err != nil {
		t.Fatal(err)
	}
	k.Start()
	t.Cleanup(func() {
		k.Stop()
		s.Close()
		k.kms.Close()
		ring.Close()
	})
	return k
}

// Start lets the KMS serve again, at its address.
func (k *KMS) Start() {
	k.t.Helper()
	l, err := net.Listen("tcp", k.Address)
	if err != nil {
		k.t.Fatal(err)
	}
	k.Address, k.Port = l.Addr().String(), int32(l.Addr().(*net.TCPAddr).Port)
	ctx, stop := context.WithCancel(context.Background())
	k.stop, k.ended = stop, make(chan error, 1)
	go func() {
		k.ended <- kmipd.Serve(ctx, l, k.kms, kmipd.Options{Credentials: k.creds, DrainTimeout: time.Second})
	}()
}

// Stop makes the KMS unreachable.
func (k *KMS) Stop() {
	if k.stop != nil {
		k.stop()
		<-k.ended
		k.stop = nil
	}
}

// Trust lets the holder of a client certificate, PEM, in.
func (k *KMS) Trust(certPEM string) {
	k.t.Helper()
	chain, err := pki.ParseCertificates([]byte(certPEM))
	if err != nil {
		k.t.Fatal(err)
	}
	if _, err := k.kms.AddClient(context.Background(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Name: "center", Certificate: chain[0]}); err != nil {
		k.t.Fatal(err)
	}
}

// Certificate is the KMS's own, PEM.
func (k *KMS) Certificate() string { return string(pki.EncodeCertificates(k.creds.Leaf())) }

// session is an administrator's, under a client certificate of its own.
func (k *KMS) session() *kms.Session {
	k.t.Helper()
	if k.admin != nil {
		return k.admin
	}
	cert, _, err := pki.NewKMIPClient(time.Hour, time.Now())
	if err != nil {
		k.t.Fatal(err)
	}
	if _, err := k.kms.AddClient(context.Background(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Name: "administrator", Certificate: cert, Role: kms.RoleAdministrator}); err != nil {
		k.t.Fatal(err)
	}
	s, err := k.kms.Session(context.Background(), kms.DefaultInstance, cert, "")
	if err != nil {
		k.t.Fatal(err)
	}
	k.admin = s
	return s
}

// Revoke makes a key Deactivated, as the KMS's administrator does.
func (k *KMS) Revoke(id string) {
	k.t.Helper()
	if err := k.session().Revoke(context.Background(), id, kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeCessationOfOperation}, time.Time{}); err != nil {
		k.t.Fatalf("revoking %s: %v", id, err)
	}
}

// Destroy destroys a key.
func (k *KMS) Destroy(id string) {
	k.t.Helper()
	k.Revoke(id)
	if err := k.session().Destroy(context.Background(), id); err != nil {
		k.t.Fatalf("destroying %s: %v", id, err)
	}
}

// Bytes returns a key's bytes.
func (k *KMS) Bytes(id string) []byte {
	k.t.Helper()
	m, err := k.session().Get(context.Background(), id)
	if err != nil {
		k.t.Fatalf("getting %s: %v", id, err)
	}
	var b []byte
	m.Bytes.Use(func(key []byte) { b = append(b, key...) })
	m.Bytes.Wipe()
	return b
}

// Keys counts the keys in the KMS, and lists their ids.
func (k *KMS) Keys() []string {
	k.t.Helper()
	ids, _, err := k.session().Locate(context.Background(), kms.Query{})
	if err != nil {
		k.t.Fatal(err)
	}
	return ids
}
