package kmipd

import (
	"bytes"
	"crypto/tls"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kms"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// state is a KMS's folder, which can be opened again and again.
type state struct {
	dir    string
	root   *rootkey.Keyring
	client tls.Certificate // that serve lets in at the first time
	log    *syncBuffer
}

func newState(t *testing.T) *state {
	t.Helper()
	s := &state{dir: t.TempDir(), log: &syncBuffer{}}
	var err error
	if s.root, err = rootkeytest.Keyring(s.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.root.Close() })
	return s
}

// store opens the records alone.
func (s *state) store(t *testing.T, quota int64) *store.Store {
	t.Helper()
	st, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(s.dir, "state"), Name: "kms", Quota: quota,
		Logger: slog.New(slog.NewTextHandler(s.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// serve opens a KMS over st behind a listener.
func (s *state) serve(t *testing.T, st *store.Store) (b *bed, stop func()) {
	t.Helper()
	k, err := kms.Open(t.Context(), st, kms.Options{Logger: slog.New(slog.NewTextHandler(s.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(t.Context(), s.root); err != nil {
		t.Fatal(err)
	}
	b = serveOver(t, k, Options{})
	if s.client.Leaf == nil {
		s.client = newClient(t, time.Now(), time.Hour)
		letIn(t, k, s.client)
	}
	b.client = s.client
	return b, func() {
		if err := b.stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		k.Close()
	}
}

// TestDamagedRecord: a record that was altered, or put in another's place, while
// the server was down is refused and logged, and the others are served.
func TestDamagedRecord(t *testing.T) {
	s := newState(t)
	st := s.store(t, 0)
	b, stop := s.serve(t, st)
	c := b.dial(t)
	good, altered, swapped, cut := newKey(t, c, named("good")), newKey(t, c), newKey(t, c), newKey(t, c)
	before := key(t, do[*payloads.GetResponsePayload](t, c, 4, &payloads.GetRequestPayload{UniqueIdentifier: good}))
	stop()
	raw, err := store.NewCollection(t.Context(), st, "object-"+kms.DefaultInstance, rawCodec{})
	if err != nil {
		t.Fatal(err)
	}
	record := func(id string) []byte {
		e, err := raw.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Clone(e.Value)
	}
	change := record(altered)
	change[len(change)/2] ^= 1
	if _, err := st.Commit(t.Context(), raw.Put(altered, change), raw.Put(swapped, record(good)), raw.Put(cut, record(cut)[:20])); err != nil {
		t.Fatal(err)
	}
	raw.Close()
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}

	st = s.store(t, 0)
	defer st.Close()
	b, stop = s.serve(t, st)
	defer stop()
	c = b.dial(t)
	for what, id := range map[string]string{"altered": altered, "swapped": swapped, "cut": cut} {
		for _, p := range []kmip.OperationPayload{
			&payloads.GetRequestPayload{UniqueIdentifier: id}, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id},
			&payloads.ActivateRequestPayload{UniqueIdentifier: id},
		} {
			if r := refused(t, c, 4, p); r != kmip.ResultReasonGeneralFailure {
				t.Errorf("%T of the %s record: %v", p, what, r)
			}
		}
		if !strings.Contains(s.log.String(), id) {
			t.Errorf("nothing is logged of the %s record %s:\n%s", what, id, s.log)
		}
	}
	if !strings.Contains(s.log.String(), "level=ERROR") {
		t.Errorf("damage is no error in the log:\n%s", s.log)
	}
	if got := key(t, do[*payloads.GetResponsePayload](t, c, 4, &payloads.GetRequestPayload{UniqueIdentifier: good})); !bytes.Equal(got, before) {
		t.Error("the good key is another one")
	}
	found := do[*payloads.LocateResponsePayload](t, c, 4, &payloads.LocateRequestPayload{}).UniqueIdentifier
	if !slices.Equal(found, []string{good}) {
		t.Errorf("Locate finds %v, want %v", found, good)
	}
	if newKey(t, c) == "" {
		t.Error("no key can be made")
	}
}

// rawCodec keeps the bytes of records as they are stored.
type rawCodec struct{}

func (rawCodec) Encode(_ string, b []byte) ([]byte, error) { return b, nil }
func (rawCodec) Decode(_ string, b []byte) ([]byte, error) { return bytes.Clone(b), nil }

// TestQuotaReached: when the database is full, keys are served and new ones are
// refused in words; when there is space again, so is service.
func TestQuotaReached(t *testing.T) {
	t.Parallel()
	s := newState(t)
	st := s.store(t, 24<<20)
	defer st.Close()
	b, stop := s.serve(t, st)
	defer stop()
	c := b.dial(t)
	c.SetDeadline(time.Now().Add(3 * time.Minute))
	id := newKey(t, c)
	fill, err := store.NewCollection(t.Context(), st, "fill", rawCodec{})
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ { // history that may go, as a day's work leaves it
		_, err := st.Commit(t.Context(), fill.Put("one", bytes.Repeat([]byte{byte(i)}, 1<<20)))
		if errors.Is(err, store.ErrFull) {
			break
		}
		if err != nil || i > 100 {
			t.Fatalf("filling: %v after %d MiB", err, i)
		}
	}
	create := func() kmip.ResponseBatchItem {
		return roundTrip(t, c, request(4, createAES())).BatchItem[0]
	}
	it := create()
	for i := 0; it.Err() == nil && i < 20_000; i++ { // etcd keeps the last pages for small records
		it = create()
	}
	if it.ResultReason != kmip.ResultReasonGeneralFailure || !strings.Contains(it.ResultMessage, "full") {
		t.Fatalf("creating while it is full: %v", it.Err())
	}
	for range 3 {
		do[*payloads.GetResponsePayload](t, c, 4, &payloads.GetRequestPayload{UniqueIdentifier: id})
	}
	do[*payloads.LocateResponsePayload](t, b.dial(t), 4, &payloads.LocateRequestPayload{MaximumItems: 1})
	begin := time.Now()
	for it = create(); it.Err() != nil; it = create() {
		if time.Since(begin) > 90*time.Second {
			t.Fatalf("creating is not back: %v", it.Err())
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("keys are made again after %v", time.Since(begin).Round(time.Millisecond))
	if got := do[*payloads.GetResponsePayload](t, c, 4, &payloads.GetRequestPayload{UniqueIdentifier: it.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier}); got.Object == nil {
		t.Error("the new key is not there")
	}
}
