package kms

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// Arrivals is how an administrator brings objects of another KMIP server into an
// instance: under the identifiers, and in the states, that they had there (S10).
// Its methods may be called concurrently.
type Arrivals struct {
	k    *KMS
	inst *instance
	by   Actor
}

// Arrivals begins to bring objects into an instance.
func (k *KMS) Arrivals(ctx context.Context, by Actor, instanceID string) (*Arrivals, error) {
	inst, err := k.instance(ctx, instanceID)
	if err != nil {
		return nil, err
	}
	if err := k.admitted(); err != nil {
		return nil, err
	}
	by.Instance = inst.id
	return &Arrivals{k, inst, by}, nil
}

// Sum is the SHA-256 of the material of the object called id, and its state;
// found is false if there is no such object. It does not count as fetching the
// key. A destroyed object has no material: the sum is of nothing.
func (a *Arrivals) Sum(ctx context.Context, id string) (sum [sha256.Size]byte, state kmip.State, found bool, err error) {
	e, err := a.inst.objects.Get(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return sum, 0, false, nil
	}
	if err != nil {
		return sum, 0, false, fmt.Errorf("kms: looking for object %.100q: %w", id, err)
	}
	o := e.Value.settled(a.k.now())
	if o.gone() || o.material == 0 {
		return sha256.Sum256(nil), o.State, true, nil
	}
	key, err := o.open()
	if err != nil {
		return sum, 0, true, fmt.Errorf("kms: %w", err)
	}
	defer key.Wipe()
	key.Use(func(b []byte) { sum = sha256.Sum256(b) })
	return sum, o.State, true, nil
}

// Keep writes an object that is not here, as [Session.Import] does, with the
// same audit entry. It takes over m.Bytes.
func (a *Arrivals) Keep(ctx context.Context, id string, m Material, attributes []kmip.Attribute) error {
	s := &Session{k: a.k, inst: a.inst, Actor: a.by}
	err := s.Begin(kmip.OperationImport)
	if err == nil {
		err = s.Import(ctx, id, false, m, attributes)
	} else {
		m.Bytes.Wipe()
	}
	err = s.End(kmip.OperationImport, id, err)
	if lost := s.Settle(ctx); lost != nil {
		return lost
	}
	return err
}
