// Package pki makes and checks the certificates by which the roles know each
// other: private CAs, certificates issued from CSRs, self-signed client
// certificates for key servers (K13), TLS configurations, and the tokens with
// which a host joins a center.
//
// There is one CA per trust domain (center↔hosts, center peers, kms peers); no
// public CA plays a part. What a certificate may do follows from the identity
// in it, a role and a name, which the issuer sets and the CSR cannot.
//
// Place in the flow: level 1; used by kms, center and host. It imports secret
// only. It writes nothing but the files it is told to; sealing is done by what
// implements [Sealer], keeping is the caller's. Everything here may be called
// concurrently.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"regexp"
	"strings"
	"time"

	"mortise/internal/secret"
)

// skew backdates a certificate, so that a peer whose clock is behind takes it.
const skew = 10 * time.Minute

// caLife is how long a CA of ours is valid.
const caLife = 10 * 365 * 24 * time.Hour

// An Identity says who a certificate is: a role and a name within it. It is
// in the certificate as the URI mortise://role/name (RFC 5280 §4.2.1.6).
type Identity struct {
	Role string // see Role…
	Name string // 1 to 64 letters, digits, '.', '_', '-'; begins with a letter or digit
}

// Roles that certificates are issued to.
const (
	RoleCenter = "center"
	RoleHost   = "host"
	RoleKMS    = "kms"
)

// CenterName is the name within its role that every center goes by: a trust
// domain has one center, and hosts know it by its CA.
const CenterName = "center"

var (
	validRole = regexp.MustCompile(`^[a-z][a-z-]{0,31}$`)
	validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
)

// Check returns an error unless role and name have their form.
func (id Identity) Check() error {
	if !validRole.MatchString(id.Role) {
		return fmt.Errorf("pki: %q is no role", id.Role)
	}
	if !validName.MatchString(id.Name) {
		return fmt.Errorf("pki: name %q must be 1 to 64 letters, digits, '.', '_' or '-' and begin with a letter or digit", id.Name)
	}
	return nil
}

// String is the identity's URI.
func (id Identity) String() string { return "mortise://" + id.Role + "/" + id.Name }

// ErrNoIdentity means that a certificate has no identity, or more than one.
var ErrNoIdentity = errors.New("certificate names no role")

// IdentityOf reads the identity in a certificate. It proves nothing: the
// certificate must have been verified.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	var found []Identity
	for _, u := range cert.URIs {
		if rest, ours := strings.CutPrefix(u.String(), "mortise://"); ours {
			role, name, _ := strings.Cut(rest, "/")
			found = append(found, Identity{role, name})
		}
	}
	if len(found) != 1 || found[0].Check() != nil {
		return Identity{}, fmt.Errorf("pki: certificate of %q: %w", cert.Subject, ErrNoIdentity)
	}
	return found[0], nil
}

// An Authority is a CA: a self-signed certificate and its ECDSA P-256 key.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// A Sealer encrypts secrets for keeping; aad binds them to their use. A
// root key is one.
type Sealer interface {
	Seal(k *secret.Key, aad []byte) ([]byte, error)
	Open(blob, aad []byte) (*secret.Key, error)
}

// NewAuthority makes a CA of the given name, valid for ten years. It issues
// leaf certificates only.
func NewAuthority(name string, now time.Time) (*Authority, error) {
	key, err := GenerateKey()
	if err != nil {
		return nil, err
	}
	tmpl, err := template(name, caLife, now)
	if err != nil {
		return nil, err
	}
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.MaxPathLenZero = true, true, true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	cert, err := sign(tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("pki: making CA %q: %w", name, err)
	}
	return &Authority{cert, key}, nil
}

// Certificate is the CA's own; not to be changed.
func (a *Authority) Certificate() *x509.Certificate { return a.cert }

