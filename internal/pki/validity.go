package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrExpired means that a certificate's time is over, or has not come.
var ErrExpired = errors.New("certificate is outside its validity")

// CheckValid returns an error that matches ErrExpired, and says which
// certificate and since when, unless cert is valid at the given time.
func CheckValid(cert *x509.Certificate, now time.Time) error {
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("certificate of %q expired at %s; renew it: %w", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339), ErrExpired)
	case now.Before(cert.NotBefore):
		return fmt.Errorf("certificate of %q is not valid before %s; check the clocks: %w", cert.Subject, cert.NotBefore.UTC().Format(time.RFC3339), ErrExpired)
	}
	return nil
}

// RenewAt is when a certificate should be renewed: after two thirds of its
// life, which leaves the last third for failures.
func RenewAt(cert *x509.Certificate) time.Time {
	life := cert.NotAfter.Sub(cert.NotBefore)
	return cert.NotBefore.Add(life / 3 * 2)
}

// Fingerprint is the SHA-256 of the certificate's DER.
func Fingerprint(cert *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(cert.Raw) }

// Thumbprint is the fingerprint as vSphere shows it: 32 pairs of upper-case
// hexadecimal digits between colons.
func Thumbprint(cert *x509.Certificate) string { return FormatThumbprint(Fingerprint(cert)) }

// FormatThumbprint prints a fingerprint as Thumbprint does.
func FormatThumbprint(sum [sha256.Size]byte) string {
	var b strings.Builder
	for i, c := range sum {
		if i > 0 {
			b.WriteByte(':')
		}
		fmt.Fprintf(&b, "%02X", c)
	}
	return b.String()
}

// ParseThumbprint reads a SHA-256 thumbprint, with or without colons, in either
// case. A SHA-1 thumbprint, which older tools print, is refused by name.
func ParseThumbprint(s string) (sum [sha256.Size]byte, err error) {
	digits := strings.TrimSpace(s)
	if strings.Contains(digits, ":") {
		pairs := strings.Split(digits, ":")
		for _, p := range pairs {
			if len(p) != 2 {
				return sum, fmt.Errorf("pki: thumbprint %q: colons must stand between pairs of digits", short(s))
			}
		}
		digits = strings.Join(pairs, "")
	}
	raw, err := hex.DecodeString(digits)
	switch {
	case err != nil:
		return sum, fmt.Errorf("pki: thumbprint %q is not hexadecimal", short(s))
	case len(raw) == 20:
		return sum, fmt.Errorf("pki: thumbprint %q is a SHA-1; give the SHA-256, such as openssl x509 -noout -fingerprint -sha256 prints", short(s))
	case len(raw) != len(sum):
		return sum, fmt.Errorf("pki: thumbprint %q has %d bytes, a SHA-256 has %d", short(s), len(raw), len(sum))
	}
	return [sha256.Size]byte(raw), nil
}

// short keeps what somebody else wrote from flooding an error.
func short(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
