package vimapi_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/vimapi/vimapitest"
	"mortise/internal/vimapi/vimext"
)

func vmRef(id inventory.Ref) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachine", Value: string(id)}
}

// pieces is a Source of given records.
type pieces struct {
	offsets []int64
	data    [][]byte
	err     error // in place of io.EOF
}

func (p *pieces) Next() (int64, []byte, error) {
	if len(p.data) == 0 {
		if p.err != nil {
			return 0, nil, p.err
		}
		return 0, nil, io.EOF
	}
	at, data := p.offsets[0], p.data[0]
	p.offsets, p.data = p.offsets[1:], p.data[1:]
	return at, data, nil
}

func TestImport(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	id := w.CreateVM("web1")
	ctx := t.Context()
	c := vimext.NewClient(w.Client().Client.Client)

	content := make([]byte, 3<<20) // three records and a bit of one disk of 8 MiB
	rand.Read(content)
	source := &pieces{offsets: []int64{4096, 5 << 20}, data: [][]byte{content[:2<<20+100], content[2<<20+100:]}}
	written, err := c.ImportDisk(ctx, vmRef(id), 2000, source)
	if err != nil || written == 0 {
		t.Fatalf("%d bytes, %v", written, err)
	}
	vm, _ := w.VM("web1")
	want := make([]byte, 8<<20)
	copy(want[4096:], content[:2<<20+100])
	copy(want[5<<20:], content[2<<20+100:])
	if got := w.Datastore.Content(vm.Path, 0); !bytes.Equal(got, want[:len(got)]) || !bytes.Equal(want[len(got):], make([]byte, len(want)-len(got))) {
		t.Error("the disk does not hold what was sent")
	}

	refused := func(name, want string, id inventory.Ref, disk int32, source vimext.Source) {
		t.Helper()
		_, err := c.ImportDisk(ctx, vmRef(id), disk, source)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	one := func() *pieces { return &pieces{offsets: []int64{0}, data: [][]byte{{1}}} }
	refused("no such VM", "", "vm-999", 2000, one())
	refused("no such disk", "no disk with the key 2001", id, 2001, one())
	refused("beyond the end", "beyond the end", id, 2000, &pieces{offsets: []int64{8<<20 - 10}, data: [][]byte{make([]byte, 100)}})
	refused("falling offsets", "", id, 2000, &pieces{offsets: []int64{1 << 20, 0}, data: [][]byte{{1}, {2}}})
	broken := errors.New("the source's disk has a bad sector")
	if _, err := c.ImportDisk(ctx, vmRef(id), 2000, &pieces{offsets: []int64{0}, data: [][]byte{{1}}, err: broken}); !errors.Is(err, broken) {
		t.Errorf("a failing source: %v", err)
	}

	// A stream that ends without its last record is no import.
	for name, body := range map[string]string{"cut short": "\x00\x00\x00", "no end": ""} {
		req, _ := http.NewRequestWithContext(ctx, http.MethodPut, w.URL+vimext.ImportPath+"?vm="+string(id)+"&disk=2000", strings.NewReader(body))
		web := w.Client().Client.Client.Client
		res, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode < 400 || !strings.Contains(string(text), "import it again") {
			t.Errorf("%s: %s %s", name, res.Status, text)
		}
	}
}

// The data paths need a session, and the privilege.
func TestDataPathsNeedASession(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	id := w.CreateVM("web1")
	for _, c := range []struct{ method, path string }{{http.MethodPut, vimext.ImportPath + "?disk=2000&vm="}, {http.MethodGet, vimext.ConsolePath + "?vm="}} {
		req, _ := http.NewRequest(c.method, w.URL+c.path+string(id), strings.NewReader("x"))
		res, err := w.HTTP().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s without a session: %s", c.path, res.Status)
		}
	}
	w.User("auditor@mortise.local", authz.RoleReadOnly)
	c := vimext.NewClient(w.ClientAs("auditor@mortise.local", vimapitest.UserPassword).Client.Client)
	_, err := c.ImportDisk(t.Context(), vmRef(id), 2000, &pieces{offsets: []int64{0}, data: [][]byte{{1}}})
	var e *vimext.DataError
	if !errors.As(err, &e) || e.Status != http.StatusForbidden || !strings.Contains(e.Message, authz.VMDiskRandom) {
		t.Errorf("an auditor imports: %v", err)
	}
	if _, err = c.Console(t.Context(), vmRef(id)); !errors.As(err, &e) || e.Status != http.StatusForbidden {
		t.Errorf("an auditor opens a console: %v", err)
	}
}

