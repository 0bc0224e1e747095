// Package kms is the key management server without its wire: managed objects
// with KMIP's life cycle and attributes, kept sealed in a store, and the client
// certificates that may use them.
//
// Place in the flow: level 2. Its KMIP front is kms/kmipd; center and any other
// KMIP client reach it only through that. It imports secret and store, and of
// kmip-go the names of KMIP's types. It knows nothing of VMs.
//
// # Keys over keys
//
// The customer root key (CRK, S4) lives at a [RootKey] and wraps the instance
// key; the instance key seals each record whole (AES-256-GCM; additional data:
// instance and object id). So no key byte, name or attribute is in clear in
// the state folder, and a record that was altered or moved does not open.
//
// # Instances
//
// Every instance has collections of its own in the store, and a [Session] is
// bound to one instance, so that a client of one cannot name a thing of another
// (S2). [DefaultInstance] is made at the first start.
//
// # Locked and unlocked
//
// [Open] gives a KMS that cannot read its own records: it is locked until
// [KMS.Unlock] is given the root-key providers.
package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// DefaultInstance is the id of the instance that every KMS has.
const DefaultInstance = "default"

// GraceTime is how long the bytes of a destroyed key stay, sealed, before they
// are purged. On the wire they are gone at once.
const GraceTime = 7 * 24 * time.Hour

// A RootKey keeps a CRK and wraps keys with it, bound to additional data.
// ID names it and is no secret.
type RootKey interface {
	ID() string
	Seal(key *secret.Key, additional []byte) ([]byte, error)
	Open(wrapped, additional []byte) (*secret.Key, error)
}

// Options are the outside of a KMS; zero values are the usual ones.
type Options struct {
	Logger *slog.Logger     // nil: none
	Now    func() time.Time // nil: time.Now
	// Elapsed tells how long the process runs, by a clock that does not jump. Nil:
	// the machine's; with a Now of one's own, jumps are then not looked for.
	Elapsed func() time.Duration
	// Audit says where the audit log is.
	Audit AuditOptions
	// FetchKeys gets CRKs from another member and gives them to a provider, all
	// that there are if no ids are given; nil: this is the only member.
	FetchKeys func(ctx context.Context, to Sharer, ids ...string) error

	step     func(name string) error // see custody.keyStep
	patience time.Duration           // of spread; 0: spreadAll
}

// KMS is an open key management server. Its methods may be called concurrently.
type KMS struct {
	log     *slog.Logger
	now     func() time.Time
	store   *store.Store
	records *store.Collection[instanceRecord]
	tenancy
	clock   *Clock
	clocks  *store.Collection[clockRecord]
	format  atomic.Int32 // of the records that are written; see SetFormat
	streams streams      // of Encrypt and Decrypt
	routed  atomic.Int64 // when Route asked last what names there are, as a Unix time in nanoseconds

	opening   sync.Mutex // held while an instance is opened or closed
	mu        sync.RWMutex
	roots     map[string]RootKeys  // by kind; empty while locked
	instances map[string]*instance // the open ones
	unlocked  chan struct{}        // closed by Unlock

	run  context.Context // ends with Close
	stop context.CancelFunc
	done sync.WaitGroup

	safety
	auditing
	custody
}

// Open returns the KMS that s holds, locked. The store stays the caller's to
// close, after the KMS.
func Open(ctx context.Context, s *store.Store, o Options) (*KMS, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	clock := newClock(o.Now, o.Elapsed)
	k := &KMS{log: o.Logger, now: clock.Now, clock: clock, store: s, roots: map[string]RootKeys{}, instances: map[string]*instance{}, unlocked: make(chan struct{})}
	var err error
	if k.records, err = store.NewCollection(ctx, s, "instance", store.JSON[instanceRecord](1)); err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	if k.clocks, err = store.NewCollection(ctx, s, "clock", store.JSON[clockRecord](1)); err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	if k.custody, err = openCustody(ctx, s, o); err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	if err := k.lookAtClock(ctx); err != nil {
		return nil, err
	}
	if k.safety, err = openSafety(ctx, s); err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	if k.tenancy, err = openTenancy(ctx, s); err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	if err := k.openAuditing(ctx, s, o.Audit); err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	k.run, k.stop = context.WithCancel(context.Background())
	k.done.Go(func() { k.drainForever(k.run) })
	k.done.Go(func() { k.followClock(k.run) })
	return k, nil
}

// Unlock opens the instances with the CRKs that the providers keep, one of each
// kind, and makes [DefaultInstance] in an empty store. The providers stay the
// caller's to close, after the KMS.
func (k *KMS) Unlock(ctx context.Context, providers ...RootKeys) error {
	if len(providers) == 0 {
		return errors.New("kms: unlocking needs a root-key provider")
	}
	roots := map[string]RootKeys{}
	for _, p := range providers {
		roots[p.Kind()] = p
	}
	k.mu.Lock()
	already := len(k.roots) > 0
	if !already {
		k.roots, k.firstRoot = roots, providers[0].Kind()
	}
	k.mu.Unlock()
	if already {
		return errors.New("kms: it is unlocked already")
	}
	if err := k.openInstances(ctx); err != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.roots = map[string]RootKeys{}
		for _, i := range k.instances {
			i.close()
		}
		clear(k.instances)
		return err
	}
	close(k.unlocked)
	k.done.Go(func() { k.redoActs(k.run) })
	k.done.Go(func() { k.sweepForever(k.run) })
	k.done.Go(func() { k.followKeys(k.run) })
	k.done.Go(func() { k.runJobs(k.run) })
	k.done.Go(func() { k.warnForever(k.run) })
	return nil
}

// Unlocked returns a channel that is closed once the KMS is unlocked.
func (k *KMS) Unlocked() <-chan struct{} { return k.unlocked }

// Close ends the background work and wipes what keys it can. Sessions must not
// be used any more.
func (k *KMS) Close() {
	k.stop()
	k.done.Wait()
	k.closeAuditing()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, i := range k.instances {
		i.close()
	}
	k.records.Close()
	k.custody.close()
	k.safety.close()
	k.tenancy.close()
	k.clocks.Close()
}

// open returns the instances that are open now.
func (k *KMS) open() []*instance {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return slices.Collect(maps.Values(k.instances))
}
