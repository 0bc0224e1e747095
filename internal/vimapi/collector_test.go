package vimapi

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

func TestFinder(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 3)
	c := w.client(t)
	f := find.NewFinder(c.Client)
	dc, err := f.DefaultDatacenter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.SetDatacenter(dc)
	vms, err := f.VirtualMachineList(t.Context(), "*")
	if err != nil || len(vms) != 3 {
		t.Fatalf("%d VMs, %v; want 3", len(vms), err)
	}
	var vm mo.VirtualMachine
	if err := vms[0].Properties(t.Context(), vms[0].Reference(), nil, &vm); err != nil {
		t.Fatal(err)
	}
	if vm.Config.Name != vm.Name || vm.Summary.Config.VmPathName != "[ds1] web0/web0.vmx" || len(vm.Network) != 1 {
		t.Fatalf("VM reads %+v", vm)
	}
	if _, err := f.HostSystem(t.Context(), "h1"); err != nil {
		t.Error(err)
	}
	if _, err := f.DefaultResourcePool(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := f.Network(t.Context(), "default"); err != nil {
		t.Error(err)
	}
}

// Clients in strict languages fail at an empty enumeration and at a reference
// without a type. No property of any kind may hold one where the API demands it.
func TestNothingMandatoryIsEmpty(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 1)
	w.edit(t, "vm-100", func(vm *inventory.VM) {
		vm.Power, vm.BootTime, vm.Encrypted, vm.CryptoState = inventory.PoweredOn, time.Now(), true, inventory.Locked
		vm.KeyID = &inventory.KeyID{Provider: "kms", Key: "k1"}
		vm.Snapshots, vm.CurrentSnapshot = []inventory.Snapshot{{ID: 1, Name: "a"}, {ID: 2, Parent: 1, PoweredOn: true}}, 2
		vm.Disks = append(vm.Disks, inventory.Disk{Key: 16000, Controller: "sata0:0"}, inventory.Disk{Key: 32000, Controller: "nvme1:0"}, inventory.Disk{Key: 2001})
		vm.Hardware.NICs = append(vm.Hardware.NICs, inventory.NIC{Key: 4001, Model: "e1000"}, inventory.NIC{Key: 4002, Model: "virtio"})
	})
	// Records with as little in them as can be.
	w.commit(t,
		w.inv.VMs.Create("vm-200", inventory.VM{Entity: inventory.Entity{Ref: "vm-200", Name: "bare", Parent: inventory.DefaultVMFolder}}),
		w.inv.Hosts.Create("host-20", inventory.Host{Entity: inventory.Entity{Ref: "host-20", Name: "bare", Parent: inventory.DefaultCluster}}),
		w.inv.Datastores.Create("datastore-21", inventory.Datastore{Entity: inventory.Entity{Ref: "datastore-21", Name: "bare", Parent: inventory.DefaultDatastores}, Mounts: []inventory.DatastoreMount{{Host: "host-20", Problem: "gone"}}}),
		w.inv.Networks.Create("network-22", inventory.Network{Entity: inventory.Entity{Ref: "network-22", Name: "bare", Parent: inventory.DefaultNetworks}}),
		w.tasks.Create("task-30", task.Record{Ref: "task-30", Name: "VirtualMachine.reconfigure", Entity: "vm-100", State: task.Failed, Error: &task.Fault{Kind: task.InvalidPowerState, Message: "no"}}),
		w.tasks.Create("task-31", task.Record{Ref: "task-31", Name: "VirtualMachine.powerOn", Entity: "vm-100", State: task.Running, Stage: "s", TotalBytes: 1}),
	)
	session, err := w.Authority.Login(t.Context(), authz.Administrator, w.password, "test", "")
	if err != nil {
		t.Fatal(err)
	}
	r := w.server.reader(session, w.server.clients.of(session))
	n := 0
	for _, k := range allKinds {
		for _, id := range w.View().All(k) {
			o, ok := r.lookup(moref(id))
			if !ok {
				t.Fatalf("%s is not found", id)
			}
			for _, name := range o.kind.names {
				v, err := r.property(o, propPath{{name: name}})
				if err != nil {
					t.Errorf("%s.%s: %v", id, name, err)
				}
				n++
				findEmpty(t, string(id)+"."+name, reflect.ValueOf(v))
			}
		}
	}
	if n < 200 {
		t.Errorf("only %d properties were seen", n)
	}
}

