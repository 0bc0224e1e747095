package kms

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"mortise/internal/store"
)

// An APIKey lets a service use the administration API in a role (S7). The key
// itself is 256 random bits; only its hash is kept.
type APIKey struct {
	ID         string    `json:"id" doc:"the beginning of the key's SHA-256, hexadecimal"`
	Name       string    `json:"name" doc:"the administrator's label"`
	Role       Role      `json:"role"`
	ServerWide bool      `json:"serverWide,omitempty" doc:"counts in every instance and for the whole server"`
	Added      time.Time `json:"added"`
	Expires    time.Time `json:"expires"`
}

// ErrUnknownAPIKey: there is no such API key, or there is none any more.
var ErrUnknownAPIKey = errors.New("API key is not known")

// The text of an API key is
//
//	mkms_INSTANCE_SECRET
//
// SECRET being 32 random bytes in unpadded base64url (RFC 4648 §5). The key of
// its record is the SHA-256 of those bytes: they have 256 random bits, so a plain
// hash hides them and looking it up leaks nothing by its time.
const apiKeyPrefix = "mkms_"

// apiKeyLife is how long an API key lives unless it is said otherwise, and at
// the most.
const (
	apiKeyLife    = 365 * 24 * time.Hour
	maxAPIKeyLife = 5 * apiKeyLife
	apiKeyIDLen   = 16
)

// AddAPIKey makes an API key and returns its text, which is kept nowhere else.
// life 0 means a year. A server-wide key belongs to [DefaultInstance].
func (k *KMS) AddAPIKey(ctx context.Context, by Actor, instanceID, name string, role Role, life time.Duration, serverWide bool) (APIKey, string, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return APIKey{}, "", err
	}
	if role == "" {
		role = RoleViewer
	}
	if role, err = ParseRole(string(role)); err != nil {
		return APIKey{}, "", err
	}
	switch {
	case serverWide && instanceID != DefaultInstance:
		return APIKey{}, "", fmt.Errorf("kms: %w: a server-wide API key belongs to instance %s", ErrInvalid, DefaultInstance)
	case serverWide && by.Instance != "" && by.Kind != "socket":
		return APIKey{}, "", fmt.Errorf("kms: %w: only the admin socket and server-wide API keys make server-wide API keys", ErrForbidden)
	case life < 0 || life > maxAPIKeyLife:
		return APIKey{}, "", fmt.Errorf("kms: %w: an API key lives %d days at the most", ErrInvalid, int(maxAPIKeyLife.Hours()/24))
	case life == 0:
		life = apiKeyLife
	}
	if err := checkLabel(name); err != nil {
		return APIKey{}, "", err
	}
	raw := make([]byte, 32)
	defer clear(raw)
	rand.Read(raw) // never fails
	hash := hashAPIKey(raw)
	now := k.now().UTC().Truncate(time.Second)
	a := APIKey{ID: hash[:apiKeyIDLen], Name: name, Role: role, ServerWide: serverWide, Added: now, Expires: now.Add(life)}
	if err := k.act(ctx, by, inst, "apikey add", a.ID, func() ([]store.Op, error) { return []store.Op{inst.apiKeys.Create(hash, a)}, nil }); err != nil {
		return APIKey{}, "", err
	}
	k.log.Info("kms: API key added", "instance", inst.id, "key", a.ID, "name", name, "role", role, "server_wide", serverWide, "expires", a.Expires, "by", by.Name)
	return a, apiKeyPrefix + inst.id + "_" + base64.RawURLEncoding.EncodeToString(raw), nil
}

