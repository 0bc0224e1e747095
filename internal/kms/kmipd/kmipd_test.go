package kmipd

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
)

func TestVersions(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	got := do[*payloads.DiscoverVersionsResponsePayload](t, c, 1, &payloads.DiscoverVersionsRequestPayload{}).ProtocolVersion
	if want := []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1, kmip.V1_0}; !slices.Equal(got, want) {
		t.Errorf("versions %v, want %v", got, want)
	}
	got = do[*payloads.DiscoverVersionsResponsePayload](t, c, 4, &payloads.DiscoverVersionsRequestPayload{ProtocolVersion: []kmip.ProtocolVersion{kmip.V2_0, kmip.V1_1, kmip.V1_2}}).ProtocolVersion
	if !slices.Equal(got, []kmip.ProtocolVersion{kmip.V1_2, kmip.V1_1}) {
		t.Errorf("versions in common: %v", got)
	}
	if r := refused(t, c, 0, &payloads.DiscoverVersionsRequestPayload{}); r != kmip.ResultReasonOperationNotSupported {
		t.Errorf("DiscoverVersions in 1.0: %v", r)
	}
	for _, v := range []kmip.ProtocolVersion{{ProtocolVersionMajor: 9, ProtocolVersionMinor: 9}, {ProtocolVersionMajor: 1, ProtocolVersionMinor: 5}, {ProtocolVersionMajor: 1, ProtocolVersionMinor: -1}, {}} {
		c := b.dial(t)
		m := roundTrip(t, c, kmip.NewRequestMessage(v, &payloads.DiscoverVersionsRequestPayload{}))
		if len(m.BatchItem) != 1 || m.BatchItem[0].ResultReason != kmip.ResultReasonInvalidMessage || m.Header.ProtocolVersion != kmip.V1_4 || m.BatchItem[0].Operation != 0 {
			t.Errorf("version %v: %+v", v, m)
		}
	}
	for minor := int32(0); minor <= 4; minor++ {
		q := do[*payloads.QueryResponsePayload](t, c, minor, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{
			kmip.QueryFunctionOperations, kmip.QueryFunctionObjects, kmip.QueryFunctionServerInformation, kmip.QueryFunctionCapabilities, kmip.QueryFunctionRNGs}})
		if q.VendorIdentification != "Mortise" || slices.Contains(q.Operations, kmip.OperationDiscoverVersions) != (minor >= 1) || (len(q.CapabilityInformation) == 1) != (minor >= 3) {
			t.Errorf("Query in 1.%d: %+v", minor, q)
		}
		for _, op := range q.Operations { // what Query lists, works: it is refused for its content only
			m := roundTrip(t, c, request(minor, kmip.NewUnknownPayload(op)))
			if m.BatchItem[0].ResultReason == kmip.ResultReasonOperationNotSupported {
				t.Errorf("Query in 1.%d lists %v, which is not there", minor, op)
			}
		}
		id := do[*payloads.CreateResponsePayload](t, c, minor, createAES(named(fmt.Sprint("n", minor)))).UniqueIdentifier
		if g := do[*payloads.GetResponsePayload](t, c, minor, &payloads.GetRequestPayload{UniqueIdentifier: id}); len(key(t, g)) != 32 {
			t.Errorf("Get in 1.%d: %+v", minor, g)
		}
		all := do[*payloads.GetAttributesResponsePayload](t, c, minor, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id})
		if len(all.Attribute) < 9 {
			t.Errorf("attributes in 1.%d: %+v", minor, all)
		}
		reason := refused4(t, c, minor, kmip.Attribute{AttributeName: kmip.AttributeNameComment, AttributeValue: "a"})
		if (reason == 0) != (minor == 4) {
			t.Errorf("Comment in 1.%d: %v", minor, reason)
		}
	}
}

// refused4 creates a key with an attribute and returns the reason of a refusal,
// 0 for none.
func refused4(t *testing.T, c net.Conn, minor int32, a kmip.Attribute) kmip.ResultReason {
	return roundTrip(t, c, request(minor, createAES(a))).BatchItem[0].ResultReason
}