func findEmpty(t *testing.T, at string, v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			findEmpty(t, at, v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			findEmpty(t, fmt.Sprintf("%s[%d]", at, i), v.Index(i))
		}
	case reflect.Struct:
		if ref, ok := v.Interface().(types.ManagedObjectReference); ok && (ref.Type == "" || ref.Value == "") {
			t.Errorf("%s is a reference to nothing", at)
		}
		for i := range v.NumField() {
			f := v.Type().Field(i)
			optional := strings.Contains(f.Tag.Get("xml"), "omitempty")
			if s := v.Field(i); s.Kind() == reflect.String && s.Len() == 0 && f.Type.Name() != "string" && !optional {
				t.Errorf("%s.%s, a mandatory %s, is empty", at, f.Name, f.Type.Name())
			}
			if f.Type == reflect.TypeFor[types.ManagedObjectReference]() && optional {
				continue
			}
			findEmpty(t, at+"."+f.Name, v.Field(i))
		}
	}
}

// watcher is a property collector of a client, with one filter.
type watcher struct {
	t       testing.TB
	c       *govmomi.Client
	pc      types.ManagedObjectReference
	filter  types.ManagedObjectReference
	version string
}

func watch(t testing.TB, c *govmomi.Client, spec types.PropertyFilterSpec) *watcher {
	t.Helper()
	ctx := context.Background()
	pc, err := methods.CreatePropertyCollector(ctx, c, &types.CreatePropertyCollector{This: c.ServiceContent.PropertyCollector})
	if err != nil {
		t.Fatal(err)
	}
	f, err := methods.CreateFilter(ctx, c, &types.CreateFilter{This: pc.Returnval, Spec: spec, PartialUpdates: true})
	if err != nil {
		t.Fatal(err)
	}
	return &watcher{t, c, pc.Returnval, f.Returnval, ""}
}

// next waits up to seconds for updates, in words; empty when there are none.
func (x *watcher) next(seconds int32) string {
	x.t.Helper()
	set, err := x.wait(x.version, seconds, 0)
	if err != nil {
		x.t.Fatal(err)
	}
	if set == nil {
		return ""
	}
	x.version = set.Version
	return words(set)
}

func (x *watcher) wait(version string, seconds, most int32) (*types.UpdateSet, error) {
	res, err := methods.WaitForUpdatesEx(context.Background(), x.c, &types.WaitForUpdatesEx{This: x.pc, Version: version,
		Options: &types.WaitOptions{MaxWaitSeconds: &seconds, MaxObjectUpdates: most}})
	if err != nil {
		return nil, err
	}
	return res.Returnval, nil
}

func words(set *types.UpdateSet) string {
	var list []string
	for _, f := range set.FilterSet {
		for _, u := range f.ObjectSet {
			var changes []string
			for _, c := range u.ChangeSet {
				changes = append(changes, fmt.Sprintf("%s=%v", c.Name, c.Val))
			}
			list = append(list, fmt.Sprintf("%s %s %s", u.Kind, u.Obj.Value, strings.Join(changes, ",")))
		}
	}
	slices.Sort(list)
	return strings.TrimSpace(strings.Join(list, "; "))
}

