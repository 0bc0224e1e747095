package kms

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mortise/internal/pki"
	"mortise/internal/store"
)

// A Client is a certificate that may use an instance: pinned by the SHA-256 of
// its DER, whoever issued it (S3).
type Client struct {
	Fingerprint string    `json:"fingerprint" doc:"SHA-256 of the certificate's DER, hexadecimal"`
	Name        string    `json:"name" doc:"the administrator's label"`
	Role        Role      `json:"role"`
	Subject     string    `json:"subject"`
	Hosts       []string  `json:"hosts,omitempty" doc:"subject alternative names: DNS names and IP addresses"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	// Until ends the use of a certificate before its own end; zero: it does not.
	Until       time.Time `json:"until,omitzero" doc:"accepted until then, although the certificate itself lives longer"`
	Issued      bool      `json:"issued,omitempty" doc:"the instance's own CA made it"`
	Replaces    string    `json:"replaces,omitempty" doc:"fingerprint of the certificate that it renews"`
	Added       time.Time `json:"added"`
	Certificate []byte    `json:"certificate" doc:"DER"`
}

// Ends is when the certificate is no longer accepted.
func (c *Client) Ends() time.Time {
	if !c.Until.IsZero() && c.Until.Before(c.NotAfter) {
		return c.Until
	}
	return c.NotAfter
}

var (
	// ErrUnknownClient: no such certificate is pinned for the instance.
	ErrUnknownClient = errors.New("client certificate is not known")
	// ErrExpired: the certificate, or the API key, is outside its validity.
	ErrExpired = errors.New("outside its validity")
	// ErrClientExists: the certificate is pinned already.
	ErrClientExists = errors.New("client certificate is known already")
)

// Session returns what the holder of cert may do with an instance, as of now:
// linearizable, so that a certificate that was removed is refused at once. from
// is the holder's address. The errors are ErrUnknownInstance, ErrUnknownClient,
// ErrExpired, ErrInstanceLocked, or the store's.
func (k *KMS) Session(ctx context.Context, instanceID string, cert *x509.Certificate, from string) (*Session, error) {
	return k.sessionOf(ctx, instanceID, cert, fingerprint(cert), from)
}

// sessionOf is [KMS.Session] with the certificate's fingerprint.
func (k *KMS) sessionOf(ctx context.Context, instanceID string, cert *x509.Certificate, sum, from string) (*Session, error) {
	inst, settings, err := k.serving(ctx, instanceID)
	if err != nil {
		return nil, err
	}
	e, ok := inst.clients.Peek(sum) // serving has synced
	if !ok {
		return nil, k.stranger(inst, cert, from, fmt.Errorf("kms: %w: %q, SHA-256 %s; add it with: mortise kms client add FILE", ErrUnknownClient, cert.Subject, sum))
	}
	if err := e.Value.valid(k.now()); err != nil {
		return nil, k.stranger(inst, cert, from, fmt.Errorf("kms: client certificate %q, SHA-256 %s: %w", cert.Subject, sum, err))
	}
	if err := k.admitted(); err != nil {
		return nil, err
	}
	s := inst.session(k, e, from)
	s.synced, s.quota = true, settings.Quota
	return s, nil
}

// session is one of the holder of a client's record.
func (i *instance) session(k *KMS, e store.Entry[Client], from string) *Session {
	return &Session{k: k, inst: i, Actor: Actor{
		Kind: "certificate", Name: e.Value.Name, Fingerprint: e.Value.Fingerprint, From: from, Instance: i.id, Role: e.Value.Role,
	}}
}

func (c *Client) valid(now time.Time) error {
	if now.Before(c.NotBefore) || now.After(c.Ends()) {
		return fmt.Errorf("%w: from %s to %s", ErrExpired, c.NotBefore.UTC().Format(time.RFC3339), c.Ends().UTC().Format(time.RFC3339))
	}
	return nil
}

// A NewClient is a certificate to let in.
type NewClient struct {
	Certificate *x509.Certificate
	Name        string // label; "" means the certificate's common name, or else its fingerprint
	Role        Role   // "" means key manager
	// Replaces is the fingerprint of a certificate that this one renews; "" none.
	// The old one stays valid until Overlap, if that is not zero, or its own end.
	Replaces string
	Overlap  time.Time

	issued bool
}

// AddClient lets the holder of a certificate use an instance, from now on.
func (k *KMS) AddClient(ctx context.Context, by Actor, instanceID string, n NewClient) (Client, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return Client{}, err
	}
	c, err := k.newClient(n)
	if err != nil {
		return Client{}, err
	}
	err = k.act(ctx, by, inst, "client add", c.Fingerprint, func() (ops []store.Op, err error) {
		if n.Replaces != "" {
			old, op, err := k.supersede(ctx, inst, n)
			if err != nil {
				return nil, err
			}
			ops = append(ops, op)
			if c.Replaces = old.Fingerprint; n.Name == "" {
				c.Name = old.Name
			}
			if n.Role == "" {
				c.Role = old.Role
			}
		}
		r, err := k.record(ctx, inst.id)
		if err != nil {
			return nil, err
		}
		if err := inst.roomForClient(r.Value.Settings.Quota); err != nil {
			return nil, err
		}
		return append(ops, inst.clients.Create(c.Fingerprint, c)), nil
	})
	if errors.Is(err, store.ErrExists) {
		return Client{}, fmt.Errorf("kms: %w: SHA-256 %s", ErrClientExists, c.Fingerprint)
	}
	if err != nil {
		return Client{}, err
	}
	k.log.Info("kms: client certificate added", "instance", inst.id, "client", c.Name, "role", c.Role, "sha256", c.Fingerprint, "expires", c.NotAfter, "by", by.Name)
	return c, nil
}

func (k *KMS) newClient(n NewClient) (c Client, err error) {
	cert := n.Certificate
	c = Client{
		Fingerprint: fingerprint(cert),
		Name:        n.Name,
		Subject:     cert.Subject.String(),
		Hosts:       slices.Clone(cert.DNSNames),
		NotBefore:   cert.NotBefore.UTC(),
		NotAfter:    cert.NotAfter.UTC(),
		Issued:      n.issued,
		Added:       k.now().UTC().Truncate(time.Second),
		Certificate: cert.Raw,
	}
	for _, ip := range cert.IPAddresses {
		c.Hosts = append(c.Hosts, ip.String())
	}
	if c.Role, err = ParseRole(string(n.Role)); err != nil {
		return c, err
	}
	if c.Name == "" {
		c.Name = cert.Subject.CommonName
	}
	if c.Name == "" {
		c.Name = c.Fingerprint[:16]
	}
	if err := checkLabel(c.Name); err != nil {
		return c, err
	}
	if err := c.valid(k.now()); err != nil {
		return c, fmt.Errorf("kms: adding client certificate %q: %w", cert.Subject, err)
	}
	return c, nil
}

// supersede finds the certificate that n renews, and the write that ends it when
// the overlap is over.
func (k *KMS) supersede(ctx context.Context, inst *instance, n NewClient) (Client, store.Op, error) {
	e, err := inst.client(ctx, n.Replaces)
	if err != nil {
		return Client{}, store.Op{}, err
	}
	old := e.Value
	if fingerprint(n.Certificate) == old.Fingerprint {
		return old, store.Op{}, fmt.Errorf("kms: %w: the renewal is the certificate that is there already", ErrClientExists)
	}
	if !n.Overlap.IsZero() {
		if n.Overlap.Before(k.now()) {
			return old, store.Op{}, fmt.Errorf("kms: %w: the old certificate is to end at %s, which is past; revoke it if that is meant", ErrInvalid, n.Overlap.UTC().Format(time.RFC3339))
		}
		old.Until = n.Overlap.UTC().Truncate(time.Second)
	}
	return old, inst.clients.Update(e.Key, e.Revision, old), nil
}

// Clients lists the certificates of an instance by fingerprint.
func (k *KMS) Clients(ctx context.Context, instanceID string) ([]Client, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return nil, err
	}
	entries, err := inst.clients.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing client certificates: %w", err)
	}
	list := make([]Client, 0, len(entries))
	for _, e := range entries {
		list = append(list, e.Value)
	}
	return list, nil
}

// Client returns one certificate of an instance, by its fingerprint or the
// beginning of it, at least 8 digits long, or by its label if that is unique.
func (k *KMS) Client(ctx context.Context, instanceID, which string) (Client, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return Client{}, err
	}
	e, err := inst.client(ctx, which)
	return e.Value, err
}

func (i *instance) client(ctx context.Context, which string) (found store.Entry[Client], err error) {
	entries, err := i.clients.List(ctx, "")
	if err != nil {
		return found, fmt.Errorf("kms: looking up a client certificate: %w", err)
	}
	begin := strings.ToLower(strings.ReplaceAll(which, ":", ""))
	n := 0
	for _, e := range entries {
		if e.Key == begin {
			return e, nil
		}
		if e.Value.Name == which || len(begin) >= 8 && strings.HasPrefix(e.Key, begin) {
			found, n = e, n+1
		}
	}
	switch n {
	case 0:
		return found, fmt.Errorf("kms: %w: %q is neither a fingerprint (SHA-256, from 8 hexadecimal digits on) nor a label in instance %s; see: mortise kms client ls", ErrUnknownClient, which, i.id)
	case 1:
		return found, nil
	}
	return store.Entry[Client]{}, fmt.Errorf("kms: %w: %q means %d certificates of instance %s; give the fingerprint, see: mortise kms client ls", ErrInvalid, which, n, i.id)
}

// RemoveClient ends the use of an instance by a certificate, on open
// connections too, from their next message on. which is as in [KMS.Client].
func (k *KMS) RemoveClient(ctx context.Context, by Actor, instanceID, which string) (Client, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return Client{}, err
	}
	e, err := inst.client(ctx, which)
	if err != nil {
		return Client{}, err
	}
	if err := k.act(ctx, by, inst, "client revoke", e.Key, func() ([]store.Op, error) { return []store.Op{inst.clients.Delete(e.Key, 0)}, nil }); err != nil {
		return Client{}, err
	}
	k.log.Info("kms: client certificate removed", "instance", inst.id, "client", e.Value.Name, "sha256", e.Key, "by", by.Name)
	return e.Value, nil
}

// ParseClientCertificate reads one PEM certificate; of a chain, the first. Text
// that holds a private key is refused: it does not belong here.
func ParseClientCertificate(text []byte) (*x509.Certificate, error) {
	if strings.Contains(string(text), "PRIVATE KEY-----") {
		return nil, fmt.Errorf("kms: %w: the file holds a private key; give the certificate alone", ErrInvalid)
	}
	chain, err := pki.ParseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("kms: %w: %w", ErrInvalid, err)
	}
	return chain[0], nil
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// maxLabel is the longest label of a client or an API key, in bytes.
const maxLabel = 128

func checkLabel(name string) error {
	if name == "" || len(name) > maxLabel || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("kms: %w: a name has 1 to %d bytes and no control characters", ErrInvalid, maxLabel)
	}
	return nil
}

// WarnAhead is how long before its end a client certificate is warned of (S3).
const WarnAhead = 30 * 24 * time.Hour

// Warning is what an administrator should know about a certificate's end; ""
// for nothing.
func (c *Client) Warning(now time.Time) string {
	left := c.Ends().Sub(now)
	switch {
	case left <= 0:
		return "expired"
	case left <= 24*time.Hour:
		return "expires within a day"
	case left <= WarnAhead:
		return fmt.Sprintf("expires in %d days", int(left.Hours()/24))
	}
	return ""
}
