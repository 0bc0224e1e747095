package kms

import (
	"context"
	"slices"

	"github.com/ovh/kmip-go"
)

// Attributes returns the object's attributes of the given names, all if there
// are none. A name that the object does not have yields nothing: vCenter asks
// for such and goes on.
func (s *Session) Attributes(ctx context.Context, id string, names ...kmip.AttributeName) ([]kmip.Attribute, error) {
	for i, n := range names {
		if slices.Contains(names[:i], n) {
			return nil, Refuse(kmip.ResultReasonInvalidMessage, "attribute name %q is given more than once", n)
		}
	}
	e, err := s.read(ctx, id)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		all, err := e.Value.list(id)
		if err != nil {
			return nil, damaged(err)
		}
		return all, nil
	}
	var some []kmip.Attribute
	for _, n := range names {
		list, err := e.Value.instances(id, n)
		if err != nil {
			return nil, damaged(err)
		}
		some = append(some, list...)
	}
	return some, nil
}

func damaged(err error) error {
	return &Error{kmip.ResultReasonGeneralFailure, "the stored object is damaged; the server's log says more", err}
}

// AddAttribute adds an instance of an attribute and returns it with its index,
// and with what the server completed.
func (s *Session) AddAttribute(ctx context.Context, id string, a kmip.Attribute) (kmip.Attribute, error) {
	r, ok := ruleOf(a.AttributeName)
	if !ok || !r.add {
		return a, Refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be added", a.AttributeName)
	}
	err := s.change(ctx, id, func(t *tx, o *object) error {
		if err := o.editable(); err != nil {
			return err
		}
		before := len(o.Attributes)
		if err := o.set(a, t.now); err != nil {
			return err
		}
		index := int32(0)
		if len(o.Attributes) > before {
			index = o.Attributes[before].Index
		}
		a = o.shown(id, a, index)
		return nil
	})
	return a, err
}

// shown is an attribute as the object has it now.
func (o *object) shown(id string, a kmip.Attribute, index int32) kmip.Attribute {
	a.AttributeIndex = nil
	if index > 0 {
		a.AttributeIndex = &index
	}
	if r, _ := ruleOf(a.AttributeName); !r.kept {
		a.AttributeValue = o.own(id, a.AttributeName)
	}
	return a
}

// ModifyAttribute changes an existing instance; without an index, the first.
func (s *Session) ModifyAttribute(ctx context.Context, id string, a kmip.Attribute) (kmip.Attribute, error) {
	r, ok := ruleOf(a.AttributeName)
	if !ok || !r.modify {
		return a, Refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be modified", a.AttributeName)
	}
	err := s.change(ctx, id, func(t *tx, o *object) error {
		if err := o.editable(); err != nil {
			return err
		}
		missing := Refuse(kmip.ResultReasonInvalidField, "the object has no attribute %q; add it", a.AttributeName)
		if !r.kept {
			switch {
			case a.AttributeIndex != nil && *a.AttributeIndex != 0:
				return Refuse(kmip.ResultReasonItemNotFound, "attribute %q has no instance %d", a.AttributeName, *a.AttributeIndex)
			case o.own(id, a.AttributeName) == nil:
				return missing
			}
			if err := o.change(a, t.now); err != nil {
				return err
			}
			a = o.shown(id, a, 0)
			return nil
		}
		at := o.find(a.AttributeName, a.AttributeIndex)
		if at < 0 {
			if a.AttributeIndex != nil && o.find(a.AttributeName, nil) >= 0 {
				return Refuse(kmip.ResultReasonItemNotFound, "attribute %q has no instance %d", a.AttributeName, *a.AttributeIndex)
			}
			return missing
		}
		if err := checkValue(a); err != nil {
			return err
		}
		value, size := encodeAttribute(a), 0
		for i, have := range o.Attributes {
			if i != at {
				size += len(have.Value)
			}
			if i != at && a.AttributeName == kmip.AttributeNameName && slices.Equal(have.Value, value) {
				return Refuse(kmip.ResultReasonIllegalOperation, "the object has this name already")
			}
		}
		if size+len(value) > maxAttributeBytes {
			return Refuse(kmip.ResultReasonInvalidField, "an object has at most %d bytes of attributes", maxAttributeBytes)
		}
		o.Attributes = slices.Clone(o.Attributes)
		o.Attributes[at].Value = value
		a = o.shown(id, a, o.Attributes[at].Index)
		return nil
	})
	return a, err
}

// DeleteAttribute removes an instance, without an index the first, and returns
// what it removed.
func (s *Session) DeleteAttribute(ctx context.Context, id string, name kmip.AttributeName, index *int32) (removed kmip.Attribute, err error) {
	r, ok := ruleOf(name)
	if !ok || !r.remove {
		return removed, Refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be deleted", name)
	}
	err = s.change(ctx, id, func(t *tx, o *object) error {
		if err := o.editable(); err != nil {
			return err
		}
		missing := Refuse(kmip.ResultReasonItemNotFound, "the object has no such instance of attribute %q", name)
		if !r.kept { // Usage Limits
			switch {
			case o.Limits == nil || index != nil && *index != 0:
				return missing
			case o.Limits.Count != o.Limits.Total:
				return Refuse(kmip.ResultReasonPermissionDenied, "the Usage Limits are in use and cannot be deleted")
			}
			removed = o.shown(id, kmip.Attribute{AttributeName: name}, 0)
			o.Limits = nil
			return nil
		}
		at := o.find(name, index)
		if at < 0 {
			return missing
		}
		if removed, err = o.Attributes[at].decode(); err != nil {
			return damaged(err)
		}
		o.Attributes = slices.Delete(slices.Clone(o.Attributes), at, at+1)
		return nil
	})
	return removed, err
}

// editable: the attributes of a destroyed object are a record of what it was.
func (o *object) editable() error {
	if o.gone() {
		return Refuse(kmip.ResultReasonPermissionDenied, "the object is destroyed")
	}
	return nil
}

// change is a transaction over one object.
func (s *Session) change(ctx context.Context, id string, f func(t *tx, o *object) error) error {
	return s.transact(ctx, func(t *tx) error {
		return t.edit(id, func(o *object) error { return f(t, o) })
	})
}
