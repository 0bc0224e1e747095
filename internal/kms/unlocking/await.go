package unlocking

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortise/internal/kms"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/pkcs11"
)

// A KMS is what is to be unlocked; *kms.KMS is one.
type KMS interface {
	// New tells whether it has never been unlocked.
	New(ctx context.Context) (bool, error)
	// NeededCRKs lists the CRKs of a kind without which instances stay locked.
	NeededCRKs(ctx context.Context, kind string) ([]string, error)
	Unlock(ctx context.Context, providers ...kms.RootKeys) error
}

// Peers are the other members; *cluster.Node knows them.
type Peers interface {
	// FetchKeys gets root keys from them, all that there are if no ids are given,
	// and gives them to a provider.
	FetchKeys(ctx context.Context, to kms.Sharer, ids ...string) error
	// Alone tells whether it is certain that there is no other member.
	Alone(ctx context.Context) bool
	// Unlocked is told the providers once they are open: peers may ask for keys.
	Unlocked(providers ...kms.RootKeys)
}

// tryEvery is how often peers are asked while the key server is locked.
const tryEvery = time.Second

// Await gives the KMS its root keys: from providers that are open, and from a peer
// what is missing there (S6). It tries until it has succeeded or ctx ends; it fails
// when nobody else has what is missing.
func (r *RootKeys) Await(ctx context.Context, k KMS, peers Peers) error {
	for said := false; ; {
		// Asked first: what is opened during an attempt is for the next one.
		locked := slices.ContainsFunc(r.providers(), func(p kms.Sharer) bool { return !r.isOpen(p.Kind()) })
		err := r.try(ctx, k, peers)
		if err == nil {
			for _, p := range r.providers() { // whoever opened it
				r.nowOpen(p.Kind())
			}
			peers.Unlocked(rootKeys(r.providers())...)
			return nil
		}
		if !locked && peers.Alone(ctx) {
			return err
		}
		if !said {
			said = true
			r.log.Warn("kms is locked: it waits for root keys from a peer, or for mortise kms unlock", "error", err)
		}
		select {
		case <-r.changed:
		case <-time.After(tryEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func rootKeys(list []kms.Sharer) (keys []kms.RootKeys) {
	for _, p := range list {
		keys = append(keys, p)
	}
	return keys
}

func (r *RootKeys) try(ctx context.Context, k KMS, peers Peers) error {
	fresh, err := k.New(ctx)
	if err != nil {
		return err
	}
	for _, p := range r.providers() {
		if err := r.complete(ctx, k, peers, p); err != nil {
			return err
		}
		if !r.isOpen(p.Kind()) && fresh {
			return fmt.Errorf("the first start needs what opens the %s root keys", p.Kind())
		}
	}
	return k.Unlock(ctx, rootKeys(r.providers())...)
}

// complete gets from peers what a provider lacks of the CRKs that it should have.
func (r *RootKeys) complete(ctx context.Context, k KMS, peers Peers, p kms.Sharer) error {
	missing := func() ([]string, error) {
		need, err := k.NeededCRKs(ctx, p.Kind())
		if err != nil {
			return nil, err
		}
		have, err := p.List(ctx)
		if errors.Is(err, pkcs11.ErrLocked) {
			return need, nil
		}
		return slices.DeleteFunc(need, func(id string) bool { return slices.Contains(have, id) }), err
	}
	need, err := missing()
	if err != nil || len(need) == 0 && r.isOpen(p.Kind()) {
		return err
	}
	for chunk := range slices.Chunk(need, rootkey.MaxShare) {
		if err := peers.FetchKeys(ctx, p, chunk...); err != nil {
			return err
		}
	}
	if err := peers.FetchKeys(ctx, p); err != nil && len(need) == 0 { // what is not an instance's
		return err
	}
	if need, err = missing(); err == nil && len(need) > 0 {
		err = fmt.Errorf("%d root keys of kind %s are on no unlocked member, %s among them", len(need), p.Kind(), need[0])
	}
	return err
}
