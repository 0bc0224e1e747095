package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// part is one member in this process.
type part struct {
	t       testing.TB
	node    *Node
	store   *store.Store
	kms     *kms.KMS
	ring    *rootkey.Keyring
	options Options
	off     *offset
}

// offset is how wrong a member's clock is.
type offset struct {
	mu sync.Mutex
	by time.Duration
}

func (o *offset) set(d time.Duration) { o.mu.Lock(); defer o.mu.Unlock(); o.by = d }
func (o *offset) now() time.Time      { o.mu.Lock(); defer o.mu.Unlock(); return time.Now().Add(o.by) }

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func testLog(t testing.TB, name string) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo})).With("member", name)
}

const passphrase = "a passphrase of the test"

// begin starts a member as cmd/mortise does.
func begin(t testing.TB, o Options) (*part, error) {
	p := &part{t: t, off: &offset{}}
	o.Format, o.Version, o.every = max(o.Format, 1), "test", 200*time.Millisecond
	o.Logger = testLog(t, filepath.Base(o.Dir))
	p.options = o
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var err error
	if p.node, err = New(ctx, o); err != nil {
		return nil, err
	}
	if p.store, err = store.Open(ctx, store.Config{Dir: filepath.Join(o.Dir, "store"), Name: p.node.Name, Peers: p.node.Peers()}); err != nil {
		p.node.Close()
		return nil, err
	}
	start := time.Now()
	p.kms, err = kms.Open(ctx, p.store, kms.Options{Logger: o.Logger, Now: p.off.now, Elapsed: func() time.Duration { return time.Since(start) }})
	if err == nil {
		err = p.node.Attach(ctx, p.store, p.kms)
	}
	if err != nil {
		p.stop()
		return nil, err
	}
	t.Cleanup(p.stop)
	return p, nil
}

func must(p *part, err error) *part {
	if err != nil {
		panic(err)
	}
	return p
}

func (p *part) stop() {
	if p.node == nil {
		return
	}
	p.node.Detach()
	if p.kms != nil {
		p.kms.Close()
	}
	p.store.Close()
	p.node.Close()
	if p.ring != nil {
		p.ring.Close()
	}
	p.node = nil
}

func sealing(t testing.TB) rootkey.Sealing {
	t.Helper()
	pass, err := secret.Copy([]byte(passphrase))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pass.Wipe)
	return rootkey.Passphrase(pass, 10)
}

