package store

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// group is a cluster in one process, with the TLS front that kms/cluster has in
// earnest reduced to a pipe that can be cut.
type group struct {
	t   testing.TB
	dir string
}

type peerFront struct {
	net.Listener
	mu    sync.Mutex
	conns map[net.Conn]struct{}
	cut   bool
}

func newGroup(t testing.TB) *group {
	g := &group{t: t, dir: t.TempDir()}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{PeerHost},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...)
	err = errors.Join(os.WriteFile(g.pem(), text, 0o600), os.WriteFile(g.ca(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *group) pem() string { return filepath.Join(g.dir, "peer.pem") }

func (g *group) ca() string { return filepath.Join(g.dir, "ca.pem") }

// front listens for a member and pipes to its socket.
func (g *group) front(name string) *peerFront {
	g.t.Helper()
	pair, err := tls.LoadX509KeyPair(g.pem(), g.pem())
	if err != nil {
		g.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.t.Fatal(err)
	}
	f := &peerFront{Listener: l, conns: map[net.Conn]struct{}{}}
	g.t.Cleanup(func() { l.Close(); f.set(true) })
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				c := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})
				f.mu.Lock()
				if f.cut {
					raw.Close()
				}
				f.conns[raw] = struct{}{}
				f.mu.Unlock()
				defer raw.Close()
				to, err := DialPeer(g.t.Context(), g.socket(name))
				if err != nil {
					return
				}
				defer to.Close()
				go func() { io.Copy(c, to); c.Close() }()
				io.Copy(to, c)
			}()
		}
	}()
	return f
}

func (f *peerFront) set(cut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut = cut
	for c := range f.conns {
		c.Close()
		delete(f.conns, c)
	}
}

func (f *peerFront) url() string { return "https://" + f.Addr().String() }

func (g *group) socket(name string) string { return filepath.Join(g.dir, name+".sock") }

func (g *group) config(name string, f *peerFront, join map[string]string) Config {
	return Config{Dir: filepath.Join(g.dir, name), Name: name,
		Logger: slog.New(slog.NewTextHandler(g.t.Output(), &slog.HandlerOptions{Level: slog.LevelError})).With("member", name),
		Peers:  &Peers{URL: f.url(), Socket: g.socket(name), Certificate: g.pem(), CA: g.ca(), Join: join}}
}

func (g *group) open(cfg Config) *Store {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, cfg)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { s.Close() })
	return s
}

// join adds a member through old and promotes it.
func (g *group) join(old *Store, name string) (*Store, *peerFront) {
	g.t.Helper()
	f := g.front(name)
	var all []Member
	var m Member
	g.retry(func() (err error) {
		m, all, err = old.AddLearner(g.t.Context(), f.url())
		return err
	})
	urls := map[string]string{}
	for _, x := range all {
		if x.ID == m.ID {
			x.Name = name
		}
		urls[x.Name] = x.URL
	}
	s := g.open(g.config(name, f, urls))
	if !s.Learner() {
		g.t.Errorf("%s votes before it has caught up", name)
	}
	g.retry(func() error { return old.Promote(g.t.Context(), m.ID) })
	return s, f
}

func (g *group) retry(f func() error) {
	g.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if _, again := RetryMembership(err); !again || time.Now().After(end) {
			g.t.Fatal(err)
		}
	}
}

