package backup

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/rootkey"
	"mortise/internal/secret"
	"mortise/internal/store"
)

const passphrase = "passphrase of the tests"

func key(t testing.TB, text string) *secret.Key {
	t.Helper()
	k, err := secret.Copy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func sealing(t testing.TB) rootkey.Sealing { return rootkey.Passphrase(key(t, passphrase), 10) }

// bed is a KMS in a state folder, as cmd/mortise makes it.
type bed struct {
	*kms.KMS
	store  *store.Store
	ring   *rootkey.Keyring
	client tls.Certificate
}

// open starts the KMS of a state folder, a new one if it is empty.
func open(t testing.TB, dir string) *bed {
	t.Helper()
	path := filepath.Join(dir, "crk.sealed")
	ring, err := rootkey.LoadKeyring(path)
	if errors.Is(err, os.ErrNotExist) {
		ring, err = rootkey.CreateKeyring(path, sealing(t))
	}
	if err == nil {
		err = ring.Unlock(sealing(t))
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
	b := &bed{KMS: k, store: s, ring: ring}
	t.Cleanup(b.close)
	return b
}

func (b *bed) close() {
	b.KMS.Close()
	b.store.Close()
	b.ring.Close()
}

func root() kms.Actor { return kms.Actor{Kind: "socket", Name: "root", Role: kms.RoleAdministrator} }

// session lets a client in, once.
func (b *bed) session(t testing.TB) *kms.Session {
	t.Helper()
	if b.client.Leaf == nil {
		b.client = newClient(t)
		if _, err := b.AddClient(t.Context(), root(), kms.DefaultInstance, kms.NewClient{Certificate: b.client.Leaf, Name: "test", Role: kms.RoleAdministrator}); err != nil {
			t.Fatal(err)
		}
	}
	s, err := b.Session(t.Context(), kms.DefaultInstance, b.client.Leaf, "192.0.2.1:1")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newClient(t testing.TB) tls.Certificate {
	t.Helper()
	k, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(k, pki.Grant{Client: true, Life: 24 * time.Hour}, "client", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := pki.TLSCertificate([]*x509.Certificate{cert}, k)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (b *bed) create(t testing.TB, name string) string {
	t.Helper()
	id, err := b.session(t).Create(t.Context(), kmip.ObjectTypeSymmetricKey, []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt},
		{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}},
	})
	if err == nil {
		err = b.session(t).Activate(t.Context(), id)
	}
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (b *bed) get(t testing.TB, id string) []byte {
	t.Helper()
	s, err := b.Session(t.Context(), kms.DefaultInstance, b.client.Leaf, "192.0.2.1:1")
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Get(t.Context(), id)
	if err != nil {
		t.Fatalf("getting %s: %v", id, err)
	}
	defer m.Bytes.Wipe()
	var out []byte
	m.Bytes.Use(func(b []byte) { out = slices.Clone(b) })
	return out
}

func (b *bed) state(t testing.TB, id string) kmip.State {
	t.Helper()
	s, err := b.Session(t.Context(), kms.DefaultInstance, b.client.Leaf, "192.0.2.1:1")
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.Attributes(t.Context(), id, kmip.AttributeNameState)
	if err != nil || len(list) != 1 {
		t.Fatalf("state of %s: %v, %v", id, list, err)
	}
	return list[0].AttributeValue.(kmip.State)
}

func write(t testing.TB, b *bed, to io.Writer, recipients ...age.Recipient) kms.Backup {
	t.Helper()
	done, err := Write(t.Context(), b.KMS, root(), to, recipients...)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

func file(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kms.backup")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func identity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func options(t testing.TB, path, dir string, ids ...age.Identity) Options {
	return Options{
		File: path, Identities: ids, StateDir: dir, Member: "kms-1", KeyringName: "crk.sealed",
		NewKeyring: func(path string) (Adopter, error) { return rootkey.CreateKeyring(path, sealing(t)) },
	}
}

// TestRestore: a restore on an empty machine serves the same keys, after its
// release; what was destroyed, revoked and shut out after the backup stays so;
// what was made after it is listed.
func TestRestore(t *testing.T) {
	ctx := t.Context()
	old := open(t, t.TempDir())
	keep, destroyed, revoked, compromised := old.create(t, "keep"), old.create(t, "destroyed"), old.create(t, "revoked"), old.create(t, "compromised")
	bytesOf := old.get(t, keep)
	stranger := newClient(t)
	shut, err := old.AddClient(ctx, root(), kms.DefaultInstance, kms.NewClient{Certificate: stranger.Leaf, Name: "stranger"})
	if err != nil {
		t.Fatal(err)
	}
	id := identity(t)
	var out bytes.Buffer
	made := write(t, old, &out, id.Recipient())
	if list, err := old.Backups(ctx); err != nil || len(list) != 1 || !list[0].Complete || list[0].ID != made.ID || len(list[0].CRKs) != 1 || list[0].Revision != made.Revision {
		t.Errorf("list of backups: %+v, %v", list, err)
	}

	// After the backup.
	late := old.create(t, "late")
	now := time.Now().UTC()
	entry := func(n int64, op, object, detail string) string {
		return fmt.Sprintf(`{"sequence":1,"time":%q,"member":"kms-1","instance":"default","actor":"certificate","client":"test","operation":%q,"object":%q,"result":"Success","detail":%q,"act":"act-%d","revision":%d,"log":"00112233445566778899aabbccddeeff","hash":"00"}`,
			now.Format(time.RFC3339Nano), op, object, detail, n, made.Revision+n)
	}
	log := strings.Join([]string{
		entry(-1, "Destroy", keep, ""), // before the backup: not to be believed of it
		entry(1, "Create", late, ""),
		entry(3, "Destroy", destroyed, ""), // the file's order is not the acts'
		entry(2, "Revoke", destroyed, ""),
		entry(2, "Revoke", destroyed, ""), // twice: two members' exports overlap
		entry(4, "Revoke", revoked, ""),
		entry(5, "Revoke", compromised, "compromise"),
		entry(6, "client revoke", shut.Fingerprint, ""),
		strings.Replace(entry(7, "Destroy", keep, ""), "Success", "PermissionDenied", 1),
		entry(8, "Create", "made-and-destroyed", ""),
		entry(9, "Destroy", "made-and-destroyed", ""),
		entry(10, "client add", "whoever", ""),
		entry(11, "crk delete", "0123", ""),
		entry(12, "bytes dropped", "by-date", "grace time over"),
		`{"v":1,"member":"kms-1","hash":"00","sequence":9}`,                  // a head
		`{"begin":{"member":"kms-1","log":"00","sequence":1,"before":"00"}}`, // marks of an export of all members
		`{"end":{"v":1,"member":"kms-1","log":"00","sequence":9,"hash":"00","time":"2026-01-01T00:00:00Z","key":"00","signature":"00"}}`,
		"",
	}, "\n")
	dir := filepath.Join(t.TempDir(), "new", "kms")
	o := options(t, file(t, out.Bytes()), dir, id)
	if err := errors.Join(
		o.Aftermath.AddAudit("audit.jsonl", strings.NewReader(log)),
		o.Aftermath.AddHeld("held", strings.NewReader("# center's keys\n"+keep+"\ndefault/"+late+"\nnowhere/unknown\n")),
	); err != nil {
		t.Fatal(err)
	}
	result, err := Restore(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if want := []kms.MissingObject{{Instance: "default", ID: late, From: "audit"}, {Instance: "nowhere", ID: "unknown", From: "list"}}; !slices.Equal(result.Quarantine.Missing, want) || len(result.Acts) != 7 || result.Objects["default"] != 4 {
		t.Errorf("result: missing %+v, %d acts, objects %v", result.Quarantine.Missing, len(result.Acts), result.Objects)
	}
	if _, err := Restore(ctx, o); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("a second restore: %v", err)
	}

	fresh := open(t, dir)
	fresh.client = old.client
	if _, err := fresh.Session(ctx, kms.DefaultInstance, old.client.Leaf, "x"); !errors.Is(err, kms.ErrQuarantined) {
		t.Fatalf("a client of a quarantined server: %v", err)
	}
	if _, err := Write(ctx, fresh.KMS, root(), io.Discard, id.Recipient()); !errors.Is(err, kms.ErrQuarantined) {
		t.Errorf("a backup of a quarantined server: %v", err)
	}
	waitForActs(t, fresh)
	var confirm *kms.Confirmation
	if err := fresh.Release(ctx, root(), ""); !errors.As(err, &confirm) || confirm.Count != 4 || !strings.Contains(strings.Join(confirm.Lost, "\n"), late) {
		t.Fatalf("release without confirmation: %v, %+v", err, confirm)
	}
	if err := fresh.Release(ctx, root(), strings.Repeat("0", 64)); !errors.As(err, &confirm) {
		t.Fatalf("release with another hash: %v", err)
	}
	// A restart does not release it.
	fresh.close()
	fresh = open(t, dir)
	fresh.client = old.client
	waitForActs(t, fresh)
	if _, err := fresh.Session(ctx, kms.DefaultInstance, old.client.Leaf, "x"); !errors.Is(err, kms.ErrQuarantined) {
		t.Fatalf("after a restart: %v", err)
	}
	if err := fresh.Release(ctx, root(), confirm.Hash); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fresh.get(t, keep), bytesOf) || fresh.state(t, keep) != kmip.StateActive {
		t.Error("another key than before")
	}
	for id, want := range map[string]kmip.State{destroyed: kmip.StateDestroyed, revoked: kmip.StateDeactivated, compromised: kmip.StateCompromised} {
		if got := fresh.state(t, id); got != want {
			t.Errorf("state %v, want %v", got, want)
		}
	}
	s := fresh.session(t)
	if _, err := s.Get(ctx, destroyed); err == nil {
		t.Error("a key destroyed after the backup is served")
	}
	if _, err := fresh.Session(ctx, kms.DefaultInstance, stranger.Leaf, "x"); !errors.Is(err, kms.ErrUnknownClient) {
		t.Errorf("a client shut out after the backup: %v", err)
	}
	if again := fresh.create(t, "destroyed"); again == "" {
		t.Error("the name of a destroyed key is not free")
	}
	if list, err := fresh.Backups(ctx); err != nil || len(list) != 1 || list[0].ID != made.ID {
		t.Errorf("the restored server's list of backups: %+v, %v", list, err)
	}
}

func waitForActs(t testing.TB, b *bed) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		acts, err := b.QuarantinedActs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(acts, func(a kms.Act) bool { return a.Outcome == "" }) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("acts are not done again: %+v", acts)
		}
	}
}

