package center_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/center/centertest"
	"mortise/internal/inventory"
	"mortise/internal/pki"
	"mortise/internal/policy"
	"mortise/internal/store"
	"mortise/internal/task"
)

func TestFirstStart(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	ctx := t.Context()
	if len(w.password) < 20 {
		t.Fatalf("the generated password has %d characters", len(w.password))
	}
	s, err := w.c.Login(ctx, authz.Administrator, w.password, "test", "127.0.0.1")
	w.must(err)
	if got, ok := w.c.Session(s.Token); !ok || got.Principal != w.p {
		t.Errorf("the session is %+v", got)
	}
	_, err = w.c.Login(ctx, authz.Administrator, "wrong", "test", "127.0.0.1")
	f := w.faulted(task.InvalidLogin, "wrong", err)
	_, err = w.c.Login(ctx, "nobody", "wrong", "test", "127.0.0.1")
	if g := w.faulted(task.InvalidLogin, "wrong", err); g.Message != f.Message {
		t.Errorf("a wrong user says %q, a wrong password %q", g.Message, f.Message)
	}
	w.c.Logout(s.Token)
	if _, ok := w.c.Session(s.Token); ok {
		t.Error("the session is still good")
	}
	if _, err := w.tryOpen(); !errors.Is(err, store.ErrLocked) {
		t.Errorf("a second center on the same state: %v", err)
	}
	// The password is nowhere on disk.
	w.close()
	filepath.WalkDir(w.dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), w.password) {
				t.Errorf("%s holds the password", path)
			}
		}
		return nil
	})
	// Another root key does not open the state.
	w.must(os.Rename(filepath.Join(w.dir, "root.key"), filepath.Join(w.dir, "root.key.old")))
	if c, err := w.tryOpen(); err == nil || !strings.Contains(err.Error(), "root key") {
		t.Errorf("with another root key: %v, %v", c, err)
	}
	w.must(os.Rename(filepath.Join(w.dir, "root.key.old"), filepath.Join(w.dir, "root.key")))
	w.open()
	if w.c.InitialPassword() != "" {
		t.Error("a second password was made")
	}
}