func TestConsole(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	id := w.CreateVM("web1")
	ctx := t.Context()
	gc := w.Client()
	c := vimext.NewClient(gc.Client.Client)
	if _, err := c.Console(ctx, vmRef(id)); err == nil || !strings.Contains(err.Error(), "powered on") {
		t.Errorf("the console of a VM that is off: %v", err)
	}
	task, err := w.Center.PowerOn(ctx, vimapitest.Admin(), id)
	if err == nil {
		err = w.Center.WaitTask(ctx, task)
	}
	if err != nil {
		t.Fatal(err)
	}
	console, err := c.Console(ctx, vmRef(id))
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	if _, err := io.WriteString(console, "hello\n"); err != nil {
		t.Fatal(err)
	}
	var got []byte
	buf := make([]byte, 256)
	for !bytes.Contains(got, []byte("HELLO")) {
		n, err := console.Read(buf)
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, buf[:n]...)
	}
	// center's small host answers in capitals. Logging out closes it.
	if err := gc.Logout(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, console); err != nil && !strings.Contains(err.Error(), "clos") && !strings.Contains(err.Error(), "EOF") {
		t.Logf("the console ended with %v", err)
	}
}

func TestMortiseManager(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	w.SetUpProvider()
	ctx := t.Context()
	c := vimext.NewClient(w.Client().Client.Client)

	policies, err := c.Policies(ctx)
	if err != nil || len(policies) != 2 || !policies[0].Encrypts || !policies[0].Bundled {
		t.Fatalf("policies: %+v %v", policies, err)
	}
	mine, err := c.ClonePolicy(ctx, policies[0].ID, "gold", "mine")
	if err != nil || !mine.Encrypts || mine.Bundled || mine.Name != "gold" {
		t.Fatalf("the clone: %+v %v", mine, err)
	}
	if _, err := c.ClonePolicy(ctx, policies[0].ID, "gold", ""); err == nil || !strings.Contains(err.Error(), "another name") {
		t.Errorf("the same name twice: %v", err)
	}

	id := w.CreateVM("web1")
	plain, err := c.VMDetail(ctx, true, vmRef(id))
	if err != nil || len(plain) != 1 || plain[0].Home.Encrypted || plain[0].Disks[0].Crypto.Encrypted || plain[0].HostName != "esx1" {
		t.Fatalf("in clear: %+v %v", plain, err)
	}
	encrypt(t, w, id, mine.ID)
	all, err := c.VMDetail(ctx, true)
	if err != nil || len(all) != 1 {
		t.Fatalf("all: %+v %v", all, err)
	}
	d := all[0]
	if !d.Home.Encrypted || d.Home.Provider != vimapitest.Provider || d.Home.KeyID == "" || d.Home.KeyState != "Active" || d.Home.PolicyName != "gold" || d.CryptoState != "unlocked" {
		t.Errorf("home: %+v", d.Home)
	}
	if k := d.Disks[0]; !k.Crypto.Encrypted || k.Crypto.KeyState != "Active" || k.Path != "[ds1] web1/web1_0.vmdk" || k.CapacityBytes != 8<<20 {
		t.Errorf("disk: %+v", k)
	}
	keys, err := c.QueryKeys(ctx, types.CryptoKeyId{KeyId: d.Home.KeyID, ProviderId: &types.KeyProviderId{Id: d.Home.Provider}})
	if err != nil || len(keys) != 1 || !keys[0].Available || len(keys[0].VMs) != 1 || keys[0].VMs[0].Value != string(id) {
		t.Errorf("who needs the key: %+v %v", keys, err)
	}
	hosts, err := c.HostDetail(ctx)
	if err != nil || len(hosts) != 1 || hosts[0].Name != "esx1" || hosts[0].CryptoState != "safe" || hosts[0].VMs != 1 || hosts[0].HostKey == nil {
		t.Errorf("hosts: %+v %v", hosts, err)
	}
	tasks, err := c.TaskDetail(ctx)
	if err != nil || len(tasks) < 2 || tasks[len(tasks)-1].State != "success" {
		t.Errorf("tasks: %+v %v", tasks, err)
	}
	token, err := c.CreateJoinToken(ctx, "esx2", 0)
	if err != nil || token == "" {
		t.Errorf("a join token: %q %v", token, err)
	}
	if err := c.TrustKeyServer(ctx, vimapitest.Provider, "kms-2", w.KMS.Certificate()); err == nil || !strings.Contains(err.Error(), "kms-2") {
		t.Errorf("trusting a server that is not there: %v", err)
	}
	if _, err := c.VMDetail(ctx, false, vmRef("vm-999")); err == nil {
		t.Error("the detail of a VM that is not there")
	}
}

