package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortise/internal/rootkey"
	"mortise/internal/secret"
)

var now = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

const day = 24 * time.Hour

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func authority(t testing.TB) *Authority {
	t.Helper()
	return must(NewAuthority("Mortise hosts", now))(t)
}

func request(t testing.TB, key crypto.Signer) *x509.CertificateRequest {
	t.Helper()
	der := must(NewCSR(key, "whatever the sender says", "evil.example"))(t)
	return must(x509.ParseCertificateRequest(der))(t)
}

// issue makes credentials that the CA certified at time now.
func issue(t testing.TB, a *Authority, g Grant) *Credentials {
	t.Helper()
	key := must(GenerateKey())(t)
	cert := must(a.Issue(request(t, key), g, now))(t)
	return must(NewCredentials([]*x509.Certificate{cert, a.Certificate()}, key))(t)
}

func TestIssue(t *testing.T) {
	a := authority(t)
	c := issue(t, a, Grant{
		Identity: Identity{RoleHost, "host-1"}, Hosts: []string{"host-1.example", "192.0.2.1", "2001:db8::1"},
		Server: true, Client: true, Life: 90 * day,
	}).Leaf()
	if id := must(IdentityOf(c))(t); id != (Identity{RoleHost, "host-1"}) {
		t.Errorf("identity %v", id)
	}
	if c.Subject.CommonName != "host-1" || len(c.DNSNames) != 1 || c.DNSNames[0] != "host-1.example" || len(c.IPAddresses) != 2 {
		t.Errorf("subject %v, names %v %v: the CSR's wishes must not count", c.Subject, c.DNSNames, c.IPAddresses)
	}
	if err := c.CheckSignatureFrom(a.Certificate()); err != nil {
		t.Error(err)
	}
	if got := c.NotAfter.Sub(now); got != 90*day {
		t.Errorf("life %v", got)
	}
	if c.IsCA {
		t.Error("a leaf that is a CA")
	}
}

func TestIssueRefuses(t *testing.T) {
	a := authority(t)
	weak := must(rsa.GenerateKey(rand.Reader, 1024))
	good := request(t, must(GenerateKey())(t))
	forged := *good
	forged.Signature = bytes.Clone(good.Signature)
	forged.Signature[10] ^= 1
	p224 := must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))(t)
	ok := Grant{Identity: Identity{RoleHost, "h"}, Client: true, Life: day}
	for _, c := range []struct {
		name string
		csr  *x509.CertificateRequest
		g    Grant
		at   time.Time
		want string
	}{
		{"forged request", &forged, ok, now, "signature"},
		{"weak RSA", request(t, weak(t)), ok, now, "1024 bits is too weak"},
		{"weak curve", request(t, p224), ok, now, "P-224 is too weak"},
		{"bad role", good, Grant{Identity: Identity{"Host", "h"}, Life: day}, now, "no role"},
		{"bad name", good, Grant{Identity: Identity{RoleHost, "a/b"}, Life: day}, now, "name"},
		{"bad host", good, Grant{Identity: ok.Identity, Hosts: []string{"a b"}, Life: day}, now, "neither a DNS name"},
		{"no name", good, Grant{Life: day}, now, "needs a name"},
		{"no life", good, Grant{Identity: ok.Identity}, now, "life"},
		{"CA expired", good, ok, now.Add(11 * 365 * day), "expired"},
	} {
		if _, err := a.Issue(c.csr, c.g, c.at); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", c.name, err, c.want)
		}
	}
	late := must(a.Issue(good, ok, now.Add(caLife-time.Hour)))(t)
	if late.NotAfter.After(a.Certificate().NotAfter) {
		t.Error("a certificate outlives its CA")
	}
}

// TestSealedAuthority seals a CA key by a real root key and opens it again.
func TestSealedAuthority(t *testing.T) {
	pass := must(secret.Copy([]byte("p")))(t)
	root := must(rootkey.Create(filepath.Join(t.TempDir(), "root"), pass, 2))(t)
	defer root.Wipe()
	a, b := authority(t), authority(t)
	blob := must(a.Seal(root))(t)
	again := must(OpenAuthority(a.Certificate(), root, blob))(t)
	if !samePublicKey(again.key.Public(), a.key.Public()) {
		t.Error("another key came back")
	}
	if _, err := OpenAuthority(b.Certificate(), root, blob); !errors.Is(err, rootkey.ErrBlob) {
		t.Errorf("key of one CA under the certificate of another: %v", err)
	}
}

