package kmipd

import (
	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
)

// MAC, MACVerify, Hash, RNGRetrieve and RNGSeed: KMIP 1.4 §4.33 to §4.37.

type macRequest struct {
	UniqueIdentifier        string `ttlv:",omitempty"`
	CryptographicParameters *kmip.CryptographicParameters
	Data                    []byte `ttlv:",omitempty"`
	CorrelationValue        []byte `ttlv:",omitempty,version=v1.3.."`
	InitIndicator           *bool  `ttlv:",version=v1.3.."`
	FinalIndicator          *bool  `ttlv:",version=v1.3.."`
}

type macResponse struct {
	UniqueIdentifier string
	MACData          []byte `ttlv:",omitempty"`
}

type macVerifyRequest struct {
	UniqueIdentifier        string `ttlv:",omitempty"`
	CryptographicParameters *kmip.CryptographicParameters
	Data                    []byte `ttlv:",omitempty"`
	MACData                 []byte `ttlv:",omitempty"`
	CorrelationValue        []byte `ttlv:",omitempty,version=v1.3.."`
	InitIndicator           *bool  `ttlv:",version=v1.3.."`
	FinalIndicator          *bool  `ttlv:",version=v1.3.."`
}

type macVerifyResponse struct {
	UniqueIdentifier  string
	ValidityIndicator kmip.ValidityIndicator
}

type hashRequest struct {
	CryptographicParameters kmip.CryptographicParameters
	Data                    []byte `ttlv:",omitempty"`
	CorrelationValue        []byte `ttlv:",omitempty,version=v1.3.."`
	InitIndicator           *bool  `ttlv:",version=v1.3.."`
	FinalIndicator          *bool  `ttlv:",version=v1.3.."`
}

type hashResponse struct {
	Data []byte
}

type rngRetrieveRequest struct {
	DataLength int32
}

type rngRetrieveResponse struct {
	Data []byte
}

type rngSeedRequest struct {
	Data []byte
}

type rngSeedResponse struct {
	DataLength int32
}

func (*macRequest) Operation() kmip.Operation          { return kmip.OperationMAC }
func (*macResponse) Operation() kmip.Operation         { return kmip.OperationMAC }
func (*macVerifyRequest) Operation() kmip.Operation    { return kmip.OperationMACVerify }
func (*macVerifyResponse) Operation() kmip.Operation   { return kmip.OperationMACVerify }
func (*hashRequest) Operation() kmip.Operation         { return kmip.OperationHash }
func (*hashResponse) Operation() kmip.Operation        { return kmip.OperationHash }
func (*rngRetrieveRequest) Operation() kmip.Operation  { return kmip.OperationRNGRetrieve }
func (*rngRetrieveResponse) Operation() kmip.Operation { return kmip.OperationRNGRetrieve }
func (*rngSeedRequest) Operation() kmip.Operation      { return kmip.OperationRNGSeed }
func (*rngSeedResponse) Operation() kmip.Operation     { return kmip.OperationRNGSeed }

// whole refuses a request that is a part of several.
func whole(correlation []byte, first, last *bool) error {
	if len(correlation) > 0 || isSet(first) != isSet(last) {
		return kms.Refuse(kmip.ResultReasonFeatureNotSupported, "this operation takes all its data in one request")
	}
	return nil
}

func isSet(b *bool) bool { return b != nil && *b }

func mac(c *call, r *macRequest) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := whole(r.CorrelationValue, r.InitIndicator, r.FinalIndicator); err != nil {
		return nil, err
	}
	sum, err := c.session.MAC(c, id, r.CryptographicParameters, r.Data)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &macResponse{UniqueIdentifier: id, MACData: sum}, nil
}

func macVerify(c *call, r *macVerifyRequest) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := whole(r.CorrelationValue, r.InitIndicator, r.FinalIndicator); err != nil {
		return nil, err
	}
	ok, err := c.session.MACVerify(c, id, r.CryptographicParameters, r.Data, r.MACData)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	answer := &macVerifyResponse{UniqueIdentifier: id, ValidityIndicator: kmip.ValidityIndicatorInvalid}
	if ok {
		answer.ValidityIndicator = kmip.ValidityIndicatorValid
	}
	return answer, nil
}

func hash(c *call, r *hashRequest) (kmip.OperationPayload, error) {
	if err := whole(r.CorrelationValue, r.InitIndicator, r.FinalIndicator); err != nil {
		return nil, err
	}
	sum, err := c.session.Hash(r.CryptographicParameters, r.Data)
	if err != nil {
		return nil, err
	}
	return &hashResponse{sum}, nil
}

func rngRetrieve(c *call, r *rngRetrieveRequest) (kmip.OperationPayload, error) {
	b, err := c.session.Random(r.DataLength)
	if err != nil {
		return nil, err
	}
	c.reply.secrets = append(c.reply.secrets, b)
	return &rngRetrieveResponse{b}, nil
}

func rngSeed(c *call, r *rngSeedRequest) (kmip.OperationPayload, error) {
	return &rngSeedResponse{c.session.Seed(r.Data)}, nil
}
