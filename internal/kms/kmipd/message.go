package kmipd

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/store"
)

// maxBatch is how many operations one message may have.
const maxBatch = 1000

// highest is the preferred version; 1.0 to 1.4 are served.
var highest = kmip.V1_4

// itemFields is a request batch item.
var itemFields = []field{{tag: kmip.TagOperation}, {tag: kmip.TagUniqueBatchItemID}, {tag: kmip.TagRequestPayload}, {tag: kmip.TagMessageExtension}}

// A sessionOpener looks the connection's client up, once for each message, so
// that a certificate that was removed is refused on open connections too.
type sessionOpener func(context.Context) (*kms.Session, error)

// answer is the path from the bytes of a request to the bytes of its response.
// keep tells whether the connection goes on. The response is the caller's to
// give back to s.encoders; nil: there is none, and the connection is to end.
func (s *server) answer(ctx context.Context, from string, open sessionOpener, msg []byte) (response *encoder, keep bool) {
	r := &reply{s: s, from: from, version: kmip.V1_0}
	defer r.wipe()
	keep = r.handle(ctx, open, msg)
	if r.silent {
		return nil, false
	}
	return r.encode(), keep
}

// reply grows into the response to one message.
type reply struct {
	s       *server
	from    string // the client's address
	version kmip.ProtocolVersion
	max     int // the client's Maximum Response Size, 0 for none
	message kmip.ResponseMessage
	secrets [][]byte // key bytes in message, to clear once it is encoded

	// silent: the message is not answered. The store did not say in time whether
	// what was asked has happened, as when the cluster's leader is lost: a General
	// Failure would be taken for a No by clients that would try another member
	// after a lost connection.
	silent bool
}

