// Package xts is the cipher of Mortise's disks and files: XTS-AES-256 of
// IEEE Std 1619-2018, as approved by NIST SP 800-38E.
//
// The data unit is 4096 bytes and its tweak is its number as a little-endian
// 128-bit integer, which is what dm-crypt calls aes-xts-plain64 with
// sector_size:4096 and iv_large_sectors. XTS hides content; it does not notice
// changes. Who can write the ciphertext can put noise, zeros or older data of
// the same place there.
//
// [New] takes the fastest of four implementations that the CPU has: AES
// instructions on 64-byte registers ("avx512"), on 32-byte registers ("avx2"),
// on 16-byte registers ("aesni"), and crypto/aes block by block ("generic"),
// which is also the reference that the others are tested against. The assembly
// is generated: see _asm.
//
// Place in the flow: level 0; vdisk and vmfiles encrypt with it. It imports
// nothing of Mortise but secret.
package xts

import (
	"crypto/cipher"
	"crypto/subtle"
	"errors"
	"fmt"
	"unsafe"

	"mortise/internal/secret"
)

const (
	// UnitSize is the length of a data unit, in bytes.
	UnitSize = 4096
	// SectorSize is the granularity, in bytes, at which a part of a unit can
	// be processed.
	SectorSize = 512
	// KeySize is the length of a key, in bytes: two AES-256 keys, the first
	// for the data and the second for the tweaks.
	KeySize = 64
)

// ErrEqualHalves is returned for a key whose halves are equal. Such a key
// weakens XTS, and FIPS 140-3 IG C.I has it refused.
var ErrEqualHalves = errors.New("xts: the two halves of the key are equal; make a new random key")

// A Cipher encrypts and decrypts with one key. Its methods may be called
// concurrently, except that Wipe must not run while another one does. They do
// not allocate.
type Cipher struct {
	impl implementation
	keys *secret.Key // the expanded keys, laid out as impl wants them

	dataKey, tweakKey cipher.Block // generic only: views of keys
}

// New expands key, of KeySize bytes, which stays the caller's to wipe: the
// Cipher keeps nothing of it but the AES key schedules, in locked memory.
func New(key *secret.Key) (*Cipher, error) {
	impl, err := choose()
	if err != nil {
		return nil, err
	}
	return newCipher(key, impl)
}

func newCipher(key *secret.Key, impl implementation) (c *Cipher, err error) {
	if key.Len() != KeySize {
		return nil, fmt.Errorf("xts: the key has %d bytes; XTS-AES-256 needs %d", key.Len(), KeySize)
	}
	key.Use(func(k []byte) {
		if subtle.ConstantTimeCompare(k[:KeySize/2], k[KeySize/2:]) == 1 {
			err = ErrEqualHalves
			return
		}
		c = &Cipher{impl: impl}
		if impl == generic {
			err = c.expandGeneric(k)
		} else {
			err = c.expandAsm(k)
		}
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Wipe zeroes the expanded keys. Encrypting or decrypting afterwards panics
// with [secret.ErrWiped]. A second Wipe, and a Wipe of a nil Cipher, do nothing.
func (c *Cipher) Wipe() {
	if c != nil {
		c.keys.Wipe()
	}
}

// Encrypt encrypts whole units from src to dst; unit is the number of the first.
// dst and src are the same memory or do not overlap.
//
// As crypto/cipher does, it panics when src is not whole units, when dst is
// shorter, or when the two overlap otherwise: these are mistakes of the caller,
// who has checked what came from outside.
func (c *Cipher) Encrypt(dst, src []byte, unit uint64) {
	if len(src)%UnitSize != 0 {
		panic("xts: input is not whole units")
	}
	c.crypt(dst, src, tweak{lo: unit}, 0, false)
}

// Decrypt is the inverse of Encrypt.
func (c *Cipher) Decrypt(dst, src []byte, unit uint64) {
	if len(src)%UnitSize != 0 {
		panic("xts: input is not whole units")
	}
	c.crypt(dst, src, tweak{lo: unit}, 0, true)
}

// EncryptAt encrypts whole sectors of SectorSize bytes; the first one begins
// offset bytes into unit. The run may cross into the following units. The
// result is what Encrypt makes of the same places: a unit needs not be
// processed in one piece. It panics as Encrypt does, and when offset is not a
// multiple of SectorSize below UnitSize.
func (c *Cipher) EncryptAt(dst, src []byte, unit uint64, offset int) {
	c.crypt(dst, src, tweak{lo: unit}, offset, false)
}

// DecryptAt is the inverse of EncryptAt.
func (c *Cipher) DecryptAt(dst, src []byte, unit uint64, offset int) {
	c.crypt(dst, src, tweak{lo: unit}, offset, true)
}

// A tweak is the number of a unit, or what becomes of it, as the polynomial over
// GF(2) whose coefficients below x^64 are in lo. The units of a disk have hi = 0;
// NIST's vectors use all 128 bits.
type tweak struct{ lo, hi uint64 }

func (c *Cipher) crypt(dst, src []byte, unit tweak, offset int, decrypt bool) {
	switch {
	case len(src)%SectorSize != 0:
		panic("xts: input is not whole sectors")
	case offset < 0 || offset >= UnitSize || offset%SectorSize != 0:
		panic("xts: offset is not that of a sector in a unit")
	case len(dst) < len(src):
		panic("xts: output is shorter than input")
	case len(src) == 0:
		return
	}
	dst = dst[:len(src)]
	if inexactOverlap(dst, src) {
		panic("xts: invalid buffer overlap")
	}
	c.keys.Use(func(keys []byte) {
		if c.impl == generic {
			c.cryptGeneric(dst, src, unit, offset, decrypt)
		} else {
			cryptAsm(c.impl, keys, dst, src, unit, offset, decrypt)
		}
	})
}

// inexactOverlap reports whether x and y, of one length above 0, share memory
// without being the same.
func inexactOverlap(x, y []byte) bool {
	px, py := uintptr(unsafe.Pointer(&x[0])), uintptr(unsafe.Pointer(&y[0]))
	n := uintptr(len(x))
	return px != py && px < py+n && py < px+n
}
