package kms

import (
	"context"

	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
)

// DeriveKey makes a symmetric key or secret data of other objects and returns
// its id (KMIP 1.4 §4.6): of the first of ids, and where the method takes
// derivation data and d has none, of the second, which must be secret data. The
// objects are linked in both directions.
func (s *Session) DeriveKey(ctx context.Context, t kmip.ObjectType, ids []string, method DerivationMethod, d Derivation, attributes []kmip.Attribute) (made string, err error) {
	if t != kmip.ObjectTypeSymmetricKey && t != kmip.ObjectTypeSecretData {
		return "", Refuse(kmip.ResultReasonInvalidField, "symmetric keys and secret data are derived, no other objects")
	}
	if len(ids) == 0 || len(ids) > 2 || len(ids) == 2 && ids[0] == ids[1] {
		return "", Refuse(kmip.ResultReasonInvalidField, "a key is derived from one object, and a second one with the derivation data")
	}
	var key *secret.Key
	defer func() { key.Wipe() }()
	err = s.transact(ctx, func(x *tx) error {
		o, err := s.newObject(t, attributes)
		if err != nil {
			return err
		}
		n, err := o.derivedBytes()
		if err != nil {
			return err
		}
		base, data, err := s.derivationBase(ctx, ids)
		if err != nil {
			return err
		}
		defer base.key.Wipe()
		if data.key != nil {
			defer data.key.Wipe()
		}
		key.Wipe()
		if key, err = base.derive(data.key, method, d, n); err != nil {
			return err
		}
		for _, id := range ids {
			if err := o.link(kmip.LinkTypeDerivationBaseObjectLink, id); err != nil {
				return err
			}
		}
		if t == kmip.ObjectTypeSecretData {
			o.Subtype = uint32(kmip.SecretDataTypeSeed)
		}
		if made, err = x.create(o, key); err != nil {
			return err
		}
		for _, id := range ids {
			err := x.edit(id, func(o *object) error { return o.link(kmip.LinkTypeDerivedKeyLink, made) })
			if err != nil {
				return err
			}
		}
		return nil
	})
	return made, asInvalidField(err)
}

// derivedBytes is how many bytes the object is to have.
func (o *object) derivedBytes() (int, error) {
	if o.Length <= 0 || o.Length%8 != 0 || o.Length/8 > MaxMaterial {
		return 0, Refuse(kmip.ResultReasonInvalidField, "a derived key has a Cryptographic Length in whole bytes, up to %d bits", MaxMaterial*8)
	}
	if o.Type == kmip.ObjectTypeSecretData {
		return int(o.Length / 8), nil
	}
	if o.Usage == 0 {
		return 0, Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Usage Mask is needed")
	}
	if o.Algorithm == kmip.CryptographicAlgorithmAES || o.Algorithm == kmip.CryptographicAlgorithm3DES || o.Algorithm == 0 {
		return keySize(o.Algorithm, o.Length)
	}
	return int(o.Length / 8), nil
}

// derivationSource is an object that is derived from, opened.
type derivationSource struct {
	*object
	key *secret.Key
}

func (s *Session) derivationBase(ctx context.Context, ids []string) (base, data derivationSource, err error) {
	for i, id := range ids {
		o, err := s.online(ctx, id)
		if err != nil {
			return base, data, err
		}
		switch {
		case o.Type != kmip.ObjectTypeSecretData && (i > 0 || o.Type != kmip.ObjectTypeSymmetricKey):
			return base, data, Refuse(kmip.ResultReasonInvalidField, "keys are derived from a symmetric key or secret data, and a second object is secret data")
		case o.Usage&int32(kmip.CryptographicUsageDeriveKey) == 0:
			return base, data, Refuse(kmip.ResultReasonPermissionDenied, "the object's Cryptographic Usage Mask does not allow to derive from it")
		}
		if err := o.mayProtect(s.now()); err != nil {
			return base, data, err
		}
		key, err := s.plain(ctx, o)
		if err != nil {
			base.key.Wipe()
			return base, data, err
		}
		if i == 0 {
			base = derivationSource{o, key}
		} else {
			data = derivationSource{o, key}
		}
	}
	return base, data, nil
}

func (b derivationSource) derive(data *secret.Key, method DerivationMethod, d Derivation, n int) (key *secret.Key, err error) {
	if data != nil {
		if len(d.Data) > 0 {
			return nil, Refuse(kmip.ResultReasonInvalidField, "derivation data is given twice: in the parameters and as an object")
		}
		data.Use(func(p []byte) { d.Data = append([]byte{}, p...) })
		defer clear(d.Data)
	}
	d.Parameters, err = b.parameters(&d.Parameters)
	if err != nil {
		return nil, err
	}
	var out []byte
	b.key.Use(func(k []byte) { out, err = derive(method, k, b.Algorithm, d, n) })
	if err != nil {
		return nil, err
	}
	return secret.Take(out)
}
