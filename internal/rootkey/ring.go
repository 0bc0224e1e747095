package rootkey

import (
	"bytes"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"mortise/internal/secret"
)

// A keyring file is text, a line for each thing, base64 without line breaks:
//
//	mortise-keyring v1
//	sealed passphrase (the private ring key, sealed: an age file, or a TPM's blob)
//	sealed tpm (a line for each way in; one or more)
//	public (the public ring key)
//	crk 0123456789abcdef0123456789abcdef (the CRK, sealed to the ring key)
//	…
//	sha256 (64 hexadecimal digits: of all lines above)
//
// The ring key pair is of HPKE's hybrid MLKEM768-X25519 (RFC 9180;
// draft-ietf-hpke-pq), so that a stolen copy does not wait for a quantum
// computer; its private half is a seed of 32 bytes. A CRK is sealed by HPKE in
// base mode with HKDF-SHA256 and AES-256-GCM; info is a label and the CRK's id.
// The sum tells damage from a wrong passphrase; it authenticates nothing.
// Anybody who can write the file could add a CRK of their own, under an id that
// no instance record names.
const (
	ringMagic = "mortise-keyring"
	ringV1    = "v1"
	ringLabel = "mortise keyring v1\x00"
	maxRing   = 8 << 20
	seedLen   = 32
)

type ring struct {
	seals   []sealedKey // of the private ring key, each opens it
	public  []byte
	entries []entry
}

type sealedKey struct {
	method string // of the Sealing
	sealed []byte
}

type entry struct {
	id     [idLen]byte
	sealed []byte
}

func ringKEM() hpke.KEM { return hpke.MLKEM768X25519() }

// newRing makes a ring key pair and seals its private half in each way.
func newRing(ways []Sealing) (r ring, err error) {
	if len(ways) == 0 {
		return r, errors.New("rootkey: a keyring needs something to be sealed to")
	}
	private, err := ringKEM().GenerateKey()
	if err != nil {
		return r, fmt.Errorf("rootkey: making a ring key: %w", err)
	}
	raw, err := private.Bytes()
	if err != nil {
		return r, fmt.Errorf("rootkey: making a ring key: %w", err)
	}
	seed, err := secret.Take(raw)
	if err != nil {
		return r, err
	}
	defer seed.Wipe()
	r.public = private.PublicKey().Bytes()
	for _, s := range ways {
		if r.sealOf(s.Method()) != nil {
			return r, fmt.Errorf("rootkey: a keyring is sealed by one %s, not two", s.Method())
		}
		sealed, err := s.Seal(seed)
		if err != nil {
			return r, fmt.Errorf("rootkey: sealing the ring key by %s: %w", s.Method(), err)
		}
		r.seals = append(r.seals, sealedKey{s.Method(), sealed})
	}
	return r, nil
}

// sealOf returns the private ring key as sealed by that method, nil if it is not.
func (r ring) sealOf(method string) []byte {
	for _, s := range r.seals {
		if s.method == method {
			return s.sealed
		}
	}
	return nil
}

func (r ring) methods() (list []string) {
	for _, s := range r.seals {
		list = append(list, s.method)
	}
	return list
}

// private opens the private ring key.
func (r ring) private(s Sealing) (private hpke.PrivateKey, err error) {
	sealed := r.sealOf(s.Method())
	if sealed == nil {
		return nil, fmt.Errorf("%w: by %s, and not by %s", ErrSealedOtherwise, strings.Join(r.methods(), " and "), s.Method())
	}
	seed, err := s.Unseal(sealed)
	if err != nil {
		return nil, err
	}
	defer seed.Wipe()
	seed.Use(func(b []byte) { private, err = ringKEM().NewPrivateKey(b) })
	if err != nil {
		return nil, fmt.Errorf("%w: its ring key: %w", ErrDamaged, err)
	}
	if !bytes.Equal(private.PublicKey().Bytes(), r.public) {
		return nil, fmt.Errorf("%w: its public key line was changed", ErrDamaged)
	}
	return private, nil
}

// add seals a CRK to the ring.
func (r *ring) add(k *Key) error {
	public, err := ringKEM().NewPublicKey(r.public)
	if err != nil {
		return fmt.Errorf("rootkey: %w: its public key line: %w", ErrDamaged, err)
	}
	e := entry{id: k.id}
	k.key.Use(func(b []byte) {
		e.sealed, err = hpke.Seal(public, hpke.HKDFSHA256(), hpke.AES256GCM(), ringInfo(k.id), b)
	})
	if err != nil {
		return fmt.Errorf("rootkey: sealing root key %x: %w", k.id, err)
	}
	r.entries = append(r.entries, e)
	return nil
}

func (e entry) open(private hpke.PrivateKey) (*Key, error) {
	plain, err := hpke.Open(private, hpke.HKDFSHA256(), hpke.AES256GCM(), ringInfo(e.id), e.sealed)
	if err != nil || len(plain) != keyLen {
		clear(plain)
		return nil, fmt.Errorf("%w: its entry does not open", ErrDamaged)
	}
	key, err := secret.Take(plain)
	if err != nil {
		return nil, err
	}
	return &Key{id: e.id, key: key}, nil
}

