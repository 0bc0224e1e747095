package kmipd

import (
	"bytes"
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/secret"
)

// Get, Export, Register and Import are where key bytes cross the wire. They are
// in the codec's structures only from here to the encoded response, or from the
// request to here, and those bytes are zeroed after.

func get(c *call, r *payloads.GetRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	f, err := formOf(r.KeyFormatType, r.KeyWrapType, r.KeyCompressionType, r.KeyWrappingSpecification)
	if err != nil {
		return nil, err
	}
	if err := c.knows(f); err != nil {
		return nil, err
	}
	m, err := c.session.GetAs(c, id, f)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	c.s.log.Debug("kmip: object read", "object", id, "client", c.session.Name, "from", c.reply.from)
	return &payloads.GetResponsePayload{ObjectType: m.Type, UniqueIdentifier: id, Object: c.toObject(m)}, nil
}

func formOf(f kmip.KeyFormatType, w kmip.KeyWrapType, compression kmip.KeyCompressionType, spec *kmip.KeyWrappingSpecification) (kms.Form, error) {
	if compression != 0 {
		return kms.Form{}, kms.Refuse(kmip.ResultReasonKeyCompressionTypeNotSupported, "keys are not compressed here")
	}
	return kms.Form{Format: f, Type: w, Wrap: spec}, nil
}

// knows refuses to wrap attributes that the client's version does not have.
func (c *call) knows(f kms.Form) error {
	if f.Wrap == nil {
		return nil
	}
	for _, name := range f.Wrap.AttributeName {
		if !kms.Visible(name, c.reply.version.Minor()) {
			return kms.Refuse(kmip.ResultReasonInvalidField, "attribute %q is not known in KMIP %s", name, c.reply.version)
		}
	}
	return nil
}

// toObject takes over m.Bytes.
func (c *call) toObject(m kms.Material) kmip.Object {
	block := kmip.KeyBlock{
		KeyFormatType:          m.Format,
		CryptographicAlgorithm: m.Algorithm,
		CryptographicLength:    m.Length,
		KeyWrappingData:        m.Wrapping,
	}
	var value []byte
	if m.Bytes != nil {
		m.Bytes.Use(func(b []byte) { value = bytes.Clone(b) })
		m.Bytes.Wipe()
		c.reply.secrets = append(c.reply.secrets, value)
		material := kmip.KeyMaterial{Bytes: &value}
		if m.Format == kmip.KeyFormatTypeTransparentSymmetricKey && m.Wrapping == nil {
			material = kmip.KeyMaterial{TransparentSymmetricKey: &kmip.TransparentSymmetricKey{Key: value}}
		}
		block.KeyValue = &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: material}}
		if m.Wrapping != nil && !m.Structured {
			block.KeyValue = &kmip.KeyValue{Wrapped: &value}
		}
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
	m, inside, err := fromObject(r.Object)
	if err != nil {
		return nil, err
	}
	attributes, err := c.template(&r.TemplateAttribute)
	if err == nil {
		err = c.given(inside)
	}
	if err != nil {
		m.Bytes.Wipe()
		return nil, err
	}
	id, err := c.session.Register(c, m, append(attributes, inside...))
	if err != nil {
		return nil, err
	}
	c.placeholder, c.object = id, id
	c.changed("registered", id)
	return &payloads.RegisterResponsePayload{UniqueIdentifier: id}, nil
}

// importRequest is the codec's, with the Object Type that KMIP 1.4 §4.38 has and
// the codec looks for among the attributes.
type importRequest struct {
	UniqueIdentifier string
	ObjectType       kmip.ObjectType
	ReplaceExisting  bool
	KeyWrapType      kmip.KeyWrapType
	Attribute        []kmip.Attribute
	Object           kmip.Object
}

func (r *importRequest) TagDecodeTTLV(d *ttlv.Decoder, tag int) error {
	return d.Struct(tag, func(d *ttlv.Decoder) error {
		if err := d.TagAny(kmip.TagUniqueIdentifier, &r.UniqueIdentifier); err != nil {
			return err
		}
		if err := d.Opt(kmip.TagObjectType, &r.ObjectType); err != nil {
			return err
		}
		if err := d.Opt(kmip.TagReplaceExisting, &r.ReplaceExisting); err != nil {
			return err
		}
		if err := d.Opt(kmip.TagKeyWrapType, &r.KeyWrapType); err != nil {
			return err
		}
		if err := d.Any(&r.Attribute); err != nil {
			return err
		}
		for _, a := range r.Attribute {
			if t, ok := a.AttributeValue.(kmip.ObjectType); ok && r.ObjectType == 0 {
				r.ObjectType = t
			}
		}
		var err error
		if r.Object, err = kmip.NewObjectForType(r.ObjectType); err != nil {
			return err
		}
		return d.Any(&r.Object)
	})
}

