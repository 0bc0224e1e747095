package kms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"

	"github.com/ovh/kmip-go"
)

// symmetric is one way to encrypt with one key: NIST SP 800-38A's modes and
// 38D's GCM, over AES or 3DES. The block cipher holds the expanded key on the Go
// heap until it is collected; secret.LockDown keeps it out of dumps.
type symmetric struct {
	block cipher.Block
	mode  kmip.BlockCipherMode
	pad   kmip.PaddingMethod
	tag   int // bytes, GCM
}

func newBlock(alg kmip.CryptographicAlgorithm, key []byte) (block cipher.Block, err error) {
	switch alg {
	case kmip.CryptographicAlgorithmAES:
		block, err = aes.NewCipher(key)
	case kmip.CryptographicAlgorithm3DES:
		if len(key) == 16 { // two keys: the first comes again
			key = append(key[:16:16], key[:8]...)
			defer clear(key)
		}
		block, err = des.NewTripleDESCipher(key)
	default:
		return nil, Refuse(kmip.ResultReasonInvalidField, "of the block ciphers, AES and 3DES are here")
	}
	if err != nil {
		return nil, Refuse(kmip.ResultReasonCryptographicFailure, "the key has %d bits, which this cipher does not take", len(key)*8)
	}
	return block, nil
}

// newSymmetric prepares what parameters ask for with a key of the algorithm own.
func newSymmetric(own kmip.CryptographicAlgorithm, key []byte, p kmip.CryptographicParameters) (*symmetric, error) {
	if p.CryptographicAlgorithm != 0 && p.CryptographicAlgorithm != own {
		return nil, Refuse(kmip.ResultReasonInvalidField, "the Cryptographic Parameters name another algorithm than the key's")
	}
	block, err := newBlock(own, key)
	if err != nil {
		return nil, err
	}
	c := &symmetric{block: block, mode: p.BlockCipherMode, pad: p.PaddingMethod, tag: int(p.TagLength)}
	switch c.mode {
	case kmip.BlockCipherModeECB, kmip.BlockCipherModeCBC:
		switch c.pad {
		case 0:
			c.pad = kmip.PaddingMethodNone
		case kmip.PaddingMethodNone, kmip.PaddingMethodPKCS5, kmip.PaddingMethodANSIX9_23, kmip.PaddingMethodISO10126:
		default:
			return nil, Refuse(kmip.ResultReasonInvalidField, "the padding methods here are None, PKCS5, ANSI X9.23 and ISO 10126")
		}
		return c, nil
	case kmip.BlockCipherModeCFB, kmip.BlockCipherModeOFB, kmip.BlockCipherModeCTR:
	case kmip.BlockCipherModeGCM:
		switch {
		case block.BlockSize() != aes.BlockSize:
			return nil, Refuse(kmip.ResultReasonInvalidField, "GCM works with AES only")
		case c.tag == 0:
			c.tag = 16
		case c.tag < 12 || c.tag > 16: // SP 800-38D §5.2.1.2; the reason is that of OASIS case CS-BC-M-GCM-1-14
			return nil, Refuse(kmip.ResultReasonGeneralFailure, "a GCM tag has 12 to 16 bytes, not %d", c.tag)
		}
	case 0:
		return nil, Refuse(kmip.ResultReasonInvalidField, "no Block Cipher Mode is given, and the key's Cryptographic Parameters name none")
	default:
		return nil, Refuse(kmip.ResultReasonInvalidField, "the block cipher modes here are ECB, CBC, CFB, OFB, CTR and GCM")
	}
	if c.pad != 0 && c.pad != kmip.PaddingMethodNone {
		return nil, Refuse(kmip.ResultReasonInvalidField, "this block cipher mode takes no padding")
	}
	return c, nil
}

// ivLen is the length of the IV that a random one gets, 0 for a mode without.
func (c *symmetric) ivLen() int {
	switch c.mode {
	case kmip.BlockCipherModeECB:
		return 0
	case kmip.BlockCipherModeGCM:
		return 12
	}
	return c.block.BlockSize()
}

