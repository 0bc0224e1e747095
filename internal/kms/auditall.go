package kms

import (
	"context"
	"fmt"
	"iter"

	"mortise/internal/kms/audit"
)

// Each member has a log of its own. An export of all of them is made of pages
// that the member which is asked gets from the others.

const (
	// auditPage is how many entries one page has, at most.
	auditPage = 2000
	// auditScan is how many are looked at for one.
	auditScan = 50_000
)

// AuditPageRequest asks a member for a page of its log.
type AuditPageRequest struct {
	Filter AuditFilter `json:"filter"` // its After is where to go on
	UpTo   uint64      `json:"upTo"`   // what the first page said; 0 asks for that
}

// AuditPage is a page of a member's log.
type AuditPage struct {
	// Of the first page:
	UpTo  uint64       `json:"upTo,omitempty"` // the log's newest entry
	Begin *audit.Begin `json:"begin,omitempty"`
	// Tombstones stand for what was removed before Begin; End is the signed head
	// of the entry UpTo, nil if the log cannot be signed yet.
	Tombstones []audit.Tombstone `json:"tombstones,omitempty"`
	End        *audit.Head       `json:"end,omitempty"`

	Records []audit.Record `json:"records,omitempty"`
	After   uint64         `json:"after"` // where to go on
	Last    bool           `json:"last,omitempty"`
}

// AuditPage returns a page of this member's log. The first one has what was
// acknowledged before it was asked for.
func (k *KMS) AuditPage(ctx context.Context, q AuditPageRequest) (p AuditPage, err error) {
	if q.UpTo == 0 {
		k.flush(ctx)
		begin, stones, err := k.journal.Begin()
		if err != nil {
			return p, fmt.Errorf("kms: exporting the audit log: %w", err)
		}
		p.Begin, p.Tombstones, p.UpTo = &begin, stones, k.journal.Durable()
		if k.journal.HasKey() {
			head, err := k.journal.Sign(ctx)
			if err != nil {
				return p, fmt.Errorf("kms: signing the audit log for an export: %w", err)
			}
			p.End, p.UpTo = &head, head.Sequence
		}
		q.UpTo = p.UpTo
	}
	p.After = q.Filter.After
	for r, err := range k.journal.Records(q.Filter.After + 1) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return p, fmt.Errorf("kms: exporting the audit log: %w", err)
		}
		if r.Sequence > q.UpTo {
			break
		}
		p.After = r.Sequence
		if q.Filter.has(&r.Entry) {
			p.Records = append(p.Records, r)
		}
		if len(p.Records) >= auditPage || r.Sequence-q.Filter.After >= auditScan {
			break
		}
	}
	p.Last = p.After >= q.UpTo || p.After == q.Filter.After
	return p, nil
}

// whole tells that f chooses every entry.
func (f *AuditFilter) whole() bool { return *f == AuditFilter{} }

// An AuditSource gives pages of one member's log.
type AuditSource struct {
	Member string
	Page   func(context.Context, AuditPageRequest) (AuditPage, error)
}

// AuditExportAll calls each with the entries of this member's log and of the
// others' that f chooses, by time. If f chooses all, mark is called with what
// lets [audit.VerifyExport] check them. Every member must answer before anything
// is told.
func (k *KMS) AuditExportAll(ctx context.Context, f AuditFilter, others []AuditSource, each func(*audit.Record) error, mark func(*audit.Marks) error) error {
	if f.After > 0 {
		return fmt.Errorf("kms: %w: every member numbers its own entries: all members' logs cannot be gone on with after one number", ErrInvalid)
	}
	sources := append([]AuditSource{{k.member, k.AuditPage}}, others...)
	var logs []iter.Seq2[audit.Record, error]
	var firsts []AuditPage
	for _, s := range sources {
		p, err := s.Page(ctx, AuditPageRequest{Filter: f})
		if err != nil {
			return fmt.Errorf("the audit log of member %s: %w; the others' can be exported one by one", s.Member, err)
		}
		firsts = append(firsts, p)
		logs = append(logs, s.records(ctx, f, p))
	}
	if f.whole() {
		for _, p := range firsts {
			if err := mark(&audit.Marks{Begin: p.Begin, Tombstones: p.Tombstones}); err != nil {
				return err
			}
		}
	}
	for r, err := range audit.Merge(logs...) {
		if err == nil {
			err = each(&r)
		}
		if err != nil {
			return err
		}
	}
	if f.whole() {
		for _, p := range firsts {
			if p.End == nil {
				continue
			}
			if err := mark(&audit.Marks{End: p.End}); err != nil {
				return err
			}
		}
	}
	return nil
}

// records yields the entries of all pages.
func (s AuditSource) records(ctx context.Context, f AuditFilter, p AuditPage) iter.Seq2[audit.Record, error] {
	return func(yield func(audit.Record, error) bool) {
		for upTo := p.UpTo; ; {
			for _, r := range p.Records {
				if !yield(r, nil) {
					return
				}
			}
			if p.Last {
				return
			}
			f.After = p.After
			var err error
			if p, err = s.Page(ctx, AuditPageRequest{Filter: f, UpTo: upTo}); err != nil {
				yield(audit.Record{}, fmt.Errorf("the audit log of member %s: %w", s.Member, err))
				return
			}
		}
	}
}
