package kms

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"golang.org/x/sys/unix"

	"mortise/internal/kms/audit"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// startAudited is start with options for the audit log. stop ends it as a test's
// end would.
func startAudited(t testing.TB, dir string, o AuditOptions) (f *fixture, stop func()) {
	t.Helper()
	return startAuditedAs(t, dir, "kms", o)
}

func startAuditedAs(t testing.TB, dir, member string, o AuditOptions) (f *fixture, stop func()) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: member})
	if err != nil {
		t.Fatal(err)
	}
	r, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	k, err := Open(t.Context(), s, Options{Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Audit: o})
	if err != nil {
		s.Close()
		t.Fatal(err)
	}
	if err := k.Unlock(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			k.Close()
			s.Close()
			r.Close()
		}
	}
	t.Cleanup(stop)
	return &fixture{KMS: k, s: s}, stop
}

// do is an operation as the KMIP front makes it.
func do(t testing.TB, s *Session, op kmip.Operation, id string, run func() (string, error)) error {
	t.Helper()
	err := s.Begin(op)
	if err == nil && run != nil {
		var made string
		if made, err = run(); made != "" {
			id = made
		}
	}
	err = s.End(op, id, err)
	if lost := s.Settle(t.Context()); lost != nil {
		return lost
	}
	return err
}

func exported(t testing.TB, k *KMS, f AuditFilter) (all []audit.Record) {
	t.Helper()
	err := k.AuditExport(t.Context(), f, func(r *audit.Record) error { all = append(all, *r); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestEveryOperationIsAudited(t *testing.T) {
	f, _ := startAudited(t, t.TempDir(), AuditOptions{})
	ctx := t.Context()
	s := f.session()
	s.Name, s.Fingerprint, s.From = "center", "abcd", "192.0.2.1:5"
	var id string
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(do(t, s, kmip.OperationCreate, "", func() (_ string, err error) {
		id, err = s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("the secret name of a thing"), custom("x-note", "an attribute's value")))
		return id, err
	}))
	var key []byte
	must(do(t, s, kmip.OperationGet, id, func() (string, error) {
		m, err := s.Get(ctx, id)
		if err == nil {
			m.Bytes.Use(func(b []byte) { key = bytes.Clone(b) })
			m.Bytes.Wipe()
		}
		return "", err
	}))
	if err := do(t, s, kmip.OperationGet, "no-such-object", func() (string, error) { _, err := s.Get(ctx, "no-such-object"); return "", err }); err == nil {
		t.Fatal("an object that is not there was found")
	}
	must(do(t, s, kmip.OperationActivate, id, func() (string, error) { return "", s.Activate(ctx, id) }))
	must(do(t, s, kmip.OperationRevoke, id, func() (string, error) {
		return "", s.Revoke(ctx, id, kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}, time.Time{})
	}))
	s.Role = RoleKeyManager
	if err := do(t, s, kmip.OperationDestroy, id, func() (string, error) { return "", s.Destroy(ctx, id) }); err == nil {
		t.Fatal("a key manager destroyed")
	}

	var got []string
	for _, r := range exported(t, f.KMS, AuditFilter{Client: "center"}) {
		object := strings.Replace(r.Object, id, "ID", 1)
		got = append(got, fmt.Sprintf("%s %s %s %s", r.Operation, object, r.Result, r.Detail))
		if r.Instance != DefaultInstance || r.Member != "kms" || r.Actor != "certificate" || r.Fingerprint != "abcd" || r.From != "192.0.2.1:5" || r.Time.IsZero() {
			t.Errorf("entry %+v", r.Entry)
		}
		// The first Get of an object changes it too: it is not fresh any more.
		if change := r.Operation == "Create" || r.Operation == "Activate" || r.Operation == "Revoke"; change && r.Revision == 0 || (r.Revision > 0) != (r.Act != "") {
			t.Errorf("entry %+v", r.Entry)
		}
	}
	want := []string{"Create ID Success ", "Get ID Success ", "Get no-such-object ItemNotFound ", "Activate ID Success ", "Revoke ID Success compromise", "Destroy ID PermissionDenied "}
	// Changes are drained in their own order, among the others somewhere.
	if len(got) != len(want) {
		t.Errorf("the log has %q", got)
	}
	at := -1
	for _, w := range want {
		found := -1
		for i, g := range got {
			if g == w {
				found = i
			}
		}
		if found < 0 {
			t.Errorf("the log has no %q: %q", w, got)
		}
		if strings.HasPrefix(w, "Create") || strings.HasPrefix(w, "Activate") || strings.HasPrefix(w, "Revoke") {
			if found < at {
				t.Errorf("changes are not in their order: %q", got)
			}
			at = found
		}
	}
	for _, secret := range [][]byte{key, []byte("the secret name"), []byte("attribute's value")} {
		if in := filesWith(t, filepath.Join(f.s.Dir(), "audit"), secret); len(in) > 0 {
			t.Errorf("%q is in %v", secret, in)
		}
	}
	if n := len(exported(t, f.KMS, AuditFilter{Object: id})); n != 5 {
		t.Errorf("%d entries on the object", n)
	}
	if n := len(exported(t, f.KMS, AuditFilter{Instance: "other"})); n != 0 {
		t.Errorf("%d entries of an instance that is not there", n)
	}
	r, err := f.AuditVerify(ctx)
	if err != nil || !r.OK() || !r.Trusted || r.Last < 6 {
		t.Errorf("verify: %+v, %v", r, err)
	}
}

