package kms

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mortise/internal/store"
)

// An instance is deleted in steps that any member ends after a crash: one
// transaction takes its record, and with it its wrapped keys, away, has its CRKs
// destroyed on every member, and leaves a note; then its records go, page by
// page, then the note. After the first step nothing of it is served, and once the
// CRKs are destroyed nobody opens what is left of it in old revisions or backups.

// goneRecord is the note of an instance that is being deleted.
type goneRecord struct{ At time.Time }

// collectionsOf are the names of all collections that an instance has.
func collectionsOf(id string) []string {
	return []string{"object-" + id, "name-" + id, "client-" + id, "apikey-" + id, "authority-" + id}
}

// DeleteInstance deletes an instance with all its keys, for ever. It returns a
// *[Confirmation] that lists the keys unless hash agrees to exactly their loss
// (S6). The default instance cannot be deleted.
func (k *KMS) DeleteInstance(ctx context.Context, by Actor, id, hash string) error {
	if id == DefaultInstance {
		return fmt.Errorf("kms: %w: instance %s cannot be deleted; destroy its keys one by one, or take its grant away", ErrInvalid, id)
	}
	lost := 0
	err := k.act(ctx, by, nil, "instance delete", id, func() (ops []store.Op, err error) {
		ops, lost, err = k.deletion(ctx, id, hash)
		return ops, err
	})
	if err != nil {
		return err
	}
	if err := k.keyStep("instance deleted"); err != nil {
		return err
	}
	k.log.Warn("kms: instance deleted", "instance", id, "objects", lost, "by", by.Name)
	if err := k.store.Sync(ctx); err != nil { // the cache must have seen it
		return fmt.Errorf("kms: deleting instance %s: %w", id, err)
	}
	if err := k.reconcile(ctx, id); err != nil {
		return err
	}
	if err := errors.Join(k.clearAway(ctx, id), k.keepCRKs(ctx)); err != nil {
		k.log.Warn("kms: what a deleted instance left could not be removed yet; it is tried again", "instance", id, "error", err)
	}
	return nil
}

// deletion is the first step, if hash agrees to what is lost, and how much that is.
func (k *KMS) deletion(ctx context.Context, id, hash string) (ops []store.Op, lost int, err error) {
	e, err := k.record(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	list, err := k.everything(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	if err := Confirm("deleting instance "+id, list, hash); err != nil {
		return nil, 0, err
	}
	ops = []store.Op{k.records.Delete(id, e.Revision), k.gone.Create(id, goneRecord{At: k.now().UTC()})}
	if s, ok := k.sealing.Peek(id); ok {
		ops = append(ops, k.sealing.Delete(id, s.Revision))
	}
	if j, ok := k.jobs.Peek(id); ok {
		ops = append(ops, k.jobs.Delete(id, j.Revision))
	}
	crks, err := k.crksOf(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	for _, c := range crks {
		if c.Value.State.ended() {
			continue
		}
		c.Value.State, c.Value.Changed, c.Value.Confirmed = CRKDestroying, k.now().UTC(), nil
		ops = append(ops, k.crks.Update(c.Key, c.Revision, c.Value))
	}
	for _, c := range e.Value.Settings.claims() {
		ops = append(ops, k.claims.Delete(c, 0))
	}
	return ops, len(list), nil
}

// clearAway ends the deletion of an instance, if there is one to end.
func (k *KMS) clearAway(ctx context.Context, id string) error {
	e, is := k.gone.Peek(id)
	if !is {
		return nil
	}
	if err := k.keyStep("instance gone"); err != nil {
		return err
	}
	for _, c := range collectionsOf(id) {
		if _, err := k.store.Purge(ctx, c); err != nil {
			return fmt.Errorf("kms: removing the records of deleted instance %s: %w", id, err)
		}
		if err := k.keyStep("purged " + c); err != nil {
			return err
		}
	}
	if _, err := k.store.Commit(ctx, k.gone.Delete(id, e.Revision)); err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("kms: ending the deletion of instance %s: %w", id, err)
	}
	k.log.Info("kms: a deleted instance's records are removed", "instance", id)
	return nil
}
