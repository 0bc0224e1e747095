package kms

import (
	"errors"
	"fmt"
)

var (
	// ErrLocked: the KMS has not been given its root keys yet.
	ErrLocked = errors.New("the key server is locked; unlock it with: mortise kms unlock")
	// ErrUnknownInstance: there is no instance of that id.
	ErrUnknownInstance = errors.New("no such instance")
	// ErrInstanceExists: there is an instance of that id already.
	ErrInstanceExists = errors.New("instance exists already")
)

func (k *KMS) instance(id string) (*instance, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if e, ok := k.records.Peek(id); ok && k.crkEnded(e.Value.CRK) {
		return nil, fmt.Errorf("kms: instance %s: %w", id, ErrCRKDeleted)
	}
	if i := k.instances[id]; i != nil {
		return i, nil
	}
	if len(k.roots) == 0 {
		return nil, fmt.Errorf("kms: %w", ErrLocked)
	}
	return nil, fmt.Errorf("kms: %w: %q", ErrUnknownInstance, id)
}
