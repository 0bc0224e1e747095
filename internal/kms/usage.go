package kms

import (
	"context"
	"time"

	"github.com/ovh/kmip-go"
)

// A CheckRequest is what Check asks of an object, and in its answer what the
// object does not meet, with the object's own value (KMIP 1.4 §4.10).
type CheckRequest struct {
	Count *int64 // Usage Limits Count
	Usage *kmip.CryptographicUsageMask
	Lease *time.Duration
}

// Check tells whether the object could be used as asked, and changes nothing.
func (s *Session) Check(ctx context.Context, id string, q CheckRequest) (unmet CheckRequest, err error) {
	o, err := s.online(ctx, id)
	if err != nil {
		return unmet, err
	}
	if q.Count != nil {
		switch {
		case *q.Count < 0:
			return unmet, Refuse(kmip.ResultReasonInvalidField, "the Usage Limits Count is negative")
		case o.Limits != nil && o.Limits.Count < *q.Count:
			count := o.Limits.Count
			unmet.Count = &count
		}
	}
	if q.Usage != nil && int32(*q.Usage)&^o.Usage != 0 {
		own := kmip.CryptographicUsageMask(o.Usage)
		unmet.Usage = &own
	}
	if q.Lease != nil && *q.Lease > leaseTime {
		lease := leaseTime
		unmet.Lease = &lease
	}
	return unmet, nil
}

// ObtainLease lets a client that has got the object go on using it for the time
// that it returns, and says when the object last changed (KMIP 1.4 §4.15). There
// is none for an object that is not to be used any more.
func (s *Session) ObtainLease(ctx context.Context, id string) (lease time.Duration, changed time.Time, err error) {
	o, err := s.online(ctx, id)
	if err != nil {
		return 0, changed, err
	}
	if o.State != kmip.StatePreActive && o.State != kmip.StateActive && o.Type != kmip.ObjectTypeOpaqueObject {
		return 0, changed, Refuse(kmip.ResultReasonPermissionDenied, "no lease on an object that is %s", stateName(o.State))
	}
	return leaseTime, o.LastChange, nil
}

// GetUsageAllocation takes count units off the object's Usage Limits for the
// client to spend by itself (KMIP 1.4 §4.16). Two that ask at once, on any
// members, get no more than there is.
func (s *Session) GetUsageAllocation(ctx context.Context, id string, count int64) error {
	if count < 0 {
		return Refuse(kmip.ResultReasonInvalidField, "the Usage Limits Count is negative")
	}
	return s.change(ctx, id, func(t *tx, o *object) error {
		switch {
		case !o.Archived.IsZero():
			return Refuse(kmip.ResultReasonObjectArchived, "the object is archived; recover it first")
		case o.Limits == nil:
			return Refuse(kmip.ResultReasonIllegalOperation, "the object has no Usage Limits")
		}
		if err := o.mayProtect(t.now); err != nil {
			return err
		}
		return o.spend(count)
	})
}

// spend takes n units off the Usage Limits.
func (o *object) spend(n int64) error {
	if o.Limits.Count < n {
		return Refuse(kmip.ResultReasonPermissionDenied, "the Usage Limits leave %d, and %d are asked for", o.Limits.Count, n)
	}
	left := *o.Limits
	left.Count -= n
	o.Limits = &left
	return nil
}

// mayProtect tells whether the key may encrypt, wrap, derive or make MACs now:
// it is Active and its Protect Stop Date is to come (KMIP 1.4 §3.22, §3.26).
func (o *object) mayProtect(now time.Time) error {
	switch {
	case o.State != kmip.StateActive:
		return Refuse(kmip.ResultReasonPermissionDenied, "the key is %s; only an Active one protects data", stateName(o.State))
	case !o.ProtectTo.IsZero() && !now.Before(o.ProtectTo):
		return Refuse(kmip.ResultReasonPermissionDenied, "the key's Protect Stop Date has passed")
	}
	return nil
}

// mayProcess tells whether the key may decrypt, unwrap or verify now: its Process
// Start Date has come and it has been Active; what it has protected can still be
// read when it is Deactivated or Compromised (K7; KMIP 1.4 §3.22, §3.25).
func (o *object) mayProcess(now time.Time) error {
	switch {
	case o.State == kmip.StatePreActive || o.gone():
		return Refuse(kmip.ResultReasonPermissionDenied, "the key is %s and cannot be used", stateName(o.State))
	case !o.ProcessFrom.IsZero() && now.Before(o.ProcessFrom):
		return Refuse(kmip.ResultReasonPermissionDenied, "the key's Process Start Date is to come")
	}
	return nil
}
