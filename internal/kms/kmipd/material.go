package kmipd

import (
	"bytes"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kms"
	"mortise/internal/secret"
)

// Get and Register are where key bytes cross the wire. They are in the codec's
// structures only from here to the encoded response, or from the request to
// here, and those bytes are zeroed after.

func get(c *call, r *payloads.GetRequestPayload) (kmip.OperationPayload, error) {
	switch {
	case r.KeyFormatType != 0 && r.KeyFormatType != kmip.KeyFormatTypeRaw:
		return nil, kms.Refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "keys are given as Raw only")
	case r.KeyCompressionType != 0:
		return nil, kms.Refuse(kmip.ResultReasonKeyCompressionTypeNotSupported, "keys are not compressed here")
	case r.KeyWrappingSpecification != nil:
		return nil, kms.Refuse(kmip.ResultReasonFeatureNotSupported, "keys are not wrapped here")
	}
	id := c.id(r.UniqueIdentifier)
	m, err := c.session.Get(c, id)
	if err != nil {
		return nil, err
	}
	defer m.Bytes.Wipe()
	var value []byte
	m.Bytes.Use(func(b []byte) { value = bytes.Clone(b) })
	c.reply.secrets = append(c.reply.secrets, value)
	c.placeholder = id
	c.s.log.Debug("kmip: object read", "object", id, "client", c.session.Name, "from", c.reply.from)
	return &payloads.GetResponsePayload{ObjectType: m.Type, UniqueIdentifier: id, Object: toObject(m, value)}, nil
}

func toObject(m kms.Material, value []byte) kmip.Object {
	block := kmip.KeyBlock{
		KeyFormatType:          kmip.KeyFormatTypeRaw,
		KeyValue:               &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &value}}},
		CryptographicAlgorithm: m.Algorithm,
		CryptographicLength:    m.Length,
	}
	switch m.Type {
	case kmip.ObjectTypeSecretData:
		return &kmip.SecretData{SecretDataType: kmip.SecretDataType(m.Subtype), KeyBlock: block}
	case kmip.ObjectTypeOpaqueObject:
		return &kmip.OpaqueObject{OpaqueDataType: kmip.OpaqueDataType(m.Subtype), OpaqueDataValue: value}
	}
	return &kmip.SymmetricKey{KeyBlock: block}
}

func register(c *call, r *payloads.RegisterRequestPayload) (kmip.OperationPayload, error) {
	m, err := fromObject(r.Object)
	if err != nil {
		return nil, err
	}
	attributes, err := c.template(&r.TemplateAttribute)
	if err != nil {
		m.Bytes.Wipe()
		return nil, err
	}
	id, err := c.session.Register(c, m, attributes)
	if err != nil {
		return nil, err
	}
	c.placeholder, c.object = id, id
	c.changed("registered", id)
	return &payloads.RegisterResponsePayload{UniqueIdentifier: id}, nil
}

// fromObject takes the bytes of an object into locked memory and zeroes them
// where they were.
func fromObject(o kmip.Object) (kms.Material, error) {
	m := kms.Material{Type: o.ObjectType()}
	var (
		value []byte
		block *kmip.KeyBlock
	)
	switch o := o.(type) {
	case *kmip.SymmetricKey:
		block = &o.KeyBlock
	case *kmip.SecretData:
		block, m.Subtype = &o.KeyBlock, uint32(o.SecretDataType)
	case *kmip.OpaqueObject:
		value, m.Subtype = o.OpaqueDataValue, uint32(o.OpaqueDataType)
	default:
		return m, kms.Refuse(kmip.ResultReasonInvalidField, "symmetric keys, secret data and opaque objects are kept here, no others")
	}
	if block != nil {
		m.Algorithm, m.Length = block.CryptographicAlgorithm, block.CryptographicLength
		var err error
		if value, err = blockBytes(block); err != nil {
			return m, err
		}
	}
	if len(value) == 0 || len(value) > kms.MaxMaterial {
		clear(value)
		return m, kms.Refuse(kmip.ResultReasonInvalidField, "an object has 1 to %d bytes, not %d", kms.MaxMaterial, len(value))
	}
	var err error
	m.Bytes, err = secret.Take(value)
	return m, err
}

func blockBytes(b *kmip.KeyBlock) ([]byte, error) {
	switch {
	case b.KeyWrappingData != nil:
		return nil, kms.Refuse(kmip.ResultReasonFeatureNotSupported, "wrapped keys are not taken here")
	case b.KeyCompressionType != 0:
		return nil, kms.Refuse(kmip.ResultReasonKeyCompressionTypeNotSupported, "compressed keys are not taken here")
	case b.KeyValue == nil || b.KeyValue.Plain == nil:
		return nil, kms.Refuse(kmip.ResultReasonInvalidField, "the key block has no key value in clear")
	case len(b.KeyValue.Plain.Attribute) > 0:
		return nil, kms.Refuse(kmip.ResultReasonInvalidField, "attributes belong into the template attribute, not into the key value")
	}
	material := b.KeyValue.Plain.KeyMaterial
	switch b.KeyFormatType {
	case kmip.KeyFormatTypeRaw, kmip.KeyFormatTypeOpaque:
		if material.Bytes != nil {
			return *material.Bytes, nil
		}
	case kmip.KeyFormatTypeTransparentSymmetricKey:
		if material.TransparentSymmetricKey != nil {
			return material.TransparentSymmetricKey.Key, nil
		}
	default:
		return nil, kms.Refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "keys are taken as Raw, Opaque or Transparent Symmetric Key")
	}
	return nil, kms.Refuse(kmip.ResultReasonInvalidField, "the key block has no key material")
}
