package authz

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
)

// Argon2id (RFC 9106) with the parameters of OWASP's password storage sheet:
// 19 MiB, 2 passes, 1 lane. Stored with each hash, so that they can rise.
const (
	argonMemory  = 19 << 10 // KiB
	argonPasses  = 2
	argonLanes   = 1
	argonSalt    = 16
	argonHash    = 32
	maxPassword  = 1024 // bytes; longer ones only cost us time
	maxMemory    = 256 << 10
	maxPasses    = 16
	minPassword  = 12 // characters of a password that a person chooses
	passwordBits = 120
)

// ErrPassword tells that a new password does not meet the rules.
var ErrPassword = fmt.Errorf("a password has at least %d and at most %d bytes", minPassword, maxPassword)

// GeneratePassword makes a random password of 120 bits, in groups that a person
// can type.
func GeneratePassword() (string, error) {
	// Crockford's alphabet: nothing in it looks like anything else in it.
	const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
	b := make([]byte, passwordBits/5)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	var s strings.Builder
	for i, c := range b {
		if i > 0 && i%6 == 0 {
			s.WriteByte('-')
		}
		s.WriteByte(alphabet[c&31])
	}
	clear(b)
	return s.String(), nil
}

// hashPassword returns the PHC string of password:
// $argon2id$v=19$m=…,t=…,p=…$salt$hash.
func hashPassword(password string) (string, error) {
	salt := make([]byte, argonSalt)
	if _, err := rand.Read(salt); err != nil {
		return "", err
	}
	h := argon2.IDKey([]byte(password), salt, argonPasses, argonMemory, argonLanes, argonHash)
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, argonMemory, argonPasses, argonLanes, b64.EncodeToString(salt), b64.EncodeToString(h)), nil
}

// checkPassword tells whether password is the one in phc.
func checkPassword(phc, password string) (bool, error) {
	var version int
	var memory, passes uint32
	var lanes uint8
	parts := strings.Split(phc, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" {
		return false, errors.New("authz: malformed password hash")
	}
	_, err1 := fmt.Sscanf(parts[2], "v=%d", &version)
	_, err2 := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &memory, &passes, &lanes)
	salt, err3 := base64.RawStdEncoding.Strict().DecodeString(parts[4])
	want, err4 := base64.RawStdEncoding.Strict().DecodeString(parts[5])
	if errors.Join(err1, err2, err3, err4) != nil || version != argon2.Version || memory < 8 || memory > maxMemory ||
		passes < 1 || passes > maxPasses || lanes < 1 || len(salt) < 8 || len(want) < 16 || len(want) > 64 {
		return false, errors.New("authz: malformed password hash")
	}
	got := argon2.IDKey([]byte(password), salt, passes, memory, lanes, uint32(len(want)))
	return subtle.ConstantTimeCompare(got, want) == 1, nil
}

// hashing bounds how many hashes are computed at once: each takes 19 MiB, and
// anybody may try to log in.
type hashing chan struct{}

func (h hashing) do(ctx context.Context, f func()) error {
	select {
	case h <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-h }()
	f()
	return nil
}
