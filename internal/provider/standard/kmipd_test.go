package standard

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"mortise/internal/kmipc"
	"mortise/internal/kms"
	"mortise/internal/kms/kmipd"
	"mortise/internal/pki"
	"mortise/internal/provider"
	"mortise/internal/provider/providertest"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// ours is our KMS in this process, with KMIP listeners that a test may stop.
type ours struct {
	kms         *kms.KMS
	credentials *pki.Credentials
	fronts      []*front
}

type front struct {
	address string
	cancel  context.CancelFunc
	ended   chan error
}

// startOurs runs a KMS that knows the client of cfg, to which it adds its
// endpoints.
func startOurs(t testing.TB, endpoints int, cfg *kmipc.Config) *ours {
	t.Helper()
	dir := t.TempDir()
	root, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	k, err := kms.Open(context.Background(), s, kms.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(context.Background(), root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); k.Close(); root.Close() })               // until it is closed the store unseals what it watches
	cfg.Certificate = pair(t, pki.Grant{}, pki.KMIPClientName(time.Now())) // no extended key usage, as S3 allows
	if _, err := k.AddClient(context.Background(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: cfg.Certificate.Leaf, Role: kms.RoleAdministrator}); err != nil {
		t.Fatal(err)
	}
	server := pair(t, pki.Grant{Server: true}, "kms")
	credentials, err := pki.NewCredentials([]*x509.Certificate{server.Leaf}, server.PrivateKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	o := &ours{kms: k, credentials: credentials}
	for i := range endpoints {
		f := &front{address: "127.0.0.1:0"}
		o.serve(t, f)
		o.fronts = append(o.fronts, f)
		t.Cleanup(f.stop)
		cfg.Endpoints = append(cfg.Endpoints, kmipc.Endpoint{
			Name: fmt.Sprintf("kms-%d", i+1), Address: f.address, Pins: [][sha256.Size]byte{pki.Fingerprint(server.Leaf)},
		})
	}
	return o
}

