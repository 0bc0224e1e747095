// Package rootkeytest gives tests and benchmarks a keyring like the key server's,
// sealed by a passphrase with an scrypt that takes no time: the passphrase is in
// this file, so nothing is lost by it.
//
// Place in the flow: test support of level 1. It imports rootkey and secret.
package rootkeytest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"path/filepath"

	"mortise/internal/rootkey"
	"mortise/internal/secret"
)

// FileName is of the keyring in a state folder.
const FileName = "crk.sealed"

// workFactor of scrypt, as a power of two.
const workFactor = 2

// Keyring opens the keyring in dir as a start of the key server does, and makes
// it at the first. It is the caller's to close.
func Keyring(dir string) (*rootkey.Keyring, error) {
	pass, err := secret.Copy([]byte("correct horse battery staple"))
	if err != nil {
		return nil, err
	}
	defer pass.Wipe()
	path := filepath.Join(dir, FileName)
	ring, err := rootkey.LoadKeyring(path)
	if errors.Is(err, fs.ErrNotExist) {
		return rootkey.CreateKeyring(path, rootkey.Passphrase(pass, workFactor))
	}
	if err != nil {
		return nil, err
	}
	return ring, ring.Unlock(rootkey.Passphrase(pass, workFactor))
}

// NewCRK makes a root key that no key server knows.
func NewCRK(ctx context.Context, ring *rootkey.Keyring) (id string, err error) {
	id = NewID()
	return id, ring.Create(ctx, id)
}

// NewID is an id for a root key.
func NewID() string {
	var raw [16]byte
	rand.Read(raw[:]) // never fails
	return hex.EncodeToString(raw[:])
}
