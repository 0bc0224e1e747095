package kms

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mortise/internal/store"
)

// tenancy is what the KMS has for its instances beside their records.
type tenancy struct {
	gone      *store.Collection[goneRecord] // notes of deletions under way
	claims    *store.Collection[string]     // ports and names, each of one instance
	endpoints *store.Collection[memberEndpoint]

	firstRoot string                   // kind of the provider for new instances; guarded by KMS.mu
	failed    map[string]failedOpening // guarded by KMS.mu
}

func openTenancy(ctx context.Context, s *store.Store) (t tenancy, err error) {
	t.failed = map[string]failedOpening{}
	if t.gone, err = store.NewCollection(ctx, s, "instance-gone", store.JSON[goneRecord](1)); err != nil {
		return t, err
	}
	if t.claims, err = store.NewCollection(ctx, s, "instance-claim", store.JSON[string](1)); err != nil {
		return t, err
	}
	t.endpoints, err = store.NewCollection(ctx, s, "endpoint", store.JSON[memberEndpoint](1))
	return t, err
}

func (t *tenancy) close() {
	t.gone.Close()
	t.claims.Close()
	t.endpoints.Close()
}

// openInstances opens what there is, and makes [DefaultInstance] in an empty
// store. An instance that cannot be opened does not hold up the others, but one
// must be.
func (k *KMS) openInstances(ctx context.Context) error {
	if _, err := k.records.Get(ctx, DefaultInstance); errors.Is(err, store.ErrNotFound) {
		if err := k.makeDefault(ctx); err != nil {
			return fmt.Errorf("kms: making instance %s: %w", DefaultInstance, err)
		}
	}
	watch := k.store.Watch("instance", "instance-gone")
	entries, err := k.records.List(ctx, "")
	if err != nil {
		watch.Close()
		return fmt.Errorf("kms: reading the instances: %w", err)
	}
	var errs []error
	served := 0
	for _, e := range entries {
		if err := k.reconcile(ctx, e.Key); err != nil {
			errs = append(errs, err)
		} else {
			served++
		}
	}
	if len(errs) > 0 && served == 0 {
		watch.Close()
		return errors.Join(errs...)
	}
	k.done.Go(func() { k.followInstances(k.run, watch) })
	return nil
}

// makeDefault makes the instance that every KMS has, and claims its name.
func (k *KMS) makeDefault(ctx context.Context) error {
	root, err := k.providerFor("")
	if err != nil {
		return err
	}
	fresh, done, err := k.newInstance(ctx, root, DefaultInstance)
	defer done()
	if err != nil {
		return err
	}
	used, err := k.inUse(ctx, fresh.CRK, DefaultInstance)
	if err != nil {
		return err
	}
	if err := fresh.Settings.check(DefaultInstance); err != nil {
		return err
	}
	ops := []store.Op{k.records.Create(DefaultInstance, fresh), used}
	for _, c := range fresh.Settings.claims() {
		ops = append(ops, k.claims.Create(c, DefaultInstance))
	}
	if _, err = k.store.Commit(ctx, ops...); errors.Is(err, store.ErrExists) { // another member was faster
		err = nil
	}
	return err
}

// retryOpening is how often a member tries again to open an instance that it
// could not open, such as one whose CRK has not come yet.
const retryOpening = 2 * time.Second

// instance returns the instance called id, open, if it serves by now:
// linearizable. What the caller reads with Peek after it is linearizable too.
// The errors are ErrLocked, ErrUnknownInstance, ErrInstanceLocked, or the
// store's.
func (k *KMS) instance(ctx context.Context, id string) (*instance, error) {
	i, _, err := k.serving(ctx, id)
	return i, err
}

