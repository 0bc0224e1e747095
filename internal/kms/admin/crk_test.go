package admin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mortise/internal/kms"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// opener is what cmd gives the API for its root keys, made small: a keyring.
type opener struct {
	ring *rootkey.Keyring
	open func() error
}

func (o *opener) Status() []RootKeyStatus {
	list, _ := o.ring.List(context.Background())
	return []RootKeyStatus{{Provider: "file", SealedBy: strings.Join(o.ring.SealedBy(), " or "), Open: len(list) > 0, Where: "crk.sealed"}}
}

func (o *opener) Unlock(_ context.Context, _ string, with *secret.Key) error {
	if err := o.ring.Unlock(rootkey.Passphrase(with, 2)); err != nil {
		return errors.Join(kms.ErrInvalid, err)
	}
	return o.open()
}

func (o *opener) ChangePassphrase(_ context.Context, old, fresh *secret.Key) error {
	return o.ring.Reseal(rootkey.Passphrase(old, 2), rootkey.Passphrase(fresh, 2))
}

func word(t *testing.T, s string) *secret.Key {
	t.Helper()
	k, err := secret.Copy([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

// TestRootKeys drives everything about root keys over the socket: a locked
// server, its unlocking, CRKs, changes of keys, and what they ask to confirm.
func TestRootKeys(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	path := filepath.Join(dir, "crk.sealed")
	ring, err := rootkey.CreateKeyring(path, rootkey.Passphrase(word(t, "one"), 2))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rootkeytest.NewCRK(ctx, ring); err != nil { // so that a locked keyring shows
		t.Fatal(err)
	}
	ring.Close()
	if ring, err = rootkey.LoadKeyring(path); err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	s, err := store.Open(ctx, store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	k, err := kms.Open(ctx, s, kms.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	socket := filepath.Join(dir, "admin.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	run, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	api := New(Options{KMS: k, RootKeys: &opener{ring, func() error { return k.Unlock(ctx, ring) }}})
	go func() { ended <- api.ServeSocket(run, l) }()
	defer func() { stop(); <-ended }()
	c := DialSocket(socket)
	refused := func(err error, status int, says string) {
		t.Helper()
		var e *Error
		if !errors.As(err, &e) || e.Status != status || !strings.Contains(e.Message, says) {
			t.Errorf("%v; want %d with %q", err, status, says)
		}
	}

	if list, err := c.RootKeyStatus(ctx); err != nil || len(list) != 1 || list[0].Open || list[0].SealedBy != "passphrase" {
		t.Errorf("locked: %+v, %v", list, err)
	}
	_, err = c.KeyStatus(ctx, "default")
	refused(err, http.StatusServiceUnavailable, "locked")
	refused(c.Unlock(ctx, "", word(t, "wrong")), http.StatusBadRequest, "wrong passphrase")
	if err := c.Unlock(ctx, "file", word(t, "one")); err != nil {
		t.Fatal(err)
	}
	if list, err := c.RootKeyStatus(ctx); err != nil || !list[0].Open {
		t.Errorf("unlocked: %+v, %v", list, err)
	}
	if err := c.ChangePassphrase(ctx, word(t, "one"), word(t, "two")); err != nil {
		t.Error(err)
	}
	if again, err := rootkey.LoadKeyring(path); err != nil || again.Unlock(rootkey.Passphrase(word(t, "two"), 2)) != nil {
		t.Errorf("the new passphrase does not open the file: %v", err)
	}

	settled := func(want string) kms.KeyStatus {
		t.Helper()
		for range 1000 {
			st, err := c.KeyStatus(ctx, "default")
			if err != nil {
				t.Fatal(err)
			}
			if st.Change != nil && st.Change.Kind == want && st.Change.Stage == "" {
				return st
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("%s does not end", want)
		panic("")
	}
	if _, err := c.RotateKey(ctx, "default"); err != nil {
		t.Fatal(err)
	}
	if st := settled("rotate-key"); st.Generation != 2 {
		t.Errorf("%+v", st)
	}
	key := word(t, strings.Repeat("k", 32))
	want, _ := rootkey.CheckValue(key)
	crk, err := c.ImportCRK(ctx, "", key)
	if err != nil || crk.CheckValue != want || !crk.Imported {
		t.Fatalf("%+v, %v", crk, err)
	}
	for _, n := range []int{1, 31, 33, 100} {
		_, err := c.ImportCRK(ctx, "", word(t, strings.Repeat("k", n)))
		refused(err, http.StatusBadRequest, "32 bytes")
	}
	if _, err := c.RotateCRK(ctx, "default", RotateCRK{CRK: crk.ID}); err != nil {
		t.Fatal(err)
	}
	if st := settled("rotate-crk"); st.CRK != crk.ID {
		t.Errorf("%+v", st)
	}
	_, err = c.RotateCRK(ctx, "default", RotateCRK{CRK: "none"})
	refused(err, http.StatusNotFound, "no such CRK")
	_, err = c.RotateCRK(ctx, "default", RotateCRK{Provider: "cloud"})
	refused(err, http.StatusBadRequest, "cloud")

	_, err = c.ShredKeys(ctx, "default", true, "")
	var e *Error
	if !errors.As(err, &e) || e.Status != http.StatusConflict || e.Confirm == nil || e.Confirm.Count == 0 {
		t.Fatalf("shred without a hash: %v", err)
	}
	if _, err := c.ShredKeys(ctx, "default", true, e.Confirm.Hash); err != nil {
		t.Fatal(err)
	}
	st := settled("shred")
	list, err := c.CRKs(ctx, "default")
	if err != nil || st.CRK == crk.ID {
		t.Fatalf("%+v, %v", st, err)
	}
	for _, one := range list {
		if (one.ID == st.CRK) != (one.State == kms.CRKActive) || (one.ID != st.CRK) != (one.State == kms.CRKDestroyed) {
			t.Errorf("%+v", one)
		}
	}
	if p, err := c.PurgeKeys(ctx, "default", nil, ""); err != nil || p.Count != 0 {
		t.Errorf("purging nothing: %+v, %v", p, err)
	}
	refused(c.DeleteCRK(ctx, "none", ""), http.StatusNotFound, "no such CRK")
	err = c.DeleteCRK(ctx, st.CRK, "")
	if !errors.As(err, &e) || e.Confirm == nil {
		t.Fatalf("deleting without a hash: %v", err)
	}
	if err := c.DeleteCRK(ctx, st.CRK, e.Confirm.Hash); err != nil {
		t.Fatal(err)
	}
	_, err = c.KeyStatus(ctx, "default")
	refused(err, http.StatusConflict, "deleted")
}

func TestReadSecrets(t *testing.T) {
	for text, n := range map[string]int{"a": 1, "a\x00b": 2, strings.Repeat("x", maxSecret): 1} {
		list, err := readSecrets(strings.NewReader(text), n)
		if err != nil || len(list) != n {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	for text, n := range map[string]int{"": 1, "\x00": 2, "a\x00": 2, "ab": 2, "a\x00b\x00c": 2, "a\x00b": 1, strings.Repeat("x", maxSecret+1): 1} {
		if _, err := readSecrets(strings.NewReader(text), n); !errors.Is(err, kms.ErrInvalid) {
			t.Errorf("%.20q as %d: %v", text, n, err)
		}
	}
}

func FuzzReadSecrets(f *testing.F) {
	f.Add([]byte("one"), 1)
	f.Add([]byte("old\x00new"), 2)
	f.Add([]byte{0}, 2)
	f.Fuzz(func(t *testing.T, text []byte, n int) {
		if n < 1 || n > 2 {
			return
		}
		list, err := readSecrets(io.MultiReader(bytes.NewReader(text)), n)
		if err == nil && len(list) != n {
			t.Fatalf("%d of %d", len(list), n)
		}
		for _, k := range list {
			k.Wipe()
		}
	})
}