// vmSpec selects all VMs below the root folder, through folders only.
func vmSpec(paths ...string) types.PropertyFilterSpec {
	again := []types.BaseSelectionSpec{&types.SelectionSpec{Name: "folder"}, &types.SelectionSpec{Name: "dc"}}
	return types.PropertyFilterSpec{
		PropSet: []types.PropertySpec{{Type: "VirtualMachine", PathSet: paths}},
		ObjectSet: []types.ObjectSpec{{Obj: moref(inventory.RootFolder), Skip: types.NewBool(true), SelectSet: []types.BaseSelectionSpec{
			&types.TraversalSpec{SelectionSpec: types.SelectionSpec{Name: "folder"}, Type: "Folder", Path: "childEntity", SelectSet: again},
			&types.TraversalSpec{SelectionSpec: types.SelectionSpec{Name: "dc"}, Type: "Datacenter", Path: "vmFolder", SelectSet: again},
		}}},
	}
}

func objectSpec1(ref inventory.Ref, paths ...string) types.PropertyFilterSpec {
	return types.PropertyFilterSpec{
		PropSet:   []types.PropertySpec{{Type: string(ref.Kind()), PathSet: paths}},
		ObjectSet: []types.ObjectSpec{{Obj: moref(ref)}},
	}
}

func TestUpdates(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 2)
	x := watch(t, w.client(t), vmSpec("name", "runtime.powerState", `config.hardware.device[2000].capacityInBytes`, "config.keyId.keyId"))
	expect := func(seconds int32, want string) {
		t.Helper()
		if got := x.next(seconds); got != want {
			t.Fatalf("got  %s\nwant %s", got, want)
		}
	}
	expect(5, "enter vm-100 name=web0,runtime.powerState=poweredOff,config.hardware.device[2000].capacityInBytes=10737418240; "+
		"enter vm-101 name=web1,runtime.powerState=poweredOff,config.hardware.device[2000].capacityInBytes=10737418240")
	expect(0, "")
	w.edit(t, "vm-101", func(vm *inventory.VM) { vm.Power = inventory.PoweredOn })
	expect(5, "modify vm-101 runtime.powerState=poweredOn")
	// What is not watched wakes nobody.
	w.edit(t, "vm-101", func(vm *inventory.VM) { vm.Hardware.Annotation = "hello" })
	expect(1, "")
	// A property comes and goes.
	w.edit(t, "vm-100", func(vm *inventory.VM) { vm.KeyID = &inventory.KeyID{Provider: "kms", Key: "k1"} })
	expect(5, "modify vm-100 config.keyId.keyId=k1")
	w.edit(t, "vm-100", func(vm *inventory.VM) { vm.KeyID, vm.Disks[0].CapacityBytes = nil, 20<<30 })
	expect(5, "modify vm-100 config.hardware.device[2000].capacityInBytes=21474836480,config.keyId.keyId=<nil>")
	// Objects come and go.
	w.commit(t, w.inv.VMs.Create("vm-300", testVM("vm-300", "new")))
	expect(5, "enter vm-300 name=new,runtime.powerState=poweredOff,config.hardware.device[2000].capacityInBytes=10737418240")
	w.commit(t, w.inv.VMs.Delete("vm-101", 0))
	expect(5, "leave vm-101")
	expect(0, "")
	// From the beginning again.
	x.version = ""
	if got := x.next(5); strings.Count(got, "enter") != 2 {
		t.Errorf("anew: %s", got)
	}
}

