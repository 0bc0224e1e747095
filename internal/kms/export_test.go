package kms

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// What the tests of several members, which are outside of the package, need of it.

// WithPatience says how long a change of keys waits for members that are away.
func (o Options) WithPatience(d time.Duration) Options {
	o.patience = d
	return o
}

// Past is what somebody may have kept of an object and of its instance's keys.
type Past struct {
	CRK     string
	Sealed  []byte // the object's record
	id      string
	wrapped wrappedKey
}

// Past copies what there is of an object now.
func (k *KMS) Past(ctx context.Context, id string) (p Past, err error) {
	e, err := k.records.Get(ctx, DefaultInstance)
	if err != nil {
		return p, err
	}
	p = Past{CRK: e.Value.CRK, id: id}
	err = k.store.Scan(ctx, "object-"+DefaultInstance, func(r store.Record) error {
		if r.Key == id {
			p.Sealed = bytes.Clone(r.Stored)
		}
		return nil
	})
	g, ok := generationOf(p.Sealed)
	for _, w := range e.Value.Keys {
		if w.Generation == g {
			p.wrapped = w
		}
	}
	if err == nil && (!ok || p.wrapped.Wrapped == nil) {
		err = fmt.Errorf("object %s or its generation is not there", id)
	}
	return p, err
}

// Opens tells whether a provider's root keys still open it, to a record with that
// material in it.
func (p Past) Opens(ctx context.Context, root RootKeys, material []byte) bool {
	key, err := root.Open(ctx, p.CRK, p.wrapped.Wrapped, keyBinding(DefaultInstance, p.wrapped.Generation))
	if err != nil {
		return false
	}
	defer key.Wipe()
	s, err := newSeal(p.wrapped.Generation, key)
	if err != nil {
		return false
	}
	plain, err := s.Open(p.Sealed, []byte("/object-"+DefaultInstance+"/"+p.id))
	return err == nil && bytes.Contains(plain, material)
}

// Material opens an object in whatever state it is.
func (k *KMS) Material(ctx context.Context, id string) (*secret.Key, error) {
	i, err := k.instance(ctx, DefaultInstance)
	if err != nil {
		return nil, err
	}
	e, err := i.objects.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return e.Value.open()
}
