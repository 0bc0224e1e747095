package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// A restored KMS starts quarantined (design §5): what was destroyed or revoked
// after the backup must not come back alive because of it. It is unlocked and
// can be looked at; it serves nobody until an administrator releases it. The
// restore puts what is known of the time after the backup beside the records,
// and Unlock applies it before anything else.

// safety is what the KMS keeps of its backups and of its own restore.
type safety struct {
	backups    *store.Collection[Backup]
	quarantine *store.Collection[Quarantine]
	acts       *store.Collection[Act]
}

func openSafety(ctx context.Context, s *store.Store) (f safety, err error) {
	if f.backups, err = store.NewCollection(ctx, s, "backup", store.JSON[Backup](1)); err != nil {
		return f, err
	}
	if f.quarantine, err = store.NewCollection(ctx, s, quarantineCollection, store.JSON[Quarantine](1)); err != nil {
		return f, err
	}
	f.acts, err = store.NewCollection(ctx, s, actsCollection, store.JSON[Act](1))
	return f, err
}

func (f safety) close() {
	f.backups.Close()
	f.quarantine.Close()
	f.acts.Close()
}

// ErrQuarantined: the KMS was restored from a backup and not released yet.
var ErrQuarantined = errors.New("the key server was restored from a backup and is quarantined; see: mortise kms restore status")

const (
	quarantineCollection = "quarantine" // holds one record
	quarantineKey        = "restore"
	actsCollection       = "quarantine-act"
)

// A Quarantine says what was restored and what is known of the time since.
type Quarantine struct {
	Backup   string    `json:"backup"`   // its id
	Created  time.Time `json:"created"`  // the backup
	Revision int64     `json:"revision"` // of the lost store, that the backup is of
	Restored time.Time `json:"restored"`
	// AuditUntil is when the last entry of the audit logs that were given was
	// written; zero if none was given.
	AuditUntil time.Time `json:"auditUntil,omitzero"`
	// Missing are objects that clients hold and the backup lacks: they were made
	// after it.
	Missing []MissingObject `json:"missing"`
	// Acts is how many acts after the backup the audit logs have, that are to
	// be done again.
	Acts int `json:"acts"`
}

// A MissingObject was made after the backup.
type MissingObject struct {
	Instance string `json:"instance,omitempty"` // "" if it is not known
	ID       string `json:"id"`
	From     string `json:"from"` // how it is known: "audit" or "list"
}

// An Act is one that the lost server did after the backup.
type Act struct {
	Instance  string    `json:"instance"`
	Operation string    `json:"operation"` // as the audit log calls it
	Subject   string    `json:"subject"`   // an object's id, a fingerprint, …
	Detail    string    `json:"detail,omitempty"`
	Time      time.Time `json:"time"`
	By        string    `json:"by,omitempty"`
	Revision  int64     `json:"revision"` // of the lost store
	// Outcome is empty until the act was done again.
	Outcome string `json:"outcome,omitempty"`
}

// QuarantineRecords are the records that put a restored store into quarantine,
// at a revision of the restore's.
func QuarantineRecords(q Quarantine, acts []Act, revision int64) ([]store.Record, error) {
	var list []store.Record
	add := func(collection, key string, stored []byte, err error) error {
		list = append(list, store.Record{Collection: collection, Key: key, Stored: stored, Created: revision, Modified: revision, Version: 1})
		return err
	}
	q.Acts = len(acts)
	stored, err := store.JSON[Quarantine](1).Encode("the quarantine", q)
	if err := add(quarantineCollection, quarantineKey, stored, err); err != nil {
		return nil, err
	}
	for i, a := range acts {
		stored, err := store.JSON[Act](1).Encode("an act", a)
		if err := add(actsCollection, fmt.Sprintf("%08d", i), stored, err); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// Quarantined says from which restore the KMS is quarantined; the error matches
// store.ErrNotFound if it is not.
func (k *KMS) Quarantined(ctx context.Context) (Quarantine, error) {
	e, err := k.quarantine.Get(ctx, quarantineKey)
	if err != nil {
		return Quarantine{}, err
	}
	return e.Value, nil
}

// admitted refuses while the KMS is quarantined. The caller has synced.
func (k *KMS) admitted() error {
	if _, is := k.quarantine.Peek(quarantineKey); is {
		return fmt.Errorf("kms: %w", ErrQuarantined)
	}
	return nil
}

// AwaitRelease returns when the KMS is not quarantined, or ctx ends.
func (k *KMS) AwaitRelease(ctx context.Context) error {
	w := k.store.Watch(quarantineCollection)
	defer w.Close()
	for {
		if _, err := k.Quarantined(ctx); errors.Is(err, store.ErrNotFound) {
			return nil
		} else if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrUnavailable) {
			return fmt.Errorf("kms: looking whether the server is quarantined: %w", err)
		}
		if _, err := w.Next(ctx); err != nil {
			return err
		}
	}
}

// QuarantinedActs lists what the audit logs have of the time after the backup,
// and what became of it.
func (k *KMS) QuarantinedActs(ctx context.Context) ([]Act, error) {
	entries, err := k.acts.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing the acts since the backup: %w", err)
	}
	list := make([]Act, 0, len(entries))
	for _, e := range entries {
		list = append(list, e.Value)
	}
	return list, nil
}

