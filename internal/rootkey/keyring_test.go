package rootkey

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"mortise/internal/secret"
)

func random(t testing.TB, n int) *secret.Key {
	t.Helper()
	k, err := secret.Random(nil, n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func keyring(t testing.TB) (*Keyring, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "crk.sealed")
	k, err := CreateKeyring(path, Passphrase(passphrase(t, "correct horse"), fast))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k, path
}

func reload(t testing.TB, path, pass string) *Keyring {
	t.Helper()
	k, err := LoadKeyring(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	if pass != "" {
		if err := k.Unlock(Passphrase(passphrase(t, pass), fast)); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

func mustCreate(t testing.TB, k *Keyring) string {
	t.Helper()
	id := freshID()
	if err := k.Create(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	return id
}

func freshID() string {
	var raw [idLen]byte
	rand.Read(raw[:])
	return hexID(raw)
}

// opens tells whether k opens blob and gets want.
func opens(t testing.TB, k *Keyring, id string, blob []byte, want *secret.Key) error {
	t.Helper()
	got, err := k.Open(context.Background(), id, blob, []byte("for"))
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !got.Equal(want) {
		return errors.New("it opens to something else")
	}
	return nil
}

// TestKeyring follows CRKs through creation, import, restart and destruction.
func TestKeyring(t *testing.T) {
	ctx := t.Context()
	k, path := keyring(t)
	if k.Kind() != "file" || !slices.Equal(k.SealedBy(), []string{"passphrase"}) {
		t.Errorf("kind %s, sealed by %s", k.Kind(), k.SealedBy())
	}
	a, imported := mustCreate(t, k), random(t, 32)
	b := freshID()
	err := k.Import(ctx, b, imported)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Import(ctx, freshID(), random(t, 16)); err == nil {
		t.Error("a key of 16 bytes was imported")
	}
	for _, id := range []string{a, b} { // an id is used once
		if err := errors.Join(k.Create(ctx, id), k.Import(ctx, id, random(t, 32))); !errors.Is(err, ErrKeyExists) {
			t.Errorf("a second key %s: %v", id, err)
		}
	}
	for _, id := range []string{"", "x", a[:31], a + "0", strings.ToUpper(strings.Repeat("ab", 16))} {
		if k.Create(ctx, id) == nil || k.Import(ctx, id, random(t, 32)) == nil {
			t.Errorf("a key called %q was made", id)
		}
	}
	key := random(t, 32)
	blobs := map[string][]byte{}
	for _, id := range []string{a, b} {
		if blobs[id], err = k.Seal(ctx, id, key, []byte("for")); err != nil {
			t.Fatal(err)
		}
	}
	if err := opens(t, k, a, blobs[b], key); !errors.Is(err, ErrOtherKey) {
		t.Errorf("another CRK's blob: %v", err)
	}

	locked := reload(t, path, "")
	if list, _ := locked.List(ctx); len(list) != 0 || len(locked.InFile()) != 2 {
		t.Errorf("a locked keyring lists %v, in file %v", list, locked.InFile())
	}
	if err := opens(t, locked, a, blobs[a], key); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("opening with a locked keyring: %v", err)
	}
	again := reload(t, path, "correct horse")
	list, _ := again.List(ctx)
	if want := []string{min(a, b), max(a, b)}; !slices.Equal(list, want) {
		t.Errorf("after a restart: %v, want %v", list, want)
	}
	for id, blob := range blobs {
		if err := opens(t, again, id, blob, key); err != nil {
			t.Errorf("after a restart: %v", err)
		}
	}
	want, _ := CheckValue(imported)
	if got, err := again.CheckValue(ctx, b); err != nil || got != want {
		t.Errorf("check value %q, %v; want %q", got, err, want)
	}

	if err := again.Destroy(ctx, a); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{a, "", "no id", strings.Repeat("0", 32)} { // unknown ones are gone already
		if err := again.Destroy(ctx, id); err != nil {
			t.Errorf("destroying %q: %v", id, err)
		}
	}
	for what, r := range map[string]*Keyring{"at once": again, "after a restart": reload(t, path, "correct horse")} {
		if err := opens(t, r, a, blobs[a], key); !errors.Is(err, ErrUnknownKey) {
			t.Errorf("%s, the destroyed CRK: %v", what, err)
		}
		if err := opens(t, r, b, blobs[b], key); err != nil {
			t.Errorf("%s, the other one: %v", what, err)
		}
	}
}

// TestKeyCheckValue: FIPS 197 appendix C.3's key under PKCS#11's rule; the value
// is from openssl enc -aes-256-ecb over 16 zero bytes.
func TestKeyCheckValue(t *testing.T) {
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(i)
	}
	k, err := secret.Take(b)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := CheckValue(k); err != nil || v != "f29000" {
		t.Errorf("%q, %v", v, err)
	}
}

// TestAdopt: a member that nobody gave the passphrase gets CRKs from a peer,
// keeps them in its own file, and loses none that only its file has.
func TestAdopt(t *testing.T) {
	ctx := t.Context()
	peer, _ := keyring(t)
	shared := mustCreate(t, peer)
	own, path := keyring(t)
	lonely := mustCreate(t, own)
	key := random(t, 32)
	blob, err := peer.Seal(ctx, shared, key, []byte("for"))
	if err != nil {
		t.Fatal(err)
	}

	locked := reload(t, path, "")
	share, err := peer.Share(ctx, []string{shared, lonely, "nonsense"})
	if err != nil {
		t.Fatal(err)
	}
	defer share.Wipe()
	for range 2 { // twice is once
		if err := locked.Adopt(ctx, share); err != nil {
			t.Fatal(err)
		}
	}
	if err := opens(t, locked, shared, blob, key); err != nil {
		t.Errorf("after Adopt: %v", err)
	}
	third := mustCreate(t, locked)
	all := reload(t, path, "correct horse")
	list, _ := all.List(ctx)
	want := []string{shared, lonely, third}
	slices.Sort(want)
	if !slices.Equal(list, want) {
		t.Errorf("in the file: %v, want %v", list, want)
	}
	if err := opens(t, all, shared, blob, key); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if err := locked.Unlock(Passphrase(passphrase(t, "correct horse"), fast)); err != nil {
		t.Errorf("unlocking what is half open: %v", err)
	}
	if list, _ := locked.List(ctx); !slices.Equal(list, want) {
		t.Errorf("after Unlock: %v, want %v", list, want)
	}

	none, err := peer.Share(ctx, nil)
	if err != nil || locked.Adopt(ctx, none) != nil {
		t.Errorf("an empty share: %v", err)
	}
	if _, err := peer.Share(ctx, make([]string, MaxShare+1)); err == nil {
		t.Error("a share of too many")
	}
	for name, text := range map[string]string{
		"version": "\x02", "length": "\x01short",
		"twice": "\x01" + strings.Repeat("i", 16) + strings.Repeat("k", 32) + strings.Repeat("i", 16) + strings.Repeat("k", 32),
	} {
		if err := locked.Adopt(ctx, passphrase(t, text)); !errors.Is(err, ErrShare) {
			t.Errorf("%s: %v", name, err)
		}
	}
	raw, _ := parseID(shared)
	other := passphrase(t, "\x01"+string(raw[:])+strings.Repeat("k", 32))
	if err := locked.Adopt(ctx, other); err == nil || !strings.Contains(err.Error(), "other bytes") {
		t.Errorf("another key of the same id: %v", err)
	}
}

func TestReseal(t *testing.T) {
	ctx := t.Context()
	k, path := keyring(t)
	id, key := mustCreate(t, k), random(t, 32)
	blob, err := k.Seal(ctx, id, key, []byte("for"))
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := Passphrase(passphrase(t, "correct horse"), fast), Passphrase(passphrase(t, "battery staple"), fast)
	if err := k.Reseal(fresh, old); !errors.Is(err, ErrWrongPassphrase) {
		t.Errorf("with the wrong old passphrase: %v", err)
	}
	if err := k.Reseal(old, fresh); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, k, id, blob, key); err != nil {
		t.Errorf("while it goes on: %v", err)
	}
	late := mustCreate(t, k)
	again := reload(t, path, "battery staple")
	if err := opens(t, again, id, blob, key); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	locked := reload(t, path, "")
	if err := locked.Unlock(old); !errors.Is(err, ErrWrongPassphrase) {
		t.Errorf("the old passphrase: %v", err)
	}
	// The ring key of the old file does not open what the new one holds.
	was, err := parseRing(before)
	if err != nil {
		t.Fatal(err)
	}
	private, err := was.private(old)
	if err != nil {
		t.Fatal(err)
	}
	now := again.ring
	raw, _ := parseID(late)
	if _, err := now.entries[now.find(raw)].open(private); err == nil {
		t.Error("an old copy and the old passphrase open a new CRK")
	}
}

// otherWay is a second way into a keyring, made of a passphrase.
type otherWay struct{ Sealing }

func (otherWay) Method() string { return "other" }

func TestTwoWaysIn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crk.sealed")
	one, two := Passphrase(passphrase(t, "one"), fast), otherWay{Passphrase(passphrase(t, "two"), fast)}
	if _, err := CreateKeyring(path, one, one); err == nil {
		t.Error("sealed twice in one way")
	}
	if _, err := CreateKeyring(path); err == nil {
		t.Error("sealed in no way")
	}
	k, err := CreateKeyring(path, two, one)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	id := mustCreate(t, k)
	open := func(s Sealing) error {
		t.Helper()
		again := reload(t, path, "")
		if err := again.Unlock(s); err != nil {
			return err
		}
		if list, _ := again.List(t.Context()); !slices.Equal(list, []string{id}) {
			t.Errorf("opened %v", list)
		}
		return nil
	}
	for _, s := range []Sealing{one, two} {
		if err := open(s); err != nil {
			t.Errorf("%s: %v", s.Method(), err)
		}
	}
	if err := k.Reseal(two, one); err != nil {
		t.Fatal(err)
	}
	if err := open(two); !errors.Is(err, ErrSealedOtherwise) {
		t.Errorf("by the way that was closed: %v", err)
	}
	if err := open(one); err != nil {
		t.Error(err)
	}
}

// TestKeyringInClear looks for CRKs and the passphrase in the file.
func TestKeyringInClear(t *testing.T) {
	k, path := keyring(t)
	id := mustCreate(t, k)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	k.open[id].key.Use(func(b []byte) {
		if bytes.Contains(text, b) || bytes.Contains(text, fmt.Appendf(nil, "%x", b)) {
			t.Error("a CRK is in the file in clear")
		}
	})
	if st, _ := os.Stat(path); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if _, err := CreateKeyring(path, Passphrase(passphrase(t, "x"), fast)); !errors.Is(err, fs.ErrExist) {
		t.Errorf("creating over it: %v", err)
	}
}

// TestOldBlocks: what a rewrite replaces is zeroed, unless somebody linked it.
func TestOldBlocks(t *testing.T) {
	k, path := keyring(t)
	mustCreate(t, k)
	old, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	mustCreate(t, k)
	b := make([]byte, 64)
	if n, err := old.Read(b); err != nil || !bytes.Equal(b[:n], make([]byte, n)) {
		t.Errorf("the replaced file still begins with %q, %v", b, err)
	}
	linked := path + ".linked"
	if err := os.Link(path, linked); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, k)
	if got := reload(t, linked, "correct horse").InFile(); len(got) != 2 {
		t.Errorf("a linked copy holds %v", got)
	}
}