func ringInfo(id [idLen]byte) []byte { return append([]byte(ringLabel), id[:]...) }

func (r ring) find(id [idLen]byte) int {
	return slices.IndexFunc(r.entries, func(e entry) bool { return e.id == id })
}

func (r ring) clone() ring {
	r.entries = slices.Clone(r.entries)
	return r
}

func (r ring) text() []byte {
	b := fmt.Appendf(nil, "%s %s\n", ringMagic, ringV1)
	for _, s := range r.seals {
		b = fmt.Appendf(b, "sealed %s %s\n", s.method, base64.StdEncoding.EncodeToString(s.sealed))
	}
	b = fmt.Appendf(b, "public %s\n", base64.StdEncoding.EncodeToString(r.public))
	for _, e := range r.entries {
		b = fmt.Appendf(b, "crk %x %s\n", e.id, base64.StdEncoding.EncodeToString(e.sealed))
	}
	return fmt.Appendf(b, "sha256 %x\n", sha256.Sum256(b))
}

// parseRing accepts exactly what text prints.
func parseRing(text []byte) (r ring, err error) {
	damaged := func(format string, args ...any) (ring, error) {
		return ring{}, fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
	}
	if len(text) > maxRing {
		return damaged("longer than %d bytes", maxRing)
	}
	first, _, _ := bytes.Cut(text, []byte("\n"))
	magic, version, _ := strings.Cut(string(first), " ")
	if magic != ringMagic {
		return damaged("it does not begin with %q", ringMagic)
	}
	if version != ringV1 {
		if strings.HasPrefix(version, "v") && len(version) < 8 {
			return ring{}, fmt.Errorf("%w: %q, this program knows %s", ErrNewer, version, ringV1)
		}
		return damaged("no version in its first line")
	}
	// The last line, with its newline, is the sum.
	sumLine := len("sha256 ") + 2*sha256.Size + 1
	if len(text) < sumLine || text[len(text)-1] != '\n' {
		return damaged("cut off")
	}
	body, last := text[:len(text)-sumLine], string(text[len(text)-sumLine:len(text)-1])
	var sum [sha256.Size]byte
	if !hexLine(sum[:], last, "sha256 ") || sum != sha256.Sum256(body) {
		return damaged("its checksum does not match")
	}
	lines := strings.Split(strings.TrimSuffix(string(body), "\n"), "\n")[1:]
	at := 2 // number of the line that is looked at
	for ; len(lines) > 0 && strings.HasPrefix(lines[0], "sealed "); lines, at = lines[1:], at+1 {
		method, blob, ok := strings.Cut(strings.TrimPrefix(lines[0], "sealed "), " ")
		if !ok || method == "" || strings.Trim(method, "abcdefghijklmnopqrstuvwxyz0123456789") != "" || r.sealOf(method) != nil {
			return damaged("line %d does not say how it is sealed", at)
		}
		sealed, err := strictBase64(blob)
		if err != nil {
			return damaged("line %d: %v", at, err)
		}
		r.seals = append(r.seals, sealedKey{method, sealed})
	}
	if len(r.seals) == 0 {
		return damaged("its second line does not say how it is sealed")
	}
	if len(lines) == 0 {
		return damaged("it has too few lines")
	}
	public, ok := strings.CutPrefix(lines[0], "public ")
	if !ok {
		return damaged("no public key in line %d", at)
	}
	if r.public, err = strictBase64(public); err != nil {
		return damaged("line %d: %v", at, err)
	}
	lines, at = lines[1:], at+1
	seen := map[[idLen]byte]bool{}
	for n, line := range lines {
		rest, ok := strings.CutPrefix(line, "crk ")
		digits, blob, ok2 := strings.Cut(rest, " ")
		var e entry
		if !ok || !ok2 || !hexLine(e.id[:], digits, "") {
			return damaged("line %d names no root key", n+at)
		}
		if seen[e.id] {
			return damaged("root key %x is in it twice", e.id)
		}
		seen[e.id] = true
		if e.sealed, err = strictBase64(blob); err != nil {
			return damaged("line %d: %v", n+at, err)
		}
		r.entries = append(r.entries, e)
	}
	if !bytes.Equal(r.text(), text) {
		return damaged("it is not written as this program writes it")
	}
	return r, nil
}

func strictBase64(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") || s == "" {
		return nil, errors.New("no base64")
	}
	return base64.StdEncoding.Strict().DecodeString(s)
}

func parseID(id string) (raw [idLen]byte, err error) {
	if !hexLine(raw[:], id, "") {
		return raw, fmt.Errorf("rootkey: %.40q is no id of a root key: 32 hexadecimal digits", id)
	}
	return raw, nil
}

func hexID(id [idLen]byte) string { return hex.EncodeToString(id[:]) }

// overwrite zeroes a file that has no name any more.
func overwrite(f *os.File) {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || st.Nlink != 0 {
		return
	}
	if _, err := f.WriteAt(make([]byte, st.Size), 0); err == nil {
		_ = f.Sync()
	}
}