func TestKMIPClient(t *testing.T) {
	cert, key, err := NewKMIPClient(365*day, time.Date(2016, 11, 27, 9, 47, 8, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.CommonName != "kmipClient20161127094708" {
		t.Errorf("common name %q", cert.Subject.CommonName)
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		t.Error(err)
	}
	k := must(MarshalKey(key))(t)
	defer k.Wipe()
	if back := must(ParseKey(k))(t); !samePublicKey(back.Public(), cert.PublicKey) {
		t.Error("the key is not the certificate's")
	}
}

// TestOpenSSLAgrees lets openssl read what we make: thumbprint, SAN, CSR.
func TestOpenSSLAgrees(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("this test needs openssl (Debian package openssl)")
	}
	dir := t.TempDir()
	a := authority(t)
	c := issue(t, a, Grant{Identity: Identity{RoleKMS, "kms-1"}, Hosts: []string{"kms.example"}, Server: true, Life: 365 * day}).Leaf()
	openssl := func(in []byte, args ...string) string {
		cmd := exec.Command("openssl", args...)
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	out := openssl(EncodeCertificates(c), "x509", "-noout", "-fingerprint", "-sha256", "-ext", "subjectAltName,extendedKeyUsage")
	if !strings.Contains(out, "Fingerprint="+Thumbprint(c)+"\n") {
		t.Errorf("our thumbprint is %s, openssl says\n%s", Thumbprint(c), out)
	}
	for _, want := range []string{"DNS:kms.example", "URI:mortise://kms/kms-1", "TLS Web Server Authentication"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	ca := filepath.Join(dir, "ca.pem")
	if err := SaveCertificates(ca, a.Certificate()); err != nil {
		t.Fatal(err)
	}
	openssl(EncodeCertificates(c), "verify", "-CAfile", ca, "-attime", "1772690000")
	csr := must(NewCSR(must(GenerateKey())(t), "center", "center.example", "192.0.2.7"))(t)
	out = openssl(EncodeCSR(csr), "req", "-noout", "-verify", "-text")
	for _, want := range []string{"center.example", "192.0.2.7", "CN"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the request\n%s", want, out)
		}
	}
}

func TestThumbprint(t *testing.T) {
	c := authority(t).Certificate()
	text := Thumbprint(c)
	if len(text) != 95 || text != strings.ToUpper(text) {
		t.Errorf("thumbprint %q", text)
	}
	for _, s := range []string{text, strings.ToLower(text), strings.ReplaceAll(text, ":", ""), " " + text + "\n"} {
		if sum, err := ParseThumbprint(s); err != nil || sum != Fingerprint(c) {
			t.Errorf("ParseThumbprint(%q): %v", s, err)
		}
	}
	for s, want := range map[string]string{
		text[:59]:                 "SHA-1",
		text[:92]:                 "31 bytes",
		"":                        "0 bytes",
		"zz":                      "hexadecimal",
		"A:BC":                    "pairs",
		strings.Repeat("x", 5000): "hexadecimal",
	} {
		_, err := ParseThumbprint(s)
		if err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 300 {
			t.Errorf("ParseThumbprint(%.20q): %v, want %q", s, err, want)
		}
	}
}

func TestValidity(t *testing.T) {
	c := issue(t, authority(t), Grant{Identity: Identity{RoleHost, "h"}, Life: 90 * day}).Leaf()
	for at, want := range map[time.Time]error{
		now: nil, now.Add(89 * day): nil, now.Add(91 * day): ErrExpired, now.Add(-time.Hour): ErrExpired, now.Add(-skew / 2): nil,
	} {
		if err := CheckValid(c, at); !errors.Is(err, want) {
			t.Errorf("at %s: %v, want %v", at, err, want)
		}
	}
	if d := RenewAt(c).Sub(now); d < 59*day || d > 61*day {
		t.Errorf("a 90-day certificate is renewed after %v", d)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	a := authority(t)
	key := must(GenerateKey())(t)
	cert := must(a.Issue(request(t, key), Grant{Identity: Identity{RoleHost, "h"}, Life: day}, now))(t)
	path := filepath.Join(dir, "host.pem")
	chain := []*x509.Certificate{cert, a.Certificate()}
	if err := SaveKeyPair(path, chain, key); err != nil {
		t.Fatal(err)
	}
	info, _ := os.Stat(path)
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	c := must(LoadCredentials(path, path))(t)
	if !c.Leaf().Equal(cert) {
		t.Error("another certificate came back")
	}
	if err := SaveKeyPair(path, chain, must(GenerateKey())(t)); err == nil {
		t.Error("saved a key with another's certificate")
	}
	must(LoadCredentials(path, path))(t) // and left the good file alone

	put := func(name string, text []byte, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, text, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	text, _ := os.ReadFile(path)
	certOnly := put("cert.pem", EncodeCertificates(cert), 0o644)
	sec1 := must(x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey)))(t)
	if _, _, err := LoadKeyPair(certOnly, put("sec1.pem", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}), 0o600)); err != nil {
		t.Errorf("SEC 1 key: %v", err)
	}
	other := must(MarshalKey(must(GenerateKey())(t)))(t)
	var otherPEM []byte
	other.Use(func(b []byte) { otherPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}) })
	for name, c := range map[string]struct{ cert, key, want string }{
		"open to others": {certOnly, put("open.pem", text, 0o644), "chmod 0600"},
		"no key":         {certOnly, put("none.pem", EncodeCertificates(cert), 0o600), "no private key"},
		"no certificate": {put("empty.pem", nil, 0o600), path, "no certificate"},
		"other key":      {certOnly, put("other.pem", otherPEM, 0o600), "not that of the certificate"},
		"CA first":       {put("rev.pem", EncodeCertificates(a.Certificate(), cert), 0o600), path, "leaf certificate must come first"},
		"encrypted":      {certOnly, put("enc.pem", pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}}), 0o600), "encrypted by a password"},
		"encrypted, old": {certOnly, put("enc1.pem", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Headers: map[string]string{"DEK-Info": "AES"}, Bytes: []byte{1}}), 0o600), "encrypted by a password"},
		"malformed key":  {certOnly, put("bad.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}), 0o600), "PKCS#8"},
		"two keys":       {certOnly, put("two.pem", append(bytes.Clone(otherPEM), otherPEM...), 0o600), "more than one"},
		"malformed cert": {put("badc.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}), 0o600), path, "malformed"},
		"missing file":   {filepath.Join(dir, "nowhere"), path, "no such file"},
		"folder":         {dir, path, "not a regular file"},
		"far too long":   {put("long.pem", make([]byte, maxPEM+1), 0o600), path, "longer than"},
	} {
		if _, _, err := LoadKeyPair(c.cert, c.key); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.want)
		}
	}
}