// redoActs does again what was done after the backup, until it is done or the
// KMS is closed. Nothing waits for it but the release.
func (k *KMS) redoActs(ctx context.Context) {
	for {
		err := k.applyActs(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		k.log.Error("kms: the acts since the backup are not all done again; it is tried again", "error", err)
		select {
		case <-time.After(5 * time.Second):
		case <-ctx.Done():
		}
	}
}

// applyActs does again what was done after the backup. Each act and the note
// that it is done are one transaction, so it may be interrupted and repeated.
func (k *KMS) applyActs(ctx context.Context) error {
	q, err := k.Quarantined(ctx)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kms: reading the quarantine: %w", err)
	}
	k.log.Warn("kms: restored from a backup and quarantined: no client is served until it is released", "backup", q.Backup, "of", q.Created)
	entries, err := k.acts.List(ctx, "")
	if err != nil {
		return fmt.Errorf("kms: reading the acts since the backup: %w", err)
	}
	for _, e := range entries {
		for e.Value.Outcome == "" {
			err := k.applyAct(ctx, e)
			if errors.Is(err, store.ErrConflict) { // another member does it too
				e, err = k.acts.Get(ctx, e.Key)
			} else {
				e.Value.Outcome = "done"
			}
			if err != nil {
				return fmt.Errorf("kms: doing again %s of %s, of %s: %w", e.Value.Operation, e.Value.Subject, e.Value.Time.Format(time.RFC3339), err)
			}
		}
	}
	return nil
}

// Operations of administrators, as the audit log calls them, that are done
// again.
const (
	actClientRevoke = "client revoke"
	actAPIKeyRevoke = "apikey revoke"
)

// Repeatable tells whether an act, as the audit log calls it, is done again
// after a restore.
func Repeatable(operation string) bool {
	switch operation {
	case "Destroy", "Revoke", actClientRevoke, actAPIKeyRevoke:
		return true
	}
	return false
}

// Outcomes of an act that leave nothing in doubt.
const (
	outcomeNoObject = "the backup has no such object"
	outcomeAbsent   = "the backup does not have it"
	outcomeWas      = "was so already"
	outcomeAgain    = "done again"
)

func leavesNoDoubt(outcome string) bool {
	return outcome == outcomeNoObject || outcome == outcomeAbsent || outcome == outcomeWas || outcome == outcomeAgain
}

func (k *KMS) applyAct(ctx context.Context, e store.Entry[Act]) error {
	a := e.Value
	server := Actor{Kind: "server", Name: "restore", Instance: a.Instance, Role: RoleAdministrator}
	done := func(outcome string) store.Op {
		a.Outcome = outcome
		return k.acts.Update(e.Key, e.Revision, a)
	}
	inst, err := k.instance(ctx, a.Instance)
	if err != nil && !errors.Is(err, ErrUnknownInstance) {
		return err
	}
	if inst == nil || !Repeatable(a.Operation) {
		outcome := "is to be done by hand"
		if inst == nil {
			outcome = "the backup has no such instance"
		}
		return k.commitAs(ctx, server, nil, "restore act", a.Subject, done(outcome))
	}
	switch a.Operation {
	case actClientRevoke:
		if _, there := inst.clients.Peek(a.Subject); !there {
			return k.commitAs(ctx, server, inst, "restore act", a.Subject, done(outcomeAbsent))
		}
		return k.commitAs(ctx, server, inst, a.Operation, a.Subject, inst.clients.Delete(a.Subject, 0), done(outcomeAgain))
	case actAPIKeyRevoke:
		keys, err := inst.apiKeys.List(ctx, "")
		if err != nil {
			return err
		}
		i := slices.IndexFunc(keys, func(e store.Entry[APIKey]) bool { return e.Value.ID == a.Subject })
		if i < 0 {
			return k.commitAs(ctx, server, inst, "restore act", a.Subject, done(outcomeAbsent))
		}
		return k.commitAs(ctx, server, inst, a.Operation, a.Subject, inst.apiKeys.Delete(keys[i].Key, 0), done(outcomeAgain))
	}
	o, err := inst.objects.Get(ctx, a.Subject)
	if errors.Is(err, store.ErrNotFound) {
		return k.commitAs(ctx, server, inst, "restore act", a.Subject, done(outcomeNoObject))
	}
	if err != nil {
		return err
	}
	changed := *o.Value
	outcome := changed.again(a)
	ops := []store.Op{done(outcome)}
	if outcome == outcomeAgain {
		changed.LastChange = k.now().UTC().Truncate(time.Second)
		ops = append(ops, inst.objects.Update(a.Subject, o.Revision, &changed))
		if changed.gone() { // its names are free
			for _, name := range changed.Attributes {
				if name.Name == kmip.AttributeNameName {
					ops = append(ops, inst.names.Delete(inst.nameIndex(name.Value), 0))
				}
			}
		}
	}
	return k.commitAs(ctx, server, inst, a.Operation, a.Subject, ops...)
}

