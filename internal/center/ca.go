package center

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"mortise/internal/pki"
	"mortise/internal/store"
)

const (
	ownLife  = 30 * 24 * time.Hour      // of center's certificate towards hosts; its key is in memory only
	hostLife = 5 * 365 * 24 * time.Hour // of a host's certificate; removing the host ends it earlier
)

// authority is the CA of center and its hosts, and center's own certificate.
type authority struct {
	*pki.Authority
	own *pki.Credentials
	now func() time.Time
}

// caRecord is the CA in the store. Key is sealed by the root key.
type caRecord struct {
	Certificate []byte `json:"certificate"` // DER
	Key         []byte `json:"key"`
}

// openAuthority opens the CA, or makes it at the first start.
func openAuthority(ctx context.Context, s *store.Store, root pki.Sealer, now func() time.Time) (*authority, error) {
	records, err := store.NewCollection(ctx, s, "ca", store.JSON[caRecord](1))
	if err != nil {
		return nil, err
	}
	e, err := records.Get(ctx, "hosts")
	if errors.Is(err, store.ErrNotFound) {
		if e.Value, err = newCA(root, now()); err == nil {
			_, err = s.Commit(ctx, records.Create("hosts", e.Value))
		}
	}
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(e.Value.Certificate)
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w", err)
	}
	ca, err := pki.OpenAuthority(cert, root, e.Value.Key)
	if err != nil {
		return nil, fmt.Errorf("%w; is this the root key that this state was made with?", err)
	}
	a := &authority{Authority: ca, now: now}
	chain, key, err := a.issueOwn()
	if err != nil {
		return nil, err
	}
	a.own, err = pki.NewCredentials(chain, key)
	return a, err
}

func newCA(root pki.Sealer, now time.Time) (caRecord, error) {
	ca, err := pki.NewAuthority("Mortise center", now)
	if err != nil {
		return caRecord{}, err
	}
	sealed, err := ca.Seal(root)
	return caRecord{Certificate: ca.Certificate().Raw, Key: sealed}, err
}

func (a *authority) renew(ctx context.Context) error {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if a.own.Leaf().NotAfter.Sub(a.now()) > ownLife/2 {
			continue
		}
		chain, key, err := a.issueOwn()
		if err == nil {
			err = a.own.Replace(chain, key)
		}
		if err != nil {
			return fmt.Errorf("renewing center's certificate: %w", err)
		}
	}
}

// mutual is center's side of its connections with hosts.
func (a *authority) mutual() pki.Mutual {
	return pki.Mutual{Credentials: a.own, CAs: []*x509.Certificate{a.Certificate()}, Now: a.now}
}

// issueOwn certifies a new key of center's.
func (a *authority) issueOwn() ([]*x509.Certificate, crypto.Signer, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, nil, err
	}
	der, err := pki.NewCSR(key, pki.CenterName)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, err
	}
	id := pki.Identity{Role: pki.RoleCenter, Name: pki.CenterName}
	leaf, err := a.Issue(csr, pki.Grant{Identity: id, Server: true, Client: true, Life: ownLife}, a.now())
	if err != nil {
		return nil, nil, err
	}
	return []*x509.Certificate{leaf, a.Certificate()}, key, nil
}
