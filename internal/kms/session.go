package kms

import (
	"context"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms/audit"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// A Session is what one client may do: the operations on the objects of its own
// instance. [KMS.Session] makes it, for one request: it sees everything that was
// committed before it was made, its own writes, and perhaps more. It is for one
// goroutine. All its errors are an *[Error].
type Session struct {
	k         *KMS
	inst      *instance
	quota     Quota
	synced    bool           // the cache holds all that this session must see
	revision  int64          // of the last write
	done      []step         // all writes, for Undo
	trail                    // of the operation under way
	unsettled []audit.Ticket // of operations that have ended
	Actor                    // who the client is
	presumed                 // what it has not asked
}

// Material is an object as Register takes it and Get gives it.
type Material struct {
	Type      kmip.ObjectType // SymmetricKey, SecretData or OpaqueObject
	Subtype   uint32          // SecretDataType or OpaqueDataType
	Format    kmip.KeyFormatType
	Algorithm kmip.CryptographicAlgorithm
	Length    int32       // bits
	Bytes     *secret.Key // the receiver's to wipe; nil for an object without a key value

	// Wrapping says how Bytes are wrapped; nil: they are not. Structured tells
	// that the wrapped bytes are inside a Key Value structure, as a client gave
	// them.
	Wrapping   *kmip.KeyWrappingData
	Structured bool
}

// read returns the object in the state that its dates have brought it to, which
// all members agree on ([KMS.settle]).
func (s *Session) read(ctx context.Context, id string) (store.Entry[*object], error) {
	if id == "" {
		return store.Entry[*object]{}, Refuse(kmip.ResultReasonItemNotFound, "no identifier is given, and none comes from earlier in the batch")
	}
	if err := s.Confirm(ctx); err != nil {
		return store.Entry[*object]{}, AsError(err)
	}
	e, ok := s.inst.objects.Peek(id)
	if !s.synced || !ok { // Get also says what is wrong
		var err error
		if e, err = s.inst.objects.Get(ctx, id); err != nil {
			return e, AsError(err)
		}
		s.synced = true
	}
	e, err := s.k.settle(ctx, s.inst, e)
	if err != nil {
		return e, AsError(err)
	}
	return e, nil
}

// online returns the object like read, and refuses one that is archived.
func (s *Session) online(ctx context.Context, id string) (*object, error) {
	e, err := s.read(ctx, id)
	if err == nil && !e.Value.Archived.IsZero() {
		err = Refuse(kmip.ResultReasonObjectArchived, "the object is archived; recover it first")
	}
	return e.Value, err
}

// settled returns o, or a copy if its dates have changed its state.
func (o *object) settled(now time.Time) *object {
	c := *o
	if c.settle(now) {
		return &c
	}
	return o
}

// Changed tells whether the session has changed anything yet.
func (s *Session) Changed() bool { return s.revision > 0 }

// now is the time in whole seconds, as KMIP's dates have it.
func (s *Session) now() time.Time { return s.k.now().UTC().Truncate(time.Second) }
