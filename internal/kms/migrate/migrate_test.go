package migrate

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kmipc"
	"mortise/internal/kmipc/kmipctest"
	"mortise/internal/kms"
	"mortise/internal/kms/kmipd"
	"mortise/internal/pki"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
	"mortise/internal/store"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("MIGRATE_TEST_CHILD"); dir != "" {
		child(dir)
	}
	os.Exit(m.Run())
}

func pair(t testing.TB, g pki.Grant, name string) tls.Certificate {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	g.Life = 24 * time.Hour
	cert, err := pki.SelfSigned(key, g, name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := pki.TLSCertificate([]*x509.Certificate{cert}, key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// openKMS opens the KMS in a folder, a new one if it is empty.
func openKMS(ctx context.Context, dir string) (*kms.KMS, func(), error) {
	root, err := rootkeytest.Keyring(dir)
	if err != nil {
		return nil, nil, err
	}
	s, err := store.Open(ctx, store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		return nil, nil, err
	}
	k, err := kms.Open(ctx, s, kms.Options{})
	if err == nil {
		err = k.Unlock(ctx, root)
	}
	return k, func() { k.Close(); s.Close(); root.Close() }, err
}

func administrator() kms.Actor {
	return kms.Actor{Kind: "socket", Name: "root", Role: kms.RoleAdministrator}
}

func target(t testing.TB, k *kms.KMS) *kms.Arrivals {
	t.Helper()
	a, err := k.Arrivals(t.Context(), administrator(), kms.DefaultInstance)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKMS(t testing.TB) *kms.KMS {
	t.Helper()
	k, stop, err := openKMS(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return k
}

// serveKMS is a source: a KMS of our own behind its KMIP front.
func serveKMS(t testing.TB) (*kms.KMS, func() *kms.Session, kmipc.LinkConfig, tls.Certificate) {
	t.Helper()
	k := newKMS(t)
	server, client := pair(t, pki.Grant{Server: true, Hosts: []string{"127.0.0.1"}}, "kms"), pair(t, pki.Grant{Client: true}, "migration")
	if _, err := k.AddClient(t.Context(), administrator(), kms.DefaultInstance, kms.NewClient{Certificate: client.Leaf, Role: kms.RoleAdministrator}); err != nil {
		t.Fatal(err)
	}
	creds, err := pki.NewCredentials([]*x509.Certificate{server.Leaf}, server.PrivateKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- kmipd.Serve(ctx, l, k, kmipd.Options{Credentials: creds}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	session := func() *kms.Session {
		s, err := k.Session(t.Context(), kms.DefaultInstance, client.Leaf, "192.0.2.1:1")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	return k, session, kmipc.LinkConfig{Address: l.Addr().String(), Certificate: client, Trust: kmipc.TrustPin(sha256.Sum256(server.Leaf.Raw))}, client
}

func aes(more ...kmip.Attribute) []kmip.Attribute {
	return append([]kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
	}, more...)
}

func named(name string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}}
}

func run(t *testing.T, cfg Config) (*Report, []Item) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var items []Item
	cfg.Each = func(i Item) { items = append(items, i) }
	r, err := Run(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r, items
}

// TestFromPyKMIP brings keys of every state from a server that is not ours.
func TestFromPyKMIP(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	client, server := pair(t, pki.Grant{Client: true}, "kmipClient"), pair(t, pki.Grant{Server: true}, "pykmip")
	if err := errors.Join(
		pki.SaveKeyPair(path("server.pem"), []*x509.Certificate{server.Leaf}, server.PrivateKey.(crypto.Signer)),
		pki.SaveCertificates(path("client.pem"), client.Leaf),
	); err != nil {
		t.Fatal(err)
	}
	py := kmipctest.Start(t, kmipctest.Files{Certificate: path("server.pem"), Key: path("server.pem"), ClientCA: path("client.pem"), Database: path("db")})
	src := kmipc.LinkConfig{Address: py.Address, Certificate: client, Trust: kmipc.TrustPin(sha256.Sum256(server.Leaf.Raw))}
	l, err := kmipc.DialLink(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ask := func(p kmip.OperationPayload) kmip.OperationPayload {
		t.Helper()
		a, err := l.Ask(t.Context(), kmip.V1_2, p)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	create := func(name string) string {
		return ask(&payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: aes(named(name))}}).(*payloads.CreateResponsePayload).UniqueIdentifier
	}
	revoke := func(id string, code kmip.RevocationReasonCode) {
		ask(&payloads.RevokeRequestPayload{UniqueIdentifier: id, RevocationReason: kmip.RevocationReason{RevocationReasonCode: code, RevocationMessage: "test"}})
	}
	pre, active, revoked, compromised, twin := create("pre-active"), create("active"), create("revoked"), create("compromised"), create("active")
	for _, id := range []string{active, revoked, compromised} {
		ask(&payloads.ActivateRequestPayload{UniqueIdentifier: id})
	}
	revoke(revoked, kmip.RevocationReasonCodeCessationOfOperation)
	revoke(compromised, kmip.RevocationReasonCodeKeyCompromise)
	pairOf := ask(&payloads.CreateKeyPairRequestPayload{
		CommonTemplateAttribute: &kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmRSA},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(2048)},
		}},
		PublicKeyTemplateAttribute:  &kmip.TemplateAttribute{Attribute: []kmip.Attribute{{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageVerify}}},
		PrivateKeyTemplateAttribute: &kmip.TemplateAttribute{Attribute: []kmip.Attribute{{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageSign}}},
	}).(*payloads.CreateKeyPairResponsePayload)
	password := []byte("a password that is kept there")
	secretData := ask(&payloads.RegisterRequestPayload{ObjectType: kmip.ObjectTypeSecretData,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageDeriveKey}}},
		Object: &kmip.SecretData{SecretDataType: kmip.SecretDataTypePassword, KeyBlock: kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeOpaque,
			KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &password}}}}},
	}).(*payloads.RegisterResponsePayload).UniqueIdentifier

	k := newKMS(t)
	cfg := Config{Source: src, Target: target(t, k)}
	cfg.DryRun = true
	r, items := run(t, cfg)
	if r.Total != 8 || r.Counts[Comes] != 6 || r.Counts[Cannot] != 2 || len(items) != 8 || !strings.Contains(r.Vendor, "PyKMIP") {
		t.Fatalf("dry run: %+v\n%+v", r, items)
	}
	for _, i := range items {
		if (i.ID == pairOf.PrivateKeyUniqueIdentifier || i.ID == pairOf.PublicKeyUniqueIdentifier) != (i.Fate == Cannot) || i.Type == "" || i.Fate == Cannot && !strings.Contains(i.Why, "not kept here") {
			t.Errorf("dry run: %+v", i)
		}
	}
	if _, _, found, _ := cfg.Target.Sum(t.Context(), active); found {
		t.Fatal("a dry run brought a key")
	}
	cfg.DryRun = false
	r, items = run(t, cfg)
	if r.Counts[Arrived] != 6 || r.Counts[Cannot] != 2 || r.Compared != 6 || !r.Complete() {
		t.Fatalf("%+v\n%+v", r, items)
	}
	for id, want := range map[string]kmip.State{pre: kmip.StatePreActive, active: kmip.StateActive, revoked: kmip.StateDeactivated, compromised: kmip.StateCompromised, twin: kmip.StatePreActive} {
		sum, state, found, err := cfg.Target.Sum(t.Context(), id)
		if err != nil || !found || state != want {
			t.Errorf("key %s is %v, want %v (%v)", id, state, want, err)
		}
		there := ask(&payloads.GetRequestPayload{UniqueIdentifier: id}).(*payloads.GetResponsePayload)
		material, err := there.Object.(*kmip.SymmetricKey).KeyMaterial()
		if err != nil || sha256.Sum256(material) != sum {
			t.Errorf("key %s has other bytes here", id)
		}
	}
	if sum, _, _, err := cfg.Target.Sum(t.Context(), secretData); err != nil || sum != sha256.Sum256(password) {
		t.Errorf("secret data: %v", err)
	}
	// Of two keys with one name one has it here, the other keeps it aside.
	if !slices.ContainsFunc(items, func(i Item) bool { return i.Fate == Arrived && strings.Contains(i.Why, nameAtSource) }) {
		t.Errorf("the name of two keys: %+v", items)
	}
	// Again: nothing to do.
	r, _ = run(t, cfg)
	if r.Counts[Here] != 6 || r.Counts[Arrived] != 0 || r.Compared != 6 {
		t.Errorf("the second time: %+v", r)
	}
}

