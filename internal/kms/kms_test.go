package kms

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/secret"
)

// TestLifeCycle walks every transition of KMIP 1.4 §3.22 and every refusal.
func TestLifeCycle(t *testing.T) {
	s := start(t, t.TempDir()).session()
	ctx := t.Context()
	ops := map[string]func(id string) error{
		"activate": func(id string) error { return s.Activate(ctx, id) },
		"stop": func(id string) error {
			return s.Revoke(ctx, id, why(kmip.RevocationReasonCodeCessationOfOperation), time.Time{})
		},
		"compromise": func(id string) error {
			return s.Revoke(ctx, id, why(kmip.RevocationReasonCodeKeyCompromise), time.Time{})
		},
		"destroy": func(id string) error { return s.Destroy(ctx, id) },
	}
	const (
		denied  = kmip.ResultReasonPermissionDenied
		illegal = kmip.ResultReasonIllegalOperation
	)
	type step struct {
		do    string
		fails kmip.ResultReason
		state kmip.State
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"the usual way", []step{
			{"stop", illegal, kmip.StatePreActive}, {"activate", 0, kmip.StateActive}, {"activate", denied, kmip.StateActive},
			{"destroy", denied, kmip.StateActive}, {"stop", 0, kmip.StateDeactivated}, {"stop", illegal, kmip.StateDeactivated},
			{"activate", denied, kmip.StateDeactivated}, {"destroy", 0, kmip.StateDestroyed}, {"destroy", denied, kmip.StateDestroyed},
			{"activate", denied, kmip.StateDestroyed}, {"stop", illegal, kmip.StateDestroyed},
			{"compromise", 0, kmip.StateDestroyedCompromised}, {"compromise", denied, kmip.StateDestroyedCompromised},
		}},
		{"compromised before use", []step{{"compromise", 0, kmip.StateCompromised}, {"activate", denied, kmip.StateCompromised}, {"destroy", 0, kmip.StateDestroyedCompromised}}},
		{"compromised in use", []step{{"activate", 0, kmip.StateActive}, {"compromise", 0, kmip.StateCompromised}, {"compromise", denied, kmip.StateCompromised}}},
		{"compromised after use", []step{{"activate", 0, kmip.StateActive}, {"stop", 0, kmip.StateDeactivated}, {"compromise", 0, kmip.StateCompromised}}},
		{"never used", []step{{"destroy", 0, kmip.StateDestroyed}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := create(t, s)
			for i, st := range c.steps {
				if got := reason(ops[st.do](id)); got != st.fails {
					t.Fatalf("step %d, %s: reason %v, want %v", i, st.do, got, st.fails)
				}
				if got := state(t, s, id); got != st.state {
					t.Fatalf("after step %d, %s: %v, want %v", i, st.do, got, st.state)
				}
				_, err := s.Get(ctx, id)
				gone := st.state == kmip.StateDestroyed || st.state == kmip.StateDestroyedCompromised
				if gone != (reason(err) == kmip.ResultReasonItemNotFound) || !gone && err != nil {
					t.Fatalf("Get while %v: %v", st.state, err)
				}
			}
		})
	}
	for what, err := range map[string]error{
		"no reason":       s.Revoke(ctx, create(t, s), kmip.RevocationReason{}, time.Time{}),
		"occurrence":      s.Revoke(ctx, create(t, s), why(kmip.RevocationReasonCodeSuperseded), time.Now()),
		"year 200000":     s.Revoke(ctx, create(t, s), why(kmip.RevocationReasonCodeKeyCompromise), time.Unix(1<<43, 0)),
		"before all time": s.Revoke(ctx, create(t, s), why(kmip.RevocationReasonCodeKeyCompromise), time.Unix(-1<<60, 0)),
		"a date of no time": func() error {
			_, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(attr(kmip.AttributeNameActivationDate, time.Unix(1<<43, 0))))
			return err
		}(),
	} {
		if reason(err) != kmip.ResultReasonInvalidField {
			t.Errorf("%s: %v, want Invalid Field", what, err)
		}
	}
}

func why(code kmip.RevocationReasonCode) kmip.RevocationReason {
	return kmip.RevocationReason{RevocationReasonCode: code, RevocationMessage: "because"}
}

