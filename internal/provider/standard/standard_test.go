package standard

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/kmipc"
	"mortise/internal/kmipc/kmipctest"
	"mortise/internal/pki"
	"mortise/internal/provider"
	"mortise/internal/provider/providertest"
)

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// pair makes a self-signed certificate with its key.
func pair(t testing.TB, g pki.Grant, name string) tls.Certificate {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	g.Life = 24 * time.Hour
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

// pykmip starts servers, each on the database of that name: servers of one
// database share keys.
func pykmip(t testing.TB, databases ...string) ([]*kmipctest.Server, kmipc.Config) {
	t.Helper()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	client, server := pair(t, pki.Grant{Client: true}, "kmipClient"), pair(t, pki.Grant{Server: true}, "pykmip")
	if err := errors.Join(
		pki.SaveKeyPair(path("server.pem"), []*x509.Certificate{server.Leaf}, server.PrivateKey.(crypto.Signer)),
		pki.SaveCertificates(path("client.pem"), client.Leaf),
	); err != nil {
		t.Fatal(err)
	}
	cfg := kmipc.Config{Certificate: client}
	var servers []*kmipctest.Server
	for i, db := range databases {
		s := kmipctest.Start(t, kmipctest.Files{Certificate: path("server.pem"), Key: path("server.pem"), ClientCA: path("client.pem"), Database: path(db)})
		servers = append(servers, s)
		cfg.Endpoints = append(cfg.Endpoints, kmipc.Endpoint{
			Name: fmt.Sprintf("pykmip-%d", i+1), Address: s.Address, Pins: [][sha256.Size]byte{sha256.Sum256(server.Leaf.Raw)},
		})
	}
	return servers, cfg
}

func newProvider(t testing.TB, cfg kmipc.Config) *Provider {
	t.Helper()
	p, err := New(Config{ID: "provider-1", Version: "1.2.3", KMIP: cfg})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// administer gives a test what the key server's administrator has.
func administer(t testing.TB, cfg kmipc.Config, h *providertest.Harness) *kmipc.Client {
	t.Helper()
	admin, err := kmipc.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(admin.Close)
	h.New = func(t *testing.T) provider.Provider { return newProvider(t, cfg) }
	h.PreActive = func(t *testing.T) string {
		id, err := admin.Create(within(t), "made by somebody else")
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	h.Named = func(t *testing.T, operation string) int {
		ids, err := admin.Locate(within(t), operation, 100)
		if err != nil {
			t.Fatal(err)
		}
		return len(ids)
	}
	h.SetState = func(t *testing.T, id string, s provider.State) bool {
		compromised := s == provider.Compromised || s == provider.DestroyedCompromised
		if err := admin.Revoke(within(t), id, compromised); err != nil {
			t.Fatal(err)
		}
		if s == provider.Destroyed || s == provider.DestroyedCompromised {
			if err := admin.Destroy(within(t), id); err != nil {
				t.Fatal(err)
			}
			_, err := admin.GetAttributes(within(t), id, "State")
			return errors.Is(err, kmipc.ErrNotFound)
		}
		return false
	}
	return admin
}

func TestConformancePyKMIP(t *testing.T) {
	t.Parallel()
	servers, cfg := pykmip(t, "shared", "shared")
	h := providertest.Harness{
		Stop: func(t *testing.T) {
			for _, s := range servers {
				s.Stop(t)
			}
		},
		Start: func(t *testing.T) {
			for _, s := range servers {
				s.Start(t)
			}
		},
	}
	administer(t, cfg, &h)
	providertest.Run(t, h)
}

// TestFailover: with one of two servers away keys are made and fetched, and
// what needs all of them says which is missing.
func TestFailover(t *testing.T) {
	t.Parallel()
	servers, cfg := pykmip(t, "shared", "shared")
	p := newProvider(t, cfg)
	id, kek, err := p.NewKEK(within(t), "before")
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Wipe()
	servers[0].Stop(t)
	again, _, err := p.KEK(within(t), id)
	if err != nil || !again.Equal(kek) {
		t.Fatalf("KEK: %v", err)
	}
	if _, _, err := p.NewKEK(within(t), "meanwhile"); err != nil {
		t.Errorf("NewKEK: %v", err)
	}
	if id2, _, err := p.NewKEK(within(t), "before"); err != nil || id2 != id {
		t.Errorf("a resumed operation: key %s, not %s: %v", id2, id, err)
	}
	if err := p.ReadBack(within(t), id, kek); !errors.Is(err, provider.ErrUnreachable) || !strings.Contains(err.Error(), "pykmip-1") {
		t.Errorf("ReadBack: %v", err)
	}
	if err := p.TestSharing(within(t)); !errors.Is(err, provider.ErrUnreachable) || !strings.Contains(err.Error(), "pykmip-1") {
		t.Errorf("TestSharing: %v", err)
	}
	st := p.Status(within(t))
	if !st.Usable() || st.Servers[0].Reachable || !st.Servers[1].Reachable || st.Servers[0].ServerTrusted {
		t.Errorf("status %+v", st)
	}
}

func TestServersThatDoNotShare(t *testing.T) {
	t.Parallel()
	_, cfg := pykmip(t, "a", "b")
	p := newProvider(t, cfg)
	p.replication = 300 * time.Millisecond
	err := p.TestSharing(within(t))
	if !errors.Is(err, provider.ErrNotShared) || !strings.Contains(err.Error(), "pykmip-1") || !strings.Contains(err.Error(), "pykmip-2") {
		t.Errorf("%v", err)
	}
	// PyKMIP counts its keys, so one id means another key on each.
	id, kek, err := p.NewKEK(within(t), "op")
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Wipe()
	for {
		other, err := p.client.Servers()[1].Create(within(t), "other")
		if err != nil {
			t.Fatal(err)
		}
		if other == id {
			break
		}
	}
	if err := p.ReadBack(within(t), id, kek); !errors.Is(err, provider.ErrNotShared) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("ReadBack: %v", err)
	}
}

// lossy is a key server between which and us answers get lost, or which
// understands Locate differently.
type lossy struct {
	keys
	lose    int // so many answers to Create are lost
	before  bool
	junk    []string
	refuses bool
}

func (l *lossy) Create(ctx context.Context, name string) (string, error) {
	if l.lose > 0 {
		l.lose--
		if !l.before {
			if _, err := l.keys.Create(ctx, name); err != nil {
				return "", err
			}
		}
		return "", &kmipc.Error{Server: "lossy", Operation: "Create", Kind: kmipc.ErrOutcomeUnknown}
	}
	return l.keys.Create(ctx, name)
}

func (l *lossy) Locate(ctx context.Context, name string, max int) ([]string, error) {
	ids, err := l.keys.Locate(ctx, name, max)
	return append(ids, l.junk...), err
}

func (l *lossy) Activate(ctx context.Context, id string) error {
	if l.refuses {
		return &kmipc.Error{Server: "lossy", Operation: "Activate", Kind: kmipc.ErrDenied}
	}
	return l.keys.Activate(ctx, id)
}

func TestLostAnswers(t *testing.T) {
	t.Parallel()
	_, cfg := pykmip(t, "db")
	p := newProvider(t, cfg)
	pool := p.pool
	stranger, err := pool.Create(within(t), "another operation")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		l    lossy
		made int
		want error
	}{
		"made, answer lost":     {lossy{lose: 1}, 1, nil},
		"not made, answer lost": {lossy{lose: 1, before: true}, 1, nil},
		"not made, twice":       {lossy{lose: 2, before: true}, 0, provider.ErrUnreachable},
		"Locate ignores names":  {lossy{junk: []string{stranger, "no-such-key"}}, 1, nil},
		"never activates":       {lossy{refuses: true}, 1, provider.ErrRefused},
	} {
		t.Run(name, func(t *testing.T) {
			c.l.keys = pool
			p.pool = &c.l
			id, kek, err := p.NewKEK(within(t), name)
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			ids, lerr := pool.Locate(within(t), name, 10)
			if lerr != nil || len(ids) != c.made {
				t.Errorf("%d keys were made, want %d; %v", len(ids), c.made, lerr)
			}
			if err == nil {
				kek.Wipe()
				if !slices.Contains(ids, id) {
					t.Errorf("key %s is not one of %v", id, ids)
				}
			}
		})
	}
}

// TestSilentLog: what is logged and returned never shows a key.
func TestSilentLog(t *testing.T) {
	t.Parallel()
	_, cfg := pykmip(t, "db")
	var log lockedBuffer
	p, err := New(Config{ID: "p", Version: "1", KMIP: cfg, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	_, kek, err := p.NewKEK(within(t), "op")
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Wipe()
	if !strings.Contains(log.String(), "does not keep tags") { // PyKMIP has no AddAttribute
		t.Errorf("log:\n%s", log.String())
	}
	kek.Use(func(b []byte) {
		for _, form := range []string{string(b), fmt.Sprintf("%x", b), fmt.Sprint(b)} {
			if strings.Contains(log.String(), form) {
				t.Error("the key is in the log")
			}
		}
	})
}

func TestConfigErrors(t *testing.T) {
	for want, cfg := range map[string]Config{
		"name":                {},
		"provider-1":          {ID: "provider-1"},
		"at least one server": {ID: "provider-1"},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

var _ keys = (*kmipc.Server)(nil)

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