// TestPacedTask estimates a conversion, holds it back, and shows both where clients
// look.
func TestPacedTask(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	w.SetUpProvider()
	ctx := t.Context()
	c := vimext.NewClient(w.Client().Client.Client)
	id := w.CreateVM("web1")
	spec := types.VirtualMachineConfigSpec{Crypto: &types.CryptoSpecEncrypt{}}
	e, err := c.EstimateReconfigVM(ctx, vmRef(id), spec)
	if err != nil || e.Bytes != 8<<20 || e.IdleSeconds != 8 || e.BusySeconds != 40 || len(e.Disks) != 1 || e.Disks[0].Kind != "encrypt" || e.Disks[0].Key != 2000 {
		t.Errorf("the estimate: %+v %v", e, err)
	}
	if _, err := c.EstimateReconfigVM(ctx, vmRef("vm-999"), spec); err == nil {
		t.Error("a VM that is not there was estimated")
	}
	half, once := make(chan bool), false
	w.Host.OnStep(func(step int) {
		if step == 4 && !once {
			once = true
			half <- true
			<-half
		}
	})
	task, err := objectVM(w, id).Reconfigure(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	<-half
	yes, no, limit := true, false, int64(5<<20)
	if err := c.SetTaskPace(ctx, task.Reference(), &yes, &limit); err != nil {
		t.Fatal(err)
	}
	d, err := c.TaskDetail(ctx, task.Reference())
	if err != nil || !d[0].Paused || d[0].Limit != limit || !d[0].Paceable || d[0].State != "running" {
		t.Errorf("a paused task: %+v %v", d, err)
	}
	var m mo.Task
	if err := property.DefaultCollector(w.Client().Client).RetrieveOne(ctx, task.Reference(), []string{"info"}, &m); err != nil {
		t.Fatal(err)
	}
	seen := map[string]any{}
	for _, p := range m.Info.ProgressDetails {
		seen[p.Key] = p.Value
	}
	if seen["paused"] != true || seen["limitBytesPerSecond"] != limit {
		t.Errorf("its progress details: %v", seen)
	}
	if err := c.SetTaskPace(ctx, task.Reference(), &no, nil); err != nil {
		t.Fatal(err)
	}
	half <- true
	if err := task.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.SetTaskPace(ctx, task.Reference(), &yes, nil); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("the pace of a task that has ended: %v", err)
	}
}

// encrypt applies a policy as PowerCLI and the CLI do, and waits.
func encrypt(t *testing.T, w *vimapitest.World, id inventory.Ref, policy string) {
	t.Helper()
	vm := objectVM(w, id)
	task, err := vm.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{
		VmProfile: []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineDefinedProfileSpec{ProfileId: policy}},
	})
	if err == nil {
		err = task.Wait(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}