// Adding a KMS, step by step, and what each missing step says (K13).
func TestProviderSetup(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	ctx := t.Context()
	status := func() center.ServerStatus {
		t.Helper()
		list, err := w.c.ProviderStatus(ctx, w.p, provider)
		w.must(err)
		if len(list) != 1 {
			t.Fatalf("status of %d servers", len(list))
		}
		return list[0]
	}
	_, err := w.c.GenerateKey(ctx, w.p, "")
	w.faulted(task.ProviderError, "default provider", err)
	_, err = w.c.ProviderStatus(ctx, w.p, provider)
	w.faulted(task.ProviderError, provider+" add", err)
	server := center.KmipServer{Name: "kms-1", Address: "127.0.0.1", Port: w.kms.Port}
	for what, bad := range map[string]center.KmipServer{
		"no name": {Address: "a"}, "no address": {Name: "n"}, "address with port": {Name: "n", Address: "a:5696"}, "port": {Name: "n", Address: "a", Port: 70000},
		"space": {Name: "n", Address: "a b"},
	} {
		if err := w.c.RegisterKmipServer(ctx, w.p, provider, bad); !task.Is(err, task.InvalidArgument) {
			t.Errorf("%s: %v", what, err)
		}
	}
	w.faulted(task.NotSupported, "prox", w.c.RegisterKmipServer(ctx, w.p, provider, center.KmipServer{Name: "n", Address: "a", ProxyAddress: "b"}))
	w.faulted(task.InvalidArgument, "name", w.c.RegisterKmipServer(ctx, w.p, "a/b", server))

	w.must(w.c.RegisterKmipServer(ctx, w.p, provider, server))
	w.faulted(task.AlreadyExists, "kms-1", w.c.RegisterKmipServer(ctx, w.p, provider, server))
	w.faulted(task.AlreadyExists, provider, w.c.RegisterProvider(ctx, w.p, provider))
	st := status()
	if st.State != "red" || st.ServerTrusted || st.ClientTrusted || !st.Connected || st.ServerThumbprint == "" || !strings.Contains(st.Description, "trust") {
		t.Errorf("before any trust: %+v", st)
	}
	_, err = w.c.GenerateKey(ctx, w.p, "")
	w.faulted(task.ProviderError, provider+" trusted thumbprint", err)

	text, thumb, err := w.c.FetchServerCertificate(ctx, w.p, provider, "kms-1")
	w.must(err)
	block, _ := pem.Decode([]byte(text))
	cert, err := x509.ParseCertificate(block.Bytes)
	w.must(err)
	if thumb != pki.Thumbprint(cert) || thumb != st.ServerThumbprint {
		t.Errorf("thumbprints %s, %s, %s", thumb, pki.Thumbprint(cert), st.ServerThumbprint)
	}
	w.faulted(task.InvalidCertificate, "certificate", w.c.TrustServerCertificate(ctx, w.p, provider, "", "garbage"))
	w.faulted(task.NotFound, "kms-9", w.c.TrustServerCertificate(ctx, w.p, provider, "kms-9", text))
	w.must(w.c.TrustServerCertificate(ctx, w.p, provider, "kms-1", text))
	if st = status(); st.State != "red" || !st.ServerTrusted || !strings.Contains(st.Description, "client certificate") {
		t.Errorf("without a client certificate: %+v", st)
	}

	w.faulted(task.InvalidState, "generate", w.c.UpdateSelfSignedClientCert(ctx, w.p, provider, text))
	made, err := w.c.GenerateSelfSignedClientCert(ctx, w.p, provider)
	w.must(err)
	w.faulted(task.InvalidCertificate, "key", w.c.UpdateSelfSignedClientCert(ctx, w.p, provider, text)) // somebody else's
	w.must(w.c.UpdateSelfSignedClientCert(ctx, w.p, provider, made))
	if in, err := w.c.ClientCert(ctx, w.p, provider); err != nil || in != made {
		t.Errorf("the certificate in use: %v, %v", in, err)
	}
	if st = status(); st.State != "red" || st.ClientTrusted || !st.ServerTrusted {
		t.Errorf("before the KMS trusts center: %+v", st)
	}
	_, err = w.c.GenerateKey(ctx, w.p, provider)
	w.faulted(task.ProviderError, "refuses certificate", err)

	w.kms.Trust(made)
	if st = status(); st.State != "green" || !st.Connected || !st.ServerTrusted || !st.ClientTrusted || st.ClientCertNotAfter.IsZero() || st.ServerCertNotAfter.IsZero() {
		t.Errorf("when all is done: %+v", st)
	}
	id, err := w.c.GenerateKey(ctx, w.p, "")
	w.must(err)
	infos, err := w.c.QueryKeys(ctx, w.p, []inventory.KeyID{id})
	if err != nil || !infos[0].Available || infos[0].State != "Active" || len(infos[0].VMs) != 0 {
		t.Errorf("a generated key: %+v, %v", infos, err)
	}

	// A certificate made elsewhere, and one by request.
	client, key, err := pki.NewKMIPClient(time.Hour, time.Now())
	w.must(err)
	sealed, err := pki.MarshalKey(key)
	w.must(err)
	var keyPEM string
	sealed.Use(func(der []byte) { keyPEM = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})) })
	w.faulted(task.InvalidCertificate, provider, w.c.UploadClientCert(ctx, w.p, provider, text, keyPEM))
	w.must(w.c.UploadClientCert(ctx, w.p, provider, string(pki.EncodeCertificates(client)), keyPEM))
	w.kms.Trust(string(pki.EncodeCertificates(client)))
	if st = status(); st.State != "yellow" { // it ends in an hour
		t.Errorf("with a certificate that ends soon: %+v", st)
	}
	request, err := w.c.GenerateClientCSR(ctx, w.p, provider)
	w.must(err)
	if again, err := w.c.RetrieveClientCSR(ctx, w.p, provider); err != nil || again != request {
		t.Errorf("the request is not kept: %v", err)
	}
	block, _ = pem.Decode([]byte(request))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	w.must(err)
	ca, err := pki.NewAuthority("their CA", time.Now())
	w.must(err)
	signed, err := ca.Issue(csr, pki.Grant{Identity: pki.Identity{Role: pki.RoleCenter, Name: "x"}, Client: true, Life: 365 * 24 * time.Hour}, time.Now())
	w.must(err)
	w.must(w.c.UploadSignedCSR(ctx, w.p, provider, string(pki.EncodeCertificates(signed))))
	w.kms.Trust(string(pki.EncodeCertificates(signed)))
	if st = status(); st.State != "green" {
		t.Errorf("with a signed certificate: %+v", st)
	}
	w.kms.Stop()
	if st = status(); st.State != "red" || st.Connected {
		t.Errorf("while the KMS is down: %+v", st)
	}
	w.kms.Start()

	// All of it outlives a restart.
	w.reopen()
	if st = status(); st.State != "green" {
		t.Errorf("after a restart: %+v", st)
	}
	list, err := w.c.ListProviders(ctx, w.p)
	if err != nil || len(list) != 1 || !list[0].Default || list[0].ID != provider || len(list[0].Servers) != 1 || list[0].Servers[0].Port != w.kms.Port ||
		list[0].ClientCertThumbprint != pki.Thumbprint(signed) || len(list[0].TrustedThumbprints) != 1 {
		t.Errorf("providers: %+v, %v", list, err)
	}
	w.must(w.c.RemoveKmipServer(ctx, w.p, provider, "kms-1"))
	w.faulted(task.NotFound, "kms-1", w.c.RemoveKmipServer(ctx, w.p, provider, "kms-1"))
	w.must(w.c.RemoveProvider(ctx, w.p, provider))
	w.faulted(task.ProviderError, provider, w.c.RemoveProvider(ctx, w.p, provider))
	if _, ok, err := w.c.DefaultProvider(ctx, w.p, "", false); ok || err != nil {
		t.Errorf("a removed provider is still the default: %v", err)
	}
}

