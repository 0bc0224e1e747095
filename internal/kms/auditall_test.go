package kms

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"mortise/internal/kms/audit"
)

// TestExportOfAllLogs: the entries of all members come by time, in pages, with
// what proves them.
func TestExportOfAllLogs(t *testing.T) {
	one, _ := startAudited(t, t.TempDir(), AuditOptions{})
	two, _ := startAuditedAs(t, t.TempDir(), "other", AuditOptions{})
	ctx := t.Context()
	const n = 2*auditPage/2 + 100
	for _, k := range []*KMS{one.KMS, two.KMS} {
		for begin := time.Now(); !k.journal.HasKey(); time.Sleep(5 * time.Millisecond) {
			if time.Since(begin) > 30*time.Second {
				t.Fatal("the log gets no key")
			}
		}
	}
	for i := range n {
		k := one.KMS
		if i%2 == 1 {
			k = two.KMS
		}
		e := k.entry(tester, "", "test", fmt.Sprint(i), nil)
		ticket, err := k.journal.Append(&e, false)
		if err == nil && i >= n-2 {
			err = ticket.Wait(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			create(t, one.session())
		}
	}
	pages := 0
	others := []AuditSource{{"other", func(ctx context.Context, q AuditPageRequest) (AuditPage, error) {
		pages++
		return two.AuditPage(ctx, q)
	}}}
	export := func(f AuditFilter) (lines int, out bytes.Buffer) {
		t.Helper()
		var last time.Time
		err := one.AuditExportAll(ctx, f, others, func(r *audit.Record) error {
			lines++
			if r.Operation == "test" && r.Time.Before(last) {
				t.Errorf("entry %d of %s comes too late", r.Sequence, r.Member)
			} else if r.Operation == "test" {
				last = r.Time
			}
			return r.WriteJSON(&out)
		}, func(m *audit.Marks) error { return m.WriteJSON(&out) })
		if err != nil {
			t.Fatal(err)
		}
		return lines, out
	}
	_, out := export(AuditFilter{})
	list, err := audit.VerifyExport(&out, audit.VerifyOptions{})
	if err != nil || len(list) != 2 || !list[0].OK() || !list[1].OK() || list[0].Last < n/2 || list[1].Last < n/2 {
		t.Fatalf("%+v, %v", list, err)
	}
	pages = 0
	got, out := export(AuditFilter{Operation: "test"})
	if got != n || bytes.Contains(out.Bytes(), []byte(`{"begin"`)) {
		t.Errorf("%d of %d entries, or marks among chosen ones", got, n)
	}
	if err := one.AuditExportAll(ctx, AuditFilter{After: 5}, others, nil, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("after a number: %v", err)
	}
	broken := []AuditSource{{"down", func(context.Context, AuditPageRequest) (AuditPage, error) { return AuditPage{}, errors.New("no route") }}}
	if err := one.AuditExportAll(ctx, AuditFilter{}, broken, nil, nil); err == nil || !strings.Contains(err.Error(), "down") {
		t.Errorf("a member that is down: %v", err)
	}
}

// TestAuditPages: pages go on where the one before ended, up to what the first
// one said.
func TestAuditPages(t *testing.T) {
	f, _ := startAudited(t, t.TempDir(), AuditOptions{})
	var last audit.Ticket
	for i := range 2*auditPage + 10 {
		e := f.entry(tester, "", "test", fmt.Sprint(i), nil)
		var err error
		if last, err = f.journal.Append(&e, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := last.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := f.AuditPage(t.Context(), AuditPageRequest{})
	if err != nil || p.Begin == nil || p.UpTo < 2*auditPage+10 || p.Last || len(p.Records) != auditPage {
		t.Fatalf("the first page has %d records up to %d, %v", len(p.Records), p.UpTo, err)
	}
	upTo, next := p.UpTo, p.Records[len(p.Records)-1].Sequence+1
	e := f.entry(tester, "", "later", "", nil)
	if _, err := f.journal.Append(&e, false); err != nil {
		t.Fatal(err)
	}
	for !p.Last {
		if p, err = f.AuditPage(t.Context(), AuditPageRequest{Filter: AuditFilter{After: p.After}, UpTo: upTo}); err != nil || p.Begin != nil {
			t.Fatalf("%+v, %v", p.Begin, err)
		}
		for _, r := range p.Records {
			if r.Sequence != next || r.Operation == "later" {
				t.Fatalf("entry %d, want %d", r.Sequence, next)
			}
			next++
		}
	}
	if next != upTo+1 {
		t.Errorf("the pages end with %d, not %d", next-1, upTo)
	}
}
