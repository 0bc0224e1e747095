package kms

import (
	"bytes"
	"encoding/base64"
	"testing"
	"time"
)

// unsealed is a [store.Sealer] that does nothing, so that a codec is given any
// bytes.
type unsealed struct{}

func (unsealed) Seal(plain, _ []byte) ([]byte, error)  { return bytes.Clone(plain), nil }
func (unsealed) Open(sealed, _ []byte) ([]byte, error) { return bytes.Clone(sealed), nil }

// FuzzAuthority: what is read of an instance's CA is written as it was, and its
// key is one that signs, or there is an error.
func FuzzAuthority(f *testing.F) {
	codec := authorityCodec{unsealed{}}
	made, err := newAuthority("fuzz", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	good, err := codec.Encode("at", made)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add(good[:40])
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, plain []byte) {
		a, err := codec.Decode("at", plain)
		if err != nil {
			return
		}
		if ca, err := a.open(); err == nil && !ca.Certificate().Equal(a.cert) {
			t.Fatal("another certificate")
		}
		again, err := codec.Encode("at", a)
		if err == nil && !bytes.Equal(again, plain) {
			t.Fatalf("%x was read, and written as %x", plain, again)
		}
	})
}

// FuzzAPIKey: a text is an API key in one form only.
func FuzzAPIKey(f *testing.F) {
	secret := base64.RawURLEncoding.EncodeToString(make([]byte, 32))
	for _, text := range []string{apiKeyPrefix + "tenant-a_" + secret, apiKeyPrefix + "_" + secret, apiKeyPrefix + "a_" + secret[1:], apiKeyPrefix, "", secret} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		instance, raw, ok := parseAPIKey(text)
		if ok && apiKeyPrefix+instance+"_"+base64.RawURLEncoding.EncodeToString(raw) != text {
			t.Fatalf("%q is read as of %q", text, instance)
		}
	})
}

func FuzzParseAddress(f *testing.F) {
	for _, text := range []string{"kms1.example.com", "KMS:5696", "192.0.2.1", "[2001:db8::1]:1", "::1", "", ":", "[::]:0", "a..b"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseAddress(text)
		if err != nil {
			return
		}
		if again, err := ParseAddress(a.Host); err != nil || again != (Address{Host: a.Host}) || a.Port < 0 || a.Port > 65535 {
			t.Fatalf("%q is read as %+v, and its host as %+v, %v", text, a, again, err)
		}
	})
}