// The default provider is looked up entity → parent → global (K5).
func TestDefaultProvider(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	ref := w.createVM("web", "")
	host := w.hostNamed("esx1").Ref
	for _, id := range []string{"a", "b", "c"} {
		w.must(w.c.RegisterProvider(ctx, w.p, id))
	}
	check := func(entity inventory.Ref, want string) {
		t.Helper()
		if got, _, err := w.c.DefaultProvider(ctx, w.p, entity, false); got != want || err != nil {
			t.Errorf("the default of %s is %q, want %q, %v", entity, got, want, err)
		}
	}
	check(ref, provider) // the first one added became the global default
	w.must(w.c.SetDefaultProvider(ctx, w.p, "a", ""))
	check(ref, "a")
	w.must(w.c.SetDefaultProvider(ctx, w.p, "b", inventory.DefaultCluster))
	check(host, "b")
	check(ref, "b")
	check(inventory.DefaultVMFolder, "a")
	w.must(w.c.SetDefaultProvider(ctx, w.p, "c", ref))
	check(ref, "c")
	check(host, "b")
	if id, ok, err := w.c.DefaultProvider(ctx, w.p, host, true); ok || id != "" || err != nil {
		t.Errorf("the host's own default: %q, %v", id, err)
	}
	w.must(w.c.SetDefaultProvider(ctx, w.p, "", ref))
	check(ref, "b")
	w.faulted(task.ProviderError, "nope", w.c.SetDefaultProvider(ctx, w.p, "nope", ""))
	w.faulted(task.NotFound, "vm-999", w.c.SetDefaultProvider(ctx, w.p, "a", "vm-999"))
	// Encryption takes it, and says what is wrong with it by name.
	w.fails(task.ProviderError, "b server", "", second(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Profile: ptr(policy.VMEncryption)})))
	w.must(w.c.RemoveProvider(ctx, w.p, "b"))
	check(ref, "a")
	w.must(w.c.SetDefaultProvider(ctx, w.p, provider, ref))
	w.must(w.c.SetDefaultProvider(ctx, w.p, provider, host))
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Profile: ptr(policy.VMEncryption)}))
	if got := w.vm(ref).KeyID.Provider; got != provider {
		t.Errorf("the key is from %q", got)
	}
}

