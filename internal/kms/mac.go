package kms

import (
	"crypto/cipher"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"hash"

	"github.com/ovh/kmip-go"
)

// hashOf returns the constructor of a hash function, nil for one that is not
// here. MD5 and SHA-1 are for what was made with them elsewhere.
func hashOf(a kmip.HashingAlgorithm) func() hash.Hash {
	switch a {
	case kmip.HashingAlgorithmMD5:
		return md5.New
	case kmip.HashingAlgorithmSHA_1:
		return sha1.New
	case kmip.HashingAlgorithmSHA_224:
		return sha256.New224
	case kmip.HashingAlgorithmSHA_256:
		return sha256.New
	case kmip.HashingAlgorithmSHA_384:
		return sha512.New384
	case kmip.HashingAlgorithmSHA_512:
		return sha512.New
	case kmip.HashingAlgorithmSHA_512_224:
		return sha512.New512_224
	case kmip.HashingAlgorithmSHA_512_256:
		return sha512.New512_256
	case kmip.HashingAlgorithmSHA_3_224:
		return func() hash.Hash { return sha3.New224() }
	case kmip.HashingAlgorithmSHA_3_256:
		return func() hash.Hash { return sha3.New256() }
	case kmip.HashingAlgorithmSHA_3_384:
		return func() hash.Hash { return sha3.New384() }
	case kmip.HashingAlgorithmSHA_3_512:
		return func() hash.Hash { return sha3.New512() }
	}
	return nil
}

// hmacHash returns the hash function inside an HMAC algorithm, nil for any
// other algorithm.
func hmacHash(a kmip.CryptographicAlgorithm) func() hash.Hash {
	switch a {
	case kmip.CryptographicAlgorithmHMACMD5:
		return hashOf(kmip.HashingAlgorithmMD5)
	case kmip.CryptographicAlgorithmHMACSHA1:
		return hashOf(kmip.HashingAlgorithmSHA_1)
	case kmip.CryptographicAlgorithmHMACSHA224:
		return hashOf(kmip.HashingAlgorithmSHA_224)
	case kmip.CryptographicAlgorithmHMACSHA256:
		return hashOf(kmip.HashingAlgorithmSHA_256)
	case kmip.CryptographicAlgorithmHMACSHA384:
		return hashOf(kmip.HashingAlgorithmSHA_384)
	case kmip.CryptographicAlgorithmHMACSHA512:
		return hashOf(kmip.HashingAlgorithmSHA_512)
	case kmip.CryptographicAlgorithmHMAC_SHA3_224:
		return hashOf(kmip.HashingAlgorithmSHA_3_224)
	case kmip.CryptographicAlgorithmHMAC_SHA3_256:
		return hashOf(kmip.HashingAlgorithmSHA_3_256)
	case kmip.CryptographicAlgorithmHMAC_SHA3_384:
		return hashOf(kmip.HashingAlgorithmSHA_3_384)
	case kmip.CryptographicAlgorithmHMAC_SHA3_512:
		return hashOf(kmip.HashingAlgorithmSHA_3_512)
	}
	return nil
}

// newMAC makes the MAC that parameters ask for with a key of the given
// algorithm: an HMAC, or CMAC with a block cipher.
func newMAC(key []byte, own kmip.CryptographicAlgorithm, p kmip.CryptographicParameters) (hash.Hash, error) {
	if p.BlockCipherMode == kmip.BlockCipherModeCMAC {
		alg := p.CryptographicAlgorithm
		if alg == 0 {
			alg = own
		}
		block, err := newBlock(alg, key)
		if err != nil {
			return nil, err
		}
		return newCMAC(block), nil
	}
	for _, a := range []kmip.CryptographicAlgorithm{p.CryptographicAlgorithm, own} {
		if h := hmacHash(a); h != nil {
			return hmac.New(h, key), nil
		}
	}
	if h := hashOf(p.HashingAlgorithm); h != nil && p.CryptographicAlgorithm == 0 {
		return hmac.New(h, key), nil
	}
	return nil, Refuse(kmip.ResultReasonInvalidField, "the Cryptographic Parameters name no MAC: an HMAC algorithm, or the block cipher mode CMAC")
}

// cmac is NIST SP 800-38B over a whole message, which it keeps until Sum.
type cmac struct {
	block cipher.Block
	msg   []byte
}

func newCMAC(block cipher.Block) hash.Hash { return &cmac{block: block} }

func (c *cmac) Write(p []byte) (int, error) { c.msg = append(c.msg, p...); return len(p), nil }
func (c *cmac) Reset()                      { clear(c.msg); c.msg = c.msg[:0] }
func (c *cmac) Size() int                   { return c.block.BlockSize() }
func (c *cmac) BlockSize() int              { return c.block.BlockSize() }

func (c *cmac) Sum(b []byte) []byte {
	size := c.block.BlockSize()
	mask := make([]byte, size) // K1, or K2 when the last block is padded
	c.block.Encrypt(mask, mask)
	double(mask)
	x, rest := make([]byte, size), c.msg
	for len(rest) > size {
		for i := range x {
			x[i] ^= rest[i]
		}
		c.block.Encrypt(x, x)
		rest = rest[size:]
	}
	last := make([]byte, size)
	copy(last, rest)
	if len(rest) < size {
		last[len(rest)] = 0x80
		double(mask)
	}
	for i := range x {
		x[i] ^= last[i] ^ mask[i]
	}
	c.block.Encrypt(x, x)
	return append(b, x...)
}

// double multiplies by x in GF(2^64) or GF(2^128), SP 800-38B §6.1.
func double(b []byte) {
	carry := b[0] >> 7
	for i := range b {
		b[i] <<= 1
		if i+1 < len(b) {
			b[i] |= b[i+1] >> 7
		}
	}
	poly := byte(0x87)
	if len(b) == 8 {
		poly = 0x1b
	}
	b[len(b)-1] ^= poly * carry
}
