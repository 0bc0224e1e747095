package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// A JoinToken lets one new member, of one name, be certified once. It carries
// the SHA-256 of the CA's certificate, so that the new member knows whom it
// gives the secret to. An administrator carries it from center to the member.
//
// Its text is "mortise-join:v1:" and the unpadded base64url (RFC 4648 §5) of
//
//	expiry, Unix seconds (8 bytes, big-endian) ‖ CA SHA-256 (32) ‖ secret (32) ‖
//	length (1), role ‖ length (1), name ‖ first 4 bytes of the SHA-256 of the foregoing
type JoinToken struct {
	ID      Identity          // who the holder will be
	CA      [sha256.Size]byte // fingerprint of the CA that will certify it
	Expires time.Time         // whole seconds, UTC

	secret [32]byte
}

const (
	joinPrefix   = "mortise-join:"
	joinV1       = "v1:"
	joinFixed    = 8 + 32 + 32
	joinChecksum = 4
	maxJoinText  = 512
)

var (
	// ErrToken means that a text is no token: mistyped, cut off, or something else.
	ErrToken = errors.New("not a join token")
	// ErrTokenExpired means that a token's time is over.
	ErrTokenExpired = errors.New("join token expired")
	// ErrTokenSpent means that a token was used for another key already.
	ErrTokenSpent = errors.New("join token was used already")
	// ErrTokenRefused means that the secret or the name is not the token's.
	ErrTokenRefused = errors.New("join token refused")
)

// NewJoinToken makes a token for id, to be certified by ca, for the given life.
func NewJoinToken(id Identity, ca *x509.Certificate, life time.Duration, now time.Time) (*JoinToken, error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	if life <= 0 {
		return nil, fmt.Errorf("pki: a join token with a life of %v", life)
	}
	t := &JoinToken{ID: id, CA: Fingerprint(ca), Expires: now.Add(life).UTC().Truncate(time.Second)}
	if _, err := rand.Read(t.secret[:]); err != nil {
		return nil, fmt.Errorf("pki: making a join token: %w", err)
	}
	return t, nil
}

// Text is the token as an administrator carries it. It is a secret until used.
func (t *JoinToken) Text() string {
	b := binary.BigEndian.AppendUint64(nil, uint64(t.Expires.Unix()))
	b = append(b, t.CA[:]...)
	b = append(b, t.secret[:]...)
	for _, s := range []string{t.ID.Role, t.ID.Name} {
		b = append(append(b, byte(len(s))), s...)
	}
	sum := sha256.Sum256(b)
	return joinPrefix + joinV1 + base64.RawURLEncoding.EncodeToString(append(b, sum[:joinChecksum]...))
}

// Secret is what the holder sends to prove that it has the token. It says
// nothing of CA or name.
func (t *JoinToken) Secret() string { return base64.RawURLEncoding.EncodeToString(t.secret[:]) }

// Format prints whom the token is for and never the secret.
func (t *JoinToken) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "join token of %s until %s", t.ID, t.Expires.Format(time.RFC3339))
}

// ParseJoinToken reads a token's text; white space around it is ignored. The
// error matches ErrToken and quotes nothing of the text.
func ParseJoinToken(text string) (*JoinToken, error) {
	bad := func(why string) (*JoinToken, error) {
		return nil, fmt.Errorf("pki: %w: %s", ErrToken, why)
	}
	text = strings.TrimSpace(text)
	if len(text) > maxJoinText {
		return bad("too long")
	}
	rest, ours := strings.CutPrefix(text, joinPrefix)
	if !ours {
		return bad("a token begins with " + joinPrefix)
	}
	body, ours := strings.CutPrefix(rest, joinV1)
	if !ours {
		return bad("of a version that this program does not know; use the same version of Mortise on both machines")
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || strings.ContainsAny(body, "\r\n") || len(raw) < joinFixed+2+joinChecksum {
		return bad("cut off or mistyped; copy it whole")
	}
	raw, check := raw[:len(raw)-joinChecksum], raw[len(raw)-joinChecksum:]
	if sum := sha256.Sum256(raw); !bytes.Equal(check, sum[:joinChecksum]) {
		return bad("cut off or mistyped; copy it whole")
	}
	seconds := binary.BigEndian.Uint64(raw)
	if seconds > 1<<40 {
		return bad("its expiry is out of range")
	}
	t := &JoinToken{Expires: time.Unix(int64(seconds), 0).UTC()}
	copy(t.CA[:], raw[8:])
	copy(t.secret[:], raw[8+32:])
	r := bytes.NewReader(raw[joinFixed:])
	if t.ID.Role, err = shortString(r); err == nil {
		t.ID.Name, err = shortString(r)
	}
	if err != nil || r.Len() != 0 || t.ID.Check() != nil {
		return bad("its role or name is malformed")
	}
	return t, nil
}

func shortString(r *bytes.Reader) (string, error) {
	n, err := r.ReadByte()
	if err != nil {
		return "", err
	}
	b := make([]byte, n)
	_, err = io.ReadFull(r, b)
	return string(b), err
}

// A JoinRecord is what the issuer keeps of a token: enough to check it, not
// enough to use it. The secret has 256 random bits, so a plain hash hides it.
type JoinRecord struct {
	SecretHash []byte    `json:"secretHash"` // HashJoinSecret; names the record
	ID         Identity  `json:"id"`
	Expires    time.Time `json:"expires"`
	SpentBy    []byte    `json:"spentBy,omitempty"` // SHA-256 of the public key that was certified; nil: unused
}

// Record is what the issuer keeps of t.
func (t *JoinToken) Record() JoinRecord {
	return JoinRecord{SecretHash: HashJoinSecret(t.Secret()), ID: t.ID, Expires: t.Expires}
}

// HashJoinSecret finds the record of the token that a secret belongs to.
func HashJoinSecret(secret string) []byte {
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

// Spend checks a joiner's claim against the record and marks the record as used
// by the key in csr. The caller stores the record, by compare-and-swap, before
// it answers with a certificate. A second call with the same key, after a lost
// answer, passes while the token lives; with another key it is ErrTokenSpent.
func (r *JoinRecord) Spend(secret, name string, csr *x509.CertificateRequest, now time.Time) error {
	if subtle.ConstantTimeCompare(HashJoinSecret(secret), r.SecretHash) != 1 {
		return fmt.Errorf("pki: %w: unknown secret", ErrTokenRefused)
	}
	if name != r.ID.Name {
		return fmt.Errorf("pki: %w: it is for %q, not for %q", ErrTokenRefused, r.ID.Name, short(name))
	}
	if now.After(r.Expires) {
		return fmt.Errorf("pki: token of %s ended at %s; make a new one: %w", r.ID, r.Expires.UTC().Format(time.RFC3339), ErrTokenExpired)
	}
	if err := csr.CheckSignature(); err != nil {
		return fmt.Errorf("pki: %w: the certificate request's signature is wrong", ErrTokenRefused)
	}
	key := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	if r.SpentBy != nil && !bytes.Equal(r.SpentBy, key[:]) {
		return fmt.Errorf("pki: token of %s: %w; make a new one", r.ID, ErrTokenSpent)
	}
	r.SpentBy = key[:]
	return nil
}
