package kmipd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// depthBomb nests n structures in a request header.
func depthBomb(n int) []byte {
	var b []byte
	for range n {
		b = append([]byte{0x42, 0x00, 0x77, 1, 0, 0, 0, 0}, b...)
		binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	}
	return append(binary.BigEndian.AppendUint32([]byte{0x42, 0x00, 0x78, 1}, uint32(len(b))), b...)
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// badMessages are wrong as a whole.
func badMessages() map[string][]byte {
	good := request(1, &payloads.DiscoverVersionsRequestPayload{})
	wire := ttlv.MarshalTTLV(&good)
	noHeader := bytes.Clone(wire)
	noHeader[10] = 0x0F // a batch item stands where the header should
	textual := request(1, createAES())
	notUTF8 := bytes.Replace(ttlv.MarshalTTLV(&textual), []byte("Algorithm"), []byte("Algo\xffithm"), 1)
	return map[string][]byte{
		"the 16 bytes that crash kmip-go's server": unhex("42007801000000013030303030303030"),
		"1 GiB announced":                          unhex("4200780140000000"),
		"4 GiB announced":                          unhex("42007801ffffffff"),
		"HTTP":                                     []byte("GET / HTTP/1.1\r\nHost: kms\r\n\r\n"),
		"a response":                               append([]byte{0x42, 0x00, 0x7B, 1, 0, 0, 0, 0}, wire[8:]...),
		"a depth bomb":                             depthBomb(10_000),
		"nesting at the limit":                     depthBomb(40),
		"an empty structure":                       unhex("4200780100000000"),
		"no header":                                noHeader,
		"a text that is not UTF":                   notUTF8,
	}
}

func TestBadMessages(t *testing.T) {
	b := serve(t, Options{})
	for what, wire := range badMessages() {
		c := b.dial(t)
		c.Write(wire)
		m, _, err := receive(c)
		if err != nil || len(m.BatchItem) != 1 || m.BatchItem[0].ResultReason != kmip.ResultReasonInvalidMessage {
			t.Errorf("%s: %+v, %v", what, m, err)
		}
		if _, _, err := receive(c); err == nil {
			t.Errorf("%s: the connection goes on", what)
		}
	}
	// Truncated at every length: no answer, and no harm.
	good := request(1, createAES())
	wire := ttlv.MarshalTTLV(&good)
	for n := 0; n < len(wire); n += 13 {
		c := b.dial(t)
		c.Write(wire[:n])
		c.(*tls.Conn).CloseWrite()
		if m, _, err := receive(c); err == nil {
			t.Errorf("truncated to %d of %d bytes: %+v", n, len(wire), m)
		}
		c.Close()
	}
	if g := newKey(t, b.dial(t)); g == "" {
		t.Error("the server does not go on")
	}
}

// TestBadRequests are well-formed TTLV and wrong KMIP. The connection survives.
func TestBadRequests(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	id := newKey(t, c)
	no, yes := false, true
	header := func(change func(*kmip.RequestHeader)) kmip.RequestMessage {
		m := request(1, &payloads.DiscoverVersionsRequestPayload{})
		change(&m.Header)
		return m
	}
	payload := func(op kmip.Operation, fields ...ttlv.Value) kmip.RequestMessage {
		return request(4, kmip.NewUnknownPayload(op, fields...))
	}
	uid := ttlv.Value{Tag: kmip.TagUniqueIdentifier, Value: id}
	var huge []kmip.OperationPayload
	for range maxBatch + 1 {
		huge = append(huge, &payloads.DiscoverVersionsRequestPayload{})
	}
	critical := request(1, &payloads.DiscoverVersionsRequestPayload{})
	critical.BatchItem[0].MessageExtension = &kmip.MessageExtension{VendorIdentification: "v", CriticalityIndicator: true, VendorExtension: ttlv.Struct{}}
	for what, x := range map[string]struct {
		m    kmip.RequestMessage
		want kmip.ResultReason
	}{
		"asynchronous":         {header(func(h *kmip.RequestHeader) { h.AsynchronousIndicator = &yes }), kmip.ResultReasonFeatureNotSupported},
		"unknown continuation": {header(func(h *kmip.RequestHeader) { h.BatchErrorContinuationOption = 9 }), kmip.ResultReasonInvalidField},
		"negative size":        {header(func(h *kmip.RequestHeader) { h.MaximumResponseSize = -1 }), kmip.ResultReasonInvalidField},
		"batch count 2 of 1":   {header(func(h *kmip.RequestHeader) { h.BatchCount = 2 }), kmip.ResultReasonInvalidMessage},
		"batch count -1":       {header(func(h *kmip.RequestHeader) { h.BatchCount = -1 }), kmip.ResultReasonInvalidMessage},
		"no batch":             {kmip.RequestMessage{Header: kmip.RequestHeader{ProtocolVersion: kmip.V1_1}}, kmip.ResultReasonInvalidMessage},
		"oversized batch":      {request(1, huge...), kmip.ResultReasonInvalidMessage},
		"critical extension":   {critical, kmip.ResultReasonFeatureNotSupported},
		"unknown operation":    {payload(0x7777), kmip.ResultReasonOperationNotSupported},
		"Poll":                 {payload(kmip.OperationPoll), kmip.ResultReasonOperationNotSupported},
		"Encrypt in KMIP 1.1":  {request(1, &payloads.EncryptRequestPayload{UniqueIdentifier: id, Data: make([]byte, 16)}), kmip.ResultReasonOperationNotSupported},
		"Sign":                 {request(4, &payloads.SignRequestPayload{UniqueIdentifier: id, Data: make([]byte, 16)}), kmip.ResultReasonOperationNotSupported},
		"Get of nothing":       {payload(kmip.OperationGet), kmip.ResultReasonItemNotFound},
		"Get of a guess":       {payload(kmip.OperationGet, ttlv.Value{Tag: kmip.TagUniqueIdentifier, Value: "../default/" + id}), kmip.ResultReasonItemNotFound},
		"Get twice over":       {payload(kmip.OperationGet, uid, uid), kmip.ResultReasonInvalidMessage},
		"Get with a mistyped id": {payload(kmip.OperationGet, ttlv.Value{Tag: kmip.TagUniqueIdentifier, Value: int32(1)}),
			kmip.ResultReasonInvalidMessage},
		"Get with an unknown field": {payload(kmip.OperationGet, uid, ttlv.Value{Tag: kmip.TagComment, Value: "x"}), kmip.ResultReasonInvalidField},
		"Get with wrapping after a stray field": {payload(kmip.OperationGet, uid, ttlv.Value{Tag: kmip.TagKeyWrappingSpecification, Value: ttlv.Struct{}},
			ttlv.Value{Tag: kmip.TagKeyFormatType, Value: ttlv.Enum(1)}), kmip.ResultReasonInvalidField},
		"Get wrapped":              {request(4, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyWrappingSpecification: &kmip.KeyWrappingSpecification{WrappingMethod: kmip.WrappingMethodMACSign}}), kmip.ResultReasonFeatureNotSupported},
		"Get as PKCS#8":            {request(4, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypePKCS_8}), kmip.ResultReasonKeyFormatTypeNotSupported},
		"Get compressed":           {request(4, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyCompressionType: kmip.KeyCompressionTypeECPublicKeyTypeUncompressed}), kmip.ResultReasonKeyCompressionTypeNotSupported},
		"Create by template":       {request(1, &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Name: []kmip.Name{{NameValue: "t", NameType: 1}}}}), kmip.ResultReasonItemNotFound},
		"Create of a y- attribute": {request(1, createAES(custom("y-a", "b"))), kmip.ResultReasonInvalidField},
		"Create twice a length": {request(1, createAES(kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(128)})),
			kmip.ResultReasonInvalidField},
		"Register of a certificate": {request(1, &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeCertificate, Object: &kmip.Certificate{CertificateType: kmip.CertificateTypeX_509, CertificateValue: []byte{1}}}), kmip.ResultReasonInvalidField},
		"Register of an unknown":    {payload(kmip.OperationRegister, ttlv.Value{Tag: kmip.TagObjectType, Value: ttlv.Enum(99)}, ttlv.Value{Tag: kmip.TagTemplateAttribute, Value: ttlv.Struct{}}), kmip.ResultReasonInvalidMessage},
		"Register without a value":  {request(1, registration(kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw})), kmip.ResultReasonInvalidField},
		"Locate by member":          {request(1, &payloads.LocateRequestPayload{ObjectGroupMember: kmip.ObjectGroupMemberDefault}), kmip.ResultReasonInvalidField},
		"Query of nothing":          {payload(kmip.OperationQuery), kmip.ResultReasonInvalidMessage},
		"AddAttribute of State":     {request(1, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: kmip.Attribute{AttributeName: kmip.AttributeNameState, AttributeValue: kmip.StateActive}}), kmip.ResultReasonPermissionDenied},
	} {
		m := roundTrip(t, c, x.m)
		if len(m.BatchItem) != 1 || m.BatchItem[0].ResultStatus != kmip.ResultStatusOperationFailed || m.BatchItem[0].ResultReason != x.want {
			t.Errorf("%s: %+v, want %v", what, m.BatchItem, x.want)
		}
	}
	if m := roundTrip(t, c, header(func(h *kmip.RequestHeader) { h.AsynchronousIndicator = &no; h.BatchOrderOption = &yes })); m.BatchItem[0].Err() != nil {
		t.Errorf("synchronous and in order: %v", m.BatchItem[0].Err())
	}
	// An unknown Operation Policy Name is no reason to refuse.
	if r := refused4(t, c, 1, kmip.Attribute{AttributeName: "Operation Policy Name", AttributeValue: "anything"}); r != 0 {
		t.Errorf("Operation Policy Name: %v", r)
	}
}

func registration(b kmip.KeyBlock, attributes ...kmip.Attribute) *payloads.RegisterRequestPayload {
	return &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, Object: &kmip.SymmetricKey{KeyBlock: b}, TemplateAttribute: kmip.TemplateAttribute{Attribute: attributes}}
}

// TestNoDetailsReachTheClient: internal errors are logged, and the client hears
// that there was one.
func TestNoDetailsReachTheClient(t *testing.T) {
	watch, after := &holdUp{time: 700 * time.Millisecond}, "Create"
	b := serve(t, Options{RequestTimeout: 500 * time.Millisecond, Watcher: watch})
	watch.after.Store(&after)
	m := roundTrip(t, b.dial(t), request(4, createAES(), &payloads.ActivateRequestPayload{}))
	it := m.BatchItem[1] // its time was up; it is answered, for something was changed before
	if it.ResultReason != kmip.ResultReasonGeneralFailure || strings.Contains(it.ResultMessage, "context") || strings.Contains(it.ResultMessage, "/") {
		t.Errorf("answer %+v", it)
	}
	if !strings.Contains(b.log.String(), "deadline exceeded") {
		t.Errorf("the log does not have the cause: %s", b.log)
	}
}
