package kmipd

import (
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

func given(name kmip.AttributeName, value any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: value}
}

func indexed(a kmip.Attribute, index int32) kmip.Attribute {
	a.AttributeIndex = &index
	return a
}

// TestContradictions: requests that say a thing twice, or two things that cannot
// both be, are refused with a reason, and nothing is made or changed.
func TestContradictions(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	now := time.Now()
	id := newKey(t, c, custom("x-one", "1"), named("taken"))
	count := func() int {
		return len(do[*payloads.LocateResponsePayload](t, c, 4, &payloads.LocateRequestPayload{}).UniqueIdentifier)
	}
	attributes := func() int {
		return len(do[*payloads.GetAttributesResponsePayload](t, c, 4, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}).Attribute)
	}
	objects, had := count(), attributes()
	bytesOf := func(n int) *kmip.KeyValue {
		v := make([]byte, n)
		return &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &v}}}
	}
	block := func(n int, algorithm kmip.CryptographicAlgorithm, length int32) kmip.KeyBlock {
		return kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw, KeyValue: bytesOf(n), CryptographicAlgorithm: algorithm, CryptographicLength: length}
	}
	usage := given(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageEncrypt)
	secret := &kmip.SecretData{SecretDataType: kmip.SecretDataTypePassword, KeyBlock: kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw, KeyValue: bytesOf(16)}}
	for what, p := range map[string]kmip.OperationPayload{
		"two lengths":                        createAES(given(kmip.AttributeNameCryptographicLength, int32(128))),
		"one length twice":                   createAES(given(kmip.AttributeNameCryptographicLength, int32(256))),
		"two algorithms":                     createAES(given(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithm3DES)),
		"two usage masks":                    createAES(usage),
		"two beginnings":                     createAES(given(kmip.AttributeNameActivationDate, now), given(kmip.AttributeNameActivationDate, now.Add(time.Hour))),
		"an end before the begin":            createAES(given(kmip.AttributeNameActivationDate, now.Add(time.Hour)), given(kmip.AttributeNameDeactivationDate, now)),
		"one name twice":                     createAES(named("twice"), named("twice")),
		"a name that is taken":               createAES(named("taken")),
		"a state of its own":                 createAES(given(kmip.AttributeNameState, kmip.StateActive)),
		"an identifier of its own":           createAES(given(kmip.AttributeNameUniqueIdentifier, "mine")),
		"another object type":                createAES(given(kmip.AttributeNameObjectType, kmip.ObjectTypeSecretData)),
		"an index twice":                     createAES(indexed(custom("x-a", "1"), 0), indexed(custom("x-a", "2"), 0)),
		"a negative index":                   createAES(indexed(custom("x-a", "1"), -1)),
		"an attribute of no name":            createAES(custom("", "1")),
		"an unknown attribute":               createAES(custom("Kryptographic Length", "1")),
		"a length of another type":           createAES(given(kmip.AttributeNameContactInformation, int32(7))),
		"a length that AES has not":          &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{given(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmAES), given(kmip.AttributeNameCryptographicLength, int32(255)), usage}}},
		"a key of another length":            registration(block(16, kmip.CryptographicAlgorithmAES, 256), usage),
		"an attribute that its block belies": registration(block(16, kmip.CryptographicAlgorithmAES, 128), usage, given(kmip.AttributeNameCryptographicLength, int32(256))),
		"an algorithm that its block belies": registration(block(16, kmip.CryptographicAlgorithmAES, 128), usage, given(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithm3DES)),
		"a key that is not what it says":     &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, Object: secret},
		"one attribute more of a kind":       &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: given(kmip.AttributeNameCryptographicLength, int32(128))},
		"a name that the object has":         &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: named("taken")},
		"a change of what is not there":      &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: id, Attribute: custom("x-none", "1")},
		"a change of an index that is not":   &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: id, Attribute: indexed(custom("x-one", "1"), 7)},
		"a delete of what is not there":      &payloads.DeleteAttributeRequestPayload{UniqueIdentifier: id, AttributeName: "x-none"},
		"a delete of what every object has":  &payloads.DeleteAttributeRequestPayload{UniqueIdentifier: id, AttributeName: kmip.AttributeNameCryptographicLength},
		"a revocation without a reason":      &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: 99}},
		"a name asked for twice":             &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{"x-one", "State", "x-one"}}, // KMIP 1.4 §4.12
		"a Get in a form for another":        &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypeX_509},
	} {
		m := roundTrip(t, c, request(4, p))
		if len(m.BatchItem) != 1 || m.BatchItem[0].ResultStatus != kmip.ResultStatusOperationFailed || m.BatchItem[0].ResultReason == kmip.ResultReasonGeneralFailure || m.BatchItem[0].ResultMessage == "" {
			t.Errorf("%s: %+v", what, m.BatchItem)
		}
	}
	if n := count(); n != objects {
		t.Errorf("%d objects were made by requests that were refused", n-objects)
	}
	if n := attributes(); n != had {
		t.Errorf("the object has %d attributes, and had %d", n, had)
	}
	// Filters that contradict each other find nothing, and that is no error.
	for what, filters := range map[string][]kmip.Attribute{
		"two lengths":      {given(kmip.AttributeNameCryptographicLength, int32(128)), given(kmip.AttributeNameCryptographicLength, int32(256))},
		"two states":       {given(kmip.AttributeNameState, kmip.StateActive), given(kmip.AttributeNameState, kmip.StatePreActive)},
		"two object types": {given(kmip.AttributeNameObjectType, kmip.ObjectTypeSecretData), given(kmip.AttributeNameObjectType, kmip.ObjectTypeSymmetricKey)},
	} {
		if found := do[*payloads.LocateResponsePayload](t, c, 4, &payloads.LocateRequestPayload{Attribute: filters}).UniqueIdentifier; len(found) != 0 {
			t.Errorf("Locate by %s finds %v", what, found)
		}
	}
}

// TestForeignVersions: what is not KMIP 1.0 to 1.4 is refused in words of 1.4, and
// the connection ends, since nobody knows what else it would bring.
func TestForeignVersions(t *testing.T) {
	b := serve(t, Options{})
	for _, v := range []kmip.ProtocolVersion{{ProtocolVersionMajor: 9, ProtocolVersionMinor: 9}, {ProtocolVersionMajor: 2}, {ProtocolVersionMajor: 1, ProtocolVersionMinor: 5},
		{ProtocolVersionMajor: 0, ProtocolVersionMinor: 9}, {ProtocolVersionMajor: 1, ProtocolVersionMinor: -1}, {ProtocolVersionMajor: -1, ProtocolVersionMinor: 4}} {
		c := b.dial(t)
		m := request(1, createAES())
		m.Header.ProtocolVersion = v
		if _, err := c.Write(wireOf(m)); err != nil {
			t.Fatal(err)
		}
		answer, _, err := receive(c)
		if err != nil || len(answer.BatchItem) != 1 || answer.BatchItem[0].ResultReason != kmip.ResultReasonInvalidMessage || answer.Header.ProtocolVersion != kmip.V1_4 {
			t.Errorf("version %v: %+v, %v", v, answer, err)
		}
		if _, _, err := receive(c); err == nil {
			t.Errorf("version %v: the connection goes on", v)
		}
	}
	if n := len(do[*payloads.LocateResponsePayload](t, b.dial(t), 4, &payloads.LocateRequestPayload{}).UniqueIdentifier); n != 0 {
		t.Errorf("%d keys were made", n)
	}
}
