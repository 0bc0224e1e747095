package kms

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// TestReopen: everything is there after a restart, and only with its root key.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	s := f.session()
	id := create(t, s, named("kept"), custom("x-a", "b"))
	if err := s.Activate(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	key := keyBytes(t, s, id)
	f.Close()

	other, err := rootkeytest.Keyring(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f.s.Close()
	again, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	locked, err := Open(t.Context(), again, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := locked.Unlock(t.Context(), other); !errors.Is(err, rootkey.ErrUnknownKey) {
		t.Errorf("opened with other root keys: %v", err)
	}
	if _, err := locked.Clients(t.Context(), DefaultInstance); !errors.Is(err, ErrLocked) {
		t.Errorf("a locked KMS answers: %v", err)
	}
	locked.Close()
	again.Close()

	f = start(t, dir)
	s = f.session()
	if !bytes.Equal(keyBytes(t, s, id), key) || state(t, s, id) != kmip.StateActive {
		t.Error("the key or its state changed over a restart")
	}
	if ids, _, err := s.Locate(t.Context(), Query{Attributes: []kmip.Attribute{named("kept"), custom("x-a", "b")}}); err != nil || !slices.Equal(ids, []string{id}) {
		t.Errorf("Locate after a restart: %v, %v", ids, err)
	}
}

// TestNothingInClear greps every file of the state folder, the write-ahead log
// included, for key bytes, names and attributes.
func TestNothingInClear(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir)
	s := f.session()
	var needles [][]byte
	for range 20 {
		id := create(t, s, named("name-in-clear"+fmt.Sprint(len(needles))), custom("x-clear", "attribute-in-clear"))
		needles = append(needles, keyBytes(t, s, id))
		if err := s.Activate(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	needles = append(needles, []byte("in-clear"))
	f.Close()
	f.s.Close()
	scan(t, dir, needles)
}

func scan(t *testing.T, dir string, needles [][]byte) {
	t.Helper()
	total := 0
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		total += bytes.Count(b, []byte("/object-default/"))
		for i, n := range needles {
			for _, form := range [][]byte{n, []byte(hex.EncodeToString(n)), []byte(base64.StdEncoding.EncodeToString(n))} {
				if bytes.Contains(b, form) {
					t.Errorf("needle %d is in clear in %s", i, path)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if total < 20 {
		t.Errorf("only %d objects were seen in %s: the test looks in the wrong place", total, dir)
	}
}

// TestSwappedRecord: a record that is put in another's place is refused, and
// the others go on.
func TestSwappedRecord(t *testing.T) {
	f := start(t, t.TempDir())
	s := f.session()
	ctx := t.Context()
	a, b := create(t, s), create(t, s)
	e, err := s.inst.objects.Get(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	forger := objectCodec{s.inst}
	stored, err := forger.Encode("/object-default/"+b, e.Value) // what b's own record would be
	if err != nil {
		t.Fatal(err)
	}
	for what, forged := range map[string][]byte{
		"moved":       e.Value.sealed.stored,
		"altered":     append(bytes.Clone(stored[:len(stored)-1]), stored[len(stored)-1]^1),
		"wrong label": append([]byte{sealVersion, 0, 0, 0, 9}, stored[sealHeader:]...),
		"empty":       nil,
	} {
		if _, err := forger.Decode("/object-default/"+b, forged); err == nil {
			t.Errorf("a %s record was opened", what)
		}
	}
	if o, err := forger.Decode("/object-default/"+b, stored); err != nil || o.material != 32 {
		t.Errorf("a good record: %v", err)
	}
}

// TestOtherInstance: a session cannot name another instance's objects.
func TestOtherInstance(t *testing.T) {
	dir := t.TempDir()
	ctx := t.Context()
	st, err := store.Open(ctx, store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	r, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	k, err := Open(ctx, st, Options{Logger: slog.New(slog.DiscardHandler), Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} {
		rec, _, err := k.newInstance(ctx, r, id)
		if err != nil {
			t.Fatal(err)
		}
		used, err := k.inUse(ctx, rec.CRK, id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Commit(ctx, k.records.Create(id, rec), used); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.Unlock(ctx, r); err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	session := func(id string) *Session {
		return &Session{k: k, inst: k.instances[id], Actor: Actor{Name: "test", Instance: id, Role: RoleAdministrator}}
	}
	mine, theirs := session("a"), session("b")
	id, own := create(t, mine, named("same")), create(t, theirs, named("same")) // a name is an instance's own
	for _, try := range []string{id, "../a/" + id, "a/" + id, "a"} {
		if _, err := theirs.Get(ctx, try); reason(err) != kmip.ResultReasonItemNotFound {
			t.Errorf("Get of %q across instances: %v", try, err)
		}
		if err := theirs.Destroy(ctx, try); reason(err) != kmip.ResultReasonItemNotFound {
			t.Errorf("Destroy of %q across instances: %v", try, err)
		}
	}
	if ids, _, err := theirs.Locate(ctx, Query{Attributes: []kmip.Attribute{named("same")}}); err != nil || !slices.Equal(ids, []string{own}) {
		t.Errorf("Locate by name sees %v, %v", ids, err)
	}
	if ids, _, err := theirs.Locate(ctx, Query{}); err != nil || !slices.Equal(ids, []string{own}) {
		t.Errorf("Locate sees %v, %v", ids, err)
	}
	rec, err := k.records.Get(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.unwrapInstance(ctx, r, store.Entry[instanceRecord]{Key: "b", Value: rec.Value}); err == nil {
		t.Error("an instance's keys were unwrapped for another")
	}
}

// createForever is the child: it prints id and key of each acknowledged create.
func createForever(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	ctx := context.Background()
	st, err := store.Open(ctx, store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	fail(err)
	r, err := rootkeytest.Keyring(dir)
	fail(err)
	k, err := Open(ctx, st, Options{})
	fail(err)
	fail(k.Unlock(ctx, r))
	for range 4 {
		go func() {
			s := &Session{k: k, inst: k.instances[DefaultInstance], Actor: Actor{Name: "child", Role: RoleAdministrator}}
			for {
				id, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256())
				fail(err)
				m, err := s.Get(ctx, id)
				fail(err)
				m.Bytes.Use(func(b []byte) { fmt.Fprintf(os.Stdout, "%s %x\n", id, b) })
				m.Bytes.Wipe()
			}
		}()
	}
	select {}
}

func TestKill9AfterCreate(t *testing.T) {
	dir := t.TempDir()
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
	keys := map[string]string{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if id, key, ok := strings.Cut(lines.Text(), " "); ok && len(key) == 64 {
			keys[id] = key
		}
		if len(keys) == 500 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	cmd.Wait()
	if len(keys) < 500 {
		t.Fatalf("the child made %d keys only", len(keys))
	}
	s := start(t, dir).session()
	for id, key := range keys {
		if got := hex.EncodeToString(keyBytes(t, s, id)); got != key {
			t.Fatalf("key %s is not what was acknowledged", id)
		}
	}
	t.Logf("%d acknowledged keys survived", len(keys))
}
