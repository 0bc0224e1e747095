package kms

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// Instances come and go while the KMS runs (S2). What an instance is stands in
// its record; every member opens and closes instances as records change, and
// whoever asks for one sees its record as it is at that moment, so that a grant
// that is revoked, or an instance that is made, counts everywhere at once.

var (
	// ErrLocked: the KMS has not been given its root keys yet.
	ErrLocked = errors.New("the key server is locked; unlock it with: mortise kms unlock")
	// ErrUnknownInstance: there is no instance of that id.
	ErrUnknownInstance = errors.New("no such instance")
	// ErrInstanceExists: there is an instance of that id, port or server name
	// already.
	ErrInstanceExists = errors.New("exists already")
	// ErrInstanceLocked: the instance has no use of its CRK now.
	ErrInstanceLocked = errors.New("the instance is locked")
)

// Settings are what an administrator of the server says about an instance.
type Settings struct {
	Description string `json:"description,omitempty"`
	// ServerName is by which TLS server name (SNI) clients reach the instance on
	// the shared port. One without a dot is the first label of any name.
	ServerName string `json:"serverName,omitempty" doc:"TLS server name (SNI) by which clients reach the instance on the shared port; one without a dot matches the first label of any name"`
	Port       int    `json:"port,omitempty" doc:"own TCP port for KMIP; 0: the shared one"`
	Strict     bool   `json:"strict,omitempty" doc:"of instance default: refuse connections on the shared port that name no instance"`
	Quota      Quota  `json:"quota,omitzero"`
}

// Instance is an instance as an administrator sees it.
type Instance struct {
	ID string `json:"id"`
	Settings
	State      string     `json:"state" doc:"serving or locked"`
	Reason     string     `json:"reason,omitempty" doc:"why it is locked"`
	Created    time.Time  `json:"created"`
	Ungranted  time.Time  `json:"ungranted,omitzero" doc:"since when it has no grant to use its root key"`
	Provider   string     `json:"provider" doc:"kind of the root-key provider that keeps its root key"`
	CRK        string     `json:"crk" doc:"id of the customer root key"`
	Generation uint32     `json:"generation" doc:"of the instance key that seals new records"`
	Objects    int        `json:"objects" doc:"not counting destroyed ones"`
	Clients    int        `json:"clients"`
	Endpoints  []Endpoint `json:"endpoints" doc:"where clients reach it, a line for each member"`
}

// States of an instance.
const (
	InstanceServing = "serving"
	InstanceLocked  = "locked"
)

var validInstance = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

// check refuses settings that cannot work, and fills in what is not said.
func (s *Settings) check(id string) error {
	if s.ServerName == "" {
		s.ServerName = id
	}
	s.ServerName = strings.ToLower(strings.TrimSuffix(s.ServerName, "."))
	switch {
	case len(s.Description) > 1000:
		return fmt.Errorf("kms: %w: a description has at most 1000 bytes", ErrInvalid)
	case s.Port < 0 || s.Port > 65535:
		return fmt.Errorf("kms: %w: %d is no TCP port", ErrInvalid, s.Port)
	case !validServerName.MatchString(s.ServerName) || len(s.ServerName) > 253:
		return fmt.Errorf("kms: %w: %q is no DNS name", ErrInvalid, s.ServerName)
	case s.Strict && id != DefaultInstance:
		return fmt.Errorf("kms: %w: only instance %s takes connections that name no instance, so only it can be strict", ErrInvalid, DefaultInstance)
	}
	return s.Quota.check()
}

var validServerName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)

// claims are what only one instance can have. A record for each, written with
// the instance's own, makes that so.
func (s *Settings) claims() []string {
	list := []string{"name/" + s.ServerName}
	if s.Port != 0 {
		list = append(list, fmt.Sprintf("port/%d", s.Port))
	}
	return list
}

