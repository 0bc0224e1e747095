package kms

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mortise/internal/pki"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
)

// TestNoOrphans kills the KMS at every step of everything that makes a CRK.
// Afterwards every CRK at the provider has a record, and what nothing uses is
// destroyed.
func TestNoOrphans(t *testing.T) {
	for what, make := range map[string]func(*keeper, int) error{
		"instance": func(k *keeper, n int) error {
			_, err := k.CreateInstance(t.Context(), tester, fmt.Sprint("i", n), "", Settings{})
			return err
		},
		"import": func(k *keeper, n int) error {
			key, err := secret.Random(nil, 32)
			if err != nil {
				return err
			}
			defer key.Wipe()
			_, err = k.ImportCRK(t.Context(), tester, "", key, "")
			return err
		},
		"other use": func(k *keeper, n int) error {
			id, err := k.MakeRootKey(t.Context(), k.ring, "a test")
			if err == nil {
				err = k.DropRootKeys(t.Context(), "a test", id)
			}
			return err
		},
	} {
		t.Run(what, func(t *testing.T) {
			k := keep(t, t.TempDir())
			keys := objects{}
			keys.add(t, k.session(), 1)
			steps := []string{"?"}
			for kill := 0; kill <= len(steps); kill++ {
				d := dieAt(kill)
				k.stop()
				k.start(d.step)
				err := make(k, kill)
				if kill == 0 {
					if err != nil {
						t.Fatal(err)
					}
					steps = d.steps()
					t.Logf("steps: %v", steps)
				} else {
					if !errors.Is(err, errKilled) {
						t.Errorf("killed at %s: %v", steps[kill-1], err)
					}
					d.await(t)
				}
				k.stop()
				k.start(nil)
				eventually(t, "after a kill", k.settled)
				keys.check(t, k.session())
			}
			if !slices.Contains(steps, "crk recorded") || !slices.Contains(steps, "crk made") {
				t.Errorf("steps: %v", steps)
			}
		})
	}
	t.Run("first start", func(t *testing.T) {
		dir := t.TempDir()
		k := &keeper{t: t, dir: dir, clock: &clock{at: time.Now().Truncate(time.Second)}}
		k.openStore()
		t.Cleanup(func() { k.store.Close() })
		for kill := 1; kill <= 3; kill++ {
			d := dieAt(kill)
			k.ring = openRing(t, dir)
			var err error
			if k.KMS, err = Open(t.Context(), k.store, Options{Now: k.clock.now, step: d.step}); err != nil {
				t.Fatal(err)
			}
			if err := k.Unlock(t.Context(), k.ring); !errors.Is(err, errKilled) {
				t.Errorf("kill %d: %v", kill, err)
			}
			k.stop()
		}
		k.start(nil)
		defer k.stop()
		eventually(t, "after three kills", k.settled)
		if n := len(k.ring.InFile()); n != 1 {
			t.Errorf("%d CRKs in the file", n)
		}
		create(t, k.session())
	})
}

