package rootkey

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"

	"mortise/internal/secret"
)

const fast = 2 // work factor: 4 rounds

func passphrase(t testing.TB, s string) *secret.Key {
	t.Helper()
	k, err := secret.Copy([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func create(t testing.TB) (*Key, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "root.key")
	k, err := Create(path, passphrase(t, "correct horse"), fast)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k, path
}

func TestCreateOpen(t *testing.T) {
	k, path := create(t)
	blob, err := k.Wrap([]byte("a CRK"), []byte("instance/1"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(path, passphrase(t, "correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Wipe()
	if again.ID() != k.ID() || len(k.ID()) != 32 {
		t.Errorf("ids %q and %q", again.ID(), k.ID())
	}
	got, err := again.Unwrap(blob, []byte("instance/1"))
	if err != nil || string(got) != "a CRK" {
		t.Errorf("Unwrap after Open: %q, %v", got, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	left, _ := os.ReadDir(filepath.Dir(path))
	if len(left) != 1 {
		t.Errorf("Create left %d files, want 1", len(left))
	}
}

// TestNotInClear looks for the key itself, raw and in hexadecimal, in the file.
func TestNotInClear(t *testing.T) {
	k, path := create(t)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	k.key.Use(func(b []byte) {
		if bytes.Contains(text, b) || bytes.Contains(text, fmt.Appendf(nil, "%x", b)) {
			t.Error("the root key is in its file in clear")
		}
	})
}

func TestCreateNeverOverwrites(t *testing.T) {
	_, path := create(t)
	before, _ := os.ReadFile(path)
	if _, err := Create(path, passphrase(t, "other"), fast); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second Create: %v, want ErrExist", err)
	}
	// The link, not only the look before it, refuses.
	if err := writeNew(path, []byte("x")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("writeNew over a file: %v, want ErrExist", err)
	}
	after, _ := os.ReadFile(path)
	if !bytes.Equal(before, after) {
		t.Error("the file changed")
	}
}

// TestConcurrentCreate lets many creators race: one wins, and its key is the
// one in the file.
func TestConcurrentCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.key")
	pass := passphrase(t, "p")
	keys := make([]*Key, 8)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			k, err := Create(path, pass, fast)
			if err != nil && !errors.Is(err, fs.ErrExist) {
				t.Error(err)
			}
			keys[i] = k
		})
	}
	wg.Wait()
	inFile, err := Open(path, pass)
	if err != nil {
		t.Fatal(err)
	}
	var winners int
	for _, k := range keys {
		if k != nil {
			winners++
			if k.ID() != inFile.ID() || !k.key.Equal(inFile.key) {
				t.Error("a winner's key is not the file's")
			}
		}
	}
	if winners != 1 {
		t.Errorf("%d creators won", winners)
	}
}

func TestOpenErrors(t *testing.T) {
	_, path := create(t)
	whole, _ := os.ReadFile(path)
	for _, c := range []struct {
		name string
		pass string
		edit func([]byte) []byte
		want error
	}{
		{"wrong passphrase", "battery staple", nil, ErrWrongPassphrase},
		{"empty file", "correct horse", func([]byte) []byte { return nil }, ErrDamaged},
		{"not ours", "correct horse", func([]byte) []byte { return []byte("hello\n") }, ErrDamaged},
		{"newer", "correct horse", func(b []byte) []byte { return bytes.Replace(b, []byte(" v1\n"), []byte(" v2\n"), 1) }, ErrNewer},
		{"other key id", "correct horse", func(b []byte) []byte {
			i := bytes.Index(b, []byte("key ")) + 4
			return append(append(bytes.Clone(b[:i]), bytes.Repeat([]byte("0"), 32)...), b[i+32:]...)
		}, ErrDamaged},
		{"too long", "correct horse", func(b []byte) []byte { return append(b, make([]byte, maxFile)...) }, ErrDamaged},
		{"sealed to a public key", "correct horse", func(b []byte) []byte {
			f, err := parse(b)
			if err != nil {
				t.Fatal(err)
			}
			f.sealed = sealedToPublicKey(t)
			return f.text()
		}, ErrDamaged},
		{"garbage with a right checksum", "correct horse", func(b []byte) []byte { return file{sealed: []byte("garbage")}.text() }, ErrDamaged},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := bytes.Clone(whole)
			if c.edit != nil {
				data = c.edit(data)
			}
			p := filepath.Join(t.TempDir(), "k")
			if err := os.WriteFile(p, data, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(p, passphrase(t, c.pass))
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if !strings.Contains(err.Error(), p) {
				t.Errorf("%q does not name the file", err)
			}
		})
	}
	if _, err := Open(path+".none", passphrase(t, "x")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func sealedToPublicKey(t *testing.T) []byte {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	armored := armor.NewWriter(&b)
	w, err := age.Encrypt(armored, id.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	w.Write(make([]byte, idLen+keyLen))
	w.Close()
	armored.Close()
	return b.Bytes()
}

// TestEveryDamageIsDamage flips each byte and cuts at each length: never a
// wrong passphrase, never success.
func TestEveryDamageIsDamage(t *testing.T) {
	_, path := create(t)
	whole, _ := os.ReadFile(path)
	pass := passphrase(t, "correct horse")
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 1
		if _, err := unseal(bad, pass); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if _, err := unseal(whole[:i], pass); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
}

func TestUnwrapErrors(t *testing.T) {
	k, _ := create(t)
	other, _ := create(t)
	blob, err := k.Wrap([]byte("secret"), []byte("for a"))
	if err != nil {
		t.Fatal(err)
	}
	if len(blob) != Overhead+6 {
		t.Errorf("blob of %d bytes, want %d", len(blob), Overhead+6)
	}
	if _, err := other.Unwrap(blob, []byte("for a")); !errors.Is(err, ErrOtherKey) {
		t.Errorf("other key: %v", err)
	}
	if _, err := k.Unwrap(blob, []byte("for b")); !errors.Is(err, ErrBlob) {
		t.Errorf("other aad: %v", err)
	}
	for i := range blob {
		bad := bytes.Clone(blob)
		bad[i] ^= 0x80
		if _, err := k.Unwrap(bad, []byte("for a")); !errors.Is(err, ErrBlob) && !errors.Is(err, ErrOtherKey) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if _, err := k.Unwrap(blob[:i], []byte("for a")); !errors.Is(err, ErrBlob) {
			t.Errorf("cut to %d: %v", i, err)
		}
	}
	again, _ := k.Wrap([]byte("secret"), []byte("for a"))
	if bytes.Equal(blob, again) {
		t.Error("two wraps are equal: the nonce repeats")
	}
}

func TestSealOpen(t *testing.T) {
	k, _ := create(t)
	s, err := secret.Random(nil, 64)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	blob, err := k.Seal(s, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	s.Use(func(b []byte) {
		if bytes.Contains(blob, b[:16]) {
			t.Error("key bytes in the blob")
		}
	})
	got, err := k.Open(blob, []byte("x"))
	if err != nil || !got.Equal(s) {
		t.Errorf("Open: %v", err)
	}
	got.Wipe()
	empty, _ := k.Wrap(nil, nil)
	if _, err := k.Open(empty, nil); err == nil {
		t.Error("an empty secret was opened")
	}
}

func TestPassphrase(t *testing.T) {
	dir := t.TempDir()
	put := func(name, content string, mode fs.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := put("good", "from a file\n", 0o600)
	viaEnv := put("env", "from env", 0o400)
	put("cred", "from systemd\r\n", 0o400)
	env := map[string]string{"MORTISE_PASS": viaEnv, "CREDENTIALS_DIRECTORY": dir}
	for _, c := range []struct {
		from PassphraseSource
		want string // prefix "!" for an error text
	}{
		{PassphraseSource{File: good, Env: "MORTISE_PASS", Credential: "cred"}, "from a file"},
		{PassphraseSource{Env: "MORTISE_PASS", Credential: "cred"}, "from env"},
		{PassphraseSource{Env: "UNSET", Credential: "cred"}, "from systemd"},
		{PassphraseSource{Env: "UNSET", Credential: "none"}, "!set UNSET to its path"},
		{PassphraseSource{}, "!name a file"},
		{PassphraseSource{File: put("open", "x", 0o640)}, "!chmod 0600"},
		{PassphraseSource{File: put("world", "x", 0o604)}, "!chmod 0600"},
		{PassphraseSource{File: put("empty", "\n", 0o600)}, "!1 to 1024 bytes"},
		{PassphraseSource{File: put("long", strings.Repeat("x", 1025), 0o600)}, "!1 to 1024 bytes"},
		{PassphraseSource{File: dir}, "!not a regular file"},
		{PassphraseSource{File: filepath.Join(dir, "none"), Credential: "cred"}, "!no such file"},
	} {
		k, err := FindPassphrase(c.from, func(n string) string { return env[n] })
		if msg, bad := strings.CutPrefix(c.want, "!"); bad {
			if err == nil || !strings.Contains(err.Error(), msg) {
				t.Errorf("%+v: %v, want an error with %q", c.from, err, msg)
			}
			continue
		}
		if err != nil {
			t.Errorf("%+v: %v", c.from, err)
			continue
		}
		k.Use(func(b []byte) {
			if string(b) != c.want {
				t.Errorf("%+v: %q, want %q", c.from, b, c.want)
			}
		})
		k.Wipe()
	}
}

func FuzzParse(f *testing.F) {
	good := file{id: [idLen]byte{1, 2}, sealed: []byte("-----BEGIN AGE ENCRYPTED FILE-----\n")}.text()
	f.Add(good)
	f.Add(good[:40])
	f.Add([]byte("mortise-rootkey v2\n\n"))
	f.Add(file{}.text())
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parse(text)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if !bytes.Equal(got.text(), text) {
			t.Fatalf("parse then print: %q, was %q", got.text(), text)
		}
	})
}

func FuzzUnwrap(f *testing.F) {
	key, err := secret.Copy(bytes.Repeat([]byte{7}, keyLen))
	if err != nil {
		f.Fatal(err)
	}
	k := &Key{id: [idLen]byte{1}, key: key}
	good, err := k.Wrap([]byte("plaintext"), []byte("aad"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, []byte("aad"))
	f.Add(good[:Overhead], []byte("aad"))
	f.Add(good, []byte(""))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, blob, aad []byte) {
		plain, err := k.Unwrap(blob, aad)
		if err == nil && (string(aad) != "aad" || string(plain) != "plaintext") { // fuzzing processes share the key, not the nonce
			t.Fatalf("forged: %x %q", blob, aad)
		}
		if err != nil && !errors.Is(err, ErrBlob) && !errors.Is(err, ErrOtherKey) {
			t.Fatalf("untyped error %v", err)
		}
	})
}

func BenchmarkWrap(b *testing.B) {
	k, _ := create(b)
	crk := make([]byte, 32)
	for b.Loop() {
		if _, err := k.Wrap(crk, []byte("instance/1")); err != nil {
			b.Fatal(err)
		}
	}
}
