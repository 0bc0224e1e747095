package kms

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// This file keeps what a member has in memory of root and instance keys in step
// with the store: every member runs followKeys, and every change of keys is a
// record that it sees.

// sealingRecord says which generation of an instance's key seals. It is a record
// of its own, because every write of a sealed record compares it. An instance
// without one has only ever had its first generation.
type sealingRecord struct {
	Generation uint32
}

// holdings is what a member has of keys: the others wait for it before they rely
// on a new one.
type holdings struct {
	// CRKs are those that the member's providers have, of every kind.
	CRKs []string
	// Generations has, for each instance, the newest generation of its key that
	// the member has in memory.
	Generations map[string]uint32
}

// keepUpEvery is how often a member looks again without being told of a change:
// a peer or a token may have failed it.
const keepUpEvery = 5 * time.Second

// unwrap opens the keys of an instance's record that have does not have.
func (k *KMS) unwrap(ctx context.Context, root RootKeys, e store.Entry[instanceRecord], have *keyset) (*keyset, error) {
	id, r := e.Key, e.Value
	if len(r.Keys) == 0 {
		return nil, errors.New("its record names no key")
	}
	keys := &keyset{record: e.Revision, crk: r.CRK, seals: map[uint32]*seal{}}
	for _, w := range r.Keys {
		if have != nil && have.seals[w.Generation] != nil {
			keys.seals[w.Generation] = have.seals[w.Generation]
			continue
		}
		key, err := root.Open(ctx, r.CRK, w.Wrapped, keyBinding(id, w.Generation))
		if err != nil {
			return nil, fmt.Errorf("unwrapping its key of generation %d: %w", w.Generation, err)
		}
		s, err := newSeal(w.Generation, key)
		key.Wipe()
		keys.seals[w.Generation] = s
		if err != nil {
			return nil, err
		}
	}
	current := r.Keys[0].Generation
	if s, ok := k.sealing.Peek(id); ok {
		keys.sealing, current = s.Revision, s.Value.Generation
	}
	if keys.newest = keys.seals[current]; keys.newest == nil {
		return nil, fmt.Errorf("its record lacks generation %d of its key, which is in use: restore a backup", current)
	}
	return keys, nil
}

// refresh brings an open instance's keys to what its records say now.
func (k *KMS) refresh(ctx context.Context, i *instance) error {
	i.refreshing.Lock()
	defer i.refreshing.Unlock()
	e, err := k.records.Get(ctx, i.id)
	if err != nil {
		return err
	}
	have := i.keys.Load()
	s, _ := k.sealing.Peek(i.id)
	if have.record == e.Revision && have.sealing == s.Revision {
		return nil
	}
	root, err := k.provider(e.Value.Provider)
	if err != nil {
		return err
	}
	keys, err := k.unwrap(ctx, root, e, have)
	if err != nil {
		return fmt.Errorf("kms: instance %s: %w", i.id, err)
	}
	i.keys.Store(keys)
	return nil
}

// provider returns the root-key provider of a kind; "" is the only one.
func (k *KMS) provider(kind string) (RootKeys, error) {
	all := k.providers()
	if len(all) == 0 {
		return nil, fmt.Errorf("kms: %w", ErrLocked)
	}
	if kind == "" && len(all) == 1 {
		for _, p := range all {
			return p, nil
		}
	}
	if p := all[kind]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("kms: %w: no root-key provider of kind %q is configured; there are %v", ErrInvalid, kind, slices.Sorted(maps.Keys(all)))
}

// providers are the root-key providers, none while locked.
func (k *KMS) providers() map[string]RootKeys {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.roots
}

// custody is the part of a KMS that is about root and instance keys.
type custody struct {
	crks     *store.Collection[crkRecord]
	sealing  *store.Collection[sealingRecord]
	jobs     *store.Collection[keyJob]
	holdings *store.Collection[holdings]
	// fetchKeys gets CRKs from another member; nil where there is none.
	fetchKeys func(ctx context.Context, to Sharer, ids ...string) error
	making    *making
	patience  time.Duration           // see spread
	at        func(step string) error // see keyStep
}

func openCustody(ctx context.Context, s *store.Store, o Options) (c custody, err error) {
	c.fetchKeys, c.making, c.patience, c.at = o.FetchKeys, &making{}, cmp.Or(o.patience, spreadAll), o.step
	if c.crks, err = store.NewCollection(ctx, s, "crk", store.JSON[crkRecord](1)); err != nil {
		return c, err
	}
	if c.sealing, err = store.NewCollection(ctx, s, "sealing", store.JSON[sealingRecord](1)); err != nil {
		return c, err
	}
	if c.jobs, err = store.NewCollection(ctx, s, "keyjob", store.JSON[keyJob](1)); err != nil {
		return c, err
	}
	c.holdings, err = store.NewCollection(ctx, s, "holdings", store.JSON[holdings](1))
	return c, err
}

func (c custody) close() {
	c.crks.Close()
	c.sealing.Close()
	c.jobs.Close()
	c.holdings.Close()
}

// keyStep is called after each step of a change of keys that is durable by itself.
// In tests it fails where a process might have been killed; the change then ends
// there, with nothing tidied up.
func (c custody) keyStep(name string) error {
	if c.at == nil {
		return nil
	}
	return c.at(name)
}

// followKeys keeps up until ctx ends.
func (k *KMS) followKeys(ctx context.Context) {
	w := k.store.Watch("instance", "sealing", "crk")
	defer w.Close()
	for ctx.Err() == nil {
		if err := k.keepUp(ctx); err != nil && ctx.Err() == nil {
			k.log.Error("kms: keys are not up to date; it is tried again", "error", err)
		}
		wait, cancel := context.WithTimeout(ctx, keepUpEvery)
		_, _ = w.Next(wait)
		cancel()
	}
}

