package kmipd

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kms"
)

// tenant is a client of one instance.
type tenant struct {
	t    *testing.T
	b    *bed
	cert tls.Certificate
	sni  string // TLS server name that it sends
	addr string
}

// tenant makes an instance with a client of that role.
func (b *bed) tenant(t *testing.T, id string, role kms.Role, s kms.Settings) *tenant {
	t.Helper()
	if id != kms.DefaultInstance {
		if _, err := b.CreateInstance(t.Context(), kms.Actor{}, id, "", s); err != nil {
			t.Fatal(err)
		}
	}
	c := &tenant{t, b, newClient(t, time.Now(), time.Hour), id + ".example.com", b.addr}
	if _, err := b.AddClient(t.Context(), kms.Actor{}, id, kms.NewClient{Name: "of " + id, Certificate: c.cert.Leaf, Role: role}); err != nil {
		t.Fatal(err)
	}
	return c
}

// dial connects; the handshake has been made.
func (c *tenant) dial() (*tls.Conn, error) {
	conn, err := tls.Dial("tcp", c.addr, &tls.Config{
		Certificates: []tls.Certificate{c.cert}, ServerName: c.sni, InsecureSkipVerify: true,
	})
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn, nil
}

// do sends one message on a new connection.
func (c *tenant) do(items ...kmip.RequestBatchItem) []kmip.ResponseBatchItem {
	c.t.Helper()
	conn, err := c.dial()
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	list, err := c.ask(conn, items...)
	if err != nil {
		c.t.Fatal(err)
	}
	return list
}

func (c *tenant) ask(conn net.Conn, items ...kmip.RequestBatchItem) ([]kmip.ResponseBatchItem, error) {
	req := kmip.RequestMessage{
		Header: kmip.RequestHeader{ProtocolVersion: kmip.V1_4, BatchCount: int32(len(items)),
			BatchErrorContinuationOption: kmip.BatchErrorContinuationOptionContinue},
		BatchItem: items,
	}
	if _, err := conn.Write(wireOf(req)); err != nil {
		return nil, err
	}
	answer, _, err := receive(conn)
	return answer.BatchItem, err
}

func op(code kmip.Operation, p kmip.OperationPayload) kmip.RequestBatchItem {
	return kmip.RequestBatchItem{Operation: code, RequestPayload: p}
}

func attributeNamed(name string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}}
}

func createNamed(name string) kmip.RequestBatchItem {
	return op(kmip.OperationCreate, &payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt | kmip.CryptographicUsageWrapKey},
			attributeNamed(name),
		}},
	})
}

func (c *tenant) create(name string) string {
	c.t.Helper()
	r := c.do(createNamed(name))
	if r[0].ResultStatus != kmip.ResultStatusSuccess {
		c.t.Fatalf("create: %+v", r[0])
	}
	return r[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
}

// TestIsolation: whatever a client of one instance asks about another's object,
// by id, name, as a wrapping key or through a batch's placeholder, there is no
// such object (S2).
func TestIsolation(t *testing.T) {
	b := serve(t, Options{})
	a := b.tenant(t, "tenant-a", kms.RoleAdministrator, kms.Settings{})
	other := b.tenant(t, "tenant-b", kms.RoleAdministrator, kms.Settings{})
	theirs, mine := a.create("payroll"), other.create("payroll") // a name is free in each instance
	guess := func(id string) []kmip.RequestBatchItem {
		return []kmip.RequestBatchItem{
			op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: id}),
			op(kmip.OperationGetAttributes, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}),
			op(kmip.OperationGetAttributeList, &payloads.GetAttributeListRequestPayload{UniqueIdentifier: id}),
			op(kmip.OperationAddAttribute, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: attributeNamed("x")}),
			op(kmip.OperationModifyAttribute, &payloads.ModifyAttributeRequestPayload{UniqueIdentifier: id, Attribute: attributeNamed("x")}),
			op(kmip.OperationDeleteAttribute, &payloads.DeleteAttributeRequestPayload{UniqueIdentifier: id, AttributeName: kmip.AttributeNameName}),
			op(kmip.OperationActivate, &payloads.ActivateRequestPayload{UniqueIdentifier: id}),
			op(kmip.OperationRevoke, &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}}),
			op(kmip.OperationDestroy, &payloads.DestroyRequestPayload{UniqueIdentifier: id}),
			op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: "../object-tenant-a/" + id}),
			op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: "tenant-a/" + id}),
		}
	}
	nothing := guess("7f3dd0c2-0000-4000-8000-000000000000")
	for i, r := range other.do(guess(theirs)...) {
		none := other.do(nothing[i])[0]
		if r.ResultReason != kmip.ResultReasonItemNotFound || r.ResultReason != none.ResultReason || r.ResultMessage != none.ResultMessage {
			t.Errorf("%d %v of another's object: %v %q; of none: %v %q", i, r.Operation, r.ResultReason, r.ResultMessage, none.ResultReason, none.ResultMessage)
		}
	}
	// Another's key does not wrap mine.
	r := other.do(op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: mine, KeyWrappingSpecification: &kmip.KeyWrappingSpecification{
		WrappingMethod: kmip.WrappingMethodEncrypt, EncryptionKeyInformation: &kmip.EncryptionKeyInformation{UniqueIdentifier: theirs},
	}}))[0]
	if r.ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("wrapped by another's key: %+v", r)
	}
	// Locate finds mine only, by name and without; its placeholder leads to mine.
	for _, filter := range [][]kmip.Attribute{{attributeNamed("payroll")}, nil} {
		l := other.do(op(kmip.OperationLocate, &payloads.LocateRequestPayload{Attribute: filter}), op(kmip.OperationGet, &payloads.GetRequestPayload{}))
		if ids := l[0].ResponsePayload.(*payloads.LocateResponsePayload).UniqueIdentifier; !slices.Equal(ids, []string{mine}) {
			t.Errorf("Locate %v: %v", filter, ids)
		}
		if l[1].ResultStatus == kmip.ResultStatusSuccess && l[1].ResponsePayload.(*payloads.GetResponsePayload).UniqueIdentifier != mine {
			t.Errorf("the placeholder led to %+v", l[1].ResponsePayload)
		}
	}
	// The object is as it was.
	if r := a.do(op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: theirs}))[0]; r.ResultStatus != kmip.ResultStatusSuccess {
		t.Errorf("its owner: %+v", r)
	}
	// A certificate is let in where it is pinned, whatever name it sends.
	wrong := *other
	wrong.sni = a.sni
	if conn, err := wrong.dial(); err == nil {
		if _, err := wrong.ask(conn, op(kmip.OperationLocate, &payloads.LocateRequestPayload{})); err == nil {
			t.Error("a client of tenant-b was served by tenant-a")
		}
		conn.Close()
	}
}

