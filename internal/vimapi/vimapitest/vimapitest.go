// Package vimapitest runs a whole center behind its vSphere API for tests of
// its clients: govc, pyVmomi, the mortise CLI. Center, key provider, KMS, TLS and
// API are the real ones; hosts are centertest's. It is imported by tests only.
package vimapitest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/center/centertest"
	"mortise/internal/inventory"
	"mortise/internal/vimapi"
)

// Provider is the name of the key provider that [World.SetUpProvider] makes.
const Provider = "kms"

// UserPassword is the password of the users that [World.User] makes.
const UserPassword = "a password for tests"

// World is a center with its API on loopback, a KMS and one host with a
// datastore "ds1" and a network "default".
type World struct {
	Center    *center.Center
	KMS       *centertest.KMS
	Datastore *centertest.Datastore
	Host      *centertest.Host
	URL       string // of the API, https://127.0.0.1:port
	Password  string // of the administrator

	t      testing.TB
	joinAt string
	web    *httptest.Server
}

// Start runs a world until the test ends. The key provider is not set up.
func Start(t testing.TB) *World {
	t.Helper()
	dir := t.TempDir()
	w := &World{t: t, KMS: centertest.StartKMS(t), Datastore: centertest.NewDatastore("ds1")}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	c, err := center.Open(context.Background(), center.Config{
		Dir: dir, Name: "center-1", RootKey: centertest.RootKey(t, dir), OpenProvider: centertest.OpenProvider, Logger: log, HostWait: 10 * time.Second,
	})
	w.must(err)
	w.Center, w.Password = c, c.InitialPassword()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	w.joinAt = l.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Errorf("center ended: %v", err)
		}
	})
	running.Go(func() {
		if err := c.ServeJoin(ctx, l); err != nil {
			t.Errorf("the join service ended: %v", err)
		}
	})
	api := vimapi.New(c, vimapi.Options{Logger: log, Version: "test", InstanceUUID: "0b1a8f6e-7a52-4d0c-9a51-8f60c2f7d1aa"})
	w.web = httptest.NewUnstartedServer(api)
	w.web.Config.ReadHeaderTimeout = 10 * time.Second
	w.web.StartTLS()
	w.URL = w.web.URL
	t.Cleanup(func() {
		api.Close()
		w.web.Close()
		stop()
		running.Wait()
		c.Close()
	})
	w.Host = w.Join("esx1")
	return w
}

// Thumbprint is the SHA-256 of the API's certificate, upper-case hex with
// colons.
func (w *World) Thumbprint() string {
	sum := sha256.Sum256(w.web.Certificate().Raw)
	text := hex.EncodeToString(sum[:])
	out := make([]byte, 0, 95)
	for i := 0; i < len(text); i += 2 {
		if i > 0 {
			out = append(out, ':')
		}
		out = append(out, text[i:i+2]...)
	}
	return strings.ToUpper(string(out))
}

// HTTP is a client that trusts the API's certificate.
func (w *World) HTTP() *http.Client { return w.web.Client() }

// Join makes a host on the world's datastore and joins it.
func (w *World) Join(name string) *centertest.Host {
	w.t.Helper()
	h := centertest.NewHost(w.t, name, w.Datastore)
	token, err := w.Center.CreateJoinToken(context.Background(), Admin(), name, 0)
	w.must(err)
	w.must(h.Join(w.joinAt, token))
	w.Eventually("host "+name+" is connected", func() bool {
		found := false
		inventory.Each(w.Center.View(), func(h *inventory.Host) bool {
			found = found || h.Name == name && h.Connection == inventory.Connected
			return !found
		})
		return found
	})
	return h
}

// Admin is the administrator.
func Admin() center.Principal { return center.Principal{User: authz.Administrator} }

// SetUpProvider adds the KMS as the key provider [Provider], trusted both ways.
func (w *World) SetUpProvider() {
	w.t.Helper()
	ctx, p, c := context.Background(), Admin(), w.Center
	w.must(c.RegisterKmipServer(ctx, p, Provider, center.KmipServer{Name: "kms-1", Address: "127.0.0.1", Port: w.KMS.Port}))
	w.must(c.TrustServerCertificate(ctx, p, Provider, "", w.KMS.Certificate()))
	cert, err := c.GenerateSelfSignedClientCert(ctx, p, Provider)
	w.must(err)
	w.must(c.UpdateSelfSignedClientCert(ctx, p, Provider, cert))
	w.KMS.Trust(cert)
}

// CreateVM makes a VM with one disk of 8 MiB, in clear, and returns its Ref.
func (w *World) CreateVM(name string) inventory.Ref {
	w.t.Helper()
	ctx := context.Background()
	task, err := w.Center.CreateVM(ctx, Admin(), center.CreateVMSpec{
		Name: name, Hardware: center.HardwareSpec{MemoryMiB: 256, NICs: []inventory.NIC{{Network: "default"}}}, Disks: []center.NewDiskSpec{{CapacityBytes: 8 << 20}},
	})
	w.must(err)
	w.must(w.Center.WaitTask(ctx, task))
	ref, ok := w.VM(name)
	if !ok {
		w.t.Fatalf("VM %q is not there", name)
	}
	return ref.Ref
}

// VM finds a VM by name.
func (w *World) VM(name string) (*inventory.VM, bool) {
	var found *inventory.VM
	inventory.Each(w.Center.View(), func(vm *inventory.VM) bool {
		if vm.Name == name {
			found = vm
		}
		return found == nil
	})
	return found, found != nil
}

// User makes an account, with [UserPassword], that has a role on everything.
func (w *World) User(name string, role int32) {
	w.t.Helper()
	ctx, a := context.Background(), w.Center.Authority()
	w.must(a.CreateUser(ctx, name, "", UserPassword))
	w.must(a.SetPermission(ctx, authz.Permission{Entity: inventory.RootFolder, Principal: name, Role: role, Propagate: true}))
}

// Client is govmomi's, logged in as the administrator.
func (w *World) Client() *govmomi.Client { return w.ClientAs(authz.Administrator, w.Password) }

// ClientAs is govmomi's, logged in as a user.
func (w *World) ClientAs(user, password string) *govmomi.Client {
	w.t.Helper()
	c, err := govmomi.NewClient(context.Background(), w.SDK(user, password), true)
	w.must(err)
	return c
}

// SDK is the address that vSphere clients log in at as a user.
func (w *World) SDK(user, password string) *url.URL {
	u, err := url.Parse(w.URL + "/sdk")
	w.must(err)
	u.User = url.UserPassword(user, password)
	return u
}

// Eventually waits until f holds.
func (w *World) Eventually(what string, f func() bool) {
	w.t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if f() {
			return
		}
	}
	w.t.Fatalf("it did not come about that %s", what)
}

func (w *World) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}
