package kms

import (
	"context"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// Begin is called before each operation of a session, End after it, with the
// object that it was about and how it ended. What End returns is the client's
// answer.
func (s *Session) Begin(op kmip.Operation) error { return s.allow(op) }

// End ends what Begin began.
func (s *Session) End(ctx context.Context, op kmip.Operation, id string, err error) error {
	return s.inService(err)
}

// commit is how a session writes: in one transaction with all that belongs to
// the change.
func (s *Session) commit(ctx context.Context, ops ...store.Op) error {
	s.synced = false
	_, err := s.k.commitSealed(ctx, s.inst, ops...)
	return err
}

// commitAs is how an administrator's act is written: in one transaction with
// all that belongs to it. inst is nil for what concerns the whole server;
// subject is what the act is about, such as a fingerprint.
func (k *KMS) commitAs(ctx context.Context, by Actor, inst *instance, act, subject string, ops ...store.Op) error {
	if inst == nil {
		_, err := k.store.Commit(ctx, ops...)
		return err
	}
	_, err := k.commitSealed(ctx, inst, ops...)
	return err
}
