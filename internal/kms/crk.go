package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// RootKeys is a root-key provider: it keeps customer root keys by their id and
// wraps with them (S4). Its methods may be called concurrently.
type RootKeys interface {
	// Kind is "file" or "pkcs11"; it is written into instance records.
	Kind() string
	// Create makes a CRK, durable when it returns.
	Create(ctx context.Context) (id string, err error)
	// Import takes a CRK that the customer brings; key stays the caller's.
	Import(ctx context.Context, key *secret.Key) (id string, err error)
	// Seal wraps key with the CRK called id, bound to additional.
	Seal(ctx context.Context, id string, key *secret.Key, additional []byte) ([]byte, error)
	// Open is the reverse of Seal.
	Open(ctx context.Context, id string, wrapped, additional []byte) (*secret.Key, error)
	// Destroy returns when nothing at the provider opens what the CRK wrapped.
	// An id that is not there is destroyed already.
	Destroy(ctx context.Context, id string) error
	// List returns the ids of the CRKs that are there.
	List(ctx context.Context) ([]string, error)
}

// A Sharer is a provider whose CRKs one member can hand another.
type Sharer interface {
	RootKeys
	// Share returns the CRKs of those ids, as far as they are there.
	Share(ctx context.Context, ids []string) (*secret.Key, error)
	// Adopt keeps what Share returned on another member.
	Adopt(ctx context.Context, share *secret.Key) error
}

// crkRecord is what all members know of a CRK; the CRK itself never passes
// through the store.
type crkRecord struct {
	Provider string
	Created  time.Time
	Imported bool
	Check    string // key check value, of an imported CRK
	// Instance that it is or was used by; empty for none yet.
	Instance string
	State    CRKState
	// Changed is when it came into that state, Confirmed which members have
	// destroyed it.
	Changed   time.Time
	Confirmed []string
}

// CRKState is where a CRK is in its life.
type CRKState string

const (
	CRKUnused     CRKState = "unused"     // no instance uses it yet
	CRKActive     CRKState = "active"     // wraps an instance's keys
	CRKRetired    CRKState = "retired"    // opens what it wrapped before: old revisions and backups
	CRKDestroying CRKState = "destroying" // not used any more; some member still has it
	CRKDestroyed  CRKState = "destroyed"  // every member has confirmed
)

func (s CRKState) ended() bool { return s == CRKDestroying || s == CRKDestroyed }

var (
	// ErrUnknownCRK: there is no CRK of that id.
	ErrUnknownCRK = errors.New("no such CRK")
	// ErrCRKInUse: what was asked cannot be done with a CRK that is in use.
	ErrCRKInUse = errors.New("the CRK is in use")
	// ErrCRKDeleted: an instance's CRK has been deleted, and with it all its keys.
	ErrCRKDeleted = errors.New("the instance's CRK has been deleted")
)

// A CRK is a customer root key as an administrator sees it.
type CRK struct {
	ID         string    `json:"id"`
	Provider   string    `json:"provider" doc:"kind of root-key provider: file or pkcs11"`
	Instance   string    `json:"instance,omitempty"`
	State      CRKState  `json:"state"`
	Created    time.Time `json:"created"`
	Changed    time.Time `json:"changed" doc:"when it came into that state"`
	Imported   bool      `json:"imported"`
	CheckValue string    `json:"checkValue,omitempty" doc:"of an imported CRK: first three bytes of a block of zeros encrypted under it (PKCS#11 CKA_CHECK_VALUE)"`
	// Waiting are the members that have not confirmed its destruction.
	Waiting []string `json:"waiting,omitempty"`
	Here    bool     `json:"here" doc:"whether the answering member's provider has it"`
}

// CRKs lists all CRKs by id; instance narrows it unless it is empty.
func (k *KMS) CRKs(ctx context.Context, instance string) ([]CRK, error) {
	entries, err := k.crks.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing CRKs: %w", err)
	}
	here := map[string]bool{}
	for _, p := range k.providers() {
		ids, err := p.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("kms: listing the CRKs of provider %s: %w", p.Kind(), err)
		}
		for _, id := range ids {
			here[id] = true
		}
	}
	list := []CRK{}
	for _, e := range entries {
		if instance != "" && e.Value.Instance != instance {
			continue
		}
		list = append(list, k.describeCRK(e, here[e.Key]))
	}
	return list, nil
}

