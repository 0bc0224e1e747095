package admin

import (
	"context"
	"encoding/pem"
	"net/http"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// Clients' certificates: /v1/instances/{instance}/clients.

func clientRows() []row {
	const list, one = "/v1/instances/{instance}/clients", "/v1/instances/{instance}/clients/{client}"
	return []row{
		get(list, kms.RoleViewer, "List the client certificates of an instance", func(c *call) ([]kms.Client, error) {
			return c.KMS.Clients(c, c.path("instance"))
		}),
		send(http.MethodPost, list, kms.RoleAdministrator, "Let a client certificate in", func(c *call, r AddClient) (kms.Client, error) {
			cert, err := kms.ParseClientCertificate([]byte(r.Certificate))
			if err != nil {
				return kms.Client{}, err
			}
			return c.KMS.AddClient(c, c.actor, c.path("instance"), kms.NewClient{
				Certificate: cert, Name: r.Name, Role: r.Role, Replaces: r.Replaces, Overlap: r.Overlap,
			})
		}),
		send(http.MethodPost, list+"/issue", kms.RoleAdministrator, "Issue a client certificate from the instance's own CA and let it in", func(c *call, r IssueClient) (Issued, error) {
			i, err := c.KMS.IssueClient(c, c.actor, c.path("instance"), kms.IssueRequest{
				Name: r.Name, Role: r.Role, Hosts: r.Hosts, Life: days(r.Days), RSA: r.RSA, CSR: optional(r.CSR),
			})
			return issued(i, err)
		}),
		send(http.MethodPost, one+"/renew", kms.RoleAdministrator, "Let a new certificate in for an old one, which stays valid for a while", func(c *call, r RenewClient) (Issued, error) {
			renewal := kms.Renewal{Overlap: r.Overlap, Life: days(r.Days), Hosts: r.Hosts, RSA: r.RSA, CSR: optional(r.CSR)}
			if r.Certificate != "" {
				var err error
				if renewal.Certificate, err = kms.ParseClientCertificate([]byte(r.Certificate)); err != nil {
					return Issued{}, err
				}
			}
			i, err := c.KMS.RenewClient(c, c.actor, c.path("instance"), c.path("client"), renewal)
			return issued(i, err)
		}),
		get(one, kms.RoleViewer, "Show one client certificate, by fingerprint or label", func(c *call) (kms.Client, error) {
			return c.KMS.Client(c, c.path("instance"), c.path("client"))
		}),
		act(http.MethodDelete, one, kms.RoleAdministrator, "Shut a client certificate out, on open connections too", func(c *call) (kms.Client, error) {
			return c.KMS.RemoveClient(c, c.actor, c.path("instance"), c.path("client"))
		}),
	}
}

func days(n int) time.Duration { return time.Duration(n) * 24 * time.Hour }

func optional(text string) []byte {
	if text == "" {
		return nil
	}
	return []byte(text)
}

// issued puts what was issued into words; it wipes the key.
func issued(i kms.Issued, err error) (Issued, error) {
	if err != nil {
		return Issued{}, err
	}
	a := Issued{Client: i.Client, Certificate: string(pki.EncodeCertificates(i.Chain...))}
	if i.Key != nil {
		defer i.Key.Wipe()
		i.Key.Use(func(der []byte) {
			a.Key = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		})
	}
	return a, nil
}

// IssueClient is the request for a certificate from the instance's own CA.
type IssueClient struct {
	Name  string   `json:"name" doc:"label and common name"`
	Role  kms.Role `json:"role,omitempty" doc:"key-manager if it is missing"`
	Hosts []string `json:"hosts,omitempty" doc:"subject alternative names, DNS names and IP addresses; the name if they are missing"`
	Days  int      `json:"days,omitempty" doc:"how long it lives; 365 if it is missing"`
	RSA   bool     `json:"rsa,omitempty" doc:"an RSA-3072 key, for clients that take no ECDSA P-256"`
	CSR   string   `json:"csr,omitempty" doc:"certificate request, PEM, of a key that the client has made; the key is made here if it is missing"`
}

// RenewClient is the request for a certificate in the place of another.
type RenewClient struct {
	Certificate string    `json:"certificate,omitempty" doc:"the new certificate, PEM; issued by the instance's own CA if it is missing"`
	Overlap     time.Time `json:"overlap,omitzero" doc:"until when the old certificate is still accepted; its own end if it is missing"`
	Days        int       `json:"days,omitempty" doc:"of an issued one; as long as the old one if it is missing"`
	Hosts       []string  `json:"hosts,omitempty" doc:"of an issued one; those of the old one if they are missing"`
	RSA         bool      `json:"rsa,omitempty"`
	CSR         string    `json:"csr,omitempty"`
}

// Issued is a client certificate that was let in. Key is shown this once.
type Issued struct {
	Client      kms.Client `json:"client"`
	Certificate string     `json:"certificate" doc:"PEM: the certificate, then the CA's if it was issued here"`
	Key         string     `json:"key,omitempty" doc:"PEM, PKCS#8; shown this once, and missing if the client has made it"`
}

// AddClient is the request to let a certificate in.
type AddClient struct {
	Certificate string    `json:"certificate" doc:"PEM; of a chain, the first counts"`
	Name        string    `json:"name,omitempty" doc:"label; the certificate's common name if it is missing"`
	Role        kms.Role  `json:"role,omitempty" doc:"key-manager if it is missing"`
	Replaces    string    `json:"replaces,omitempty" doc:"fingerprint or label of the certificate that this one renews; name and role are taken from it"`
	Overlap     time.Time `json:"overlap,omitzero" doc:"until when the renewed certificate is still accepted; its own end if it is missing"`
}

// AddClient lets the holder of a certificate use an instance.
func (c *Client) AddClient(ctx context.Context, instance string, r AddClient) (added kms.Client, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "clients"), nil, r, &added)
	return added, err
}

// IssueClient has the instance's own CA make a client certificate.
func (c *Client) IssueClient(ctx context.Context, instance string, r IssueClient) (made Issued, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "clients", "issue"), nil, r, &made)
	return made, err
}

// RenewClient lets a new certificate in for an old one.
func (c *Client) RenewClient(ctx context.Context, instance, which string, r RenewClient) (made Issued, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "clients", which, "renew"), nil, r, &made)
	return made, err
}

// Clients lists the certificates that may use an instance.
func (c *Client) Clients(ctx context.Context, instance string) (list []kms.Client, err error) {
	err = c.call(ctx, http.MethodGet, at("instances", instance, "clients"), nil, nil, &list)
	return list, err
}

// Client shows one certificate, by fingerprint or label.
func (c *Client) Client(ctx context.Context, instance, which string) (found kms.Client, err error) {
	err = c.call(ctx, http.MethodGet, at("instances", instance, "clients", which), nil, nil, &found)
	return found, err
}

// RemoveClient ends the use of an instance by a certificate.
func (c *Client) RemoveClient(ctx context.Context, instance, which string) (removed kms.Client, err error) {
	err = c.call(ctx, http.MethodDelete, at("instances", instance, "clients", which), nil, nil, &removed)
	return removed, err
}
