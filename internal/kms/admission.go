package kms

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"

	"mortise/internal/store"
)

// Asking etcd what is newest takes a round through raft, which under load waits
// for the writes on their way. Two kinds of request need not ask, and are still
// refused as soon as a certificate is removed (S3): a handshake, for each message
// is looked at again; and a message that only makes new objects, for its
// transaction fails if the certificate's record is not what it was.

// Admit tells whether the holder of cert may connect to an instance, as far as
// this member knows; who is unknown here is looked for again, linearizably. It is
// not enough to serve a message. The errors are those of [KMS.Session].
func (k *KMS) Admit(ctx context.Context, instanceID string, cert *x509.Certificate) error {
	if inst := k.here(instanceID); inst != nil {
		sum := sha256.Sum256(cert.Raw)
		if e, ok := inst.clients.Peek(hex.EncodeToString(sum[:])); ok && e.Value.valid(k.now()) == nil {
			return nil
		}
	}
	_, err := k.Session(ctx, instanceID, cert, "")
	return err
}

// assumed is what a session took for true of its client; zero after it has asked.
type assumed struct {
	revision int64 // of the client's record
	cert     *x509.Certificate
}

// certain makes what follows linearizable: it replaces the assumption by asking.
func (a *assumed) certain(ctx context.Context, s *Session) error {
	if a.cert == nil {
		return nil
	}
	now, err := s.k.Session(ctx, s.Instance, a.cert, s.From)
	if err != nil {
		return err
	}
	*a, s.synced, s.Actor = assumed{}, true, now.Actor
	return nil
}

// guard adds the assumption to a transaction.
func (a *assumed) guard(s *Session, ops []store.Op) []store.Op {
	if a.cert == nil {
		return ops
	}
	return append(ops, s.inst.clients.Unchanged(s.Fingerprint, a.revision))
}

// unguard looks at why a transaction with an assumption failed: if the client is
// no longer what it was, that is the error, or the whole is to be tried again.
func (a *assumed) unguard(ctx context.Context, s *Session, failed error) error {
	if a.cert == nil || !errors.Is(failed, store.ErrConflict) && !errors.Is(failed, store.ErrNotFound) {
		return failed
	}
	if err := a.certain(ctx, s); err != nil {
		return err
	}
	return store.ErrConflict
}
