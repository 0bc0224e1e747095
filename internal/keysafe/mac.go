package keysafe

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"mortise/internal/secret"
)

// MACSize is the length of a MAC in bytes.
const MACSize = sha256.Size

// A Line is a named value that a MAC covers.
type Line struct{ Name, Value string }

// A MAC authenticates clear text that belongs to encrypted data: lines of a
// descriptor, slots of a state file, headers. Its key is
// HKDF-SHA256(secret = DEK, salt = none, info) of 32 bytes (RFC 5869), so it says
// nothing about the DEK and another info gives an unrelated MAC. Methods may be
// called concurrently, except Wipe.
type MAC struct{ key *secret.Key }

// NewMAC derives a MAC from dek for one use, which info names: a constant of the
// package that defines the format, with its version.
func NewMAC(dek *secret.Key, info string) (*MAC, error) {
	var derived []byte
	var err error
	dek.Use(func(k []byte) { derived, err = hkdf.Key(sha256.New, k, nil, info, sha256.Size) })
	if err != nil {
		return nil, fmt.Errorf("keysafe: deriving a MAC key for %q: %w", info, err)
	}
	key, err := secret.Take(derived)
	if err != nil {
		return nil, err
	}
	return &MAC{key}, nil
}

// Sum is HMAC-SHA-256 (RFC 2104) over the lines in the order given. Their
// encoding is the number of lines as 4 bytes, then for each line the length of
// its name as 4 bytes, the name, the length of its value as 4 bytes, the value;
// numbers are big-endian.
func (m *MAC) Sum(lines ...Line) (sum [MACSize]byte) {
	m.key.Use(func(k []byte) {
		h := hmac.New(sha256.New, k)
		put := func(s string) {
			var n [4]byte
			binary.BigEndian.PutUint32(n[:], uint32(len(s)))
			h.Write(n[:])
			h.Write([]byte(s))
		}
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(lines)))
		h.Write(n[:])
		for _, l := range lines {
			put(l.Name)
			put(l.Value)
		}
		h.Sum(sum[:0])
	})
	return sum
}

// Verify says, in constant time, whether sum is the MAC of the lines.
func (m *MAC) Verify(sum []byte, lines ...Line) bool {
	want := m.Sum(lines...)
	return hmac.Equal(sum, want[:])
}

// Wipe zeroes the MAC's key; a nil MAC is fine.
func (m *MAC) Wipe() {
	if m != nil {
		m.key.Wipe()
	}
}
