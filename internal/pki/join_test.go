package pki

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func joinToken(t testing.TB) *JoinToken {
	t.Helper()
	return must(NewJoinToken(Identity{RoleHost, "host-1"}, authority(t).Certificate(), time.Hour, now))(t)
}

func TestJoinTokenText(t *testing.T) {
	tok := joinToken(t)
	text := tok.Text()
	if !strings.HasPrefix(text, "mortise-join:v1:") || len(text) > maxJoinText {
		t.Errorf("text %q", text)
	}
	back := must(ParseJoinToken("  " + text + "\n"))(t)
	if *back != *tok {
		t.Errorf("%+v came back as %+v", tok, back)
	}
	for _, s := range []string{fmt.Sprint(tok), fmt.Sprintf("%+v %#v %s", tok, tok, tok)} {
		if strings.Contains(s, tok.Secret()) || strings.Contains(s, fmt.Sprint(tok.secret[:3])) || !strings.Contains(s, "host-1") {
			t.Errorf("printed %q", s)
		}
	}
	other := joinToken(t)
	if other.Secret() == tok.Secret() {
		t.Error("two tokens share a secret")
	}
}

func TestParseJoinTokenErrors(t *testing.T) {
	text := joinToken(t).Text()
	bad := map[string]string{
		"":                     "begins with",
		"hello":                "begins with",
		"mortise-join:v2:AAAA": "version",
		"mortise-join:v1:":     "cut off",
		"mortise-join:v1:!!":   "cut off",
		text + "A":             "cut off",
		strings.Replace(text, ":v1:", ":v1:A", 1): "cut off",
		text + strings.Repeat("A", 1000):          "too long",
	}
	for i := len(joinPrefix) + len(joinV1); i < len(text); i++ {
		bad[text[:i]] = "cut off"
		flip := []byte(text)
		flip[i] ^= 1
		bad[string(flip)] = ""
	}
	for s, want := range bad {
		_, err := ParseJoinToken(s)
		if !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
		if err != nil && len(s) > 30 && strings.Contains(err.Error(), s[20:30]) {
			t.Errorf("the error quotes the token: %v", err)
		}
	}
}

func TestJoinRecord(t *testing.T) {
	tok := joinToken(t)
	stored := must(json.Marshal(tok.Record()))(t)
	if bytes.Contains(stored, []byte(tok.Secret())) {
		t.Error("the record holds the secret")
	}
	var rec JoinRecord
	if err := json.Unmarshal(stored, &rec); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(rec.SecretHash, HashJoinSecret(tok.Secret())) {
		t.Error("a secret does not lead to its record")
	}
	csr, thief := request(t, must(GenerateKey())(t)), request(t, must(GenerateKey())(t))
	forged := *thief
	forged.Signature = append([]byte{}, csr.Signature...)
	for _, c := range []struct {
		name, secret, member string
		at                   time.Time
		want                 error
	}{
		{"wrong secret", joinToken(t).Secret(), "host-1", now, ErrTokenRefused},
		{"no secret", "", "host-1", now, ErrTokenRefused},
		{"other name", tok.Secret(), "host-2", now, ErrTokenRefused},
		{"too late", tok.Secret(), "host-1", now.Add(2 * time.Hour), ErrTokenExpired},
	} {
		if err := rec.Spend(c.secret, c.member, csr, c.at); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if err := rec.Spend(tok.Secret(), "host-1", &forged, now); !errors.Is(err, ErrTokenRefused) {
		t.Errorf("forged request: %v", err)
	}
	if rec.SpentBy != nil {
		t.Fatal("a refused claim spent the token")
	}
	for range 2 { // the second: the first answer was lost
		if err := rec.Spend(tok.Secret(), "host-1", csr, now); err != nil {
			t.Fatal(err)
		}
	}
	if err := rec.Spend(tok.Secret(), "host-1", thief, now); !errors.Is(err, ErrTokenSpent) {
		t.Errorf("second use: %v", err)
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add(joinToken(f).Text())
	f.Add("mortise-join:v1:AAAA")
	f.Add("mortise-join:v2:")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := ParseJoinToken(text)
		if err != nil {
			if !errors.Is(err, ErrToken) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if tok.Text() != strings.TrimSpace(text) {
			t.Fatalf("parse then print: %q, was %q", tok.Text(), text)
		}
	})
}

func FuzzParseThumbprint(f *testing.F) {
	f.Add(Thumbprint(authority(f).Certificate()))
	f.Add("AB:CD")
	f.Add("::")
	f.Fuzz(func(t *testing.T, text string) {
		sum, err := ParseThumbprint(text)
		if err != nil {
			return
		}
		if again, err := ParseThumbprint(FormatThumbprint(sum)); err != nil || again != sum {
			t.Fatalf("%q: %v", text, err)
		}
	})
}