// Seal returns the CA's key, sealed and bound to the CA's certificate.
func (a *Authority) Seal(s Sealer) ([]byte, error) {
	key, err := MarshalKey(a.key)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	blob, err := s.Seal(key, authorityBinding(a.cert))
	if err != nil {
		return nil, fmt.Errorf("pki: sealing the key of CA %q: %w", a.cert.Subject.CommonName, err)
	}
	return blob, nil
}

// OpenAuthority is the reverse of Seal.
func OpenAuthority(cert *x509.Certificate, s Sealer, blob []byte) (*Authority, error) {
	sealed, err := s.Open(blob, authorityBinding(cert))
	if err != nil {
		return nil, fmt.Errorf("pki: opening the key of CA %q: %w", cert.Subject.CommonName, err)
	}
	defer sealed.Wipe()
	key, err := ParseKey(sealed)
	if err != nil {
		return nil, err
	}
	if !cert.IsCA || !samePublicKey(cert.PublicKey, key.Public()) {
		return nil, fmt.Errorf("pki: certificate of %q and its key are not those of one CA", cert.Subject)
	}
	return &Authority{cert, key}, nil
}

func authorityBinding(cert *x509.Certificate) []byte {
	sum := Fingerprint(cert)
	return append([]byte("mortise ca key\x00"), sum[:]...)
}

// A Grant is what an issued certificate says. The issuer decides it; of the
// CSR only the public key counts.
type Grant struct {
	Identity Identity      // zero: none, such as for a web server
	Name     string        // common name where there is no identity; "": the first host
	Hosts    []string      // DNS names and IP addresses
	Server   bool          // extended key usage serverAuth
	Client   bool          // extended key usage clientAuth
	Life     time.Duration // cut short at the end of the CA's own
}

// Issue certifies the public key of a CSR, whose signature proves that its
// sender has the private key.
func (a *Authority) Issue(csr *x509.CertificateRequest, g Grant, now time.Time) (*x509.Certificate, error) {
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("pki: certificate request of %q: its signature is wrong: %w", csr.Subject, err)
	}
	if err := checkPublicKey(csr.PublicKey); err != nil {
		return nil, fmt.Errorf("pki: certificate request of %q: %w", csr.Subject, err)
	}
	if err := CheckValid(a.cert, now); err != nil {
		return nil, fmt.Errorf("pki: issuing: %w", err)
	}
	var name string
	if g.Identity != (Identity{}) {
		if err := g.Identity.Check(); err != nil {
			return nil, err
		}
		name = g.Identity.Name
	} else if name = g.Name; name == "" && len(g.Hosts) > 0 {
		name = g.Hosts[0]
	}
	tmpl, err := template(name, g.Life, now)
	if err != nil {
		return nil, err
	}
	if tmpl.NotAfter.After(a.cert.NotAfter) {
		tmpl.NotAfter = a.cert.NotAfter
	}
	tmpl.setUse(g.Server, g.Client)
	if g.Identity != (Identity{}) {
		tmpl.URIs = []*url.URL{{Scheme: "mortise", Host: g.Identity.Role, Path: "/" + g.Identity.Name}}
	}
	if err := tmpl.setHosts(g.Hosts); err != nil {
		return nil, err
	}
	cert, err := sign(tmpl, &certTemplate{*a.cert}, csr.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("pki: issuing to %q: %w", name, err)
	}
	return cert, nil
}

// SelfSigned makes a certificate that is trusted by pinning, not by a CA: a
// key server's, or a client's towards a key server.
func SelfSigned(key crypto.Signer, g Grant, commonName string, now time.Time) (*x509.Certificate, error) {
	tmpl, err := template(commonName, g.Life, now)
	if err != nil {
		return nil, err
	}
	tmpl.BasicConstraintsValid = true // CA:FALSE, said aloud: some key servers want it
	tmpl.setUse(g.Server, g.Client)
	if err := tmpl.setHosts(g.Hosts); err != nil {
		return nil, err
	}
	cert, err := sign(tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("pki: making the certificate of %q: %w", commonName, err)
	}
	return cert, nil
}

