package robustness

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/test/kmsproc"
)

// tpm starts a TPM in software and returns what serve calls it.
func tpm(t *testing.T) string {
	t.Helper()
	dir := shortDir(t)
	socket := filepath.Join(dir, "tpm.sock")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting swtpm: %v", err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	until(t, "swtpm listens", 10*time.Second, func() error { _, err := os.Stat(socket); return err })
	return "unix:" + socket
}

const backupPassphrase = "passphrase of the backup"

// backedUp is a key server that was backed up and has gone on since, and what is
// known of it.
type backedUp struct {
	*kmsproc.Server
	client            kmsproc.Client
	keys              map[string][]byte // that it had at the backup, and has still
	backup            string            // file
	passphrase        string            // file of the backup's
	audit             string            // exported log of the time after the backup
	destroyed, late   string            // keys destroyed, and made, after it
	revoked           kmsproc.Client    // client shut out after it
	destroyedMaterial []byte
}

// backUp makes keys, backs up, and then destroys one, makes another and shuts a
// client out; the server is stopped for good.
func backUp(t *testing.T, s *kmsproc.Server) *backedUp {
	t.Helper()
	ctx := t.Context()
	dir := shortDir(t)
	b := &backedUp{Server: s, keys: map[string][]byte{}, backup: filepath.Join(dir, "kms.age"), passphrase: filepath.Join(dir, "passphrase"), audit: filepath.Join(dir, "audit.jsonl")}
	write(t, b.passphrase, backupPassphrase+"\n")
	var err error
	if b.client, err = s.Client(ctx, "admin", "administrator"); err != nil {
		t.Fatal(err)
	}
	if b.revoked, err = s.Client(ctx, "leaving", "key-manager"); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, s, b.client)
	for range 20 {
		id := must[*payloads.CreateResponsePayload](t, conn, create()).UniqueIdentifier
		b.keys[id] = material(t, conn, id)
	}
	b.destroyed = must[*payloads.CreateResponsePayload](t, conn, create()).UniqueIdentifier
	b.destroyedMaterial = material(t, conn, b.destroyed)
	admin(t, s, "crk", "rotate") // so that there is a retired CRK, which is in no backup
	admin(t, s, "backup", "-o", b.backup, "--passphrase-file", b.passphrase)

	must[*payloads.DestroyResponsePayload](t, conn, &payloads.DestroyRequestPayload{UniqueIdentifier: b.destroyed})
	b.late = must[*payloads.CreateResponsePayload](t, conn, create()).UniqueIdentifier
	admin(t, s, "client", "revoke", "leaving")
	write(t, b.audit, admin(t, s, "audit", "export"))
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	return b
}

