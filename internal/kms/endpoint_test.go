package kms

import (
	"errors"
	"strings"
	"testing"
)

func TestParseAddress(t *testing.T) {
	for text, want := range map[string]Address{
		"kms1.example.com":       {"kms1.example.com", 0},
		"KMS1.Example.com:15696": {"kms1.example.com", 15696},
		"kms":                    {"kms", 0},
		"192.0.2.7":              {"192.0.2.7", 0},
		"192.0.2.7:1":            {"192.0.2.7", 1},
		"2001:db8::7":            {"2001:db8::7", 0},
		"[2001:db8::7]":          {"2001:db8::7", 0},
		"[2001:db8::7]:65535":    {"2001:db8::7", 65535},
	} {
		if got, err := ParseAddress(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", ":5696", "kms:0", "kms:65536", "kms:kmip", "kms:", "0.0.0.0", "[::]:5696", "fe80::1%eth0", "*.example.com", "a b", "-a", "a..b",
		"kms1.example.com.", "https://kms1", "kms\n", strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a"} {
		if got, err := ParseAddress(text); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken: %v, %v", text, got, err)
		}
	}
}