// TestConsistent: a backup made while keys are created has each acknowledged
// before it began, and nothing that does not open.
func TestConsistent(t *testing.T) {
	ctx := t.Context()
	old := open(t, t.TempDir())
	before := old.create(t, "before")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				old.create(t, fmt.Sprint("meanwhile-", i))
			}
		}
	}()
	id := identity(t)
	var out bytes.Buffer
	for range 3 {
		out.Reset()
		write(t, old, &out, id.Recipient())
	}
	close(stop)
	<-stopped
	dir := t.TempDir()
	if _, err := Restore(ctx, options(t, file(t, out.Bytes()), dir, id)); err != nil {
		t.Fatal(err)
	}
	fresh := open(t, dir)
	fresh.client = old.client
	waitForActs(t, fresh)
	var c *kms.Confirmation
	errors.As(fresh.Release(ctx, root(), ""), &c)
	if err := fresh.Release(ctx, root(), c.Hash); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fresh.get(t, before), old.get(t, before)) {
		t.Error("another key")
	}
	ids, total, err := fresh.session(t).Locate(ctx, kms.Query{})
	if err != nil || total < 1 {
		t.Fatalf("%d keys, %v", total, err)
	}
	for _, id := range ids {
		if !bytes.Equal(fresh.get(t, id), old.get(t, id)) {
			t.Errorf("another key %s", id)
		}
	}
}