func admin(t *testing.T, s *kmsproc.Server, args ...string) string {
	t.Helper()
	out, err := s.Admin(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// refusesBad tries what must not be restored: a wrong passphrase, and files that
// were changed or cut off. Nothing may be there afterwards.
func (b *backedUp) refusesBad(t *testing.T, s *kmsproc.Server, args ...string) {
	t.Helper()
	whole, err := os.ReadFile(b.backup)
	if err != nil {
		t.Fatal(err)
	}
	wrong := filepath.Join(s.Dir, "wrong")
	write(t, wrong, "another passphrase\n")
	bad := map[string]struct{ file, passphrase string }{"a wrong passphrase": {b.backup, wrong}}
	damaged := func(name string, text []byte) {
		path := filepath.Join(s.Dir, "damaged-"+strings.ReplaceAll(name, " ", "-"))
		write(t, path, string(text))
		bad[name] = struct{ file, passphrase string }{path, b.passphrase}
	}
	for name, at := range map[string]int{"its head changed": 60, "its middle changed": len(whole) / 2} {
		text := bytes.Clone(whole)
		text[at] ^= 1
		damaged(name, text)
	}
	damaged("cut by one byte", whole[:len(whole)-1])
	for name, f := range bad {
		out, err := s.Admin(t.Context(), append([]string{"restore", f.file, "--state-dir", s.StateDir, "--passphrase-file", f.passphrase}, args...)...)
		if err == nil {
			t.Errorf("with %s it was restored: %s", name, out)
		}
		if left, _ := os.ReadDir(s.StateDir); len(left) > 0 {
			t.Errorf("with %s something was written: %v", name, left)
		}
	}
}

// restored restores to s, starts it, sees that nothing that ended after the backup
// is alive again, and that it serves the same keys once it is released.
func (b *backedUp) restored(t *testing.T, s *kmsproc.Server, args ...string) {
	t.Helper()
	ctx := t.Context()
	out := admin(t, s, append([]string{"restore", b.backup, "--state-dir", s.StateDir, "--passphrase-file", b.passphrase, "--audit", b.audit}, args...)...)
	if !strings.Contains(out, b.late) {
		t.Errorf("restore does not name the key that is not in the backup:\n%s", out)
	}
	if err := s.StartLocked(ctx); err != nil {
		t.Fatal(err)
	}
	until(t, "what happened after the backup is done again", 20*time.Second, func() error {
		status, err := s.Admin(ctx, "restore", "status")
		if err != nil || strings.Contains(status, "not done again yet") || strings.Count(status, "done again") < 2 || !strings.Contains(status, b.destroyed) {
			return fmt.Errorf("%v\n%s", err, status)
		}
		return nil
	})
	if c, err := net.Dial("tcp", s.Address); err == nil {
		c.Close()
		t.Error("it serves clients while it is quarantined")
	}
	_, err := s.Admin(ctx, "restore", "release")
	if err == nil {
		t.Fatal("it was released without a confirmation")
	}
	if !strings.Contains(err.Error(), b.late) || strings.Contains(err.Error(), b.destroyed) {
		t.Errorf("what is lost or in doubt: %v", err)
	}
	hash := regexp.MustCompile(`[0-9a-f]{64}`).FindString(err.Error())
	admin(t, s, "restore", "release", "--confirm", hash)
	if err := s.Serves(ctx); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		conn := dial(t, s, b.client)
		for id, want := range b.keys {
			if !bytes.Equal(material(t, conn, id), want) {
				t.Fatalf("key %s has changed", id)
			}
		}
		if _, err := one[*payloads.GetResponsePayload](conn, &payloads.GetRequestPayload{UniqueIdentifier: b.destroyed}); err == nil {
			t.Error("a key that was destroyed after the backup is alive again")
		}
		got := must[*payloads.GetAttributesResponsePayload](t, conn, &payloads.GetAttributesRequestPayload{UniqueIdentifier: b.destroyed, AttributeName: []kmip.AttributeName{kmip.AttributeNameState}})
		if len(got.Attribute) != 1 || got.Attribute[0].AttributeValue != kmip.StateDestroyed {
			t.Errorf("its state: %+v", got.Attribute)
		}
		must[*payloads.CreateResponsePayload](t, conn, create())
		if _, err := askOnce(s, b.revoked); err == nil {
			t.Error("a client that was shut out after the backup is served")
		}
	}
	check()
	admin(t, s, "crk", "rotate")
	admin(t, s, "key", "rotate")
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	check()
	list := admin(t, s, "crk", "ls")
	if strings.Contains(list, "orphan") || strings.Contains(list, "making") {
		t.Errorf("after the restore:\n%s", list)
	}
	if log := s.Log(); strings.Contains(log, "keys are not up to date") {
		t.Error("the restored server misses keys, and says so again and again")
	}
	for what, form := range map[string][]byte{"a key": b.destroyedMaterial, "the backup's passphrase": []byte(backupPassphrase)} {
		if strings.Contains(s.Log(), string(form)) {
			t.Errorf("%s is in the log", what)
		}
	}
}

// askOnce connects anew and asks something.
func askOnce(s *kmsproc.Server, c kmsproc.Client) (string, error) {
	conn, err := dialOnce(s, c)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	a, err := one[*payloads.CreateResponsePayload](conn, create())
	if err != nil {
		return "", err
	}
	return a.UniqueIdentifier, nil
}

// TestRestoreWithTPM backs up a key server whose root keys only the TPM opens, and
// restores it on a machine with another TPM.
func TestRestoreWithTPM(t *testing.T) {
	first := newServer(t)
	first.NoPassphrase, first.Args = true, []string{"--tpm", "--tpm-device", tpm(t)}
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// It restarts by itself, and another machine's TPM does not open its folder.
	if err := first.Stop(); err != nil {
		t.Error(err)
	}
	stolen := newServer(t)
	if err := os.CopyFS(stolen.StateDir, os.DirFS(first.StateDir)); err != nil {
		t.Fatal(err)
	}
	stolen.NoPassphrase, stolen.Args = true, []string{"--tpm-device", tpm(t)}
	if err := stolen.StartLocked(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "another TPM is refused", 10*time.Second, func() error {
		if !strings.Contains(stolen.Log(), "the TPM does not open the root keys") {
			return fmt.Errorf("%s", stolen.Log())
		}
		return nil
	})
	if err := stolen.Stop(); err != nil {
		t.Error(err)
	}
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b := backUp(t, first)

	second := newServer(t)
	second.NoPassphrase, second.Args = true, []string{"--tpm-device", tpm(t)}
	seal := append([]string{"--tpm"}, second.Args...)
	b.refusesBad(t, second, seal...)
	b.restored(t, second, seal...)
}

// TestRestoreWithToken restores a key server whose root keys are in a token, which
// is moved to the new machine.
func TestRestoreWithToken(t *testing.T) {
	_, pin, args := token(t)
	args = append(args, "--pkcs11-pin-file", pin)
	first := newServer(t)
	first.NoPassphrase, first.Args = true, args
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b := backUp(t, first)
	second := newServer(t)
	second.NoPassphrase, second.Args = true, args
	b.restored(t, second)
}
