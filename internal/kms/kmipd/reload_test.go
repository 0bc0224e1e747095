package kmipd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/pki"
)

// TestReload: after SIGHUP new handshakes have the new certificate, and open
// connections go on. Files that are no good change nothing.
func TestReload(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kmip.pem")
	renew := func(name string) *x509.Certificate {
		key, err := pki.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pki.SelfSigned(key, pki.Grant{Server: true, Life: time.Hour, Hosts: []string{"localhost"}}, name, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := pki.SaveKeyPair(file, []*x509.Certificate{cert}, key); err != nil {
			t.Fatal(err)
		}
		return cert
	}
	first := renew("first")
	credentials, err := pki.LoadCredentials(file, file)
	if err != nil {
		t.Fatal(err)
	}
	log := &syncBuffer{}
	hup := make(chan os.Signal, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		credentials.Follow(ctx, file, file, hup, slog.New(slog.NewTextHandler(log, nil)), func() {})
	}()
	defer func() { cancel(); <-ended }()
	b := serveOver(t, openKMS(t), Options{Credentials: credentials})
	b.client = newClient(t, time.Now(), time.Hour)
	letIn(t, b.KMS, b.client)
	dial := func(want *x509.Certificate) *tls.Conn {
		t.Helper()
		b.server = want
		c := b.dial(t).(*tls.Conn)
		if got := c.ConnectionState().PeerCertificates[0]; !bytes.Equal(got.Raw, want.Raw) {
			t.Fatalf("the server shows %s, want %s", got.Subject, want.Subject)
		}
		return c
	}
	tell := func(word string) {
		t.Helper()
		n := strings.Count(log.String(), word)
		hup <- syscall.SIGHUP
		for end := time.Now().Add(5 * time.Second); strings.Count(log.String(), word) == n; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("nothing of %q is logged:\n%s", word, log)
			}
		}
	}
	old := dial(first)
	id := newKey(t, old)
	second := renew("second")
	dial(first) // not yet
	tell("replaced")
	fresh := dial(second)
	for _, c := range []net.Conn{old, fresh} {
		do[*payloads.GetResponsePayload](t, c, 4, &payloads.GetRequestPayload{UniqueIdentifier: id})
	}
	tell("unchanged")
	for what, text := range map[string]string{"empty": "", "no PEM": "certificate", "without its key": string(pki.EncodeCertificates(first))} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		tell("no good")
		if dial(second); !strings.Contains(log.String(), "the old certificate stays") {
			t.Errorf("%s: %s", what, log)
		}
	}
	third := renew("third")
	tell("replaced")
	dial(third)
}
