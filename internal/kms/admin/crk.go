package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"mortise/internal/kms"
	"mortise/internal/rootkey"
	"mortise/internal/secret"
)

// Root keys: /v1/crks, /v1/instances/{instance}/key, /v1/rootkeys.

func crkRows() []row {
	const crks, key = "/v1/crks", "/v1/instances/{instance}/key"
	return []row{
		get(crks, kms.RoleViewer, "List the customer root keys (CRKs)", func(c *call) ([]kms.CRK, error) {
			return c.KMS.CRKs(c, c.query("instance"))
		}).takes("instance", "only those of this instance"),
		act(http.MethodPost, crks, kms.RoleAdministrator, "Import a CRK: the request's body is the key, 32 bytes", importCRK).
			uploads("application/octet-stream").takes("provider", "kind of root-key provider to keep it: file or pkcs11").onSocket(),
		act(http.MethodDelete, crks+"/{crk}", kms.RoleAdministrator, "Destroy a CRK, and all that only it opens", func(c *call) (done, error) {
			return done{}, c.KMS.DeleteCRK(c, c.actor, c.path("crk"), c.confirmation())
		}).needsConfirmation(),
		get(key, kms.RoleViewer, "Show how an instance's keys stand: CRK, generations, what is being changed, what is destroyed", func(c *call) (kms.KeyStatus, error) {
			return c.KMS.KeyStatus(c, c.path("instance"))
		}),
		act(http.MethodPost, key+"/rotate", kms.RoleAdministrator, "Begin to replace the instance key and to re-seal its records", func(c *call) (kms.KeyStatus, error) {
			return begun(c, c.KMS.RotateKey(c, c.actor, c.path("instance")))
		}),
		send(http.MethodPost, "/v1/instances/{instance}/crk/rotate", kms.RoleAdministrator, "Begin to put the instance under another CRK", func(c *call, r RotateCRK) (kms.KeyStatus, error) {
			return begun(c, c.KMS.RotateCRK(c, c.actor, c.path("instance"), r.CRK, r.Provider))
		}),
		send(http.MethodPost, key+"/purge", kms.RoleAdministrator, "Drop the bytes of destroyed keys before their grace time is over", func(c *call, r PurgeKeys) (Purged, error) {
			n, err := c.KMS.Purge(c, c.actor, c.path("instance"), r.IDs, c.confirmation())
			return Purged{n}, err
		}).needsConfirmation(),
		send(http.MethodPost, key+"/shred", kms.RoleAdministrator, "Begin to shred destroyed keys: afterwards nothing in the system opens old copies of them", func(c *call, r ShredKeys) (kms.KeyStatus, error) {
			return begun(c, c.KMS.Shred(c, c.actor, c.path("instance"), r.Purge, c.confirmation()))
		}).needsConfirmation(),
		get("/v1/rootkeys", kms.RoleAdministrator, "Show the root-key providers and whether they are open", func(c *call) ([]RootKeyStatus, error) {
			k, err := c.rootKeys()
			if err != nil {
				return nil, err
			}
			return k.Status(), nil
		}).onSocket(),
		act(http.MethodPost, "/v1/rootkeys/unlock", kms.RoleAdministrator, "Open a root-key provider: the request's body is its passphrase or PIN", func(c *call) (done, error) {
			k, err := c.rootKeys()
			if err != nil {
				return done{}, err
			}
			p, err := readSecrets(c.body(), 1)
			if err != nil {
				return done{}, err
			}
			defer p[0].Wipe()
			return done{}, k.Unlock(c, c.query("provider"), p[0])
		}).uploads("application/octet-stream").takes("provider", "file or pkcs11; the one that is locked, if it is not said").onSocket(),
		act(http.MethodPost, "/v1/rootkeys/passphrase", kms.RoleAdministrator, "Change the passphrase of this member's keyring: the body is the old one, a NUL, and the new one", func(c *call) (done, error) {
			k, err := c.rootKeys()
			if err != nil {
				return done{}, err
			}
			p, err := readSecrets(c.body(), 2)
			if err != nil {
				return done{}, err
			}
			defer p[0].Wipe()
			defer p[1].Wipe()
			return done{}, k.ChangePassphrase(c, p[0], p[1])
		}).uploads("application/octet-stream").onSocket(),
	}
}

