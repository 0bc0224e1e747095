package kms

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"

	"mortise/internal/store"
)

// How CRKs come to the members' providers and leave them. A CRK is recorded
// before it is made, so that a crash leaves none at a provider that nobody knows:
// its maker has it destroyed when it is back.

// making has the ids of the CRKs that this process is making.
type making struct {
	mu  sync.Mutex
	ids map[string]bool
}

func (m *making) add(id string) (done func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ids == nil {
		m.ids = map[string]bool{}
	}
	m.ids[id] = true
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.ids, id)
	}
}

func (m *making) has(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ids[id]
}

// mint records a CRK, has it made, and commits that it is: in the state that r
// says. Until done is called the CRK counts as being made, also after an error;
// what nothing uses by then is destroyed.
func (k *KMS) mint(ctx context.Context, r crkRecord, make func(id string) error, commit func(id string, op store.Op) error) (e store.Entry[crkRecord], done func(), err error) {
	raw := [16]byte{}
	rand.Read(raw[:]) // never fails
	id := hex.EncodeToString(raw[:])
	done = k.making.add(id)
	now := k.now().UTC()
	r.Created, r.Changed, r.Maker = now, now, k.self()
	begun := r
	begun.State = CRKMaking
	rev, err := k.store.Commit(ctx, k.crks.Create(id, begun))
	if err != nil {
		return e, done, fmt.Errorf("recording a CRK: %w", err)
	}
	if err := k.keyStep("crk recorded"); err != nil {
		return e, done, err
	}
	if err := make(id); err != nil {
		k.giveUp(id)
		return e, done, err
	}
	if err := k.keyStep("crk made"); err != nil {
		return e, done, err
	}
	if err := commit(id, k.crks.Update(id, rev, r)); err != nil {
		return e, done, err // and perhaps it is committed: see abandoned
	}
	if err := k.keyStep("crk kept"); err != nil {
		return e, done, err
	}
	return store.Entry[crkRecord]{Key: id, Value: r}, done, nil
}

// mintNew makes a CRK at a provider for an instance, or for another use.
func (k *KMS) mintNew(ctx context.Context, root RootKeys, r crkRecord) (id string, done func(), err error) {
	r.Provider = root.Kind()
	e, done, err := k.mint(ctx, r,
		func(id string) error { return root.Create(ctx, id) },
		func(_ string, op store.Op) error { _, err := k.store.Commit(ctx, op); return err })
	return e.Key, done, err
}

