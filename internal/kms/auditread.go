package kms

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"mortise/internal/kms/audit"
)

// An AuditFilter chooses entries of the audit log; empty fields choose all.
type AuditFilter struct {
	Since, Until time.Time
	Instance     string
	Object       string // the object, or what was made of it
	Client       string // its label or its fingerprint
	Operation    string
	After        uint64 // entries with a higher number
}

func (f *AuditFilter) has(e *audit.Entry) bool {
	return (f.Since.IsZero() || !e.Time.Before(f.Since)) && (f.Until.IsZero() || e.Time.Before(f.Until)) &&
		(f.Instance == "" || e.Instance == f.Instance) &&
		(f.Object == "" || e.Object == f.Object || e.Made == f.Object) &&
		(f.Client == "" || e.Client == f.Client || strings.EqualFold(e.Fingerprint, f.Client)) &&
		(f.Operation == "" || e.Operation == f.Operation) && e.Sequence > f.After
}

// flushWait is how long an export waits for the changes that were acknowledged
// before it.
const (
	flushWait  = 5 * time.Second
	flushEvery = 10 * time.Millisecond // between two looks
)

// flush returns when the log has what was acknowledged before.
func (k *KMS) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, flushWait)
	defer cancel()
	if k.store.Sync(ctx) != nil {
		return
	}
	for k.queue.Len() > 0 && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(flushEvery):
		}
	}
}

// AuditExport calls each with the entries of this member's log that f chooses, in
// the log's order. An error of each ends it.
func (k *KMS) AuditExport(ctx context.Context, f AuditFilter, each func(*audit.Record) error) error {
	k.flush(ctx)
	for r, err := range k.journal.Records(f.After + 1) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("kms: exporting the audit log: %w", err)
		}
		if f.has(&r.Entry) {
			if err := each(&r); err != nil {
				return err
			}
		}
	}
	return nil
}

// auditAnchors are the heads that the store has of this member's logs, or of
// all members'.
func (k *KMS) auditAnchors(ctx context.Context, all bool) ([]audit.Head, error) {
	entries, err := k.anchors.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: reading the anchors: %w", err)
	}
	var heads []audit.Head
	for _, e := range entries {
		if e.Value.Head != nil && (all || e.Value.Head.Member == k.member) {
			heads = append(heads, *e.Value.Head)
		}
	}
	return heads, nil
}

// AuditVerify checks this member's log against its anchors in the store and the
// member's own public keys. A log of this member's that is gone is a problem too,
// until an administrator has it forgotten.
func (k *KMS) AuditVerify(ctx context.Context) (audit.Report, error) {
	heads, err := k.auditAnchors(ctx, false)
	if err != nil {
		return audit.Report{}, err
	}
	var o audit.VerifyOptions
	var gone []audit.Problem
	for _, h := range heads {
		if string(h.Log) == string(k.journal.ID()) {
			o.Anchors = append(o.Anchors, h)
			continue
		}
		gone = append(gone, audit.Problem{Kind: audit.Replaced, Sequence: 1, Text: fmt.Sprintf(
			"log %s of this member, which had %d entries at %s, is not here; if you have a copy of it, check that with --folder; then: mortise kms audit forget %[1]s",
			h.Log, h.Sequence, h.Time.Format(time.RFC3339))})
	}
	keys, err := k.AuditKeys(ctx)
	if err != nil {
		return audit.Report{}, err
	}
	for _, m := range keys {
		if m.Member == k.member {
			o.Keys = append(o.Keys, ed25519.PublicKey(m.Key))
		}
	}
	r, err := k.journal.Verify(o)
	r.Problems = append(r.Problems, gone...)
	return r, err
}

// AuditForget takes note that a log of this member's is gone for good, which
// AuditVerify then no longer says. The note is in the log.
func (k *KMS) AuditForget(ctx context.Context, by Actor, log, reason string) error {
	key := k.member + "/" + log
	if _, err := k.anchors.Get(ctx, key); err != nil {
		return fmt.Errorf("kms: audit log %s: %w", log, err)
	}
	if reason == "" {
		return fmt.Errorf("kms: %w: a reason is needed", ErrInvalid)
	}
	return k.commitAs(ctx, by, nil, "audit forget", log, k.anchors.Delete(key, 0))
}