// TestRouting: by server name, by an own port that comes and goes, and strictly.
func TestRouting(t *testing.T) {
	b := serve(t, Options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	a := b.tenant(t, "tenant-a", kms.RoleAdministrator, kms.Settings{ServerName: "keys.tenant.example.com", Port: port})
	d := b.tenant(t, kms.DefaultInstance, kms.RoleAdministrator, kms.Settings{})
	works := func(c *tenant) bool {
		conn, err := c.dial()
		if err != nil {
			return false
		}
		defer conn.Close()
		r, err := c.ask(conn, op(kmip.OperationLocate, &payloads.LocateRequestPayload{}))
		return err == nil && r[0].ResultStatus == kmip.ResultStatusSuccess
	}
	with := func(c *tenant, sni, addr string) *tenant { d := *c; d.sni, d.addr = sni, addr; return &d }
	soon := func(what string, f func() bool) {
		t.Helper()
		for range 100 {
			if f() {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Errorf("%s does not come", what)
	}
	own := fmt.Sprintf("127.0.0.1:%d", port)
	soon("the own port", func() bool { return works(with(a, "", own)) })
	for _, c := range []struct {
		name string
		c    *tenant
		want bool
	}{
		{"by its name", with(a, "keys.tenant.example.com", b.addr), true},
		{"by its name in capitals", with(a, "KEYS.Tenant.example.com", b.addr), true},
		{"by its id, which is not its name", with(a, "tenant-a.example.com", b.addr), false},
		{"without a name", with(a, "", b.addr), false},
		{"default at another's port", with(d, "", own), false},
		{"default without a name", with(d, "", b.addr), true},
		{"default by an unknown name", with(d, "nobody.example.com", b.addr), true},
		{"default by its name", with(d, "default.example.com", b.addr), true},
	} {
		if works(c.c) != c.want {
			t.Errorf("%s: served is %v", c.name, !c.want)
		}
	}
	strict, none := true, 0
	if _, err := b.ChangeInstance(t.Context(), kms.Actor{}, kms.DefaultInstance, kms.InstanceChange{Strict: &strict}); err != nil {
		t.Fatal(err)
	}
	if works(with(d, "", b.addr)) || works(with(d, "nobody.example.com", b.addr)) || !works(with(d, "default.example.com", b.addr)) {
		t.Error("a strict default instance takes connections by its name only")
	}
	if _, err := b.ChangeInstance(t.Context(), kms.Actor{}, "tenant-a", kms.InstanceChange{Port: &none}); err != nil {
		t.Fatal(err)
	}
	soon("the end of the own port", func() bool { _, err := net.Dial("tcp", own); return err != nil })
}

// TestGrantRolesAndQuotas from the wire: each is answered in KMIP's words, at
// once, on a connection that is open.
func TestGrantRolesAndQuotas(t *testing.T) {
	b := serve(t, Options{})
	a := b.tenant(t, "tenant-a", kms.RoleAdministrator, kms.Settings{Quota: kms.Quota{Objects: 2}})
	by := kms.Actor{Kind: "socket", Name: "root"}
	conn, err := a.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	id := a.create("one")
	get := op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: id})
	if r, err := a.ask(conn, get); err != nil || r[0].ResultStatus != kmip.ResultStatusSuccess {
		t.Fatalf("%+v, %v", r, err)
	}
	a.create("two")
	if r := a.do(createNamed("three"))[0]; r.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(r.ResultMessage, "quota of 2 objects") {
		t.Errorf("over the quota: %+v", r)
	}
	a.do(op(kmip.OperationDestroy, &payloads.DestroyRequestPayload{UniqueIdentifier: id}))
	id = a.create("three") // a destroyed one does not count
	get = op(kmip.OperationGet, &payloads.GetRequestPayload{UniqueIdentifier: id})

	pace := kms.Quota{RequestsPerSecond: 5}
	if _, err := b.ChangeInstance(t.Context(), by, "tenant-a", kms.InstanceChange{Quota: &pace}); err != nil {
		t.Fatal(err)
	}
	over := 0
	for _, r := range a.do(slices.Repeat([]kmip.RequestBatchItem{get}, 50)...) {
		if r.ResultStatus != kmip.ResultStatusSuccess {
			if over++; !strings.Contains(r.ResultMessage, "5 requests a second") {
				t.Fatalf("%+v", r)
			}
		}
	}
	if over < 30 {
		t.Errorf("%d of 50 requests at once were over a quota of 5 a second", over)
	}
	if _, err := b.ChangeInstance(t.Context(), by, "tenant-a", kms.InstanceChange{Quota: &kms.Quota{}}); err != nil {
		t.Fatal(err)
	}

	if _, err := b.UngrantInstance(t.Context(), by, "tenant-a"); err != nil {
		t.Fatal(err)
	}
	if r, err := a.ask(conn, get); err != nil || r[0].ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(r[0].ResultMessage, "locked") {
		t.Errorf("on an open connection, ungranted: %+v, %v", r, err)
	}
	if r := a.do(get)[0]; r.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(r.ResultMessage, "locked") {
		t.Errorf("ungranted: %+v", r)
	}
	if _, err := b.GrantInstance(t.Context(), by, "tenant-a"); err != nil {
		t.Fatal(err)
	}
	if r := a.do(get)[0]; r.ResultStatus != kmip.ResultStatusSuccess {
		t.Errorf("granted again: %+v", r)
	}

	for _, c := range []struct {
		role kms.Role
		want []bool // Get, GetAttributes, Create, Revoke
	}{
		{kms.RoleViewer, []bool{false, true, false, false}},
		{kms.RoleKeyManager, []bool{true, true, true, false}},
	} {
		who := *a
		who.cert = newClient(t, time.Now(), time.Hour)
		added, err := b.AddClient(t.Context(), by, "tenant-a", kms.NewClient{Name: string(c.role), Certificate: who.cert.Leaf, Role: c.role})
		if err != nil {
			t.Fatal(err)
		}
		open, err := who.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		list, err := who.ask(open, get, op(kmip.OperationGetAttributes, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}), createNamed(string(c.role)),
			op(kmip.OperationRevoke, &payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeKeyCompromise}}))
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range list {
			if (r.ResultStatus == kmip.ResultStatusSuccess) != c.want[i] || !c.want[i] && r.ResultReason != kmip.ResultReasonPermissionDenied {
				t.Errorf("%v as %s: %+v", r.Operation, c.role, r)
			}
		}
		// Revoked in mid-connection: its rights end with the next message.
		if _, err := b.RemoveClient(t.Context(), by, "tenant-a", added.Fingerprint); err != nil {
			t.Fatal(err)
		}
		if r, err := who.ask(open, op(kmip.OperationGetAttributes, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id})); err == nil && r[0].ResultReason != kmip.ResultReasonPermissionDenied {
			t.Errorf("revoked in mid-connection: %+v", r)
		}
	}

	// Deleted: its certificate is a stranger's; the id may be used again.
	var confirm *kms.Confirmation
	err = b.DeleteInstance(context.Background(), by, "tenant-a", "")
	if confirm, _ = err.(*kms.Confirmation); confirm == nil || !slices.ContainsFunc(confirm.Lost, func(l string) bool { return strings.Contains(l, id) }) {
		t.Fatalf("deleting: %v", err)
	}
	late := a.create("late") // the list has changed
	if err := b.DeleteInstance(context.Background(), by, "tenant-a", confirm.Hash); err == nil || !strings.Contains(fmt.Sprint(err.(*kms.Confirmation).Lost), late) {
		t.Fatalf("deleting by an old list: %v", err)
	} else if err := b.DeleteInstance(context.Background(), by, "tenant-a", err.(*kms.Confirmation).Hash); err != nil {
		t.Fatal(err)
	}
	if r, err := a.ask(conn, get); err == nil && r[0].ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("of a deleted instance: %+v", r)
	}
	again := b.tenant(t, "tenant-a", kms.RoleAdministrator, kms.Settings{})
	if r := again.do(get)[0]; r.ResultReason != kmip.ResultReasonItemNotFound {
		t.Errorf("an instance of the same id has an object of the deleted one: %+v", r)
	}
}