// TestMembers grows a cluster of one to three while it works, cuts members off,
// replaces one, and shrinks again. Every acknowledged write is there at the end.
func TestMembers(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	fa := g.front("a")
	a := g.open(g.config("a", fa, nil))
	ctx := t.Context()
	vms := collection(t, a, "vm", JSON[vm](1))
	var acked atomic.Int64
	stopWriting := make(chan struct{})
	written := make(chan struct{})
	var b, c *Store
	go func() { // writes never fail while members come
		defer close(written)
		for i := range 1 << 20 {
			select {
			case <-stopWriting:
				return
			default:
			}
			if _, err := a.Commit(ctx, vms.Create(fmt.Sprintf("growing-%d", i), vm{Rev: i})); err != nil {
				t.Errorf("a write failed while members joined: %v", err)
				return
			}
			acked.Add(1)
			time.Sleep(time.Millisecond)
		}
	}()
	b, fb := g.join(a, "b")
	c, _ = g.join(b, "c")
	close(stopWriting)
	<-written

	vmsB, vmsC := collection(t, b, "vm", JSON[vm](1)), collection(t, c, "vm", JSON[vm](1))
	for name, v := range map[string]*Collection[vm]{"a": vms, "b": vmsB, "c": vmsC} {
		if list, err := v.List(ctx, "growing-"); err != nil || int64(len(list)) != acked.Load() {
			t.Fatalf("%s has %d of %d records (%v)", name, len(list), acked.Load(), err)
		}
	}
	members, err := c.Members(ctx)
	if err != nil || len(members) != 3 || members[0].Name != "a" || members[2].Name != "c" || members[0].URL != fa.url() {
		t.Fatalf("members: %+v, %v", members, err)
	}
	if _, _, err := a.AddLearner(ctx, fb.url()); !errors.Is(err, ErrMemberExists) {
		t.Errorf("a second member at one address: %v", err)
	}

	// A write on one is seen by a read on another that begins after it.
	for i := range 50 {
		commit(t, b, vmsB.Put("turn", vm{Rev: i}))
		if e, err := vmsC.Get(ctx, "turn"); err != nil || e.Value.Rev != i {
			t.Fatalf("stale read on another member: %+v, %v", e, err)
		}
	}

	// The leader gives the lead away and is closed: writes go on.
	stores := map[uint64]*Store{}
	for _, s := range []*Store{a, b, c} {
		id, _ := s.ID()
		stores[id] = s
	}
	leader := stores[a.Leader()]
	lead, cluster := leader.ID()
	if err := leader.YieldLead(); err != nil {
		t.Fatal(err)
	}
	for leader.Leader() == lead {
		time.Sleep(10 * time.Millisecond)
	}
	commit(t, leader, collectionOf(leader, a, b, c, vms, vmsB, vmsC).Put("after-yield", vm{}))

	// Remove c for good: it notices, and its folder starts no more.
	cID, cCluster := c.ID()
	if cCluster != cluster {
		t.Error("members disagree on the cluster's id")
	}
	g.retry(func() error { return a.RemoveMember(ctx, cID) })
	select {
	case <-c.Stopped():
	case <-time.After(20 * time.Second):
		t.Error("a removed member goes on")
	}
	c.Close()
	short, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	cfg := g.config("c", g.front("c"), nil)
	if s, err := Open(short, cfg); err == nil {
		s.Close()
		t.Error("a removed member started again")
	} else if !errors.Is(err, ErrRemoved) {
		t.Errorf("a removed member: %v", err)
	}

	// b restarts, then is removed; a goes on alone.
	b.Close()
	b = g.open(g.config("b", g.front("b"), nil)) // elsewhere: the others learn its address
	g.retry(func() error {
		list, err := a.Members(ctx)
		if err == nil && (len(list) != 2 || list[1].URL == fb.url()) {
			return ErrUnavailable
		}
		return err
	})
	bID, _ := b.ID()
	g.retry(func() error {
		err := b.RemoveMember(ctx, bID)
		select {
		case <-b.Stopped(): // it may end before it hears that it is removed
			return nil
		default:
			return err
		}
	})
	g.retry(func() error { _, err := a.Commit(ctx, vms.Put("alone", vm{})); return err })
	aID, _ := a.ID()
	if err := a.RemoveMember(ctx, aID); !errors.Is(err, ErrLastMember) {
		t.Errorf("removing the last: %v", err)
	}
	if list, err := vms.List(ctx, "growing-"); err != nil || int64(len(list)) != acked.Load() {
		t.Errorf("at the end %d of %d records (%v)", len(list), acked.Load(), err)
	}
}

func collectionOf(s, a, b, c *Store, va, vb, vc *Collection[vm]) *Collection[vm] {
	switch s {
	case a:
		return va
	case b:
		return vb
	}
	return vc
}

// TestMinority: a member that is cut off refuses at once, neither serves old
// records nor keeps callers waiting, and is back by itself.
func TestMinority(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	fa := g.front("a")
	a := g.open(g.config("a", fa, nil))
	b, fb := g.join(a, "b")
	_, fc := g.join(b, "c")
	vms := collection(t, a, "vm", JSON[vm](1))
	commit(t, a, vms.Put("x", vm{}))
	fa.set(true)
	fb.set(true)
	fc.set(true)
	began := time.Now()
	for a.Led() {
		if time.Since(began) > 10*time.Second {
			t.Fatal("it does not notice")
		}
		time.Sleep(10 * time.Millisecond)
	}
	began = time.Now()
	for { // the one election that there may have been is waited for
		_, err := a.Commit(t.Context(), vms.Put("x", vm{Rev: 1}))
		if errors.Is(err, ErrUnavailable) && time.Since(began) > headlessAfter+time.Second {
			break
		}
		if err == nil || time.Since(began) > 4*headlessAfter {
			t.Fatalf("cut off for %v, a write: %v", time.Since(began), err)
		}
	}
	began = time.Now()
	_, err := vms.Get(t.Context(), "x")
	_, err2 := a.Commit(t.Context(), vms.Put("x", vm{Rev: 1}))
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err2, ErrUnavailable) || time.Since(began) > 100*time.Millisecond {
		t.Errorf("cut off: %v, %v, after %v", err, err2, time.Since(began))
	}
	fa.set(false)
	fb.set(false)
	fc.set(false)
	g.retry(func() error { _, err := a.Commit(t.Context(), vms.Put("x", vm{Rev: 2})); return err })
}