func TestUpdateVersions(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 5)
	c := w.client(t)
	x := watch(t, c, vmSpec("name"))
	first, err := x.wait("", 5, 2)
	if err != nil || first.Truncated == nil || !*first.Truncated || strings.Count(words(first), "enter") != 2 {
		t.Fatalf("two of five: %v %v", first, err)
	}
	second, err := x.wait(first.Version, 5, 2)
	if err != nil || strings.Count(words(second), "enter") != 2 || words(second) == words(first) {
		t.Fatalf("two more: %v %v", second, err)
	}
	// The answer was lost: the client asks with the version before it.
	again, err := x.wait(first.Version, 5, 2)
	if err != nil || words(again) != words(second) || again.Version != second.Version {
		t.Fatalf("once more: %v %v", again, err)
	}
	third, err := x.wait(second.Version, 5, 2)
	if err != nil || strings.Count(words(third), "enter") != 1 || third.Truncated != nil {
		t.Fatalf("the last: %v %v", third, err)
	}
	if _, err := x.wait("17", 0, 0); !isFault[types.InvalidCollectorVersion](err) {
		t.Errorf("a version that was never given: %v", err)
	}
	if _, err := x.wait(third.Version, -1, 0); !isFault[types.InvalidArgument](err) {
		t.Errorf("a negative wait: %v", err)
	}
	// Cancelled, and destroyed, while it waits.
	failed := make(chan error, 1)
	begin := func() {
		go func() { _, err := x.wait(third.Version, 30, 0); failed <- err }()
		time.Sleep(100 * time.Millisecond)
	}
	begin()
	if _, err := methods.CancelWaitForUpdates(t.Context(), c, &types.CancelWaitForUpdates{This: x.pc}); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !isFault[types.RequestCanceled](err) {
		t.Errorf("a cancelled wait: %v", err)
	}
	begin()
	if _, err := methods.DestroyPropertyCollector(t.Context(), c, &types.DestroyPropertyCollector{This: x.pc}); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !isFault[types.ManagedObjectNotFound](err) {
		t.Errorf("a destroyed collector: %v", err)
	}
	if n := w.server.hub.indexed(); n != 0 {
		t.Errorf("%d entries are left in the index", n)
	}
}

// indexed counts what the hub remembers of filters.
func (h *hub) indexed() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.members) + len(h.passing) + len(h.viewing) + len(h.singleton)
}

// A logged-out session's waiting calls end, and nothing of it is left.
func TestLogoutEndsWaits(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 1)
	c := w.client(t)
	x := watch(t, c, vmSpec("name"))
	x.next(5)
	failed := make(chan error, 1)
	go func() { _, err := x.wait(x.version, 30, 0); failed <- err }()
	time.Sleep(100 * time.Millisecond)
	if err := c.Logout(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-failed:
		if err == nil {
			t.Error("the wait ended without a fault")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the wait goes on")
	}
	for end := time.Now().Add(5 * time.Second); w.server.hub.indexed() != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d entries are left in the index", w.server.hub.indexed())
		}
	}
}

func isFault[T any](err error) bool {
	if !soap.IsSoapFault(err) {
		return false
	}
	_, ok := soap.ToSoapFault(err).VimFault().(T)
	return ok
}

// Properties that other objects' records make follow those.
func TestRelations(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 1)
	w.commit(t, w.inv.Hosts.Create("host-20", inventory.Host{Entity: inventory.Entity{Ref: "host-20", Name: "h2", Parent: inventory.DefaultCluster}, Connection: inventory.Connected}))
	c := w.client(t)
	watchers := map[string]*watcher{
		"host":      watch(t, c, objectSpec1("host-10", "vm")),
		"other":     watch(t, c, objectSpec1("host-20", "vm")),
		"datastore": watch(t, c, objectSpec1("datastore-11", "vm")),
		"network":   watch(t, c, objectSpec1("network-12", "vm")),
		"path":      watch(t, c, objectSpec1("vm-100", "config.files.vmPathName")),
		"tasks":     watch(t, c, objectSpec1("vm-100", "recentTask")),
		"cluster":   watch(t, c, objectSpec1(inventory.DefaultCluster, "summary.numEffectiveHosts")),
		"folder":    watch(t, c, objectSpec1(inventory.DefaultVMFolder, "childEntity")),
	}
	for _, x := range watchers {
		x.next(5)
	}
	changed := func(want ...string) {
		t.Helper()
		for name, x := range watchers {
			got := x.next(0)
			if wanted := slices.Contains(want, name); wanted != (got != "") {
				t.Errorf("%s: %q", name, got)
			}
		}
	}
	w.edit(t, "vm-100", func(vm *inventory.VM) { vm.Host = "host-20" })
	changed("host", "other")
	w.edit(t, "vm-100", func(vm *inventory.VM) { vm.Hardware.NICs = nil })
	changed("network")
	if _, err := inventory.Edit(t.Context(), w.inv, w.inv.Datastores, "datastore-11", func(d *inventory.Datastore) error { d.Name = "fast"; return nil }); err != nil {
		t.Fatal(err)
	}
	changed("path")
	w.commit(t, w.tasks.Create("task-30", task.Record{Ref: "task-30", Name: "VirtualMachine.powerOn", Entity: "vm-100", State: task.Running}))
	changed("tasks")
	if _, err := w.inv.EditHost(t.Context(), "host-20", func(h *inventory.Host) error { h.Connection = inventory.NotResponding; return nil }); err != nil {
		t.Fatal(err)
	}
	changed("cluster")
	w.commit(t, w.inv.VMs.Create("vm-400", testVM("vm-400", "new")))
	changed("host", "datastore", "network", "folder")
}

