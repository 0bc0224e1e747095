package kmipd

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// holdUp makes a request's time run out after one of its operations is done, as
// if the cluster lost its leader then: what the store is asked for after it has
// no answer.
type holdUp struct {
	nobody
	after atomic.Pointer[string]
	time  time.Duration
}

func (h *holdUp) Answered(operation, _, _ string, _ time.Duration) {
	if after := h.after.Load(); after != nil && *after == operation {
		time.Sleep(h.time)
	}
}

// TestUnanswered: where the store does not say whether what was asked has
// happened, the connection ends without an answer, so that a client tries another
// member; but a batch that has changed something is answered as far as it came,
// for who repeats it would change that twice.
func TestUnanswered(t *testing.T) {
	t.Parallel()
	watch := &holdUp{time: 700 * time.Millisecond}
	b := serve(t, Options{RequestTimeout: 500 * time.Millisecond, Watcher: watch})
	id, other := newKey(t, b.dial(t)), newKey(t, b.dial(t)) // what happens to other is not known
	never := "never"
	ask := &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionOperations}}
	for _, c := range []struct {
		name  string
		after string
		items []kmip.OperationPayload
		undo  bool
		want  []kmip.ResultStatus // nil: no answer
	}{
		{"a create", "Query", []kmip.OperationPayload{ask, createAES()}, false, nil},
		{"a destroy", "Query", []kmip.OperationPayload{ask, &payloads.DestroyRequestPayload{UniqueIdentifier: other}}, false, nil},
		{"a change after a read", "GetAttributes", []kmip.OperationPayload{&payloads.GetAttributesRequestPayload{UniqueIdentifier: id}, &payloads.ActivateRequestPayload{}}, false, nil},
		{"a change after a change", "Create", []kmip.OperationPayload{createAES(), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{}}, false,
			[]kmip.ResultStatus{kmip.ResultStatusSuccess, kmip.ResultStatusOperationFailed}},
		{"and it is to be undone", "Create", []kmip.OperationPayload{createAES(), &payloads.ActivateRequestPayload{}}, true,
			[]kmip.ResultStatus{kmip.ResultStatusSuccess, kmip.ResultStatusOperationFailed}},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := b.dial(t)
			req := request(4, c.items...)
			if c.undo {
				req.Header.BatchErrorContinuationOption = kmip.BatchErrorContinuationOptionUndo
			}
			watch.after.Store(&c.after)
			defer watch.after.Store(&never)
			if _, err := conn.Write(wireOf(req)); err != nil {
				t.Fatal(err)
			}
			got, _, err := receive(conn)
			if c.want == nil {
				if err == nil {
					t.Fatalf("it is answered: %+v", got.BatchItem)
				}
				return
			}
			if err != nil || len(got.BatchItem) != len(c.want) {
				t.Fatalf("got %+v, %v", got.BatchItem, err)
			}
			for i, it := range got.BatchItem {
				if it.ResultStatus != c.want[i] {
					t.Errorf("item %d: %v %v", i, it.ResultStatus, it.Err())
				}
			}
			made := got.BatchItem[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
			text := got.BatchItem[1].ResultMessage
			if !strings.Contains(text, "may or may not") || c.undo && !strings.Contains(text, "whether the items before it are undone is not known") {
				t.Errorf("the client is told: %q", text)
			}
			watch.after.Store(&never)
			do[*payloads.GetResponsePayload](t, conn, 4, &payloads.GetRequestPayload{UniqueIdentifier: made}) // the connection goes on
		})
	}
	if !strings.Contains(b.log.String(), "its outcome is not known") {
		t.Error("nothing is logged")
	}
}
