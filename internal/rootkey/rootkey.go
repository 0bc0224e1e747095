// Package rootkey keeps root keys: the AES-256 keys at the top of a role's key
// hierarchy. kms wraps its instance keys with them (CRKs, S4), center seals its
// own secrets (CA keys, KMIP client keys) with another; the two never share one.
//
// center has one [Key], in a file that a passphrase opens. A KMS has many, and
// keeps them in a [Keyring], a file that a passphrase or a TPM opens, or in a
// token (subpackage pkcs11). Neither is ever in clear on a disk. While a role
// runs, keys are in locked memory and leave it only as the argument of AES.
//
// Place in the flow: level 1; used by store's owners, kms and center through
// interfaces that those declare. It imports secret and atomicfile only.
package rootkey

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"fmt"

	"mortise/internal/secret"
)

// Sizes in bytes.
const (
	keyLen = 32 // AES-256
	idLen  = 16
	gcmLen = 12 + 16 // nonce and tag
)

// blobVersion begins every wrapped blob; blobLabel separates our use of
// AES-GCM additional data from any other.
const (
	blobVersion = 1
	blobLabel   = "mortise rootkey wrap v1\x00"
)

// Overhead is how many bytes a wrapped blob is longer than its plaintext.
const Overhead = 1 + idLen + gcmLen

var (
	// ErrOtherKey means that a blob was wrapped by another root key.
	ErrOtherKey = errors.New("wrapped by another root key")
	// ErrBlob means that a blob is damaged, or was wrapped for another
	// purpose: with other additional data.
	ErrBlob = errors.New("damaged, or wrapped for something else")
)

// A Key is an open root key. Its methods may be called concurrently, except
// that Wipe must come after all others have returned.
type Key struct {
	id  [idLen]byte // random; not derived from the key
	key *secret.Key
}

// ID names the key: 32 hexadecimal digits. It is no secret, and is inside
// every blob that the key wrapped.
func (k *Key) ID() string { return hex.EncodeToString(k.id[:]) }

// Wrap encrypts and authenticates plaintext under the root key by AES-256-GCM
// with a random nonce (NIST SP 800-38D §8.2.2: at most 2^32 blobs for one key).
// aad binds the blob to what it is for, such as a record's name: Unwrap wants
// the same. The blob is
//
//	version 1 (1 byte) ‖ key id (16) ‖ nonce (12) ‖ ciphertext ‖ tag (16)
//
// and the additional data a fixed label ‖ version ‖ key id ‖ aad.
func (k *Key) Wrap(plaintext, aad []byte) ([]byte, error) {
	gcm, err := k.aead()
	if err != nil {
		return nil, err
	}
	blob := make([]byte, 0, Overhead+len(plaintext))
	blob = append(blob, blobVersion)
	blob = append(blob, k.id[:]...)
	return gcm.Seal(blob, nil, plaintext, k.binding(aad)), nil
}

// Unwrap opens what Wrap made. Its errors match ErrOtherKey or ErrBlob. The
// plaintext is the caller's to clear.
func (k *Key) Unwrap(blob, aad []byte) ([]byte, error) {
	switch {
	case len(blob) < Overhead:
		return nil, fmt.Errorf("rootkey: a wrapped blob has at least %d bytes, this one has %d: %w", Overhead, len(blob), ErrBlob)
	case blob[0] != blobVersion:
		return nil, fmt.Errorf("rootkey: a wrapped blob of version %d, this program knows %d: %w", blob[0], blobVersion, ErrBlob)
	case !bytes.Equal(blob[1:1+idLen], k.id[:]):
		return nil, fmt.Errorf("rootkey: blob needs root key %x, the open one is %x: %w", blob[1:1+idLen], k.id, ErrOtherKey)
	}
	gcm, err := k.aead()
	if err != nil {
		return nil, err
	}
	plaintext, err := gcm.Open(nil, nil, blob[1+idLen:], k.binding(aad))
	if err != nil {
		return nil, fmt.Errorf("rootkey: blob of root key %x does not authenticate: %w", k.id, ErrBlob)
	}
	return plaintext, nil
}

// Seal is Wrap of a key's bytes.
func (k *Key) Seal(s *secret.Key, aad []byte) (blob []byte, err error) {
	s.Use(func(b []byte) { blob, err = k.Wrap(b, aad) })
	return blob, err
}

// Open is Unwrap into locked memory.
func (k *Key) Open(blob, aad []byte) (*secret.Key, error) {
	plaintext, err := k.Unwrap(blob, aad)
	if err != nil {
		return nil, err
	}
	return secret.Take(plaintext)
}

// Wipe zeroes the key; it cannot be used afterwards. Wiping twice is harmless.
func (k *Key) Wipe() { k.key.Wipe() }

// aead is made for each use, so that no expanded key stays on the heap for
// longer than one call.
func (k *Key) aead() (gcm cipher.AEAD, err error) {
	k.key.Use(func(b []byte) {
		var block cipher.Block
		if block, err = aes.NewCipher(b); err == nil {
			gcm, err = cipher.NewGCMWithRandomNonce(block)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("rootkey: preparing AES-256-GCM: %w", err)
	}
	return gcm, nil
}

func (k *Key) binding(aad []byte) []byte {
	b := make([]byte, 0, len(blobLabel)+1+idLen+len(aad))
	b = append(b, blobLabel...)
	b = append(b, blobVersion)
	b = append(b, k.id[:]...)
	return append(b, aad...)
}