// TestVCenter sends what vCenter 7.0.3 sends, message by message: KMIP 1.1, no
// time stamp, batch item ids "QLKC" and a counter, and for every action a new
// TCP and TLS connection that begins with an empty DiscoverVersions.
func TestVCenter(t *testing.T) {
	b := serve(t, Options{})
	counter := 0
	message := func(list ...kmip.OperationPayload) kmip.RequestMessage {
		m := kmip.RequestMessage{Header: kmip.RequestHeader{ProtocolVersion: kmip.V1_1, BatchCount: int32(len(list))}}
		for _, p := range list {
			counter++
			m.BatchItem = append(m.BatchItem, kmip.RequestBatchItem{Operation: p.Operation(), UniqueBatchItemID: fmt.Appendf(nil, "QLKC%d", counter), RequestPayload: p})
		}
		return m
	}
	send := func(t *testing.T, c net.Conn, list ...kmip.OperationPayload) []kmip.OperationPayload {
		t.Helper()
		req := message(list...)
		m := roundTrip(t, c, req)
		if m.Header.ProtocolVersion != kmip.V1_1 || int(m.Header.BatchCount) != len(list) || len(m.BatchItem) != len(list) {
			t.Fatalf("response header %+v with %d items", m.Header, len(m.BatchItem))
		}
		var answers []kmip.OperationPayload
		for i, it := range m.BatchItem {
			if it.Err() != nil || it.Operation != req.BatchItem[i].Operation || !bytes.Equal(it.UniqueBatchItemID, req.BatchItem[i].UniqueBatchItemID) {
				t.Fatalf("item %d: %+v, %v", i, it, it.Err())
			}
			answers = append(answers, it.ResponsePayload)
		}
		return answers
	}
	action := func(t *testing.T, list ...kmip.OperationPayload) []kmip.OperationPayload {
		t.Helper()
		c := b.dial(t)
		defer c.Close()
		send(t, c, &payloads.DiscoverVersionsRequestPayload{})
		return send(t, c, list...)
	}

	// Register the provider, then the health poll.
	if q := action(t, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}}); q[0].(*payloads.QueryResponsePayload).VendorIdentification == "" {
		t.Error("no server information")
	}
	b.dial(t).Close()
	poll := b.dial(t)
	send(t, poll, &payloads.DiscoverVersionsRequestPayload{})
	send(t, poll, &payloads.DiscoverVersionsRequestPayload{})
	poll.Close()

	tag := func(t *testing.T, id string, tags ...kmip.Attribute) {
		t.Helper()
		var adds []kmip.OperationPayload
		for _, a := range tags {
			got := action(t, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{a.AttributeName}})[0].(*payloads.GetAttributesResponsePayload)
			if got.UniqueIdentifier != id || len(got.Attribute) != 0 {
				t.Errorf("a missing attribute: %+v; want Success with nothing", got)
			}
			adds = append(adds, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: a})
		}
		action(t, adds...)
		for _, a := range tags {
			got := action(t, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{a.AttributeName}})[0].(*payloads.GetAttributesResponsePayload)
			if len(got.Attribute) != 1 || got.Attribute[0].AttributeValue.(ttlv.Value).Value != a.AttributeValue {
				t.Errorf("after tagging: %+v", got)
			}
		}
	}
	for _, tags := range [][]kmip.Attribute{
		{custom("x-Product_Version", "7.0.3 build-21477706"), custom("x-Vendor", "VMware, Inc."), custom("x-Product", "VMware vSphere")},
		{custom("x-Identifier", "host-1015"), custom("x-Component", "ESXi Server"), custom("x-Name", "esx1.example.com")},
	} {
		// No Name and no Activation Date.
		made := action(t, &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		}}})[0].(*payloads.CreateResponsePayload)
		id := made.UniqueIdentifier
		tag(t, id, tags...)

		fetched := action(t, &payloads.GetRequestPayload{UniqueIdentifier: id})[0].(*payloads.GetResponsePayload)
		block := fetched.Object.(*kmip.SymmetricKey).KeyBlock
		if len(key(t, fetched)) != 32 || block.KeyFormatType != kmip.KeyFormatTypeRaw || block.CryptographicAlgorithm != kmip.CryptographicAlgorithmAES || block.CryptographicLength != 256 {
			t.Errorf("key block %+v", block)
		}
		state := func() kmip.State {
			return action(t, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState}})[0].(*payloads.GetAttributesResponsePayload).Attribute[0].AttributeValue.(kmip.State)
		}
		if got := state(); got != kmip.StatePreActive {
			t.Errorf("state %v, want Pre-Active", got)
		}
		action(t, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
		if got := state(); got != kmip.StateActive {
			t.Errorf("state %v, want Active", got)
		}
		again := action(t, &payloads.GetRequestPayload{UniqueIdentifier: id})[0].(*payloads.GetResponsePayload)
		if !bytes.Equal(key(t, again), key(t, fetched)) {
			t.Error("the key is another one")
		}
	}
}

