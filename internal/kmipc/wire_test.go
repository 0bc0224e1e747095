package kmipc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// response encodes a message as a server would.
func response(items ...kmip.ResponseBatchItem) []byte {
	return ttlv.MarshalTTLV(&kmip.ResponseMessage{
		Header:    kmip.ResponseHeader{ProtocolVersion: kmip.V1_1, TimeStamp: time.Unix(1e9, 0), BatchCount: int32(len(items))},
		BatchItem: items,
	})
}

func ok(p kmip.OperationPayload) kmip.ResponseBatchItem {
	return kmip.ResponseBatchItem{Operation: p.Operation(), ResponsePayload: p}
}

func getResponse(format kmip.KeyFormatType, material []byte) kmip.ResponseBatchItem {
	return ok(&payloads.GetResponsePayload{ObjectType: kmip.ObjectTypeSymmetricKey, UniqueIdentifier: "1", Object: &kmip.SymmetricKey{KeyBlock: kmip.KeyBlock{
		KeyFormatType: format, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, CryptographicLength: 256,
		KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &material}}},
	}}})
}

// nested is a response message of n structures, each inside the other.
func nested(n int) []byte {
	var b []byte
	for range n {
		h := []byte{0x42, 0x00, 0x7b, 0x01, 0, 0, 0, 0}
		binary.BigEndian.PutUint32(h[4:], uint32(len(b)))
		b = append(h, b...)
	}
	return b
}

func mustHex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

func TestMalformedMessages(t *testing.T) {
	good := response(ok(&payloads.QueryResponsePayload{VendorIdentification: "x"}))
	if _, err := decode(good); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		msg  []byte
		want string
	}{
		"HTTP":              {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), "not with a response message"},
		"a request":         {mustHex("42007801 00000000"), "not with a response message"},
		"the known crasher": {mustHex("42007b01 00000013 0303030303030303"), "EOF"},
		"crasher, whole":    {append(mustHex("42007b01 00000018"), bytes.Repeat([]byte{0x30}, 24)...), "where 16 are left"},
		"unknown type":      {mustHex("42007b01 00000008 42006a0b 00000000"), "unknown type"},
		"1 GiB":             {mustHex("42007b01 40000000"), "announces"},
		"4 GiB":             {mustHex("42007b01 ffffffff"), "announces"},
		"depth bomb":        {nested(1000), "nested deeper"},
		"odd structure":     {mustHex("42007b01 00000010 42007a01 00000001 0000000000000000"), "type 0x1 with 1 bytes"},
		"short integer":     {mustHex("42007b01 00000010 42006a02 00000003 0000000000000000"), "type 0x2 with 3 bytes"},
		"empty big integer": {mustHex("42007b01 00000008 42006a04 00000000"), "type 0x4 with 0 bytes"},
		"item too long":     {mustHex("42007b01 00000008 42006a07 00000001"), "where 0 are left"},
		"half a header":     {mustHex("42007b01 00000018 42006a02 00000004 0000000000000000 42006a02 00000004"), "where 0 are left"},
		"empty":             {mustHex("42007b01 00000000"), "does not decode"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := readAndDecode(bytes.NewReader(c.msg))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	for i := range good {
		if _, err := readAndDecode(bytes.NewReader(good[:i])); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
}

func readAndDecode(r io.Reader) (*kmip.ResponseMessage, error) {
	msg, err := readMessage(r, maxMessage)
	if err != nil {
		return nil, err
	}
	return decode(msg)
}

func TestUnexpectedAnswers(t *testing.T) {
	query := ok(&payloads.QueryResponsePayload{})
	pending := query
	pending.ResultStatus = kmip.ResultStatusOperationPending
	failed := kmip.ResponseBatchItem{ResultStatus: kmip.ResultStatusOperationFailed, ResultReason: kmip.ResultReasonItemNotFound, ResultMessage: strings.Repeat("long ", 1000)}
	for name, c := range map[string]struct {
		items []kmip.ResponseBatchItem
		want  string
	}{
		"none":           {nil, "0 items"},
		"two":            {[]kmip.ResponseBatchItem{query, query}, "2 items"},
		"another":        {[]kmip.ResponseBatchItem{ok(&payloads.ActivateResponsePayload{UniqueIdentifier: "1"})}, "it answers Activate"},
		"pending":        {[]kmip.ResponseBatchItem{pending}, "OperationPending"},
		"nothing inside": {[]kmip.ResponseBatchItem{{Operation: kmip.OperationQuery}}, "without a payload"},
		"failure":        {[]kmip.ResponseBatchItem{failed}, "ItemNotFound"},
	} {
		resp, err := decode(response(c.items...))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_, err = payload(resp, kmip.OperationQuery)
		if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 400 {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// FuzzResponse: whatever a server sends, nothing panics, and what passes for a
// key has 32 bytes.
func FuzzResponse(f *testing.F) {
	f.Add(response(getResponse(kmip.KeyFormatTypeRaw, make([]byte, 32))))
	f.Add(response(getResponse(kmip.KeyFormatTypeOpaque, make([]byte, 32))))
	f.Add(response(ok(&payloads.QueryResponsePayload{VendorIdentification: "x"})))
	f.Add(response(ok(&payloads.LocateResponsePayload{UniqueIdentifier: []string{"1", "2"}})))
	f.Add(response(ok(&payloads.GetAttributesResponsePayload{UniqueIdentifier: "1", Attribute: []kmip.Attribute{
		nameAttribute("n"), {AttributeName: "State", AttributeValue: kmip.StateActive}, {AttributeName: "x-Vendor", AttributeValue: "v"},
	}})))
	f.Add(response(kmip.ResponseBatchItem{ResultStatus: kmip.ResultStatusOperationFailed, ResultReason: kmip.ResultReasonItemNotFound}))
	f.Add(nested(40))
	f.Add(mustHex("42007b01 00000018 30303030 30303030 30303030 30303030 30303030 30303030"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		serve := func(ctxOp kmip.OperationPayload) (kmip.OperationPayload, error) {
			resp, err := readAndDecode(bytes.NewReader(msg))
			if err != nil {
				return nil, err
			}
			return payload(resp, ctxOp.Operation())
		}
		o := operations{func(_ context.Context, req kmip.OperationPayload) (kmip.OperationPayload, error) { return serve(req) }}
		if k, err := o.Get(t.Context(), "1"); err == nil && k.Len() != 32 {
			t.Fatalf("a key of %d bytes", k.Len())
		}
		if ids, err := o.Locate(t.Context(), "n", 1); err == nil && len(ids) > 1 {
			t.Fatalf("%d ids", len(ids))
		}
		o.GetAttributes(t.Context(), "1", "State")
		o.Query(t.Context())
		o.Create(t.Context(), "n")
		o.Activate(t.Context(), "1")
	})
}