func filesWith(t testing.TB, dir string, text []byte) (in []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, text) {
			in = append(in, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// TestDrainIsKilledAtEveryStep ends the draining for good at each step in turn,
// as when the member dies there, and starts the member again.
func TestDrainIsKilledAtEveryStep(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	for _, step := range []string{"drain append", "write", "sync", "drain logged", "drain removed"} {
		for nth := range 2 {
			t.Run(fmt.Sprintf("%s/%d", step, nth), func(t *testing.T) {
				dir := t.TempDir()
				var count, dead atomic.Int64
				f, stop := startAudited(t, dir, AuditOptions{SegmentSize: 64 << 10, Step: func(name string) error {
					if name == step {
						count.Add(1)
					}
					if dead.Load() == 1 || name == step && count.Load() > int64(nth) {
						dead.Store(1) // and so is every other step
						return errors.New("the member is dead")
					}
					return nil
				}})
				s := f.session()
				acknowledged := map[string]bool{}
				for range 10 {
					id, err := s.Create(t.Context(), kmip.ObjectTypeSymmetricKey, aes256())
					if err != nil {
						break
					}
					acknowledged[id] = true
					time.Sleep(3 * time.Millisecond)
				}
				time.Sleep(30 * time.Millisecond)
				stop()
				f, _ = startAudited(t, dir, AuditOptions{SegmentSize: 64 << 10})
				got, acts := map[string]int{}, map[string]int{}
				last := int64(0)
				for _, r := range exported(t, f.KMS, AuditFilter{}) {
					got[r.Object]++
					if r.Act == "" {
						continue
					}
					if acts[r.Act]++; acts[r.Act] > 1 {
						t.Errorf("act %s is in the log %d times", r.Act, acts[r.Act])
					}
					if r.Revision <= last {
						t.Errorf("revision %d came after %d", r.Revision, last)
					}
					last = r.Revision
				}
				for id := range acknowledged {
					if got[id] != 1 {
						t.Errorf("%s is in the log %d times", id, got[id])
					}
				}
				if r, err := f.AuditVerify(t.Context()); err != nil || !r.OK() {
					t.Errorf("verify: %+v, %v", r.Problems, err)
				}
			})
		}
	}
}

// TestKilledServerHasItsEntries kills a server that creates keys, kill -9, and
// looks for the entry of every key that it had acknowledged.
func TestKilledServerHasItsEntries(t *testing.T) {
	dir := t.TempDir()
	for round := range 2 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "KMS_TEST_CHILD="+dir)
		cmd.Stderr = t.Output()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var ids []string
		for len(ids) < 150 && lines.Scan() {
			ids = append(ids, strings.Fields(lines.Text())[0])
		}
		cmd.Process.Kill()
		for lines.Scan() { // what it still said
			ids = append(ids, strings.Fields(lines.Text())[0])
		}
		cmd.Wait()
		if len(ids) < 150 {
			t.Fatalf("round %d: the child made %d keys", round, len(ids))
		}
		f, stop := startAudited(t, dir, AuditOptions{})
		got, acts := map[string]int{}, map[string]int{}
		for _, r := range exported(t, f.KMS, AuditFilter{}) {
			got[r.Object]++
			if acts[r.Act]++; r.Act != "" && acts[r.Act] > 1 {
				t.Errorf("round %d: act %s is in the log twice", round, r.Act)
			}
		}
		for _, id := range ids[:len(ids)-1] { // the last line may be torn
			if got[id] == 0 {
				t.Errorf("round %d: %s is not in the log", round, id)
			}
		}
		if r, err := f.AuditVerify(t.Context()); err != nil || !r.OK() {
			t.Errorf("verify: %+v, %v", r.Problems, err)
		}
		stop()
	}
}

