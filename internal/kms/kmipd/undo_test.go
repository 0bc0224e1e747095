package kmipd

import (
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// TestUndo: a batch that fails leaves nothing, and says so item by item.
func TestUndo(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	m := request(4, createAES(named("undone")), &payloads.ActivateRequestPayload{}, &payloads.DestroyRequestPayload{}, &payloads.QueryRequestPayload{})
	m.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionUndo
	answer := roundTrip(t, c, m)
	if len(answer.BatchItem) != 3 {
		t.Fatalf("%d items are answered, want the two that were done and the one that failed", len(answer.BatchItem))
	}
	for i, want := range []kmip.ResultStatus{kmip.ResultStatusOperationUndone, kmip.ResultStatusOperationUndone, kmip.ResultStatusOperationFailed} {
		if it := answer.BatchItem[i]; it.ResultStatus != want || it.ResponsePayload != nil {
			t.Errorf("item %d: %+v, want status %d and no payload", i+1, it, want)
		}
	}
	if got := do[*payloads.LocateResponsePayload](t, c, 4, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{named("undone")}}); len(got.UniqueIdentifier) != 0 {
		t.Errorf("the key is there: %v", got.UniqueIdentifier)
	}
}

// TestReasonsOfOtherVersions: a client is told nothing that its version lacks.
func TestReasonsOfOtherVersions(t *testing.T) {
	since := map[kmip.ResultReason]int{
		kmip.ResultReasonSensitive: 4, kmip.ResultReasonNotExtractable: 4, kmip.ResultReasonObjectAlreadyExists: 4,
		kmip.ResultReasonKeyValueNotPresent: 2, kmip.ResultReasonEncodingOptionError: 1, kmip.ResultReasonItemNotFound: 0,
	}
	for reason, from := range since {
		for minor := range 5 {
			got := known(reason, minor)
			if minor >= from && got != reason || since[got] > minor || got == 0 {
				t.Errorf("KMIP 1.%d is told %d for %d", minor, got, reason)
			}
		}
	}
}