// KMIPClientName is the common name of a self-signed KMIP client certificate,
// in vCenter's style: kmipClient20161127094708, in UTC.
func KMIPClientName(now time.Time) string { return "kmipClient" + now.UTC().Format("20060102150405") }

// NewKMIPClient makes a self-signed client certificate for a key server (K13).
// Its key is RSA-2048, as vCenter's is, which every key server takes; it has
// clientAuth, without which PyKMIP refuses it.
func NewKMIPClient(life time.Duration, now time.Time) (*x509.Certificate, crypto.Signer, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, nil, fmt.Errorf("pki: making an RSA key: %w", err)
	}
	cert, err := SelfSigned(key, Grant{Client: true, Life: life}, KMIPClientName(now), now)
	if err != nil {
		return nil, nil, err
	}
	return cert, key, nil
}

// NewCSR makes a certificate request (PKCS#10, RFC 2986), DER. hosts are DNS
// names and IP addresses that the sender would like; an issuer may ignore them.
func NewCSR(key crypto.Signer, commonName string, hosts ...string) ([]byte, error) {
	var san certTemplate
	if err := san.setHosts(hosts); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: commonName}, DNSNames: san.DNSNames, IPAddresses: san.IPAddresses,
	}, key)
	if err != nil {
		return nil, fmt.Errorf("pki: making a certificate request for %q: %w", commonName, err)
	}
	return der, nil
}

// GenerateKey makes an ECDSA P-256 key.
func GenerateKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("pki: making an ECDSA key: %w", err)
	}
	return key, nil
}

// MarshalKey puts a private key (PKCS#8, DER) into locked memory, to be sealed.
func MarshalKey(key crypto.Signer) (*secret.Key, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("pki: encoding a private key: %w", err)
	}
	return secret.Take(der)
}

// ParseKey is the reverse of MarshalKey.
func ParseKey(k *secret.Key) (key crypto.Signer, err error) {
	k.Use(func(der []byte) { key, err = parsePKCS8(der) })
	return key, err
}

func parsePKCS8(der []byte) (crypto.Signer, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("pki: not a private key in PKCS#8 form") // the cause may quote key bytes
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("pki: a private key of kind %T cannot sign", parsed)
	}
	if err := checkPublicKey(key.Public()); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return key, nil
}

// checkPublicKey refuses keys that are too weak to identify anybody.
func checkPublicKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize < 256 {
			return fmt.Errorf("an ECDSA key on %s is too weak; use P-256 or better", k.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 {
			return fmt.Errorf("an RSA key of %d bits is too weak; use 2048 or more", bits)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("a key of kind %T is not supported; use ECDSA, RSA or Ed25519", pub)
	}
	return nil
}

func samePublicKey(a, b crypto.PublicKey) bool {
	eq, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && eq.Equal(b)
}

// certTemplate is a certificate while it is being filled in.
type certTemplate struct{ x509.Certificate }

func template(commonName string, life time.Duration, now time.Time) (*certTemplate, error) {
	if commonName == "" {
		return nil, errors.New("pki: a certificate needs a name")
	}
	if life <= 0 {
		return nil, fmt.Errorf("pki: certificate of %q: a life of %v", commonName, life)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("pki: making a serial number: %w", err)
	}
	return &certTemplate{x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-skew).UTC().Truncate(time.Second),
		NotAfter:     now.Add(life).UTC().Truncate(time.Second),
	}}, nil
}

func (t *certTemplate) setUse(server, client bool) {
	t.KeyUsage = x509.KeyUsageDigitalSignature
	if server {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if client {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
}

func (t *certTemplate) setHosts(hosts []string) error {
	for _, h := range hosts {
		switch ip := net.ParseIP(h); {
		case ip != nil:
			t.IPAddresses = append(t.IPAddresses, ip)
		case h == "" || strings.ContainsAny(h, " :/@\x00"):
			return fmt.Errorf("pki: %q is neither a DNS name nor an IP address", h)
		default:
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return nil
}

func sign(tmpl, parent *certTemplate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, &tmpl.Certificate, &parent.Certificate, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