// TestDates: dates move an object through its life without anybody's doing.
func TestDates(t *testing.T) {
	f := start(t, t.TempDir())
	s := f.session()
	ctx := t.Context()
	now := s.now()
	id := create(t, s, attr(kmip.AttributeNameActivationDate, now.Add(time.Hour)), attr(kmip.AttributeNameDeactivationDate, now.Add(2*time.Hour)))
	if got := state(t, s, id); got != kmip.StatePreActive {
		t.Fatalf("before its activation date: %v", got)
	}
	if _, err := s.ModifyAttribute(ctx, id, attr(kmip.AttributeNameDeactivationDate, now)); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("deactivation before activation: %v", err)
	}
	f.clock.pass(time.Hour)
	if got := state(t, s, id); got != kmip.StateActive {
		t.Fatalf("at its activation date: %v", got)
	}
	if _, err := s.ModifyAttribute(ctx, id, attr(kmip.AttributeNameActivationDate, now)); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("changing the activation date of an Active key: %v", err)
	}
	if _, err := s.ModifyAttribute(ctx, id, attr(kmip.AttributeNameDeactivationDate, now.Add(3*time.Hour))); err != nil {
		t.Errorf("postponing the deactivation: %v", err)
	}
	f.clock.pass(2 * time.Hour)
	if ids, _, err := s.Locate(ctx, Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameState, kmip.StateDeactivated)}}); err != nil || !slices.Equal(ids, []string{id}) {
		t.Errorf("Locate of deactivated keys: %v, %v", ids, err)
	}
	if err := f.sweep(ctx); err != nil {
		t.Fatal(err)
	}
	e, err := s.inst.objects.Get(ctx, id)
	if err != nil || e.Value.State != kmip.StateDeactivated {
		t.Errorf("the sweep wrote %v, %v", e.Value.State, err)
	}
	past := create(t, s, attr(kmip.AttributeNameActivationDate, now.Add(-time.Hour)))
	if got := state(t, s, past); got != kmip.StateActive {
		t.Errorf("created with an activation date in the past: %v", got)
	}
}

// TestPurge: a destroyed key's bytes are kept, sealed, for the grace time.
func TestPurge(t *testing.T) {
	f := start(t, t.TempDir())
	s := f.session()
	id := create(t, s)
	if err := s.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	material := func() int {
		if err := f.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		e, err := s.inst.objects.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return e.Value.material
	}
	f.clock.pass(GraceTime - time.Minute)
	if n := material(); n != 32 {
		t.Errorf("%d bytes within the grace time, want 32", n)
	}
	f.clock.pass(2 * time.Minute)
	if n := material(); n != 0 {
		t.Errorf("%d bytes after the grace time, want none", n)
	}
	if got := state(t, s, id); got != kmip.StateDestroyed {
		t.Errorf("a purged object is %v", got)
	}
}

func TestCreateRefuses(t *testing.T) {
	s := start(t, t.TempDir()).session()
	without := func(name kmip.AttributeName) []kmip.Attribute {
		return slices.DeleteFunc(aes256(), func(a kmip.Attribute) bool { return a.AttributeName == name })
	}
	replaced := func(a kmip.Attribute) []kmip.Attribute { return append(without(a.AttributeName), a) }
	big := strings.Repeat("x", maxAttributeBytes)
	for what, attributes := range map[string][]kmip.Attribute{
		"no algorithm":           without(kmip.AttributeNameCryptographicAlgorithm),
		"no mask":                without(kmip.AttributeNameCryptographicUsageMask),
		"DES":                    replaced(attr(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmDES)),
		"AES-512":                replaced(attr(kmip.AttributeNameCryptographicLength, int32(512))),
		"negative length":        replaced(attr(kmip.AttributeNameCryptographicLength, int32(-256))),
		"length twice":           aes256(attr(kmip.AttributeNameCryptographicLength, int32(256))),
		"length of a wrong type": replaced(attr(kmip.AttributeNameCryptographicLength, "256")),
		"State":                  aes256(attr(kmip.AttributeNameState, kmip.StateActive)),
		"unknown attribute":      aes256(custom("Sensitive", "")),
		"y- attribute":           aes256(custom("y-server", "v")),
		"name twice":             aes256(named("a"), named("a")),
		"empty name":             aes256(named("")),
		"contact twice":          aes256(attr(kmip.AttributeNameContactInformation, "a"), attr(kmip.AttributeNameContactInformation, "b")),
		"no value":               aes256(attr("x-a", nil)),
	} {
		if _, err := s.Create(t.Context(), kmip.ObjectTypeSymmetricKey, attributes); reason(err) != kmip.ResultReasonInvalidField {
			t.Errorf("%s: %v, want Invalid Field", what, err)
		}
	}
	if _, err := s.Create(t.Context(), kmip.ObjectTypeSymmetricKey, aes256(custom("x-big", big))); reason(err) != kmip.ResultReasonIndexOutofBounds {
		t.Errorf("64 KiB of attributes: %v", err)
	}
	if _, err := s.Create(t.Context(), kmip.ObjectTypeCertificate, aes256()); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("creating a certificate: %v", err)
	}
	if ids, total, err := s.Locate(t.Context(), Query{}); err != nil || total != 0 {
		t.Errorf("refused creates left %v, %v", ids, err)
	}
}