// TestLoadOrMakeKey: whoever asks twice for a certificate asks for the same key,
// and a key file that cannot be used is never replaced.
func TestLoadOrMakeKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "request.key")
	key := must(LoadOrMakeKey(path))(t)
	if again := must(LoadOrMakeKey(path))(t); !samePublicKey(again.Public(), key.Public()) {
		t.Error("a second key was made")
	}
	if info := must(os.Stat(path))(t); info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrMakeKey(path); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("open to others: %v", err)
	}
	damaged := []byte("damaged")
	if err := os.WriteFile(path, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Chmod(path, 0o600)
	if _, err := LoadOrMakeKey(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("damaged: %v", err)
	}
	if text := must(os.ReadFile(path))(t); !bytes.Equal(text, damaged) {
		t.Error("the damaged file was replaced")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrMakeKey(path); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("FIFO: %v", err)
	}
}

func FuzzParsePEM(f *testing.F) {
	key := must(GenerateKey())(f)
	cert := must(SelfSigned(key, Grant{Life: day}, "x", now))(f)
	f.Add(EncodeCertificates(cert))
	k := must(MarshalKey(key))(f)
	k.Use(func(b []byte) { f.Add(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b})) })
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, text []byte) {
		chain, key, err := ParseKeyPair(text, text)
		if err == nil && (len(chain) == 0 || key == nil) {
			t.Fatal("nothing, and no error")
		}
		if chain, err := ParseCertificates(text); err == nil {
			if again, err := ParseCertificates(EncodeCertificates(chain...)); err != nil || len(again) != len(chain) {
				t.Fatalf("parse, print, parse: %v", err)
			}
		}
	})
}

func FuzzIdentityOf(f *testing.F) {
	f.Add("mortise://host/h1")
	f.Add("mortise://host/")
	f.Add("mortise://h@st/a/b")
	f.Add("https://example/")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		id, err := IdentityOf(&x509.Certificate{URIs: []*url.URL{u}})
		if err == nil && (id.Check() != nil || id.String() != u.String()) {
			t.Fatalf("%q gave %v", text, id)
		}
	})
}