// TestElection: one holder at a time, and a term that is over writes nothing.
func TestElection(t *testing.T) {
	s := open(t, t.TempDir())
	vms := collection(t, s, "vm", JSON[vm](1))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var inside, terms atomic.Int32
	first := make(chan Term, 1)
	for range 3 {
		wg.Go(func() {
			s.Lead(ctx, "sweeper", func(ctx context.Context, term Term) error {
				if inside.Add(1) != 1 {
					t.Error("two hold one office")
				}
				defer inside.Add(-1)
				terms.Add(1)
				if _, err := s.Commit(ctx, vms.Put("by-term", vm{Rev: int(term.Revision)}), term.Guard()); err != nil && ctx.Err() == nil {
					t.Errorf("writing in office: %v", err)
				}
				select {
				case first <- term:
				default:
				}
				return nil // resigns
			})
		})
	}
	for terms.Load() < 3 {
		time.Sleep(10 * time.Millisecond)
	}
	old := <-first
	if _, err := s.Commit(t.Context(), vms.Put("by-term", vm{}), old.Guard()); err == nil {
		t.Error("a term that is over wrote")
	}
	if e, err := vms.Get(t.Context(), "by-term"); err != nil || int64(e.Value.Rev) < old.Revision {
		t.Errorf("terms do not grow: %+v, %v", e, err)
	}
	stop()
	wg.Wait()
}

// TestQuota: the quota is reached, writes are refused by name, and come back by
// themselves once history and deleted records can go.
func TestQuota(t *testing.T) {
	t.Parallel()
	s, err := Open(t.Context(), Config{Dir: t.TempDir(), Name: "m1", Quota: 24 << 20, tendEvery: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	vms := collection(t, s, "vm", JSON[vm](1))
	big := vm{Name: strings.Repeat("x", 1<<20)}
	ctx := t.Context()
	full := false
	for i := range 200 { // the same records over and over: history is what fills it
		if _, err := s.Commit(ctx, vms.Put(fmt.Sprint(i%4), big)); err != nil {
			if !errors.Is(err, ErrFull) {
				t.Fatalf("%v, want ErrFull", err)
			}
			full = true
			break
		}
	}
	if !full {
		t.Fatal("the quota was never reached")
	}
	if _, err := vms.Get(ctx, "1"); err != nil {
		t.Errorf("reading while it is full: %v", err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, err := s.Commit(ctx, vms.Put("after", vm{Rev: 1}))
		if err == nil {
			break
		}
		if !errors.Is(err, ErrFull) || time.Now().After(end) {
			t.Fatalf("writes are not back: %v", err)
		}
	}
	if sp, err := s.Space(ctx); err != nil || sp.Full || sp.Size > 16<<20 {
		t.Errorf("after recovery: %+v, %v", sp, err)
	}
}

// TestIdentity: a folder is one member of one cluster.
func TestIdentity(t *testing.T) {
	dirs := []string{t.TempDir(), t.TempDir()}
	ids := map[uint64]bool{}
	for _, dir := range dirs {
		s := open(t, dir)
		_, cluster := s.ID()
		ids[cluster] = true
		commit(t, s, collection(t, s, "vm", JSON[vm](1)).Put("a", vm{}))
		s.Close()
	}
	if len(ids) != 2 {
		t.Error("two new clusters have one id")
	}
	try := func(what, dir, name string) {
		t.Helper()
		s, err := Open(t.Context(), Config{Dir: dir, Name: name})
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, ErrIdentity) {
			t.Errorf("%s: %v", what, err)
		}
	}
	try("another name", dirs[0], "m2")
	aside := filepath.Join(t.TempDir(), "etcd")
	if err := os.Rename(filepath.Join(dirs[0], "etcd"), aside); err != nil {
		t.Fatal(err)
	}
	try("a member without its log", dirs[0], "m1")
	if err := os.Rename(filepath.Join(dirs[1], "etcd"), filepath.Join(dirs[0], "etcd")); err != nil {
		t.Fatal(err)
	}
	try("another cluster's database", dirs[0], "m1")
}

// TestSingle: the last of three goes on alone when it is told to.
func TestSingle(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.open(g.config("a", g.front("a"), nil))
	b, _ := g.join(a, "b")
	commit(t, a, collection(t, a, "vm", JSON[vm](1)).Put("kept", vm{Rev: 7}))
	if _, err := a.client.Get(t.Context(), "/vm/kept", clientv3.WithSerializable()); err != nil {
		t.Fatal(err)
	}
	b.Close()
	a.Close()
	cfg := g.config("a", g.front("a"), nil)
	cfg.Single = true
	a = g.open(cfg)
	if e, err := collection(t, a, "vm", JSON[vm](1)).Get(t.Context(), "kept"); err != nil || e.Value.Rev != 7 {
		t.Errorf("after going on alone: %+v, %v", e, err)
	}
	if list, err := a.Members(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("members: %+v, %v", list, err)
	}
	a.Close()
	if s, err := Open(t.Context(), cfg); err == nil {
		s.Close()
		t.Error("the order to go on alone was taken twice in a row")
	}
	cfg.Single = false
	g.open(cfg)
}
