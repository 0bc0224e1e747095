package kms

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"mortise/internal/pki"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// An instance has a CA of its own, made when it issues its first certificate.
// What it issues is pinned like any other certificate: that the CA has signed a
// certificate lets nobody in.

// Bounds on the life of issued certificates.
const (
	issuedLife    = 365 * 24 * time.Hour
	maxIssuedLife = 10 * issuedLife
	maxHosts      = 50
)

// IssueRequest asks an instance's CA for a client certificate.
type IssueRequest struct {
	Name  string   // label and common name
	Role  Role     // "" means key manager
	Hosts []string // subject alternative names; none means Name, if it is a DNS name
	Life  time.Duration
	RSA   bool   // an RSA-3072 key for clients that take no ECDSA; P-256 otherwise
	CSR   []byte // PEM; the client has made its key itself. nil: the key is made here

	replaces string
	overlap  time.Time
}

// An Issued is a client certificate that an instance's CA has made.
type Issued struct {
	Client Client
	Chain  []*x509.Certificate // the certificate and the CA's
	Key    *secret.Key         // PKCS#8, the caller's to wipe; nil if the client made it. It is kept nowhere else
}

// IssueClient makes a client certificate and lets it in.
func (k *KMS) IssueClient(ctx context.Context, by Actor, instanceID string, r IssueRequest) (issued Issued, err error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return issued, err
	}
	if err := r.check(); err != nil {
		return issued, err
	}
	csr, key, err := r.request()
	if err != nil {
		return issued, err
	}
	ca, err := k.authority(ctx, by, inst)
	if err != nil {
		return issued, err
	}
	cert, err := ca.Issue(csr, pki.Grant{Name: r.Name, Hosts: r.Hosts, Client: true, Life: r.Life}, k.now())
	if err != nil {
		return issued, fmt.Errorf("kms: %w: %w", ErrInvalid, err)
	}
	issued.Chain = []*x509.Certificate{cert, ca.Certificate()}
	if key != nil {
		if issued.Key, err = pki.MarshalKey(key); err != nil {
			return issued, fmt.Errorf("kms: issuing a client certificate: %w", err)
		}
	}
	issued.Client, err = k.AddClient(ctx, by, instanceID, NewClient{
		Certificate: cert, Name: r.Name, Role: r.Role, Replaces: r.replaces, Overlap: r.overlap, issued: true,
	})
	if err != nil && issued.Key != nil {
		issued.Key.Wipe()
	}
	return issued, err
}

func (r *IssueRequest) check() error {
	if err := checkLabel(r.Name); err != nil {
		return err
	}
	if len(r.Hosts) == 0 && validServerName.MatchString(r.Name) {
		r.Hosts = []string{r.Name}
	}
	if r.Life == 0 {
		r.Life = issuedLife
	}
	switch {
	case len(r.Name) > 64: // RFC 5280, ub-common-name
		return fmt.Errorf("kms: %w: the name of an issued certificate has at most 64 bytes", ErrInvalid)
	case len(r.Hosts) == 0:
		return fmt.Errorf("kms: %w: %q is no DNS name, so a subject alternative name is needed: a DNS name or an IP address of the client", ErrInvalid, r.Name)
	case len(r.Hosts) > maxHosts:
		return fmt.Errorf("kms: %w: a certificate has at most %d subject alternative names", ErrInvalid, maxHosts)
	case r.Life < time.Hour || r.Life > maxIssuedLife:
		return fmt.Errorf("kms: %w: a client certificate lives at least an hour and at most %d days", ErrInvalid, int(maxIssuedLife.Hours()/24))
	}
	for _, h := range r.Hosts {
		if net.ParseIP(h) == nil && (!validServerName.MatchString(h) || len(h) > 253) {
			return fmt.Errorf("kms: %w: %q is neither a DNS name nor an IP address", ErrInvalid, h)
		}
	}
	return nil
}

