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
		if e, ok := inst.clients.Peek(hex.EncodeToString(sum[:])); ok && e.Value.valid(k.now()) == nil && k.admitted() == nil {
			return nil
		}
	}
	_, err := k.Session(ctx, instanceID, cert, "")
	return err
}

// Presume is [KMS.Session] for who may not need to ask: it takes for true what
// this member knows of the client. [Session.Confirm] asks; a session that only
// makes new objects can do without.
func (k *KMS) Presume(ctx context.Context, instanceID string, cert *x509.Certificate, from string) (*Session, error) {
	inst := k.here(instanceID)
	r, ok := k.records.Peek(instanceID)
	if inst == nil || !ok || !r.Value.Ungranted.IsZero() || k.crkEnded(r.Value.CRK) || inst.created != r.Created {
		return k.Session(ctx, instanceID, cert, from)
	}
	sum := sha256.Sum256(cert.Raw)
	e, ok := inst.clients.Peek(hex.EncodeToString(sum[:]))
	if !ok || e.Value.valid(k.now()) != nil || k.admitted() != nil {
		return k.Session(ctx, instanceID, cert, from)
	}
	s := inst.session(k, e, from)
	s.quota = r.Value.Settings.Quota
	s.presumed = presumed{record: r.Revision, revision: e.Revision, cert: cert}
	return s, nil
}

// presumed is what a session took for true of its client and its instance; zero
// after it has asked.
type presumed struct {
	record   int64 // revision of the instance's record
	revision int64 // of the client's record
	cert     *x509.Certificate
}

// Confirm makes what follows linearizable: what was presumed is asked for. The
// errors are those of [KMS.Session]. Reading an object confirms too.
func (s *Session) Confirm(ctx context.Context) error { return s.confirm(ctx, s) }

func (p *presumed) confirm(ctx context.Context, s *Session) error {
	if p.cert == nil {
		return nil
	}
	now, err := s.k.sessionOf(ctx, s.Instance, p.cert, s.Fingerprint, s.From)
	if err != nil {
		return err
	}
	*p, s.synced, s.Actor, s.quota = presumed{}, true, now.Actor, now.quota
	if s.op != 0 {
		return s.allow(s.op) // its role may be another
	}
	return nil
}

// guard adds what is presumed to a transaction.
func (p *presumed) guard(s *Session, ops []store.Op) []store.Op {
	if p.cert == nil {
		return ops
	}
	return append(ops, s.inst.clients.Unchanged(s.Fingerprint, p.revision), s.k.records.Unchanged(s.inst.id, p.record))
}

// unguard looks at why a transaction failed: if the client is
// no longer what it was, that is the error, or the whole is to be tried again.
func (p *presumed) unguard(ctx context.Context, s *Session, failed error) error {
	if p.cert == nil || !errors.Is(failed, store.ErrConflict) && !errors.Is(failed, store.ErrNotFound) {
		return failed
	}
	if err := p.confirm(ctx, s); err != nil {
		return err
	}
	return store.ErrConflict
}