// TestKilled: whatever step a restore dies at, the folder is complete or can be
// restored to again, and a key server does not start in a half of it.
func TestKilled(t *testing.T) {
	ctx := t.Context()
	old := open(t, t.TempDir())
	k := old.create(t, "key")
	id := identity(t)
	var out bytes.Buffer
	write(t, old, &out, id.Recipient())
	path := file(t, out.Bytes())
	died := errors.New("died")
	steps := []string{"build", "root keys", "records", "move crk.sealed", "move store", "tidy"}
	for _, at := range steps {
		t.Run(at, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "kms")
			o := options(t, path, dir, id)
			met := false
			o.step = func(name string) error {
				if name == at {
					met = true
					return died
				}
				return nil
			}
			if _, err := Restore(ctx, o); !errors.Is(err, died) || !met {
				t.Fatalf("%v", err)
			}
			complete := at == "tidy"
			if Interrupted(dir) == complete {
				t.Errorf("Interrupted says %v", !complete)
			}
			o.step = nil
			_, err := Restore(ctx, o)
			switch {
			case complete && !errors.Is(err, ErrNotEmpty):
				t.Errorf("over a complete restore: %v", err)
			case !complete && err != nil:
				t.Fatal(err)
			}
			if Interrupted(dir) {
				t.Error("it is still interrupted")
			}
			if names, err := os.ReadDir(dir); err != nil || len(names) != 2 {
				t.Errorf("the folder holds %v", names)
			}
			fresh := open(t, dir)
			fresh.client = old.client
			waitForActs(t, fresh)
			var c *kms.Confirmation
			errors.As(fresh.Release(ctx, root(), ""), &c)
			if err := fresh.Release(ctx, root(), c.Hash); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(fresh.get(t, k), old.get(t, k)) {
				t.Error("another key")
			}
			fresh.close()
		})
	}
	// Anything else in the folder is left alone.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "crk.sealed"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(ctx, options(t, path, dir, id)); !errors.Is(err, ErrNotEmpty) || !strings.Contains(err.Error(), "crk.sealed") {
		t.Errorf("a folder with a keyring: %v", err)
	}
}

