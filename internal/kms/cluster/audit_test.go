package cluster

import (
	"bytes"
	"path/filepath"
	"testing"

	"mortise/internal/kms"
	"mortise/internal/kms/audit"
)

// TestAuditLogsOfAllMembers: one member exports what all have logged, and each
// log is whole in it.
func TestAuditLogsOfAllMembers(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	a := must(begin(t, Options{Dir: filepath.Join(dir, "a"), Address: freePort(t)}))
	if err := a.unlock(false); err != nil {
		t.Fatal(err)
	}
	token, err := a.node.Invite(ctx, "kms-2", 0)
	if err != nil {
		t.Fatal(err)
	}
	b := must(begin(t, Options{Dir: filepath.Join(dir, "b"), Token: token.Text(), Address: freePort(t)}))
	if err := b.unlock(true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "kms-2 votes", func() bool { return votes(a.status("kms-2")) })
	by := kms.Actor{Kind: "socket", Name: "root", Role: kms.RoleAdministrator}
	for _, p := range []*part{a, b} {
		if err := p.kms.Act(ctx, by, "", "test", p.node.Name); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the log has a key", func() bool { s, err := p.kms.AuditStatus(); return err == nil && s.Anchored > 0 })
	}
	export := func(p *part) (out bytes.Buffer, tests []string, err error) {
		others, err := p.node.AuditLogs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		err = p.kms.AuditExportAll(ctx, kms.AuditFilter{}, others, func(r *audit.Record) error {
			if r.Operation == "test" {
				tests = append(tests, r.Object)
			}
			return r.WriteJSON(&out)
		}, func(m *audit.Marks) error { return m.WriteJSON(&out) })
		return out, tests, err
	}
	for _, p := range []*part{a, b} {
		out, tests, err := export(p)
		if err != nil || len(tests) != 2 || tests[0] != a.node.Name || tests[1] != "kms-2" {
			t.Errorf("%s: %q, %v", p.node.Name, tests, err)
		}
		list, err := audit.VerifyExport(&out, audit.VerifyOptions{})
		if err != nil || len(list) != 2 || !list[0].OK() || !list[1].OK() || list[0].Signed == 0 || list[1].Signed == 0 {
			t.Errorf("%s: %+v, %v", p.node.Name, list, err)
		}
	}
	// The changes of members are in it, with the revisions of what they changed.
	if err := b.node.Remove(kms.WithActs(ctx, by), "no such member"); err == nil {
		t.Error("an unknown member was removed")
	}
	acts := map[string]audit.Record{}
	if err := a.kms.AuditExport(ctx, kms.AuditFilter{}, func(r *audit.Record) error { acts[r.Operation] = *r; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, act := range []string{"member invite", "member join"} {
		if e := acts[act]; e.Object != "kms-2" || e.Revision == 0 || e.Actor != "server" {
			t.Errorf("%s: %+v", act, e)
		}
	}
	// Its removal is the act of who asked for it.
	removing := kms.WithActs(ctx, by)
	if err := a.node.Remove(removing, "kms-2"); err != nil {
		t.Fatal(err)
	}
	if err := a.kms.EndCall(removing, by, "", "DELETE /v1/members/{member}", "/v1/members/kms-2", audit.Success); err != nil {
		t.Fatal(err)
	}
	var removed []audit.Record
	if err := a.kms.AuditExport(ctx, kms.AuditFilter{Client: "root"}, func(r *audit.Record) error {
		if r.Operation != "test" {
			removed = append(removed, *r)
		}
		return nil
	}); err != nil || len(removed) != 1 || removed[0].Operation != "member remove" || removed[0].Object != "kms-2" || removed[0].Revision == 0 {
		t.Errorf("%+v, %v", removed, err)
	}
}