func TestBatches(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	send := func(option kmip.BatchErrorContinuationOption, list ...kmip.OperationPayload) []kmip.ResponseBatchItem {
		req := request(1, list...)
		req.Header.BatchErrorContinuationOption = option
		m := roundTrip(t, c, req)
		if int(m.Header.BatchCount) != len(m.BatchItem) {
			t.Errorf("batch count %d of %d items", m.Header.BatchCount, len(m.BatchItem))
		}
		return m.BatchItem
	}
	// The placeholder carries the new key through the batch.
	got := send(0, createAES(named("batch")), &payloads.ActivateRequestPayload{}, &payloads.AddAttributeRequestPayload{Attribute: custom("x-a", "b")},
		&payloads.GetRequestPayload{}, &payloads.GetAttributesRequestPayload{AttributeName: []kmip.AttributeName{kmip.AttributeNameState, "x-a"}})
	if len(got) != 5 || got[4].Err() != nil {
		t.Fatalf("%+v", got)
	}
	if a := got[4].ResponsePayload.(*payloads.GetAttributesResponsePayload).Attribute; len(a) != 2 || a[0].AttributeValue != kmip.StateActive {
		t.Errorf("attributes by placeholder: %+v", a)
	}
	// Locate sets it when one object is found.
	got = send(0, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{named("batch")}}, &payloads.GetRequestPayload{})
	if len(got) != 2 || got[1].Err() != nil {
		t.Errorf("locate and get: %+v", got)
	}
	fail := &payloads.GetRequestPayload{UniqueIdentifier: "none"}
	if got := send(0, createAES(), fail, createAES()); len(got) != 2 || got[1].ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("without an option: %+v", got)
	}
	if got := send(kmip.BatchErrorContinuationOptionStop, fail, createAES()); len(got) != 1 {
		t.Errorf("Stop: %+v", got)
	}
	got = send(kmip.BatchErrorContinuationOptionContinue, createAES(), fail, &payloads.ActivateRequestPayload{}, createAES())
	if len(got) != 4 || got[3].Err() != nil || got[2].ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("Continue: %+v; the placeholder must not outlive a failure", got)
	}
}

func TestMaximumResponseSize(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	id := newKey(t, c)
	send := func(max int32, list ...kmip.OperationPayload) (kmip.ResponseMessage, int) {
		req := request(1, list...)
		req.Header.MaximumResponseSize = max
		if _, err := c.Write(ttlv.MarshalTTLV(&req)); err != nil {
			t.Fatal(err)
		}
		m, raw, err := receive(c)
		if err != nil {
			t.Fatal(err)
		}
		return m, len(raw)
	}
	big, small := &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}, &payloads.ActivateRequestPayload{UniqueIdentifier: id}
	m, n := send(512, big)
	if n > 512 || m.BatchItem[0].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("%d bytes: %+v", n, m)
	}
	m, n = send(512, small, big)
	if n > 512 || m.BatchItem[0].Err() != nil || m.BatchItem[1].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("%d bytes: %+v", n, m)
	}
	if m, _ := send(1, big); m.BatchItem[0].ResultReason != kmip.ResultReasonResponseTooLarge {
		t.Errorf("a size that nothing fits into: %+v", m)
	}
	if m, _ := send(1<<20, big); m.BatchItem[0].Err() != nil {
		t.Errorf("a size that is enough: %+v", m)
	}
}

