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
// Every record's key begins with the id of its instance, and a [Session] is
// bound to one, so that a client of one instance cannot name a thing of another
// (S2). There is one instance, [DefaultInstance].
package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// DefaultInstance is the id of the instance that every KMS has.
const DefaultInstance = "default"

// GraceTime is how long the bytes of a destroyed key stay, sealed, before they
// are purged. On the wire they are gone at once.
const GraceTime = 7 * 24 * time.Hour

// sweepEvery is how often date-driven states are written and keys purged.
const sweepEvery = time.Hour

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
}

// KMS is an open key management server. Its methods may be called concurrently.
type KMS struct {
	log       *slog.Logger
	now       func() time.Time
	store     *store.Store
	instances map[string]*instance // does not change after Open
	objects   *store.Collection[*object]
	names     *store.Collection[string]
	clients   *store.Collection[Client]

	stop context.CancelFunc
	done sync.WaitGroup
}

// Open loads the KMS that s holds, or makes a new one. root must be the root
// key that made it, and is used by Open only. Store and root key stay the
// caller's to close, the store after the KMS.
func Open(ctx context.Context, s *store.Store, root RootKey, o Options) (*KMS, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	records, err := store.NewCollection(ctx, s, "instance", store.JSON[instanceRecord](1))
	if err != nil {
		return nil, fmt.Errorf("kms: %w", err)
	}
	inst, err := openInstance(ctx, s, records, root, DefaultInstance, o.Now())
	if err != nil {
		return nil, fmt.Errorf("kms: opening instance %s: %w", DefaultInstance, err)
	}
	k, err := openWith(ctx, s, map[string]*instance{inst.id: inst}, o)
	if err != nil {
		inst.wipe()
		return nil, fmt.Errorf("kms: %w", err)
	}
	return k, nil
}

// openWith loads what the open instances can unseal.
func openWith(ctx context.Context, s *store.Store, instances map[string]*instance, o Options) (k *KMS, err error) {
	k = &KMS{log: o.Logger, now: o.Now, store: s, instances: instances}
	seals := sealer{instances}
	if k.objects, err = store.NewCollection(ctx, s, "object", store.Codec[*object](objectCodec{seals})); err != nil {
		return nil, err
	}
	if k.names, err = store.NewCollection(ctx, s, "name", store.JSON[string](1)); err != nil {
		return nil, err
	}
	if k.clients, err = store.NewCollection(ctx, s, "client", store.Sealed(store.JSON[Client](1), seals)); err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.Background())
	k.stop = stop
	k.done.Go(func() { k.sweepForever(run) })
	return k, nil
}

// Close ends the background work and wipes what keys it can. Sessions must not
// be used any more.
func (k *KMS) Close() {
	k.stop()
	k.done.Wait()
	for _, i := range k.instances {
		i.wipe()
	}
}

// sweepForever writes the states that dates have brought about, so that they do
// not hang on this machine's clock for ever, and purges keys whose grace time
// is over.
func (k *KMS) sweepForever(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if err := k.sweep(ctx); err != nil && ctx.Err() == nil {
			k.log.Error("kms: sweeping objects failed; it is tried again", "after", sweepEvery, "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (k *KMS) sweep(ctx context.Context) error {
	entries, err := k.objects.List(ctx, "")
	if err != nil && !errors.Is(err, store.ErrDamaged) { // the store has logged each damaged one
		return err
	}
	for _, e := range entries {
		o, now := *e.Value, k.now()
		settled := o.settle(now)
		purged := o.purge(now)
		if !settled && !purged {
			continue
		}
		if err := k.write(ctx, e, &o); err != nil {
			if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
				continue // a client was faster; the next sweep sees to it
			}
			return err
		}
		k.log.Info("kms: object changed by date", "object", e.Key, "state", stateName(o.State), "purged", purged)
	}
	return nil
}
