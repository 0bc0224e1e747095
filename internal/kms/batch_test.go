package kms

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
)

// TestUndo: what a session did is undone as a whole, names included, or not at
// all when another client came between.
func TestUndo(t *testing.T) {
	f := start(t, t.TempDir())
	ctx := t.Context()
	kept := create(t, f.session(), named("kept"), custom("x-a", "1"))
	bytesBefore := keyBytes(t, f.session(), kept)
	before, err := f.session().Attributes(ctx, kept) // after the Get, which counts
	if err != nil {
		t.Fatal(err)
	}
	f.clock.pass(time.Minute)

	s := f.session()
	made := create(t, s, named("made"))
	if _, err := s.AddAttribute(ctx, kept, custom("x-b", "2")); err != nil {
		t.Fatal(err)
	}
	again, err := s.ReKey(ctx, kept, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Destroy(ctx, kept); err != nil {
		t.Fatal(err)
	}
	if err := s.Undo(ctx); err != nil {
		t.Fatal(err)
	}
	s = f.session()
	if after, err := s.Attributes(ctx, kept); err != nil || !sameAttributes(before, after) {
		t.Errorf("after Undo: %v, %v; before: %v", after, err, before)
	}
	if !bytes.Equal(keyBytes(t, s, kept), bytesBefore) {
		t.Error("the key's bytes are others")
	}
	for _, id := range []string{made, again} {
		if _, err := s.Get(ctx, id); reason(err) != kmip.ResultReasonItemNotFound {
			t.Errorf("what was made is still there: %v", err)
		}
	}
	for name, want := range map[string][]string{"kept": {kept}, "made": nil} {
		if ids, _, err := s.Locate(ctx, Query{Attributes: []kmip.Attribute{named(name)}}); err != nil || !slices.Equal(ids, want) {
			t.Errorf("name %s: %v, %v", name, ids, err)
		}
	}
	create(t, s, named("made")) // the name is free again

	s = f.session()
	lost := create(t, s, named("lost"))
	if _, err := s.AddAttribute(ctx, kept, custom("x-c", "3")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.session().AddAttribute(ctx, kept, custom("x-d", "by another client")); err != nil {
		t.Fatal(err)
	}
	if err := s.Undo(ctx); err == nil {
		t.Error("another client's change was undone")
	}
	if got := values(t, f.session(), kept, "x-d"); len(got) != 1 {
		t.Errorf("x-d: %v", got)
	}
	keyBytes(t, f.session(), lost) // nothing was undone
}

func sameAttributes(a, b []kmip.Attribute) bool {
	return slices.EqualFunc(a, b, func(x, y kmip.Attribute) bool {
		return x.AttributeName == y.AttributeName && bytes.Equal(encodeAttribute(x), encodeAttribute(y))
	})
}

// TestImportExport takes an object with all its attributes to another place.
func TestImportExport(t *testing.T) {
	from, to := start(t, t.TempDir()).session(), start(t, t.TempDir()).session()
	ctx := t.Context()
	id := raw(t, from, []byte("0123456789abcdef"), kmip.CryptographicUsageEncrypt|kmip.CryptographicUsageExport, named("n"), custom("x-a", "b"),
		attr(kmip.AttributeNameUsageLimits, kmip.UsageLimits{UsageLimitsTotal: 9, UsageLimitsUnit: kmip.UsageLimitsUnitObject}))
	if err := from.GetUsageAllocation(ctx, id, 4); err != nil {
		t.Fatal(err)
	}
	if err := from.Revoke(ctx, id, kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise, RevocationMessage: "seen"}, from.now().Add(-time.Minute)); err != nil {
		t.Fatal(err)
	}
	m, attributes, err := from.Export(ctx, id, Form{})
	if err != nil {
		t.Fatal(err)
	}
	copyOf := func() Material {
		c := m
		c.Bytes, err = m.Bytes.Clone()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if err := to.Import(ctx, id, false, copyOf(), attributes); err != nil {
		t.Fatal(err)
	}
	later, err := to.Attributes(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	skip := func(a kmip.Attribute) bool {
		return a.AttributeName == kmip.AttributeNameLastChangeDate || a.AttributeName == operationPolicyName
	}
	if x, y := slices.DeleteFunc(slices.Clone(attributes), skip), slices.DeleteFunc(later, skip); !sameAttributes(x, y) {
		t.Errorf("exported %v\nimported %v", x, y)
	}
	if !bytes.Equal(keyBytes(t, to, id), []byte("0123456789abcdef")) {
		t.Error("the bytes are others")
	}
	if ids, _, err := to.Locate(ctx, Query{Attributes: []kmip.Attribute{named("n")}}); err != nil || !slices.Equal(ids, []string{id}) {
		t.Errorf("by name: %v, %v", ids, err)
	}
	if err := to.Import(ctx, id, false, copyOf(), attributes); reason(err) != kmip.ResultReasonObjectAlreadyExists {
		t.Errorf("twice: %v", err)
	}
	to.Role = RoleKeyManager
	if err := to.Import(ctx, id, true, copyOf(), attributes); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("replaced by a key manager: %v", err)
	}
	to.Role = RoleAdministrator
	other, _ := secret.Copy([]byte("fedcba9876543210"))
	n := m
	n.Bytes = other
	if err := to.Import(ctx, id, true, n, slices.DeleteFunc(slices.Clone(attributes), func(a kmip.Attribute) bool { return a.AttributeName == kmip.AttributeNameName })); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(keyBytes(t, to, id), []byte("fedcba9876543210")) {
		t.Error("it was not replaced")
	}
	if ids, _, err := to.Locate(ctx, Query{Attributes: []kmip.Attribute{named("n")}}); err != nil || len(ids) != 0 {
		t.Errorf("the name that is gone finds %v, %v", ids, err)
	}
	m.Bytes.Wipe()
	keyless := create(t, to)
	if _, _, err := to.Export(ctx, keyless, Form{}); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("export without the usage: %v", err)
	}
}

// TestArchive: an archived object is found and described, and of no other use.
func TestArchive(t *testing.T) {
	s := start(t, t.TempDir()).session()
	ctx := t.Context()
	id := create(t, s, named("n"))
	if err := s.Archive(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, id); reason(err) != kmip.ResultReasonObjectArchived {
		t.Errorf("Get: %v", err)
	}
	if err := s.Destroy(ctx, id); reason(err) != kmip.ResultReasonObjectArchived {
		t.Errorf("Destroy: %v", err)
	}
	if got := values(t, s, id, kmip.AttributeNameArchiveDate); len(got) != 1 {
		t.Errorf("Archive Date: %v", got)
	}
	for status, want := range map[kmip.StorageStatusMask]int{kmip.StorageStatusOnlineStorage: 0, kmip.StorageStatusArchivalStorage: 1, 0: 1} {
		if ids, _, err := s.Locate(ctx, Query{Status: status}); err != nil || len(ids) != want {
			t.Errorf("storage status %d: %v, %v", status, ids, err)
		}
	}
	if err := s.Recover(ctx, id); err != nil {
		t.Fatal(err)
	}
	keyBytes(t, s, id)
	if got := values(t, s, id, kmip.AttributeNameArchiveDate); len(got) != 0 {
		t.Errorf("Archive Date after Recover: %v", got)
	}
}

// TestGroups: fresh members in the order in which they came, default ones in
// turn.
func TestGroups(t *testing.T) {
	s := start(t, t.TempDir()).session()
	ctx := t.Context()
	group := attr(kmip.AttributeNameObjectGroup, "g")
	var all []string
	for range 3 {
		all = append(all, create(t, s, group))
	}
	ask := func(m kmip.ObjectGroupMember) []string {
		t.Helper()
		ids, _, err := s.Locate(ctx, Query{Attributes: []kmip.Attribute{group}, Member: m, Max: 1})
		if err != nil {
			t.Fatal(err)
		}
		return ids
	}
	for i := range 5 {
		if got := ask(kmip.ObjectGroupMemberDefault); !slices.Equal(got, all[i%3:i%3+1]) {
			t.Errorf("default %d: %v, want %s", i, got, all[i%3])
		}
	}
	for _, want := range all {
		if got := ask(kmip.ObjectGroupMemberFresh); !slices.Equal(got, []string{want}) {
			t.Errorf("fresh: %v, want %s", got, want)
		}
		keyBytes(t, s, want)
	}
	if got := ask(kmip.ObjectGroupMemberFresh); len(got) != 0 {
		t.Errorf("fresh after all were fetched: %v", got)
	}
	if _, _, err := s.Locate(ctx, Query{Member: kmip.ObjectGroupMemberFresh}); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("without a group: %v", err)
	}
}
