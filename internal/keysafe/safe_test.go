package keysafe

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/secret"
)

func key(t testing.TB, n int) *secret.Key {
	t.Helper()
	k, err := secret.Random(nil, n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func diskBinding() Binding {
	return Binding{VM: uuid.MustParse("564d0102-0304-0506-0708-090a0b0c0d0e"), Disk: uuid.MustParse("6000c293-7ba0-3a03-9f22-56c52993b727"),
		Role: RoleDisk, Cipher: CipherXTS, UnitSize: 4096}
}

var (
	idA = KeyID{"kms-a", "key-1"}
	idB = KeyID{"Schlüssel/Dienst (b)", "0b,1%"}
)

func TestWrapPrintParseUnwrap(t *testing.T) {
	b, dek, set := diskBinding(), key(t, 64), KEKSet{idA: key(t, 32), idB: key(t, 32)}
	s, err := Wrap(nil, b, idA, set[idA], dek)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = s.With(nil, b, idB, set[idB], dek); err != nil {
		t.Fatal(err)
	}
	text := s.String()
	if !strings.HasPrefix(text, "mortise:key/v1/list/(pair/(fqid/kms-a/key-1,AES-256-GCM,") || !strings.Contains(text, "fqid/Schl%C3%BCssel%2FDienst%20%28b%29/0b%2C1%25,") {
		t.Errorf("text %q", text)
	}
	p, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if p.String() != text {
		t.Errorf("%q prints as %q", text, p)
	}
	for _, id := range p.KeyIDs() {
		got, by, err := p.Unwrap(b, KEKSet{id: set[id]})
		if err != nil || by != id || !got.Equal(dek) {
			t.Errorf("unwrap with %s: by %s, %v", id, by, err)
		}
		got.Wipe()
	}
	var locked *KeysRequiredError
	if _, _, err := p.Unwrap(b, KEKSet{}); !errors.As(err, &locked) || len(locked.Required) != 2 || locked.Required[1] != idB {
		t.Errorf("without keys: %v", err)
	}
}

// TestBindingIsUnambiguous: a pair opens for its own binding and no other.
func TestBindingIsUnambiguous(t *testing.T) {
	b, dek, kek := diskBinding(), key(t, 64), key(t, 32)
	s, err := Wrap(nil, b, idA, kek, dek)
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*Binding)) Binding { c := b; f(&c); return c }
	for name, other := range map[string]Binding{
		"another VM":   change(func(c *Binding) { c.VM[3]++ }),
		"another disk": change(func(c *Binding) { c.Disk[3]++ }),
		"another role": change(func(c *Binding) { c.Role, c.Disk = RoleFile, uuid.Nil }),
		"a name":       change(func(c *Binding) { c.Name = "x" }),
		"unit size":    change(func(c *Binding) { c.UnitSize = 512 }),
		"cipher":       change(func(c *Binding) { c.Cipher = CipherGCM }),
	} {
		var tampered *TamperedError
		if _, _, err := s.Unwrap(other, KEKSet{idA: kek}); !errors.As(err, &tampered) {
			t.Errorf("%s: %v, want TamperedError", name, err)
		}
	}
	// The same blob under another key id, with the same KEK.
	moved := Safe{[]pair{{KeyID{"kms", "-akey-1"}, s.pairs[0].blob}}}
	if _, _, err := moved.Unwrap(b, KEKSet{moved.pairs[0].id: kek}); err == nil {
		t.Error("the blob opened under another key id")
	}
	for name, bad := range map[string]Binding{
		"no VM": change(func(c *Binding) { c.VM = uuid.Nil }), "no disk": change(func(c *Binding) { c.Disk = uuid.Nil }),
		"unknown role": change(func(c *Binding) { c.Role = "x" }), "unknown cipher": change(func(c *Binding) { c.Cipher = "ROT-13" }),
	} {
		if _, err := Wrap(nil, bad, idA, kek, dek); err == nil {
			t.Errorf("%s: wrapped", name)
		}
	}
}

