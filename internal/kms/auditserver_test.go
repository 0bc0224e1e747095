package kms

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms/audit"
	"mortise/internal/store"
)

// TestServersOwnChangesAreAudited: what dates bring about has an entry of the
// server's with the revision of the change.
func TestServersOwnChangesAreAudited(t *testing.T) {
	f := start(t, t.TempDir())
	s := f.session()
	now := f.clock.now()
	dated := create(t, s, attr(kmip.AttributeNameActivationDate, now), attr(kmip.AttributeNameDeactivationDate, now.Add(time.Hour)))
	read := create(t, s, attr(kmip.AttributeNameActivationDate, now.Add(time.Hour)))
	gone := create(t, s)
	if err := s.Destroy(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	f.clock.pass(2 * time.Hour)
	if got := state(t, f.session(), read); got != kmip.StateActive { // a client's read finds that its date has come
		t.Fatalf("at its activation date: %v", got)
	}
	f.clock.pass(GraceTime)
	for range 2 { // the second sweep finds nothing
		if err := f.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []struct{ object, act, detail string }{
		{read, "state by date", "Active"},
		{dated, "state by date", "Deactivated"},
		{gone, "bytes dropped", "grace time over"},
	} {
		got := slices.DeleteFunc(exported(t, f.KMS, AuditFilter{Object: want.object, Operation: want.act}),
			func(r audit.Record) bool { return r.Detail != want.detail })
		e, err := s.inst.objects.Get(t.Context(), want.object)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0].Actor != "server" || got[0].Client != "kms" || got[0].Instance != DefaultInstance ||
			got[0].Result != audit.Success || got[0].Revision != e.Revision || got[0].Act == "" {
			t.Errorf("%s: %+v; the object is at revision %d", want.act, got, e.Revision)
		}
	}
}

func TestClockConfirmIsAudited(t *testing.T) {
	f := start(t, t.TempDir())
	if _, err := f.ConfirmClock(t.Context(), tester); err != nil {
		t.Fatal(err)
	}
	e, err := f.clocks.Get(t.Context(), clockKey)
	if err != nil {
		t.Fatal(err)
	}
	got := exported(t, f.KMS, AuditFilter{Operation: "clock confirm"})
	if len(got) != 1 || got[0].Client != tester.Name || got[0].Actor != tester.Kind || got[0].Revision > e.Revision || got[0].Revision == 0 {
		t.Errorf("%+v; the record is at revision %d", got, e.Revision)
	}
}

// TestCommitAct: the entry names the administrator whose call it is, and the call
// needs no other; without one it is the server.
func TestCommitAct(t *testing.T) {
	f := start(t, t.TempDir())
	c, err := store.NewCollection(t.Context(), f.KMS.store, "thing", store.JSON[string](1))
	if err != nil {
		t.Fatal(err)
	}
	ctx := WithActs(t.Context(), tester)
	if err := f.CommitAct(ctx, "thing make", "a", c.Create("a", "x")); err != nil {
		t.Fatal(err)
	}
	if err := f.EndCall(ctx, tester, "", "POST /v1/things", "/v1/things", audit.Success); err != nil {
		t.Fatal(err)
	}
	if err := f.CommitAct(t.Context(), "thing make", "b", c.Create("b", "x")); err != nil {
		t.Fatal(err)
	}
	if err := f.CommitAct(t.Context(), "thing make", "c", c.Create("b", "x")); !errors.Is(err, store.ErrExists) {
		t.Fatal(err)
	}
	var who []string
	for _, r := range exported(t, f.KMS, AuditFilter{}) {
		if strings.Contains(r.Operation, "thing") {
			who = append(who, r.Operation+" "+r.Object+" "+r.Actor+" "+r.Client)
		}
	}
	if want := []string{"thing make a socket root", "thing make b server kms"}; !slices.Equal(who, want) {
		t.Errorf("%q, want %q", who, want)
	}
}

// TestOneWaitForABatch: a batch of reads waits for the log's disk once, and not
// before the last of them.
func TestOneWaitForABatch(t *testing.T) {
	var syncs atomic.Int64
	var hold atomic.Bool
	gate := make(chan struct{})
	f, _ := startAudited(t, t.TempDir(), AuditOptions{Step: func(name string) error {
		if name == "sync" {
			syncs.Add(1)
			if hold.Load() {
				<-gate
			}
		}
		return nil
	}})
	s := f.session()
	id := create(t, s)
	f.flush(t.Context())
	hold.Store(true)
	before := syncs.Load()
	const batch = 50
	for i := range batch { // none of these waits: the disk is held
		err := s.Begin(kmip.OperationGetAttributes)
		if err == nil {
			_, err = s.Attributes(t.Context(), id)
		}
		if err := s.End(kmip.OperationGetAttributes, id, err); err != nil || s.Unsettled() != i+1 {
			t.Fatalf("%v, %d unsettled", err, s.Unsettled())
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	waits := *s
	waits.unsettled = slices.Clone(s.unsettled)
	if err := waits.Settle(short); err == nil {
		t.Error("settled before the disk has it")
	}
	hold.Store(false)
	close(gate)
	if err := s.Settle(t.Context()); err != nil || s.Unsettled() != 0 {
		t.Errorf("%v, %d unsettled", err, s.Unsettled())
	}
	if n := syncs.Load() - before; n > 6 { // one for the first, one for all others; and the anchor's, once a second
		t.Errorf("%d syncs for a batch of %d", n, batch)
	}
	if got := exported(t, f.KMS, AuditFilter{Operation: "GetAttributes"}); len(got) != batch {
		t.Errorf("the log has %d of %d", len(got), batch)
	}
}

// TestSettleTellsOfALostEntry: an entry that the disk refused is told, although a
// later one was taken.
func TestSettleTellsOfALostEntry(t *testing.T) {
	var fail atomic.Bool
	f, _ := startAudited(t, t.TempDir(), AuditOptions{Step: func(name string) error {
		if name == "write" && fail.Load() {
			return errors.New("no such disk")
		}
		return nil
	}})
	s := f.session()
	id := create(t, s)
	f.flush(t.Context())
	fail.Store(true)
	if err := s.Begin(kmip.OperationGet); err != nil {
		t.Fatal(err)
	}
	_ = s.End(kmip.OperationGet, id, nil)
	if err := s.Settle(t.Context()); err == nil {
		t.Error("settled without an entry")
	}
	if err := s.Begin(kmip.OperationGet); err == nil {
		t.Error("an operation was begun that cannot be audited")
	}
}

// TestAuditKeyOutlivesChangesOfKeys: after a rotation and a shred, a restart finds
// the key that the log was signed with before.
func TestAuditKeyOutlivesChangesOfKeys(t *testing.T) {
	k := keep(t, t.TempDir())
	ctx := t.Context()
	signed := func() string {
		t.Helper()
		for begin := time.Now(); !k.journal.HasKey(); time.Sleep(5 * time.Millisecond) {
			if time.Since(begin) > 30*time.Second {
				t.Fatal("the log gets no key")
			}
		}
		list, err := k.AuditKeys(ctx)
		list = slices.DeleteFunc(list, func(m audit.MemberKey) bool { return m.Member != "kms" })
		if err != nil || len(list) != 1 {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0].Key.String()
	}
	first := signed()
	// The key of a member that is down meanwhile.
	mine, err := k.auditKeys.Get(ctx, "kms")
	if err != nil {
		t.Fatal(err)
	}
	i, err := k.instance(ctx, DefaultInstance)
	if err != nil {
		t.Fatal(err)
	}
	seed := []byte(strings.Repeat("s", 32))
	away := mine.Value
	if away.Sealed, err = i.Seal(seed, auditKeyAt(DefaultInstance, "away")); err != nil {
		t.Fatal(err)
	}
	if _, err := k.store.Commit(ctx, k.auditKeys.Create("away", away), k.auditKeys.Put("damaged", auditKey{Instance: DefaultInstance, Sealed: []byte{sealVersion, 0, 0, 0, 1, 9, 9, 9}})); err != nil {
		t.Fatal(err)
	}
	changes := map[string]func(hash string) error{
		"rotate": func(string) error { return k.RotateKey(ctx, tester, DefaultInstance) },
		"shred":  func(hash string) error { return k.Shred(ctx, tester, DefaultInstance, true, hash) },
	}
	for n, what := range []string{"rotate", "shred", "shred"} {
		err := changes[what]("")
		var c *Confirmation
		if errors.As(err, &c) {
			err = changes[what](c.Hash)
		}
		if err != nil {
			t.Fatal(err)
		}
		if job := k.finish(); job.Failure != "" {
			t.Fatal(job.Failure)
		}
		for _, member := range []string{"kms", "away"} {
			e, err := k.auditKeys.Get(ctx, member)
			if g, ok := generationOf(e.Value.Sealed); err != nil || !ok || g != uint32(n+2) {
				t.Errorf("after %s: the key of %s is sealed by generation %d, %v", what, member, g, err)
			}
		}
		k.stop()
		k.start(nil)
		if now := signed(); now != first {
			t.Errorf("after %s and a restart the log is signed by %s, not %s", what, now, first)
		}
		e, err := k.auditKeys.Get(ctx, "away")
		if err != nil {
			t.Fatal(err)
		}
		if i, err = k.instance(ctx, DefaultInstance); err != nil {
			t.Fatal(err)
		}
		if got, err := i.Open(e.Value.Sealed, auditKeyAt(DefaultInstance, "away")); err != nil || string(got) != string(seed) {
			t.Errorf("after %s: the key of the member that was away: %v", what, err)
		}
	}
}