// ivFor returns the IV to encrypt with and whether it was made here.
func (c *symmetric) ivFor(given []byte, p kmip.CryptographicParameters) (iv []byte, made bool, err error) {
	switch {
	case c.ivLen() == 0:
		return nil, false, nil
	case len(given) > 0:
		iv, err = c.checkIV(given, p)
		return iv, false, err
	case p.RandomIV == nil || !*p.RandomIV:
		return nil, false, Refuse(kmip.ResultReasonInvalidMessage, "an IV is needed; with Random IV in the Cryptographic Parameters the server makes one")
	}
	iv = make([]byte, c.ivLen())
	_, err = rand.Read(iv)
	return iv, true, err
}

// checkIV checks a client's IV and completes it with the initial counter where
// CTR has one.
func (c *symmetric) checkIV(iv []byte, p kmip.CryptographicParameters) ([]byte, error) {
	size := c.block.BlockSize()
	switch {
	case c.ivLen() == 0:
		return nil, nil
	case len(iv) == 0:
		return nil, Refuse(kmip.ResultReasonInvalidMessage, "the IV is missing")
	case c.mode == kmip.BlockCipherModeGCM:
		if len(iv) > 1<<10 {
			return nil, Refuse(kmip.ResultReasonInvalidField, "a GCM nonce has at most 1024 bytes here")
		}
		return iv, nil
	case len(iv) == size:
		return iv, nil
	case c.mode == kmip.BlockCipherModeCTR && p.InitialCounterValue != nil && len(iv) < size && size-len(iv) >= 4:
		full := make([]byte, size)
		copy(full, iv)
		binary.BigEndian.PutUint32(full[size-4:], uint32(*p.InitialCounterValue))
		return full, nil
	}
	return nil, Refuse(kmip.ResultReasonInvalidField, "the IV has %d bytes, and this mode takes %d", len(iv), size)
}

// encrypt returns the ciphertext, and for GCM the tag.
func (c *symmetric) encrypt(iv, aad, plain []byte) (out, tag []byte, err error) {
	if c.mode == kmip.BlockCipherModeGCM {
		g, err := cipher.NewGCMWithNonceSize(c.block, len(iv))
		if err != nil {
			return nil, nil, Refuse(kmip.ResultReasonInvalidMessage, "the nonce is missing")
		}
		out = g.Seal(nil, iv, plain, aad)
		return out[:len(plain):len(plain)], out[len(plain) : len(plain)+c.tag], nil
	}
	if out, err = c.padded(plain); err != nil {
		return nil, nil, err
	}
	if len(iv) != c.ivLen() {
		return nil, nil, Refuse(kmip.ResultReasonInvalidMessage, "the IV is missing or has another length than this mode takes")
	}
	c.forward(iv, out)
	return out, nil, nil
}

// decrypt is the reverse. A tag or padding that is wrong is one and the same
// error.
func (c *symmetric) decrypt(iv, aad, data, tag []byte) ([]byte, error) {
	wrong := Refuse(kmip.ResultReasonCryptographicFailure, "the data does not decrypt with this key")
	size := c.block.BlockSize()
	switch c.mode {
	case kmip.BlockCipherModeGCM:
		g, err := cipher.NewGCMWithNonceSize(c.block, len(iv))
		if err != nil {
			return nil, Refuse(kmip.ResultReasonInvalidMessage, "the nonce is missing")
		}
		if len(tag) != c.tag {
			return nil, Refuse(kmip.ResultReasonCryptographicFailure, "the tag has %d bytes, and %d are asked for", len(tag), c.tag)
		}
		// The mode being a stream cipher, sealing the ciphertext gives the
		// plaintext; sealing that gives the whole tag, of which c.tag bytes count.
		plain := g.Seal(nil, iv, data, aad)[:len(data)]
		full := g.Seal(nil, iv, plain, aad)[len(data):]
		if subtle.ConstantTimeCompare(full[:c.tag], tag) != 1 {
			clear(plain)
			return nil, wrong
		}
		return plain, nil
	case kmip.BlockCipherModeECB, kmip.BlockCipherModeCBC:
		if len(data)%size != 0 || len(data) == 0 && c.pad != kmip.PaddingMethodNone {
			return nil, wrong
		}
	}
	if len(iv) != c.ivLen() {
		return nil, Refuse(kmip.ResultReasonInvalidMessage, "the IV is missing or has another length than this mode takes")
	}
	plain := append([]byte{}, data...)
	c.backward(iv, plain)
	plain, ok := c.unpadded(plain)
	if !ok {
		clear(plain)
		return nil, wrong
	}
	return plain, nil
}