func TestNothingIsDoneWithoutAuditSpace(t *testing.T) {
	var full atomic.Bool
	f, _ := startAudited(t, t.TempDir(), AuditOptions{SegmentSize: 64 << 10, Step: func(name string) error {
		if full.Load() && (name == "write" || name == "spare" || name == "repair") {
			return unix.ENOSPC
		}
		return nil
	}})
	s, ctx := f.session(), t.Context()
	var id string
	make1 := func() error {
		return do(t, s, kmip.OperationCreate, "", func() (_ string, err error) {
			id, err = s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256())
			return id, err
		})
	}
	get := func() error {
		return do(t, s, kmip.OperationGet, id, func() (string, error) {
			m, err := s.Get(ctx, id)
			m.Bytes.Wipe()
			return "", err
		})
	}
	if err := errors.Join(make1(), get(), f.AuditReady()); err != nil {
		t.Fatal(err)
	}
	exported(t, f.KMS, AuditFilter{}) // the drain has nothing to do
	full.Store(true)
	for what, err := range map[string]error{"get": get(), "create": make1(), "get again": get(), "ready": f.AuditReady()} {
		if !errors.Is(err, ErrAudit) || !strings.Contains(AsError(err).Message, "audit log") {
			t.Errorf("%s with a full disk: %v", what, err)
		}
	}
	full.Store(false)
	for deadline := time.Now().Add(10 * time.Second); f.AuditReady() != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("space is back: ", f.AuditReady())
		}
	}
	if err := errors.Join(make1(), get()); err != nil {
		t.Fatal(err)
	}
	if r, err := f.AuditVerify(ctx); err != nil || !r.OK() {
		t.Errorf("verify: %+v, %v", r.Problems, err)
	}
}

func TestRemovedMembersEntriesAreTakenOver(t *testing.T) {
	dir := t.TempDir()
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	lost, err := store.NewQueue(t.Context(), s, "audit", "lost")
	if err != nil {
		t.Fatal(err)
	}
	e := audit.Entry{Time: time.Now(), Member: "lost", Operation: "Create", Object: "made-by-the-lost", Result: audit.Success}
	rev, err := s.Commit(t.Context(), lost.Add("act-1", e.Append(nil)))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	f, _ := startAudited(t, dir, AuditOptions{})
	f.adopt(t.Context())
	f.adopt(t.Context())
	got := exported(t, f.KMS, AuditFilter{Object: "made-by-the-lost"})
	if len(got) != 1 || got[0].Member != "lost" || got[0].Act != "act-1" || got[0].Revision != rev {
		t.Errorf("the log has %+v", got)
	}
	if left, err := f.queue.Others(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("left: %+v, %v", left, err)
	}
}

