package center

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/kmipc"
	"mortise/internal/pki"
	"mortise/internal/provider"
	"mortise/internal/task"
)

// clientLife is how long a client certificate that center makes is valid.
const clientLife = 10 * 365 * 24 * time.Hour

// expiryWarning is how long before its end a certificate is reported.
const expiryWarning = 30 * 24 * time.Hour

// FetchServerCertificate asks a registered server for its certificate, for an
// administrator to compare (K13). The thumbprint is SHA-256.
func (c *Center) FetchServerCertificate(ctx context.Context, p Principal, id, server string) (pem, thumb string, err error) {
	if err := c.Check(p, authz.CryptoReadKeyServersInfo, inventory.RootFolder); err != nil {
		return "", "", err
	}
	e, err := c.providers.record(ctx, id)
	if err != nil {
		return "", "", err
	}
	for _, s := range e.Value.Servers {
		if s.Name == server || server == "" {
			return fetchCertificate(ctx, s.KmipServer)
		}
	}
	return "", "", noServer(id, server)
}

// FetchCertificateAt asks a server that is not registered for its certificate.
func (c *Center) FetchCertificateAt(ctx context.Context, p Principal, server KmipServer) (pem, thumb string, err error) {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return "", "", err
	}
	if server.Name == "" {
		server.Name = server.Address
	}
	if err := checkServer(server); err != nil {
		return "", "", err
	}
	return fetchCertificate(ctx, server)
}

func fetchCertificate(ctx context.Context, s KmipServer) (string, string, error) {
	chain, thumb, err := kmipc.FetchServerCertificate(ctx, s.address())
	if err != nil {
		return "", "", fault(task.ProviderDown, "the certificate of key server %q (%s) could not be fetched: %v", s.Name, s.address(), err).Because(err)
	}
	return string(pki.EncodeCertificates(chain...)), thumb, nil
}

// TrustServerCertificate confirms a server's certificate: it, and no CA, makes
// center trust the server. An empty server means all of the provider. The
// certificate that was confirmed before stays valid beside one new one, so that
// a server can renew its own.
func (c *Center) TrustServerCertificate(ctx context.Context, p Principal, id, server, pem string) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	chain, err := pki.ParseCertificates([]byte(pem))
	if err != nil {
		f := invalid("certificate", "the key server's certificate: %v", err)
		f.Kind = task.InvalidCertificate
		return f
	}
	sum := pki.Fingerprint(chain[0])
	pin := hex.EncodeToString(sum[:])
	trust := func(list []string) []string {
		list = slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == pin })
		return append(list[max(0, len(list)-1):], pin)
	}
	return c.editProvider(ctx, p, id, fmt.Sprintf("The server certificate %s was confirmed", pki.Thumbprint(chain[0])), func(r *providerRecord) error {
		if server == "" {
			r.Trusted = trust(r.Trusted)
			return nil
		}
		for i := range r.Servers {
			if r.Servers[i].Name == server {
				r.Servers[i].Trusted = trust(r.Servers[i].Trusted)
				return nil
			}
		}
		return noServer(id, server)
	})
}

// GenerateSelfSignedClientCert makes a client certificate; it is used once
// UpdateSelfSignedClientCert has confirmed it.
func (c *Center) GenerateSelfSignedClientCert(ctx context.Context, p Principal, id string) (string, error) {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return "", err
	}
	if _, err := c.providers.record(ctx, id); err != nil {
		return "", err
	}
	cert, key, err := pki.NewKMIPClient(clientLife, c.now())
	if err != nil {
		return "", err
	}
	pending, err := c.sealClient(id, pki.EncodeCertificates(cert), key)
	if err != nil {
		return "", err
	}
	err = c.editProvider(ctx, p, id, "A client certificate was made", func(r *providerRecord) error { r.Pending = pending; return nil })
	return string(pending.PEM), err
}

func (c *Center) sealClient(id string, pem []byte, key crypto.Signer) (*clientRecord, error) {
	k, err := pki.MarshalKey(key)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	sealed, err := c.cfg.RootKey.Seal(k, clientBinding(id))
	return &clientRecord{PEM: pem, Key: sealed}, err
}

// RetrieveSelfSignedClientCert returns the certificate that was made last.
func (c *Center) RetrieveSelfSignedClientCert(ctx context.Context, p Principal, id string) (string, error) {
	return c.clientPEM(ctx, p, id, "self-signed client certificate", func(r providerRecord) *clientRecord { return r.Pending })
}