// AuditArchive writes the whole log of this member as a tar archive: segments,
// tombstones, all members' anchors, and public keys. It can be verified on any
// machine.
func (k *KMS) AuditArchive(ctx context.Context, w io.Writer) error {
	k.flush(ctx)
	files, err := k.journal.Files()
	if err != nil {
		return fmt.Errorf("kms: exporting the audit log: %w", err)
	}
	heads, err := k.auditAnchors(ctx, true)
	if err != nil {
		return err
	}
	keys, err := k.AuditKeys(ctx)
	if err != nil {
		return err
	}
	files = append(files, lines(audit.AnchorsFile, heads), lines(audit.KeysFile, keys))
	t := tar.NewWriter(w)
	for _, f := range files {
		err := t.WriteHeader(&tar.Header{Name: f.Name, Mode: 0o600, Size: f.Size, ModTime: k.now()})
		if err == nil {
			err = f.Copy(t)
		}
		if err != nil {
			return fmt.Errorf("kms: exporting the audit log: %s: %w", f.Name, err)
		}
	}
	return t.Close()
}

// lines is a file with a JSON value a line.
func lines[T any](name string, values []T) audit.File {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	for _, v := range values {
		_ = e.Encode(v) // no value of these fails
	}
	return audit.File{Name: name, Size: int64(b.Len()), Copy: func(w io.Writer) error { _, err := w.Write(b.Bytes()); return err }}
}

// AuditRemove deletes the closed segments of this member's log that were written
// before a time, and leaves a signed tombstone. The act is in the log first.
func (k *KMS) AuditRemove(ctx context.Context, by Actor, before time.Time, reason string) (audit.Tombstone, error) {
	last, err := k.journal.LastBefore(before)
	if err != nil {
		return audit.Tombstone{}, fmt.Errorf("kms: %w", err)
	}
	if last == 0 {
		return audit.Tombstone{}, fmt.Errorf("kms: %w: %w", ErrInvalid, audit.ErrNothing)
	}
	if err := k.Act(ctx, by, "", "audit remove", fmt.Sprintf("entries up to %d", last)); err != nil {
		return audit.Tombstone{}, err
	}
	t, err := k.journal.Remove(ctx, last, by.Name, reason)
	if errors.Is(err, audit.ErrNothing) {
		return t, fmt.Errorf("kms: %w: %w", ErrInvalid, err)
	}
	return t, err
}

// AuditStatus is how the audit log of this member stands.
type AuditStatus struct {
	Member   string     `json:"member"`
	Log      audit.Hex  `json:"log" doc:"the log's id"`
	Entries  uint64     `json:"entries" doc:"on the disk, ever"`
	Segments int        `json:"segments"`
	Bytes    int64      `json:"bytes" doc:"of the segments on the disk"`
	Waiting  int        `json:"waiting" doc:"entries of changes that are in the store and not in the log yet"`
	Anchored uint64     `json:"anchored" doc:"the store has a signed head up to this entry"`
	Sinks    []SinkInfo `json:"sinks,omitempty"`
	Problem  string     `json:"problem,omitempty" doc:"why nothing can be audited, and so nothing is done"`
}

// SinkInfo is how another place for anchors stands.
type SinkInfo struct {
	Name     string    `json:"name"`
	Anchored uint64    `json:"anchored"`
	Failing  time.Time `json:"failing,omitzero" doc:"since when"`
}

// AuditStatus returns how the audit log stands.
func (k *KMS) AuditStatus() (AuditStatus, error) {
	stats, err := k.journal.Stats()
	if err != nil {
		return AuditStatus{}, fmt.Errorf("kms: %w", err)
	}
	s := AuditStatus{Member: k.member, Log: k.journal.ID(), Entries: stats.Durable, Segments: stats.Segments, Bytes: stats.Bytes, Waiting: k.queue.Len()}
	if e, ok := k.anchors.Peek(k.member); ok && e.Value.Head != nil {
		s.Anchored = e.Value.Head.Sequence
	}
	for _, a := range k.sinks {
		var i SinkInfo
		i.Name, i.Anchored, i.Failing = a.Status()
		s.Sinks = append(s.Sinks, i)
	}
	if err := k.AuditReady(); err != nil {
		s.Problem = err.Error()
	}
	return s, nil
}

// AuditReady tells why nothing can be audited, and so nothing is done; nil if all
// is well.
func (k *KMS) AuditReady() error { return k.auditable() }
