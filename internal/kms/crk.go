package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	// Create makes a CRK of that id, 32 hexadecimal digits; it is durable when
	// Create returns. An id is used once: one that is there already is refused.
	Create(ctx context.Context, id string) error
	// Import takes a CRK that the customer brings; key stays the caller's.
	Import(ctx context.Context, id string, key *secret.Key) error
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
	// Use is what a root key is for that is no instance's; empty for a CRK.
	Use string `json:",omitempty"`
	// Maker is the member that made it, or began to.
	Maker string `json:",omitempty"`
	State CRKState
	// Changed is when it came into that state, Confirmed which members have
	// destroyed it.
	Changed   time.Time
	Confirmed []string
}

// CRKState is where a CRK is in its life.
type CRKState string

const (
	CRKMaking     CRKState = "making"     // recorded, and perhaps at its maker's provider already
	CRKUnused     CRKState = "unused"     // no instance uses it yet
	CRKActive     CRKState = "active"     // wraps an instance's keys
	CRKRetired    CRKState = "retired"    // opens what it wrapped before: old revisions and backups
	CRKDestroying CRKState = "destroying" // not used any more; some member still has it
	CRKDestroyed  CRKState = "destroyed"  // every member has confirmed
	// CRKOrphan is of a root key at the answering member's provider that no record
	// names: a program before records came first was interrupted, or another key
	// server uses the same token.
	CRKOrphan CRKState = "orphan"
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
	Use        string    `json:"use,omitempty" doc:"what it is for, if it is no instance's"`
	State      CRKState  `json:"state" doc:"making, unused, active, retired, destroying, destroyed; or orphan: at the answering member's provider, and in no record"`
	Created    time.Time `json:"created"`
	Changed    time.Time `json:"changed" doc:"when it came into that state"`
	Imported   bool      `json:"imported"`
	CheckValue string    `json:"checkValue,omitempty" doc:"of an imported CRK: first three bytes of a block of zeros encrypted under it (PKCS#11 CKA_CHECK_VALUE)"`
	// Waiting are the members that have not confirmed its destruction.
	Waiting []string `json:"waiting,omitempty"`
	Here    bool     `json:"here" doc:"whether the answering member's provider has it"`
}

// CRKs lists all CRKs by id, and after them the orphans at this member's
// providers; instance narrows it unless it is empty.
func (k *KMS) CRKs(ctx context.Context, instance string) ([]CRK, error) {
	here, err := k.atProviders(ctx) // first: whatever is there was recorded before
	if err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	entries, err := k.crks.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing CRKs: %w", err)
	}
	list := []CRK{}
	for _, e := range entries {
		if instance == "" || e.Value.Instance == instance {
			list = append(list, k.describeCRK(e, here[e.Key] != ""))
		}
		delete(here, e.Key)
	}
	if instance != "" {
		return list, nil
	}
	for _, id := range slices.Sorted(maps.Keys(here)) {
		if r, err := k.recordUnder(ctx, id); err != nil {
			return nil, err
		} else if r.Key == "" { // an instance's that is about to be recorded
			list = append(list, CRK{ID: id, Provider: here[id], State: CRKOrphan, Here: true})
		}
	}
	return list, nil
}

// atProviders lists the root keys at this member's providers: their kind, by id.
func (k *KMS) atProviders(ctx context.Context) (map[string]string, error) {
	here := map[string]string{}
	for _, p := range k.providers() {
		ids, err := p.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("listing the CRKs of provider %s: %w", p.Kind(), err)
		}
		for _, id := range ids {
			here[id] = p.Kind()
		}
	}
	return here, nil
}

func (k *KMS) describeCRK(e store.Entry[crkRecord], here bool) CRK {
	r := e.Value
	c := CRK{ID: e.Key, Provider: r.Provider, Instance: r.Instance, Use: r.Use, State: r.State, Created: r.Created, Changed: r.Changed, Imported: r.Imported, CheckValue: r.Check, Here: here}
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
	e, done, err := k.mint(ctx, crkRecord{Provider: p.Kind(), Imported: true, Check: check, State: CRKUnused},
		func(id string) error { return p.Import(ctx, id, key) },
		func(id string, op store.Op) error { return k.commitAs(ctx, by, nil, "crk import", id, op) })
	defer done()
	if err != nil {
		return CRK{}, fmt.Errorf("kms: importing a CRK: %w", err)
	}
	k.log.Info("kms: CRK imported", "crk", e.Key, "provider", p.Kind(), "check_value", check)
	return k.describeCRK(e, true), nil
}

// DeleteCRK destroys a CRK on every member. If it wraps an instance's keys, the
// instance and every key in it are lost at once, and its older CRKs are destroyed
// too (S6). hash agrees to the list of what is lost.
func (k *KMS) DeleteCRK(ctx context.Context, by Actor, id, hash string) error {
	here, err := k.atProviders(ctx) // before its record is looked for: see CRKs
	if err != nil {
		return fmt.Errorf("kms: %w", err)
	}
	e, err := k.crks.Get(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return k.deleteOrphan(ctx, by, id, here[id], hash)
	}
	if err != nil {
		return fmt.Errorf("kms: %w", err)
	}
	switch {
	case e.Value.State.ended():
		return fmt.Errorf("kms: %w: CRK %s is %s already", ErrInvalid, id, e.Value.State)
	case e.Value.Use != "" && e.Value.State == CRKActive:
		return fmt.Errorf("kms: %w: %s is no instance's: it is the root key of %s", ErrCRKInUse, id, e.Value.Use)
	}
	jobs, err := k.jobs.List(ctx, "")
	if err != nil {
		return fmt.Errorf("kms: %w", err)
	}
	for _, j := range jobs {
		if j.Value.CRK == id && !j.Value.finished() && e.Value.State == CRKUnused {
			return fmt.Errorf("kms: %w: instance %s is being put under it", ErrCRKInUse, j.Key)
		}
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

// deleteOrphan destroys a root key that is at a provider and in no record. kind
// is the provider's, empty if there is no such key.
func (k *KMS) deleteOrphan(ctx context.Context, by Actor, id, kind, hash string) error {
	if r, err := k.recordUnder(ctx, id); err != nil {
		return err
	} else if kind == "" || r.Key != "" { // or it is about to be recorded
		return fmt.Errorf("kms: %w: %q", ErrUnknownCRK, id)
	}
	lost := []string{fmt.Sprintf("root key %s at provider %s, which this key server has no record of: if another key server uses the same provider, perhaps that one's, with all its keys", id, kind)}
	if err := Confirm("delete CRK "+id, lost, hash); err != nil {
		return err
	}
	now := k.now().UTC()
	if err := k.commitAs(ctx, by, nil, "crk delete", id, k.crks.Create(id, crkRecord{Provider: kind, Created: now, Changed: now, State: CRKDestroying})); err != nil {
		return fmt.Errorf("kms: deleting CRK %s: %w", id, err)
	}
	k.log.Warn("kms: a root key that no record named is deleted", "crk", id, "provider", kind)
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
