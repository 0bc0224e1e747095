package policy

import (
	"errors"
	"strings"
	"testing"

	"mortise/internal/store"
)

func open(t *testing.T) *Policies {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Name: "center-1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	p, err := Open(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPolicies(t *testing.T) {
	p := open(t)
	ctx := t.Context()
	// PowerCLI looks the policy up by this name, govmomi by this id.
	sample, err := p.Get(ctx, "4d5f673c-536f-11e6-beb8-9e71128cae77")
	if err != nil || sample.Name != "VM Encryption Policy" || !sample.Encrypts || !sample.Bundled {
		t.Fatalf("the sample policy is %+v, %v", sample, err)
	}
	clone, err := p.Clone(ctx, VMEncryption, "gold", "")
	if err != nil || !clone.Encrypts || clone.Bundled || clone.ID == sample.ID || clone.Description != sample.Description {
		t.Fatalf("the clone is %+v, %v", clone, err)
	}
	for what, c := range map[string]struct{ got, want error }{
		"delete bundled":   {p.Delete(ctx, VMEncryption), ErrBundled},
		"delete default":   {p.Delete(ctx, DatastoreDefault), ErrBundled},
		"delete unknown":   {p.Delete(ctx, "x"), ErrNotFound},
		"clone unknown":    {second(p.Clone(ctx, "x", "y", "")), ErrNotFound},
		"clone empty":      {second(p.Clone(ctx, "", "y", "")), ErrNotFound},
		"name taken":       {second(p.Clone(ctx, VMEncryption, "gold", "")), ErrDuplicate},
		"bundled name":     {second(p.Create(ctx, "VM Encryption Policy", "", true, false)), ErrDuplicate},
		"no name":          {second(p.Create(ctx, "", "", true, false)), ErrName},
		"long name":        {second(p.Create(ctx, strings.Repeat("é", 81), "", true, false)), ErrName},
		"unprintable name": {second(p.Create(ctx, "a\nb", "", true, false)), ErrName},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v", what, c.got)
		}
	}
	if all, err := p.All(ctx); err != nil || len(all) != 3 || all[2].ID != clone.ID {
		t.Errorf("all policies: %+v, %v", all, err)
	}
	if err := p.Delete(ctx, clone.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Clone(ctx, VMEncryption, "gold", ""); err != nil {
		t.Errorf("the name of a deleted policy is not free: %v", err)
	}
}

func second(_ Policy, err error) error { return err }

func TestImplies(t *testing.T) {
	for _, c := range []struct {
		encrypts, encrypted bool
		want                Implied
	}{{true, false, Encrypt}, {true, true, Nothing}, {false, true, Decrypt}, {false, false, Nothing}} {
		if got := (Policy{Encrypts: c.encrypts}).Implies(c.encrypted); got != c.want {
			t.Errorf("a policy that encrypts: %v, on something encrypted: %v, implies %s", c.encrypts, c.encrypted, got)
		}
	}
}