func TestJoin(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	ctx := t.Context()
	token := func(name string) string {
		t.Helper()
		text, err := w.c.CreateJoinToken(ctx, w.p, name, time.Minute)
		w.must(err)
		return text
	}
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "token") {
			t.Errorf("%s: %v", what, err)
		}
	}
	h := w.join("esx1")
	if host := w.hostNamed("esx1"); host.UUID != h.UUID || host.Info.CPUCores != 2 || len(host.Datastores) != 1 || len(host.Networks) != 1 {
		t.Errorf("the host is %+v", host)
	}
	_, err := w.c.CreateJoinToken(ctx, w.p, "esx1", 0)
	w.faulted(task.DuplicateName, "esx1", err)
	for _, name := range []string{"", "a b", "../x", strings.Repeat("x", 100)} {
		_, err := w.c.CreateJoinToken(ctx, w.p, name, 0)
		w.faulted(task.InvalidArgument, "name", err)
	}
	_, err = w.c.CreateJoinToken(ctx, w.p, "esx2", time.Second)
	w.faulted(task.InvalidArgument, "minute", err)

	used := token("esx2")
	h2 := centertest.NewHost(t, "esx2", w.ds)
	w.must(h2.Join(w.joinAt, used))
	refused("a token a second time, by another key", centertest.NewHost(t, "esx2", w.ds).Join(w.joinAt, used))
	refused("a token for another name", centertest.NewHost(t, "esx4", w.ds).Join(w.joinAt, token("esx3")))
	w.eventually("two hosts share the datastore", func() bool {
		ds, _ := inventory.Lookup[inventory.Datastore](w.c.View(), w.hostNamed("esx1").Datastores[0])
		return len(ds.Mounts) == 2 && len(w.c.View().All(inventory.KindDatastore)) == 1
	})

	// A host that was removed is a stranger, its certificate worthless.
	w.setUpProvider()
	vm := w.ok(w.c.CreateVM(ctx, w.p, func() center.CreateVMSpec {
		s := vmSpec("web", policy.VMEncryption)
		s.Host = w.hostNamed("esx2").Ref
		return s
	}())).Result
	w.ok(w.c.PowerOn(ctx, w.p, vm))
	ref := w.hostNamed("esx2").Ref
	w.faulted(task.ResourceInUse, "web", w.c.RemoveHost(ctx, w.p, ref))
	w.ok(w.c.PowerOff(ctx, w.p, vm))
	w.must(w.c.RemoveHost(ctx, w.p, ref))
	if len(h2.Held()) != 0 {
		t.Errorf("the removed host still holds %v", h2.Held())
	}
	if n := w.vm(vm); !n.Orphaned || n.Host != "" {
		t.Errorf("the VM of the removed host is %+v", n)
	}
	w.fails(task.InvalidState, "host register", "", second(w.c.PowerOn(ctx, w.p, vm)))
	if _, text := w.events(); !strings.Contains(text, "deep recrypt") {
		t.Error("no event lists what to deep recrypt")
	}
	// The VM moves to the other host by registering it there.
	w.must(w.c.UnregisterVM(ctx, w.p, vm))
	vm = w.ok(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] web/web.vmx"})).Result
	w.ok(w.c.PowerOn(ctx, w.p, vm))
	if !h.Running(w.vm(vm).UUID) {
		t.Error("the VM does not run on the other host")
	}
	calls := h2.Calls("Describe")
	w.must(centertest.NewHost(t, "esx2", w.ds).Join(w.joinAt, token("esx2"))) // the name is free again
	w.eventually("the new host is connected", func() bool { return w.hostNamed("esx2").Connection == inventory.Connected })
	if h2.Calls("Describe") != calls {
		t.Error("center still calls the removed machine")
	}
}