// TestConflict: an object of the same identifier with other bytes is left alone.
func TestConflict(t *testing.T) {
	_, session, src, _ := serveKMS(t)
	id, err := session().Create(t.Context(), kmip.ObjectTypeSymmetricKey, aes(named("key")))
	if err != nil {
		t.Fatal(err)
	}
	k := newKMS(t)
	a := target(t, k)
	other, err := secret.Random(nil, 32)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Keep(t.Context(), id, kms.Material{Type: kmip.ObjectTypeSymmetricKey, Format: kmip.KeyFormatTypeRaw, Algorithm: kmip.CryptographicAlgorithmAES, Length: 256, Bytes: other}, aes()); err != nil {
		t.Fatal(err)
	}
	before, _, _, _ := a.Sum(t.Context(), id)
	r, items := run(t, Config{Source: src, Target: a})
	after, _, _, _ := a.Sum(t.Context(), id)
	if r.Counts[Conflict] != 1 || r.Complete() || before != after || len(items) != 1 || items[0].Fate != Conflict {
		t.Errorf("%+v %+v", r, items)
	}
	// A wrong thumbprint, or a server that is not there, ends it before it begins.
	src.Trust = kmipc.TrustPin([32]byte{})
	if _, err := Run(t.Context(), Config{Source: src, Target: a}); !errors.Is(err, kmipc.ErrCertificateChanged) {
		t.Errorf("another certificate: %v", err)
	}
	src.Address = "127.0.0.1:1"
	if _, err := Run(t.Context(), Config{Source: src, Target: a}); !errors.Is(err, kmipc.ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
}

// child imports into the KMS in dir until it is done or killed.
func child(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	chain, key, err := pki.LoadKeyPair(filepath.Join(dir, "client.pem"), filepath.Join(dir, "client.pem"))
	if err != nil {
		fail(err)
	}
	client, err := pki.TLSCertificate(chain, key)
	if err != nil {
		fail(err)
	}
	pin, err := pki.ParseThumbprint(os.Getenv("MIGRATE_TEST_PIN"))
	if err != nil {
		fail(err)
	}
	k, _, err := openKMS(context.Background(), dir)
	if err != nil {
		fail(err)
	}
	a, err := k.Arrivals(context.Background(), administrator(), kms.DefaultInstance)
	if err != nil {
		fail(err)
	}
	fmt.Println("begun")
	_, err = Run(context.Background(), Config{
		Source: kmipc.LinkConfig{Address: os.Getenv("MIGRATE_TEST_SOURCE"), Certificate: client, Trust: kmipc.TrustPin(pin)},
		Target: a,
	})
	if err != nil {
		fail(err)
	}
	os.Exit(0)
}

// TestKilled brings 2,000 keys from a KMS of our own, into a process that is
// killed three times on the way. In the end all are there, the same, once.
func TestKilled(t *testing.T) {
	const keys = 2000
	_, session, src, client := serveKMS(t)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := w; i < keys; i += 16 {
				s := session()
				id, err := s.Create(t.Context(), kmip.ObjectTypeSymmetricKey, aes(named(fmt.Sprint("key-", i)), kmip.Attribute{AttributeName: "x-Number", AttributeValue: fmt.Sprint(i)}))
				if err == nil && i%3 > 0 {
					err = s.Activate(t.Context(), id)
				}
				if err == nil && i%3 == 2 {
					err = s.Revoke(t.Context(), id, kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeSuperseded, RevocationMessage: "new one"}, time.Time{})
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	dir := t.TempDir()
	if err := pki.SaveKeyPair(filepath.Join(dir, "client.pem"), []*x509.Certificate{client.Leaf}, client.PrivateKey.(crypto.Signer)); err != nil {
		t.Fatal(err)
	}
	l, err := kmipc.DialLink(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	leaf := l.TLS().PeerCertificates[0]
	l.Close()
	sum := sha256.Sum256(leaf.Raw)
	for n, after := range []time.Duration{20 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "MIGRATE_TEST_CHILD="+dir, "MIGRATE_TEST_SOURCE="+src.Address, "MIGRATE_TEST_PIN="+hex.EncodeToString(sum[:]))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "begun\n" {
			t.Fatalf("child %d: %q %v %s", n, line, err, stderr.String())
		}
		time.Sleep(after)
		cmd.Process.Kill()
		if err := cmd.Wait(); err == nil {
			t.Logf("child %d was done before it was killed", n)
		}
	}
	k, stop, err := openKMS(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	began := time.Now()
	var last Progress
	cfg := Config{Source: src, Target: target(t, k), Report: func(p Progress) { last = p }}
	r, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d were here, %d arrived, %d compared in %s", r.Counts[Here], r.Counts[Arrived], r.Compared, time.Since(began).Round(time.Millisecond))
	if r.Counts[Here]+r.Counts[Arrived] != keys || r.Compared != keys || !r.Complete() || r.Total != keys {
		t.Errorf("%+v", r)
	}
	if r.Counts[Here] == 0 {
		t.Error("nothing was there before the last run: the kills proved nothing")
	}
	if last.Phase != "compare" || last.Done != keys || last.Total != keys || last.PerSecond <= 0 || last.Left != 0 {
		t.Errorf("last progress: %+v", last)
	}
	// Attributes came along: look at one of each state.
	if _, err := k.AddClient(t.Context(), administrator(), kms.DefaultInstance, kms.NewClient{Certificate: client.Leaf}); err != nil {
		t.Fatal(err)
	}
	here := func() *kms.Session {
		s, err := k.Session(t.Context(), kms.DefaultInstance, client.Leaf, "192.0.2.1:1")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for i := range 6 {
		ids, _, err := session().Locate(t.Context(), kms.Query{Attributes: []kmip.Attribute{named(fmt.Sprint("key-", i))}})
		if err != nil || len(ids) != 1 {
			t.Fatal(ids, err)
		}
		found, _, err := here().Locate(t.Context(), kms.Query{Attributes: []kmip.Attribute{named(fmt.Sprint("key-", i)), {AttributeName: "x-Number", AttributeValue: fmt.Sprint(i)}}})
		if err != nil || !slices.Equal(found, ids) {
			t.Errorf("by name and x- attribute: %q, want %q (%v)", found, ids, err)
		}
		for _, name := range []kmip.AttributeName{kmip.AttributeNameState, kmip.AttributeNameInitialDate, kmip.AttributeNameActivationDate, kmip.AttributeNameDeactivationDate, kmip.AttributeNameRevocationReason, kmip.AttributeNameDigest} {
			was, err1 := session().Attributes(t.Context(), ids[0], name)
			is, err2 := here().Attributes(t.Context(), ids[0], name)
			if err1 != nil || err2 != nil || fmt.Sprint(was) != fmt.Sprint(is) {
				t.Errorf("%s of key %d: %v here, %v there (%v, %v)", name, i, is, was, err1, err2)
			}
		}
	}
}

// TestPaging: servers that cannot page, and servers that say they can.
func TestPaging(t *testing.T) {
	for name, c := range map[string]struct {
		locate func(all []string, maximum, offset int) []string
		limit  int // of pages asked for
	}{
		"pages":              {func(all []string, m, o int) []string { return all[min(o, len(all)):min(o+m, len(all))] }, 5},
		"ignores the offset": {func(all []string, m, _ int) []string { return all[:min(m, len(all))] }, 4},
		"ignores both":       {func(all []string, _, _ int) []string { return all }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			var all []string
			for i := range 3*page + 7 {
				all = append(all, fmt.Sprint("id-", i))
			}
			asked := 0
			f := &fakeSource{locate: func(p *payloads.LocateRequestPayload) []string {
				asked++
				if p.MaximumItems == 0 {
					return all
				}
				return c.locate(all, int(p.MaximumItems), int(p.OffsetItems))
			}}
			s := &source{cfg: f.start(t), version: kmip.V1_4}
			defer s.close()
			got := map[string]bool{}
			if err := s.locate(t.Context(), func(ids []string) (news int) {
				for _, id := range ids {
					if !got[id] {
						got[id] = true
						news++
					}
				}
				return news
			}); err != nil {
				t.Fatal(err)
			}
			if len(got) != len(all) || asked > c.limit {
				t.Errorf("%d of %d with %d questions", len(got), len(all), asked)
			}
		})
	}
}
