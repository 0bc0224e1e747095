package kms

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"encoding/binary"
	"hash"

	"github.com/ovh/kmip-go"
)

// DerivationMethod is how DeriveKey makes a key (KMIP 1.4 §9.1.3.2.21).
type DerivationMethod uint32

// Methods of derivation.
const (
	DerivePBKDF2      DerivationMethod = 1
	DeriveHash        DerivationMethod = 2
	DeriveHMAC        DerivationMethod = 3
	DeriveEncrypt     DerivationMethod = 4
	DeriveNISTCounter DerivationMethod = 5 // NIST SP 800-108 in counter mode
	DeriveNISTFeed    DerivationMethod = 6 // in feedback mode
	DeriveNISTDouble  DerivationMethod = 7 // in double-pipeline iteration mode
)

// Derivation is the Derivation Parameters of KMIP 1.4 §4.6.
type Derivation struct {
	Parameters kmip.CryptographicParameters
	IV         []byte
	Data       []byte
	Salt       []byte
	Iterations int32
}

// Bounds on PBKDF2 (NIST SP 800-132 §5.2 asks for 1,000 iterations or more; the
// upper one keeps a request from holding a processor for long).
const maxIterations = 2_000_000

// derive makes n bytes from key, whose algorithm is alg. What it returns is the
// caller's to clear.
func derive(method DerivationMethod, key []byte, alg kmip.CryptographicAlgorithm, d Derivation, n int) ([]byte, error) {
	prf := hashOf(d.Parameters.HashingAlgorithm)
	if prf == nil {
		prf = hmacHash(d.Parameters.CryptographicAlgorithm)
	}
	if prf == nil && method != DeriveEncrypt {
		return nil, Refuse(kmip.ResultReasonInvalidField, "the derivation's Cryptographic Parameters name no hashing algorithm that is here")
	}
	var out []byte
	switch method {
	case DerivePBKDF2:
		switch {
		case d.Iterations < 1 || d.Iterations > maxIterations:
			return nil, Refuse(kmip.ResultReasonInvalidField, "PBKDF2 has an Iteration Count of 1 to %d", maxIterations)
		case len(d.Salt) == 0:
			return nil, Refuse(kmip.ResultReasonInvalidField, "PBKDF2 needs a salt")
		}
		return pbkdf2.Key(prf, string(key), d.Salt, int(d.Iterations), n)
	case DeriveHash: // of the key, or of the derivation data when there is any
		h := prf()
		if len(d.Data) > 0 {
			h.Write(d.Data)
		} else {
			h.Write(key)
		}
		out = h.Sum(nil)
	case DeriveHMAC:
		if len(d.Data) == 0 {
			return nil, Refuse(kmip.ResultReasonInvalidField, "derivation by HMAC needs Derivation Data")
		}
		h := hmac.New(prf, key)
		h.Write(d.Data)
		out = h.Sum(nil)
	case DeriveEncrypt:
		if len(d.Data) == 0 {
			return nil, Refuse(kmip.ResultReasonInvalidField, "derivation by encryption needs Derivation Data")
		}
		c, err := newSymmetric(alg, key, d.Parameters)
		if err != nil {
			return nil, err
		}
		if out, _, err = c.encrypt(d.IV, nil, d.Data); err != nil {
			return nil, err
		}
	case DeriveNISTCounter, DeriveNISTFeed, DeriveNISTDouble:
		if len(d.Data) == 0 {
			return nil, Refuse(kmip.ResultReasonInvalidField, "derivation by NIST SP 800-108 needs Derivation Data: its fixed input")
		}
		return nist108(method, hmac.New(prf, key), d.IV, d.Data, n), nil
	default:
		return nil, Refuse(kmip.ResultReasonInvalidField, "derivation method %d is not known", method)
	}
	if len(out) < n {
		clear(out)
		return nil, Refuse(kmip.ResultReasonInvalidField, "this derivation makes %d bytes, and the key needs %d", len(out), n)
	}
	clear(out[n:])
	return out[:n], nil
}

// nist108 is NIST SP 800-108 Rev. 1 §4.1 to §4.3 with a 32-bit counter before
// the fixed input, which the caller composes (label, 0x00, context, length).
func nist108(method DerivationMethod, prf hash.Hash, iv, fixed []byte, n int) []byte {
	out := make([]byte, 0, n+prf.Size())
	k, a := iv, fixed
	for i := uint32(1); len(out) < n; i++ {
		if method == DeriveNISTDouble {
			prf.Reset()
			prf.Write(a)
			a = prf.Sum(nil)
		}
		prf.Reset()
		switch method {
		case DeriveNISTFeed:
			prf.Write(k)
		case DeriveNISTDouble:
			prf.Write(a)
		}
		prf.Write(binary.BigEndian.AppendUint32(nil, i))
		prf.Write(fixed)
		k = prf.Sum(nil)
		out = append(out, k...)
	}
	clear(out[n:])
	return out[:n]
}