// request is the certificate request, with the key if it is made here.
func (r *IssueRequest) request() (*x509.CertificateRequest, crypto.Signer, error) {
	if r.CSR != nil {
		block, _ := pem.Decode(r.CSR)
		if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
			return nil, nil, fmt.Errorf("kms: %w: no PEM certificate request (-----BEGIN CERTIFICATE REQUEST-----) is in it", ErrInvalid)
		}
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("kms: %w: reading the certificate request: %w", ErrInvalid, err)
		}
		return csr, nil, nil
	}
	var key crypto.Signer
	var err error
	if r.RSA {
		key, err = rsa.GenerateKey(rand.Reader, 3072)
	} else {
		key, err = pki.GenerateKey()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("kms: making a client key: %w", err)
	}
	der, err := pki.NewCSR(key, r.Name)
	if err != nil {
		return nil, nil, fmt.Errorf("kms: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	return csr, key, err
}

// A Renewal asks for a certificate in the place of one that ends.
type Renewal struct {
	Certificate *x509.Certificate // the new one; nil: the instance's CA issues it
	Overlap     time.Time         // until when the old one is still accepted; zero: to its own end
	Life        time.Duration     // of an issued one; 0: as long as the old one
	Hosts       []string          // of an issued one; none: the old one's
	RSA         bool
	CSR         []byte
}

// RenewClient lets a new certificate in with the label and role of an old one,
// which stays valid for the overlap, so that the client can change over in its
// own time.
func (k *KMS) RenewClient(ctx context.Context, by Actor, instanceID, which string, r Renewal) (Issued, error) {
	old, err := k.Client(ctx, instanceID, which)
	if err != nil {
		return Issued{}, err
	}
	if r.Certificate != nil {
		c, err := k.AddClient(ctx, by, instanceID, NewClient{Certificate: r.Certificate, Replaces: old.Fingerprint, Overlap: r.Overlap})
		return Issued{Client: c, Chain: []*x509.Certificate{r.Certificate}}, err
	}
	if !old.Issued && r.CSR == nil {
		return Issued{}, fmt.Errorf("kms: %w: the certificate of %s was not issued here, so its key is not known here: give the new certificate that the client made, or a certificate request", ErrInvalid, old.Name)
	}
	if r.Life == 0 {
		r.Life = max(min(old.NotAfter.Sub(old.NotBefore).Round(time.Hour), maxIssuedLife), time.Hour)
	}
	if len(r.Hosts) == 0 {
		r.Hosts = old.Hosts
	}
	return k.IssueClient(ctx, by, instanceID, IssueRequest{
		Name: old.Name, Role: old.Role, Hosts: r.Hosts, Life: r.Life, RSA: r.RSA, CSR: r.CSR, replaces: old.Fingerprint, overlap: r.Overlap,
	})
}

// authorityKey is the record of an instance's one CA.
const authorityKey = "ca"

// authority returns the instance's CA, making it the first time.
func (k *KMS) authority(ctx context.Context, by Actor, i *instance) (*pki.Authority, error) {
	e, err := i.authorities.Get(ctx, authorityKey)
	if errors.Is(err, store.ErrNotFound) {
		var fresh *authority
		if fresh, err = newAuthority(i.id, k.now()); err != nil {
			return nil, fmt.Errorf("kms: making the CA of instance %s: %w", i.id, err)
		}
		defer fresh.key.Wipe()
		err = k.act(ctx, by, i, "ca create", i.id, func() ([]store.Op, error) { return []store.Op{i.authorities.Create(authorityKey, fresh)}, nil })
		if err != nil && !errors.Is(err, store.ErrExists) {
			return nil, err
		}
		e, err = i.authorities.Get(ctx, authorityKey)
	}
	if err != nil {
		return nil, fmt.Errorf("kms: reading the CA of instance %s: %w", i.id, err)
	}
	return e.Value.open()
}

// authority is a CA as its record has it: the certificate in clear, the key only
// while it signs.
type authority struct {
	cert   *x509.Certificate
	key    *secret.Key // of one that is not written yet; PKCS#8
	at     string      // and otherwise where the record is,
	stored []byte      // what is in it,
	opener store.Sealer
}

func newAuthority(id string, now time.Time) (*authority, error) {
	ca, err := pki.NewAuthority("Mortise KMS instance "+id, now)
	if err != nil {
		return nil, err
	}
	var taken keyTaker
	if _, err := ca.Seal(&taken); err != nil {
		return nil, err
	}
	return &authority{cert: ca.Certificate(), key: taken.key}, nil
}

func (a *authority) open() (*pki.Authority, error) {
	key, err := a.secret()
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return pki.OpenAuthority(a.cert, &keyTaker{key}, nil)
}

// secret returns a copy of the CA's key, the caller's to wipe.
func (a *authority) secret() (*secret.Key, error) {
	if a.key != nil {
		return a.key.Clone()
	}
	plain, err := a.opener.Open(a.stored, []byte(a.at))
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", a.at, err)
	}
	defer clear(plain)
	_, key, err := splitAuthority(plain)
	if err != nil {
		return nil, err
	}
	return secret.Copy(key)
}

// keyTaker is a [pki.Sealer] that takes a key out of an authority and puts it
// back in: the record that it goes into is sealed as a whole.
type keyTaker struct{ key *secret.Key }

func (t *keyTaker) Seal(k *secret.Key, _ []byte) (_ []byte, err error) {
	t.key, err = k.Clone()
	return nil, err
}
func (t *keyTaker) Open([]byte, []byte) (*secret.Key, error) { return t.key.Clone() }

// authorityCodec stores a CA as the length of its certificate (4 bytes,
// big-endian), the certificate (DER) and the key (PKCS#8), sealed together.
type authorityCodec struct{ store.Sealer }

func (c authorityCodec) Encode(at string, a *authority) ([]byte, error) {
	key, err := a.secret()
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	plain := make([]byte, 0, 4+len(a.cert.Raw)+key.Len()) // grows no copy of the key
	defer clear(plain[:cap(plain)])
	plain = binary.BigEndian.AppendUint32(plain, uint32(len(a.cert.Raw)))
	plain = append(plain, a.cert.Raw...)
	key.Use(func(b []byte) { plain = append(plain, b...) })
	return c.Seal(plain, []byte(at))
}

func (c authorityCodec) Decode(at string, stored []byte) (*authority, error) {
	plain, err := c.Open(stored, []byte(at))
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", at, err)
	}
	defer clear(plain)
	der, _, err := splitAuthority(plain)
	if err != nil {
		return nil, fmt.Errorf("decoding %s: %w", at, err)
	}
	cert, err := x509.ParseCertificate(slices.Clone(der))
	if err != nil {
		return nil, fmt.Errorf("decoding %s: %w", at, err)
	}
	return &authority{cert: cert, at: at, stored: bytes.Clone(stored), opener: c.Sealer}, nil
}

func splitAuthority(plain []byte) (cert, key []byte, err error) {
	if len(plain) < 4 {
		return nil, nil, errors.New("the record of a CA has at least 4 bytes")
	}
	n := binary.BigEndian.Uint32(plain)
	if uint64(n) > uint64(len(plain)-4) {
		return nil, nil, errors.New("the lengths in the record of a CA do not fit")
	}
	return plain[4 : 4+n], plain[4+n:], nil
}