func (k *KMS) describeCRK(e store.Entry[crkRecord], here bool) CRK {
	r := e.Value
	c := CRK{ID: e.Key, Provider: r.Provider, Instance: r.Instance, State: r.State, Created: r.Created, Changed: r.Changed, Imported: r.Imported, CheckValue: r.Check, Here: here}
	if r.State == CRKDestroying {
		c.Waiting = k.unconfirmed(r)
	}
	return c
}

// unconfirmed are the members that have not confirmed a destruction.
func (k *KMS) unconfirmed(r crkRecord) (names []string) {
	for _, m := range k.members() {
		if !slices.Contains(r.Confirmed, m) {
			names = append(names, m)
		}
	}
	return names
}

// ImportCRK keeps a CRK that a customer brings (S4), 32 bytes, at the provider of
// that kind; "" means the only one. check is its key check value. The CRK is of
// no use until RotateCRK puts an instance under it. key stays the caller's.
func (k *KMS) ImportCRK(ctx context.Context, by Actor, kind string, key *secret.Key, check string) (CRK, error) {
	if key.Len() != 32 {
		return CRK{}, fmt.Errorf("kms: %w: a CRK has 32 bytes (AES-256), this one has %d", ErrInvalid, key.Len())
	}
	p, err := k.provider(kind)
	if err != nil {
		return CRK{}, err
	}
	id, err := p.Import(ctx, key)
	if err != nil {
		return CRK{}, fmt.Errorf("kms: importing a CRK: %w", err)
	}
	if err := k.keyStep("crk imported"); err != nil {
		return CRK{}, err
	}
	now := k.now().UTC()
	r := crkRecord{Provider: p.Kind(), Created: now, Changed: now, Imported: true, Check: check, State: CRKUnused}
	if err := k.commitAs(ctx, by, nil, "crk import", id, k.crks.Create(id, r)); err != nil {
		return CRK{}, fmt.Errorf("kms: importing a CRK: %w", err)
	}
	k.log.Info("kms: CRK imported", "crk", id, "provider", p.Kind(), "check_value", check)
	return k.describeCRK(store.Entry[crkRecord]{Key: id, Value: r}, true), nil
}

// DeleteCRK destroys a CRK on every member. If it wraps an instance's keys, the
// instance and every key in it are lost at once, and its older CRKs are destroyed
// too (S6). hash agrees to the list of what is lost.
func (k *KMS) DeleteCRK(ctx context.Context, by Actor, id, hash string) error {
	e, err := k.crks.Get(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("kms: %w: %q", ErrUnknownCRK, id)
	}
	if err != nil {
		return fmt.Errorf("kms: %w", err)
	}
	if e.Value.State.ended() {
		return fmt.Errorf("kms: %w: CRK %s is %s already", ErrInvalid, id, e.Value.State)
	}
	r, err := k.recordUnder(ctx, id)
	if err != nil {
		return err
	}
	targets := []store.Entry[crkRecord]{e}
	var lost []string
	var ops []store.Op
	switch {
	case r.Key != "":
		if lost, err = k.everything(ctx, r.Key); err != nil {
			return err
		}
		if targets, err = k.crksOf(ctx, r.Key); err != nil {
			return err
		}
		if job, ok := k.jobs.Peek(r.Key); ok && !job.Value.finished() {
			ops = append(ops, k.jobs.Delete(r.Key, job.Revision))
		}
		ops = append(ops, k.records.Unchanged(r.Key, r.Revision))
	case e.Value.State == CRKRetired:
		lost = []string{fmt.Sprintf("backups and copies of instance %s from the time of CRK %s, until %s: nobody opens them again", e.Value.Instance, id, e.Value.Changed.UTC().Format(time.RFC3339))}
	default:
		lost = []string{fmt.Sprintf("CRK %s, which no instance uses", id)}
	}
	if err := Confirm("delete CRK "+id, lost, hash); err != nil {
		return err
	}
	now := k.now().UTC()
	for _, t := range targets {
		if t.Value.State.ended() {
			continue
		}
		t.Value.State, t.Value.Changed, t.Value.Confirmed = CRKDestroying, now, nil
		ops = append(ops, k.crks.Update(t.Key, t.Revision, t.Value))
	}
	if err := k.commitAs(ctx, by, nil, "crk delete", id, ops...); err != nil {
		return fmt.Errorf("kms: deleting CRK %s: %w", id, err)
	}
	k.log.Warn("kms: CRK is deleted", "crk", id, "instance", r.Key)
	if err := k.keyStep("crk deleted"); err != nil {
		return err
	}
	return k.keepUp(ctx)
}

