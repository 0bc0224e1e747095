package kms

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// Bounds on what clients may attach to one object.
const (
	maxAttributes     = 256
	maxAttributeBytes = 64 << 10 // of all, encoded
)

// attribute is one instance of an attribute that a client set. Value is the
// TTLV encoding of a kmip.Attribute without index: it keeps every type as it
// came, and two values are equal when their bytes are.
type attribute struct {
	Name  kmip.AttributeName
	Index int32
	Value []byte
}

// A rule is what KMIP 1.4 §3 says of one attribute, as far as this server has
// it: from and up to which minor version of KMIP 1 it is seen, and what clients
// may do with it.
type rule struct {
	from, to int
	multi    bool // may have several instances
	given    bool // may be set when the object is created
	add      bool
	modify   bool
	remove   bool
	kept     bool // the server only keeps it; else it has a field of its own in object
}

// The classes of attributes.
func serverSets(from int) rule { return rule{from: from, to: 4} }
func atCreation(from int, kept bool) rule {
	return rule{from: from, to: 4, given: true, kept: kept}
}
func changeable(from int) rule { return rule{from: from, to: 4, given: true, add: true, modify: true} }
func clientSets(multi bool, from int) rule {
	return rule{from: from, to: 4, multi: multi, given: true, add: true, modify: true, remove: true, kept: true}
}

// ruleOf returns the rule of an attribute; false for one that is not supported:
// those of objects that are not kept here, such as certificates.
func ruleOf(name kmip.AttributeName) (rule, bool) {
	switch name {
	case kmip.AttributeNameUniqueIdentifier, kmip.AttributeNameObjectType, kmip.AttributeNameState, kmip.AttributeNameDigest,
		kmip.AttributeNameInitialDate, kmip.AttributeNameDestroyDate, kmip.AttributeNameCompromiseDate,
		kmip.AttributeNameCompromiseOccurrenceDate, kmip.AttributeNameRevocationReason, kmip.AttributeNameLastChangeDate,
		kmip.AttributeNameArchiveDate, kmip.AttributeNameLeaseTime:
		return serverSets(0), true
	case kmip.AttributeNameKeyValuePresent:
		return serverSets(2), true
	case kmip.AttributeNameAlwaysSensitive, kmip.AttributeNameNeverExtractable:
		return serverSets(4), true

	case kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength, kmip.AttributeNameCryptographicUsageMask:
		return atCreation(0, false), true
	case operationPolicyName: // deprecated in 1.3; any is accepted and kept, it rules nothing here
		return atCreation(0, true), true
	case kmip.AttributeNameFresh:
		return atCreation(1, false), true
	case kmip.AttributeNameOriginalCreationDate:
		return atCreation(2, false), true
	case kmip.AttributeNameRandomNumberGenerator:
		return atCreation(3, true), true

	case kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate,
		kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate:
		return changeable(0), true
	case kmip.AttributeNameUsageLimits:
		r := changeable(0)
		r.remove = true
		return r, true
	case kmip.AttributeNameSensitive, kmip.AttributeNameExtractable:
		return changeable(4), true

	case kmip.AttributeNameName, kmip.AttributeNameObjectGroup, kmip.AttributeNameApplicationSpecificInformation,
		kmip.AttributeNameCryptographicParameters, kmip.AttributeNameLink:
		return clientSets(true, 0), true
	case kmip.AttributeNameContactInformation:
		return clientSets(false, 0), true
	case kmip.AttributeNameAlternativeName, kmip.AttributeNameKeyValueLocation:
		return clientSets(true, 2), true
	case kmip.AttributeNameDescription, kmip.AttributeNameComment:
		return clientSets(false, 4), true
	}
	if len(name) > 2 && strings.HasPrefix(string(name), "x-") { // y- would be the server's, and it sets none
		return clientSets(true, 0), true
	}
	return rule{}, false
}

// operationPolicyName is deprecated in kmip-go too, and clients of old versions
// send it.
const operationPolicyName kmip.AttributeName = "Operation Policy Name"

// Visible tells whether a client of KMIP 1.minor knows the attribute.
func Visible(name kmip.AttributeName, minor int) bool {
	r, ok := ruleOf(name)
	return ok && r.from <= minor && minor <= r.to
}

func wrongType(a kmip.Attribute) error {
	return Refuse(kmip.ResultReasonInvalidField, "the value of attribute %q has the wrong type", a.AttributeName)
}