// TestStoreKnowsTheHead: a log that is cut off or replaced behind the server's
// back is not gone on with.
func TestStoreKnowsTheHead(t *testing.T) {
	dir := t.TempDir()
	f, stop := startAudited(t, dir, AuditOptions{})
	create(t, f.session())
	stop()
	log := filepath.Join(dir, "state", "audit")
	segment := filepath.Join(log, fmt.Sprintf("%020d.audit", 1))
	b, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	cut := bytes.Index(b, []byte("MBLK"))
	cut += 4 + bytes.Index(b[cut+4:], []byte("MBLK")) // the second block
	clear(b[cut:])
	if err := os.WriteFile(segment, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	if k, err := Open(t.Context(), s, Options{}); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("Open with a log that was cut off: %v", err)
		if err == nil {
			k.Close()
		}
	}
	s.Close()
	// Moved away, a new log is begun, and says so.
	if err := os.Rename(log, log+".evidence"); err != nil {
		t.Fatal(err)
	}
	f, stop = startAudited(t, dir, AuditOptions{})
	all := exported(t, f.KMS, AuditFilter{})
	for begin := time.Now(); len(all) == 0 && time.Since(begin) < 30*time.Second; time.Sleep(10 * time.Millisecond) {
		all = exported(t, f.KMS, AuditFilter{}) // the first entry is on its way to the disk
	}
	if len(all) == 0 || all[0].Operation != "Begin Audit Log" || !strings.Contains(all[0].Detail, "is not here") {
		t.Errorf("the new log begins with %+v", all[0].Entry)
	}
	r, err := f.AuditVerify(t.Context())
	if err != nil || len(r.Problems) != 1 || r.Problems[0].Kind != audit.Replaced {
		t.Errorf("the new log: %+v, %v", r, err)
	}
	heads, err := f.auditAnchors(t.Context(), true)
	if err != nil || len(heads) < 1 {
		t.Fatal(heads, err)
	}
	if r, err := audit.Verify(log+".evidence", audit.VerifyOptions{Anchors: heads}); err != nil || r.OK() {
		t.Errorf("the evidence: %+v, %v", r, err)
	}
	if err := f.AuditForget(t.Context(), Actor{Kind: "socket", Name: "root"}, heads[len(heads)-1].Log.String(), "a test"); err != nil {
		t.Error(err)
	}
	if r, err := f.AuditVerify(t.Context()); err != nil || !r.OK() {
		t.Errorf("after it is forgotten: %+v, %v", r, err)
	}
	stop()
}

func TestAuditKeyStays(t *testing.T) {
	dir := t.TempDir()
	var keys [2][]audit.MemberKey
	for i := range keys {
		f, stop := startAudited(t, dir, AuditOptions{})
		for deadline := time.Now().Add(10 * time.Second); !f.journal.HasKey(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the log gets no key")
			}
		}
		var err error
		if keys[i], err = f.AuditKeys(t.Context()); err != nil || len(keys[i]) != 1 {
			t.Fatal(keys[i], err)
		}
		stop()
	}
	if keys[0][0].Key.String() != keys[1][0].Key.String() {
		t.Error("a restart changed the signing key")
	}
}

func BenchmarkAuditedGet(b *testing.B) {
	f, _ := startAudited(b, b.TempDir(), AuditOptions{})
	id := create(b, f.session())
	if m, err := f.session().Get(b.Context(), id); err != nil { // the first one changes it
		b.Fatal(err)
	} else {
		m.Bytes.Wipe()
	}
	b.ResetTimer()
	b.ReportAllocs()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s := f.session()
			err := s.Begin(kmip.OperationGet)
			if err == nil {
				var m Material
				m, err = s.Get(context.Background(), id)
				m.Bytes.Wipe()
			}
			if err = errors.Join(s.End(kmip.OperationGet, id, err), s.Settle(context.Background())); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