// everything lists what an instance holds, a line each. Of one that is locked
// nothing but the ids can be told.
func (k *KMS) everything(ctx context.Context, id string) ([]string, error) {
	lost := []string{fmt.Sprintf("instance %s with all its keys, and every backup of it", id)}
	i, err := k.instance(ctx, id)
	if errors.Is(err, ErrInstanceLocked) {
		keys, err := k.store.Keys(ctx, "object-"+id)
		if err != nil {
			return nil, fmt.Errorf("kms: listing what would be lost: %w", err)
		}
		for _, key := range keys {
			lost = append(lost, fmt.Sprintf("object %s of instance %s, which is locked", key, id))
		}
		return lost, nil
	}
	if errors.Is(err, ErrCRKDeleted) {
		return lost, nil
	}
	if err != nil {
		return nil, err
	}
	found, err := i.objects.Find(ctx)
	if err != nil {
		return nil, fmt.Errorf("kms: listing what would be lost: %w", err)
	}
	for e, err := range found.Newest() {
		if err != nil {
			lost = append(lost, fmt.Sprintf("object %s of instance %s, damaged", e.Key, id))
			continue
		}
		lost = append(lost, fmt.Sprintf("object %s of instance %s, %s", e.Key, id, stateName(e.Value.State)))
	}
	return lost, nil
}

// recordUnder returns the instance whose keys the CRK called id wraps; its key is
// empty if there is none.
func (k *KMS) recordUnder(ctx context.Context, id string) (store.Entry[instanceRecord], error) {
	entries, err := k.records.List(ctx, "")
	if err != nil {
		return store.Entry[instanceRecord]{}, fmt.Errorf("kms: reading the instances: %w", err)
	}
	for _, e := range entries {
		if e.Value.CRK == id {
			return e, nil
		}
	}
	return store.Entry[instanceRecord]{}, nil
}

// crksOf returns the CRKs that wrap, or have wrapped, an instance's keys.
func (k *KMS) crksOf(ctx context.Context, instance string) (list []store.Entry[crkRecord], err error) {
	entries, err := k.crks.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing CRKs: %w", err)
	}
	for _, e := range entries {
		if e.Value.Instance == instance {
			list = append(list, e)
		}
	}
	return list, nil
}

// crkEnded tells whether a CRK is not to be used any more, as the cache has it.
func (k *KMS) crkEnded(id string) bool {
	e, ok := k.crks.Peek(id)
	return ok && e.Value.State.ended()
}

// keepCRKs gives this member the CRKs that should exist and takes from it those
// that should not.
func (k *KMS) keepCRKs(ctx context.Context) error {
	entries, err := k.crks.List(ctx, "")
	if err != nil {
		return err
	}
	var errs []error
	wanted := map[string][]string{} // by kind
	known := map[string]bool{}
	for _, e := range entries {
		known[e.Key] = true
		switch e.Value.State {
		case CRKDestroying:
			errs = append(errs, k.destroyCRK(ctx, e))
		case CRKDestroyed:
		default:
			wanted[e.Value.Provider] = append(wanted[e.Value.Provider], e.Key)
		}
	}
	instances, err := k.records.List(ctx, "")
	errs = append(errs, err)
	for _, e := range instances {
		if known[e.Value.CRK] {
			continue
		}
		wanted[e.Value.Provider] = append(wanted[e.Value.Provider], e.Value.CRK)
		r := crkRecord{Provider: e.Value.Provider, Created: e.Value.Created, Changed: e.Value.Created, Instance: e.Key, State: CRKActive}
		if _, err := k.store.Commit(ctx, k.crks.Create(e.Value.CRK, r)); err != nil && !errors.Is(err, store.ErrExists) {
			errs = append(errs, err)
		}
	}
	for kind, ids := range wanted {
		errs = append(errs, k.fetchCRKs(ctx, kind, ids))
	}
	return errors.Join(errs...)
}

