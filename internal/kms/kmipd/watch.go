package kmipd

import (
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// A Watcher is told what the front does. Its methods are called concurrently and
// must not wait.
type Watcher interface {
	// Opened: a connection was taken; Closed: it is gone.
	Opened()
	Closed()
	// Shed: a connection was closed at once, for too many are open.
	Shed()
	// HandshakeFailed: a client was not let in, or gave up.
	HandshakeFailed()
	// Answered: an operation is done. result is "Success" or the result reason.
	Answered(operation, instance, result string, took time.Duration)
}

type nobody struct{}

func (nobody) Opened()                                        {}
func (nobody) Closed()                                        {}
func (nobody) Shed()                                          {}
func (nobody) HandshakeFailed()                               {}
func (nobody) Answered(string, string, string, time.Duration) {}

// answered tells the watcher of one batch item. An operation that this server
// does not have is "Unknown", whatever the client called it.
func (c *call) answered(begun time.Time, answer *kmip.ResponseBatchItem) {
	operation, result := "Unknown", "Success"
	if _, ok := c.s.operations[answer.Operation]; ok {
		operation = ttlv.EnumStr(answer.Operation)
	}
	if answer.ResultStatus != kmip.ResultStatusSuccess {
		result = ttlv.EnumStr(answer.ResultReason)
	}
	c.s.Watcher.Answered(operation, c.session.Instance, result, time.Since(begun))
}
