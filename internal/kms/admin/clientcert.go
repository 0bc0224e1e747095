package admin

import (
	"context"
	"net/http"
	"time"

	"mortise/internal/kms"
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
		get(one, kms.RoleViewer, "Show one client certificate, by fingerprint or label", func(c *call) (kms.Client, error) {
			return c.KMS.Client(c, c.path("instance"), c.path("client"))
		}),
		act(http.MethodDelete, one, kms.RoleAdministrator, "Shut a client certificate out, on open connections too", func(c *call) (kms.Client, error) {
			return c.KMS.RemoveClient(c, c.actor, c.path("instance"), c.path("client"))
		}),
	}
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
