package cluster

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// authorityRecord is the peers' CA in the store: its key sealed by the root key
// called Root at the provider of that Kind.
type authorityRecord struct {
	Certificate []byte // DER
	Kind        string
	Root        string
	Sealed      []byte
}

const authorityKey = "authority"

// rootSealer seals with one root key of a provider, as pki wants it.
type rootSealer struct {
	ctx  context.Context
	keys kms.RootKeys
	id   string
}

func (s rootSealer) Seal(k *secret.Key, aad []byte) ([]byte, error) {
	return s.keys.Seal(s.ctx, s.id, k, aad)
}

func (s rootSealer) Open(blob, aad []byte) (*secret.Key, error) {
	return s.keys.Open(s.ctx, s.id, blob, aad)
}

// authorityUse is what the KMS knows the root key of the peers' CA by.
const authorityUse = "the members' CA"

// recordRootKey tells the KMS of the root key of a CA that was made when root keys
// of its kind were not recorded.
func (n *Node) recordRootKey(ctx context.Context, st *state) error {
	e, err := st.authority.Get(ctx, authorityKey)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = n.kms.RecordRootKey(ctx, e.Value.Root, e.Value.Kind, authorityUse)
	}
	if err != nil {
		return fmt.Errorf("cluster: recording the root key of the peers' CA: %w", err)
	}
	return nil
}

// issue certifies a member's key.
func issue(ca *pki.Authority, csr *x509.CertificateRequest, name string, life time.Duration, now time.Time) (*x509.Certificate, error) {
	return ca.Issue(csr, pki.Grant{Identity: identity(name), Hosts: []string{store.PeerHost}, Server: true, Client: true, Life: life}, now)
}

// request makes a certificate request for a key. What it says does not count.
func request(key crypto.Signer) (*x509.CertificateRequest, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("cluster: making a certificate request: %w", err)
	}
	return x509.ParseCertificateRequest(der)
}

// keepAuthority seals the CA's key into the store, under a new root key that is
// the cluster's own, once the first member is unlocked.
func (n *Node) keepAuthority(ctx context.Context) error {
	n.sealing.Lock() // one at a time, and the next finds nothing to do
	defer n.sealing.Unlock()
	n.mu.Lock()
	fresh, keys, state := n.fresh, n.keys, n.state
	n.mu.Unlock()
	if fresh == nil || len(keys) == 0 {
		return nil
	}
	id, err := n.kms.MakeRootKey(ctx, keys[0], authorityUse)
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	sealed, err := fresh.Seal(rootSealer{ctx, keys[0], id})
	if err != nil {
		return fmt.Errorf("cluster: sealing the peers' CA: %w", err)
	}
	// Whatever is there was left by a crash in this place: while the folder is
	// marked as unsealed, its CA has certified nobody else.
	if _, err := n.store.Commit(ctx, state.authority.Put(authorityKey, authorityRecord{fresh.Certificate().Raw, keys[0].Kind(), id, sealed})); err != nil {
		return fmt.Errorf("cluster: keeping the peers' CA: %w", err)
	}
	if err := n.kms.DropRootKeys(ctx, authorityUse, id); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if err := n.sealedNow(); err != nil {
		return err
	}
	n.mu.Lock()
	n.fresh = nil
	n.mu.Unlock()
	return nil
}

// authority opens the peers' CA, for as long as one certificate takes.
func (n *Node) authority(ctx context.Context) (*pki.Authority, error) {
	n.mu.Lock()
	keys, state := n.keys, n.state
	n.mu.Unlock()
	if state == nil || len(keys) == 0 {
		return nil, ErrLocked
	}
	e, err := state.authority.Get(ctx, authorityKey)
	if errors.Is(err, store.ErrNotFound) {
		if err = n.keepAuthority(ctx); err == nil {
			e, err = state.authority.Get(ctx, authorityKey)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cluster: reading the peers' CA: %w", err)
	}
	cert, err := x509.ParseCertificate(e.Value.Certificate)
	if err != nil {
		return nil, fmt.Errorf("cluster: reading the peers' CA: %w", err)
	}
	for _, k := range keys {
		if k.Kind() == e.Value.Kind {
			return pki.OpenAuthority(cert, rootSealer{ctx, k, e.Value.Root}, e.Value.Sealed)
		}
	}
	return nil, fmt.Errorf("cluster: the peers' CA is sealed by a root key of kind %q, which is not open here: %w", e.Value.Kind, ErrLocked)
}

// renew replaces this member's certificate when two thirds of its life are over.
func (n *Node) renew(ctx context.Context) error {
	leaf, now := n.creds.Leaf(), n.now()
	if now.Before(pki.RenewAt(leaf)) {
		return nil
	}
	ca, err := n.authority(ctx)
	if err != nil {
		return fmt.Errorf("cluster: this member's certificate ends at %s and is not renewed: %w", leaf.NotAfter.Format(time.RFC3339), err)
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	csr, err := request(key)
	if err != nil {
		return err
	}
	cert, err := issue(ca, csr, n.Name, n.certLife, now)
	if err != nil {
		return err
	}
	chain := []*x509.Certificate{cert, ca.Certificate()}
	if err := pki.SaveKeyPair(n.path("peer.pem"), chain, key); err != nil {
		return err
	}
	if err := n.creds.Replace(chain, key); err != nil {
		return err
	}
	n.log.Info("peer certificate renewed", "until", cert.NotAfter)
	return nil
}