// ClientCert returns the client certificate that is in use.
func (c *Center) ClientCert(ctx context.Context, p Principal, id string) (string, error) {
	return c.clientPEM(ctx, p, id, "client certificate", func(r providerRecord) *clientRecord { return r.Client })
}

// RetrieveClientCSR returns the certificate request that was made last.
func (c *Center) RetrieveClientCSR(ctx context.Context, p Principal, id string) (string, error) {
	return c.clientPEM(ctx, p, id, "certificate request", func(r providerRecord) *clientRecord { return r.Request })
}

func (c *Center) clientPEM(ctx context.Context, p Principal, id, what string, which func(providerRecord) *clientRecord) (string, error) {
	if err := c.Check(p, authz.CryptoReadKeyServersInfo, inventory.RootFolder); err != nil {
		return "", err
	}
	e, err := c.providers.record(ctx, id)
	if err != nil {
		return "", err
	}
	r := which(e.Value)
	if r == nil {
		return "", fault(task.InvalidState, "key provider %q has no %s; make one first (provider trust)", id, what)
	}
	return string(r.PEM), nil
}

// UpdateSelfSignedClientCert puts the generated certificate into use.
func (c *Center) UpdateSelfSignedClientCert(ctx context.Context, p Principal, id, pem string) error {
	return c.useClient(ctx, p, id, pem, func(r *providerRecord) **clientRecord { return &r.Pending })
}

// GenerateClientCSR makes a key and a certificate request for it.
func (c *Center) GenerateClientCSR(ctx context.Context, p Principal, id string) (string, error) {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return "", err
	}
	if _, err := c.providers.record(ctx, id); err != nil {
		return "", err
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return "", err
	}
	der, err := pki.NewCSR(key, pki.KMIPClientName(c.now()))
	if err != nil {
		return "", err
	}
	request, err := c.sealClient(id, pki.EncodeCSR(der), key)
	if err != nil {
		return "", err
	}
	err = c.editProvider(ctx, p, id, "A certificate request was made", func(r *providerRecord) error { r.Request = request; return nil })
	return string(request.PEM), err
}

// UploadSignedCSR puts the certificate of the request into use.
func (c *Center) UploadSignedCSR(ctx context.Context, p Principal, id, pem string) error {
	return c.useClient(ctx, p, id, pem, func(r *providerRecord) **clientRecord { return &r.Request })
}

// useClient puts a certificate into use whose key center made and keeps sealed
// in waiting.
func (c *Center) useClient(ctx context.Context, p Principal, id, pem string, waiting func(*providerRecord) **clientRecord) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	return c.editProvider(ctx, p, id, "Center's client certificate was changed", func(r *providerRecord) error {
		w := waiting(r)
		if *w == nil {
			return fault(task.InvalidState, "key provider %q: center has made no key for such a certificate; generate it first", id)
		}
		next := &clientRecord{PEM: []byte(pem), Key: (*w).Key}
		cert, err := c.clientCertificate(id, next)
		if err != nil {
			return err
		}
		if err := c.checkClient(id, cert.Leaf, cert.PrivateKey.(crypto.Signer)); err != nil {
			return err
		}
		r.Client, *w = next, nil
		return nil
	})
}

// UploadClientCert puts a certificate into use that was made elsewhere, with
// its key.
func (c *Center) UploadClientCert(ctx context.Context, p Principal, id, certPEM, keyPEM string) error {
	if err := c.Check(p, authz.CryptoManageKeyServers, inventory.RootFolder); err != nil {
		return err
	}
	chain, key, err := pki.ParseKeyPair([]byte(certPEM), []byte(keyPEM))
	if err != nil {
		return fault(task.InvalidCertificate, "the client certificate for key provider %q: %v", id, err).Because(err)
	}
	if err := c.checkClient(id, chain[0], key); err != nil {
		return err
	}
	client, err := c.sealClient(id, pki.EncodeCertificates(chain...), key)
	if err != nil {
		return err
	}
	return c.editProvider(ctx, p, id, "A client certificate was uploaded", func(r *providerRecord) error { r.Client = client; return nil })
}