// keepUp does once what followKeys does for ever. What fails for one key does
// not hold up the others.
func (k *KMS) keepUp(ctx context.Context) error {
	if err := k.store.Sync(ctx); err != nil {
		return err
	}
	return errors.Join(k.keepCRKs(ctx), k.keepInstances(ctx), k.report(ctx))
}

// keepInstances brings the keys of the open instances up to date. Opening and
// closing them is followInstances's.
func (k *KMS) keepInstances(ctx context.Context) error {
	var errs []error
	for _, i := range k.open() {
		if e, ok := k.records.Peek(i.id); ok && k.crkEnded(e.Value.CRK) {
			k.end(i)
			continue
		}
		err := k.refresh(ctx, i)
		if errors.Is(err, store.ErrNotFound) { // being deleted
			continue
		}
		if g := i.missed.Load(); err == nil && g != 0 && i.keys.Load().seals[g] != nil && i.missed.CompareAndSwap(g, 0) {
			k.log.Warn("kms: records came before the key that opens them; loading them again", "instance", i.id)
			err = i.reload(ctx)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// end closes an instance whose CRK is deleted. Its name key is wiped when the
// last user lets go of it.
func (k *KMS) end(i *instance) {
	k.mu.Lock()
	if k.instances[i.id] == i {
		delete(k.instances, i.id)
	}
	k.mu.Unlock()
	i.retire()
	k.log.Warn("kms: instance is closed for ever: its CRK has been deleted", "instance", i.id)
}

// report tells the other members what this one has.
func (k *KMS) report(ctx context.Context) error {
	have := holdings{Generations: map[string]uint32{}}
	for _, p := range k.providers() {
		ids, err := p.List(ctx)
		if err != nil {
			return fmt.Errorf("listing root keys: %w", err)
		}
		have.CRKs = append(have.CRKs, ids...)
	}
	slices.Sort(have.CRKs)
	for _, i := range k.open() {
		have.Generations[i.id] = slices.Max(slices.Collect(maps.Keys(i.keys.Load().seals)))
	}
	self := k.self()
	e, err := k.holdings.Get(ctx, self)
	switch {
	case errors.Is(err, store.ErrNotFound):
		_, err = k.store.Commit(ctx, k.holdings.Create(self, have))
	case err == nil && (!slices.Equal(e.Value.CRKs, have.CRKs) || !maps.Equal(e.Value.Generations, have.Generations)):
		_, err = k.store.Commit(ctx, k.holdings.Update(self, e.Revision, have))
	}
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrExists) {
		return nil // two calls at once: the other has told them, or the next one will
	}
	if err != nil {
		return fmt.Errorf("telling the other members which keys are here: %w", err)
	}
	return nil
}

// self is this member's name.
func (k *KMS) self() string {
	for _, m := range k.store.LocalMembers() {
		if m.Self && m.Name != "" {
			return m.Name
		}
	}
	return "this member"
}

// members are the names of all members.
func (k *KMS) members() (names []string) {
	for _, m := range k.store.LocalMembers() {
		if m.Name != "" {
			names = append(names, m.Name)
		}
	}
	if len(names) == 0 {
		names = []string{k.self()}
	}
	return names
}

// Bounds on waiting for other members to have a new key. One that is away gets
// it when it is back, so a majority is enough then.
const (
	spreadAll  = 20 * time.Second
	spreadPoll = 50 * time.Millisecond
)

// errNowhere: no member has the key that was to be spread.
var errNowhere = errors.New("no member has it")

// spread waits until the members have a key, by what they report: all of them
// or, when some do not report within spreadAll, most. The error matches errNowhere
// if none has it.
func (k *KMS) spread(ctx context.Context, what string, has func(holdings) bool) error {
	if err := k.keepUp(ctx); err != nil {
		k.log.Warn("kms: keys are not up to date", "error", err)
	}
	for begin := time.Now(); ; {
		if err := k.store.Sync(ctx); err != nil {
			return err
		}
		var missing []string
		all := k.members()
		for _, name := range all {
			if e, ok := k.holdings.Peek(name); !ok || !has(e.Value) {
				missing = append(missing, name)
			}
		}
		if len(missing) == 0 {
			return nil
		}
		if time.Since(begin) > k.patience {
			if len(missing)*2 < len(all) && !slices.Contains(missing, k.self()) {
				k.log.Warn("kms: going on without some members; they get the key when they are back", "key", what, "members", missing)
				return nil
			}
			err := fmt.Errorf("%s has not reached %v; without it on most members it is not used", what, missing)
			if len(missing) == len(all) {
				err = fmt.Errorf("%w: %w", err, errNowhere)
			}
			return err
		}
		select {
		case <-time.After(spreadPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wrapNew makes an AES-256 key and returns it wrapped, once the provider has
// shown that it opens what it wrapped.
func wrapNew(ctx context.Context, root RootKeys, crk string, binding []byte) ([]byte, error) {
	key, err := secret.Random(nil, 32)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return wrapProven(ctx, root, crk, key, binding)
}

func wrapProven(ctx context.Context, root RootKeys, crk string, key *secret.Key, binding []byte) ([]byte, error) {
	wrapped, err := root.Seal(ctx, crk, key, binding)
	if err != nil {
		return nil, err
	}
	again, err := root.Open(ctx, crk, wrapped, binding)
	if err != nil {
		return nil, fmt.Errorf("CRK %s does not open what it has just wrapped: %w", crk, err)
	}
	defer again.Wipe()
	if !again.Equal(key) {
		return nil, fmt.Errorf("CRK %s opens what it has just wrapped to something else", crk)
	}
	return wrapped, nil
}
