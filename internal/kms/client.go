package kms

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"mortise/internal/store"
)

// A Client is a certificate that may use an instance: pinned by the SHA-256 of
// its DER, whoever issued it (S3).
type Client struct {
	Fingerprint string    `json:"fingerprint"` // hexadecimal
	Name        string    `json:"name"`        // the administrator's label
	Role        Role      `json:"role"`
	Subject     string    `json:"subject"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	Added       time.Time `json:"added"`
	Certificate []byte    `json:"certificate"` // DER
}

var (
	// ErrUnknownClient: no such certificate is pinned for the instance.
	ErrUnknownClient = errors.New("client certificate is not known")
	// ErrExpired: the certificate is outside its validity.
	ErrExpired = errors.New("client certificate is outside its validity")
	// ErrClientExists: the certificate is pinned already.
	ErrClientExists = errors.New("client certificate is known already")
	// ErrLocked: the KMS has not been given its root keys yet.
	ErrLocked = errors.New("the key server is locked; unlock it with: mortise kms unlock")
	// ErrUnknownInstance: there is no instance of that id.
	ErrUnknownInstance = errors.New("no such instance")
)

// Session returns what the holder of cert may do with an instance, as of now:
// linearizable, so that a certificate that was removed is refused at once. from
// is the holder's address. The errors are ErrUnknownInstance, ErrUnknownClient,
// ErrExpired, or the store's.
func (k *KMS) Session(ctx context.Context, instanceID string, cert *x509.Certificate, from string) (*Session, error) {
	inst, err := k.instance(instanceID)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(cert.Raw)
	e, err := inst.clients.Get(ctx, hex.EncodeToString(sum[:]))
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("kms: %w: %q, SHA-256 %x; add it with: mortise kms client add FILE", ErrUnknownClient, cert.Subject, sum)
	}
	if err != nil {
		return nil, fmt.Errorf("kms: looking up client certificate %x: %w", sum, err)
	}
	if err := valid(cert, k.now()); err != nil {
		return nil, fmt.Errorf("kms: %q, SHA-256 %x: %w", cert.Subject, sum, err)
	}
	return &Session{k: k, inst: inst, synced: true, Actor: Actor{
		Kind: "certificate", Name: e.Value.Name, Fingerprint: e.Value.Fingerprint, From: from, Instance: inst.id, Role: e.Value.Role,
	}}, nil
}

func valid(cert *x509.Certificate, now time.Time) error {
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return fmt.Errorf("%w: from %s to %s", ErrExpired, cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// AddClient lets the holder of cert use an instance, from now on. name is the
// administrator's label; empty means the certificate's common name.
func (k *KMS) AddClient(ctx context.Context, instanceID, name string, cert *x509.Certificate) (Client, error) {
	inst, err := k.instance(instanceID)
	if err != nil {
		return Client{}, err
	}
	if err := valid(cert, k.now()); err != nil {
		return Client{}, fmt.Errorf("kms: adding client certificate %q: %w", cert.Subject, err)
	}
	if name == "" {
		name = cert.Subject.CommonName
	}
	sum := sha256.Sum256(cert.Raw)
	c := Client{
		Fingerprint: hex.EncodeToString(sum[:]),
		Name:        name,
		Role:        RoleAdministrator,
		Subject:     cert.Subject.String(),
		NotBefore:   cert.NotBefore.UTC(),
		NotAfter:    cert.NotAfter.UTC(),
		Added:       k.now().UTC().Truncate(time.Second),
		Certificate: cert.Raw,
	}
	if _, err := k.store.Commit(ctx, inst.clients.Create(c.Fingerprint, c)); err != nil {
		if errors.Is(err, store.ErrExists) {
			return Client{}, fmt.Errorf("kms: %w: SHA-256 %s", ErrClientExists, c.Fingerprint)
		}
		return Client{}, fmt.Errorf("kms: adding client certificate: %w", err)
	}
	k.log.Info("kms: client certificate added", "instance", inst.id, "client", name, "sha256", c.Fingerprint, "expires", c.NotAfter)
	return c, nil
}

// Clients lists the certificates of an instance by fingerprint.
func (k *KMS) Clients(ctx context.Context, instanceID string) ([]Client, error) {
	inst, err := k.instance(instanceID)
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

// RemoveClient ends the use of an instance by a certificate, on open
// connections too. fingerprint is hexadecimal, with or without colons.
func (k *KMS) RemoveClient(ctx context.Context, instanceID, fingerprint string) error {
	inst, err := k.instance(instanceID)
	if err != nil {
		return err
	}
	fingerprint = strings.ToLower(strings.ReplaceAll(fingerprint, ":", ""))
	if b, err := hex.DecodeString(fingerprint); err != nil || len(b) != sha256.Size {
		return fmt.Errorf("kms: %w: %q is no SHA-256 fingerprint of 64 hexadecimal digits; see: mortise kms client ls", ErrUnknownClient, fingerprint)
	}
	if _, err := k.store.Commit(ctx, inst.clients.Delete(fingerprint, 0)); err != nil {
		if errors.Is(err, store.ErrNotFound) {
			return fmt.Errorf("kms: %w: SHA-256 %s; see: mortise kms client ls", ErrUnknownClient, fingerprint)
		}
		return fmt.Errorf("kms: removing client certificate: %w", err)
	}
	k.log.Info("kms: client certificate removed", "instance", inst.id, "sha256", fingerprint)
	return nil
}

func (k *KMS) instance(id string) (*instance, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if i := k.instances[id]; i != nil {
		return i, nil
	}
	if len(k.roots) == 0 {
		return nil, fmt.Errorf("kms: %w", ErrLocked)
	}
	return nil, fmt.Errorf("kms: %w: %q", ErrUnknownInstance, id)
}
