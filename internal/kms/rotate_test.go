package kms

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/pki"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// keeper is a KMS with a keyring of CRKs, that can be killed and started again
// on its store.
type keeper struct {
	*KMS
	t     testing.TB
	dir   string
	store *store.Store
	ring  *rootkey.Keyring
	clock *clock
}

func keep(t testing.TB, dir string) *keeper {
	t.Helper()
	k := &keeper{t: t, dir: dir, clock: &clock{at: time.Now().Truncate(time.Second)}}
	k.openStore()
	k.start(nil)
	t.Cleanup(func() { k.stop(); k.store.Close() })
	return k
}

func (k *keeper) openStore() {
	k.t.Helper()
	s, err := store.Open(context.Background(), store.Config{Dir: filepath.Join(k.dir, "state"), Name: "kms"})
	if err != nil {
		k.t.Fatal(err)
	}
	k.store = s
}

// openRing opens the keyring in dir as a start of the program does.
func openRing(t testing.TB, dir string) *rootkey.Keyring {
	t.Helper()
	ring, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

// start opens the KMS; at is called at its steps.
func (k *keeper) start(at func(string) error) {
	k.t.Helper()
	k.ring = openRing(k.t, k.dir)
	var err error
	log := slog.New(slog.NewTextHandler(k.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	if k.KMS, err = Open(context.Background(), k.store, Options{Logger: log, Now: k.clock.now, step: at}); err != nil {
		k.t.Fatal(err)
	}
	if err := k.Unlock(context.Background(), k.ring); err != nil {
		k.t.Fatal(err)
	}
}

func (k *keeper) stop() {
	k.KMS.Close()
	k.ring.Close()
}

func (k *keeper) session() *Session {
	k.t.Helper()
	i, err := k.instance(k.t.Context(), DefaultInstance)
	if err != nil {
		k.t.Fatal(err)
	}
	return &Session{k: k.KMS, inst: i, Actor: Actor{Kind: "certificate", Name: "test", Instance: DefaultInstance, Role: RoleAdministrator}}
}

// finished is closed when the instance's change of keys is done, or after 30
// seconds.
func (k *keeper) finished() <-chan struct{} {
	done, kms := make(chan struct{}), k.KMS
	go func() {
		defer close(done)
		for begin := time.Now(); time.Since(begin) < 30*time.Second; time.Sleep(5 * time.Millisecond) {
			if e, err := kms.jobs.Get(context.Background(), DefaultInstance); err == nil && e.Value.finished() {
				return
			}
		}
	}()
	return done
}

// finish waits until the instance's change of keys is done.
func (k *keeper) finish() keyJob {
	k.t.Helper()
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		e, err := k.jobs.Get(context.Background(), DefaultInstance)
		if err != nil {
			k.t.Fatal(err)
		}
		if e.Value.finished() {
			return e.Value
		}
		if time.Since(begin) > 30*time.Second {
			k.t.Fatalf("it does not end: %+v", e.Value)
		}
	}
}

// confirmed calls act, with the hash of what it says is lost if it asks for one.
func confirmed(t testing.TB, act func(hash string) error) *Confirmation {
	t.Helper()
	var c *Confirmation
	err := act("")
	if !errors.As(err, &c) {
		t.Fatalf("without a hash: %v", err)
	}
	if err := act(strings.Repeat("0", 64)); !errors.As(err, &c) {
		t.Fatalf("with a wrong hash: %v", err)
	}
	if err := act(c.Hash); err != nil {
		t.Fatalf("with the hash: %v", err)
	}
	return c
}

// objects are keys that must stay as they are.
type objects map[string][]byte

func (o objects) add(t testing.TB, s *Session, n int) {
	t.Helper()
	for range n {
		id := create(t, s)
		o[id] = bytesOf(t, s, id)
	}
}

func bytesOf(t testing.TB, s *Session, id string) (b []byte) {
	t.Helper()
	m, err := s.Get(t.Context(), id)
	if err != nil {
		t.Fatalf("Get of %s: %v", id, err)
	}
	defer m.Bytes.Wipe()
	m.Bytes.Use(func(k []byte) { b = bytes.Clone(k) })
	return b
}

func (o objects) check(t testing.TB, s *Session) {
	t.Helper()
	for id, want := range o {
		if got := bytesOf(t, s, id); !bytes.Equal(got, want) {
			t.Errorf("key %s has changed", id)
		}
	}
}

// stale counts records of the instance that another generation has sealed.
func (k *keeper) stale(generation uint32) (n int) {
	k.t.Helper()
	r := &resealing{k: k.KMS, i: k.session().inst, job: &keyJob{To: generation}}
	if err := r.stale(context.Background(), func(store.Record) error { n++; return nil }); err != nil {
		k.t.Fatal(err)
	}
	return n
}

var tester = Actor{Kind: "socket", Name: "root", Role: RoleAdministrator}

// TestRotateKey rotates the instance key while clients create, read, change and
// destroy (S5).
func TestRotateKey(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	own, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(own, pki.Grant{Life: time.Hour}, "client", k.clock.now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.AddClient(ctx, tester, DefaultInstance, NewClient{Certificate: cert}); err != nil {
		t.Fatal(err)
	}
	keys := objects{}
	keys.add(t, k.session(), 200)
	var (
		end  atomic.Bool
		all  sync.WaitGroup
		made [3]objects
	)
	for n := range made {
		made[n] = objects{}
		all.Go(func() {
			for !end.Load() {
				s := k.session()
				id := create(t, s, custom("x-n", "1"))
				made[n][id] = bytesOf(t, s, id)
				if _, err := s.ModifyAttribute(ctx, id, custom("x-n", "2")); err != nil {
					t.Error(err)
				}
				gone := create(t, s)
				if err := s.Destroy(ctx, gone); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for generation := uint32(2); generation <= 4; generation++ {
		if err := k.RotateKey(ctx, tester, DefaultInstance); err != nil {
			t.Fatal(err)
		}
		if err := k.RotateKey(ctx, tester, DefaultInstance); !errors.Is(err, ErrJobRunning) {
			t.Errorf("a second one at once: %v", err)
		}
		job := k.finish()
		if job.To != generation || job.Done < 200 || job.Done != job.Total {
			t.Errorf("%+v", job)
		}
		if n := k.stale(generation); n != 0 {
			t.Errorf("%d records are not sealed by generation %d", n, generation)
		}
	}
	end.Store(true)
	all.Wait()
	if n := k.stale(4); n != 0 {
		t.Errorf("%d records are not sealed by the last generation", n)
	}
	st, err := k.KeyStatus(ctx, DefaultInstance)
	if err != nil || st.Generation != 4 || !slices.Equal(st.Generations, []uint32{4}) || st.Change.Kind != jobRotateKey || st.Change.Ended.IsZero() {
		t.Errorf("%+v, %v", st, err)
	}
	check := func() {
		t.Helper()
		for _, o := range append(made[:], keys) {
			o.check(t, k.session())
		}
		if _, err := k.Session(ctx, DefaultInstance, cert, "here"); err != nil {
			t.Errorf("the client certificate: %v", err)
		}
	}
	check()
	k.stop()
	k.start(nil)
	check()
}

// TestOldSealIsRefused: a record that was sealed before the key changed is not
// committed after it, for re-sealing would miss it.
func TestOldSealIsRefused(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	s := k.session()
	id := create(t, s)
	e, err := s.inst.objects.Get(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	before := s.inst.keys.Load()
	op := s.inst.objects.Put(id+"-late", e.Value)
	if err := k.RotateKey(ctx, tester, DefaultInstance); err != nil {
		t.Fatal(err)
	}
	k.finish()
	if _, err := k.commitSealed(ctx, s.inst, op); !errors.Is(err, store.ErrConflict) {
		t.Errorf("sealed by the old generation: %v", err)
	}
	// A member that has not heard of the new generation.
	s.inst.keys.Store(before)
	if _, err := k.commitSealed(ctx, s.inst, s.inst.objects.Put(id+"-late", e.Value)); !errors.Is(err, store.ErrConflict) {
		t.Errorf("from a member that is behind: %v", err)
	}
	if s.inst.keys.Load().newest.generation != 2 {
		t.Error("the member is still behind")
	}
	if _, err := k.commitSealed(ctx, s.inst, s.inst.objects.Put(id+"-late", e.Value)); err != nil {
		t.Errorf("sealed again: %v", err)
	}
}

// TestRecordsBeforeTheirKey: a member that sees records before it can open them
// reads them again when it can.
func TestRecordsBeforeTheirKey(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	keys := objects{}
	keys.add(t, k.session(), 3)
	i := k.session().inst
	before := i.keys.Load()
	if err := k.RotateKey(ctx, tester, DefaultInstance); err != nil {
		t.Fatal(err)
	}
	k.finish()
	// The member looks for keys of its own accord, too: it may be faster.
	eventually(t, "without the key", func() error {
		i.keys.Store(before)
		if err := i.reload(ctx); err != nil {
			return err
		}
		for id := range keys {
			if _, err := i.objects.Get(ctx, id); !errors.Is(err, store.ErrDamaged) {
				return fmt.Errorf("record %s: %v", id, err)
			}
		}
		return nil
	})
	if err := k.keepUp(ctx); err != nil {
		t.Fatal(err)
	}
	keys.check(t, k.session())
}

// TestRotateCRK moves an instance under a new CRK and under one that is brought
// (S4, S5), and then destroys what it left.
func TestRotateCRK(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	keys := objects{}
	keys.add(t, k.session(), 3)
	crks := func() map[string]CRK {
		t.Helper()
		list, err := k.CRKs(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]CRK{}
		for _, c := range list {
			m[c.ID] = c
		}
		return m
	}
	status := func() KeyStatus {
		t.Helper()
		s, err := k.KeyStatus(ctx, DefaultInstance)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if err := k.keepUp(ctx); err != nil {
		t.Fatal(err)
	}
	first := status().CRK
	if c := crks()[first]; c.State != CRKActive || c.Instance != DefaultInstance || !c.Here || c.Provider != "file" {
		t.Errorf("the first CRK: %+v", c)
	}
	if err := k.RotateCRK(ctx, tester, DefaultInstance, "", ""); err != nil {
		t.Fatal(err)
	}
	k.finish()
	second := status().CRK
	if all := crks(); second == first || all[first].State != CRKRetired || all[second].State != CRKActive {
		t.Errorf("after a rotation: %+v", all)
	}

	mine, err := secret.Random(nil, 32)
	if err != nil {
		t.Fatal(err)
	}
	check, _ := rootkey.CheckValue(mine)
	brought, err := k.ImportCRK(ctx, tester, "", mine, check)
	if err != nil || brought.State != CRKUnused || brought.CheckValue != check {
		t.Fatalf("import: %+v, %v", brought, err)
	}
	short, _ := secret.Copy([]byte("short"))
	if _, err := k.ImportCRK(ctx, tester, "", short, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("importing 5 bytes: %v", err)
	}
	for id, want := range map[string]error{"none": ErrUnknownCRK, first: ErrCRKInUse, second: ErrCRKInUse} {
		if err := k.RotateCRK(ctx, tester, DefaultInstance, id, ""); !errors.Is(err, want) {
			t.Errorf("rotating to %s: %v, want %v", id, err, want)
		}
	}
	if err := k.RotateCRK(ctx, tester, DefaultInstance, brought.ID, ""); err != nil {
		t.Fatal(err)
	}
	k.finish()
	if s := status(); s.CRK != brought.ID {
		t.Errorf("under CRK %s, not the one that was brought", s.CRK)
	}
	keys.check(t, k.session())

	lost := confirmed(t, func(hash string) error { return k.DeleteCRK(ctx, tester, first, hash) })
	if lost.Count != 1 || !strings.Contains(lost.Lost[0], "backups") {
		t.Errorf("lost with a retired CRK: %q", lost.Lost)
	}
	if err := k.DeleteCRK(ctx, tester, first, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("deleting it twice: %v", err)
	}
	if c := crks()[first]; c.State != CRKDestroyed || c.Here {
		t.Errorf("the deleted CRK: %+v", c)
	}
	k.stop()
	k.start(nil)
	keys.check(t, k.session())
	if slices.Contains(k.ring.InFile(), first) || !slices.Contains(k.ring.InFile(), second) {
		t.Errorf("in the file: %v", k.ring.InFile())
	}
}

// TestDeleteCRK: an instance whose CRK is deleted ends at once; others go on
// (S6).
func TestDeleteCRK(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	if _, err := k.CreateInstance(ctx, tester, "other", "", Settings{}); err != nil {
		t.Fatal(err)
	}
	made, err := k.records.Get(ctx, "other")
	if err != nil {
		t.Fatal(err)
	}
	rec := made.Value
	keys := objects{}
	keys.add(t, k.session(), 3)
	if err := k.keepUp(ctx); err != nil {
		t.Fatal(err)
	}
	if err := k.RotateCRK(ctx, tester, "other", "", ""); err != nil {
		t.Fatal(err)
	}
	for { // with a retired CRK too
		if e, err := k.jobs.Get(ctx, "other"); err == nil && e.Value.finished() {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	e, _ := k.records.Get(ctx, "other")
	i, err := k.instance(ctx, "other")
	if err != nil {
		t.Fatal(err)
	}
	s := &Session{k: k.KMS, inst: i, Actor: Actor{Name: "test", Instance: "other", Role: RoleAdministrator}}
	id := create(t, s)
	c := confirmed(t, func(hash string) error { return k.DeleteCRK(ctx, tester, e.Value.CRK, hash) })
	if !slices.ContainsFunc(c.Lost, func(l string) bool { return strings.Contains(l, id) }) {
		t.Errorf("the list does not name what is lost: %q", c.Lost)
	}
	ended := func() {
		t.Helper()
		if _, err := k.instance(ctx, "other"); !errors.Is(err, ErrCRKDeleted) {
			t.Errorf("the instance: %v", err)
		}
		keys.check(t, k.session())
		if file := k.ring.InFile(); slices.Contains(file, e.Value.CRK) || slices.Contains(file, rec.CRK) || len(file) != 1 {
			t.Errorf("in the keyring: %v", file)
		}
	}
	ended()
	if _, err := s.Get(ctx, id); err == nil {
		t.Error("a session that had begun still gets the key")
	}
	k.stop()
	k.start(nil)
	ended()
}

var errKilled = errors.New("killed here")

// TestKilled kills the KMS at every step of every change of keys. Started again
// it finishes the change by itself; nothing is lost (S5).
func TestKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	for kind, begin := range map[string]func(*keeper) error{
		jobRotateKey: func(k *keeper) error { return k.RotateKey(t.Context(), tester, DefaultInstance) },
		jobRotateCRK: func(k *keeper) error { return k.RotateCRK(t.Context(), tester, DefaultInstance, "", "") },
		jobShred: func(k *keeper) error {
			var c *Confirmation
			err := k.Shred(t.Context(), tester, DefaultInstance, true, "")
			if errors.As(err, &c) {
				err = k.Shred(t.Context(), tester, DefaultInstance, true, c.Hash)
			}
			return err
		},
	} {
		t.Run(kind, func(t *testing.T) {
			k := keep(t, t.TempDir())
			keys := objects{}
			keys.add(t, k.session(), resealBatch+10)
			steps, reached := []string{}, map[string]bool{}
			for kill := 0; kill <= len(steps); kill++ {
				for range 2 {
					if err := k.session().Destroy(t.Context(), create(t, k.session())); err != nil {
						t.Fatal(err)
					}
				}
				k.stop()
				dead := make(chan struct{})
				var mu sync.Mutex
				var names []string
				var at string // it dies at that step, when it comes so often
				var times int
				if kill > 0 {
					at = steps[kill-1]
					for _, name := range steps[:kill] {
						if name == at {
							times++
						}
					}
				}
				k.start(func(name string) error {
					mu.Lock()
					defer mu.Unlock()
					names = append(names, name)
					if name == at {
						if times--; times == 0 {
							reached[name] = true
							close(dead)
						}
					}
					if at != "" && times <= 0 {
						return fmt.Errorf("%w: %s", errKilled, name)
					}
					return nil
				})
				if err := begin(k); err != nil {
					t.Fatal(err)
				}
				if kill == 0 { // to count the steps
					k.finish()
					mu.Lock()
					steps = slices.Clone(names)
					mu.Unlock()
					t.Logf("steps: %v", steps)
				} else {
					select {
					case <-dead:
					case <-k.finished(): // in fewer steps this time, or at the last one
						select {
						case <-dead:
						case <-time.After(time.Second):
						}
					}
				}
				k.stop()
				k.start(nil)
				keys.check(t, k.session()) // while it goes on
				job := k.finish()
				keys.check(t, k.session())
				keys.add(t, k.session(), 1)
				eventually(t, "after a kill", k.settled)
				if kind != jobRotateCRK {
					if n := k.stale(job.To); n != 0 {
						t.Errorf("kill at %q: %d records are not sealed by generation %d", steps[max(kill-1, 0)], n, job.To)
					}
				}
				st, err := k.KeyStatus(t.Context(), DefaultInstance)
				if err != nil {
					t.Fatal(err)
				}
				if kind != jobRotateCRK && len(st.Generations) != 1 {
					t.Errorf("kill at %q: generations %v", steps[max(kill-1, 0)], st.Generations)
				}
				if kind == jobShred {
					for _, d := range st.Destroyed {
						if d.Bytes != BytesShredded {
							t.Errorf("kill at %q: %+v", steps[max(kill-1, 0)], d)
						}
					}
				}
				k.clock.pass(2 * time.Second)
			}
			for _, name := range steps {
				if !reached[name] {
					t.Errorf("never killed at %q", name)
				}
			}
			if len(reached) < 3 {
				t.Errorf("steps %v", steps)
			}
		})
	}
}

// TestShred follows a key's bytes: after it is destroyed, and purged, a copy of
// the data folder still gives them to who has the CRK; after the shred nothing in
// the data folder, its logs or the copy does.
func TestShred(t *testing.T) {
	dir := t.TempDir()
	k := keep(t, dir)
	ctx := t.Context()
	keys := objects{}
	keys.add(t, k.session(), 5)
	if err := k.keepUp(ctx); err != nil {
		t.Fatal(err)
	}
	victim := create(t, k.session())
	material := bytesOf(t, k.session(), victim)
	var old struct {
		object store.Record
		record instanceRecord
	}
	if err := k.store.Scan(ctx, "object-default", func(r store.Record) error {
		if r.Key == victim {
			r.Stored = bytes.Clone(r.Stored)
			old.object = r
		}
		return nil
	}); err != nil || old.object.Key == "" {
		t.Fatal(err)
	}
	e, err := k.records.Get(ctx, DefaultInstance)
	if err != nil {
		t.Fatal(err)
	}
	old.record = e.Value
	var crk []byte
	if share, err := k.ring.Share(ctx, []string{old.record.CRK}); err == nil {
		share.Use(func(b []byte) { crk = bytes.Clone(b[17:]) })
	}
	// opensWith tries the old bytes, of any copy, with the CRKs of a keyring.
	opensWith := func(ring *rootkey.Keyring) bool {
		key, err := ring.Open(ctx, old.record.CRK, old.record.Keys[0].Wrapped, keyBinding(DefaultInstance, 1))
		if err != nil {
			return false
		}
		defer key.Wipe()
		s, err := newSeal(1, key)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := s.Open(old.object.Stored, []byte("/object-default/"+victim))
		return err == nil && bytes.Contains(plain, material)
	}

	if err := k.session().Destroy(ctx, victim); err != nil {
		t.Fatal(err)
	}
	bytesNow := func() string {
		t.Helper()
		s, err := k.KeyStatus(ctx, DefaultInstance)
		if err != nil || len(s.Destroyed) != 1 || len(s.StillOpens) == 0 {
			t.Fatalf("%+v, %v", s, err)
		}
		return s.Destroyed[0].Bytes
	}
	if b := bytesNow(); b != BytesKept {
		t.Errorf("after Destroy: %s", b)
	}
	k.stop()
	if err := k.store.Close(); err != nil {
		t.Fatal(err)
	}
	copied := t.TempDir()
	if err := os.CopyFS(filepath.Join(copied, "state"), os.DirFS(filepath.Join(dir, "state"))); err != nil {
		t.Fatal(err)
	}
	k.openStore()
	k.start(nil)

	if c := confirmed(t, func(hash string) error {
		_, err := k.Purge(ctx, tester, DefaultInstance, []string{victim}, hash)
		return err
	}); c.Count != 1 || !strings.Contains(c.Lost[0], victim) {
		t.Errorf("lost by a purge: %q", c.Lost)
	}
	if b := bytesNow(); b != BytesPurged {
		t.Errorf("after the purge: %s", b)
	}
	if !opensWith(k.ring) {
		t.Error("after the purge the old bytes do not open any more; then the rest of this test proves nothing")
	}
	if !inFolder(t, dir, old.object.Stored) {
		t.Error("the data folder has not kept the old bytes; then the rest of this test proves less")
	}
	// The copy is a whole KMS: with the CRKs of the system it serves as before.
	serves := func(ring *rootkey.Keyring) error {
		t.Helper()
		s, err := store.Open(ctx, store.Config{Dir: filepath.Join(copied, "state"), Name: "kms"})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		other, err := Open(ctx, s, Options{Logger: slog.New(slog.DiscardHandler), Now: k.clock.now})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := other.Unlock(ctx, unchanging{ring}); err != nil {
			return err
		}
		i, err := other.instance(t.Context(), DefaultInstance)
		if err != nil {
			return err
		}
		o, err := i.objects.Get(ctx, victim)
		if err != nil {
			return err
		}
		key, err := o.Value.open()
		if err != nil {
			return err
		}
		defer key.Wipe()
		key.Use(func(b []byte) {
			if !bytes.Equal(b, material) {
				err = errors.New("other bytes")
			}
		})
		return err
	}
	if err := serves(k.ring); err != nil {
		t.Errorf("before the shred the copy does not serve: %v", err)
	}

	k.clock.pass(5 * time.Second)
	c := confirmed(t, func(hash string) error { return k.Shred(ctx, tester, DefaultInstance, false, hash) })
	if !slices.ContainsFunc(c.Lost, func(l string) bool { return strings.Contains(l, victim) }) {
		t.Errorf("lost by a shred: %q", c.Lost)
	}
	k.finish()
	if b := bytesNow(); b != BytesShredded {
		t.Errorf("after the shred: %s", b)
	}
	keys.check(t, k.session())
	for what, ring := range map[string]*rootkey.Keyring{"in memory": k.ring, "from its file": openRing(t, dir)} {
		if opensWith(ring) {
			t.Errorf("after the shred the keyring %s opens the old bytes", what)
		}
		if err := serves(ring); err == nil || !errors.Is(err, rootkey.ErrUnknownKey) {
			t.Errorf("after the shred the keyring %s opens the copy: %v", what, err)
		}
	}
	for g, s := range k.session().inst.keys.Load().seals {
		if _, err := s.Open(old.object.Stored, []byte("/object-default/"+victim)); err == nil || g == 1 {
			t.Errorf("generation %d of the instance key is still in memory", g)
		}
	}
	for what, b := range map[string][]byte{"the key": material, "the old CRK": crk} {
		for how, form := range map[string][]byte{"raw": b, "hex": []byte(hex.EncodeToString(b)), "base64": []byte(base64.StdEncoding.EncodeToString(b))} {
			if inFolder(t, dir, form) || inFolder(t, copied, form) {
				t.Errorf("%s is in a data folder, %s", what, how)
			}
		}
	}
	// Keys that are purged after a shred are not shredded by it.
	late := create(t, k.session())
	if err := k.session().Destroy(ctx, late); err != nil {
		t.Fatal(err)
	}
	k.clock.pass(GraceTime + time.Hour)
	confirmed(t, func(hash string) error { _, err := k.Purge(ctx, tester, DefaultInstance, nil, hash); return err })
	s, err := k.KeyStatus(ctx, DefaultInstance)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range s.Destroyed {
		if (d.ID == late) != (d.Bytes == BytesPurged) || (d.ID == victim) != (d.Bytes == BytesShredded) {
			t.Errorf("%+v", d)
		}
	}
	if _, err := k.Purge(ctx, tester, DefaultInstance, []string{create(t, k.session())}, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("purging a key that is not destroyed: %v", err)
	}
}

// unchanging is a provider for a copy of a store, that must not touch the CRKs.
type unchanging struct{ RootKeys }

func (unchanging) Destroy(context.Context, string) error { return errors.New("not here") }

// inFolder looks for bytes in every file under dir.
func inFolder(t testing.TB, dir string, what []byte) (found bool) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		found = found || bytes.Contains(text, what)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestFetchCRKs: a member gets the CRKs that it lacks from another.
func TestFetchCRKs(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	if err := k.keepUp(ctx); err != nil {
		t.Fatal(err)
	}
	id := k.session().inst.keys.Load().crk
	peer := openRing(t, t.TempDir())
	defer peer.Close()
	share, err := k.ring.Share(ctx, []string{id})
	if err != nil {
		t.Fatal(err)
	}
	defer share.Wipe()
	if err := peer.Adopt(ctx, share); err != nil {
		t.Fatal(err)
	}
	k.stop()
	// A member whose file has been lost, and which is started without a passphrase.
	if err := os.Remove(filepath.Join(k.dir, "crk.sealed")); err != nil {
		t.Fatal(err)
	}
	ring := openRing(t, k.dir)
	k.ring = ring
	var asked []string
	fetch := func(ctx context.Context, to Sharer, ids ...string) error {
		asked = append(asked, ids...)
		share, err := peer.Share(ctx, ids)
		if err != nil {
			return err
		}
		defer share.Wipe()
		return to.Adopt(ctx, share)
	}
	if k.KMS, err = Open(ctx, k.store, Options{Now: k.clock.now, FetchKeys: fetch}); err != nil {
		t.Fatal(err)
	}
	need, err := k.NeededCRKs(ctx, "file")
	if err != nil || !slices.Equal(need, []string{id}) {
		t.Fatalf("needed: %v, %v", need, err)
	}
	if err := fetch(ctx, ring, need...); err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(ctx, ring); err != nil {
		t.Fatal(err)
	}
	create(t, k.session())
	// A CRK that another member makes comes by itself.
	fresh, err := rootkeytest.NewCRK(ctx, peer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.store.Commit(ctx, k.crks.Create(fresh, crkRecord{Provider: "file", State: CRKUnused})); err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if list, _ := ring.List(ctx); slices.Contains(list, fresh) {
			break
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatal("a CRK that another member has does not come")
		}
	}
	if !slices.Contains(asked, fresh) {
		t.Errorf("asked for %v", asked)
	}
	if state(t, k.session(), create(t, k.session())) != kmip.StatePreActive {
		t.Error("it does not serve")
	}
}
