package kms

import (
	"bytes"
	"context"
	"errors"
	"iter"
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
	Member     kmip.ObjectGroupMember // of the Object Group among Attributes; 0: all
	Offset     int32
	Max        int32 // 0: no limit
}

// countTo is how many candidates are looked at for the sake of their number
// alone, when the client has all the identifiers that it asked for.
const countTo = 10_000

// Locate returns the identifiers of the objects that match, the newest first,
// and how many match in all; -1 when that would be long to count (KMIP 1.4 §4.9
// lets the server leave it out). Destroyed objects are found only by asking for
// their State.
func (s *Session) Locate(ctx context.Context, q Query) (ids []string, total int, err error) {
	if q.Offset < 0 || q.Max < 0 {
		return nil, 0, Refuse(kmip.ResultReasonInvalidField, "Maximum Items and Offset Items are not negative")
	}
	f, err := newFilter(q.Attributes)
	if err != nil {
		return nil, 0, err
	}
	f.status, f.fresh = q.Status, q.Member == kmip.ObjectGroupMemberFresh
	if q.Member != 0 {
		if f.group == "" || q.Member > kmip.ObjectGroupMemberDefault {
			return nil, 0, Refuse(kmip.ResultReasonInvalidField, "Object Group Member is Fresh or Default and goes with an Object Group")
		}
		all := q
		all.Member, all.Offset, all.Max = 0, 0, 0
		if ids, total, err = s.locate(ctx, all, f); err != nil {
			return nil, 0, err
		}
		return s.members(ids, q, f), total, nil
	}
	return s.locate(ctx, q, f)
}

func (s *Session) locate(ctx context.Context, q Query, f filter) (ids []string, total int, err error) {
	found, err := s.inst.objects.Find(ctx, f.terms...)
	if err != nil {
		return nil, 0, AsError(err)
	}
	candidates, many := found.Newest(), found.Len() > countTo
	if f.id != "" {
		candidates, many = s.only(f.id), false
	}
	now, looked := s.now(), 0
	for e, err := range candidates {
		if err != nil { // damaged; the store has logged it
			continue
		}
		if e.Value.settled(now).State != e.Value.State { // its date has come: all members must hear of it
			if e, err = s.k.settle(ctx, s.inst, e); errors.Is(err, store.ErrNotFound) {
				continue
			} else if err != nil {
				return nil, 0, AsError(err)
			}
		}
		ok, err := f.match(e.Key, e.Value)
		switch {
		case err != nil:
			return nil, 0, AsError(err)
		case ok && total >= int(q.Offset) && (q.Max == 0 || len(ids) < int(q.Max)):
			ids = append(ids, e.Key)
		}
		if ok {
			total++
		}
		if looked++; looked%1024 == 0 && ctx.Err() != nil {
			return nil, 0, AsError(errors.Join(store.ErrUnavailable, ctx.Err()))
		}
		if q.Max > 0 && len(ids) == int(q.Max) && many {
			return ids, -1, nil
		}
	}
	return ids, total, nil
}

// only is the object of an identifier, if there is one; the session has synced.
func (s *Session) only(id string) iter.Seq2[store.Entry[*object], error] {
	return func(yield func(store.Entry[*object], error) bool) {
		if e, ok := s.inst.objects.Peek(id); ok {
			yield(e, nil)
		}
	}
}

// Kinds of terms in the index of objects.
const (
	termAttribute = "attribute" // what clients set, as it is encoded
	termState     = "state"
	termType      = "type"
	termAlgorithm = "algorithm"
	termDue       = "due" // for the sweeper
)

// indexObject gives the terms under which an object is found. The usual type and
// algorithm have none: nearly every object would be there.
func indexObject(o *object, add func(kind string, value []byte)) {
	for _, a := range o.Attributes {
		add(termAttribute, a.Value)
	}
	for _, s := range o.states() {
		add(termState, []byte{byte(s)})
	}
	if o.Type != kmip.ObjectTypeSymmetricKey {
		add(termType, []byte{byte(o.Type)})
	}
	if o.Algorithm != kmip.CryptographicAlgorithmAES {
		add(termAlgorithm, []byte{byte(o.Algorithm)})
	}
	if o.due() {
		add(termDue, nil)
	}
}