func hashAPIKey(raw []byte) string {
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// APIKeyActor says who holds an API key. The errors are ErrUnknownAPIKey,
// ErrExpired, ErrLocked, ErrInstanceLocked, or the store's; none quotes the key.
func (k *KMS) APIKeyActor(ctx context.Context, text, from string) (Actor, error) {
	instanceID, raw, ok := parseAPIKey(text)
	if !ok {
		return Actor{}, fmt.Errorf("kms: %w: what was sent has not the form of an API key (%sINSTANCE_…)", ErrUnknownAPIKey, apiKeyPrefix)
	}
	inst, err := k.instance(ctx, instanceID)
	if errors.Is(err, ErrUnknownInstance) {
		return Actor{}, fmt.Errorf("kms: %w", ErrUnknownAPIKey)
	}
	if err != nil {
		return Actor{}, err
	}
	e, err := inst.apiKeys.Get(ctx, hashAPIKey(raw))
	if errors.Is(err, store.ErrNotFound) {
		return Actor{}, fmt.Errorf("kms: %w", ErrUnknownAPIKey)
	}
	if err != nil {
		return Actor{}, fmt.Errorf("kms: looking up an API key: %w", err)
	}
	if k.now().After(e.Value.Expires) {
		return Actor{}, fmt.Errorf("kms: API key %q: %w: it expired at %s", e.Value.Name, ErrExpired, e.Value.Expires.Format(time.RFC3339))
	}
	a := Actor{Kind: "api-key", Name: e.Value.Name, Fingerprint: e.Value.ID, From: from, Instance: inst.id, Role: e.Value.Role}
	if e.Value.ServerWide {
		a.Instance = ""
	}
	return a, nil
}

func parseAPIKey(text string) (instance string, raw []byte, ok bool) {
	rest, ok := strings.CutPrefix(text, apiKeyPrefix)
	instance, secret, found := strings.Cut(rest, "_") // an instance's id has no '_'
	if !ok || !found {
		return "", nil, false
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(secret)
	return instance, raw, err == nil && len(raw) == 32
}

// APIKeys lists the API keys of an instance.
func (k *KMS) APIKeys(ctx context.Context, instanceID string) ([]APIKey, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return nil, err
	}
	entries, err := inst.apiKeys.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing API keys: %w", err)
	}
	list := make([]APIKey, 0, len(entries))
	for _, e := range entries {
		list = append(list, e.Value)
	}
	return list, nil
}

// RemoveAPIKey ends the use of an API key. which is its id, or its label if that
// is unique.
func (k *KMS) RemoveAPIKey(ctx context.Context, by Actor, instanceID, which string) (APIKey, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return APIKey{}, err
	}
	entries, err := inst.apiKeys.List(ctx, "")
	if err != nil {
		return APIKey{}, fmt.Errorf("kms: looking up an API key: %w", err)
	}
	var found []store.Entry[APIKey]
	for _, e := range entries {
		if e.Value.ID == strings.ToLower(which) {
			found = []store.Entry[APIKey]{e}
			break
		}
		if e.Value.Name == which {
			found = append(found, e)
		}
	}
	switch {
	case len(found) == 0:
		return APIKey{}, fmt.Errorf("kms: %w: %q in instance %s; see: mortise kms apikey ls", ErrUnknownAPIKey, which, inst.id)
	case len(found) > 1:
		return APIKey{}, fmt.Errorf("kms: %w: %q means %d API keys; give the id, see: mortise kms apikey ls", ErrInvalid, which, len(found))
	}
	a := found[0]
	if a.Value.ServerWide && by.Instance != "" && by.Kind != "socket" {
		return APIKey{}, fmt.Errorf("kms: %w: only the admin socket and server-wide API keys revoke server-wide API keys", ErrForbidden)
	}
	if err := k.act(ctx, by, inst, "apikey revoke", a.Value.ID, func() ([]store.Op, error) { return []store.Op{inst.apiKeys.Delete(a.Key, 0)}, nil }); err != nil {
		return APIKey{}, err
	}
	k.log.Info("kms: API key revoked", "instance", inst.id, "key", a.Value.ID, "name", a.Value.Name, "by", by.Name)
	return a.Value, nil
}
