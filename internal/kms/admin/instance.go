package admin

import (
	"context"
	"net/http"

	"mortise/internal/kms"
)

// Instances: /v1/instances. Making, changing and deleting them is for who
// administers the whole server, not for an instance's own administrators: the
// quota is there to bound those, and the grant to stop them.

func instanceRows() []row {
	const list, one = "/v1/instances", "/v1/instances/{instance}"
	return []row{
		get(list, kms.RoleViewer, "List the instances", func(c *call) ([]kms.Instance, error) {
			return c.KMS.Instances(c)
		}),
		send(http.MethodPost, list, kms.RoleAdministrator, "Make an instance, with a root key and keys of its own", func(c *call, r CreateInstance) (kms.Instance, error) {
			return c.KMS.CreateInstance(c, c.actor, r.ID, r.Provider, r.Settings)
		}),
		get(one, kms.RoleViewer, "Show an instance, with the endpoints where clients reach it", func(c *call) (kms.Instance, error) {
			return c.KMS.Instance(c, c.path("instance"))
		}),
		send(http.MethodPatch, one, kms.RoleAdministrator, "Change settings of an instance", func(c *call, r kms.InstanceChange) (kms.Instance, error) {
			return c.KMS.ChangeInstance(c, c.actor, c.path("instance"), r)
		}).onWholeServer(),
		act(http.MethodDelete, one, kms.RoleAdministrator, "Delete an instance with all its keys, for ever", func(c *call) (done, error) {
			return done{}, c.KMS.DeleteInstance(c, c.actor, c.path("instance"), c.confirmation())
		}).onWholeServer().needsConfirmation(),
		act(http.MethodPut, one+"/grant", kms.RoleAdministrator, "Give an instance the use of its root key", func(c *call) (kms.Instance, error) {
			return c.KMS.GrantInstance(c, c.actor, c.path("instance"))
		}).onWholeServer(),
		act(http.MethodDelete, one+"/grant", kms.RoleAdministrator, "Take the use of its root key away from an instance, which stops serving at once; nothing is lost", func(c *call) (kms.Instance, error) {
			return c.KMS.UngrantInstance(c, c.actor, c.path("instance"))
		}).onWholeServer(),
	}
}

// CreateInstance is the request to make an instance.
type CreateInstance struct {
	ID       string `json:"id" doc:"1 to 40 lower-case letters, digits and hyphens"`
	Provider string `json:"provider,omitempty" doc:"kind of root-key provider for its root key: file or pkcs11; the one that the key server was unlocked with first if it is missing"`
	kms.Settings
}

// Instances lists the instances.
func (c *Client) Instances(ctx context.Context) (list []kms.Instance, err error) {
	err = c.call(ctx, http.MethodGet, at("instances"), nil, nil, &list)
	return list, err
}

// CreateInstance makes one.
func (c *Client) CreateInstance(ctx context.Context, r CreateInstance) (made kms.Instance, err error) {
	err = c.call(ctx, http.MethodPost, at("instances"), nil, r, &made)
	return made, err
}

// Instance shows one.
func (c *Client) Instance(ctx context.Context, id string) (i kms.Instance, err error) {
	err = c.call(ctx, http.MethodGet, at("instances", id), nil, nil, &i)
	return i, err
}

// ChangeInstance changes settings.
func (c *Client) ChangeInstance(ctx context.Context, id string, r kms.InstanceChange) (i kms.Instance, err error) {
	err = c.call(ctx, http.MethodPatch, at("instances", id), nil, r, &i)
	return i, err
}

// DeleteInstance deletes one; hash agrees to the loss of its keys.
func (c *Client) DeleteInstance(ctx context.Context, id, hash string) error {
	return c.call(ctx, http.MethodDelete, at("instances", id), confirming(hash), nil, &done{})
}

// GrantInstance gives an instance the use of its root key.
func (c *Client) GrantInstance(ctx context.Context, id string) (i kms.Instance, err error) {
	err = c.call(ctx, http.MethodPut, at("instances", id, "grant"), nil, nil, &i)
	return i, err
}

// UngrantInstance takes it away.
func (c *Client) UngrantInstance(ctx context.Context, id string) (i kms.Instance, err error) {
	err = c.call(ctx, http.MethodDelete, at("instances", id, "grant"), nil, nil, &i)
	return i, err
}