func TestAttributes(t *testing.T) {
	s := start(t, t.TempDir()).session()
	ctx := t.Context()
	id := create(t, s, custom("x-Product", "VMware vSphere"))
	if got, err := s.Attributes(ctx, id, "x-Vendor", "x-Product"); err != nil || len(got) != 1 || got[0].AttributeValue.(ttlv.Value).Value != "VMware vSphere" {
		t.Errorf("a missing and a present attribute: %v, %v", got, err)
	}
	if _, err := s.Attributes(ctx, id, "State", "State"); reason(err) != kmip.ResultReasonInvalidMessage {
		t.Errorf("a name twice: %v", err)
	}
	for i := range 3 {
		a, err := s.AddAttribute(ctx, id, custom("x-Multi", fmt.Sprint(i)))
		if err != nil || i == 0 && a.AttributeIndex != nil || i > 0 && *a.AttributeIndex != int32(i) {
			t.Errorf("instance %d was added as %+v, %v", i, a, err)
		}
	}
	one := int32(1)
	mod := custom("x-Multi", "changed")
	mod.AttributeIndex = &one
	if _, err := s.ModifyAttribute(ctx, id, mod); err != nil {
		t.Error(err)
	}
	if _, err := s.DeleteAttribute(ctx, id, "x-Multi", nil); err != nil {
		t.Error(err)
	}
	got, err := s.Attributes(ctx, id, "x-Multi")
	if err != nil || len(got) != 2 || *got[0].AttributeIndex != 1 || got[0].AttributeValue.(ttlv.Value).Value != "changed" || *got[1].AttributeIndex != 2 {
		t.Errorf("after a change and a deletion: %+v, %v", got, err)
	}
	_, missing := s.DeleteAttribute(ctx, id, "x-Multi", new(int32))
	_, server := s.DeleteAttribute(ctx, id, "State", nil)
	_, readOnly := s.ModifyAttribute(ctx, id, attr(kmip.AttributeNameCryptographicLength, int32(128)))
	_, absent := s.ModifyAttribute(ctx, id, custom("x-None", ""))
	_, added := s.AddAttribute(ctx, id, attr(kmip.AttributeNameState, kmip.StateActive))
	for what, c := range map[string]struct {
		err  error
		want kmip.ResultReason
	}{
		"delete of a gone instance": {missing, kmip.ResultReasonItemNotFound},
		"delete of State":           {server, kmip.ResultReasonPermissionDenied},
		"modify of the length":      {readOnly, kmip.ResultReasonPermissionDenied},
		"modify of a missing one":   {absent, kmip.ResultReasonInvalidField},
		"adding State":              {added, kmip.ResultReasonPermissionDenied},
	} {
		if reason(c.err) != c.want {
			t.Errorf("%s: %v", what, c.err)
		}
	}
}

