package kms

import (
	"time"

	"github.com/ovh/kmip-go"
)

// leaseTime is the lease that every object has: how long a client may use a key
// that it has got before it asks again (KMIP 1.4 §3.20).
const leaseTime = time.Hour

// ownNames are the attributes that have fields of their own in object, in the
// order in which they are listed.
func ownNames() []kmip.AttributeName {
	return []kmip.AttributeName{
		kmip.AttributeNameUniqueIdentifier, kmip.AttributeNameObjectType,
		kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength, kmip.AttributeNameCryptographicUsageMask,
		kmip.AttributeNameState, kmip.AttributeNameDigest, kmip.AttributeNameLeaseTime, kmip.AttributeNameUsageLimits,
		kmip.AttributeNameInitialDate, kmip.AttributeNameActivationDate, kmip.AttributeNameProcessStartDate, kmip.AttributeNameProtectStopDate,
		kmip.AttributeNameDeactivationDate, kmip.AttributeNameDestroyDate, kmip.AttributeNameCompromiseOccurrenceDate, kmip.AttributeNameCompromiseDate,
		kmip.AttributeNameArchiveDate, kmip.AttributeNameOriginalCreationDate, kmip.AttributeNameRevocationReason, kmip.AttributeNameLastChangeDate,
		kmip.AttributeNameFresh, kmip.AttributeNameKeyValuePresent, kmip.AttributeNameRandomNumberGenerator, operationPolicyName,
		kmip.AttributeNameSensitive, kmip.AttributeNameAlwaysSensitive, kmip.AttributeNameExtractable, kmip.AttributeNameNeverExtractable,
	}
}

// own returns the value of an attribute that has fields of its own, nil if the
// object does not have it.
func (o *object) own(id string, name kmip.AttributeName) any {
	cryptographic := o.Type != kmip.ObjectTypeOpaqueObject
	when := func(is bool, v any) any {
		if is {
			return v
		}
		return nil
	}
	date := func(t time.Time) any { return when(!t.IsZero(), t) }
	switch name {
	case kmip.AttributeNameUniqueIdentifier:
		return id
	case kmip.AttributeNameObjectType:
		return o.Type
	case kmip.AttributeNameCryptographicAlgorithm:
		return when(o.Algorithm != 0, o.Algorithm)
	case kmip.AttributeNameCryptographicLength:
		return when(o.Length != 0, o.Length)
	case kmip.AttributeNameCryptographicUsageMask:
		return when(o.Usage != 0 || o.Type == kmip.ObjectTypeSymmetricKey, kmip.CryptographicUsageMask(o.Usage))
	case kmip.AttributeNameState:
		return when(cryptographic, o.State)
	case kmip.AttributeNameDigest:
		if len(o.Digest) == 0 {
			return nil
		}
		return kmip.Digest{HashingAlgorithm: kmip.HashingAlgorithmSHA_256, DigestValue: o.Digest, KeyFormatType: o.format()}
	case kmip.AttributeNameLeaseTime:
		return leaseTime
	case kmip.AttributeNameUsageLimits:
		if o.Limits == nil {
			return nil
		}
		count := o.Limits.Count
		return kmip.UsageLimits{UsageLimitsTotal: o.Limits.Total, UsageLimitsCount: &count, UsageLimitsUnit: o.Limits.Unit}
	case kmip.AttributeNameInitialDate:
		return date(o.Initial)
	case kmip.AttributeNameActivationDate:
		return date(o.Activation)
	case kmip.AttributeNameProcessStartDate:
		return date(o.ProcessFrom)
	case kmip.AttributeNameProtectStopDate:
		return date(o.ProtectTo)
	case kmip.AttributeNameDeactivationDate:
		return date(o.Deactivated)
	case kmip.AttributeNameDestroyDate:
		return date(o.Destroyed)
	case kmip.AttributeNameCompromiseOccurrenceDate:
		return date(o.Occurred)
	case kmip.AttributeNameCompromiseDate:
		return date(o.Compromised)
	case kmip.AttributeNameArchiveDate:
		return date(o.Archived)
	case kmip.AttributeNameOriginalCreationDate:
		if o.Original.IsZero() && o.is(flagGenerated) {
			return o.Initial
		}
		return date(o.Original)
	case kmip.AttributeNameRevocationReason:
		if o.Reason == nil {
			return nil
		}
		return kmip.RevocationReason{RevocationReasonCode: o.Reason.Code, RevocationMessage: o.Reason.Message}
	case kmip.AttributeNameLastChangeDate:
		return date(o.LastChange)
	case kmip.AttributeNameFresh:
		return !o.is(flagServed)
	case kmip.AttributeNameKeyValuePresent: // told when there is something to tell, as OASIS case TC-MDO-2-12 has it
		return when(o.is(flagKeyless), false)
	case kmip.AttributeNameRandomNumberGenerator: // Linux's, random(4); of others the client's word is kept
		return when(o.is(flagGenerated), kmip.RNGParameters{
			RNGAlgorithm: kmip.RNGAlgorithmUnspecified, CryptographicAlgorithm: kmip.CryptographicAlgorithmChaCha20, CryptographicLength: 256,
		})
	case operationPolicyName:
		return when(o.find(operationPolicyName, nil) < 0, "default")
	case kmip.AttributeNameSensitive:
		return when(cryptographic, o.is(flagSensitive))
	case kmip.AttributeNameAlwaysSensitive:
		return when(cryptographic, o.is(flagAlwaysSensitive))
	case kmip.AttributeNameExtractable:
		return when(cryptographic, !o.is(flagInextractable))
	case kmip.AttributeNameNeverExtractable:
		return when(cryptographic, o.is(flagNeverExtractable))
	}
	return nil
}

// instances returns the attribute's instances that the object has.
func (o *object) instances(id string, name kmip.AttributeName) (list []kmip.Attribute, err error) {
	if v := o.own(id, name); v != nil {
		list = append(list, kmip.Attribute{AttributeName: name, AttributeValue: v})
	}
	for _, a := range o.Attributes {
		if a.Name == name {
			k, err := a.decode()
			if err != nil {
				return nil, err
			}
			list = append(list, k)
		}
	}
	return list, nil
}

// list returns all attributes of the object, the server's first.
func (o *object) list(id string) (all []kmip.Attribute, err error) {
	for _, name := range ownNames() {
		if v := o.own(id, name); v != nil {
			all = append(all, kmip.Attribute{AttributeName: name, AttributeValue: v})
		}
	}
	for _, a := range o.Attributes {
		k, err := a.decode()
		if err != nil {
			return nil, err
		}
		all = append(all, k)
	}
	return all, nil
}

// format is the Key Format Type in which the object was registered.
func (o *object) format() kmip.KeyFormatType {
	if o.Format == 0 {
		return kmip.KeyFormatTypeRaw
	}
	return o.Format
}

func (o *object) is(f objectFlags) bool { return o.Flags&f != 0 }

func (o *object) flag(f objectFlags, on bool) {
	if on {
		o.Flags |= f
	} else {
		o.Flags &^= f
	}
}