// RootKeys is what the program knows of its root-key providers that the KMS does
// not: how they are opened.
type RootKeys interface {
	Status() []RootKeyStatus
	// Unlock opens a provider with its passphrase or PIN; kind may be empty.
	Unlock(ctx context.Context, kind string, with *secret.Key) error
	ChangePassphrase(ctx context.Context, old, fresh *secret.Key) error
}

// RootKeyStatus is one provider of root keys on the answering member.
type RootKeyStatus = kms.RootKeyStatus

func (c *call) rootKeys() (RootKeys, error) {
	if c.RootKeys == nil {
		return nil, fmt.Errorf("%w: this server's root keys are not opened here", kms.ErrInvalid)
	}
	return c.RootKeys, nil
}

func begun(c *call, err error) (kms.KeyStatus, error) {
	if err != nil {
		return kms.KeyStatus{}, err
	}
	return c.KMS.KeyStatus(c, c.path("instance"))
}

func importCRK(c *call) (kms.CRK, error) {
	b := make([]byte, 33)
	defer clear(b)
	n, err := io.ReadFull(c.body(), b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return kms.CRK{}, fmt.Errorf("%w: reading the key: %w", kms.ErrInvalid, err)
	}
	if n != 32 {
		return kms.CRK{}, fmt.Errorf("%w: a CRK has 32 bytes (AES-256); more or fewer came", kms.ErrInvalid)
	}
	key, err := secret.Take(b[:n])
	if err != nil {
		return kms.CRK{}, err
	}
	defer key.Wipe()
	check, err := rootkey.CheckValue(key)
	if err != nil {
		return kms.CRK{}, err
	}
	return c.KMS.ImportCRK(c, c.actor, c.query("provider"), key, check)
}

// maxSecret bounds a passphrase or PIN, in bytes.
const maxSecret = 1024

// readSecrets reads texts of 1 to maxSecret bytes, with a NUL between them.
func readSecrets(r io.Reader, count int) (list []*secret.Key, err error) {
	buf := make([]byte, count*(maxSecret+1))
	defer clear(buf)
	n, err := io.ReadFull(r, buf)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: reading the secret: %w", kms.ErrInvalid, err)
	}
	defer func() {
		if err != nil {
			for _, k := range list {
				k.Wipe()
			}
		}
	}()
	parts := bytes.Split(buf[:n], []byte{0})
	if len(parts) != count {
		return nil, fmt.Errorf("%w: %d secrets are wanted, with a NUL between them", kms.ErrInvalid, count)
	}
	for _, p := range parts {
		if len(p) == 0 || len(p) > maxSecret {
			return list, fmt.Errorf("%w: a passphrase or PIN has 1 to %d bytes", kms.ErrInvalid, maxSecret)
		}
		k, err := secret.Copy(p)
		if err != nil {
			return list, err
		}
		list = append(list, k)
	}
	return list, nil
}

// RotateCRK says under which CRK an instance goes.
type RotateCRK struct {
	CRK      string `json:"crk,omitempty" doc:"one that was imported; a new one is made if it is missing"`
	Provider string `json:"provider,omitempty" doc:"kind of provider that makes it; the instance's present one if it is missing"`
}

// PurgeKeys says what to purge.
type PurgeKeys struct {
	IDs []string `json:"ids,omitempty" doc:"of destroyed keys; all destroyed keys if it is missing"`
}

// Purged is how many keys were purged.
type Purged struct {
	Count int `json:"count"`
}

// ShredKeys says what to shred.
type ShredKeys struct {
	Purge bool `json:"purge,omitempty" doc:"purge first what is destroyed and still within its grace time"`
}