// giveUp has a CRK destroyed that is made for nothing. If that fails now, its
// maker sees to it later.
func (k *KMS) giveUp(crk string) {
	ctx, cancel := context.WithTimeout(k.run, keepUpEvery)
	defer cancel()
	_, err := k.crks.Edit(ctx, crk, func(r *crkRecord) error {
		if r.State != CRKMaking && r.State != CRKUnused {
			return errUnchanged
		}
		r.State, r.Changed = CRKDestroying, k.now().UTC()
		return nil
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		k.log.Warn("kms: a CRK that nothing uses could not be destroyed yet", "crk", crk, "error", err)
	}
}

var errUnchanged = errors.New("nothing to change")

// MakeRootKey makes a root key for something that is no instance, which use
// names. DropRootKeys destroys those of that use but the one that is kept.
func (k *KMS) MakeRootKey(ctx context.Context, root RootKeys, use string) (id string, err error) {
	id, done, err := k.mintNew(ctx, root, crkRecord{Use: use, State: CRKActive})
	done()
	if err != nil {
		return "", fmt.Errorf("kms: making a root key for %s: %w", use, err)
	}
	return id, nil
}

// DropRootKeys has the root keys of a use destroyed, except keep.
func (k *KMS) DropRootKeys(ctx context.Context, use, keep string) error {
	entries, err := k.crks.List(ctx, "")
	if err != nil {
		return fmt.Errorf("kms: listing CRKs: %w", err)
	}
	for _, e := range entries {
		if e.Value.Use != use || e.Key == keep || e.Value.State.ended() {
			continue
		}
		e.Value.State, e.Value.Changed = CRKDestroying, k.now().UTC()
		if _, err := k.store.Commit(ctx, k.crks.Update(e.Key, e.Revision, e.Value)); err != nil {
			return fmt.Errorf("kms: destroying root key %s of %s: %w", e.Key, use, err)
		}
	}
	return nil
}

// RecordRootKey records a root key that was made before such keys were recorded.
func (k *KMS) RecordRootKey(ctx context.Context, id, kind, use string) error {
	now := k.now().UTC()
	_, err := k.store.Commit(ctx, k.crks.Create(id, crkRecord{Provider: kind, Created: now, Changed: now, Use: use, State: CRKActive}))
	if errors.Is(err, store.ErrExists) {
		return nil
	}
	return err
}

// keepCRKs gives this member the CRKs that should exist and takes from it those
// that should not.
func (k *KMS) keepCRKs(ctx context.Context) error {
	here, err := k.atProviders(ctx)
	if err != nil {
		return err
	}
	entries, err := k.crks.List(ctx, "")
	if err != nil {
		return err
	}
	var errs []error
	wanted, past := map[string][]string{}, map[string][]string{} // by kind
	known := map[string]bool{}
	for _, e := range entries {
		known[e.Key] = true
		switch {
		case e.Value.State == CRKDestroying:
			errs = append(errs, k.destroyCRK(ctx, e))
		case e.Value.State == CRKDestroyed:
			// An old copy of the keyring, say, has brought it back.
			if kind := here[e.Key]; kind != "" {
				errs = append(errs, k.destroyHere(ctx, e.Key, kind))
			}
		case k.maybeAbandoned(e):
			gone, err := k.abandoned(ctx, e)
			if errs = append(errs, err); gone {
				k.giveUp(e.Key)
			}
		case e.Value.State == CRKMaking:
		case here[e.Key] != "":
		case e.Value.State == CRKRetired || e.Value.Use != "":
			past[e.Value.Provider] = append(past[e.Value.Provider], e.Key)
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
	for kind, ids := range past {
		// No instance depends on it, and after a restore nobody has it any more.
		if err := k.fetchCRKs(ctx, kind, ids); err != nil {
			k.log.Debug("kms: root keys that no instance needs could not be got from another member", "crks", ids, "error", err)
		}
	}
	return errors.Join(errs...)
}

// maybeAbandoned tells whether this member began to make a CRK, is not making it
// now, and nothing is recorded to use it.
func (k *KMS) maybeAbandoned(e store.Entry[crkRecord]) bool {
	r := e.Value
	return r.Maker == k.self() && !k.making.has(e.Key) && (r.State == CRKMaking || r.State == CRKUnused && !r.Imported)
}

// abandoned tells whether such a CRK is not a change of keys' either: its maker
// was interrupted before anything used it. The job is read from the log, since a
// cache may not have yet what gave it the CRK.
func (k *KMS) abandoned(ctx context.Context, e store.Entry[crkRecord]) (bool, error) {
	job, err := k.jobs.Get(ctx, e.Value.Instance)
	if errors.Is(err, store.ErrNotFound) {
		return true, nil
	}
	return err == nil && job.Value.CRK != e.Key, err
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
		if err := k.destroyHere(ctx, e.Key, e.Value.Provider); err != nil {
			return err
		}
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

func (k *KMS) destroyHere(ctx context.Context, id, kind string) error {
	p := k.providers()[kind]
	if p == nil {
		return fmt.Errorf("CRK %s is to be destroyed, and provider %q is not configured here", id, kind)
	}
	if err := p.Destroy(ctx, id); err != nil {
		return fmt.Errorf("destroying CRK %s: %w", id, err)
	}
	k.log.Warn("kms: CRK is destroyed at this member's provider", "crk", id, "provider", kind)
	return nil
}