// Who may not see an object does not learn that it is there; who may see but
// not read it gets its name for an answer that it may not.
func TestReadingNeedsPrivileges(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 3)
	ctx := t.Context()
	grant := func(user string, on inventory.Ref, role int32) {
		t.Helper()
		if err := w.CreateUser(ctx, user, "", "a password for tests"); err != nil && !strings.Contains(err.Error(), "exists") {
			t.Fatal(err)
		}
		if err := w.SetPermission(ctx, authz.Permission{Entity: on, Principal: user, Role: role, Propagate: true}); err != nil {
			t.Fatal(err)
		}
	}
	names := func(user string) string {
		t.Helper()
		x := watch(t, w.clientAs(t, user, "a password for tests"), vmSpec("name"))
		return x.next(1)
	}
	grant("all@mortise.local", inventory.RootFolder, authz.RoleReadOnly)
	grant("most@mortise.local", inventory.RootFolder, authz.RoleReadOnly)
	grant("most@mortise.local", "vm-101", authz.RoleNoAccess)
	grant("none@mortise.local", inventory.RootFolder, authz.RoleNoAccess)
	grant("view@mortise.local", inventory.RootFolder, authz.RoleView)
	if got := names("all@mortise.local"); got != "enter vm-100 name=web0; enter vm-101 name=web1; enter vm-102 name=web2" {
		t.Errorf("all: %s", got)
	}
	if got := names("most@mortise.local"); got != "enter vm-100 name=web0; enter vm-102 name=web2" {
		t.Errorf("most: %s", got)
	}
	if got := names("none@mortise.local"); got != "" {
		t.Errorf("none: %s", got)
	}
	if got := names("view@mortise.local"); got != "enter vm-100 ; enter vm-101 ; enter vm-102" {
		t.Errorf("view: %s", got)
	}
	c := w.clientAs(t, "none@mortise.local", "a password for tests")
	req := types.FindByUuid{This: *c.ServiceContent.SearchIndex, Uuid: testVM("vm-100", "").UUID, VmSearch: true}
	if res, err := methods.FindByUuid(ctx, c, &req); err != nil || res.Returnval != nil {
		t.Errorf("found without the privilege: %v %v", res, err)
	}
}

