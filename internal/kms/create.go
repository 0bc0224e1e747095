package kms

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/bits"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/secret"
)

// Create makes a symmetric key (KMIP 1.4 §4.1) and returns its id once it is
// durable. AES keys have 256 bits unless a length is given; keys for 3DES and
// HMAC are made for what needs them.
func (s *Session) Create(ctx context.Context, t kmip.ObjectType, attributes []kmip.Attribute) (id string, err error) {
	if t != kmip.ObjectTypeSymmetricKey {
		return "", Refuse(kmip.ResultReasonInvalidField, "only symmetric keys are created here")
	}
	o, err := s.newObject(t, attributes)
	if err != nil {
		return "", err
	}
	if o.Length == 0 && o.Algorithm == kmip.CryptographicAlgorithmAES {
		o.Length = 256
	}
	key, err := o.generate()
	if err != nil {
		return "", err
	}
	defer key.Wipe()
	return s.add(ctx, o, key)
}

// generate makes the material of a new key of the object's algorithm and length.
func (o *object) generate() (*secret.Key, error) {
	n, err := keySize(o.Algorithm, o.Length)
	if err != nil {
		return nil, err
	}
	if o.Usage == 0 {
		return nil, Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Usage Mask is needed")
	}
	key, err := secret.Random(nil, n)
	if err != nil {
		return nil, &Error{kmip.ResultReasonCryptographicFailure, "the key could not be made", err}
	}
	if o.Algorithm == kmip.CryptographicAlgorithm3DES {
		key.Use(oddParity)
	}
	o.flag(flagGenerated, true)
	return key, nil
}

// oddParity sets the eighth bit of each byte, as FIPS 46-3 has DES keys.
func oddParity(b []byte) {
	for i := range b {
		b[i] = b[i]&^1 | byte(bits.OnesCount8(b[i]&^1)+1)&1
	}
}

// keySize is how many bytes a key to be made has. Keys are made for every cipher
// of KMIP whose keys are plain random bits, of the lengths that the cipher takes;
// AES, 3DES and HMAC are those that this server uses keys for itself.
func keySize(a kmip.CryptographicAlgorithm, length int32) (int, error) {
	var lengths []int32
	least, most := int32(0), int32(0)
	switch a {
	case 0:
		return 0, Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Algorithm is needed")
	case kmip.CryptographicAlgorithm3DES: // 112 and 168 bits, and those of parity
		switch length {
		case 112, 128:
			return 16, nil
		case 168, 192:
			return 24, nil
		}
		return 0, Refuse(kmip.ResultReasonInvalidField, "a 3DES key has 112 or 168 bits, not %d", length)
	case kmip.CryptographicAlgorithmAES, kmip.CryptographicAlgorithmCamellia, kmip.CryptographicAlgorithmTwofish:
		lengths = []int32{128, 192, 256}
	case kmip.CryptographicAlgorithmSKIPJACK:
		lengths = []int32{80}
	case kmip.CryptographicAlgorithmIDEA:
		lengths = []int32{128}
	case kmip.CryptographicAlgorithmChaCha20, kmip.CryptographicAlgorithmChaCha20Poly1305:
		lengths = []int32{256}
	case kmip.CryptographicAlgorithmCAST5:
		least, most = 40, 128
	case kmip.CryptographicAlgorithmBlowfish:
		least, most = 32, 448
	default:
		if hmacHash(a) == nil {
			return 0, Refuse(kmip.ResultReasonInvalidField, "no keys are made for this algorithm; one from elsewhere can be registered")
		}
		least, most = 80, MaxMaterial*8
	}
	if !slices.Contains(lengths, length) && (length < least || length > most) || length <= 0 || length%8 != 0 {
		return 0, Refuse(kmip.ResultReasonInvalidField, "no key of this algorithm has %d bits", length)
	}
	return int(length / 8), nil
}

// Register keeps an object that the client brings (KMIP 1.4 §4.3). It takes
// over m.Bytes.
func (s *Session) Register(ctx context.Context, m Material, attributes []kmip.Attribute) (string, error) {
	defer m.Bytes.Wipe()
	o, err := s.newObject(m.Type, attributes)
	if err == nil {
		err = o.adopt(m)
	}
	if err == nil && m.Wrapping != nil {
		err = s.checkWrapped(ctx, m)
	}
	if err != nil {
		return "", err
	}
	return s.add(ctx, o, m.Bytes)
}

