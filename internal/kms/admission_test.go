package kms

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/pki"
	"mortise/internal/store"
)

func clientCertificate(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Client: true, Life: time.Hour}, name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestPresume: what a session takes for true of its client without asking
// does not outlive the client's removal, and a mere change of its record harms
// nobody.
func TestPresume(t *testing.T) {
	f := start(t, t.TempDir())
	ctx := t.Context()
	cert := clientCertificate(t, "maker")
	begin := func() (*Session, error) {
		s, err := f.Presume(ctx, DefaultInstance, cert, "here")
		if err == nil {
			err = s.Begin(kmip.OperationCreate)
		}
		return s, err
	}
	if _, err := begin(); reason(AsError(err)) != kmip.ResultReasonPermissionDenied {
		t.Fatalf("a stranger: %v", err)
	}
	if err := f.Admit(ctx, DefaultInstance, cert); err == nil {
		t.Error("a stranger was let in")
	}
	c, err := f.AddClient(ctx, Actor{}, DefaultInstance, NewClient{Certificate: cert, Role: RoleKeyManager})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Admit(ctx, DefaultInstance, cert); err != nil {
		t.Errorf("a client that was just added: %v", err)
	}
	s, err := begin()
	if err != nil {
		t.Fatal(err)
	}
	if s.cert == nil {
		t.Error("the session has asked; the test tests nothing")
	}
	id, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("first")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, id); err != nil || s.cert != nil {
		t.Errorf("what the session made it does not read, or read without asking: %v", err)
	}

	// Another object has the name: that is the error, whatever is assumed.
	if s, err = begin(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("first"))); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("a second key of one name: %v", err)
	}

	// The client's record is written meanwhile.
	if s, err = begin(); err != nil {
		t.Fatal(err)
	}
	inst := f.instances[DefaultInstance]
	if _, err := inst.clients.Edit(ctx, c.Fingerprint, func(c *Client) error { c.Name = "renamed"; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("second"))); err != nil || s.Name != "renamed" {
		t.Errorf("after a change of the client's record: %v, %q", err, s.Name)
	}

	// The client is demoted meanwhile: it may no longer make keys.
	if s, err = begin(); err != nil {
		t.Fatal(err)
	}
	if _, err := inst.clients.Edit(ctx, c.Fingerprint, func(c *Client) error { c.Role = RoleViewer; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("demoted"))); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("after the client was demoted: %v", err)
	}
	if _, err := inst.clients.Edit(ctx, c.Fingerprint, func(c *Client) error { c.Role = RoleKeyManager; return nil }); err != nil {
		t.Fatal(err)
	}

	// The client is removed meanwhile.
	if err := f.store.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if s, err = begin(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.store.Commit(ctx, inst.clients.Delete(c.Fingerprint, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("third"))); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("after the client was removed: %v", err)
	}
	found, err := inst.objects.Find(ctx, store.IndexTerm{Kind: termAttribute, Value: encodeAttribute(named("third"))})
	if err != nil || found.Len() != 0 {
		t.Errorf("a removed client has made %d keys (%v)", found.Len(), err)
	}
}