// fetchCRKs gets from the other members those of ids that this one lacks.
func (k *KMS) fetchCRKs(ctx context.Context, kind string, ids []string) error {
	p, ok := k.providers()[kind].(Sharer)
	if !ok || k.fetchKeys == nil {
		return nil // its own keys are all that it will have
	}
	here, err := p.List(ctx)
	if err != nil {
		return fmt.Errorf("listing the CRKs of provider %s: %w", kind, err)
	}
	missing := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return slices.Contains(here, id) })
	for chunk := range slices.Chunk(missing, maxShare) {
		if err := k.fetchKeys(ctx, p, chunk...); err != nil {
			return fmt.Errorf("getting %d CRKs from the other members: %w", len(chunk), err)
		}
	}
	return nil
}

// maxShare is how many CRKs are asked for at once.
const maxShare = 64

// destroyCRK destroys a CRK at this member's provider and confirms it. The last
// member to confirm makes it destroyed.
func (k *KMS) destroyCRK(ctx context.Context, e store.Entry[crkRecord]) error {
	self := k.self()
	if !slices.Contains(e.Value.Confirmed, self) {
		p := k.providers()[e.Value.Provider]
		if p == nil {
			return fmt.Errorf("CRK %s is to be destroyed, and provider %q is not configured here", e.Key, e.Value.Provider)
		}
		if err := p.Destroy(ctx, e.Key); err != nil {
			return fmt.Errorf("destroying CRK %s: %w", e.Key, err)
		}
		k.log.Warn("kms: CRK is destroyed at this member's provider", "crk", e.Key, "provider", e.Value.Provider)
		if err := k.keyStep("crk destroyed here"); err != nil {
			return err
		}
	}
	now := k.now().UTC()
	_, err := k.crks.Edit(ctx, e.Key, func(r *crkRecord) error {
		if !slices.Contains(r.Confirmed, self) {
			r.Confirmed = append(r.Confirmed, self)
		} else if len(k.unconfirmed(*r)) > 0 {
			return errUnchanged
		}
		if len(k.unconfirmed(*r)) == 0 {
			r.State, r.Changed = CRKDestroyed, now
		}
		return nil
	})
	if errors.Is(err, errUnchanged) {
		return nil
	}
	return err
}

var errUnchanged = errors.New("nothing to change")

// SingleCRK makes a provider of one root key that is there already.
func SingleCRK(root RootKey) RootKeys { return singleCRK{root} }

type singleCRK struct{ root RootKey }

func (s singleCRK) Kind() string                           { return "file" }
func (s singleCRK) Create(context.Context) (string, error) { return s.root.ID(), nil }

func (s singleCRK) Import(context.Context, *secret.Key) (string, error) {
	return "", errors.New("this root key provider holds one key and takes no other")
}

func (s singleCRK) Seal(_ context.Context, id string, key *secret.Key, additional []byte) ([]byte, error) {
	if id != s.root.ID() {
		return nil, fmt.Errorf("there is no CRK %s at this provider", id)
	}
	return s.root.Seal(key, additional)
}

func (s singleCRK) Open(_ context.Context, id string, wrapped, additional []byte) (*secret.Key, error) {
	if id != s.root.ID() {
		return nil, fmt.Errorf("its keys are wrapped by root key %s, and root key %s was given: use the root key that belongs to this state folder", id, s.root.ID())
	}
	return s.root.Open(wrapped, additional)
}

func (s singleCRK) Destroy(context.Context, string) error {
	return errors.New("this root key provider does not destroy its one key")
}

func (s singleCRK) List(context.Context) ([]string, error) { return []string{s.root.ID()}, nil }
