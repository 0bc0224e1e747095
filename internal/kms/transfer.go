package kms

import (
	"context"
	"errors"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// Import keeps an object under the identifier that the client gives, with all
// its attributes as they are given, those included that are otherwise the
// server's to set: state, dates, digest (KMIP 1.4 §4.38). replace takes the place
// of an existing object, whose material is then lost: only an administrator may.
// It takes over m.Bytes.
func (s *Session) Import(ctx context.Context, id string, replace bool, m Material, attributes []kmip.Attribute) error {
	defer m.Bytes.Wipe()
	if id == "" || len(id) > 128 {
		return Refuse(kmip.ResultReasonInvalidField, "an object is imported under a Unique Identifier of 1 to 128 bytes")
	}
	if replace && !s.Role.Covers(RoleAdministrator) {
		return Refuse(kmip.ResultReasonPermissionDenied, "to replace an object destroys it, which takes an administrator's role; %s is %s", s.Name, s.Role)
	}
	err := s.transact(ctx, func(t *tx) error {
		o, err := s.imported(m, attributes, t.now)
		if err == nil && m.Wrapping != nil {
			err = s.checkWrapped(ctx, m)
		}
		if err != nil {
			return asInvalidField(err)
		}
		e, err := s.inst.objects.Get(ctx, id)
		switch {
		case errors.Is(err, store.ErrNotFound):
			return t.createAs(id, o, m.Bytes)
		case err != nil && !(replace && errors.Is(err, store.ErrDamaged)):
			return err
		case !replace:
			return Refuse(kmip.ResultReasonObjectAlreadyExists, "an object of this identifier is here already")
		}
		o.holds(m.Bytes)
		t.replace(e, o)
		return nil
	})
	return err
}

// imported makes an object of all its attributes.
func (s *Session) imported(m Material, attributes []kmip.Attribute, now time.Time) (*object, error) {
	o := &object{Type: m.Type, State: kmip.StatePreActive, Initial: now, LastChange: now}
	var given []kmip.Attribute
	for _, a := range attributes {
		own, err := o.restore(a)
		if err != nil {
			return nil, err
		}
		if !own {
			given = append(given, a)
		}
	}
	// The attributes that any new object may have come by the usual way, but not
	// by its order of dates: the object is older than its arrival.
	state := o.State
	o.State = kmip.StatePreActive
	limits, flags := o.Limits, o.Flags
	if err := o.give(given, time.Time{}); err != nil {
		return nil, err
	}
	o.State = state
	if limits != nil {
		o.Limits = limits
	}
	const guards = flagAlwaysSensitive | flagNeverExtractable
	o.Flags = o.Flags&^guards | flags&(guards|flagServed) | o.Flags&flagServed
	if o.Archived.After(now) || o.Initial.After(now) {
		return nil, Refuse(kmip.ResultReasonInvalidField, "the Initial Date or the Archive Date is to come")
	}
	return o, o.adopt(m)
}

// restore sets an attribute that only a server sets; false for any other.
func (o *object) restore(a kmip.Attribute) (own bool, err error) {
	date := func(t *time.Time) (bool, error) {
		v, err := dateOf(a)
		*t = v
		return true, err
	}
	switch a.AttributeName {
	case kmip.AttributeNameUniqueIdentifier, kmip.AttributeNameObjectType, kmip.AttributeNameDigest, kmip.AttributeNameLeaseTime,
		kmip.AttributeNameLastChangeDate, kmip.AttributeNameKeyValuePresent: // made anew of the object itself
		return true, nil
	case kmip.AttributeNameInitialDate:
		return date(&o.Initial)
	case kmip.AttributeNameArchiveDate:
		return date(&o.Archived)
	case kmip.AttributeNameDestroyDate:
		return date(&o.Destroyed)
	case kmip.AttributeNameCompromiseDate:
		return date(&o.Compromised)
	case kmip.AttributeNameCompromiseOccurrenceDate:
		return date(&o.Occurred)
	case kmip.AttributeNameState:
		v, ok := a.AttributeValue.(kmip.State)
		if !ok || v < kmip.StatePreActive || v > kmip.StateCompromised {
			return true, Refuse(kmip.ResultReasonInvalidField, "an object is imported Pre-Active, Active, Deactivated or Compromised")
		}
		o.State = v
		return true, nil
	case kmip.AttributeNameRevocationReason:
		v, ok := a.AttributeValue.(kmip.RevocationReason)
		if !ok || len(v.RevocationMessage) > maxAttributeBytes {
			return true, wrongType(a)
		}
		o.Reason = &revocation{v.RevocationReasonCode, v.RevocationMessage}
		return true, nil
	case kmip.AttributeNameAlwaysSensitive, kmip.AttributeNameNeverExtractable:
		v, ok := a.AttributeValue.(bool)
		if !ok {
			return true, wrongType(a)
		}
		f := flagAlwaysSensitive
		if a.AttributeName == kmip.AttributeNameNeverExtractable {
			f = flagNeverExtractable
		}
		o.flag(f, v)
		return true, nil
	case kmip.AttributeNameUsageLimits: // the count too
		v, ok := a.AttributeValue.(kmip.UsageLimits)
		if ok && v.UsageLimitsCount != nil {
			count := *v.UsageLimitsCount
			if count < 0 || count > v.UsageLimitsTotal {
				return true, Refuse(kmip.ResultReasonInvalidField, "the count of Usage Limits is not within the total")
			}
			o.Limits = &usageLimits{Total: v.UsageLimitsTotal, Count: count, Unit: v.UsageLimitsUnit}
			return true, nil
		}
	}
	return false, nil
}

// Export returns the object with all its attributes (KMIP 1.4 §4.39). A
// destroyed one has no material any more.
func (s *Session) Export(ctx context.Context, id string, f Form) (Material, []kmip.Attribute, error) {
	o, err := s.online(ctx, id)
	if err != nil {
		return Material{}, nil, err
	}
	list, err := o.list(id)
	if err != nil {
		return Material{}, nil, damaged(err)
	}
	if o.gone() {
		return Material{Type: o.Type, Subtype: o.Subtype, Format: o.format(), Algorithm: o.Algorithm, Length: o.Length}, list, nil
	}
	if o.Type == kmip.ObjectTypeSymmetricKey && o.Usage&int32(kmip.CryptographicUsageExport) == 0 {
		return Material{}, nil, Refuse(kmip.ResultReasonPermissionDenied, "the key's Cryptographic Usage Mask does not allow export")
	}
	m, err := s.GetAs(ctx, id, f)
	return m, list, err
}
