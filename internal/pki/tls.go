package pki

import (
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// Credentials are a certificate chain with its key, which may be renewed while
// TLS configurations use them: the next handshake takes the new ones.
type Credentials struct {
	current atomic.Pointer[tls.Certificate]
}

// NewCredentials checks that the key is the chain's first certificate's.
func NewCredentials(chain []*x509.Certificate, key crypto.Signer) (*Credentials, error) {
	c := &Credentials{}
	return c, c.Replace(chain, key)
}

// LoadCredentials reads what SaveKeyPair wrote, or a chain and a key of the
// administrator's own.
func LoadCredentials(certPath, keyPath string) (*Credentials, error) {
	chain, key, err := LoadKeyPair(certPath, keyPath)
	if err != nil {
		return nil, err
	}
	return NewCredentials(chain, key)
}

// Replace renews the credentials; on error the old ones stay.
func (c *Credentials) Replace(chain []*x509.Certificate, key crypto.Signer) error {
	t, err := TLSCertificate(chain, key)
	if err != nil {
		return err
	}
	c.current.Store(&t)
	return nil
}

// TLSCertificate is a chain and its key in crypto/tls's form, such as a KMIP
// client wants them.
func TLSCertificate(chain []*x509.Certificate, key crypto.Signer) (tls.Certificate, error) {
	if err := matches(chain, key); err != nil {
		return tls.Certificate{}, err
	}
	t := tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, cert := range chain {
		t.Certificate = append(t.Certificate, cert.Raw)
	}
	return t, nil
}

// Leaf is the current certificate.
func (c *Credentials) Leaf() *x509.Certificate { return c.current.Load().Leaf }

func (c *Credentials) forServer(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
}

// forClient presents the certificate whatever CAs the server names: what is
// pinned is never among them.
func (c *Credentials) forClient(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
}

var (
	// ErrUntrusted means that a peer's certificate is not from the CA in
	// question, or not for this use.
	ErrUntrusted = errors.New("certificate is not trusted here")
	// ErrOtherIdentity means that a peer is trusted and somebody else.
	ErrOtherIdentity = errors.New("peer is somebody else")
)

// Mutual is one side of a connection between two roles of a trust domain,
// TLS 1.3. Trust comes from the domain's own CAs and the identity in the
// certificate; host names play no part, so roles may move.
type Mutual struct {
	Credentials *Credentials
	CAs         []*x509.Certificate // more than one while a CA is being replaced
	Now         func() time.Time    // nil: time.Now
}

// Server is the configuration of the accepting side. admit decides about a
// verified client; it runs on every connection, resumed ones too, so that a
// removed host is out at once. Its error is local: the client learns only that
// it was refused.
func (m Mutual) Server(admit func(Identity, *x509.Certificate) error) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: m.Credentials.forServer,
		ClientAuth:     tls.RequireAnyClientCert, // verified below, with the same words as on the other side
		Time:           m.Now,
		VerifyConnection: func(s tls.ConnectionState) error {
			id, err := m.verify(s, x509.ExtKeyUsageClientAuth)
			if err != nil {
				return err
			}
			return admit(id, s.PeerCertificates[0])
		},
	}
}

// Client is the configuration of the calling side, which wants to reach the
// given identity and nobody else; an empty name means anybody in the role.
func (m Mutual) Client(want Identity) *tls.Config {
	return &tls.Config{
		MinVersion:           tls.VersionTLS13,
		GetClientCertificate: m.Credentials.forClient,
		InsecureSkipVerify:   true, // of host names; VerifyConnection checks the chain and the identity
		Time:                 m.Now,
		VerifyConnection: func(s tls.ConnectionState) error {
			id, err := m.verify(s, x509.ExtKeyUsageServerAuth)
			if err != nil {
				return err
			}
			return expect(want, id)
		},
	}
}

func expect(want, id Identity) error {
	if id.Role != want.Role || want.Name != "" && id.Name != want.Name {
		return fmt.Errorf("pki: wanted %s, found %s: %w", want, id, ErrOtherIdentity)
	}
	return nil
}

func (m Mutual) verify(s tls.ConnectionState, use x509.ExtKeyUsage) (Identity, error) {
	return verifyChain(s.PeerCertificates, m.CAs, use, clock(m.Now)())
}