// TestOrphan: what is at the provider and in no record is shown and can be
// removed, and a destroyed CRK that an old keyring brings back is destroyed again.
func TestOrphan(t *testing.T) {
	dir := t.TempDir()
	k := keep(t, dir)
	ctx := t.Context()
	keys := objects{}
	keys.add(t, k.session(), 2)
	id, err := rootkeytest.NewCRK(ctx, k.ring)
	if err != nil {
		t.Fatal(err)
	}
	find := func() (c CRK) {
		t.Helper()
		list, err := k.CRKs(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range list {
			if one.ID == id {
				c = one
			}
		}
		return c
	}
	if c := find(); c.State != CRKOrphan || !c.Here || c.Provider != "file" {
		t.Errorf("%+v", c)
	}
	if list, err := k.CRKs(ctx, DefaultInstance); err != nil || slices.ContainsFunc(list, func(c CRK) bool { return c.ID == id }) {
		t.Errorf("of one instance: %+v, %v", list, err)
	}
	if err := k.keepUp(ctx); err != nil || find().State != CRKOrphan {
		t.Errorf("it is not to be destroyed by itself: another key server may use the token: %v, %+v", err, find())
	}
	if err := k.RotateCRK(ctx, tester, DefaultInstance, id, ""); !errors.Is(err, ErrUnknownCRK) {
		t.Errorf("rotating to an orphan: %v", err)
	}
	if err := k.DeleteCRK(ctx, tester, rootkeytest.NewID(), ""); !errors.Is(err, ErrUnknownCRK) {
		t.Errorf("deleting what is not there: %v", err)
	}
	old, err := os.ReadFile(filepath.Join(dir, rootkeytest.FileName))
	if err != nil {
		t.Fatal(err)
	}
	c := confirmed(t, func(hash string) error { return k.DeleteCRK(ctx, tester, id, hash) })
	if c.Count != 1 || !strings.Contains(c.Lost[0], "no record") {
		t.Errorf("lost: %q", c.Lost)
	}
	if c := find(); c.State != CRKDestroyed || c.Here || slices.Contains(k.ring.InFile(), id) {
		t.Errorf("%+v", c)
	}
	k.stop()
	if err := os.WriteFile(filepath.Join(dir, rootkeytest.FileName), old, 0o600); err != nil {
		t.Fatal(err)
	}
	k.start(nil)
	eventually(t, "the old file's CRK is destroyed again", k.settled)
	if slices.Contains(k.ring.InFile(), id) {
		t.Error("the old file's CRK is in the file")
	}
	keys.check(t, k.session())

	use, err := k.MakeRootKey(ctx, k.ring, "a test")
	if err != nil {
		t.Fatal(err)
	}
	if err := k.DeleteCRK(ctx, tester, use, ""); !errors.Is(err, ErrCRKInUse) {
		t.Errorf("deleting a root key of another use: %v", err)
	}
}

// TestLostBeforeSpread: the member that made a new CRK is gone for good before
// another had it. The rotation begins anew with another CRK.
func TestLostBeforeSpread(t *testing.T) {
	k := keep(t, t.TempDir())
	keys := objects{}
	keys.add(t, k.session(), 2)
	k.stop()
	d := dieAtStep("crk done")
	k.start(d.step)
	if err := k.RotateCRK(t.Context(), tester, DefaultInstance, "", ""); err != nil {
		t.Fatal(err)
	}
	d.await(t)
	e, err := k.jobs.Get(t.Context(), DefaultInstance)
	if err != nil || e.Value.CRK == "" || e.Value.Stage != "spread" {
		t.Fatalf("%+v, %v", e.Value, err)
	}
	k.stop()
	k.ring = openRing(t, k.dir)
	if err := k.ring.Destroy(t.Context(), e.Value.CRK); err != nil { // it was on the other member only
		t.Fatal(err)
	}
	if k.KMS, err = Open(t.Context(), k.store, Options{Now: k.clock.now, patience: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(t.Context(), k.ring); err != nil {
		t.Fatal(err)
	}
	job := k.finish()
	if job.CRK == e.Value.CRK || job.Failure != "" {
		t.Errorf("%+v", job)
	}
	eventually(t, "the lost one is given up", k.settled)
	keys.check(t, k.session())
}

// TestActsDuringRotation: who adds and removes clients and API keys notices
// nothing of rotations at that instant.
func TestActsDuringRotation(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	var end atomic.Bool
	var all sync.WaitGroup
	acts := atomic.Int64{}
	for range 4 {
		all.Go(func() {
			for !end.Load() {
				err := actOnce(ctx, k)
				if err != nil {
					t.Error(err)
					return
				}
				acts.Add(4)
			}
		})
	}
	rotations := 0
	for begin := time.Now(); time.Since(begin) < 2*time.Second || rotations < 10; rotations++ {
		if err := k.RotateKey(ctx, tester, DefaultInstance); err != nil {
			t.Fatal(err)
		}
		k.finish()
	}
	end.Store(true)
	all.Wait()
	t.Logf("%d acts during %d rotations", acts.Load(), rotations)
	if n := k.stale(k.session().inst.keys.Load().newest.generation); n != 0 {
		t.Errorf("%d records are sealed by an old generation", n)
	}
}

func actOnce(ctx context.Context, k *keeper) error {
	own, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	cert, err := pki.SelfSigned(own, pki.Grant{Life: time.Hour}, "client", k.clock.now())
	if err != nil {
		return err
	}
	c, err := k.AddClient(ctx, tester, DefaultInstance, NewClient{Certificate: cert})
	if err != nil {
		return err
	}
	a, _, err := k.AddAPIKey(ctx, tester, DefaultInstance, "service", RoleViewer, 0, false)
	if err != nil {
		return err
	}
	_, err = k.RemoveClient(ctx, tester, DefaultInstance, c.Fingerprint)
	_, aerr := k.RemoveAPIKey(ctx, tester, DefaultInstance, a.ID)
	return errors.Join(err, aerr)
}
