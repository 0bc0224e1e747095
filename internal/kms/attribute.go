package kms

import (
	"bytes"
	"fmt"
	"slices"
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
}

// Attributes fall into few classes; multi instances and versions vary.
func serverSets() (rule, bool) { return rule{to: 4}, true }
func atCreation() (rule, bool) { return rule{to: 4, given: true}, true }
func lifeDate() (rule, bool)   { return rule{to: 4, given: true, add: true, modify: true}, true }
func clientSets(multi bool, from int) (rule, bool) {
	return rule{from: from, to: 4, multi: multi, given: true, add: true, modify: true, remove: true}, true
}

// ruleOf returns the rule of an attribute; false for one that is not supported.
func ruleOf(name kmip.AttributeName) (rule, bool) {
	switch name {
	case kmip.AttributeNameUniqueIdentifier, kmip.AttributeNameObjectType, kmip.AttributeNameState, kmip.AttributeNameDigest,
		kmip.AttributeNameInitialDate, kmip.AttributeNameDestroyDate, kmip.AttributeNameCompromiseDate,
		kmip.AttributeNameCompromiseOccurrenceDate, kmip.AttributeNameRevocationReason, kmip.AttributeNameLastChangeDate:
		return serverSets()
	case kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength, kmip.AttributeNameCryptographicUsageMask:
		return atCreation()
	case "Operation Policy Name": // deprecated in 1.3; accepted and kept, it rules nothing here
		return rule{to: 2, given: true}, true
	case kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate, kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate:
		return lifeDate()
	case kmip.AttributeNameName, kmip.AttributeNameObjectGroup, kmip.AttributeNameApplicationSpecificInformation,
		kmip.AttributeNameCryptographicParameters, kmip.AttributeNameLink:
		return clientSets(true, 0)
	case kmip.AttributeNameContactInformation:
		return clientSets(false, 0)
	case kmip.AttributeNameAlternativeName:
		return clientSets(true, 2)
	case kmip.AttributeNameDescription, kmip.AttributeNameComment:
		return clientSets(false, 4)
	}
	if len(name) > 2 && name[:2] == "x-" {
		return clientSets(true, 0)
	}
	return rule{}, false
}

// Visible tells whether a client of KMIP 1.minor knows the attribute.
func Visible(name kmip.AttributeName, minor int) bool {
	r, ok := ruleOf(name)
	return ok && r.from <= minor && minor <= r.to
}

// set gives the object an attribute at its creation or later. The rule has been
// looked at; index is the client's wish, nil for none.
func (o *object) set(a kmip.Attribute, now time.Time) error {
	wrong := func() error {
		return Refuse(kmip.ResultReasonInvalidField, "the value of attribute %q has the wrong type", a.AttributeName)
	}
	exists := func(is bool) error {
		if is {
			return Refuse(kmip.ResultReasonIllegalOperation, "the object has attribute %q already", a.AttributeName)
		}
		return nil
	}
	switch a.AttributeName {
	case kmip.AttributeNameCryptographicAlgorithm:
		v, ok := a.AttributeValue.(kmip.CryptographicAlgorithm)
		if !ok {
			return wrong()
		}
		err := exists(o.Algorithm != 0)
		o.Algorithm = v
		return err
	case kmip.AttributeNameCryptographicLength:
		v, ok := a.AttributeValue.(int32)
		if !ok {
			return wrong()
		}
		err := exists(o.Length != 0)
		o.Length = v
		return err
	case kmip.AttributeNameCryptographicUsageMask:
		v, ok := a.AttributeValue.(kmip.CryptographicUsageMask)
		if !ok {
			return wrong()
		}
		err := exists(o.Usage != 0)
		o.Usage = int32(v)
		return err
	case kmip.AttributeNameActivationDate:
		if err := exists(!o.Activation.IsZero()); err != nil {
			return err
		}
		return o.setDate(a, now)
	case kmip.AttributeNameDeactivationDate:
		if err := exists(!o.Deactivated.IsZero()); err != nil {
			return err
		}
		return o.setDate(a, now)
	}
	return o.addGeneric(a)
}

// setDate sets or changes a date that moves the object through its life cycle,
// while it is still to come (KMIP 1.4 §3.24, §3.27).
func (o *object) setDate(a kmip.Attribute, now time.Time) error {
	v, err := dateOf(a)
	if err != nil {
		return err
	}
	activation := a.AttributeName == kmip.AttributeNameActivationDate
	if o.State != kmip.StatePreActive && (activation || o.State != kmip.StateActive) {
		return Refuse(kmip.ResultReasonPermissionDenied, "%q cannot be set on an object that is %s", a.AttributeName, stateName(o.State))
	}
	if activation {
		o.Activation = v
	} else {
		o.Deactivated = v
	}
	if !o.Deactivated.IsZero() && o.Deactivated.Before(o.Activation) {
		return Refuse(kmip.ResultReasonInvalidField, "the Deactivation Date would be before the Activation Date")
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

// addGeneric adds an instance of an attribute that the server only keeps. The
// list is copied, for the one it came from is shared.
func (o *object) addGeneric(a kmip.Attribute) error {
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

// list returns all attributes of the object, the server's first.
func (o *object) list(id string) ([]kmip.Attribute, error) {
	var all []kmip.Attribute
	put := func(name kmip.AttributeName, v any) {
		all = append(all, kmip.Attribute{AttributeName: name, AttributeValue: v})
	}
	date := func(name kmip.AttributeName, t time.Time) {
		if !t.IsZero() {
			put(name, t)
		}
	}
	put(kmip.AttributeNameUniqueIdentifier, id)
	put(kmip.AttributeNameObjectType, o.Type)
	if o.Algorithm != 0 {
		put(kmip.AttributeNameCryptographicAlgorithm, o.Algorithm)
	}
	if o.Length != 0 {
		put(kmip.AttributeNameCryptographicLength, o.Length)
	}
	if o.Usage != 0 || o.Type == kmip.ObjectTypeSymmetricKey {
		put(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageMask(o.Usage))
	}
	if o.Type != kmip.ObjectTypeOpaqueObject {
		put(kmip.AttributeNameState, o.State)
	}
	if len(o.Digest) > 0 {
		put(kmip.AttributeNameDigest, kmip.Digest{HashingAlgorithm: kmip.HashingAlgorithmSHA_256, DigestValue: o.Digest, KeyFormatType: kmip.KeyFormatTypeRaw})
	}
	date(kmip.AttributeNameInitialDate, o.Initial)
	date(kmip.AttributeNameActivationDate, o.Activation)
	date(kmip.AttributeNameDeactivationDate, o.Deactivated)
	date(kmip.AttributeNameDestroyDate, o.Destroyed)
	date(kmip.AttributeNameCompromiseDate, o.Compromised)
	date(kmip.AttributeNameCompromiseOccurrenceDate, o.Occurred)
	if o.Reason != nil {
		put(kmip.AttributeNameRevocationReason, kmip.RevocationReason{RevocationReasonCode: o.Reason.Code, RevocationMessage: o.Reason.Message})
	}
	date(kmip.AttributeNameLastChangeDate, o.LastChange)
	for _, a := range o.Attributes {
		k, err := a.decode()
		if err != nil {
			return nil, err
		}
		all = append(all, k)
	}
	return all, nil
}