// handle fills r. It returns false when the message is so wrong that the stream
// cannot be trusted to hold another, and when the client has no right to go on.
func (r *reply) handle(ctx context.Context, open sessionOpener, msg []byte) (keep bool) {
	defer func() {
		if p := recover(); p != nil {
			r.s.log.Error("kmip: request caused a panic", "from", r.from, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			r.fail(kms.Refuse(kmip.ResultReasonGeneralFailure, "internal error; the server's log says more"))
			keep = false
		}
	}()
	if err := check(msg, 0); err != nil {
		return r.refuseMessage(kmip.ResultReasonInvalidMessage, "the message is no TTLV: %v", err)
	}
	if len(msg) < headerLen {
		return r.refuseMessage(kmip.ResultReasonInvalidMessage, "the message is empty")
	}
	if n := int(binary.BigEndian.Uint32(msg[4:])); msg[3] != byte(ttlv.TypeStructure) || len(msg) != headerLen+n {
		return r.refuseMessage(kmip.ResultReasonInvalidMessage, "the message is not one structure")
	}
	parts := items(msg[headerLen:])
	if len(parts) == 0 || parts[0].tag != kmip.TagRequestHeader || parts[0].typ != ttlv.TypeStructure {
		return r.refuseMessage(kmip.ResultReasonInvalidMessage, "the message does not begin with a request header")
	}
	var version kmip.ProtocolVersion
	head, ok := items(parts[0].value), false
	if len(head) > 0 {
		version, ok = versionOf(head[0]) // before anything else is believed
	}
	if !ok {
		return r.refuseMessage(kmip.ResultReasonInvalidMessage, "the request header does not begin with a protocol version")
	}
	if version.Major() != 1 || version.Minor() < 0 || version.Minor() > highest.Minor() {
		r.version = highest
		return r.refuseMessage(kmip.ResultReasonInvalidMessage, "protocol version %s is not supported; 1.0 to %s are", version, highest)
	}
	r.version = version
	header, err := readHeader(parts[0], head)
	if err != nil {
		return r.fail(err)
	}
	r.message.Header.ClientCorrelationValue = header.ClientCorrelationValue
	if version.Minor() >= 4 && header.ClientCorrelationValue != "" { // so that both sides' logs can be laid side by side
		r.message.Header.ServerCorrelationValue = rand.Text()
		r.s.log.Info("kmip: request", "from", r.from, "client correlation", fmt.Sprintf("%.100q", header.ClientCorrelationValue), "server correlation", r.message.Header.ServerCorrelationValue)
	}
	r.max = int(header.MaximumResponseSize)
	batch := parts[1:]
	for _, it := range batch {
		if it.tag != kmip.TagBatchItem || it.typ != ttlv.TypeStructure {
			return r.refuseMessage(kmip.ResultReasonInvalidMessage, "something other than batch items follows the header")
		}
	}
	switch {
	case int(header.BatchCount) != len(batch) || len(batch) == 0:
		r.refuseMessage(kmip.ResultReasonInvalidMessage, "the batch count is %d, and %d batch items follow", header.BatchCount, len(batch))
		return true
	case len(batch) > maxBatch:
		r.refuseMessage(kmip.ResultReasonInvalidMessage, "a message has at most %d batch items", maxBatch)
		return true
	}
	session, err := open(ctx)
	if err == nil && !onlyMakes(batch) {
		err = session.Confirm(ctx)
	}
	if errors.Is(err, store.ErrUnavailable) {
		return r.drop(err)
	}
	if err != nil {
		r.s.log.Warn("kmip: client refused", "from", r.from, "error", err)
		r.fail(kms.AsError(err))
		return false
	}
	c := &call{Context: ctx, session: session, s: r.s, reply: r}
	logged := r.run(c, batch, header.BatchErrorContinuationOption)
	if err := c.settle(); err != nil {
		r.s.log.Error("kmip: a message is not in the audit log", "client", session.Name, "from", r.from, "error", err)
		for _, i := range logged {
			r.message.BatchItem[i] = failed(r.message.BatchItem[i], err)
		}
	}
	return true
}

// onlyMakes tells that all items are operations that make objects and read none:
// etcd need not be asked what is newest, for the transactions say if the client
// is no longer what it was.
func onlyMakes(batch []item) bool {
	for _, it := range batch {
		if len(it.value) < 2*headerLen || binary.BigEndian.Uint32(it.value) != uint32(kmip.TagOperation)<<8|uint32(ttlv.TypeEnumeration) {
			return false
		}
		switch kmip.Operation(binary.BigEndian.Uint32(it.value[headerLen:])) {
		case kmip.OperationCreate, kmip.OperationRegister:
		default:
			return false
		}
	}
	return true
}

// run processes the batch in order, whatever the Batch Order Option. Without
// another wish of the client it ends at the first failure (KMIP 1.4 §6.14); items
// after it are not answered. Where the store does not answer, none is, unless an
// earlier item has changed something: a client that asked again elsewhere would
// change it twice, so it is told how far its batch has come.
//
// logged are the answers that must not leave before the audit log has them.
func (r *reply) run(c *call, batch []item, onError kmip.BatchErrorContinuationOption) (logged []int) {
	for _, it := range batch {
		begun, before := time.Now(), c.session.Unsettled()
		answer, err := c.do(it)
		c.answered(begun, &answer)
		if errors.Is(err, store.ErrUnavailable) && !c.session.Changed() {
			r.drop(err)
			return nil
		}
		if c.session.Unsettled() > before {
			logged = append(logged, len(r.message.BatchItem))
		}
		r.message.BatchItem = append(r.message.BatchItem, answer)
		if answer.ResultStatus == kmip.ResultStatusSuccess {
			continue
		}
		c.placeholder = "" // no later item may hit the object of an earlier one
		switch onError {
		case kmip.BatchErrorContinuationOptionContinue:
			continue
		case kmip.BatchErrorContinuationOptionUndo:
			r.undo(c)
		}
		return logged
	}
	return logged
}

// undo takes back what the items before the last one have done. What cannot be
// undone stays as it was answered, and the failed item says so.
func (r *reply) undo(c *call) {
	last := len(r.message.BatchItem) - 1
	if err := c.session.Undo(c); err != nil {
		r.s.log.Error("kmip: batch could not be undone", "client", c.session.Name, "from", r.from, "error", err)
		why := kms.AsError(err).Message
		if errors.Is(err, store.ErrUnavailable) {
			why = "whether the items before it are undone is not known"
		}
		r.message.BatchItem[last].ResultMessage += "; " + why
		return
	}
	r.s.log.Info("kmip: batch undone", "items", last, "client", c.session.Name, "from", r.from)
	for i := range r.message.BatchItem[:last] {
		it := &r.message.BatchItem[i]
		it.ResultStatus, it.ResultReason, it.ResponsePayload = kmip.ResultStatusOperationUndone, kmip.ResultReasonOperationCanceledByRequester, nil
		it.ResultMessage = "undone, as the request asks, because a later item failed"
	}
}

func readHeader(it item, list []item) (h kmip.RequestHeader, err error) {
	if err := inOrder(list, headerFields); err != nil {
		return h, kms.Refuse(fieldReason(err), "request header: %v", err)
	}
	h, usual := usualHeader(list)
	if !usual {
		h, err = codedHeader(it)
	}
	switch {
	case err != nil:
		return h, kms.Refuse(kmip.ResultReasonInvalidMessage, "the request header cannot be read")
	case h.MaximumResponseSize < 0:
		return h, kms.Refuse(kmip.ResultReasonInvalidField, "the maximum response size is negative")
	case h.AsynchronousIndicator != nil && *h.AsynchronousIndicator:
		return h, kms.Refuse(kmip.ResultReasonFeatureNotSupported, "asynchronous operation is not supported")
	case h.BatchErrorContinuationOption > kmip.BatchErrorContinuationOptionUndo:
		return h, kms.Refuse(kmip.ResultReasonInvalidField, "the batch error continuation option is unknown")
	}
	return h, nil
}

// codedHeader is the header as the codec reads it.
func codedHeader(it item) (h kmip.RequestHeader, err error) {
	d, err := ttlv.NewTTLVDecoder(it.raw)
	if err == nil {
		err = d.Any(&h)
	}
	return h, err
}

// fieldReason is how KMIP 1.4 §11.1 answers a field out of place.
func fieldReason(err error) kmip.ResultReason {
	if errors.Is(err, errRepeatedField) {
		return kmip.ResultReasonInvalidMessage
	}
	return kmip.ResultReasonInvalidField
}

// refuseMessage answers the message as a whole, and returns false.
func (r *reply) refuseMessage(reason kmip.ResultReason, format string, args ...any) bool {
	err := kms.Refuse(reason, format, args...)
	r.s.log.Warn("kmip: message refused", "from", r.from, "error", err)
	r.fail(err)
	return false
}

// drop leaves the message without an answer, and returns false.
func (r *reply) drop(err error) bool {
	r.s.log.Warn("kmip: message not answered: its outcome is not known", "from", r.from, "error", err)
	r.silent = true
	return false
}

// fail makes the response one batch item without an operation, as KMIP 1.4
// §11.1 has it for what concerns a whole message. It returns true: the stream
// is in step.
func (r *reply) fail(err error) bool {
	r.message.BatchItem = []kmip.ResponseBatchItem{failed(kmip.ResponseBatchItem{}, err)}
	return true
}

func failed(to kmip.ResponseBatchItem, err error) kmip.ResponseBatchItem {
	e := kms.AsError(err)
	to.ResultStatus, to.ResultReason, to.ResultMessage, to.ResponsePayload = kmip.ResultStatusOperationFailed, e.Reason, e.Message, nil
	return to
}

// encode returns the response as bytes. While it is larger than the client
// allows, the largest item's payload gives way to an error (KMIP 1.4 §6.3); what
// that item did is done.
func (r *reply) encode() *encoder {
	r.message.Header.ProtocolVersion = r.version
	r.message.Header.TimeStamp = r.s.now().Truncate(time.Second)
	r.message.Header.BatchCount = int32(len(r.message.BatchItem))
	for i := range r.message.BatchItem {
		it := &r.message.BatchItem[i]
		it.ResultReason = known(it.ResultReason, r.version.Minor())
	}
	e := r.s.encoders.Get().(*encoder)
	for {
		e.Any(&r.message)
		size := len(e.Bytes())
		if r.max == 0 || size <= r.max {
			return e
		}
		e.wipe()
		if !r.shrink(size) {
			r.max = 0 // the least that can be said; it must be said
		}
	}
}

// known is a result reason as the client's version has it: what came later is
// told as what a client of that version would have got.
func known(reason kmip.ResultReason, minor int) kmip.ResultReason {
	switch {
	case minor < 4 && (reason == kmip.ResultReasonSensitive || reason == kmip.ResultReasonNotExtractable):
		return kmip.ResultReasonPermissionDenied
	case minor < 4 && reason == kmip.ResultReasonObjectAlreadyExists:
		return kmip.ResultReasonIllegalOperation
	case minor < 2 && reason == kmip.ResultReasonKeyValueNotPresent:
		return kmip.ResultReasonItemNotFound
	case minor < 1 && reason == kmip.ResultReasonEncodingOptionError:
		return kmip.ResultReasonInvalidField
	}
	return reason
}

// shrink turns the item with the largest payload into an error; false when no
// item has one.
func (r *reply) shrink(size int) bool {
	largest, at := 0, -1
	for i, it := range r.message.BatchItem {
		if it.ResponsePayload == nil {
			continue
		}
		e := r.s.encoders.Get().(*encoder)
		e.TagAny(kmip.TagResponsePayload, it.ResponsePayload)
		if n := len(e.Bytes()); n > largest {
			largest, at = n, i
		}
		r.s.release(e)
	}
	if at < 0 {
		return false
	}
	it := &r.message.BatchItem[at]
	*it = failed(*it, kms.Refuse(kmip.ResultReasonResponseTooLarge, "the response has %d bytes, the client allows %d", size, r.max))
	return true
}

func (r *reply) wipe() {
	for _, b := range r.secrets {
		clear(b)
	}
}

// encoderSize holds any response with a key in it, so that the codec's buffer
// does not grow by leaving copies behind.
const encoderSize = kms.MaxMaterial + 8<<10

// encoder is a codec buffer that is used again and zeroed between uses.
type encoder struct{ ttlv.Encoder }

func newEncoder() any {
	e := &encoder{ttlv.NewTTLVEncoder()}
	e.ByteString(kmip.TagKeyMaterial, make([]byte, encoderSize))
	e.Clear()
	return e
}

func (e *encoder) wipe() {
	clear(e.Bytes())
	e.Clear()
}

func (s *server) release(e *encoder) {
	e.wipe()
	s.encoders.Put(e)
}