// Another machine in a host's place, even with its key, is not taken for it.
func TestHostReplaced(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	h := w.join("esx1")
	h.Stop()
	w.eventually("center misses the host", func() bool { return w.hostNamed("esx1").Connection == inventory.NotResponding })
	h.UUID = "00000000-0000-4000-8000-000000000000"
	h.Start()
	w.eventually("center sees another machine", func() bool { return strings.Contains(w.hostNamed("esx1").Problem, "machine") })
	if w.hostNamed("esx1").Connection == inventory.Connected {
		t.Error("it is connected")
	}
}

func TestExpiredToken(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	w.close()
	now := time.Now()
	w.clock = func() time.Time { return now }
	w.open()
	text, err := w.c.CreateJoinToken(t.Context(), w.p, "esx1", time.Minute)
	w.must(err)
	now = now.Add(2 * time.Minute)
	if err := centertest.NewHost(t, "esx1", w.ds).Join(w.joinAt, text); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("with an expired token: %v", err)
	}
	if len(w.c.View().All(inventory.KindHost)) != 0 {
		t.Error("a host was made")
	}
}

func TestAdminSocket(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	socket := filepath.Join(t.TempDir(), "run", "center.sock")
	ended := make(chan error, 1)
	go func() { ended <- w.c.ServeAdmin(ctx, socket) }()
	a := center.NewAdmin(socket)
	w.eventually("the socket answers", func() bool { _, err := a.Status(ctx); return err == nil })
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode: %v, %v", info.Mode(), err)
	}
	token, err := a.CreateJoinToken(ctx, "esx1", 30*time.Minute)
	w.must(err)
	w.must(centertest.NewHost(t, "esx1", w.ds).Join(w.joinAt, token))
	if _, err := a.CreateJoinToken(ctx, "a b", 0); err == nil || !strings.Contains(err.Error(), "letters") {
		t.Errorf("a bad name: %v", err)
	}
	password, err := a.ResetPassword(ctx, "", "")
	w.must(err)
	if _, err := w.c.Login(ctx, authz.Administrator, w.password, "", ""); err == nil {
		t.Error("the old password is still good")
	}
	if _, err := w.c.Login(ctx, authz.Administrator, password, "", ""); err != nil {
		t.Errorf("the new password: %v", err)
	}
	if _, err := a.ResetPassword(ctx, "ghost", ""); err == nil || !strings.Contains(err.Error(), "ghost") {
		t.Errorf("a user that is not there: %v", err)
	}
	if _, err := a.ResetPassword(ctx, "", "short"); err == nil || strings.Contains(err.Error(), "short") {
		t.Errorf("a short password: %v", err)
	}
	password, err = a.AddUser(ctx, "bob", "Bob", "", "NoCryptoAdmin")
	w.must(err)
	s, err := w.c.Login(ctx, "bob", password, "", "")
	w.must(err)
	if err := w.c.Check(s.Principal, authz.CryptoAccess, inventory.RootFolder); !task.Is(err, task.NoPermission) {
		t.Errorf("bob has cryptographic privileges: %v", err)
	}
	if _, err := a.AddUser(ctx, "eve", "", "", "King"); err == nil || !strings.Contains(err.Error(), "King") {
		t.Errorf("an unknown role: %v", err)
	}
	w.eventually("the host is connected", func() bool {
		st, err := a.Status(ctx)
		return err == nil && len(st.Hosts) == 1 && st.Hosts[0].Connection == inventory.Connected && st.PID == os.Getpid()
	})
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("the socket ended with %v", err)
	}
	if _, err := center.NewAdmin(socket).Status(t.Context()); err == nil || !strings.Contains(err.Error(), "running") {
		t.Errorf("when center is away: %v", err)
	}
}
