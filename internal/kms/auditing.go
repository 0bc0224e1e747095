package kms

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms/audit"
	"mortise/internal/store"
)

// What is audited (S7): every operation of every session and every act of an
// administrator, reads and refusals included. An entry says who, what, which
// object and how it ended; never a key byte or an attribute's value.
//
// The entry of a change is in the change's own transaction (auditlog.go brings
// it from there into the member's log), so that there is neither a change without
// an entry nor an entry without its change. Everything else is in the log, on the
// disk, before its answer leaves.

// ErrAudit: what is done now could not be audited, so nothing is done.
var ErrAudit = errors.New("the audit log cannot be written")

// trail is what a session remembers for the audit log.
type trail struct {
	op      kmip.Operation // under way; 0 between operations
	audited bool           // its entry is in a transaction
	detail  string         // a word of the program's on what it does
}

// Begin is called before each operation of a session, End after it, with the
// object that it was about and how it ended. What End returns is the client's
// answer, which must not leave before [Session.Settle] has returned nil.
func (s *Session) Begin(op kmip.Operation) error {
	s.trail = trail{op: op}
	if err := s.k.auditable(); err != nil {
		return AsError(err)
	}
	return s.allow(op)
}

// End ends what Begin began, and orders its entry in the audit log.
func (s *Session) End(op kmip.Operation, id string, err error) error {
	err = s.inService(err)
	audited := s.audited
	s.trail = trail{}
	if audited && err == nil {
		return nil
	}
	e := s.entry(operationName(op), id, err)
	ticket, werr := s.k.journal.Append(&e, false)
	if werr != nil && errors.Is(err, store.ErrUnavailable) {
		return err // the client must not be told that nothing was done
	}
	if werr != nil {
		return AsError(fmt.Errorf("kms: %w: %w", ErrAudit, werr))
	}
	s.unsettled = append(s.unsettled, ticket)
	return err
}

// Unsettled is how many operations that End has ended wait for [Session.Settle]:
// reads and refusals. What changes something has its entry in its transaction.
func (s *Session) Unsettled() int { return len(s.unsettled) }

// Settle returns once the audit log has all of them on its disk: one wait for a
// message, whatever its batch. If it fails, what they have read must not leave.
func (s *Session) Settle(ctx context.Context) error {
	list := s.unsettled
	s.unsettled = nil
	for _, ticket := range list { // most, if not all, are of one write
		if err := ticket.Wait(ctx); err != nil {
			return AsError(fmt.Errorf("kms: %w: %w", ErrAudit, err))
		}
	}
	return nil
}

// commit is how a session writes: in one transaction with all that belongs to
// the change, its audit entries among it.
func (s *Session) commit(ctx context.Context, ops ...store.Op) error {
	s.synced = false
	s.k.awaitDrain(ctx)
	if err := s.k.auditable(); err != nil {
		return err
	}
	for _, e := range s.changes(ops) {
		ops = append(ops, s.k.enqueue(&e))
	}
	rev, err := s.k.commitSealed(ctx, s.inst, s.guard(s, ops)...)
	if err == nil {
		s.revision, s.audited = rev, true
	}
	return s.unguard(ctx, s, err)
}

// changes are the entries of a transaction: one for an operation, which names the
// object that it was about and the one that it made; one for each object when a
// whole batch is undone.
func (s *Session) changes(ops []store.Op) []audit.Entry {
	var touched, made []string
	for _, o := range ops {
		collection, key, creates := o.Record()
		if name, ok := strings.CutPrefix(collection, "object-"); !ok || name != s.inst.id {
			continue
		}
		if creates {
			made = append(made, key)
		} else {
			touched = append(touched, key)
		}
	}
	if s.op == 0 {
		var list []audit.Entry
		for _, id := range append(touched, made...) {
			list = append(list, s.entry("Undo", id, nil))
		}
		return list
	}
	e := s.entry(operationName(s.op), "", nil)
	switch {
	case len(touched) == 0 && len(made) > 0:
		e.Object = made[0]
	case len(touched) > 0:
		e.Object = touched[0]
		if len(made) > 0 {
			e.Made = made[0]
		}
	}
	e.Detail = s.detail
	return []audit.Entry{e}
}

func (s *Session) entry(operation, object string, err error) audit.Entry {
	return s.k.entry(s.Actor, s.inst.id, operation, object, err)
}

func (k *KMS) entry(by Actor, instance, operation, object string, err error) audit.Entry {
	return audit.Entry{
		Time: k.now(), Member: k.member, Instance: instance,
		Actor: by.Kind, Client: by.Name, Fingerprint: by.Fingerprint, Role: string(by.Role), From: by.From,
		Operation: operation, Object: object, Result: resultOf(err),
	}
}

func operationName(op kmip.Operation) string {
	if op == 0 {
		return "Unknown"
	}
	return ttlv.EnumStr(op)
}

// resultOf is how an operation ended: the reason that its client is told.
func resultOf(err error) string {
	if err == nil {
		return audit.Success
	}
	return ttlv.EnumStr(AsError(err).Reason)
}

// auditable tells why nothing may be done now: what has been done already waits
// for the log, or the log refuses.
func (k *KMS) auditable() error {
	if err := k.journal.Err(); err != nil {
		return fmt.Errorf("kms: %w: %w", ErrAudit, err)
	}
	if n := k.queue.Len(); n > maxBacklog {
		return fmt.Errorf("kms: %w: %d entries wait for it", ErrAudit, n)
	}
	return nil
}

// awaitDrain lets a change wait when more entries come than the log takes, before
// it would be refused.
func (k *KMS) awaitDrain(ctx context.Context) {
	for until := time.Now().Add(drainPatience); k.queue.Len() > maxBacklog/2 && time.Now().Before(until); {
		select {
		case <-time.After(flushEvery):
		case <-ctx.Done():
			return
		}
	}
}

