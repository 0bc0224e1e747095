package migrate

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
	"mortise/internal/kms"
)

func typeOf(attributes []kmip.Attribute) kmip.ObjectType {
	for _, a := range attributes {
		if t, ok := a.AttributeValue.(kmip.ObjectType); ok {
			return t
		}
	}
	return 0
}

func stateOf(attributes []kmip.Attribute) kmip.State {
	for _, a := range attributes {
		if s, ok := a.AttributeValue.(kmip.State); ok {
			return s
		}
	}
	return 0
}

// cannot says why an object does not come, going by its attributes; "" if it
// does.
func cannot(attributes []kmip.Attribute) string {
	switch t := typeOf(attributes); t {
	case kmip.ObjectTypeSymmetricKey, kmip.ObjectTypeSecretData, kmip.ObjectTypeOpaqueObject:
	case 0:
		return "the source does not say what it is"
	default:
		return fmt.Sprintf("a %s is not kept here", words(ttlv.EnumStr(t)))
	}
	switch stateOf(attributes) {
	case kmip.StateDestroyed, kmip.StateDestroyedCompromised:
		return "it is destroyed: it has no bytes"
	}
	for _, a := range attributes {
		v, ok := a.AttributeValue.(bool)
		switch {
		case !ok:
		case a.AttributeName == kmip.AttributeNameExtractable && !v:
			return "it may not leave its server (not extractable)"
		case a.AttributeName == kmip.AttributeNameSensitive && v:
			return "it leaves its server only wrapped (sensitive)"
		case a.AttributeName == kmip.AttributeNameKeyValuePresent && !v:
			return "its bytes are not at the source"
		}
	}
	return ""
}

// stays says why a Get means that an object does not come.
func stays(err error) string {
	var r *kmipc.ResultError
	if !errors.As(err, &r) {
		return ""
	}
	switch r.Reason {
	case kmip.ResultReasonSensitive, kmip.ResultReasonNotExtractable, kmip.ResultReasonPermissionDenied:
		return "the source does not give it away: " + r.Error()
	case kmip.ResultReasonObjectArchived:
		return "it is archived at the source; recover it there first"
	case kmip.ResultReasonItemNotFound:
		return "it is gone from the source"
	}
	return ""
}

// kept are the attributes that can come, without repeated names; dropped are
// the names of the others.
func kept(attributes []kmip.Attribute) (list []kmip.Attribute, dropped []string) {
	var names []kmip.Name
	for _, a := range attributes {
		a.AttributeIndex = nil // they are numbered anew, in their order
		n, isName := a.AttributeValue.(kmip.Name)
		t, isTime := a.AttributeValue.(time.Time)
		switch {
		case isName && slices.Contains(names, n), isTime && t.Unix() <= 0:
			continue
		case !kms.Visible(a.AttributeName, 4) && !kms.Visible(a.AttributeName, 2):
			if !slices.Contains(dropped, string(a.AttributeName)) {
				dropped = append(dropped, string(a.AttributeName))
			}
			continue
		case isName:
			names = append(names, n)
		}
		list = append(list, a)
	}
	return list, dropped
}

// nameAtSource is the custom attribute that keeps a name which is taken here.
const nameAtSource = "x-Name-At-Source"

// renamed turns names into custom attributes.
func renamed(attributes []kmip.Attribute) (list []kmip.Attribute, why string) {
	for _, a := range attributes {
		if n, ok := a.AttributeValue.(kmip.Name); ok {
			a = kmip.Attribute{AttributeName: nameAtSource, AttributeValue: n.NameValue}
			why = "its name is another object's here; the attribute " + nameAtSource + " has it"
		}
		list = append(list, a)
	}
	return list, why
}

// essential leaves what makes a key what it is.
func essential(attributes []kmip.Attribute) (list []kmip.Attribute, why string) {
	attributes, _ = renamed(attributes)
	for _, a := range attributes {
		switch a.AttributeName {
		case kmip.AttributeNameState, kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength, kmip.AttributeNameCryptographicUsageMask,
			kmip.AttributeNameInitialDate, kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate,
			kmip.AttributeNameCompromiseDate, kmip.AttributeNameCompromiseOccurrenceDate, kmip.AttributeNameRevocationReason, nameAtSource:
			list = append(list, a)
		default:
			if !a.AttributeName.IsCustom() {
				why = "only its essential attributes are taken here"
				continue
			}
			list = append(list, a)
		}
	}
	return list, why
}
