package kms

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/secret"
)

// Key wrapping, KMIP 1.4 §2.1.5 and §2.1.6: by a key of the same instance, with
// AES key wrap (RFC 3394), with padding (RFC 5649), or AES-GCM with a random
// nonce and the tag of 16 bytes behind the ciphertext. What is wrapped is the
// key material alone (No Encoding) or the encoded Key Value with attributes
// (TTLV Encoding, which is the default).

// wrap puts key into m as spec asks.
func (s *Session) wrap(ctx context.Context, id string, o *object, m *Material, key *secret.Key, spec kmip.KeyWrappingSpecification) error {
	switch {
	case o.Type == kmip.ObjectTypeOpaqueObject:
		return Refuse(kmip.ResultReasonIllegalOperation, "an opaque object has no key block that could be wrapped")
	case spec.WrappingMethod != kmip.WrappingMethodEncrypt || spec.MACSignatureKeyInformation != nil:
		return Refuse(kmip.ResultReasonFeatureNotSupported, "the wrapping method here is Encrypt")
	case spec.EncryptionKeyInformation == nil:
		return Refuse(kmip.ResultReasonInvalidField, "the Key Wrapping Specification names no encryption key")
	case spec.EncodingOption == kmip.EncodingOptionNoEncoding && len(spec.AttributeName) > 0:
		return Refuse(kmip.ResultReasonEncodingOptionError, "attributes are wrapped with TTLV Encoding only")
	case spec.EncodingOption > kmip.EncodingOptionTTLVEncoding:
		return Refuse(kmip.ResultReasonEncodingOptionError, "the encoding option is not known")
	}
	info := *spec.EncryptionKeyInformation
	if info.UniqueIdentifier == id {
		return Refuse(kmip.ResultReasonIllegalOperation, "a key cannot wrap itself")
	}
	by, err := s.online(ctx, info.UniqueIdentifier)
	if err != nil {
		return err
	}
	if err := by.mayWrap(kmip.CryptographicUsageWrapKey); err != nil {
		return err
	}
	if err := by.mayProtect(s.now()); err != nil {
		return err
	}
	plain, err := s.keyValue(id, o, key, m.Format, spec)
	if err != nil {
		return err
	}
	defer clear(plain)
	block, mode, err := s.wrapper(ctx, by, info.CryptographicParameters)
	if err != nil {
		return err
	}
	m.Wrapping = &kmip.KeyWrappingData{
		WrappingMethod: spec.WrappingMethod, EncryptionKeyInformation: &info, EncodingOption: spec.EncodingOption,
	}
	var out []byte
	switch mode {
	case kmip.BlockCipherModeNISTKeyWrap:
		out, err = wrapKey(block, plain)
	case kmip.BlockCipherModeAESKeyWrapPadding:
		out, err = wrapPadded(block, plain)
	default:
		iv := make([]byte, 12)
		if _, err = rand.Read(iv); err == nil {
			var g cipher.AEAD
			if g, err = cipher.NewGCM(block); err == nil {
				out, m.Wrapping.IVCounterNonce = g.Seal(nil, iv, plain, nil), iv
			}
		}
	}
	if err != nil {
		return &Error{kmip.ResultReasonCryptographicFailure, "the key could not be wrapped: " + err.Error(), err}
	}
	m.Bytes, err = secret.Take(out)
	return err
}

// mayWrap checks that the object is an AES key meant for the use.
func (o *object) mayWrap(use kmip.CryptographicUsageMask) error {
	switch {
	case o.Type != kmip.ObjectTypeSymmetricKey || o.Algorithm != kmip.CryptographicAlgorithmAES:
		return Refuse(kmip.ResultReasonIllegalOperation, "the wrapping key is no AES key")
	case o.Usage&int32(use) == 0:
		return Refuse(kmip.ResultReasonPermissionDenied, "the wrapping key's Cryptographic Usage Mask does not allow it")
	}
	return nil
}

// wrapper is the wrapping key's cipher and the mode: that of the request, else
// of the key's own Cryptographic Parameters, else AES key wrap.
func (s *Session) wrapper(ctx context.Context, by *object, p *kmip.CryptographicParameters) (block cipher.Block, mode kmip.BlockCipherMode, err error) {
	params, err := by.parameters(p)
	if err != nil {
		return nil, 0, err
	}
	switch mode = params.BlockCipherMode; mode {
	case 0:
		mode = kmip.BlockCipherModeNISTKeyWrap
	case kmip.BlockCipherModeNISTKeyWrap, kmip.BlockCipherModeAESKeyWrapPadding, kmip.BlockCipherModeGCM:
	default:
		return nil, 0, Refuse(kmip.ResultReasonFeatureNotSupported, "keys are wrapped with NIST Key Wrap, AES Key Wrap Padding or GCM")
	}
	if params.TagLength != 0 && params.TagLength != 16 {
		return nil, 0, Refuse(kmip.ResultReasonInvalidField, "keys are wrapped with a tag of 16 bytes")
	}
	key, err := s.plain(ctx, by)
	if err != nil {
		return nil, 0, err
	}
	defer key.Wipe()
	key.Use(func(b []byte) { block, err = newBlock(by.Algorithm, b) })
	return block, mode, err
}

