package kms

import (
	"context"
	"errors"
	"fmt"

	"mortise/internal/secret"
)

// RootKeys is a root-key provider: it keeps customer root keys by their id and
// wraps with them (S4). Its methods may be called concurrently.
type RootKeys interface {
	// Kind is "file" or "pkcs11"; it is written into instance records.
	Kind() string
	// Create makes a CRK, durable when it returns.
	Create(ctx context.Context) (id string, err error)
	// Import takes a CRK that the customer brings; key stays the caller's.
	Import(ctx context.Context, key *secret.Key) (id string, err error)
	// Seal wraps key with the CRK called id, bound to additional.
	Seal(ctx context.Context, id string, key *secret.Key, additional []byte) ([]byte, error)
	// Open is the reverse of Seal.
	Open(ctx context.Context, id string, wrapped, additional []byte) (*secret.Key, error)
	// Destroy returns when nothing at the provider opens what the CRK wrapped.
	// An id that is not there is destroyed already.
	Destroy(ctx context.Context, id string) error
	// List returns the ids of the CRKs that are there.
	List(ctx context.Context) ([]string, error)
}

// SingleCRK makes a provider of one root key that is there already.
func SingleCRK(root RootKey) RootKeys { return singleCRK{root} }

type singleCRK struct{ root RootKey }

func (s singleCRK) Kind() string                           { return "file" }
func (s singleCRK) Create(context.Context) (string, error) { return s.root.ID(), nil }

func (s singleCRK) Import(context.Context, *secret.Key) (string, error) {
	return "", errors.New("this root key provider holds one key and takes no other")
}

func (s singleCRK) Seal(_ context.Context, id string, key *secret.Key, additional []byte) ([]byte, error) {
	if id != s.root.ID() {
		return nil, fmt.Errorf("there is no CRK %s at this provider", id)
	}
	return s.root.Seal(key, additional)
}

func (s singleCRK) Open(_ context.Context, id string, wrapped, additional []byte) (*secret.Key, error) {
	if id != s.root.ID() {
		return nil, fmt.Errorf("its keys are wrapped by root key %s, and root key %s was given: use the root key that belongs to this state folder", id, s.root.ID())
	}
	return s.root.Open(wrapped, additional)
}

func (s singleCRK) Destroy(context.Context, string) error {
	return errors.New("this root key provider does not destroy its one key")
}

func (s singleCRK) List(context.Context) ([]string, error) { return []string{s.root.ID()}, nil }
