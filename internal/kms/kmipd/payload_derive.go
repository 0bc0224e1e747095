package kmipd

import (
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
)

// The payloads that the codec does not have, in its manner: fields are encoded
// in order, under the tag of their name.

// deriveKeyRequest is KMIP 1.4 §4.6.
type deriveKeyRequest struct {
	ObjectType           kmip.ObjectType
	UniqueIdentifier     []string
	DerivationMethod     derivationMethod
	DerivationParameters derivationParameters
	TemplateAttribute    kmip.TemplateAttribute
}

// derivationMethod is an enumeration that the codec has no type for.
type derivationMethod kms.DerivationMethod

func (m *derivationMethod) TagDecodeTTLV(d *ttlv.Decoder, tag int) error {
	v, err := d.Enum(kmip.TagDerivationMethod, tag)
	*m = derivationMethod(v)
	return err
}

func (m *derivationMethod) TagEncodeTTLV(e *ttlv.Encoder, tag int) {
	e.Enum(kmip.TagDerivationMethod, tag, uint32(*m))
}

type derivationParameters struct {
	CryptographicParameters *kmip.CryptographicParameters
	InitializationVector    []byte `ttlv:",omitempty"`
	DerivationData          []byte `ttlv:",omitempty"`
	Salt                    []byte `ttlv:",omitempty"`
	IterationCount          int32  `ttlv:",omitempty"`
}

type deriveKeyResponse struct {
	UniqueIdentifier string
}

func (*deriveKeyRequest) Operation() kmip.Operation  { return kmip.OperationDeriveKey }
func (*deriveKeyResponse) Operation() kmip.Operation { return kmip.OperationDeriveKey }

func deriveKey(c *call, r *deriveKeyRequest) (kmip.OperationPayload, error) {
	attributes, err := c.template(&r.TemplateAttribute)
	if err != nil {
		return nil, err
	}
	ids := r.UniqueIdentifier
	if len(ids) == 0 {
		ids = []string{c.placeholder}
	}
	c.object = ids[0]
	p := r.DerivationParameters
	d := kms.Derivation{IV: p.InitializationVector, Data: p.DerivationData, Salt: p.Salt, Iterations: p.IterationCount}
	if p.CryptographicParameters != nil {
		d.Parameters = *p.CryptographicParameters
	}
	id, err := c.session.DeriveKey(c, r.ObjectType, ids, kms.DerivationMethod(r.DerivationMethod), d, attributes)
	if err != nil {
		return nil, err
	}
	c.placeholder, c.object = id, id
	c.changed("derived", id, "base", ids[0])
	return &deriveKeyResponse{UniqueIdentifier: id}, nil
}
