package admin

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"mortise/internal/kms"
	"mortise/internal/kms/backup"
	"mortise/internal/rootkey"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// serveFolder starts a KMS of a state folder behind a socket.
func serveFolder(t *testing.T, dir string) (*Client, func()) {
	t.Helper()
	pass, err := secret.Copy([]byte("passphrase of the tests"))
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Wipe()
	path := filepath.Join(dir, "crk.sealed")
	ring, err := rootkey.LoadKeyring(path)
	if errors.Is(err, os.ErrNotExist) {
		ring, err = rootkey.CreateKeyring(path, rootkey.Passphrase(pass, 10))
	}
	if err == nil {
		err = ring.Unlock(rootkey.Passphrase(pass, 10))
	}
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "store"), Name: "kms-1"})
	if err != nil {
		t.Fatal(err)
	}
	k, err := kms.Open(t.Context(), s, kms.Options{})
	if err == nil {
		err = k.Unlock(t.Context(), ring)
	}
	if err != nil {
		t.Fatal(err)
	}
	sockets, err := os.MkdirTemp("", "mtka") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(filepath.Join(sockets, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- New(Options{KMS: k}).ServeSocket(ctx, l) }()
	stop := func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		k.Close()
		s.Close()
		ring.Close()
		os.RemoveAll(sockets)
	}
	return DialSocket(filepath.Join(sockets, "s")), stop
}

// TestBackupAndRestore goes the administrator's whole way over the socket.
func TestBackupAndRestore(t *testing.T) {
	ctx := t.Context()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	c, stop := serveFolder(t, t.TempDir())
	var refused *Error
	for name, r := range map[string]MakeBackup{
		"nothing":    {},
		"both":       {Passphrase: []byte("long enough a passphrase"), Recipients: []string{id.Recipient().String()}},
		"short":      {Passphrase: []byte("short")},
		"no age key": {Recipients: []string{"ssh-ed25519 AAAA"}},
	} {
		var out bytes.Buffer
		if err := c.MakeBackup(ctx, r, &out); !errors.As(err, &refused) || refused.Code != "bad_request" || out.Len() > 0 {
			t.Errorf("%s: %v, %d bytes", name, err, out.Len())
		}
	}
	var out bytes.Buffer
	if err := c.MakeBackup(ctx, MakeBackup{Recipients: []string{id.Recipient().String()}}, &out); err != nil {
		t.Fatal(err)
	}
	list, err := c.Backups(ctx)
	if err != nil || len(list) != 1 || !list[0].Complete {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := c.ForgetBackup(ctx, "another"); !errors.As(err, &refused) || refused.Code != "not_found" {
		t.Errorf("forgetting another backup: %v", err)
	}
	if err := c.ForgetBackup(ctx, list[0].ID); err != nil {
		t.Error(err)
	}
	if s, err := c.RestoreStatus(ctx); err != nil || s.Quarantined {
		t.Errorf("%+v, %v", s, err)
	}
	if err := c.Release(ctx, ""); !errors.As(err, &refused) || refused.Code != "bad_request" {
		t.Errorf("releasing a server that is not quarantined: %v", err)
	}
	stop()

	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "kms.age")
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	pass, err := secret.Copy([]byte("passphrase of the tests"))
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Wipe()
	if _, err := backup.Restore(ctx, backup.Options{File: file, Identities: []age.Identity{id}, StateDir: dir, Member: "kms-1", KeyringName: "crk.sealed",
		NewKeyring: func(path string) (backup.Adopter, error) {
			return rootkey.CreateKeyring(path, rootkey.Passphrase(pass, 10))
		},
	}); err != nil {
		t.Fatal(err)
	}
	c, stop = serveFolder(t, dir)
	defer stop()
	s, err := c.RestoreStatus(ctx)
	if err != nil || !s.Quarantined || s.Restore.Backup != list[0].ID {
		t.Fatalf("%+v, %v", s, err)
	}
	if err := c.MakeBackup(ctx, MakeBackup{Recipients: []string{id.Recipient().String()}}, &out); !errors.As(err, &refused) || refused.Code != "quarantined" {
		t.Errorf("a backup of a quarantined server: %v", err)
	}
	if err := c.Release(ctx, ""); !errors.As(err, &refused) || refused.Confirm == nil || !strings.Contains(strings.Join(refused.Confirm.Lost, ""), "no audit log") {
		t.Fatalf("%v", err)
	}
	if err := c.Release(ctx, refused.Confirm.Hash); err != nil {
		t.Fatal(err)
	}
	if s, err := c.RestoreStatus(ctx); err != nil || s.Quarantined {
		t.Errorf("%+v, %v", s, err)
	}
}
