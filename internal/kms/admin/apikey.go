package admin

import (
	"context"
	"net/http"
	"time"

	"mortise/internal/kms"
)

// API keys: /v1/instances/{instance}/apikeys.

func apiKeyRows() []row {
	const list, one = "/v1/instances/{instance}/apikeys", "/v1/instances/{instance}/apikeys/{key}"
	return []row{
		get(list, kms.RoleAdministrator, "List the API keys of an instance", func(c *call) ([]kms.APIKey, error) {
			return c.KMS.APIKeys(c, c.path("instance"))
		}),
		send(http.MethodPost, list, kms.RoleAdministrator, "Make an API key", func(c *call, r AddAPIKey) (NewAPIKey, error) {
			a, text, err := c.KMS.AddAPIKey(c, c.actor, c.path("instance"), r.Name, r.Role, time.Duration(r.Days)*24*time.Hour, r.ServerWide)
			return NewAPIKey{APIKey: a, Key: text}, err
		}),
		act(http.MethodDelete, one, kms.RoleAdministrator, "Revoke an API key", func(c *call) (kms.APIKey, error) {
			return c.KMS.RemoveAPIKey(c, c.actor, c.path("instance"), c.path("key"))
		}),
	}
}

// AddAPIKey is the request to make an API key.
type AddAPIKey struct {
	Name       string   `json:"name"`
	Role       kms.Role `json:"role,omitempty" doc:"viewer if it is missing"`
	Days       int      `json:"days,omitempty" doc:"how long it lives; 365 if it is missing"`
	ServerWide bool     `json:"serverWide,omitempty" doc:"its role counts in every instance and for the whole server; in instance default only"`
}

// NewAPIKey is an API key and its text, which is shown this once.
type NewAPIKey struct {
	kms.APIKey
	Key string `json:"key" doc:"what goes into Authorization: Bearer; shown this once"`
}

// AddAPIKey makes an API key.
func (c *Client) AddAPIKey(ctx context.Context, instance string, r AddAPIKey) (added NewAPIKey, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "apikeys"), nil, r, &added)
	return added, err
}

// APIKeys lists the API keys of an instance.
func (c *Client) APIKeys(ctx context.Context, instance string) (list []kms.APIKey, err error) {
	err = c.call(ctx, http.MethodGet, at("instances", instance, "apikeys"), nil, nil, &list)
	return list, err
}

// RemoveAPIKey revokes an API key, by its id or label.
func (c *Client) RemoveAPIKey(ctx context.Context, instance, which string) (removed kms.APIKey, err error) {
	err = c.call(ctx, http.MethodDelete, at("instances", instance, "apikeys", which), nil, nil, &removed)
	return removed, err
}