// writeEntry returns once the entry is on the disk.
func (k *KMS) writeEntry(ctx context.Context, e *audit.Entry, reserved bool) error {
	ticket, err := k.journal.Append(e, reserved)
	if err == nil {
		err = ticket.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("kms: %w: %w", ErrAudit, err)
	}
	return nil
}

// enqueue is the part of a transaction that audits it.
func (k *KMS) enqueue(e *audit.Entry) store.Op {
	e.Act = "" // it is the item's key, and comes back from there
	return k.queue.Add(k.actPrefix+strconv.FormatUint(k.actNumber.Add(1), 36), e.Append(nil))
}

// strangers remembers whose certificates were refused lately: who is nobody must
// not be able to fill the log.
type strangers struct {
	mu   sync.Mutex
	seen map[string]time.Time // by fingerprint
}

const (
	strangerEvery = time.Minute // between two entries on one certificate
	maxStrangers  = 1000        // certificates in that time; more are in the server's log only
)

func (s *strangers) first(fingerprint string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.seen[fingerprint]; ok && now.Sub(at) < strangerEvery {
		return false
	}
	if len(s.seen) >= maxStrangers {
		maps.DeleteFunc(s.seen, func(_ string, at time.Time) bool { return now.Sub(at) >= strangerEvery })
		if len(s.seen) >= maxStrangers {
			return false
		}
	}
	if s.seen == nil {
		s.seen = map[string]time.Time{}
	}
	s.seen[fingerprint] = now
	return true
}

// stranger audits that a certificate was refused, and returns err, which says
// why. Nothing waits for the entry: there is no answer that tells anything.
func (k *KMS) stranger(inst *instance, cert *x509.Certificate, from string, err error) error {
	by := Actor{Kind: "certificate", Name: cert.Subject.CommonName, Fingerprint: fingerprint(cert), From: from}
	if k.strangers.first(by.Fingerprint, time.Now()) {
		e := k.entry(by, inst.id, "Connect", "", err)
		if _, lost := k.journal.Append(&e, false); lost != nil {
			k.log.Warn("kms: a refused certificate is not in the audit log", "sha256", by.Fingerprint, "error", lost)
		}
	}
	return err
}

// acts is put into the context of an administrator's call, and knows whether
// what it did is audited already.
type acts struct {
	by      Actor
	audited bool
}

type actsKey struct{}

// WithActs returns a context for one call of an administrator, that
// [KMS.EndCall] ends.
func WithActs(ctx context.Context, by Actor) context.Context {
	return context.WithValue(ctx, actsKey{}, &acts{by: by})
}

// EndCall audits a call of the administration API that succeeded without a
// change of its own, or failed. operation and object are the API's words for it,
// result is audit.Success or why it failed. Administrators' entries are taken as
// long as there is any room: they are who makes more.
func (k *KMS) EndCall(ctx context.Context, by Actor, instance, operation, object, result string) error {
	if a, ok := ctx.Value(actsKey{}).(*acts); ok && a.audited && result == audit.Success {
		return nil
	}
	e := k.entry(by, instance, operation, object, nil)
	e.Result = result
	return k.writeEntry(ctx, &e, true)
}

// commitAs is how an administrator's act is written: in one transaction with
// all that belongs to it. inst is nil for what concerns the whole server;
// subject is what the act is about, such as a fingerprint.
func (k *KMS) commitAs(ctx context.Context, by Actor, inst *instance, act, subject string, ops ...store.Op) error {
	_, err := k.commitEntry(ctx, inst, k.entry(by, inst.name(), act, subject, nil), ops...)
	if a, ok := ctx.Value(actsKey{}).(*acts); ok && err == nil {
		a.audited = true
	}
	return err
}

// CommitAct makes an act of who keeps records of their own in the KMS's store,
// such as the list of members, in one transaction with its audit entry. Who does
// it is the administrator whose call ctx is of, or else the server itself.
func (k *KMS) CommitAct(ctx context.Context, act, subject string, ops ...store.Op) error {
	by := Actor{Kind: "server", Name: k.member}
	if a, ok := ctx.Value(actsKey{}).(*acts); ok {
		by = a.by
	}
	return k.commitAs(ctx, by, nil, act, subject, ops...)
}

// commitByDate is how the server itself changes an object, because its time has
// come, whoever asked for it. It returns the revision. detail is a word on what
// became of the object.
func (k *KMS) commitByDate(ctx context.Context, inst *instance, act, object, detail string, ops ...store.Op) (int64, error) {
	e := k.entry(Actor{Kind: "server", Name: k.member}, inst.id, act, object, nil)
	e.Detail = detail
	return k.commitEntry(ctx, inst, e, ops...)
}

func (k *KMS) commitEntry(ctx context.Context, inst *instance, e audit.Entry, ops ...store.Op) (int64, error) {
	k.awaitDrain(ctx)
	if err := k.auditable(); err != nil {
		return 0, err
	}
	ops = append(ops, k.enqueue(&e))
	if inst != nil {
		return k.commitSealed(ctx, inst, ops...)
	}
	return k.store.Commit(ctx, ops...)
}

// name is the instance's id; nil is the whole server.
func (i *instance) name() string {
	if i == nil {
		return ""
	}
	return i.id
}

// Act audits what an administrator, or the server itself, is about to do outside
// the store; it returns once the log has it.
func (k *KMS) Act(ctx context.Context, by Actor, instance, act, subject string) error {
	e := k.entry(by, instance, act, subject, nil)
	if err := k.writeEntry(ctx, &e, true); err != nil {
		return err
	}
	if a, ok := ctx.Value(actsKey{}).(*acts); ok {
		a.audited = true
	}
	return nil
}