// set gives the object an attribute at its creation or later. The rule has been
// looked at.
func (o *object) set(a kmip.Attribute, now time.Time) error {
	taken := func(is bool) error {
		if is {
			return Refuse(kmip.ResultReasonIllegalOperation, "the object has attribute %q already", a.AttributeName)
		}
		return nil
	}
	switch a.AttributeName {
	case kmip.AttributeNameCryptographicAlgorithm:
		v, ok := a.AttributeValue.(kmip.CryptographicAlgorithm)
		if !ok {
			return wrongType(a)
		}
		err := taken(o.Algorithm != 0)
		o.Algorithm = v
		return err
	case kmip.AttributeNameCryptographicLength:
		v, ok := a.AttributeValue.(int32)
		if !ok {
			return wrongType(a)
		}
		err := taken(o.Length != 0)
		o.Length = v
		return err
	case kmip.AttributeNameCryptographicUsageMask:
		v, ok := a.AttributeValue.(kmip.CryptographicUsageMask)
		if !ok {
			return wrongType(a)
		}
		err := taken(o.Usage != 0)
		o.Usage = int32(v)
		return err
	case kmip.AttributeNameOriginalCreationDate:
		v, err := dateOf(a)
		if err == nil {
			err = taken(!o.Original.IsZero())
		}
		o.Original = v
		return err
	case kmip.AttributeNameFresh:
		v, ok := a.AttributeValue.(bool)
		if !ok {
			return wrongType(a)
		}
		o.flag(flagServed, !v)
		return nil
	case kmip.AttributeNameUsageLimits:
		if err := taken(o.Limits != nil); err != nil {
			return err
		}
		return o.setLimits(a)
	case kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate,
		kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate:
		if err := taken(!o.date(a.AttributeName).IsZero()); err != nil {
			return err
		}
		return o.setDate(a, now)
	case kmip.AttributeNameSensitive, kmip.AttributeNameExtractable:
		return taken(true)
	}
	return o.addKept(a)
}

// change gives another value to an attribute that has a field of its own and a
// value already.
func (o *object) change(a kmip.Attribute, now time.Time) error {
	switch a.AttributeName {
	case kmip.AttributeNameUsageLimits:
		return o.setLimits(a)
	case kmip.AttributeNameSensitive, kmip.AttributeNameExtractable:
		return o.setGuard(a)
	}
	return o.setDate(a, now)
}

// setGuard sets Sensitive or Extractable, and with them what always or never was
// (KMIP 1.4 §3.48 to §3.51).
func (o *object) setGuard(a kmip.Attribute) error {
	v, ok := a.AttributeValue.(bool)
	if !ok {
		return wrongType(a)
	}
	if a.AttributeName == kmip.AttributeNameSensitive {
		o.flag(flagSensitive, v)
		if !v {
			o.flag(flagAlwaysSensitive, false)
		}
		return nil
	}
	o.flag(flagInextractable, !v)
	if v {
		o.flag(flagNeverExtractable, false)
	}
	return nil
}

// setLimits sets Usage Limits, while nothing of them is used (KMIP 1.4 §3.21).
func (o *object) setLimits(a kmip.Attribute) error {
	v, ok := a.AttributeValue.(kmip.UsageLimits)
	if !ok {
		return wrongType(a)
	}
	switch {
	case o.Limits != nil && o.Limits.Count != o.Limits.Total:
		return Refuse(kmip.ResultReasonPermissionDenied, "the Usage Limits are in use and cannot be changed")
	case v.UsageLimitsTotal < 0 || v.UsageLimitsUnit != kmip.UsageLimitsUnitByte && v.UsageLimitsUnit != kmip.UsageLimitsUnitObject:
		return Refuse(kmip.ResultReasonInvalidField, "Usage Limits have a total and the unit Byte or Object")
	case v.UsageLimitsCount != nil && *v.UsageLimitsCount != v.UsageLimitsTotal:
		return Refuse(kmip.ResultReasonInvalidField, "the count of Usage Limits is the server's to set")
	}
	o.Limits = &usageLimits{Total: v.UsageLimitsTotal, Count: v.UsageLimitsTotal, Unit: v.UsageLimitsUnit}
	return nil
}

// date is one of the dates that clients set.
func (o *object) date(name kmip.AttributeName) *time.Time {
	switch name {
	case kmip.AttributeNameActivationDate:
		return &o.Activation
	case kmip.AttributeNameDeactivationDate:
		return &o.Deactivated
	case kmip.AttributeNameProcessStartDate:
		return &o.ProcessFrom
	}
	return &o.ProtectTo
}

// setDate sets or changes a date that moves the object through its life cycle,
// while it is still to come (KMIP 1.4 §3.24 to §3.27).
func (o *object) setDate(a kmip.Attribute, now time.Time) error {
	v, err := dateOf(a)
	if err != nil {
		return err
	}
	activation := a.AttributeName == kmip.AttributeNameActivationDate
	if o.State != kmip.StatePreActive && (activation || o.State != kmip.StateActive) {
		return Refuse(kmip.ResultReasonPermissionDenied, "%q cannot be set on an object that is %s", a.AttributeName, stateName(o.State))
	}
	d := o.date(a.AttributeName)
	if a.AttributeName != kmip.AttributeNameDeactivationDate && o.State == kmip.StateActive && !d.IsZero() && !now.Before(*d) {
		return Refuse(kmip.ResultReasonPermissionDenied, "%q has passed and cannot be changed", a.AttributeName)
	}
	*d = v
	if !o.Deactivated.IsZero() && o.Deactivated.Before(o.Activation) {
		return Refuse(kmip.ResultReasonInvalidField, "the Deactivation Date would be before the Activation Date")
	}
	if !o.ProcessFrom.IsZero() && !o.Activation.IsZero() && o.ProcessFrom.Before(o.Activation) {
		return Refuse(kmip.ResultReasonInvalidField, "the Process Start Date would be before the Activation Date")
	}
	if !o.ProtectTo.IsZero() && !o.Deactivated.IsZero() && o.ProtectTo.After(o.Deactivated) {
		return Refuse(kmip.ResultReasonInvalidField, "the Protect Stop Date would be after the Deactivation Date")
	}
	o.settle(now)
	return nil
}

