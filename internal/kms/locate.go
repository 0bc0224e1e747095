package kms

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// Query is what Locate looks for (KMIP 1.4 §4.9). An object matches when it has
// every one of Attributes; a date that is given twice is a range.
type Query struct {
	Attributes []kmip.Attribute
	Status     kmip.StorageStatusMask // 0: any
	Offset     int32
	Max        int32 // 0: no limit
}

// Locate returns the identifiers of the objects that match, the newest first,
// and how many match in all. Destroyed objects are found only by asking for
// their State.
func (s *Session) Locate(ctx context.Context, q Query) (ids []string, total int, err error) {
	if q.Offset < 0 || q.Max < 0 {
		return nil, 0, Refuse(kmip.ResultReasonInvalidField, "Maximum Items and Offset Items are not negative")
	}
	f, err := newFilter(q.Attributes)
	if err != nil {
		return nil, 0, err
	}
	if q.Status != 0 && q.Status&kmip.StorageStatusOnlineStorage == 0 {
		return nil, 0, nil // nothing is archived here
	}
	candidates, err := s.candidates(ctx, f)
	if err != nil {
		return nil, 0, err
	}
	now := s.now()
	found := candidates[:0]
	for _, e := range candidates {
		id := e.Key
		ok, err := f.match(id, e.Value.settled(now))
		if err != nil {
			return nil, 0, AsError(err)
		}
		if ok {
			found = append(found, e)
		}
	}
	slices.SortFunc(found, func(a, b store.Entry[*object]) int { return cmp.Compare(b.Created, a.Created) })
	total = len(found)
	found = found[min(int(q.Offset), total):]
	if q.Max > 0 {
		found = found[:min(int(q.Max), len(found))]
	}
	for _, e := range found {
		ids = append(ids, e.Key)
	}
	return ids, total, nil
}

// candidates are the objects that may match: the one of a name, when the filter
// has one, else all of the instance.
func (s *Session) candidates(ctx context.Context, f filter) ([]store.Entry[*object], error) {
	if f.name == nil || f.destroyed { // a destroyed object's name is no longer in the index
		list, err := s.inst.objects.List(ctx, "")
		if err != nil && !errors.Is(err, store.ErrDamaged) { // the store has logged each damaged one
			return nil, AsError(err)
		}
		return list, nil
	}
	n, err := s.inst.names.Get(ctx, s.inst.nameIndex(f.name))
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, AsError(err)
	}
	e, err := s.inst.objects.Get(ctx, n.Value)
	if errors.Is(err, store.ErrNotFound) { // destroyed between the two reads
		return nil, nil
	}
	if err != nil {
		return nil, AsError(err)
	}
	return []store.Entry[*object]{e}, nil
}

// filter is a query's attributes, ready to compare.
type filter struct {
	equal     []attribute
	dates     []dateRange
	name      []byte // the encoded Name among equal, nil if none
	destroyed bool   // State asks for destroyed objects
}

type dateRange struct {
	name     kmip.AttributeName
	from, to time.Time
}

func newFilter(attributes []kmip.Attribute) (f filter, err error) {
	for _, a := range attributes {
		if _, ok := ruleOf(a.AttributeName); !ok {
			return f, Refuse(kmip.ResultReasonInvalidField, "attribute %q is not known; nothing can be located by it", a.AttributeName)
		}
		switch v := a.AttributeValue.(type) {
		case nil:
			return f, Refuse(kmip.ResultReasonInvalidField, "attribute %q has no value to look for", a.AttributeName)
		case time.Time:
			i := slices.IndexFunc(f.dates, func(d dateRange) bool { return d.name == a.AttributeName })
			if i < 0 {
				f.dates = append(f.dates, dateRange{a.AttributeName, v, v})
				continue
			}
			d := &f.dates[i]
			if !d.from.Equal(d.to) {
				return f, Refuse(kmip.ResultReasonInvalidField, "attribute %q is given more than twice", a.AttributeName)
			}
			if v.Before(d.from) {
				d.from = v
			} else {
				d.to = v
			}
			continue
		case kmip.State:
			f.destroyed = f.destroyed || v == kmip.StateDestroyed || v == kmip.StateDestroyedCompromised
		}
		value := encodeAttribute(a)
		if a.AttributeName == kmip.AttributeNameName {
			f.name = value
		}
		f.equal = append(f.equal, attribute{Name: a.AttributeName, Value: value})
	}
	return f, nil
}

func (f filter) match(id string, o *object) (bool, error) {
	if o.gone() && !f.destroyed {
		return false, nil
	}
	// What clients set is stored encoded and compared so; the server's own
	// attributes are listed only when the query has one.
	var own []kmip.Attribute
	for _, want := range f.equal {
		if slices.ContainsFunc(o.Attributes, func(a attribute) bool { return a.Name == want.Name && bytes.Equal(a.Value, want.Value) }) {
			continue
		}
		if strings.HasPrefix(string(want.Name), "x-") || want.Name == kmip.AttributeNameName {
			return false, nil
		}
		if own == nil {
			var err error
			if own, err = o.list(id); err != nil {
				return false, err
			}
		}
		if !slices.ContainsFunc(own, func(a kmip.Attribute) bool {
			return a.AttributeName == want.Name && bytes.Equal(encodeAttribute(a), want.Value)
		}) {
			return false, nil
		}
	}
	for _, d := range f.dates {
		if own == nil {
			var err error
			if own, err = o.list(id); err != nil {
				return false, err
			}
		}
		if !slices.ContainsFunc(own, func(a kmip.Attribute) bool {
			t, ok := a.AttributeValue.(time.Time)
			return ok && a.AttributeName == d.name && !t.Before(d.from) && !t.After(d.to)
		}) {
			return false, nil
		}
	}
	return true, nil
}