// TestEveryFlippedBitIsFound edits each character of a safe's text: none may give
// the DEK for a changed text.
func TestEveryFlippedBitIsFound(t *testing.T) {
	b, dek, kek := diskBinding(), key(t, 64), key(t, 32)
	s, err := Wrap(nil, b, idA, kek, dek)
	if err != nil {
		t.Fatal(err)
	}
	text := s.String()
	for i := range len(text) {
		for bit := range 7 {
			edited := []byte(text)
			edited[i] ^= 1 << bit
			p, err := Parse(string(edited))
			if err != nil {
				continue
			}
			// Whatever id the edit names, the cache has the same KEK for it.
			if k, _, err := p.Unwrap(b, KEKSet{p.pairs[0].id: kek}); err == nil {
				k.Wipe()
				t.Fatalf("%q opens", edited)
			}
		}
	}
	for n := range len(text) {
		if _, err := Parse(text[:n]); err == nil {
			t.Errorf("cut to %d bytes it parses", n)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	blob := strings.Repeat("A", (12+64+16)*4/3+1)
	ok := "mortise:key/v1/list/(pair/(fqid/p/k,AES-256-GCM," + blob + "))"
	if _, err := Parse(ok); err != nil {
		t.Fatal(err)
	}
	rep := func(old, new string) string { return strings.Replace(ok, old, new, 1) }
	for _, text := range []string{
		"", "mortise:key/", rep("v1", "v2"), rep("list", "pair"), rep("p/k", "/k"), rep("p/k", "p/"), rep("p/k", "p%/k"), rep("p/k", "%41/k"), rep("p/k", "%2f/k"),
		rep("p/k", "p/%FF"), rep("p/k", "p/%00"), rep("GCM", "CBC"), rep("AAAA", "AAA="), rep("AAAA", "AA\nAA"), rep("AAAA", ""), ok + " ", ok + ")", rep("))", ")"), rep("))", ",))"),
		rep("pair/(fqid/p/k,AES-256-GCM,"+blob+")", ""), rep("p/k", strings.Repeat("p", 256)+"/k"),
		"mortise:key/v1/list/(" + strings.Repeat("pair/(fqid/p/k,AES-256-GCM,"+blob+"),", 2) + ")",
		strings.Repeat("x", MaxText+1),
	} {
		var syntax *SyntaxError
		if _, err := Parse(text); !errors.As(err, &syntax) {
			t.Errorf("Parse(%.80q): %v, want SyntaxError", text, err)
		}
	}
	// VMware's own, from the examples of govmomi's crypto package.
	var vmware *ForeignError
	if _, err := Parse("vmware:key/list/(pair/(fqid/<VMWARE-NULL>/local/ASEAAgEA,HMAC%2dSHA%2d256,kIc7z%2fJo))"); !errors.As(err, &vmware) || !strings.Contains(err.Error(), "decrypt the VM there") {
		t.Errorf("VMware's safe: %v, want ForeignError with the way in", err)
	}
}

// TestShallowRecrypt walks rule R1, with an interruption after each step.
func TestShallowRecrypt(t *testing.T) {
	b, dek := diskBinding(), key(t, 64)
	set := KEKSet{idA: key(t, 32), idB: key(t, 32)}
	old, err := Wrap(nil, b, idA, set[idA], dek)
	if err != nil {
		t.Fatal(err)
	}
	var locked *KeysRequiredError
	if _, err := old.Rewrap(nil, b, KEKSet{idA: set[idA]}, idB); !errors.As(err, &locked) || locked.Required[0] != idB {
		t.Errorf("without the new KEK: %v", err)
	}
	if _, err := old.Rewrap(nil, b, KEKSet{idB: set[idB]}, idB); !errors.As(err, &locked) || locked.Required[0] != idA {
		t.Errorf("without the old KEK: %v", err)
	}
	both, err := old.Rewrap(nil, b, set, idB)
	if err != nil {
		t.Fatal(err)
	}
	if err := both.Prove(b, set); err != nil {
		t.Error(err)
	}
	again, err := both.Rewrap(nil, b, set, idB)
	if err != nil || again.String() != both.String() {
		t.Errorf("a repeated Rewrap changed the safe: %v", err)
	}
	last, err := both.Only(idB)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := last.Unwrap(b, KEKSet{idB: set[idB]})
	if err != nil || !got.Equal(dek) {
		t.Errorf("after the recrypt: %v", err)
	}
	if _, err := last.Without(idB); err == nil {
		t.Error("the last pair was dropped")
	}
	if _, err := last.Only(idA); err == nil {
		t.Error("every pair was dropped")
	}
	if len(old.pairs) != 1 || len(both.pairs) != 2 {
		t.Error("a safe was changed in place")
	}

	// Two pairs that hold different keys are not proven.
	other, err := old.With(nil, b, idB, set[idB], key(t, 64))
	if err != nil {
		t.Fatal(err)
	}
	var tampered *TamperedError
	if err := other.Prove(b, set); !errors.As(err, &tampered) {
		t.Errorf("pairs of different keys: %v", err)
	}
	if _, err := other.Rewrap(nil, b, set, idB); !errors.As(err, &tampered) {
		t.Errorf("rewrap with pairs of different keys: %v", err)
	}
	if err := both.Prove(b, KEKSet{idA: set[idA]}); !errors.As(err, &locked) {
		t.Errorf("proven without a KEK: %v", err)
	}
}

// TestWrongKeys: a KEK or DEK of another length is an error, no panic.
func TestWrongKeys(t *testing.T) {
	b := diskBinding()
	if _, err := Wrap(nil, b, idA, key(t, 16), key(t, 64)); err == nil {
		t.Error("a KEK of 16 bytes was used")
	}
	if _, err := Wrap(nil, b, idA, key(t, 32), key(t, 32)); err == nil {
		t.Error("a DEK of 32 bytes was wrapped for XTS-AES-256")
	}
	s, _ := Wrap(nil, b, idA, key(t, 32), key(t, 64))
	if _, _, err := s.Unwrap(b, KEKSet{idA: key(t, 64)}); err == nil {
		t.Error("a KEK of 64 bytes opened something")
	}
	var missing *MissingError
	if _, _, err := (Safe{}).Unwrap(b, KEKSet{}); !errors.As(err, &missing) {
		t.Errorf("the zero safe: %v", err)
	}
	if err := (Safe{}).Prove(b, KEKSet{}); !errors.As(err, &missing) {
		t.Errorf("proving the zero safe: %v", err)
	}
}

const macVector = "87b55bc6e64b8ed7cf0d08984dd434dd887c94be2f0baa95d95460f6d7a9acf3"

// TestMACVector compares with HKDF and HMAC of OpenSSL 3:
//
//	openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt hexkey:$(64 × 0b) -kdfopt info:test -kdfopt mode:EXTRACT_AND_EXPAND HKDF
//	printf '\0\0\0\1\0\0\0\1a\0\0\0\2bc' | openssl mac -digest SHA256 -macopt hexkey:… HMAC
func TestMACVector(t *testing.T) {
	dek, err := secret.Take(bytes.Repeat([]byte{0x0b}, 64))
	if err != nil {
		t.Fatal(err)
	}
	defer dek.Wipe()
	m, err := NewMAC(dek, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Wipe()
	sum := m.Sum(Line{"a", "bc"})
	if got := hex.EncodeToString(sum[:]); got != macVector {
		t.Errorf("MAC %s, want %s", got, macVector)
	}
	for _, lines := range [][]Line{{{"ab", "c"}}, {{"a", "bc"}, {"", ""}}, {}, {{"a", "b"}, {"c", ""}}} {
		if m.Verify(sum[:], lines...) {
			t.Errorf("%v has the same MAC", lines)
		}
	}
	if !m.Verify(sum[:], Line{"a", "bc"}) || m.Verify(sum[:31], Line{"a", "bc"}) || m.Verify(nil, Line{"a", "bc"}) {
		t.Error("Verify is wrong")
	}
	other, _ := NewMAC(dek, "test2")
	defer other.Wipe()
	if other.Verify(sum[:], Line{"a", "bc"}) {
		t.Error("another info gives the same MAC")
	}
}

func FuzzParse(f *testing.F) {
	blob := strings.Repeat("A", (12+64+16)*4/3+1)
	f.Add("mortise:key/v1/list/(pair/(fqid/p/k,AES-256-GCM," + blob + "))")
	f.Add("mortise:key/v1/list/(pair/(fqid/a%2Fb/k,AES-256-GCM," + blob + "),pair/(fqid/a/%25,AES-256-GCM," + strings.Repeat("_", 80) + "))")
	f.Add("mortise:key/v1/list/(pair/(fqid/p/k,AES-256-GCM,AAAA")
	f.Add("vmware:key/list/(pair/(fqid/<VMWARE-NULL>/local/x,HMAC-SHA-256,AA))")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			return
		}
		if s.String() != text {
			t.Fatalf("%q prints as %q", text, s)
		}
		if s.Empty() || len(s.KeyIDs()) > MaxPairs {
			t.Fatalf("%q has %d pairs", text, len(s.pairs))
		}
	})
}
