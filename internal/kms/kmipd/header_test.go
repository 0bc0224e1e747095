package kmipd

import (
	"reflect"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// FuzzHeader sets what is read of a header here against what the codec reads.
func FuzzHeader(f *testing.F) {
	yes, at := true, time.Unix(1_700_000_000, 0)
	for _, change := range []func(*kmip.RequestHeader){
		func(*kmip.RequestHeader) {},
		func(h *kmip.RequestHeader) { h.MaximumResponseSize = 4096 },
		func(h *kmip.RequestHeader) { h.BatchOrderOption, h.TimeStamp = &yes, &at },
		func(h *kmip.RequestHeader) {
			h.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionUndo
		},
		func(h *kmip.RequestHeader) { h.ProtocolVersion, h.ClientCorrelationValue = kmip.V1_4, "x" },
		func(h *kmip.RequestHeader) { h.AsynchronousIndicator = &yes },
	} {
		m := kmip.NewRequestMessage(kmip.V1_1, &payloads.DiscoverVersionsRequestPayload{})
		change(&m.Header)
		wire := ttlv.MarshalTTLV(&m)
		f.Add(items(wire[headerLen:])[0].raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if check(raw, 0) != nil {
			return
		}
		list := items(raw)
		if len(list) != 1 || list[0].tag != kmip.TagRequestHeader || list[0].typ != ttlv.TypeStructure {
			return
		}
		fields := items(list[0].value)
		if inOrder(fields, headerFields) != nil {
			return
		}
		got, usual := usualHeader(fields)
		if !usual {
			return
		}
		want, err := codedHeader(list[0])
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%x: read\n%+v\nthe codec\n%+v, %v", raw, got, want, err)
		}
	})
}