// keyValue is what is wrapped. It is the caller's to clear.
func (s *Session) keyValue(id string, o *object, key *secret.Key, f kmip.KeyFormatType, spec kmip.KeyWrappingSpecification) (plain []byte, err error) {
	if spec.EncodingOption == kmip.EncodingOptionNoEncoding {
		key.Use(func(b []byte) { plain = bytes.Clone(b) })
		return plain, nil
	}
	var attributes []byte
	for _, name := range spec.AttributeName {
		list, err := o.instances(id, name)
		if err != nil {
			return nil, damaged(err)
		}
		for _, a := range list {
			attributes = append(attributes, ttlv.MarshalTTLV(a)...)
		}
	}
	inner := key.Len() + -key.Len()&7
	material := 8 + inner
	if f == kmip.KeyFormatTypeTransparentSymmetricKey {
		material += 8
	}
	plain = make([]byte, 0, 8+material+len(attributes)) // no growth: no copies
	plain = append(plain, ttlvHeader(kmip.TagKeyValue, ttlv.TypeStructure, material+len(attributes))...)
	tag := kmip.TagKeyMaterial
	if f == kmip.KeyFormatTypeTransparentSymmetricKey {
		plain = append(plain, ttlvHeader(tag, ttlv.TypeStructure, 8+inner)...)
		tag = kmip.TagKey
	}
	plain = append(plain, ttlvHeader(tag, ttlv.TypeByteString, key.Len())...)
	key.Use(func(b []byte) { plain = append(plain, b...) })
	plain = append(plain, make([]byte, -key.Len()&7)...)
	return append(plain, attributes...), nil
}

// checkWrapped checks a wrapped object that a client brings, as far as it can be
// without opening it: it is kept as it came (unwrap mode Not Processed).
func (s *Session) checkWrapped(ctx context.Context, m Material) error {
	w := m.Wrapping
	if w.WrappingMethod < kmip.WrappingMethodEncrypt || w.WrappingMethod > kmip.WrappingMethodTR_31 {
		return Refuse(kmip.ResultReasonInvalidField, "the wrapping method is not known")
	}
	if w.EncryptionKeyInformation == nil && w.WrappingMethod != kmip.WrappingMethodMACSign {
		return Refuse(kmip.ResultReasonInvalidField, "the Key Wrapping Data name no encryption key")
	}
	return nil
}

// unwrap opens wrapped key material with the key of this instance that wrapped
// it.
func (s *Session) unwrap(ctx context.Context, wrapped *secret.Key, w kmip.KeyWrappingData) (*secret.Key, error) {
	if w.WrappingMethod != kmip.WrappingMethodEncrypt || w.EncryptionKeyInformation == nil {
		return nil, Refuse(kmip.ResultReasonFeatureNotSupported, "the object is wrapped in a way that cannot be opened here")
	}
	by, err := s.online(ctx, w.EncryptionKeyInformation.UniqueIdentifier)
	if err != nil {
		return nil, &Error{kmip.ResultReasonItemNotFound, "the key that the object is wrapped with is not here", err}
	}
	if len(by.Wrapping) > 0 {
		return nil, Refuse(kmip.ResultReasonIllegalOperation, "the wrapping key is wrapped itself; recover it first")
	}
	if err := by.mayWrap(kmip.CryptographicUsageUnwrapKey); err != nil {
		return nil, err
	}
	if err := by.mayProcess(s.now()); err != nil {
		return nil, err
	}
	block, mode, err := s.wrapper(ctx, by, w.EncryptionKeyInformation.CryptographicParameters)
	if err != nil {
		return nil, err
	}
	var plain []byte
	wrapped.Use(func(b []byte) {
		switch mode {
		case kmip.BlockCipherModeNISTKeyWrap:
			plain, err = unwrapKey(block, b)
		case kmip.BlockCipherModeAESKeyWrapPadding:
			plain, err = unwrapPadded(block, b)
		default:
			var g cipher.AEAD
			if len(w.IVCounterNonce) == 0 {
				err = errUnwrap
			} else if g, err = cipher.NewGCMWithNonceSize(block, len(w.IVCounterNonce)); err == nil {
				plain, err = g.Open(nil, w.IVCounterNonce, b, nil)
			}
		}
	})
	defer clear(plain)
	if err == nil && w.EncodingOption != kmip.EncodingOptionNoEncoding {
		if plain, err = unwrappedMaterial(plain); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, &Error{kmip.ResultReasonCryptographicFailure, errUnwrap.Error(), err}
	}
	return secret.Copy(plain)
}

// unwrappedMaterial finds the key material in an encoded Key Value. It came out
// of a client's wrapping and is believed no more than a message.
func unwrappedMaterial(b []byte) ([]byte, error) {
	wrong := &Error{kmip.ResultReasonCryptographicFailure, "what is wrapped is no encoded Key Value", errors.New("not TTLV as expected")}
	for _, tag := range []int{kmip.TagKeyValue, kmip.TagKeyMaterial, kmip.TagKey} {
		if len(b) < 8 || int(b[0])<<16|int(b[1])<<8|int(b[2]) != tag {
			return nil, wrong
		}
		n := uint64(binary.BigEndian.Uint32(b[4:]))
		typ := ttlv.Type(b[3])
		if n > uint64(len(b)-8) {
			return nil, wrong
		}
		b = b[8 : 8+n]
		switch {
		case typ == ttlv.TypeByteString && tag != kmip.TagKeyValue && n > 0:
			return b, nil
		case typ != ttlv.TypeStructure:
			return nil, wrong
		}
	}
	return nil, wrong
}