func importObject(c *call, r *importRequest) (kmip.OperationPayload, error) {
	c.object = r.UniqueIdentifier
	m, inside, err := fromObject(r.Object)
	if err == nil {
		err = c.given(slices.Concat(r.Attribute, inside))
	}
	if err != nil {
		m.Bytes.Wipe()
		return nil, err
	}
	if r.KeyWrapType == kmip.NotWrapped && m.Wrapping != nil {
		m.Bytes.Wipe()
		return nil, kms.Refuse(kmip.ResultReasonFeatureNotSupported, "wrapped objects are kept as they come")
	}
	if err := c.session.Import(c, r.UniqueIdentifier, r.ReplaceExisting, m, append(r.Attribute, inside...)); err != nil {
		return nil, err
	}
	c.placeholder = r.UniqueIdentifier
	c.changed("imported", r.UniqueIdentifier)
	return &payloads.ImportResponsePayload{UniqueIdentifier: r.UniqueIdentifier}, nil
}

func export(c *call, r *payloads.ExportRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	f, err := formOf(r.KeyFormatType, r.KeyWrapType, r.KeyCompressionType, r.KeyWrappingSpecification)
	if err != nil {
		return nil, err
	}
	if err := c.knows(f); err != nil {
		return nil, err
	}
	m, attributes, err := c.session.Export(c, id, f)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	answer := &payloads.ExportResponsePayload{ObjectType: m.Type, UniqueIdentifier: id, Attribute: c.seen(attributes)}
	if m.Bytes != nil || m.Type != kmip.ObjectTypeOpaqueObject {
		answer.Object = c.toObject(m)
	}
	return answer, nil
}

// fromObject takes the bytes of an object into locked memory and zeroes them
// where they were. inside are the attributes of its key value.
func fromObject(o kmip.Object) (m kms.Material, inside []kmip.Attribute, err error) {
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
		return m, nil, kms.Refuse(kmip.ResultReasonInvalidField, "symmetric keys, secret data and opaque objects are kept here, no others")
	}
	m.Type = o.ObjectType()
	if block != nil {
		m.Algorithm, m.Length, m.Format, m.Wrapping = block.CryptographicAlgorithm, block.CryptographicLength, block.KeyFormatType, block.KeyWrappingData
		if value, inside, err = blockBytes(block, &m); err != nil {
			return m, nil, err
		}
		if block.KeyValue == nil {
			return m, nil, nil
		}
	}
	if len(value) == 0 || len(value) > kms.MaxMaterial {
		clear(value)
		return m, nil, kms.Refuse(kmip.ResultReasonInvalidField, "an object has 1 to %d bytes, not %d", kms.MaxMaterial, len(value))
	}
	m.Bytes, err = secret.Take(value)
	return m, inside, err
}

func blockBytes(b *kmip.KeyBlock, m *kms.Material) ([]byte, []kmip.Attribute, error) {
	switch b.KeyFormatType {
	case kmip.KeyFormatTypeRaw, kmip.KeyFormatTypeOpaque:
	case kmip.KeyFormatTypeTransparentSymmetricKey:
		if m.Type == kmip.ObjectTypeSymmetricKey {
			break
		}
		fallthrough
	default:
		return nil, nil, kms.Refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "keys are taken as Raw, Opaque or Transparent Symmetric Key, secret data as Raw or Opaque")
	}
	switch {
	case b.KeyCompressionType != 0:
		return nil, nil, kms.Refuse(kmip.ResultReasonKeyCompressionTypeNotSupported, "compressed keys are not taken here")
	case b.KeyValue == nil:
		return nil, nil, nil
	case b.KeyValue.Wrapped != nil && b.KeyWrappingData == nil:
		return nil, nil, kms.Refuse(kmip.ResultReasonInvalidField, "the key value is wrapped, and Key Wrapping Data are missing")
	case b.KeyValue.Wrapped != nil:
		return *b.KeyValue.Wrapped, nil, nil
	case b.KeyValue.Plain == nil:
		return nil, nil, kms.Refuse(kmip.ResultReasonInvalidField, "the key block has no key value")
	}
	m.Structured = b.KeyWrappingData != nil
	material := b.KeyValue.Plain.KeyMaterial
	switch {
	case material.Bytes != nil:
		return *material.Bytes, b.KeyValue.Plain.Attribute, nil
	case material.TransparentSymmetricKey != nil:
		return material.TransparentSymmetricKey.Key, b.KeyValue.Plain.Attribute, nil
	}
	return nil, nil, kms.Refuse(kmip.ResultReasonInvalidField, "the key block has no key material")
}
