package kms

import (
	"time"

	"github.com/ovh/kmip-go"
)

// The life cycle of KMIP 1.4 §3.22 (K7):
//
//	Pre-Active ──► Active ──► Deactivated ──► Destroyed
//	    │             │            │              │
//	    │             └──► Compromised ◄── (any of the others)
//	    └──► Destroyed      │                     │
//	                        └──► Destroyed Compromised ◄──┘

// settle moves the object to the state that its dates have brought it to, and
// reports whether that is a new one.
func (o *object) settle(now time.Time) bool {
	before := o.State
	if o.State == kmip.StatePreActive && !o.Activation.IsZero() && !now.Before(o.Activation) {
		o.State, o.LastChange = kmip.StateActive, o.Activation
	}
	if o.State == kmip.StateActive && !o.Deactivated.IsZero() && !now.Before(o.Deactivated) {
		o.State, o.LastChange = kmip.StateDeactivated, o.Deactivated
	}
	return o.State != before
}

func (o *object) activate(now time.Time) error {
	if o.State != kmip.StatePreActive || o.Type == kmip.ObjectTypeOpaqueObject {
		return Refuse(kmip.ResultReasonPermissionDenied, "only a Pre-Active object can be activated; this one is %s", stateName(o.State))
	}
	o.State, o.Activation = kmip.StateActive, now
	return nil
}

// revoke follows KMIP 1.4 §4.20: a compromise is possible in every state, any
// other reason deactivates an Active object.
func (o *object) revoke(r revocation, occurred, now time.Time) error {
	if r.Code == kmip.RevocationReasonCodeKeyCompromise || r.Code == kmip.RevocationReasonCodeCACompromise {
		switch o.State {
		case kmip.StateCompromised, kmip.StateDestroyedCompromised:
			return Refuse(kmip.ResultReasonPermissionDenied, "the object is %s already", stateName(o.State))
		case kmip.StateDestroyed:
			o.State = kmip.StateDestroyedCompromised
		default:
			o.State = kmip.StateCompromised
		}
		if occurred.IsZero() {
			occurred = o.Initial
		}
		o.Reason, o.Compromised, o.Occurred = &r, now, occurred
		return nil
	}
	if !occurred.IsZero() {
		return Refuse(kmip.ResultReasonInvalidField, "a Compromise Occurrence Date goes with a compromise only")
	}
	if o.State != kmip.StateActive {
		return Refuse(kmip.ResultReasonIllegalOperation, "only an Active object can be revoked for a reason other than compromise; this one is %s", stateName(o.State))
	}
	o.State, o.Reason, o.Deactivated = kmip.StateDeactivated, &r, now
	return nil
}

func (o *object) destroy(now time.Time) error {
	switch o.State {
	case kmip.StateActive:
		return Refuse(kmip.ResultReasonPermissionDenied, "an Active object cannot be destroyed; revoke it first")
	case kmip.StateDestroyed, kmip.StateDestroyedCompromised:
		return Refuse(kmip.ResultReasonPermissionDenied, "the object is destroyed already")
	case kmip.StateCompromised:
		o.State = kmip.StateDestroyedCompromised
	default:
		o.State = kmip.StateDestroyed
	}
	o.Destroyed = now
	return nil
}

// gone tells whether the object's material is no longer served.
func (o *object) gone() bool {
	return o.State == kmip.StateDestroyed || o.State == kmip.StateDestroyedCompromised
}

// purge drops the material of an object whose grace time is over, and reports
// whether it did.
func (o *object) purge(now time.Time) bool {
	if !o.gone() || o.material == 0 || now.Sub(o.Destroyed) < GraceTime {
		return false
	}
	o.purgeNow(now)
	return true
}

func stateName(s kmip.State) string {
	switch s {
	case kmip.StatePreActive:
		return "Pre-Active"
	case kmip.StateActive:
		return "Active"
	case kmip.StateDeactivated:
		return "Deactivated"
	case kmip.StateCompromised:
		return "Compromised"
	case kmip.StateDestroyed:
		return "Destroyed"
	case kmip.StateDestroyedCompromised:
		return "Destroyed Compromised"
	}
	return "in no known state"
}