// serving is instance, with the instance's settings.
func (k *KMS) serving(ctx context.Context, id string) (*instance, *Settings, error) {
	if _, err := k.providerFor(""); err != nil {
		return nil, nil, err
	}
	if err := k.store.Sync(ctx); err != nil {
		return nil, nil, fmt.Errorf("kms: looking up instance %q: %w", id, err)
	}
	e, ok := k.records.Peek(id)
	if !ok {
		if _, err := k.record(ctx, id); err != nil { // says what is wrong with it
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("kms: %w: %q", ErrUnknownInstance, id)
	}
	if k.crkEnded(e.Value.CRK) {
		return nil, nil, fmt.Errorf("kms: instance %s: %w", id, ErrCRKDeleted)
	}
	if !e.Value.Ungranted.IsZero() {
		return nil, nil, fmt.Errorf("kms: %w: the grant of its root key was revoked at %s; give it back with: mortise kms instance grant %s", ErrInstanceLocked, e.Value.Ungranted.Format(time.RFC3339), id)
	}
	i := k.here(id)
	if i != nil && i.created == e.Created {
		return i, &e.Value.Settings, nil
	}
	if err := k.reconcile(ctx, id); err != nil {
		return nil, nil, err
	}
	if i := k.here(id); i != nil {
		return i, &e.Value.Settings, nil
	}
	return nil, nil, fmt.Errorf("kms: %w: %q", ErrUnknownInstance, id)
}

// here returns the instance called id if it is open on this member, as far as that
// knows; nil otherwise.
func (k *KMS) here(id string) *instance {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.instances[id]
}

// reconcile makes the instance called id open or closed, as its record says.
func (k *KMS) reconcile(ctx context.Context, id string) error {
	k.opening.Lock()
	defer k.opening.Unlock()
	e, wanted := k.records.Peek(id)
	wanted = wanted && e.Value.Ungranted.IsZero() && !k.crkEnded(e.Value.CRK)
	k.mu.Lock()
	roots, i, failed := k.roots, k.instances[id], k.failed[id]
	if i != nil && (!wanted || i.created != e.Created) {
		delete(k.instances, id)
	}
	if !wanted || failed.revision != e.Revision {
		delete(k.failed, id)
		failed = failedOpening{}
	}
	k.mu.Unlock()
	if len(roots) == 0 {
		return fmt.Errorf("kms: %w", ErrLocked)
	}
	if i != nil && (!wanted || i.created != e.Created) {
		i.retire()
		k.log.Info("kms: instance closed", "instance", id)
		i = nil
	}
	if !wanted || i != nil {
		return nil
	}
	if failed.err != nil && time.Since(failed.at) < retryOpening { // do not wear the provider out
		return failed.err
	}
	// On another member than the one that made it, the CRK may still be to come.
	if err := k.fetchCRKs(ctx, e.Value.Provider, []string{e.Value.CRK}); err != nil {
		k.log.Warn("kms: an instance's CRK could not be got from another member", "instance", id, "error", err)
	}
	i, err := k.openInstance(ctx, roots, e)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("kms: %w: it could not be opened: %w", ErrInstanceLocked, err)
		if failed.err == nil {
			k.log.Error("kms: an instance cannot be opened; it is tried again", "instance", id, "error", err)
		}
		k.failed[id] = failedOpening{err, e.Revision, time.Now()}
		return err
	}
	i.created = e.Created
	k.instances[id] = i
	delete(k.failed, id)
	k.log.Info("kms: instance opened", "instance", id)
	return nil
}

// failedOpening is why an instance is not open although it should be.
type failedOpening struct {
	err      error
	revision int64 // of the record that could not be opened
	at       time.Time
}

// retire takes an instance out of service. Sessions that have begun with it get
// an error for whatever they still do; its name key is wiped when the last of
// them lets go of it.
func (i *instance) retire() {
	i.retired.Store(true)
	i.forget()
}

// inService turns the result of an operation into an error if the instance was
// taken out of service meanwhile: what it read may be from an emptied cache.
func (s *Session) inService(err error) error {
	if s.inst.retired.Load() {
		return fmt.Errorf("kms: %w: it was taken out of service", ErrInstanceLocked)
	}
	return err
}

// followInstances opens and closes instances as their records change, and ends
// what deletions left, until ctx ends.
func (k *KMS) followInstances(ctx context.Context, w *store.Watcher) {
	defer w.Close()
	todo := map[string]bool{}
	if err := k.store.Sync(ctx); err == nil {
		entries, _ := k.gone.List(ctx, "")
		for _, e := range entries {
			todo[e.Key] = true
		}
	}
	for {
		for id := range todo {
			if ctx.Err() != nil {
				return
			}
			if err := k.reconcile(ctx, id); err == nil && k.clearAway(ctx, id) == nil {
				delete(todo, id)
			}
		}
		wait, cancel := ctx, context.CancelFunc(func() {})
		if len(todo) > 0 {
			wait, cancel = context.WithTimeout(ctx, retryOpening)
		}
		changes, err := w.Next(wait)
		cancel()
		switch {
		case err == nil:
			for _, c := range changes {
				todo[c.Key] = true
			}
		case ctx.Err() != nil || errors.Is(err, store.ErrUnavailable):
			return
		}
		if d, ok := k.failedIDs(); ok {
			for _, id := range d {
				todo[id] = true
			}
		}
	}
}

func (k *KMS) failedIDs() (ids []string, any bool) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	for id := range k.failed {
		ids = append(ids, id)
	}
	return ids, len(ids) > 0
}
