package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"mortise/internal/store"
)

// death kills a KMS at one of its steps: from then on every step fails, as if
// nothing ran any more.
type death struct {
	mu    sync.Mutex
	names []string
	at    int    // which step, from 1; 0: none
	named string // or the first of that name
	dead  chan struct{}
}

func dieAt(at int) *death          { return &death{at: at, dead: make(chan struct{})} }
func dieAtStep(name string) *death { return &death{named: name, dead: make(chan struct{})} }

func (d *death) step(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names = append(d.names, name)
	if d.named == name && d.at == 0 {
		d.at = len(d.names)
	}
	if d.at == 0 || len(d.names) < d.at {
		return nil
	}
	if len(d.names) == d.at {
		close(d.dead)
	}
	return fmt.Errorf("%w: %s", errKilled, name)
}

func (d *death) steps() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.names)
}

func (d *death) await(t testing.TB) {
	t.Helper()
	select {
	case <-d.dead:
	case <-time.After(10 * time.Second):
		t.Fatalf("step %d was not reached: %v", d.at, d.steps())
	}
}

func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Since(begin) > 15*time.Second {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// settled tells what is half-done among the CRKs: being made, made for nothing,
// still being destroyed, at the provider without a record, or there although it
// was destroyed.
func (k *keeper) settled() error {
	list, err := k.CRKs(context.Background(), "")
	if err != nil {
		return err
	}
	for _, c := range list {
		switch {
		case c.State == CRKOrphan, c.State == CRKMaking, c.State == CRKDestroying,
			c.State == CRKUnused && !c.Imported, c.State == CRKDestroyed && c.Here, !c.State.ended() && !c.Here:
			return fmt.Errorf("CRK %s of %q is %s, here: %v", c.ID, c.Instance, c.State, c.Here)
		}
	}
	return nil
}

// remains counts the records that an instance has left.
func (k *keeper) remains(id string) (n int) {
	k.t.Helper()
	names, err := k.store.Collections(context.Background())
	if err != nil {
		k.t.Fatal(err)
	}
	owner := &instance{id: id}
	for _, name := range names {
		if owner.ownsCollection(name) {
			if err := k.store.Scan(context.Background(), name, func(store.Record) error { n++; return nil }); err != nil {
				k.t.Fatal(err)
			}
		}
	}
	return n
}

// TestDeletionKilled kills the KMS at every step of an instance's deletion, also
// in the middle of a change of its keys. Started again it ends the deletion by
// itself: nothing is left, nobody else has lost anything, and the id is free.
func TestDeletionKilled(t *testing.T) {
	const id = "tenant"
	k := keep(t, t.TempDir())
	ctx := t.Context()
	keys := objects{}
	keys.add(t, k.session(), 3)
	for _, at := range append([]string{""}, deletionSteps...) {
		if _, err := k.CreateInstance(ctx, tester, id, "", Settings{Port: 7000}); err != nil {
			t.Fatalf("kill at %s: the id is not free: %v", at, err)
		}
		i, err := k.instance(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		s := &Session{k: k.KMS, inst: i, Actor: Actor{Name: "test", Instance: id, Role: RoleAdministrator}}
		var gone []string
		for range 3 {
			gone = append(gone, create(t, s, named(fmt.Sprint("n", len(gone)))))
		}
		if _, err := k.IssueClient(ctx, tester, id, IssueRequest{Name: "a.example"}); err != nil { // a CA too
			t.Fatal(err)
		}
		if _, _, err := k.AddAPIKey(ctx, tester, id, "service", RoleViewer, 0, false); err != nil {
			t.Fatal(err)
		}
		if err := k.RotateCRK(ctx, tester, id, "", ""); err != nil { // so that there is a retired CRK
			t.Fatal(err)
		}
		eventually(t, "the rotation ends", func() error {
			if e, err := k.jobs.Get(ctx, id); err != nil || !e.Value.finished() {
				return fmt.Errorf("%+v, %v", e.Value, err)
			}
			return nil
		})
		// Restarted with a deletion in sight, and a change of keys under way when it comes.
		k.stop()
		d := dieAtStep(at)
		k.start(d.step)
		if err := k.RotateKey(ctx, tester, id); err != nil {
			t.Fatal(err)
		}
		var c *Confirmation
		if err := k.DeleteInstance(ctx, tester, id, ""); !errors.As(err, &c) || c.Count != 1+len(gone) {
			t.Fatalf("without a hash: %v", err)
		}
		err = k.DeleteInstance(ctx, tester, id, c.Hash)
		if at == "" {
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is cleared away", func() error { return k.deleted(id) })
		} else {
			d.await(t)
		}
		k.stop()
		k.start(nil)
		if _, err := k.instance(ctx, id); !errors.Is(err, ErrUnknownInstance) {
			t.Errorf("kill at %s: the instance: %v", at, err)
		}
		if _, err := s.Get(ctx, gone[0]); err == nil {
			t.Errorf("kill at %s: a session that had begun still gets a key", at)
		}
		eventually(t, "after a kill at "+at, func() error { return k.deleted(id) })
		keys.check(t, k.session())
	}
}

// deletionSteps are the steps of an instance's deletion.
var deletionSteps = []string{"instance deleted", "instance gone", "purged object-tenant", "purged name-tenant", "purged client-tenant",
	"purged apikey-tenant", "purged authority-tenant", "crk destroyed here"}

// deleted tells what is left of a deleted instance.
func (k *keeper) deleted(id string) error {
	if n := k.remains(id); n > 0 {
		return fmt.Errorf("%d records are left", n)
	}
	if err := k.store.Sync(context.Background()); err != nil {
		return err
	}
	if _, is := k.gone.Peek(id); is {
		return errors.New("the note of the deletion is left")
	}
	if _, is := k.jobs.Peek(id); is {
		return errors.New("a change of its keys is left")
	}
	if _, is := k.claims.Peek("port/7000"); is {
		return errors.New("its port is not free")
	}
	crks, err := k.crksOf(context.Background(), id)
	if err != nil {
		return err
	}
	if len(crks) < 2 {
		return fmt.Errorf("it had two CRKs at the least, not %d", len(crks))
	}
	for _, c := range crks {
		if c.Value.State != CRKDestroyed || slices.Contains(k.ring.InFile(), c.Key) {
			return fmt.Errorf("CRK %s is %s, in the file: %v", c.Key, c.Value.State, slices.Contains(k.ring.InFile(), c.Key))
		}
	}
	return k.settled()
}