// CRKs lists the CRKs, of one instance if it is not empty.
func (c *Client) CRKs(ctx context.Context, instance string) (list []kms.CRK, err error) {
	var query url.Values
	if instance != "" {
		query = url.Values{"instance": {instance}}
	}
	err = c.call(ctx, http.MethodGet, at("crks"), query, nil, &list)
	return list, err
}

// ImportCRK imports a CRK of 32 bytes.
func (c *Client) ImportCRK(ctx context.Context, provider string, key *secret.Key) (crk kms.CRK, err error) {
	var query url.Values
	if provider != "" {
		query = url.Values{"provider": {provider}}
	}
	key.Use(func(b []byte) { err = c.give(ctx, at("crks"), query, b, &crk) })
	return crk, err
}

// DeleteCRK destroys a CRK.
func (c *Client) DeleteCRK(ctx context.Context, id, confirm string) error {
	return c.call(ctx, http.MethodDelete, at("crks", id), confirming(confirm), nil, &done{})
}

// KeyStatus shows how an instance's keys stand.
func (c *Client) KeyStatus(ctx context.Context, instance string) (s kms.KeyStatus, err error) {
	err = c.call(ctx, http.MethodGet, at("instances", instance, "key"), nil, nil, &s)
	return s, err
}

// RotateKey begins to replace an instance's key.
func (c *Client) RotateKey(ctx context.Context, instance string) (s kms.KeyStatus, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "key", "rotate"), nil, nil, &s)
	return s, err
}

// RotateCRK begins to put an instance under another CRK.
func (c *Client) RotateCRK(ctx context.Context, instance string, r RotateCRK) (s kms.KeyStatus, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "crk", "rotate"), nil, r, &s)
	return s, err
}

// PurgeKeys drops the bytes of destroyed keys.
func (c *Client) PurgeKeys(ctx context.Context, instance string, ids []string, confirm string) (p Purged, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "key", "purge"), confirming(confirm), PurgeKeys{ids}, &p)
	return p, err
}

// ShredKeys begins to shred an instance's destroyed keys.
func (c *Client) ShredKeys(ctx context.Context, instance string, purge bool, confirm string) (s kms.KeyStatus, err error) {
	err = c.call(ctx, http.MethodPost, at("instances", instance, "key", "shred"), confirming(confirm), ShredKeys{purge}, &s)
	return s, err
}

// RootKeyStatus shows the root-key providers.
func (c *Client) RootKeyStatus(ctx context.Context) (list []RootKeyStatus, err error) {
	err = c.call(ctx, http.MethodGet, at("rootkeys"), nil, nil, &list)
	return list, err
}

// Unlock opens a root-key provider.
func (c *Client) Unlock(ctx context.Context, provider string, with *secret.Key) (err error) {
	var query url.Values
	if provider != "" {
		query = url.Values{"provider": {provider}}
	}
	with.Use(func(b []byte) { err = c.give(ctx, at("rootkeys", "unlock"), query, b, &done{}) })
	return err
}

// ChangePassphrase changes the passphrase of the keyring.
func (c *Client) ChangePassphrase(ctx context.Context, old, fresh *secret.Key) (err error) {
	both := make([]byte, 0, old.Len()+1+fresh.Len())
	defer func() { clear(both) }()
	old.Use(func(b []byte) { both = append(append(both, b...), 0) })
	fresh.Use(func(b []byte) { both = append(both, b...) })
	return c.give(ctx, at("rootkeys", "passphrase"), nil, both, &done{})
}

// give makes a call whose request is bytes that are not JSON.
func (c *Client) give(ctx context.Context, path string, query url.Values, b []byte, resp any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := c.send(ctx, http.MethodPost, path, query, bytes.NewReader(b), "application/octet-stream")
	if err != nil {
		return err
	}
	defer answer.Close()
	return c.read(answer, resp)
}