func (o *ours) serve(t testing.TB, f *front) {
	t.Helper()
	l, err := net.Listen("tcp", f.address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.address, f.cancel, f.ended = l.Addr().String(), cancel, make(chan error, 1)
	ended := f.ended
	go func() { ended <- kmipd.Serve(ctx, l, o.kms, kmipd.Options{Credentials: o.credentials}) }()
}

func (f *front) stop() {
	if f.cancel != nil {
		f.cancel()
		<-f.ended
		f.cancel = nil
	}
}

func TestConformanceKMIPD(t *testing.T) {
	t.Parallel()
	var cfg kmipc.Config
	o := startOurs(t, 2, &cfg)
	h := providertest.Harness{
		UniqueNames: true,
		Stop: func(t *testing.T) {
			for _, f := range o.fronts {
				f.stop()
			}
		},
		Start: func(t *testing.T) {
			for _, f := range o.fronts {
				o.serve(t, f)
			}
		},
	}
	admin := administer(t, cfg, &h)
	h.Tags = func(t *testing.T, id string) map[string]string {
		a, err := admin.GetAttributes(within(t), id, "x-Vendor", "x-Product", "x-Product_Version", "x-Identifier", "x-Component")
		if err != nil {
			t.Fatal(err)
		}
		return a.Text
	}
	providertest.Run(t, h)
}

// TestRemovedClient: what the administrator takes away at the KMS is gone at
// once, on connections that center keeps too (S3).
func TestRemovedClient(t *testing.T) {
	t.Parallel()
	var cfg kmipc.Config
	o := startOurs(t, 1, &cfg)
	p := newProvider(t, cfg)
	id, kek, err := p.NewKEK(within(t), "op")
	if err != nil {
		t.Fatal(err)
	}
	kek.Wipe()
	fingerprint := fmt.Sprintf("%x", pki.Fingerprint(cfg.Certificate.Leaf))
	if _, err := o.kms.RemoveClient(within(t), kms.Actor{}, kms.DefaultInstance, fingerprint); err != nil {
		t.Fatal(err)
	}
	for range 2 { // on the kept connection, and on a fresh one
		if _, _, err := p.KEK(within(t), id); !errors.Is(err, provider.ErrRefused) {
			t.Errorf("%v, want ErrRefused", err)
		}
	}
	if st := p.Status(within(t)); st.Usable() || st.Servers[0].ClientTrusted || !st.Servers[0].ServerTrusted {
		t.Errorf("status %+v", st)
	}
}

// TestRenewedServerCertificate: the KMS renews its certificate under center's
// feet. Until an administrator confirms the new one, nothing is sent to it.
func TestRenewedServerCertificate(t *testing.T) {
	t.Parallel()
	var cfg kmipc.Config
	o := startOurs(t, 1, &cfg)
	fresh := pair(t, pki.Grant{Server: true}, "kms")
	if err := o.credentials.Replace([]*x509.Certificate{fresh.Leaf}, fresh.PrivateKey.(crypto.Signer)); err != nil {
		t.Fatal(err)
	}
	p := newProvider(t, cfg)
	_, _, err := p.NewKEK(within(t), "op")
	if !errors.Is(err, provider.ErrUntrusted) || !strings.Contains(err.Error(), pki.Thumbprint(fresh.Leaf)) {
		t.Errorf("%v", err)
	}
	st := p.Status(within(t)).Servers[0]
	if st.Reachable || st.ServerTrusted || st.Thumbprint != pki.Thumbprint(fresh.Leaf) || st.Expires.IsZero() {
		t.Errorf("status %+v", st)
	}
	cfg.Endpoints[0].Pins = append(cfg.Endpoints[0].Pins, pki.Fingerprint(fresh.Leaf))
	if _, _, err := newProvider(t, cfg).NewKEK(within(t), "op"); err != nil {
		t.Errorf("after it was confirmed: %v", err)
	}
}

// TestExpiredClient: an expired client certificate is refused, and the status
// says when it ended (K13).
func TestExpiredClient(t *testing.T) {
	t.Parallel()
	var cfg kmipc.Config
	o := startOurs(t, 1, &cfg)
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	old, err := pki.SelfSigned(key, pki.Grant{Client: true, Life: time.Hour}, "kmipClient", time.Now().Add(-2*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.kms.AddClient(within(t), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: old}); err == nil {
		t.Error("the KMS took an expired certificate")
	}
	cfg.Certificate.Certificate, cfg.Certificate.PrivateKey, cfg.Certificate.Leaf = [][]byte{old.Raw}, key, old
	p := newProvider(t, cfg)
	if _, _, err := p.NewKEK(within(t), "op"); !errors.Is(err, provider.ErrRefused) {
		t.Errorf("%v, want ErrRefused", err)
	}
	if st := p.Status(within(t)).Servers[0]; !st.ClientCertExpires.Equal(old.NotAfter) || st.ClientTrusted {
		t.Errorf("status %+v", st)
	}
}

func BenchmarkNewKEK(b *testing.B) {
	var cfg kmipc.Config
	startOurs(b, 1, &cfg)
	p := newProvider(b, cfg)
	b.SetParallelism(8)
	var n atomic.Int64
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			_, kek, err := p.NewKEK(context.Background(), fmt.Sprint("op-", n.Add(1)))
			if err != nil {
				b.Error(err)
				return
			}
			kek.Wipe()
		}
	})
}

func BenchmarkKEK(b *testing.B) {
	var cfg kmipc.Config
	startOurs(b, 1, &cfg)
	p := newProvider(b, cfg)
	id, kek, err := p.NewKEK(context.Background(), "op")
	if err != nil {
		b.Fatal(err)
	}
	kek.Wipe()
	b.SetParallelism(8)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			kek, _, err := p.KEK(context.Background(), id)
			if err != nil {
				b.Error(err)
				return
			}
			kek.Wipe()
		}
	})
}