func TestKeyringDamage(t *testing.T) {
	k, path := keyring(t)
	id := mustCreate(t, k)
	whole, _ := os.ReadFile(path)
	for i := 0; i < len(whole); i += 7 {
		bad := bytes.Clone(whole)
		bad[i] ^= 1
		if _, err := parseRing(bad); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if _, err := parseRing(whole[:i]); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
	pass := Passphrase(passphrase(t, "correct horse"), fast)
	foreign, err := newRing([]Sealing{pass})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		edit func(*ring)
		with Sealing
		want error
		says string
	}{
		{"wrong passphrase", func(*ring) {}, Passphrase(passphrase(t, "battery staple"), fast), ErrWrongPassphrase, ""},
		{"other method", func(r *ring) { r.seals[0].method = "tpm" }, pass, ErrSealedOtherwise, "by tpm, and not by passphrase"},
		{"other public key", func(r *ring) { r.public = foreign.public }, pass, ErrDamaged, "public key line"},
		{"moved entry", func(r *ring) { r.entries[0].id[0] ^= 1 }, pass, ErrDamaged, "does not open"},
		{"cut entry", func(r *ring) { r.entries[0].sealed = r.entries[0].sealed[:5] }, pass, ErrDamaged, "does not open"},
		{"no age file", func(r *ring) { r.seals[0].sealed = []byte("x") }, pass, ErrDamaged, ""},
	} {
		r, err := parseRing(whole)
		if err != nil {
			t.Fatal(err)
		}
		c.edit(&r)
		if err := os.WriteFile(path, r.text(), 0o600); err != nil {
			t.Fatal(err)
		}
		bad, err := LoadKeyring(path)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if err := bad.Unlock(c.with); !errors.Is(err, c.want) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v with %q", c.name, err, c.want, c.says)
		}
		if list, _ := bad.List(t.Context()); len(list) != 0 {
			t.Errorf("%s: something is open", c.name)
		}
	}
	if err := os.WriteFile(path, bytes.Replace(whole, []byte(" v1\n"), []byte(" v2\n"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeyring(path); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer file: %v", err)
	}
	if _, err := LoadKeyring(path + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	_ = id
}

// TestKeyringRace uses, creates and destroys CRKs at once.
func TestKeyringRace(t *testing.T) {
	ctx := t.Context()
	k, path := keyring(t)
	keep, key := mustCreate(t, k), random(t, 32)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 5 {
				id := freshID()
				if err := k.Create(ctx, id); err != nil {
					t.Error(err)
					return
				}
				for _, with := range []string{keep, id} {
					blob, err := k.Seal(ctx, with, key, []byte("for"))
					if err == nil {
						err = opens(t, k, with, blob, key)
					}
					if err != nil {
						t.Error(err)
					}
				}
				if err := k.Destroy(ctx, id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if got := reload(t, path, "correct horse").InFile(); !slices.Equal(got, []string{keep}) {
		t.Errorf("left in the file: %v, want %s", got, keep)
	}
}

func FuzzParseRing(f *testing.F) {
	r := ring{seals: []sealedKey{{"passphrase", []byte("sealed")}}, public: []byte("public")}
	f.Add(r.text())
	r.seals = append(r.seals, sealedKey{"tpm", []byte("blob")})
	f.Add(r.text())
	r.entries = []entry{{[idLen]byte{1}, []byte("one")}, {[idLen]byte{2}, []byte("two")}}
	f.Add(r.text())
	f.Add(r.text()[:40])
	f.Add([]byte("mortise-keyring v2\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parseRing(text)
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

func FuzzParseShare(f *testing.F) {
	f.Add([]byte{shareVersion})
	f.Add(append([]byte{shareVersion}, make([]byte, idLen+keyLen)...))
	f.Add([]byte("\x01short"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) == 0 || len(text) > secret.MaxLen {
			return
		}
		share, err := secret.Copy(text)
		if err != nil {
			t.Fatal(err)
		}
		defer share.Wipe()
		keys, err := parseShare(share)
		if err != nil && !errors.Is(err, ErrShare) {
			t.Fatal(err)
		}
		if err == nil && len(text) != 1+len(keys)*(idLen+keyLen) {
			t.Fatalf("%d keys of %d bytes", len(keys), len(text))
		}
		for _, k := range keys {
			k.Wipe()
		}
	})
}
