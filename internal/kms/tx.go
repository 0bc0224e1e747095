package kms

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// A tx is all that one operation writes: objects, and the index of their names,
// in one transaction of the store.
type tx struct {
	s     *Session
	ctx   context.Context
	now   time.Time
	ops   []store.Op
	freed map[string]bool   // places in the index of names that are given up
	taken map[string]string // places that are taken, and by which object
	steps []step
}

// usualOps is room for the operations of a transaction, with its conditions and
// its audit entry.
const usualOps = 8

// transact runs f and commits what it put into t, again from the start when
// somebody else was faster. So f may run several times.
func (s *Session) transact(ctx context.Context, f func(t *tx) error) error {
	for {
		t := &tx{s: s, ctx: ctx, now: s.now(), ops: make([]store.Op, 0, usualOps), freed: map[string]bool{}, taken: map[string]string{}}
		if err := f(t); err != nil {
			return AsError(err)
		}
		if len(t.ops) == 0 {
			return nil
		}
		err := s.commit(ctx, t.all()...)
		switch {
		case err == nil:
			for _, d := range t.steps {
				d.revision = s.revision
				s.done = append(s.done, d)
			}
			return nil
		case errors.Is(err, store.ErrExists):
			return &Error{kmip.ResultReasonIllegalOperation, "another object has this name, or this identifier", err}
		case !errors.Is(err, store.ErrConflict):
			return AsError(err)
		}
	}
}

// all completes the operations with those on the index of names. A name that one
// object gives up and another takes is one write: the first object's revision,
// which is compared, says that the name is still its own.
func (t *tx) all() []store.Op {
	names := t.s.inst.names
	for at, id := range t.taken {
		if t.freed[at] {
			t.ops = append(t.ops, names.Put(at, id))
		} else {
			t.ops = append(t.ops, names.Create(at, id))
		}
	}
	for at := range t.freed {
		if _, again := t.taken[at]; !again {
			t.ops = append(t.ops, names.Delete(at, 0))
		}
	}
	return t.ops
}

// edit reads an object and gives f a private copy to change.
func (t *tx) edit(id string, f func(o *object) error) error {
	e, err := t.s.read(t.ctx, id)
	if err != nil {
		return err
	}
	o := *e.Value
	if err := f(&o); err != nil {
		return err
	}
	o.LastChange = t.now
	t.replace(e, &o)
	return nil
}

// replace writes o in the place of the object that was read as e.
func (t *tx) replace(e store.Entry[*object], o *object) {
	before, after := t.places(e.Value), t.places(o)
	for _, at := range before {
		if !slices.Contains(after, at) {
			t.freed[at] = true
		}
	}
	for _, at := range after {
		if !slices.Contains(before, at) {
			t.taken[at] = e.Key
		}
	}
	t.ops = append(t.ops, t.s.inst.objects.Update(e.Key, e.Revision, o))
	t.steps = append(t.steps, step{id: e.Key, before: e.Value})
}

// create writes a new object under an identifier of its own, which tells when it
// was made (RFC 9562, version 7): what is made in a row is beside each other in
// etcd's index, which then takes half as long to grow and to load. key is the
// caller's to wipe, after the transaction; nil for an object without material.
func (t *tx) create(o *object, key *secret.Key) (id string, err error) {
	u, err := uuid.NewV7()
	if err != nil {
		return "", &Error{kmip.ResultReasonCryptographicFailure, "no identifier could be made", err}
	}
	return u.String(), t.createAs(u.String(), o, key)
}

func (t *tx) createAs(id string, o *object, key *secret.Key) error {
	o.holds(key)
	seen := map[string]bool{}
	for _, at := range t.places(o) {
		if seen[at] {
			return Refuse(kmip.ResultReasonInvalidField, "the object would have the same name twice")
		}
		seen[at], t.taken[at] = true, id
	}
	t.ops = append(t.ops, t.s.inst.objects.Create(id, o))
	t.steps = append(t.steps, step{id: id})
	return nil
}

// places are where the index of names has the object. A destroyed object's names
// are free again.
func (t *tx) places(o *object) (list []string) {
	if o.gone() {
		return nil
	}
	for _, a := range o.Attributes {
		if a.Name == kmip.AttributeNameName {
			list = append(list, t.s.inst.nameIndex(a.Value))
		}
	}
	return list
}

// A step is what a session has done to one object, enough to undo it.
type step struct {
	id       string
	before   *object // nil: there was none
	revision int64   // of the write
}

// Undo takes back everything that the session has written, in one transaction
// (KMIP 1.4 §6.14, Batch Error Continuation Option Undo). Until then other
// clients see it: each operation of a batch is committed, and in the audit log,
// when it is done. If another client has changed one of the objects meanwhile,
// nothing is undone, and that is the error.
func (s *Session) Undo(ctx context.Context) error {
	var steps []step // one for each object: how it was before all, and the last write
	for _, d := range s.done {
		if i := slices.IndexFunc(steps, func(x step) bool { return x.id == d.id }); i >= 0 {
			steps[i].revision = d.revision
		} else {
			steps = append(steps, d)
		}
	}
	err := s.transact(ctx, func(t *tx) error {
		for _, d := range steps {
			e, err := s.inst.objects.Get(ctx, d.id)
			if err != nil {
				return err
			}
			if e.Revision != d.revision {
				return Refuse(kmip.ResultReasonGeneralFailure, "the batch cannot be undone: object %s has been changed by another client", d.id)
			}
			if d.before != nil {
				t.replace(e, d.before)
				continue
			}
			for _, at := range t.places(e.Value) {
				t.freed[at] = true
			}
			t.ops = append(t.ops, s.inst.objects.Delete(d.id, e.Revision))
		}
		return nil
	})
	s.done = nil
	return err
}
