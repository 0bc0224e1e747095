package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"mortise/internal/pki"
	"mortise/internal/store"
)

// three is a cluster of as many, each unlocked and voting.
func three(t *testing.T) (a, b, c *part) {
	t.Helper()
	dir := t.TempDir()
	a = must(begin(t, Options{Dir: filepath.Join(dir, "a"), Address: freePort(t)}))
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	join := func(name string) *part {
		token, err := a.node.Invite(t.Context(), name, 0)
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
	return a, join("kms-2"), join("kms-3")
}

// forget makes a member's list the one from before another had joined, as if it
// lagged behind, until the list changes.
func (p *part) forget(name string) (remember func()) {
	p.node.mu.Lock()
	now := p.node.names
	p.node.mu.Unlock()
	before := map[string]time.Time{}
	for n, since := range now {
		if n != name {
			before[n] = since
		}
	}
	p.node.setNames(before)
	return func() { p.node.setNames(now) }
}

// TestFarewell: a member that was removed while it was away has a log that does
// not say so, and no leader that would tell it. The others do, when it asks; but
// one that lags behind, alone, does not talk a member out of its cluster.
func TestFarewell(t *testing.T) {
	a, b, c := three(t)
	ctx := t.Context()
	others := map[string]string{a.node.Name: peerURL(a.node.address), b.node.Name: peerURL(b.node.address)}
	if c.node.removed(ctx, others) {
		t.Error("a member is told that it is none")
	}
	remember := b.forget("kms-3")
	if _, err := c.node.call(ctx, b.node.Name, b.node.address, http.MethodGet, "/v1/status", nil); !errors.Is(err, store.ErrRemoved) {
		t.Fatalf("the one that lags behind answers: %v", err)
	}
	if c.node.removed(ctx, others) {
		t.Error("one lags behind, the other knows better, and the member believes the first")
	}
	away := map[string]string{a.node.Name: peerURL(freePort(t)), b.node.Name: peerURL(b.node.address)}
	if c.node.removed(ctx, away) {
		t.Error("one lags behind, the other is away, and the member believes the first")
	}
	if c.node.removed(ctx, map[string]string{a.node.Name: "://", b.node.Name: away[a.node.Name]}) || c.node.removed(ctx, nil) {
		t.Error("nobody answers, and the member takes that for an answer")
	}
	remember()

	// Removed while it is down.
	o := c.options
	c.stop()
	if err := a.node.Remove(ctx, "kms-3"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both know that it is gone", func() bool { return a.status("kms-3") == "gone" && b.status("kms-3") == "gone" })
	o.Token = ""
	began := time.Now()
	p, err := begin(t, o)
	if err == nil {
		p.stop()
	}
	if !errors.Is(err, store.ErrRemoved) {
		t.Errorf("started again after %v: %v", time.Since(began).Round(time.Millisecond), err)
	}

	// Its certificate opens nothing else: not raft, and no other call.
	removed, key, err := pki.LoadKeyPair(filepath.Join(o.Dir, "peer", "peer.pem"), filepath.Join(o.Dir, "peer", "peer.pem"))
	if err != nil {
		t.Fatal(err)
	}
	was, err := pki.NewCredentials(removed, key)
	if err != nil {
		t.Fatal(err)
	}
	member := pki.Mutual{Credentials: was, CAs: []*x509.Certificate{a.node.ca}}
	if answer := raw(t, member.Client(identity(a.node.Name)), a.node.address, "", "GET /raft HTTP/1.1\r\nHost: x\r\n\r\n"); answer != "" {
		t.Errorf("raft says to a removed member: %q", answer)
	}
	for _, path := range []string{"/v1/keys", "/v1/status", "/"} {
		asks := &Node{Options: Options{Now: time.Now}, now: time.Now, creds: was, ca: a.node.ca}
		if _, err := asks.call(ctx, a.node.Name, a.node.address, http.MethodPost, path, []byte("{}")); !errors.Is(err, store.ErrRemoved) {
			t.Errorf("%s, of a removed member: %v", path, err)
		}
	}

	// A stranger, with a certificate of another CA or of none, gets nothing.
	ca, err := pki.NewAuthority("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(key, "kms-3")
	if err != nil {
		t.Fatal(err)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := issue(ca, request, "kms-3", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for what, chain := range map[string][]*x509.Certificate{"another CA's": {forged}, "another CA's, with it": {forged, ca.Certificate()}, "one's own, with the cluster's CA": {forged, a.node.ca}} {
		creds, err := pki.NewCredentials(chain, key)
		if err != nil {
			t.Fatal(err)
		}
		stranger := pki.Mutual{Credentials: creds, CAs: []*x509.Certificate{a.node.ca}}.Client(identity(a.node.Name))
		if answer := raw(t, stranger, a.node.address, protoCalls, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"); answer != "" {
			t.Errorf("a certificate of %s is answered: %q", what, answer)
		}
	}
	if answer := raw(t, &tls.Config{InsecureSkipVerify: true}, a.node.address, protoCalls, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"); answer != "" {
		t.Errorf("without a certificate: %q", answer)
	}
}

// raw sends text over TLS and returns what comes back.
func raw(t *testing.T, config *tls.Config, address, proto, text string) string {
	t.Helper()
	config = config.Clone()
	if proto != "" {
		config.NextProtos = []string{proto}
	}
	c, err := tls.Dial("tcp", address, config)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		return ""
	}
	answer, _ := io.ReadAll(c)
	return string(answer)
}