// CreateInstance makes an instance with a CRK and keys of its own, at the
// provider of that kind; "" is the one that the KMS was unlocked with first. It
// serves at once; clients are let in one by one.
func (k *KMS) CreateInstance(ctx context.Context, by Actor, id, kind string, s Settings) (Instance, error) {
	if !validInstance.MatchString(id) {
		return Instance{}, fmt.Errorf("kms: %w: an instance's id has 1 to 40 lower-case letters, digits and hyphens, and no hyphen at its ends; %.50q has not", ErrInvalid, id)
	}
	if err := s.check(id); err != nil {
		return Instance{}, err
	}
	root, err := k.providerFor(kind)
	if err != nil {
		return Instance{}, err
	}
	if err := k.store.Sync(ctx); err != nil {
		return Instance{}, fmt.Errorf("kms: making instance %s: %w", id, err)
	}
	if _, is := k.records.Peek(id); is {
		return Instance{}, fmt.Errorf("kms: instance %s %w", id, ErrInstanceExists)
	}
	if _, is := k.gone.Peek(id); is {
		return Instance{}, fmt.Errorf("kms: instance %s %w: one of that id is still being deleted; try again", id, ErrInstanceExists)
	}
	fresh, done, err := k.newInstance(ctx, root, id)
	defer done()
	if err != nil {
		return Instance{}, fmt.Errorf("kms: making instance %s: %w", id, err)
	}
	fresh.Settings = s
	// No key may depend on a CRK that only this member has.
	if err := k.spread(ctx, "CRK "+fresh.CRK, func(h holdings) bool { return slices.Contains(h.CRKs, fresh.CRK) }); err != nil {
		return Instance{}, fmt.Errorf("kms: making instance %s: %w", id, err)
	}
	used, err := k.inUse(ctx, fresh.CRK, id)
	if err != nil {
		return Instance{}, fmt.Errorf("kms: making instance %s: %w", id, err)
	}
	// Every write of the instance's records compares its sealing record, so that
	// none is made after that has gone with the instance.
	ops := []store.Op{k.records.Create(id, fresh), k.sealing.Create(id, sealingRecord{Generation: 1}), k.gone.Unchanged(id, 0), used}
	for _, c := range s.claims() {
		ops = append(ops, k.claims.Create(c, id))
	}
	if err := k.commitAs(ctx, by, nil, "instance create", id, ops...); err != nil {
		if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrConflict) {
			return Instance{}, fmt.Errorf("kms: instance %s: its id, port or server name %w: %w", id, ErrInstanceExists, err)
		}
		return Instance{}, fmt.Errorf("kms: making instance %s: %w", id, err)
	}
	if err := k.keyStep("instance made"); err != nil {
		return Instance{}, err
	}
	k.log.Info("kms: instance made", "instance", id, "crk", fresh.CRK, "by", by.Name)
	return k.Instance(ctx, id)
}

// providerFor returns the root-key provider of a kind; "" means the one that the
// KMS was unlocked with first.
func (k *KMS) providerFor(kind string) (RootKeys, error) {
	if kind == "" {
		k.mu.RLock()
		kind = k.firstRoot
		k.mu.RUnlock()
	}
	return k.provider(kind)
}

// An InstanceChange says what to change; nil leaves a setting as it is.
type InstanceChange struct {
	Description *string `json:"description,omitempty"`
	ServerName  *string `json:"serverName,omitempty"`
	Port        *int    `json:"port,omitempty"`
	Strict      *bool   `json:"strict,omitempty"`
	Quota       *Quota  `json:"quota,omitempty"`
}