// adopt checks the attributes that a client gives against the object that it
// brings, and takes from the object those that it did not give.
func (o *object) adopt(m Material) error {
	o.Subtype = m.Subtype
	if m.Format != kmip.KeyFormatTypeRaw {
		o.Format = m.Format
	}
	o.flag(flagKeyless, m.Bytes == nil)
	if m.Wrapping != nil {
		o.Wrapping = ttlv.MarshalTTLV(m.Wrapping)
		o.flag(flagStructured, m.Structured)
	}
	if o.Algorithm == 0 {
		o.Algorithm = m.Algorithm
	}
	bits := int32(0) // unknown
	if m.Bytes != nil && m.Wrapping == nil {
		bits = int32(m.Bytes.Len()) * 8
	}
	switch m.Type {
	case kmip.ObjectTypeSymmetricKey:
	case kmip.ObjectTypeSecretData:
		if o.Length == 0 {
			o.Length = m.Length
		}
		return nil
	case kmip.ObjectTypeOpaqueObject:
		if m.Bytes == nil {
			return Refuse(kmip.ResultReasonInvalidField, "the opaque object has no value")
		}
		return nil
	default:
		return Refuse(kmip.ResultReasonInvalidField, "symmetric keys, secret data and opaque objects are kept here, no others")
	}
	if o.Length == 0 {
		o.Length = max(m.Length, 0)
	}
	if o.Length == 0 {
		o.Length = bits
	}
	parity := o.Algorithm == kmip.CryptographicAlgorithm3DES && o.Length/7*8 == bits
	switch {
	case o.Algorithm == 0 || m.Algorithm != 0 && m.Algorithm != o.Algorithm:
		return Refuse(kmip.ResultReasonInvalidField, "the key's Cryptographic Algorithm is missing or given twice with different values")
	case m.Length != 0 && m.Length != o.Length, bits != 0 && o.Length != bits && !parity:
		return Refuse(kmip.ResultReasonInvalidField, "the key has %d bits, and another Cryptographic Length was given", bits)
	case o.Algorithm == kmip.CryptographicAlgorithmAES && o.Length != 128 && o.Length != 192 && o.Length != 256:
		return Refuse(kmip.ResultReasonInvalidField, "an AES key has 128, 192 or 256 bits, not %d", o.Length)
	case o.Usage == 0:
		return Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Usage Mask is needed")
	case m.Bytes == nil && m.Wrapping != nil:
		return Refuse(kmip.ResultReasonInvalidField, "a key without a value cannot be wrapped")
	}
	return nil
}

// newObject makes an object of the attributes that a client gives for it.
func (s *Session) newObject(t kmip.ObjectType, attributes []kmip.Attribute) (*object, error) {
	now := s.now()
	o := &object{Type: t, State: kmip.StatePreActive, Initial: now, LastChange: now}
	if err := o.give(attributes, now); err != nil {
		return nil, err
	}
	return o, nil
}

// give sets the attributes of a new object.
func (o *object) give(attributes []kmip.Attribute, now time.Time) error {
	for _, a := range attributes {
		r, ok := ruleOf(a.AttributeName)
		if !ok || !r.given {
			return Refuse(kmip.ResultReasonInvalidField, "attribute %q cannot be given for a new object", a.AttributeName)
		}
		set := o.set
		if a.AttributeName == kmip.AttributeNameSensitive || a.AttributeName == kmip.AttributeNameExtractable {
			set = func(a kmip.Attribute, _ time.Time) error { return o.setGuard(a) }
		}
		if err := set(a, now); err != nil {
			return asInvalidField(err)
		}
	}
	o.flag(flagAlwaysSensitive, o.is(flagSensitive))
	o.flag(flagNeverExtractable, o.is(flagInextractable))
	return nil
}

// asInvalidField: what is illegal to do to an object is an invalid field of one
// to be made (KMIP 1.4 §11.1, §11.3).
func asInvalidField(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Reason == kmip.ResultReasonIllegalOperation {
		return &Error{kmip.ResultReasonInvalidField, e.Message, e.cause}
	}
	return err
}

// add writes a new object. key stays the caller's to wipe.
func (s *Session) add(ctx context.Context, o *object, key *secret.Key) (id string, err error) {
	err = s.transact(ctx, func(t *tx) error {
		id, err = t.create(o, key)
		return err
	})
	return id, asInvalidField(err)
}

// holds gives the object its material, to be written with it, and the digest of
// that (KMIP 1.4 §3.17: not for opaque objects, nor for what is not known here).
func (o *object) holds(key *secret.Key) {
	o.material, o.sealed.fresh, o.Digest = 0, key, nil
	if key == nil {
		return
	}
	o.material = key.Len()
	if o.Type == kmip.ObjectTypeOpaqueObject || len(o.Wrapping) > 0 {
		return
	}
	key.Use(func(b []byte) {
		h := sha256.New()
		if o.Format == kmip.KeyFormatTypeTransparentSymmetricKey { // of the structure's encoding
			h.Write(ttlvHeader(kmip.TagKeyMaterial, ttlv.TypeStructure, 8+(len(b)+7)&^7))
			h.Write(ttlvHeader(kmip.TagKey, ttlv.TypeByteString, len(b)))
			h.Write(b)
			h.Write(make([]byte, -len(b)&7))
		} else {
			h.Write(b)
		}
		o.Digest = h.Sum(nil)
	})
}

// ttlvHeader is the first 8 bytes of an item, KMIP 1.4 §9.1.1.
func ttlvHeader(tag int, typ ttlv.Type, n int) []byte {
	h := binary.BigEndian.AppendUint32(nil, uint32(tag)<<8|uint32(typ))
	return binary.BigEndian.AppendUint32(h, uint32(n))
}