func verifyChain(chain, cas []*x509.Certificate, use x509.ExtKeyUsage, now time.Time) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, fmt.Errorf("pki: no certificate was shown: %w", ErrUntrusted)
	}
	if err := verifyUse(chain, cas, use, now); err != nil {
		return Identity{}, err
	}
	return IdentityOf(chain[0])
}

// verifyUse verifies the first certificate of a chain that is not empty, which may
// show the way to the CA.
func verifyUse(chain, cas []*x509.Certificate, use x509.ExtKeyUsage, now time.Time) error {
	leaf := chain[0]
	if err := CheckValid(leaf, now); err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	roots := x509.NewCertPool()
	for _, ca := range cas {
		roots.AddCert(ca)
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
		return fmt.Errorf("pki: certificate of %q: %w: %w", leaf.Subject, ErrUntrusted, err)
	}
	return nil
}

func clock(now func() time.Time) func() time.Time {
	if now == nil {
		return time.Now
	}
	return now
}

// KMIPServer is the configuration of a KMIP listener: TLS 1.2 for older
// clients, or 1.3. A client certificate is taken by pinning alone: admit says
// whether it is a known one (S3). It may be self-signed and lack extended key
// usage; it must not be expired. now may be nil, for time.Now.
func KMIPServer(c *Credentials, now func() time.Time, admit func(*x509.Certificate) error) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: c.forServer,
		ClientAuth:     tls.RequireAnyClientCert,
		Time:           now,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return fmt.Errorf("pki: no client certificate: %w", ErrUntrusted)
			}
			leaf := s.PeerCertificates[0]
			if err := CheckValid(leaf, clock(now)()); err != nil {
				return fmt.Errorf("pki: client %w", err)
			}
			return admit(leaf)
		},
	}
}

// DiskServer is the configuration of a server of disks (NBD), TLS 1.3: for QEMU and
// backup programs with a certificate of one of cas, for client authentication.
// With names, only clients that go by one of them get in: their identity, a DNS
// name or the common name. now may be nil, for time.Now.
func DiskServer(c *Credentials, cas []*x509.Certificate, names []string, now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: c.forServer,
		ClientAuth:     tls.RequireAnyClientCert, // verified below
		Time:           now,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return fmt.Errorf("pki: no client certificate: %w", ErrUntrusted)
			}
			if err := verifyUse(s.PeerCertificates, cas, x509.ExtKeyUsageClientAuth, clock(now)()); err != nil {
				return err
			}
			leaf := s.PeerCertificates[0]
			known := append([]string{leaf.Subject.CommonName}, leaf.DNSNames...)
			if id, err := IdentityOf(leaf); err == nil {
				known = append(known, id.String())
			}
			if len(names) == 0 || slices.ContainsFunc(known, func(k string) bool { return k != "" && slices.Contains(names, k) }) {
				return nil
			}
			return fmt.Errorf("pki: client %q is not among those that may use the disk: %w", leaf.Subject, ErrOtherIdentity)
		},
	}
}

// HTTPSServer is the configuration of an endpoint whose clients prove
// themselves by other means than a certificate: the API, and joining.
func HTTPSServer(c *Credentials) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: c.forServer}
}

// JoinClient is the configuration with which the holder of a token calls the
// center or key server that issued it. That must show its certificate and its
// CA's, and the CA must be the token's: only then may the token's secret be sent.
// want is as for [Mutual.Client].
func JoinClient(ca [sha256.Size]byte, want Identity, now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // of host names; VerifyConnection checks the chain and the identity
		Time:               now,
		VerifyConnection: func(s tls.ConnectionState) error {
			root, err := FindCA(s.PeerCertificates, ca)
			if err != nil {
				return err
			}
			id, err := verifyChain(s.PeerCertificates, []*x509.Certificate{root}, x509.ExtKeyUsageServerAuth, clock(now)())
			if err != nil {
				return err
			}
			return expect(want, id)
		},
	}
}

// FindCA returns the CA certificate with that fingerprint in a chain.
func FindCA(chain []*x509.Certificate, sum [sha256.Size]byte) (*x509.Certificate, error) {
	for _, c := range chain {
		if c.IsCA && Fingerprint(c) == sum {
			return c, nil
		}
	}
	return nil, fmt.Errorf("pki: the server does not show the CA that the token names (%s): it belongs to somebody else, or somebody is in between: %w", FormatThumbprint(sum), ErrUntrusted)
}