// forward encrypts b in place.
func (c *symmetric) forward(iv, b []byte) {
	size := c.block.BlockSize()
	switch c.mode {
	case kmip.BlockCipherModeECB:
		for ; len(b) >= size; b = b[size:] {
			c.block.Encrypt(b, b)
		}
	case kmip.BlockCipherModeCBC:
		cipher.NewCBCEncrypter(c.block, iv).CryptBlocks(b, b)
	case kmip.BlockCipherModeCTR:
		cipher.NewCTR(c.block, iv).XORKeyStream(b, b)
	default:
		c.feedback(iv, b, false)
	}
}

// backward decrypts b in place.
func (c *symmetric) backward(iv, b []byte) {
	size := c.block.BlockSize()
	switch c.mode {
	case kmip.BlockCipherModeECB:
		for ; len(b) >= size; b = b[size:] {
			c.block.Decrypt(b, b)
		}
	case kmip.BlockCipherModeCBC:
		cipher.NewCBCDecrypter(c.block, iv).CryptBlocks(b, b)
	case kmip.BlockCipherModeCTR:
		cipher.NewCTR(c.block, iv).XORKeyStream(b, b)
	default:
		c.feedback(iv, b, true)
	}
}

// feedback is OFB, and CFB with segments of a whole block (SP 800-38A §6.3,
// §6.4).
func (c *symmetric) feedback(iv, b []byte, decrypt bool) {
	size := c.block.BlockSize()
	stream := append([]byte{}, iv...)
	next := make([]byte, size)
	for len(b) > 0 {
		c.block.Encrypt(stream, stream)
		n := min(size, len(b))
		copy(next, b[:n]) // the ciphertext when decrypting
		subtle.XORBytes(b[:n], b[:n], stream)
		if c.mode == kmip.BlockCipherModeCFB && n == size {
			if !decrypt {
				copy(next, b[:n])
			}
			copy(stream, next)
		}
		b = b[n:]
	}
}

// padded returns a copy of plain that the mode can encrypt.
func (c *symmetric) padded(plain []byte) ([]byte, error) {
	size := c.block.BlockSize()
	switch c.mode {
	case kmip.BlockCipherModeECB, kmip.BlockCipherModeCBC:
	default:
		return append([]byte{}, plain...), nil
	}
	if c.pad == kmip.PaddingMethodNone {
		if len(plain)%size != 0 {
			return nil, Refuse(kmip.ResultReasonCryptographicFailure, "without padding, the data is a multiple of %d bytes", size)
		}
		return append([]byte{}, plain...), nil
	}
	n := size - len(plain)%size
	out := make([]byte, len(plain)+n)
	copy(out, plain)
	end := out[len(plain):]
	switch c.pad {
	case kmip.PaddingMethodPKCS5:
		for i := range end {
			end[i] = byte(n)
		}
	case kmip.PaddingMethodISO10126:
		if _, err := rand.Read(end); err != nil {
			return nil, err
		}
	}
	end[n-1] = byte(n) // ANSI X9.23: zeros before it
	return out, nil
}

// unpadded cuts the padding off; false when it is none.
func (c *symmetric) unpadded(b []byte) ([]byte, bool) {
	if c.mode != kmip.BlockCipherModeECB && c.mode != kmip.BlockCipherModeCBC || c.pad == kmip.PaddingMethodNone {
		return b, true
	}
	size := c.block.BlockSize()
	n := int(b[len(b)-1])
	if n < 1 || n > size {
		return b, false
	}
	want := byte(0)
	if c.pad == kmip.PaddingMethodPKCS5 {
		want = byte(n)
	}
	ok := 1
	for _, x := range b[len(b)-n : len(b)-1] {
		if c.pad != kmip.PaddingMethodISO10126 {
			ok &= subtle.ConstantTimeByteEq(x, want)
		}
	}
	return b[:len(b)-n], ok == 1
}