// TestRefusedWhole: a wrong key or a damaged file is refused before anything is
// written.
func TestRefusedWhole(t *testing.T) {
	ctx := t.Context()
	old := open(t, t.TempDir())
	old.create(t, "key")
	id := identity(t)
	var out bytes.Buffer
	write(t, old, &out, id.Recipient())
	good := out.Bytes()
	try := func(t *testing.T, content []byte, want error, ids ...age.Identity) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "kms")
		path := file(t, content)
		if _, err := Verify(path, ids); !errors.Is(err, want) {
			t.Errorf("verifying: %v, want %v", err, want)
		}
		if _, err := Restore(ctx, options(t, path, dir, ids...)); !errors.Is(err, want) {
			t.Errorf("restoring: %v, want %v", err, want)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Error("something was written")
		}
	}
	for n := 0; n < len(good); n += max(1, len(good)/23) {
		try(t, good[:n], ErrDamaged, id)
	}
	try(t, good[:len(good)-1], ErrDamaged, id)
	for n := len(good) / 2; n < len(good); n += max(1, len(good)/17) {
		bad := slices.Clone(good)
		bad[n] ^= 1
		try(t, bad, ErrDamaged, id)
	}
	try(t, append(slices.Clone(good), 'x'), ErrDamaged, id)
	try(t, []byte("no backup at all"), ErrDamaged, id)
	try(t, good, ErrWrongKey, identity(t))
	pass, err := FromPassphrase(key(t, passphrase))
	if err != nil {
		t.Fatal(err)
	}
	try(t, good, ErrWrongKey, pass)

	// Sealed by a passphrase.
	to, err := ToPassphrase(key(t, passphrase), 10)
	if err != nil {
		t.Fatal(err)
	}
	out = bytes.Buffer{}
	made := write(t, old, &out, to)
	if s, err := Verify(file(t, out.Bytes()), []age.Identity{pass}); err != nil || s.ID != made.ID || s.Revision != made.Revision || s.Objects["default"] != 1 || s.Bytes != int64(out.Len()) {
		t.Errorf("%+v, %v", s, err)
	}
	wrong, err := FromPassphrase(key(t, "another passphrase"))
	if err != nil {
		t.Fatal(err)
	}
	try(t, out.Bytes(), ErrWrongKey, wrong)
	try(t, out.Bytes(), ErrWrongKey, id)
	if _, err := ToPassphrase(key(t, "short"), 10); err == nil {
		t.Error("a short passphrase is taken")
	}

	// A file that only its own keys can have made, and is not right inside.
	for name, inside := range map[string]string{
		"another file":       "something else, long enough to be read",
		"nothing":            "",
		"no end":             magic + "H\x00\x00\x00\x02{}",
		"records first":      magic + "R\x00\x00\x00\x00",
		"unknown frame":      magic + "H\x00\x00\x00\x02{}X\x00\x00\x00\x00",
		"a long frame":       magic + "H\xff\xff\xff\xff",
		"more than it says":  magic + "H\x00\x00\x00\x02{}R\x00\x00\x00\x07\x01\x01\x02\x02\x01ab" + `E` + "\x00\x00\x00\x2a" + `{"revision":1,"rootKeys":0,"records":0}    `,
		"something after it": magic + "H\x00\x00\x00\x02{}" + `E` + "\x00\x00\x00\x26" + `{"revision":1,"rootKeys":0,"records":0}` + "x",
		"a broken record":    magic + "H\x00\x00\x00\x02{}R\x00\x00\x00\x03\xff\xff\xff",
	} {
		t.Run(name, func(t *testing.T) { try(t, seal(t, inside, id), ErrDamaged, id) })
	}
	try(t, seal(t, magicWord+" v2\n", id), ErrNewer, id)
	try(t, seal(t, magicWord+" v2\nand more", id), ErrNewer, id)
}