// states are the one that is stored and those that dates will bring about
// without a write.
func (o *object) states() []kmip.State {
	all := []kmip.State{o.State}
	if o.State == kmip.StatePreActive && !o.Activation.IsZero() {
		all = append(all, kmip.StateActive)
	}
	if all[len(all)-1] == kmip.StateActive && !o.Deactivated.IsZero() {
		all = append(all, kmip.StateDeactivated)
	}
	return all
}

// due tells whether time alone will make the sweeper change the object.
func (o *object) due() bool { return len(o.states()) > 1 || o.gone() && o.material > 0 }

// filter is a query's attributes, ready to compare.
type filter struct {
	equal     []attribute
	dates     []dateRange
	terms     []store.IndexTerm
	id        string // the Unique Identifier among equal, "" if none
	status    kmip.StorageStatusMask
	destroyed bool   // State asks for destroyed objects
	fresh     bool   // only what no client has got
	group     string // the encoded Object Group among equal, "" if none
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
		case string:
			if a.AttributeName == kmip.AttributeNameUniqueIdentifier {
				f.id = v
			}
		case kmip.State:
			f.destroyed = f.destroyed || v == kmip.StateDestroyed || v == kmip.StateDestroyedCompromised
		}
		value := encodeAttribute(a)
		if a.AttributeName == kmip.AttributeNameObjectGroup {
			f.group = string(value)
		}
		f.equal = append(f.equal, attribute{Name: a.AttributeName, Value: value})
		f.terms = append(f.terms, termsFor(a, value)...)
	}
	return f, nil
}

// termsFor are the terms of what has the attribute: one, or none when the index
// does not have it.
func termsFor(a kmip.Attribute, encoded []byte) []store.IndexTerm {
	one := func(kind string, value byte) []store.IndexTerm {
		return []store.IndexTerm{{Kind: kind, Value: []byte{value}}}
	}
	switch v := a.AttributeValue.(type) {
	case kmip.State:
		return one(termState, byte(v))
	case kmip.ObjectType:
		if v != kmip.ObjectTypeSymmetricKey {
			return one(termType, byte(v))
		}
		return nil
	case kmip.CryptographicAlgorithm:
		if v != kmip.CryptographicAlgorithmAES {
			return one(termAlgorithm, byte(v))
		}
		return nil
	}
	if kept(a.AttributeName) {
		return []store.IndexTerm{{Kind: termAttribute, Value: encoded}}
	}
	return nil
}

// kept tells that an attribute is in [object.Attributes] wherever an object has
// it, and is looked for whole.
func kept(name kmip.AttributeName) bool {
	switch name {
	case kmip.AttributeNameName, kmip.AttributeNameObjectGroup, kmip.AttributeNameLink, kmip.AttributeNameApplicationSpecificInformation,
		kmip.AttributeNameContactInformation, kmip.AttributeNameAlternativeName:
		return true
	}
	return strings.HasPrefix(string(name), "x-")
}

func (f filter) match(id string, o *object) (bool, error) {
	if o.gone() && !f.destroyed {
		return false, nil
	}
	if f.fresh && o.is(flagServed) {
		return false, nil
	}
	if online := o.Archived.IsZero(); f.status != 0 &&
		!(online && f.status&kmip.StorageStatusOnlineStorage != 0) && !(!online && f.status&kmip.StorageStatusArchivalStorage != 0) {
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
		}) && !(want.Name == kmip.AttributeNameKeyValuePresent && !o.is(flagKeyless) && bytes.Equal(want.Value, valuePresent())) {
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

// valuePresent is what most objects have and none lists.
func valuePresent() []byte {
	return encodeAttribute(kmip.Attribute{AttributeName: kmip.AttributeNameKeyValuePresent, AttributeValue: true})
}
