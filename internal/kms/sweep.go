package kms

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// sweepEvery is how often date-driven states are written and keys purged. Nothing
// waits for it: who reads an object whose date has come writes the change first.
const sweepEvery = time.Minute

// settle returns the object as it is now: if by cluster time a date of it has
// come, the state that it brings is committed first, so that all members agree on
// it from then on. Every read of an object goes through it. What cannot be
// decided, because a jump of the clock lies between, or cannot be committed, is
// refused: a key that may be past its date is not served as if it were not. The
// change has an audit entry of its own, by the server.
func (k *KMS) settle(ctx context.Context, i *instance, e store.Entry[*object]) (store.Entry[*object], error) {
	for {
		earliest, latest := k.clock.Bounds()
		now, sure := e.Value.settled(earliest.Truncate(time.Second)), e.Value.settled(latest.Truncate(time.Second))
		if now.State != sure.State {
			return e, &Error{kmip.ResultReasonGeneralFailure, "the object's state depends on a jump of the server's clock that waits for an administrator", ErrClockJump}
		}
		if now.State == e.Value.State {
			return e, nil
		}
		if err := k.clock.Err(); err != nil {
			return e, err
		}
		rev, err := k.commitByDate(ctx, i, "state by date", e.Key, stateName(now.State), i.objects.Update(e.Key, e.Revision, now))
		if err == nil {
			k.log.Info("kms: object changed by date", "instance", i.id, "object", e.Key, "state", stateName(now.State))
			e.Value, e.Revision = now, rev
			return e, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return e, err
		}
		if e, err = i.objects.Get(ctx, e.Key); err != nil { // somebody else was faster
			return e, err
		}
	}
}

// sweepForever is what one member at a time does for all: it writes cluster time
// down, writes the states that dates have brought about, and purges keys whose
// grace time is over.
func (k *KMS) sweepForever(ctx context.Context) {
	k.store.Lead(ctx, "sweeper", func(ctx context.Context, term store.Term) error {
		tick := time.NewTicker(recordEvery)
		defer tick.Stop()
		var swept time.Time
		for {
			if err := k.keepTime(ctx, term); err != nil {
				return fmt.Errorf("kms: %w", err)
			}
			if time.Since(swept) >= sweepEvery {
				swept = time.Now()
				if err := k.sweep(ctx); err != nil && ctx.Err() == nil {
					k.log.Error("kms: sweeping objects failed; it is tried again", "after", sweepEvery, "error", err)
				}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
}

func (k *KMS) sweep(ctx context.Context) error {
	for _, i := range k.open() {
		if err := k.sweepInstance(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (k *KMS) sweepInstance(ctx context.Context, i *instance) error {
	due, err := i.objects.Find(ctx, store.IndexTerm{Kind: termDue})
	if err != nil {
		return err
	}
	for e, err := range due.Newest() {
		if err != nil { // damaged; the store has logged it
			continue
		}
		e, err := k.settle(ctx, i, e)
		switch {
		case errors.Is(err, store.ErrNotFound), errors.Is(err, ErrClockJump):
			continue
		case err != nil:
			return err
		}
		// Its entry must not read like an administrator's purge, which a restored
		// server is told of: that one drops the bytes by date itself.
		o := *e.Value
		earliest, _ := k.clock.Bounds()
		if !o.purge(earliest) {
			continue
		}
		if _, err := k.commitByDate(ctx, i, "bytes dropped", e.Key, "grace time over", i.objects.Update(e.Key, e.Revision, &o)); err != nil {
			if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
				continue // a client was faster; the next sweep sees to it
			}
			return err
		}
		k.log.Info("kms: key purged", "instance", i.id, "object", e.Key)
	}
	return nil
}