// seal makes an age file of text.
func seal(t testing.TB, text string, id *age.X25519Identity) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := age.Encrypt(&out, id.Recipient())
	if err == nil {
		_, err = io.WriteString(w, text)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestStandardAge: the age of the distribution opens the outer layer, and makes
// keys for it.
func TestStandardAge(t *testing.T) {
	if _, err := exec.LookPath("age"); err != nil {
		t.Fatalf("age is missing (install Debian's age): %v", err)
	}
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	if text, err := exec.Command("age-keygen", "-o", keys).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	recipient, err := exec.Command("age-keygen", "-y", keys).Output()
	if err != nil {
		t.Fatal(err)
	}
	to, err := ToRecipients([]string{string(recipient)})
	if err != nil {
		t.Fatal(err)
	}
	old := open(t, t.TempDir())
	id := old.create(t, "a name that only sealed records have")
	var out bytes.Buffer
	write(t, old, &out, to...)
	path := file(t, out.Bytes())
	plain, err := exec.Command("age", "-d", "-i", keys, path).Output()
	if err != nil || !strings.HasPrefix(string(plain), magic) || !bytes.Contains(plain, []byte(id)) {
		t.Fatalf("age -d: %v, %d bytes", err, len(plain))
	}
	if bytes.Contains(plain, old.get(t, id)) || bytes.Contains(plain, []byte("a name that only sealed records have")) {
		t.Error("a record is in clear inside")
	}
	text, err := os.ReadFile(keys)
	if err != nil {
		t.Fatal(err)
	}
	ids, err := FromIdentities(text)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(path, ids); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "age1x", string(bytes.TrimSpace(bytes.Split(text, []byte("\n"))[2]))} {
		if _, err := ToRecipients([]string{bad}); err == nil || strings.Contains(err.Error(), "SECRET-KEY-1") {
			t.Errorf("recipient %q: %v", bad, err)
		}
	}
}

func TestAftermathRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON":       "hello",
		"another field": `{"operation":"Create","time":"2026-01-02T03:04:05Z","result":"Success","surprise":1}`,
		"no time":       `{"operation":"Create","result":"Success"}`,
		"nothing":       "\n\n",
		"heads only":    `{"v":1,"hash":"00"}`,
		"a long line":   `{"operation":"` + strings.Repeat("x", maxLine) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			var a Aftermath
			if err := a.AddAudit("audit.jsonl", strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), "audit.jsonl") {
				t.Errorf("%v", err)
			}
		})
	}
}

// FuzzParse: no bytes inside a backup panic, and what is accepted is written
// again with the same content.
func FuzzParse(f *testing.F) {
	good := func(s string) string { return magic + "H\x00\x00\x00\x02{}" + s }
	f.Add([]byte(good(`E` + "\x00\x00\x00\x27" + `{"revision":1,"rootKeys":0,"records":0}`)))
	f.Add([]byte(good("K\x00\x00\x00\x07\x04filexx" + "R\x00\x00\x00\x09\x02\x01\x02\x02\x01vmaX" + `E` + "\x00\x00\x00\x27" + `{"revision":9,"rootKeys":1,"records":1}`)))
	f.Add([]byte(good("R\x00\x00\x00\x03\xff\xff\xff")))
	f.Add([]byte(magic))
	f.Add([]byte("mortise-kms-backup v2\n......"))
	f.Fuzz(func(t *testing.T, inside []byte) {
		var records []store.Record
		s, err := parse(bytes.NewReader(inside), visitor{
			rootKeys: func(_ string, share *secret.Key) error { _ = share.Len(); return nil },
			record: func(r store.Record) error {
				r.Stored = slices.Clone(r.Stored)
				records = append(records, r)
				return nil
			},
		})
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
				t.Errorf("an error without a kind: %v", err)
			}
			return
		}
		if int64(len(records)) != s.Records {
			t.Errorf("%d records of %d", len(records), s.Records)
		}
	})
}

// FuzzOuter: no file panics.
func FuzzOuter(f *testing.F) {
	id := identity(f)
	f.Add(seal(f, magic, id))
	f.Add([]byte("age-encryption.org/v1\n-> scrypt AAAA 30\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, content []byte) {
		if _, err := read(bytes.NewReader(content), []age.Identity{id}, visitor{}); err == nil {
			t.Error("something that nobody wrote is a backup")
		}
	})
}

// FuzzAftermath: no line of an audit log panics.
func FuzzAftermath(f *testing.F) {
	f.Add([]byte(`{"sequence":1,"time":"2026-01-02T03:04:05Z","member":"a","actor":"socket","operation":"Destroy","object":"x","result":"Success","revision":7}`))
	f.Add([]byte("\x00{"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var a Aftermath
		if a.AddAudit("x", bytes.NewReader(text)) == nil {
			a.quarantine(Summary{Revision: 1}, func(object) bool { return false })
		}
		_ = a.AddHeld("x", bytes.NewReader(text))
	})
}