func TestRetrieve(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 5)
	c := w.client(t)
	ctx := t.Context()
	retrieve := func(spec types.PropertyFilterSpec, most int32) (*types.RetrieveResult, error) {
		res, err := methods.RetrievePropertiesEx(ctx, c, &types.RetrievePropertiesEx{This: c.ServiceContent.PropertyCollector, SpecSet: []types.PropertyFilterSpec{spec}, Options: types.RetrieveOptions{MaxObjects: most}})
		if err != nil {
			return nil, err
		}
		return res.Returnval, nil
	}
	page, err := retrieve(vmSpec("name"), 3)
	if err != nil || len(page.Objects) != 3 || page.Token == "" {
		t.Fatalf("the first page: %+v %v", page, err)
	}
	rest, err := methods.ContinueRetrievePropertiesEx(ctx, c, &types.ContinueRetrievePropertiesEx{This: c.ServiceContent.PropertyCollector, Token: page.Token})
	if err != nil || len(rest.Returnval.Objects) != 2 || rest.Returnval.Token != "" {
		t.Fatalf("the second page: %+v %v", rest, err)
	}
	if _, err := methods.ContinueRetrievePropertiesEx(ctx, c, &types.ContinueRetrievePropertiesEx{This: c.ServiceContent.PropertyCollector, Token: page.Token}); !isFault[types.InvalidProperty](err) {
		t.Errorf("the same page twice: %v", err)
	}
	for _, bad := range []string{"nonsense", "config.nonsense", "config..name", "config.hardware.device[", "name[1]", "self"} {
		if _, err := retrieve(vmSpec(bad), 0); !isFault[types.InvalidProperty](err) {
			t.Errorf("path %q: %v", bad, err)
		}
	}
	spec := vmSpec("name")
	spec.PropSet[0].Type = "EvilType"
	if _, err := retrieve(spec, 0); !isFault[types.InvalidArgument](err) {
		t.Errorf("an unknown type: %v", err)
	}
	if _, err := retrieve(objectSpec1("vm-999", "name"), 0); !isFault[types.ManagedObjectNotFound](err) {
		t.Errorf("an object that is not there: %v", err)
	}
	spec = vmSpec("name")
	spec.ObjectSet[0].SelectSet = []types.BaseSelectionSpec{&types.SelectionSpec{Name: "undefined"}}
	if _, err := retrieve(spec, 0); !isFault[types.InvalidArgument](err) {
		t.Errorf("an undefined traversal: %v", err)
	}
	// A type's properties through its base type, and an object by two specs.
	spec = objectSpec1("vm-100", "runtime.powerState")
	spec.PropSet = append(spec.PropSet, types.PropertySpec{Type: "ManagedEntity", PathSet: []string{"name", "parent"}})
	page, err = retrieve(spec, 0)
	if err != nil || len(page.Objects) != 1 || len(page.Objects[0].PropSet) != 3 {
		t.Errorf("by base type: %+v %v", page, err)
	}
}

func FuzzPath(f *testing.F) {
	for _, s := range []string{"name", "config.hardware.device[2000].backing.keyId", `config.extraConfig["a.b[1]"].value`, "a[", "..", "a[]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := parsePath(text)
		if err != nil {
			return
		}
		if len(p) == 0 || len(p) > maxSegments {
			t.Fatalf("%q has %d segments", text, len(p))
		}
		var b strings.Builder
		for i, s := range p {
			if i > 0 {
				b.WriteByte('.')
			}
			b.WriteString(s.name)
			if s.keyed {
				if strings.Contains(text, `["`+s.key+`"]`) {
					fmt.Fprintf(&b, `["%s"]`, s.key)
				} else {
					fmt.Fprintf(&b, "[%s]", s.key)
				}
			}
		}
		if b.Len() != len(text) {
			t.Fatalf("%q is read as %q", text, b.String())
		}
	})
}

func TestPrune(t *testing.T) {
	var fields fieldCache
	info := &types.KmipClusterInfo{ClusterId: types.KeyProviderId{Id: "kms"}, ManagementType: "vCenter", HasBackup: types.NewBool(true)}
	parseVersion("urn:vim25/7.0.1.0").prune(&fields, reflect.ValueOf(info))
	if info.ManagementType == "" || info.HasBackup != nil {
		t.Errorf("a client of 7.0.1 gets %+v", info)
	}
	parseVersion(`"urn:vim25/6.7.1"`).prune(&fields, reflect.ValueOf(info))
	if info.ManagementType != "" || info.ClusterId.Id != "kms" {
		t.Errorf("a client of 6.7.1 gets %+v", info)
	}
	for action, want := range map[string]apiVersion{
		"": {8, 0, 3}, "urn:vim25/9.1.0.0": {8, 0, 3}, "urn:vim25/8.0.1.0": {8, 0, 1}, "urn:vim25/6.5": {6, 5}, "urn:vim25/x": {8, 0, 3}, "urn:vim25/1.2.3.4.5": {8, 0, 3},
	} {
		if got := parseVersion(action); got != want {
			t.Errorf("%q is %v, want %v", action, got, want)
		}
	}
}