func (c *Center) checkClient(id string, leaf *x509.Certificate, key crypto.Signer) error {
	type equal interface{ Equal(crypto.PublicKey) bool }
	if pub, ok := leaf.PublicKey.(equal); !ok || !pub.Equal(key.Public()) {
		return fault(task.InvalidCertificate, "the certificate of %q is not for the key that center made for key provider %q; have the certificate request signed that was generated last", leaf.Subject, id)
	}
	if err := pki.CheckValid(leaf, c.now()); err != nil {
		return fault(task.InvalidCertificate, "the client certificate for key provider %q: %v", id, err).Because(err)
	}
	return nil
}

func (r *clientRecord) leaf() *x509.Certificate {
	if r == nil {
		return nil
	}
	chain, err := pki.ParseCertificates(r.PEM)
	if err != nil {
		return nil
	}
	return chain[0]
}

// colons puts hexadecimal digits into vSphere's form: AA:BB:….
func colons(hexText string) string {
	var b strings.Builder
	for i := 0; i+1 < len(hexText); i += 2 {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(strings.ToUpper(hexText[i : i+2]))
	}
	return b.String()
}

// ProviderStatus asks each server of a provider how it does (K13).
func (c *Center) ProviderStatus(ctx context.Context, p Principal, id string) ([]ServerStatus, error) {
	if err := c.Check(p, authz.CryptoReadKeyServersInfo, inventory.RootFolder); err != nil {
		return nil, err
	}
	e, err := c.providers.record(ctx, id)
	if err != nil {
		return nil, err
	}
	asked := map[string]provider.ServerStatus{}
	var why error
	if pr, err := c.providers.get(ctx, id); err != nil {
		why = err // nothing can be asked yet; say what is missing
	} else {
		for _, s := range pr.Status(ctx).Servers {
			asked[s.Name] = s
		}
	}
	var list []ServerStatus
	for _, s := range e.Value.Servers {
		st := ServerStatus{Provider: id, Server: s.Name, State: "red"}
		if leaf := e.Value.Client.leaf(); leaf != nil {
			st.ClientCertNotAfter = leaf.NotAfter
		}
		if a, ok := asked[s.Name]; ok {
			st.Connected, st.ServerTrusted, st.ClientTrusted = a.Reachable, a.ServerTrusted, a.ClientTrusted
			st.ServerThumbprint, st.ServerCertNotAfter = a.Thumbprint, a.Expires
			st.State, st.Description = c.judge(a)
		} else {
			c.untrustedStatus(ctx, s, why, &st)
		}
		list = append(list, st)
	}
	return list, nil
}

// judge makes a colour and a sentence of what a server's test showed.
func (c *Center) judge(a provider.ServerStatus) (state, description string) {
	soon := func(t time.Time) bool { return !t.IsZero() && t.Sub(c.now()) < expiryWarning }
	switch {
	case a.Err != nil && (!a.Reachable || !a.ServerTrusted || !a.ClientTrusted):
		return "red", a.Err.Error()
	case a.Err != nil:
		return "yellow", a.Err.Error()
	case soon(a.Expires):
		return "yellow", fmt.Sprintf("the server's certificate ends at %s", a.Expires.UTC().Format(time.RFC3339))
	case soon(a.ClientCertExpires):
		return "yellow", fmt.Sprintf("center's client certificate ends at %s", a.ClientCertExpires.UTC().Format(time.RFC3339))
	}
	return "green", fmt.Sprintf("%s, %s, %v", a.Version, a.Vendor, a.Latency.Round(100*time.Microsecond))
}

// untrustedStatus describes a server whose certificate is not confirmed, or
// whose provider is incomplete: it can only be asked who it is.
func (c *Center) untrustedStatus(ctx context.Context, s serverRecord, why error, st *ServerStatus) {
	chain, thumb, err := kmipc.FetchServerCertificate(ctx, s.address())
	if err != nil {
		st.Description = err.Error()
		return
	}
	st.Connected, st.ServerThumbprint, st.ServerCertNotAfter = true, thumb, chain[0].NotAfter
	sum := pki.Fingerprint(chain[0])
	st.ServerTrusted = slices.Contains(s.Trusted, hex.EncodeToString(sum[:]))
	st.Description = fmt.Sprintf("the server's certificate (%s) is not trusted yet; compare its thumbprint and confirm it", thumb)
	if why != nil {
		st.Description = why.Error()
	}
}
