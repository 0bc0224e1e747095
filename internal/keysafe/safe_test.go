package keysafe

import (
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
