package kms

import (
	"context"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
)

// ReKey makes a new key in the place of an existing one and returns its id (KMIP
// 1.4 §4.4): with the same attributes, but for dates, which offset moves, and
// for those that tell of the old key's own life; with its names, which the old
// key gives up; and linked with it in both directions. attributes are given to
// the new key besides, or instead.
func (s *Session) ReKey(ctx context.Context, id string, offset *time.Duration, attributes []kmip.Attribute) (made string, err error) {
	var key *secret.Key
	defer func() { key.Wipe() }()
	err = s.transact(ctx, func(t *tx) error {
		e, err := s.read(ctx, id)
		if err != nil {
			return err
		}
		old := *e.Value
		switch {
		case old.gone():
			return errGone()
		case !old.Archived.IsZero():
			return Refuse(kmip.ResultReasonObjectArchived, "the object is archived; recover it first")
		case old.Type != kmip.ObjectTypeSymmetricKey:
			return Refuse(kmip.ResultReasonInvalidField, "only symmetric keys are made anew")
		case offset != nil && *offset < 0:
			return Refuse(kmip.ResultReasonInvalidField, "the offset is negative")
		}
		o := old.successor(t.now, offset)
		if err := o.override(attributes, offset != nil, t.now); err != nil {
			return err
		}
		o.settle(t.now)
		key.Wipe()
		if key, err = o.generate(); err != nil {
			return err
		}
		if err := o.link(kmip.LinkTypeReplacedObjectLink, id); err != nil {
			return err
		}
		if made, err = t.create(o, key); err != nil {
			return err
		}
		old.Attributes = without(old.Attributes, kmip.AttributeNameName)
		if err := old.link(kmip.LinkTypeReplacementObjectLink, made); err != nil {
			return err
		}
		old.LastChange = t.now
		t.replace(e, &old)
		return nil
	})
	return made, err
}

// successor is a copy of the object as the table of KMIP 1.4 §4.4 has the
// replacement key.
func (o *object) successor(now time.Time, offset *time.Duration) *object {
	n := &object{
		Type: o.Type, Algorithm: o.Algorithm, Length: o.Length, Usage: o.Usage, State: kmip.StatePreActive,
		Initial: now, LastChange: now,
		Activation: o.Activation, ProcessFrom: o.ProcessFrom, ProtectTo: o.ProtectTo, Deactivated: o.Deactivated,
		Flags:      o.Flags & (flagSensitive | flagAlwaysSensitive | flagInextractable | flagNeverExtractable),
		Attributes: without(without(o.Attributes, kmip.AttributeNameLink), kmip.AttributeNameRandomNumberGenerator),
	}
	n.flag(flagAlwaysSensitive, n.is(flagSensitive))
	n.flag(flagNeverExtractable, n.is(flagInextractable))
	if o.Reason != nil && o.State == kmip.StateDeactivated {
		n.Deactivated = time.Time{} // it is when the old key was revoked, not a date that was set for it
	}
	if o.Limits != nil {
		n.Limits = &usageLimits{Total: o.Limits.Total, Count: o.Limits.Total, Unit: o.Limits.Unit}
	}
	if offset == nil {
		return n
	}
	// The new key is active an offset from now; the other dates keep their
	// distance from the activation.
	n.Activation = now.Add(*offset).Truncate(time.Second)
	from := o.Activation
	if from.IsZero() {
		from = o.Initial
	}
	by := n.Activation.Sub(from)
	for _, d := range []*time.Time{&n.ProcessFrom, &n.ProtectTo, &n.Deactivated} {
		if !d.IsZero() {
			*d = d.Add(by)
		}
	}
	return n
}

// override gives the replacement key the attributes of the request. A name is
// added to those it has; of everything else the request's take the place of the
// old key's.
func (o *object) override(attributes []kmip.Attribute, offset bool, now time.Time) error {
	for _, a := range attributes {
		switch a.AttributeName {
		case kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength:
			was := o.own("", a.AttributeName)
			if was != a.AttributeValue {
				return Refuse(kmip.ResultReasonInvalidField, "the new key has the %s of the old one", a.AttributeName)
			}
			o.Attributes = without(o.Attributes, a.AttributeName)
		case kmip.AttributeNameCryptographicUsageMask:
			o.Usage = 0
		case kmip.AttributeNameUsageLimits:
			o.Limits = nil
		case kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate,
			kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate:
			if offset {
				return Refuse(kmip.ResultReasonInvalidMessage, "an offset and %q cannot be given together", a.AttributeName)
			}
		}
	}
	// All dates first go, so that the new ones are not compared with old ones.
	for _, a := range attributes {
		if r, ok := ruleOf(a.AttributeName); ok && r.given && (r.add || r.kept) && a.AttributeName != kmip.AttributeNameName {
			switch a.AttributeName {
			case kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate,
				kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate:
				*o.date(a.AttributeName) = time.Time{}
			default:
				o.Attributes = without(o.Attributes, a.AttributeName)
			}
		}
	}
	var given []kmip.Attribute
	for _, a := range attributes {
		if a.AttributeName != kmip.AttributeNameCryptographicAlgorithm && a.AttributeName != kmip.AttributeNameCryptographicLength {
			if a.AttributeName == kmip.AttributeNameName {
				a.AttributeIndex = nil // it counts from the old key's
			}
			given = append(given, a)
		}
	}
	return o.give(given, now)
}

// without is the list without an attribute; it is a copy.
func without(list []attribute, name kmip.AttributeName) (rest []attribute) {
	for _, a := range list {
		if a.Name != name {
			rest = append(rest, a)
		}
	}
	return rest
}
