package kms

import (
	"context"
	"time"

	"github.com/ovh/kmip-go"
)

// Activate makes a Pre-Active object Active.
func (s *Session) Activate(ctx context.Context, id string) error {
	return s.change(ctx, id, func(t *tx, o *object) error { return o.activate(t.now) })
}

// Revoke deactivates the object or marks it compromised, as the reason says.
// occurred is the Compromise Occurrence Date, zero for none.
func (s *Session) Revoke(ctx context.Context, id string, reason kmip.RevocationReason, occurred time.Time) error {
	r := revocation{Code: reason.RevocationReasonCode, Message: reason.RevocationMessage}
	if r.Code < kmip.RevocationReasonCodeUnspecified || r.Code > kmip.RevocationReasonCodePrivilegeWithdrawn {
		return Refuse(kmip.ResultReasonInvalidField, "a Revocation Reason is needed")
	}
	if occurred.Year() > 9999 || occurred.Year() < 1 || len(r.Message) > maxAttributeBytes {
		return Refuse(kmip.ResultReasonInvalidField, "the Compromise Occurrence Date or the message does not fit")
	}
	if r.Code == kmip.RevocationReasonCodeKeyCompromise || r.Code == kmip.RevocationReasonCodeCACompromise {
		s.detail = "compromise" // what a restore needs to know, to do it again
	}
	return s.change(ctx, id, func(t *tx, o *object) error { return o.revoke(r, occurred.UTC(), t.now) })
}

// Destroy ends the serving of the object's material at once and frees its
// names; the material is purged after [GraceTime].
func (s *Session) Destroy(ctx context.Context, id string) error {
	return s.change(ctx, id, func(t *tx, o *object) error {
		if !o.Archived.IsZero() {
			return Refuse(kmip.ResultReasonObjectArchived, "the object is archived; recover it first")
		}
		return o.destroy(t.now)
	})
}

// Archive takes the object off-line (KMIP 1.4 §4.22): its attributes can be read
// and it can be located, but it is of no use until Recover. Its bytes stay where
// they are.
func (s *Session) Archive(ctx context.Context, id string) error {
	return s.change(ctx, id, func(t *tx, o *object) error {
		if err := o.editable(); err != nil {
			return err
		}
		if !o.Archived.IsZero() {
			return Refuse(kmip.ResultReasonObjectArchived, "the object is archived already")
		}
		o.Archived = t.now
		return nil
	})
}

// Recover brings an archived object back (KMIP 1.4 §4.23); of one that is not
// archived it asks nothing.
func (s *Session) Recover(ctx context.Context, id string) error {
	return s.change(ctx, id, func(_ *tx, o *object) error {
		if err := o.editable(); err != nil {
			return err
		}
		o.Archived = time.Time{}
		return nil
	})
}