// again brings the object to where a past act had brought it: as of the act's
// time, and whatever the object's state in the backup.
func (o *object) again(a Act) (outcome string) {
	reason := revocation{Code: kmip.RevocationReasonCodeUnspecified, Message: "revoked before the restore"}
	switch {
	case o.gone():
		return outcomeWas
	case a.Operation == "Destroy":
		o.settle(a.Time)
		if o.State == kmip.StateActive {
			o.State, o.Deactivated, o.Reason = kmip.StateDeactivated, a.Time, &reason
		}
		if err := o.destroy(a.Time); err != nil {
			o.State, o.Destroyed = kmip.StateDestroyed, a.Time
		}
		return outcomeAgain
	case strings.Contains(strings.ToLower(a.Detail), "compromise"):
		if o.State == kmip.StateCompromised {
			return outcomeWas
		}
		reason.Code = kmip.RevocationReasonCodeKeyCompromise
		o.State, o.Compromised, o.Occurred, o.Reason = kmip.StateCompromised, a.Time, a.Time, &reason
		return outcomeAgain
	case o.State == kmip.StateDeactivated, o.State == kmip.StateCompromised:
		return outcomeWas
	default:
		// A Pre-Active object was activated in between.
		if o.Activation.IsZero() || o.Activation.After(a.Time) {
			o.Activation = a.Time
		}
		o.State, o.Deactivated, o.Reason = kmip.StateDeactivated, a.Time, &reason
		return outcomeAgain
	}
}

// Release ends the quarantine: clients are served from then on. It needs the
// hash of the list of what is lost or in doubt, as [Confirm] shows it.
func (k *KMS) Release(ctx context.Context, by Actor, hash string) error {
	q, err := k.Quarantined(ctx)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("kms: %w: the key server is not quarantined", ErrInvalid)
	}
	if err != nil {
		return err
	}
	acts, err := k.acts.List(ctx, "")
	if err != nil {
		return fmt.Errorf("kms: releasing: %w", err)
	}
	lines := q.doubts()
	for _, e := range acts {
		a := e.Value
		switch {
		case leavesNoDoubt(a.Outcome):
		case a.Outcome == "":
			return fmt.Errorf("kms: %w: acts since the backup have not been done again yet", ErrLocked)
		default:
			lines = append(lines, fmt.Sprintf("%s of %s in instance %s, at %s: %s", a.Operation, a.Subject, a.Instance, a.Time.UTC().Format(time.RFC3339), a.Outcome))
		}
	}
	if err := Confirm("release the restored key server", lines, hash); err != nil {
		return err
	}
	if err := k.commitAs(ctx, by, nil, "restore release", q.Backup, k.quarantine.Delete(quarantineKey, 0)); err != nil {
		return fmt.Errorf("kms: releasing: %w", err)
	}
	k.log.Warn("kms: released from quarantine; clients are served", "backup", q.Backup, "by", by.Name)
	// The acts say nothing any more; what interrupts this leaves some behind.
	for chunk := range slices.Chunk(acts, 500) {
		var ops []store.Op
		for _, e := range chunk {
			ops = append(ops, k.acts.Delete(e.Key, e.Revision))
		}
		if _, err := k.store.Commit(ctx, ops...); err != nil {
			k.log.Warn("kms: acts of a past quarantine stay in the store", "error", err)
			return nil
		}
	}
	return nil
}

// doubts lists what a restored server is not what the lost one was in.
func (q Quarantine) doubts() (lines []string) {
	for _, m := range q.Missing {
		of := ""
		if m.Instance != "" {
			of = " of instance " + m.Instance
		}
		lines = append(lines, fmt.Sprintf("object %s%s was made after the backup and is not in it", m.ID, of))
	}
	since, until := "no audit log was applied", q.Created
	if !q.AuditUntil.IsZero() {
		since, until = "the audit log that was applied ends", q.AuditUntil
	}
	return append(lines, fmt.Sprintf("%s: what was destroyed, revoked or shut out after %s is as it was before", since, until.UTC().Format(time.RFC3339)))
}
