package rootkey

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"

	"mortise/internal/secret"
)

// Passphrase returns the Sealing of a keyring by a passphrase: an age file with
// one scrypt recipient. workFactor is the binary logarithm of scrypt's cost, 0
// for DefaultWorkFactor. The passphrase stays the caller's to wipe, after the
// Sealing's last use.
func Passphrase(p *secret.Key, workFactor int) Sealing {
	if workFactor == 0 {
		workFactor = DefaultWorkFactor
	}
	return passphraseSealing{p, workFactor}
}

type passphraseSealing struct {
	passphrase *secret.Key
	workFactor int
}

// SealedByPassphrase is the Method of Passphrase.
const SealedByPassphrase = "passphrase"

func (passphraseSealing) Method() string { return SealedByPassphrase }

func (s passphraseSealing) Seal(k *secret.Key) (sealed []byte, err error) {
	if s.workFactor < 1 || s.workFactor > maxWorkFactor {
		return nil, fmt.Errorf("scrypt work factor %d is not within 1 to %d", s.workFactor, maxWorkFactor)
	}
	var out bytes.Buffer
	s.passphrase.Use(func(p []byte) {
		var recipient *age.ScryptRecipient
		if recipient, err = age.NewScryptRecipient(string(p)); err != nil {
			return
		}
		recipient.SetWorkFactor(s.workFactor)
		var w io.WriteCloser
		if w, err = age.Encrypt(&out, recipient); err != nil {
			return
		}
		k.Use(func(b []byte) { _, err = w.Write(b) })
		err = errors.Join(err, w.Close())
	})
	return out.Bytes(), err
}

func (s passphraseSealing) Unseal(sealed []byte) (k *secret.Key, err error) {
	plain := make([]byte, seedLen)
	s.passphrase.Use(func(p []byte) { err = decrypt(plain, bytes.NewReader(sealed), string(p)) })
	if err != nil {
		clear(plain)
		return nil, err
	}
	return secret.Take(plain)
}

// CheckValue is the key check value of an AES key as PKCS#11 has it
// (CKA_CHECK_VALUE): the first three bytes of a block of zeros encrypted under
// it, in hexadecimal. It lets two people compare a key without seeing it.
func CheckValue(k *secret.Key) (value string, err error) {
	k.Use(func(b []byte) {
		block, e := aes.NewCipher(b)
		if e != nil {
			err = fmt.Errorf("rootkey: key check value: %w", e)
			return
		}
		var out [aes.BlockSize]byte
		block.Encrypt(out[:], out[:])
		value = hex.EncodeToString(out[:3])
	})
	return value, err
}