func dateOf(a kmip.Attribute) (time.Time, error) {
	v, ok := a.AttributeValue.(time.Time)
	if !ok {
		return v, Refuse(kmip.ResultReasonInvalidField, "the value of attribute %q is no date", a.AttributeName)
	}
	v = v.UTC()
	if v.Year() < 1 || v.Year() > 9999 || v.IsZero() {
		return v, Refuse(kmip.ResultReasonInvalidField, "attribute %q has a date outside the years 1 to 9999", a.AttributeName)
	}
	return v, nil
}

// addKept adds an instance of an attribute that the server only keeps. The list
// is copied, for the one it came from is shared.
func (o *object) addKept(a kmip.Attribute) error {
	if err := checkValue(a); err != nil {
		return err
	}
	r, _ := ruleOf(a.AttributeName)
	next, size := int32(0), 0
	value := encodeAttribute(a)
	for _, have := range o.Attributes {
		size += len(have.Value)
		if have.Name != a.AttributeName {
			continue
		}
		if !r.multi {
			return Refuse(kmip.ResultReasonIllegalOperation, "the object has attribute %q already, and it can have one only", a.AttributeName)
		}
		if a.AttributeName == kmip.AttributeNameName && bytes.Equal(have.Value, value) {
			return Refuse(kmip.ResultReasonIllegalOperation, "the object has this name already")
		}
		next = max(next, have.Index+1)
	}
	if a.AttributeIndex != nil && *a.AttributeIndex != next {
		return Refuse(kmip.ResultReasonInvalidField, "the next index of attribute %q is %d, not %d", a.AttributeName, next, *a.AttributeIndex)
	}
	if len(o.Attributes) >= maxAttributes || size+len(value) > maxAttributeBytes {
		return Refuse(kmip.ResultReasonIndexOutofBounds, "an object has at most %d attributes of %d bytes together", maxAttributes, maxAttributeBytes)
	}
	o.Attributes = append(slices.Clip(o.Attributes), attribute{a.AttributeName, next, value})
	return nil
}

// link adds a Link that the server makes.
func (o *object) link(t kmip.LinkType, id string) error {
	return o.addKept(kmip.Attribute{AttributeName: kmip.AttributeNameLink, AttributeValue: kmip.Link{LinkType: t, LinkedObjectIdentifier: id}})
}

// checkValue refuses values that KMIP's structures allow and its rules do not.
func checkValue(a kmip.Attribute) error {
	switch v := a.AttributeValue.(type) {
	case nil:
		return Refuse(kmip.ResultReasonInvalidField, "attribute %q has no value", a.AttributeName)
	case kmip.Name:
		if v.NameValue == "" || v.NameType != kmip.NameTypeUninterpretedTextString && v.NameType != kmip.NameTypeUri {
			return Refuse(kmip.ResultReasonInvalidField, "a Name has a value and a type that KMIP knows")
		}
	case kmip.ApplicationSpecificInformation:
		if v.ApplicationNamespace == "" {
			return Refuse(kmip.ResultReasonInvalidField, "Application Specific Information has a namespace")
		}
		if v.ApplicationData == "" {
			return Refuse(kmip.ResultReasonApplicationNamespaceNotSupported, "this server makes no data for application namespaces")
		}
	case time.Time:
		_, err := dateOf(a)
		return err
	}
	return nil
}

// find returns the position of an instance in o.Attributes, -1 if there is
// none; a nil index means the lowest.
func (o *object) find(name kmip.AttributeName, index *int32) int {
	return slices.IndexFunc(o.Attributes, func(a attribute) bool {
		return a.Name == name && (index == nil || a.Index == *index)
	})
}

func encodeAttribute(a kmip.Attribute) []byte {
	return ttlv.MarshalTTLV(kmip.Attribute{AttributeName: a.AttributeName, AttributeValue: a.AttributeValue})
}

func (a attribute) decode() (kmip.Attribute, error) {
	var k kmip.Attribute
	if err := ttlv.UnmarshalTTLV(a.Value, &k); err != nil {
		return k, fmt.Errorf("attribute %q of a stored object: %w", a.Name, err)
	}
	if a.Index > 0 { // KMIP 1.1 §2.1.1: an index of 0 is left out
		k.AttributeIndex = &a.Index
	}
	return k, nil
}