// TestNames: a name belongs to one living object at a time.
func TestNames(t *testing.T) {
	f := start(t, t.TempDir())
	s := f.session()
	ctx := t.Context()
	find := func(name string) []string {
		ids, _, err := s.Locate(ctx, Query{Attributes: []kmip.Attribute{named(name)}})
		if err != nil {
			t.Fatal(err)
		}
		return ids
	}
	a, b := create(t, s, named("a"), named("a2")), create(t, s)
	if _, err := s.Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("a2"))); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("creating with a taken name: %v", err)
	}
	if _, err := s.AddAttribute(ctx, b, named("a")); reason(err) != kmip.ResultReasonIllegalOperation {
		t.Errorf("adding a taken name: %v", err)
	}
	if _, err := s.AddAttribute(ctx, b, named("b")); err != nil {
		t.Error(err)
	}
	if _, err := s.ModifyAttribute(ctx, a, named("renamed")); err != nil {
		t.Error(err)
	}
	if len(find("a")) != 0 || !slices.Equal(find("renamed"), []string{a}) || !slices.Equal(find("b"), []string{b}) {
		t.Errorf("a: %v, renamed: %v, b: %v", find("a"), find("renamed"), find("b"))
	}
	if err := s.Destroy(ctx, a); err != nil {
		t.Fatal(err)
	}
	c := create(t, s, named("renamed"), named("a2"))
	if !slices.Equal(find("renamed"), []string{c}) {
		t.Errorf("after its holder was destroyed the name finds %v", find("renamed"))
	}
	if _, err := s.AddAttribute(ctx, a, named("again")); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("naming a destroyed object: %v", err)
	}
	var wg sync.WaitGroup
	won := make(chan string, 8)
	for range 8 {
		wg.Go(func() {
			if id, err := f.session().Create(ctx, kmip.ObjectTypeSymmetricKey, aes256(named("race"))); err == nil {
				won <- id
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d of 8 concurrent creates took one name", len(won))
	}
}

func TestLocate(t *testing.T) {
	f := start(t, t.TempDir())
	s := f.session()
	ctx := t.Context()
	var ids []string
	for i := range 6 {
		f.clock.pass(time.Minute)
		ids = append(ids, create(t, s, custom("x-Parity", fmt.Sprint(i%2)), attr(kmip.AttributeNameObjectGroup, "g")))
	}
	slices.Reverse(ids) // newest first
	if err := s.Destroy(ctx, ids[5]); err != nil {
		t.Fatal(err)
	}
	now := s.now()
	for _, c := range []struct {
		what  string
		q     Query
		want  []string
		total int
	}{
		{"all", Query{}, ids[:5], 5},
		{"some", Query{Offset: 1, Max: 2}, ids[1:3], 5},
		{"past the end", Query{Offset: 9, Max: 2}, nil, 5},
		{"by x- attribute", Query{Attributes: []kmip.Attribute{custom("x-Parity", "1")}}, []string{ids[0], ids[2], ids[4]}, 3},
		{"by two attributes", Query{Attributes: []kmip.Attribute{custom("x-Parity", "0"), attr(kmip.AttributeNameObjectGroup, "g")}}, []string{ids[1], ids[3]}, 2},
		{"by an other value", Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameObjectGroup, "h")}}, nil, 0},
		{"by algorithm", Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmAES)}}, ids[:5], 5},
		{"by id", Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameUniqueIdentifier, ids[3])}}, ids[3:4], 1},
		{"destroyed", Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameState, kmip.StateDestroyed)}}, ids[5:], 1},
		{"by a date", Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameInitialDate, now)}}, ids[:1], 1},
		{"by a range", Query{Attributes: []kmip.Attribute{attr(kmip.AttributeNameInitialDate, now), attr(kmip.AttributeNameInitialDate, now.Add(-2*time.Minute))}}, ids[:3], 3},
		{"archived", Query{Status: kmip.StorageStatusArchivalStorage}, nil, 0},
		{"online", Query{Status: kmip.StorageStatusOnlineStorage}, ids[:5], 5},
	} {
		got, total, err := s.Locate(ctx, c.q)
		if err != nil || !slices.Equal(got, c.want) || total != c.total {
			t.Errorf("%s: %v, %d, %v; want %v, %d", c.what, got, total, err, c.want, c.total)
		}
	}
	for what, q := range map[string]Query{
		"misspelled":     {Attributes: []kmip.Attribute{custom("Nmae", "a")}},
		"negative":       {Max: -1},
		"three dates":    {Attributes: []kmip.Attribute{attr(kmip.AttributeNameInitialDate, now), attr(kmip.AttributeNameInitialDate, now.Add(1e9)), attr(kmip.AttributeNameInitialDate, now)}},
		"without values": {Attributes: []kmip.Attribute{attr("x-a", nil)}},
	} {
		if _, _, err := s.Locate(ctx, q); reason(err) != kmip.ResultReasonInvalidField {
			t.Errorf("%s: %v, want Invalid Field", what, err)
		}
	}
}