// TestLocateInTemplate: a filter inside a template attribute filters.
func TestLocateInTemplate(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	want := newKey(t, c, named("wanted"))
	newKey(t, c, named("other"))
	filter := kmip.TemplateAttribute{Attribute: []kmip.Attribute{named("wanted")}}
	enc := ttlv.NewTTLVEncoder()
	enc.TagAny(kmip.TagTemplateAttribute, &filter)
	dec, err := ttlv.NewTTLVDecoder(enc.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	var v ttlv.Value
	if err := dec.Any(&v); err != nil {
		t.Fatal(err)
	}
	m := roundTrip(t, c, request(1, kmip.NewUnknownPayload(kmip.OperationLocate, v)))
	if got := m.BatchItem[0].ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier; !slices.Equal(got, []string{want}) {
		t.Errorf("found %v, want %s alone", got, want)
	}
	l := do[*payloads.LocateResponsePayload](t, c, 4, &payloads.LocateRequestPayload{MaximumItems: 1, OffsetItems: 1})
	if !slices.Equal(l.UniqueIdentifier, []string{want}) || *l.LocatedItems != 2 {
		t.Errorf("the second of two: %+v", l)
	}
}

func TestRegister(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	value := bytes.Repeat([]byte{7}, 32)
	mask := kmip.Attribute{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt}
	for what, block := range map[string]kmip.KeyBlock{
		"raw": {KeyFormatType: kmip.KeyFormatTypeRaw, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &value}}}},
		"transparent": {KeyFormatType: kmip.KeyFormatTypeTransparentSymmetricKey, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{TransparentSymmetricKey: &kmip.TransparentSymmetricKey{Key: value}}}}},
	} {
		id := do[*payloads.RegisterResponsePayload](t, c, 2, registration(block, mask)).UniqueIdentifier
		if g := do[*payloads.GetResponsePayload](t, c, 2, &payloads.GetRequestPayload{UniqueIdentifier: id}); !bytes.Equal(key(t, g), value) {
			t.Errorf("%s: got another key back", what)
		}
		do[*payloads.ActivateResponsePayload](t, c, 2, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
		if r := refused(t, c, 2, &payloads.DestroyRequestPayload{UniqueIdentifier: id}); r != kmip.ResultReasonPermissionDenied {
			t.Errorf("%s: destroyed while Active: %v", what, r)
		}
		occurred := time.Unix(6, 0)
		do[*payloads.RevokeResponsePayload](t, c, 2, &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}, CompromiseOccurrenceDate: &occurred})
		do[*payloads.DestroyResponsePayload](t, c, 2, &payloads.DestroyRequestPayload{UniqueIdentifier: id})
		if r := refused(t, c, 2, &payloads.GetRequestPayload{UniqueIdentifier: id}); r != kmip.ResultReasonItemNotFound {
			t.Errorf("%s: Get when destroyed: %v", what, r)
		}
		a := do[*payloads.GetAttributesResponsePayload](t, c, 2, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{kmip.AttributeNameState, kmip.AttributeNameCompromiseOccurrenceDate}})
		if a.Attribute[0].AttributeValue != kmip.StateDestroyedCompromised || !a.Attribute[1].AttributeValue.(time.Time).Equal(occurred) {
			t.Errorf("%s: attributes when destroyed: %+v", what, a)
		}
	}
	too := make([]byte, kms.MaxMaterial+1)
	big := do[*payloads.RegisterResponsePayload](t, c, 2, &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeOpaqueObject, Object: &kmip.OpaqueObject{OpaqueDataType: 1, OpaqueDataValue: too[1:]}})
	if g := do[*payloads.GetResponsePayload](t, c, 2, &payloads.GetRequestPayload{UniqueIdentifier: big.UniqueIdentifier}); len(g.Object.(*kmip.OpaqueObject).OpaqueDataValue) != kms.MaxMaterial {
		t.Error("an opaque object of the largest size came back changed")
	}
	if r := refused(t, c, 2, &payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeOpaqueObject, Object: &kmip.OpaqueObject{OpaqueDataType: 1, OpaqueDataValue: too}}); r != kmip.ResultReasonInvalidField {
		t.Errorf("an opaque object that is too large: %v", r)
	}
}
