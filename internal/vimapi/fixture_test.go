package vimapi

import (
	"context"
	"fmt"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/vim25/soap"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/store"
	"mortise/internal/task"
)

// world is a server over a real inventory and real accounts, without center's
// use cases.
type world struct {
	*authz.Authority
	inv      *inventory.Inventory
	tasks    *store.Collection[task.Record]
	password string
	server   *Server
	web      *httptest.Server
}

func (w *world) View() *inventory.View { return w.inv.View() }

func newWorld(t testing.TB) *world {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	st, err := store.Open(ctx, store.Config{Dir: t.TempDir(), Name: "t"})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{}
	if w.inv, err = inventory.Open(ctx, st); err != nil {
		t.Fatal(err)
	}
	if err := inventory.Track(ctx, w.inv, "task", &w.tasks); err != nil {
		t.Fatal(err)
	}
	if w.Authority, err = authz.Open(ctx, st, w.inv.View(), time.Now); err != nil {
		t.Fatal(err)
	}
	if w.password, err = w.Bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); w.inv.Run(ctx) }()
	w.server = newServer(w, Options{Version: "test", InstanceUUID: "11111111-2222-3333-4444-555555555555"})
	w.web = httptest.NewTLSServer(w.server)
	t.Cleanup(func() {
		w.server.Close()
		w.web.Close()
		cancel()
		<-done
		st.Close()
	})
	return w
}

// url is where a client logs in as user.
func (w *world) url(user, password string) *url.URL {
	u, _ := url.Parse(w.web.URL + "/sdk")
	u.User = url.UserPassword(user, password)
	return u
}

func (w *world) client(t testing.TB) *govmomi.Client {
	return w.clientAs(t, authz.Administrator, w.password)
}

func (w *world) clientAs(t testing.TB, user, password string) *govmomi.Client {
	t.Helper()
	c, err := govmomi.NewClient(t.Context(), w.url(user, password), true)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// raw is a client that has not logged in.
func (w *world) raw() *soap.Client {
	u, _ := url.Parse(w.web.URL + "/sdk")
	return soap.NewClient(u, true)
}

func (w *world) commit(t testing.TB, ops ...store.Op) {
	t.Helper()
	for len(ops) > 0 {
		n := min(len(ops), 500)
		if err := w.inv.Commit(context.Background(), ops[:n]...); err != nil {
			t.Fatal(err)
		}
		ops = ops[n:]
	}
}

func testVM(ref inventory.Ref, name string) inventory.VM {
	return inventory.VM{
		Entity: inventory.Entity{Ref: ref, Name: name, Parent: inventory.DefaultVMFolder}, Host: "host-10", Pool: inventory.DefaultPool,
		Datastore: "datastore-11", Path: name + "/" + name + ".vmx", UUID: fmt.Sprintf("42000000-0000-4000-8000-%012s", ref[3:]),
		InstanceUUID: fmt.Sprintf("50000000-0000-4000-8000-%012s", ref[3:]), CreatedAt: time.Unix(1_700_000_000, 0),
		Hardware: inventory.Hardware{MemoryMiB: 1024, CPUs: 2, Firmware: "efi", GuestOS: "debian12_64Guest",
			NICs: []inventory.NIC{{Key: 4000, Network: "default", MAC: "52:54:00:00:00:01", Model: "vmxnet3"}}},
		Disks: []inventory.Disk{{UUID: "6000c290-0000-0000-0000-" + fmt.Sprintf("%012s", ref[3:]), Key: 2000, Controller: "scsi0:0",
			Path: name + "/" + name + ".vmdk", CapacityBytes: 10 << 30, AllocatedBytes: 1 << 30}},
		Power: inventory.PoweredOff, MigrateEncryption: inventory.MigrateOpportunistic,
	}
}

// fill makes a host, a datastore, a network and n VMs, "vm-100" and on.
func (w *world) fill(t testing.TB, n int) {
	t.Helper()
	inv := w.inv
	ops := []store.Op{
		inv.Hosts.Create("host-10", inventory.Host{
			Entity: inventory.Entity{Ref: "host-10", Name: "h1", Parent: inventory.DefaultCluster}, UUID: "4c4c4544-0000-1000-8000-000000000001",
			Address: "127.0.0.1:9443", Connection: inventory.Connected, CryptoState: inventory.HostSafe,
			Info:       inventory.HostInfo{Version: "test", Hypervisor: "QEMU", OS: "Debian", CPUModel: "EPYC", CPUCores: 2, CPUMHz: 2500, MemoryBytes: 8 << 30, AES: true},
			Datastores: []inventory.Ref{"datastore-11"}, Networks: []inventory.Ref{"network-12"},
		}),
		inv.Datastores.Create("datastore-11", inventory.Datastore{
			Entity: inventory.Entity{Ref: "datastore-11", Name: "ds1", Parent: inventory.DefaultDatastores}, UUID: "ds-uuid", Type: "ext4",
			Mounts: []inventory.DatastoreMount{{Host: "host-10", Name: "ds1", Path: "/srv/ds1"}}, Capacity: 100 << 30, Free: 60 << 30, Accessible: true,
		}),
		inv.Networks.Create("network-12", inventory.Network{
			Entity: inventory.Entity{Ref: "network-12", Name: "default", Parent: inventory.DefaultNetworks}, Hosts: []inventory.Ref{"host-10"},
		}),
	}
	for i := range n {
		ref := inventory.NewRef("vm", int64(100+i))
		ops = append(ops, inv.VMs.Create(string(ref), testVM(ref, fmt.Sprintf("web%d", i))))
	}
	w.commit(t, ops...)
}

func (w *world) edit(t testing.TB, ref inventory.Ref, f func(*inventory.VM)) {
	t.Helper()
	if _, err := w.inv.EditVM(context.Background(), ref, func(vm *inventory.VM) error { f(vm); return nil }); err != nil {
		t.Fatal(err)
	}
}