// unlock gives a member its root keys: the first from its passphrase, another
// from a peer.
func (p *part) unlock(fromPeer bool) error {
	var err error
	if p.ring == nil {
		path := filepath.Join(p.options.Dir, "crk.sealed")
		if p.ring, err = rootkey.CreateKeyring(path, sealing(p.t)); err != nil {
			if p.ring, err = rootkey.LoadKeyring(path); err != nil {
				return err
			}
			if !fromPeer {
				if err = p.ring.Unlock(sealing(p.t)); err != nil {
					return err
				}
			}
		}
	}
	if fromPeer {
		if err := p.node.FetchKeys(p.t.Context(), p.ring); err != nil {
			return err
		}
	}
	if err := p.kms.Unlock(p.t.Context(), p.ring); err != nil {
		return err
	}
	p.node.Unlocked(p.ring)
	return nil
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func (p *part) status(name string) string {
	list, err := p.node.Members(p.t.Context())
	if err != nil {
		return err.Error()
	}
	for _, m := range list {
		if m.Name == name {
			return m.Status
		}
	}
	return "gone"
}

func votes(status string) bool { return status == "leader" || status == "follower" }

// TestLife is a cluster's: it begins alone and without an address, is given one
// while it runs, grows to three, gives a restarted member its keys, tells a wrong
// clock, upgrades, and replaces a member.
func TestLife(t *testing.T) {
	dir := t.TempDir()
	ctx := t.Context()
	a := must(begin(t, Options{Dir: filepath.Join(dir, "a")}))
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	if _, err := a.node.Invite(ctx, "kms-2", 0); !errors.Is(err, ErrNoAddress) {
		t.Errorf("inviting without an address: %v", err)
	}
	if err := a.node.SetAddress(ctx, freePort(t), ""); err != nil {
		t.Fatal(err)
	}
	token, err := a.node.Invite(ctx, "kms-2", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.node.Invite(ctx, DefaultName, 0); !errors.Is(err, ErrMemberExists) {
		t.Errorf("a second member of one name: %v", err)
	}

	// Refused: another name, another CA's token, a program too old.
	for what, c := range map[string]struct {
		o     Options
		words string
	}{
		"another name":   {Options{Name: "kms-9", Token: token.Text(), Address: freePort(t)}, "for kms-2"},
		"no address":     {Options{Token: token.Text()}, "--peer-address"},
		"no token":       {Options{Token: "mortise-join:v1:AAAA@127.0.0.1:1", Address: freePort(t)}, "copy it whole"},
		"forged":         {Options{Token: forged(t, a, "kms-2"), Address: freePort(t)}, "no such token"},
		"another center": {Options{Token: otherCA(t, a), Address: freePort(t)}, "does not show the CA"},
	} {
		c.o.Dir = t.TempDir()
		if p, err := begin(t, c.o); err == nil {
			p.stop()
			t.Errorf("%s: it was let in", what)
		} else if !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", what, err)
		}
	}

	b := must(begin(t, Options{Dir: filepath.Join(dir, "b"), Token: token.Text(), Address: freePort(t)}))
	if err := b.unlock(true); err != nil {
		t.Fatal(err)
	}
	if p, err := begin(t, Options{Dir: t.TempDir(), Token: token.Text(), Address: freePort(t)}); err == nil {
		p.stop()
		t.Error("a token let two members in")
	} else if !strings.Contains(err.Error(), "used already") {
		t.Errorf("a token's second use: %v", err)
	}
	eventually(t, "kms-2 votes", func() bool { return votes(a.status("kms-2")) })

	// Any member lets the next one in, not only the first.
	if token, err = b.node.Invite(ctx, "kms-3", time.Hour); err != nil {
		t.Fatal(err)
	}
	c := must(begin(t, Options{Dir: filepath.Join(dir, "c"), Token: token.Text(), Address: freePort(t)}))
	if err := c.unlock(true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "kms-3 votes", func() bool { return votes(a.status("kms-3")) })

	// b restarts and gets its keys from a peer; nobody types a passphrase.
	address := b.node.address
	b.stop()
	b = must(begin(t, Options{Dir: filepath.Join(dir, "b")}))
	if b.node.address != address {
		t.Errorf("after a restart it is reached at %q, not %q", b.node.address, address)
	}
	if err := b.unlock(true); err != nil {
		t.Fatal(err)
	}
	if err := b.kms.Ready(); err != nil {
		t.Errorf("after a restart: %v", err)
	}

	// c's clock goes wrong, and it serves nobody; the others do.
	c.off.set(5 * time.Minute)
	eventually(t, "c notices its clock", func() bool { return errors.Is(c.kms.Ready(), kms.ErrClock) })
	if err := errors.Join(a.kms.Ready(), b.kms.Ready()); err != nil {
		t.Errorf("the others: %v", err)
	}
	c.off.set(0)
	eventually(t, "c is ready again", func() bool { return c.kms.Ready() == nil })

	// Formats: one upgraded member changes nothing; the last one does.
	restart := func(p *part, format int) *part {
		o := p.options
		p.stop()
		o.Format, o.Token = format, ""
		n := must(begin(t, o))
		if err := n.unlock(true); err != nil {
			t.Fatal(err)
		}
		return n
	}
	format := func(p *part) int {
		e, _ := p.node.state.format.Peek(formatKey)
		return e.Value
	}
	eventually(t, "format 1", func() bool { return format(a) == 1 })
	c = restart(c, 2)
	b = restart(b, 2)
	time.Sleep(300 * time.Millisecond)
	if f := format(b); f != 1 {
		t.Errorf("format %d while a member knows only 1", f)
	}
	a = restart(a, 2)
	eventually(t, "format 2 once all know it", func() bool { return format(c) == 2 })
	o := a.options
	o.Format = 1
	a.stop()
	if p, err := begin(t, o); err == nil {
		p.stop()
		t.Error("an old program started where records are newer")
	} else if !errors.Is(err, ErrTooOld) {
		t.Errorf("an old program: %v", err)
	}
	o.Format = 2
	a = must(begin(t, o))
	if err := a.unlock(true); err != nil {
		t.Fatal(err)
	}

	// A joiner that is lost before it has a name blocks nobody for ever.
	var lost store.Member
	if err := retry(ctx, func() (err error) { lost, _, err = a.store.AddLearner(ctx, peerURL(freePort(t))); return err }); err != nil {
		t.Fatal(err)
	}
	listed, err := b.node.Members(ctx)
	if err != nil || len(listed) != 4 || listed[3].Name != "" || listed[3].ID != store.IDString(lost.ID) {
		t.Errorf("with a lost joiner: %+v, %v", listed, err)
	}
	if err := b.node.Remove(ctx, store.IDString(lost.ID)); err != nil {
		t.Errorf("removing a lost joiner: %v", err)
	}

	// c is replaced by another machine of the same name.
	stale := c.node.creds
	removing, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := b.node.Remove(removing, "kms-3"); err != nil {
		t.Fatal(err)
	}
	if err := b.node.Remove(removing, "kms-3"); !errors.Is(err, ErrUnknownMember) {
		t.Errorf("removing again: %v", err)
	}
	eventually(t, "c knows that it was removed", func() bool {
		select {
		case <-c.store.Stopped():
			return true
		default:
			return false
		}
	})
	if err := c.node.FetchKeys(ctx, c.ring); err == nil {
		t.Error("a removed member got root keys")
	}
	o = c.options
	c.stop()
	o.Token = ""
	if p, err := begin(t, o); err == nil {
		p.stop()
		t.Error("a removed member started")
	}
	if token, err = a.node.Invite(ctx, "kms-3", 0); err != nil {
		t.Fatal(err)
	}
	d := must(begin(t, Options{Dir: filepath.Join(dir, "d"), Token: token.Text(), Address: freePort(t), Format: 2}))
	if err := d.unlock(true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new kms-3 votes", func() bool { return votes(a.status("kms-3")) })
	if err := d.node.admit(identity("kms-3"), d.node.creds.Leaf()); err != nil {
		t.Errorf("the new machine's certificate: %v", err)
	}
	old := *stale.Leaf()
	old.NotBefore = old.NotBefore.Add(-time.Minute) // it was issued a minute before, not a few seconds
	if err := a.node.admit(identity("kms-3"), &old); err == nil {
		t.Error("the certificate of the machine that was replaced is still taken")
	}
}

// forged is a token whose secret nobody issued.
func forged(t *testing.T, a *part, name string) string {
	j, err := pki.NewJoinToken(identity(name), a.node.ca, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return Token{j, []string{a.node.address}}.Text()
}

// otherCA is a token of another cluster that points here.
func otherCA(t *testing.T, a *part) string {
	ca, err := pki.NewAuthority("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	j, err := pki.NewJoinToken(identity("kms-2"), ca.Certificate(), time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return Token{j, []string{a.node.address}}.Text()
}

// TestRenewal: a member's certificate is renewed before it ends, and new
// connections use it.
func TestRenewal(t *testing.T) {
	// pki backdates by ten minutes, so two thirds of so short a life are over at once.
	a := must(begin(t, Options{Dir: filepath.Join(t.TempDir(), "a"), Address: freePort(t), certLife: 4 * time.Second}))
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	first := a.node.creds.Leaf()
	eventually(t, "a renewed certificate", func() bool { return a.node.creds.Leaf().SerialNumber.Cmp(first.SerialNumber) != 0 })
	if _, err := a.node.call(t.Context(), a.node.Name, a.node.address, "GET", "/v1/status", nil); err != nil {
		t.Errorf("with the renewed certificate: %v", err)
	}
}

// TestCrashBeforeSealed: the CA of a first start that never unlocked is made
// anew, and the next start's lasts.
func TestCrashBeforeSealed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a")
	a := must(begin(t, Options{Dir: dir, Address: freePort(t)}))
	first := a.node.ca
	a.stop()
	a = must(begin(t, Options{Dir: dir}))
	if a.node.ca.Equal(first) {
		t.Error("a CA whose key is lost was kept")
	}
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	if _, err := a.node.Invite(t.Context(), "kms-2", 0); err != nil {
		t.Fatal(err)
	}
	kept := a.node.ca
	a.stop()
	a = must(begin(t, Options{Dir: dir}))
	if !a.node.ca.Equal(kept) {
		t.Error("a CA that is in the store was made anew")
	}
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	if _, err := a.node.Invite(t.Context(), "kms-3", 0); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	for _, good := range []string{"10.0.0.1:5698", "[fd00::1]:5698", "kms-1.example.org:1"} {
		if err := CheckAddress(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "10.0.0.1", ":5698", "0.0.0.0:5698", "[::]:5698", "a b:1", "a:0", "a:70000", "a/b:1", "a@b:1"} {
		if err := CheckAddress(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzToken(f *testing.F) {
	ca, err := pki.NewAuthority("fuzz", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	j, err := pki.NewJoinToken(identity("kms-2"), ca.Certificate(), time.Hour, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	good := Token{j, []string{"10.0.0.1:5698", "[fd00::1]:5698"}}.Text()
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add(strings.Replace(good, "@", "", 1))
	f.Add("mortise-join:v1:@")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := ParseToken(text)
		if err != nil {
			if !errors.Is(err, pki.ErrToken) {
				t.Errorf("%v is not ErrToken", err)
			}
			return
		}
		again, err := ParseToken(tok.Text())
		if err != nil || fmt.Sprint(again.Addresses) != fmt.Sprint(tok.Addresses) || again.Secret() != tok.Secret() {
			t.Errorf("what was read is not what is written: %v", err)
		}
	})
}

// TestManyRootKeys: a member that comes gets all root keys, and later those that
// it lacks, however many there are and whoever has them.
func TestManyRootKeys(t *testing.T) {
	dir := t.TempDir()
	ctx := t.Context()
	a := must(begin(t, Options{Dir: filepath.Join(dir, "a"), Address: freePort(t)}))
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	const many = rootkey.MaxShare + 50
	// Made in memory: a file that is synced for each takes its time.
	quick, err := os.MkdirTemp("/dev/shm", "mortise-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(quick)
	from, err := rootkeytest.Keyring(quick)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for range many {
		if _, err := rootkeytest.NewCRK(ctx, from); err != nil {
			t.Fatal(err)
		}
	}
	for ids := range slices.Chunk(from.InFile(), rootkey.MaxShare) {
		share, err := from.Share(ctx, ids)
		if err == nil {
			err = a.ring.Adopt(ctx, share)
			share.Wipe()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	all := a.ring.InFile()
	join := func(name string) *part {
		t.Helper()
		token, err := a.node.Invite(ctx, name, 0)
		if err != nil {
			t.Fatal(err)
		}
		p := must(begin(t, Options{Dir: filepath.Join(dir, name), Token: token.Text(), Address: freePort(t)}))
		if err := p.unlock(true); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" votes", func() bool { return votes(a.status(name)) })
		return p
	}
	b := join("kms-2")
	if got := b.ring.InFile(); !slices.Equal(got, all) || len(got) <= many {
		t.Errorf("it has %d root keys of %d", len(got), len(all))
	}
	c := join("kms-3")
	// What one member alone has is found there, whoever is asked first.
	var lacks []string
	for _, p := range []*part{a, b} {
		for range 3 {
			id, err := rootkeytest.NewCRK(ctx, p.ring)
			if err != nil {
				t.Fatal(err)
			}
			lacks = append(lacks, id)
		}
	}
	if err := c.node.FetchKeys(ctx, c.ring, lacks...); err != nil {
		t.Fatal(err)
	}
	for _, id := range lacks {
		if !slices.Contains(c.ring.InFile(), id) {
			t.Errorf("root key %s has not come", id)
		}
	}
	if err := c.node.FetchKeys(ctx, c.ring, rootkeytest.NewID()); err != nil {
		t.Errorf("asking for one that is nowhere: %v", err)
	}
}