func TestRegister(t *testing.T) {
	s := start(t, t.TempDir()).session()
	ctx := t.Context()
	material := func(m Material, b []byte) Material {
		m.Bytes, _ = secret.Copy(b)
		return m
	}
	raw := bytes.Repeat([]byte("k"), 32)
	id, err := s.Register(ctx, material(Material{Type: kmip.ObjectTypeSymmetricKey, Algorithm: kmip.CryptographicAlgorithmAES, Length: 256}, raw),
		[]kmip.Attribute{attr(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageMask(-1<<31|4))})
	if err != nil || !bytes.Equal(keyBytes(t, s, id), raw) {
		t.Fatalf("a registered key: %v", err)
	}
	if a, err := s.Attributes(ctx, id, kmip.AttributeNameCryptographicUsageMask, kmip.AttributeNameCryptographicLength); err != nil || a[0].AttributeValue != kmip.CryptographicUsageMask(-1<<31|4) || a[1].AttributeValue != int32(256) {
		t.Errorf("attributes of a registered key: %v, %v", a, err)
	}
	word, err := s.Register(ctx, material(Material{Type: kmip.ObjectTypeSecretData, Subtype: uint32(kmip.SecretDataTypePassword)}, []byte("password")), nil)
	if err != nil || string(keyBytes(t, s, word)) != "password" {
		t.Errorf("secret data: %v", err)
	}
	blob, err := s.Register(ctx, material(Material{Type: kmip.ObjectTypeOpaqueObject}, make([]byte, MaxMaterial)), nil)
	if err != nil {
		t.Errorf("an opaque object: %v", err)
	}
	if a, err := s.Attributes(ctx, blob, kmip.AttributeNameState, kmip.AttributeNameDigest); err != nil || len(a) != 0 {
		t.Errorf("an opaque object has %v, %v", a, err)
	}
	if err := s.Activate(ctx, blob); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("activating an opaque object: %v", err)
	}
	mask := attr(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageEncrypt)
	for what, c := range map[string]struct {
		m Material
		a []kmip.Attribute
	}{
		"certificate":     {material(Material{Type: kmip.ObjectTypeCertificate}, raw), nil},
		"no algorithm":    {material(Material{Type: kmip.ObjectTypeSymmetricKey}, raw), []kmip.Attribute{mask}},
		"no mask":         {material(Material{Type: kmip.ObjectTypeSymmetricKey, Algorithm: kmip.CryptographicAlgorithmAES}, raw), nil},
		"wrong length":    {material(Material{Type: kmip.ObjectTypeSymmetricKey, Algorithm: kmip.CryptographicAlgorithmAES, Length: 128}, raw), []kmip.Attribute{mask}},
		"AES of 31 bytes": {material(Material{Type: kmip.ObjectTypeSymmetricKey, Algorithm: kmip.CryptographicAlgorithmAES}, raw[:31]), []kmip.Attribute{mask}},
		"contradiction":   {material(Material{Type: kmip.ObjectTypeSymmetricKey, Algorithm: kmip.CryptographicAlgorithmAES}, raw), []kmip.Attribute{mask, attr(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmDES)}},
	} {
		if _, err := s.Register(ctx, c.m, c.a); reason(err) != kmip.ResultReasonInvalidField {
			t.Errorf("%s: %v, want Invalid Field", what, err)
		}
		if c.m.Bytes.Len() != 0 {
			t.Errorf("%s: the refused bytes were not wiped", what)
		}
	}
}
