package kms

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"errors"
)

// AES key wrap: RFC 3394 (NIST SP 800-38F KW) and, for keys of any length, RFC
// 5649 (KWP). Both work in half blocks of 8 bytes under a 16-byte block cipher.

const half = 8

var (
	errWrapLength = errors.New("the key has a length that cannot be wrapped so")
	errUnwrap     = errors.New("the wrapped key does not open with this wrapping key")

	wrapIV = [half]byte{0xa6, 0xa6, 0xa6, 0xa6, 0xa6, 0xa6, 0xa6, 0xa6} // RFC 3394 §2.2.3.1
	padIV  = [4]byte{0xa6, 0x59, 0x59, 0xa6}                            // RFC 5649 §3
)

// wrapKey is RFC 3394: plain has 16 bytes or more, a multiple of 8.
func wrapKey(block cipher.Block, plain []byte) ([]byte, error) {
	if len(plain) < 2*half || len(plain)%half != 0 {
		return nil, errWrapLength
	}
	return wrapRounds(block, wrapIV, plain), nil
}

func unwrapKey(block cipher.Block, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 3*half || len(wrapped)%half != 0 {
		return nil, errUnwrap
	}
	iv, plain := unwrapRounds(block, wrapped)
	if subtle.ConstantTimeCompare(iv[:], wrapIV[:]) != 1 {
		clear(plain)
		return nil, errUnwrap
	}
	return plain, nil
}

// wrapPadded is RFC 5649: plain has 1 byte or more.
func wrapPadded(block cipher.Block, plain []byte) ([]byte, error) {
	if len(plain) == 0 || uint64(len(plain)) > 1<<32-1 {
		return nil, errWrapLength
	}
	var iv [half]byte
	copy(iv[:], padIV[:])
	binary.BigEndian.PutUint32(iv[4:], uint32(len(plain)))
	padded := make([]byte, (len(plain)+half-1)/half*half)
	defer clear(padded)
	copy(padded, plain)
	if len(padded) == half { // one block, encrypted as it is
		out := append(iv[:], padded...)
		block.Encrypt(out, out)
		return out, nil
	}
	return wrapRounds(block, iv, padded), nil
}

func unwrapPadded(block cipher.Block, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 2*half || len(wrapped)%half != 0 {
		return nil, errUnwrap
	}
	var iv [half]byte
	var padded []byte
	if len(wrapped) == 2*half {
		out := make([]byte, 2*half)
		block.Decrypt(out, wrapped)
		copy(iv[:], out)
		padded = out[half:]
	} else {
		iv, padded = unwrapRounds(block, wrapped)
	}
	n := uint64(binary.BigEndian.Uint32(iv[4:]))
	ok := subtle.ConstantTimeCompare(iv[:4], padIV[:])
	if n > uint64(len(padded)) || n+half <= uint64(len(padded)) {
		ok, n = 0, 0
	}
	var rest byte
	for _, b := range padded[n:] {
		rest |= b
	}
	if ok&subtle.ConstantTimeByteEq(rest, 0) != 1 {
		clear(padded)
		return nil, errUnwrap
	}
	return padded[:n], nil
}

// wrapRounds is W of SP 800-38F §6.1: six passes over all half blocks.
func wrapRounds(block cipher.Block, iv [half]byte, plain []byte) []byte {
	out := make([]byte, half+len(plain))
	copy(out[half:], plain)
	var b [2 * half]byte
	copy(b[:half], iv[:])
	t := uint64(0)
	for range 6 {
		for i := half; i < len(out); i += half {
			t++
			copy(b[half:], out[i:])
			block.Encrypt(b[:], b[:])
			xorCounter(b[:half], t)
			copy(out[i:], b[half:])
		}
	}
	copy(out, b[:half])
	return out
}

func unwrapRounds(block cipher.Block, wrapped []byte) (iv [half]byte, plain []byte) {
	plain = make([]byte, len(wrapped)-half)
	copy(plain, wrapped[half:])
	var b [2 * half]byte
	defer clear(b[:])
	copy(b[:half], wrapped)
	for t := uint64(6 * len(plain) / half); t > 0; {
		for i := len(plain) - half; i >= 0; i -= half {
			xorCounter(b[:half], t)
			t--
			copy(b[half:], plain[i:i+half])
			block.Decrypt(b[:], b[:])
			copy(plain[i:], b[half:])
		}
	}
	copy(iv[:], b[:half])
	return iv, plain
}

func xorCounter(b []byte, t uint64) {
	binary.BigEndian.PutUint64(b, binary.BigEndian.Uint64(b)^t)
}
