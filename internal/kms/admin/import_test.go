package admin

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
	"mortise/internal/kms/kmipd"
	"mortise/internal/kms/migrate"
	"mortise/internal/pki"
)

func importCertificate(t *testing.T, g pki.Grant) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	g.Life = time.Hour
	cert, err := pki.SelfSigned(key, g, "test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// TestImport brings the keys of one key server into another over the admin
// socket, and refuses what is asked for wrongly.
func TestImport(t *testing.T) {
	ctx := t.Context()
	b := start(t) // the source
	cert, key := importCertificate(t, pki.Grant{Client: true})
	if _, err := b.AddClient(ctx, kms.Actor{Kind: "socket", Role: kms.RoleAdministrator}, kms.DefaultInstance, kms.NewClient{Certificate: cert}); err != nil {
		t.Fatal(err)
	}
	serverCert, serverKey := importCertificate(t, pki.Grant{Server: true, Hosts: []string{"127.0.0.1"}})
	creds, err := pki.NewCredentials([]*x509.Certificate{serverCert}, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	run, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- kmipd.Serve(run, l, b.KMS, kmipd.Options{Credentials: creds}) }()
	defer func() { cancel(); <-served }()
	s, err := b.Session(ctx, kms.DefaultInstance, cert, "192.0.2.1:1")
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for range 3 {
		id, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		})
		if err != nil {
			t.Fatal(err)
		}
		ids[id] = true
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	good := func() Import { // the key is wiped by its use
		return Import{
			From: "kmip://" + l.Addr().String(), Thumbprint: pki.Thumbprint(serverCert), Certificate: string(pki.EncodeCertificates(cert)),
			Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		}
	}
	c, stop := serveFolder(t, t.TempDir())
	defer stop()
	for name, change := range map[string]func(*Import){
		"no address":       func(r *Import) { r.From = "" },
		"no KMIP":          func(r *Import) { r.From = "https://kms.example.com" },
		"no certificate":   func(r *Import) { r.Certificate = "" },
		"another key":      func(r *Import) { r.Key = nil },
		"two ways":         func(r *Import) { r.CA = r.Certificate },
		"wrong thumbprint": func(r *Import) { r.Thumbprint = strings.Repeat("00", 32) },
		"not trusted yet":  func(r *Import) { r.Thumbprint = "" },
		"nobody there":     func(r *Import) { r.From = "kmip://127.0.0.1:1" },
	} {
		r := good()
		change(&r)
		var refused *Error
		_, err := c.Import(ctx, kms.DefaultInstance, r, func(ImportLine) { t.Errorf("%s: a line", name) })
		if !errors.As(err, &refused) || refused.Code != "bad_request" {
			t.Errorf("%s: %v", name, err)
		}
		if name == "not trusted yet" && !strings.Contains(err.Error(), pki.Thumbprint(serverCert)) {
			t.Errorf("the thumbprint is not told: %v", err)
		}
	}
	var refused *Error
	if _, err := c.Import(ctx, "another", good(), nil); !errors.As(err, &refused) || refused.Code != "not_found" {
		t.Errorf("into another instance: %v", err)
	}

	dry := good()
	dry.DryRun = true
	would := 0
	r, err := c.Import(ctx, kms.DefaultInstance, dry, func(l ImportLine) {
		if l.Object != nil && ids[l.Object.ID] && l.Object.Fate == migrate.Comes && l.Object.Bits == 256 {
			would++
		}
	})
	if err != nil || would != 3 || r.Counts[migrate.Comes] != 3 {
		t.Fatalf("dry run: %d, %+v, %v", would, r, err)
	}
	progress := 0
	r, err = c.Import(ctx, kms.DefaultInstance, good(), func(l ImportLine) {
		if l.Progress != nil {
			progress++
		}
	})
	if err != nil || r.Counts[migrate.Arrived] != 3 || r.Compared != 3 || !r.Complete() || progress == 0 {
		t.Fatalf("%+v, %v", r, err)
	}
}
