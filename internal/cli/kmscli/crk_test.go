package kmscli

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"testing"
)

func TestParseCRK(t *testing.T) {
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(200 + i)
	}
	for name, text := range map[string]string{
		"raw": string(key), "hex": hex.EncodeToString(key) + "\n", "base64": base64.StdEncoding.EncodeToString(key) + "\r\n",
		"base64url":                  base64.RawURLEncoding.EncodeToString(key),
		"raw that ends in a newline": string(append(bytes.Repeat([]byte{7}, 31), '\n')),
	} {
		k, err := parseCRK([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		k.Use(func(b []byte) {
			if !bytes.Equal(b, key) && name != "raw that ends in a newline" {
				t.Errorf("%s: another key", name)
			}
		})
		k.Wipe()
	}
	for _, text := range []string{"", "x", string(key[:31]), string(key) + "\n", hex.EncodeToString(key[:31]), "zz" + hex.EncodeToString(key[1:]), base64.StdEncoding.EncodeToString(key[:16])} {
		if k, err := parseCRK([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
			k.Wipe()
		}
	}
}

func FuzzParseCRK(f *testing.F) {
	f.Add(make([]byte, 32))
	f.Add([]byte(hex.EncodeToString(make([]byte, 32))))
	f.Add([]byte(base64.StdEncoding.EncodeToString(make([]byte, 32))))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := parseCRK(text)
		if err == nil {
			if k.Len() != 32 {
				t.Fatalf("%d bytes", k.Len())
			}
			k.Wipe()
		}
	})
}