// ChangeInstance changes settings of an instance. Connections that are open stay
// open.
func (k *KMS) ChangeInstance(ctx context.Context, by Actor, id string, c InstanceChange) (Instance, error) {
	err := k.editInstance(ctx, by, "instance change", id, func(r *instanceRecord) ([]store.Op, error) {
		before := r.Settings.claims()
		set(&r.Settings.Description, c.Description)
		set(&r.Settings.ServerName, c.ServerName)
		set(&r.Settings.Port, c.Port)
		set(&r.Settings.Strict, c.Strict)
		set(&r.Settings.Quota, c.Quota)
		if err := r.Settings.check(id); err != nil {
			return nil, err
		}
		var ops []store.Op
		after := r.Settings.claims()
		for _, old := range before {
			if !slices.Contains(after, old) {
				ops = append(ops, k.claims.Delete(old, 0))
			}
		}
		for _, fresh := range after {
			if !slices.Contains(before, fresh) {
				ops = append(ops, k.claims.Create(fresh, id))
			}
		}
		return ops, nil
	})
	if errors.Is(err, store.ErrExists) {
		return Instance{}, fmt.Errorf("kms: instance %s: the port or server name is another instance's: it %w", id, ErrInstanceExists)
	}
	if err != nil {
		return Instance{}, err
	}
	return k.Instance(ctx, id)
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// UngrantInstance takes away the instance's use of its CRK: it stops serving at
// once, on every member, and its keys leave their memory (S2). Nothing is lost.
func (k *KMS) UngrantInstance(ctx context.Context, by Actor, id string) (Instance, error) {
	err := k.editInstance(ctx, by, "instance ungrant", id, func(r *instanceRecord) ([]store.Op, error) {
		if r.Ungranted.IsZero() {
			r.Ungranted = k.now().UTC().Truncate(time.Second)
		}
		return nil, nil
	})
	if err != nil {
		return Instance{}, err
	}
	k.log.Warn("kms: the grant of an instance is revoked; it stops serving", "instance", id, "by", by.Name)
	return k.Instance(ctx, id)
}

// GrantInstance is the reverse of [KMS.UngrantInstance].
func (k *KMS) GrantInstance(ctx context.Context, by Actor, id string) (Instance, error) {
	err := k.editInstance(ctx, by, "instance grant", id, func(r *instanceRecord) ([]store.Op, error) {
		r.Ungranted = time.Time{}
		return nil, nil
	})
	if err != nil {
		return Instance{}, err
	}
	k.log.Info("kms: an instance is granted its root key", "instance", id, "by", by.Name)
	return k.Instance(ctx, id)
}

// editInstance changes an instance's record, from the start again when somebody
// else was faster.
func (k *KMS) editInstance(ctx context.Context, by Actor, act, id string, change func(*instanceRecord) ([]store.Op, error)) error {
	for {
		e, err := k.record(ctx, id)
		if err != nil {
			return err
		}
		r := e.Value
		r.Keys = slices.Clone(r.Keys)
		ops, err := change(&r)
		if err != nil {
			return err
		}
		err = k.commitAs(ctx, by, nil, act, id, append(ops, k.records.Update(id, e.Revision, r))...)
		if errors.Is(err, store.ErrConflict) {
			continue
		}
		if err != nil {
			return fmt.Errorf("kms: %s %s: %w", act, id, err)
		}
		return nil
	}
}

// record reads an instance's record as it is now.
func (k *KMS) record(ctx context.Context, id string) (store.Entry[instanceRecord], error) {
	if _, err := k.providerFor(""); err != nil {
		return store.Entry[instanceRecord]{}, err
	}
	e, err := k.records.Get(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return e, fmt.Errorf("kms: %w: %q", ErrUnknownInstance, id)
	}
	if err != nil {
		return e, fmt.Errorf("kms: reading the record of instance %s: %w", id, err)
	}
	return e, nil
}

// Instances lists all instances by id.
func (k *KMS) Instances(ctx context.Context) ([]Instance, error) {
	if _, err := k.providerFor(""); err != nil {
		return nil, err
	}
	entries, err := k.records.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing instances: %w", err)
	}
	list := make([]Instance, 0, len(entries))
	for _, e := range entries {
		list = append(list, k.describe(ctx, e.Key, e.Value))
	}
	return list, nil
}

// Instance shows one.
func (k *KMS) Instance(ctx context.Context, id string) (Instance, error) {
	e, err := k.record(ctx, id)
	if err != nil {
		return Instance{}, err
	}
	return k.describe(ctx, id, e.Value), nil
}

func (k *KMS) describe(ctx context.Context, id string, r instanceRecord) Instance {
	v := Instance{
		ID: id, Settings: r.Settings, State: InstanceServing, Created: r.Created, Ungranted: r.Ungranted, Provider: r.Provider, CRK: r.CRK,
		Endpoints: k.endpointsOf(ctx, id, r.Settings),
	}
	if n := len(r.Keys); n > 0 {
		v.Generation = r.Keys[n-1].Generation
	}
	inst, err := k.instance(ctx, id)
	if err != nil {
		v.State, v.Reason = InstanceLocked, err.Error()
		return v
	}
	v.Objects, v.Clients = inst.live(), inst.clients.Count()
	return v
}

// live is how many objects there are that are not destroyed.
func (i *instance) live() int {
	n := i.objects.Count()
	for _, s := range []kmip.State{kmip.StateDestroyed, kmip.StateDestroyedCompromised} {
		n -= i.objects.Count(store.IndexTerm{Kind: termState, Value: []byte{byte(s)}})
	}
	return n
}
