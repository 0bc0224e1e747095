package center_test

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// Who may do what (P1, P2).
func TestPrivileges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	plain, enc := w.createVM("plain", ""), w.createVM("enc", policy.VMEncryption)
	w.ok(w.c.PowerOn(ctx, w.p, enc))
	encrypter, err := w.c.Authority().CreateRole(ctx, "encrypt only", []string{authz.CryptoEncrypt, authz.VMEditDevice})
	w.must(err)
	host := w.hostNamed("esx1").Ref
	who := map[string]center.Principal{
		"nocrypto":  w.user("nocrypto", authz.RoleNoCryptoAdmin, inventory.RootFolder),
		"reader":    w.user("reader", authz.RoleReadOnly, inventory.RootFolder),
		"encrypter": w.user("encrypter", encrypter.ID, inventory.RootFolder),
		"nobody":    {User: "nobody"},
		"zero":      {},
	}
	encrypt := center.ReconfigureSpec{Profile: ptr(policy.VMEncryption)}
	crypto := func(k center.CryptoKind) center.ReconfigureSpec {
		return center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: k}}
	}
	vmFault := func(f func(center.Principal) (inventory.Ref, error)) func(center.Principal) error {
		return func(p center.Principal) error { return second(f(p)) }
	}
	reconfigure := func(ref inventory.Ref, s center.ReconfigureSpec) func(center.Principal) error {
		return vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.ReconfigureVM(ctx, p, ref, s) })
	}
	for _, c := range []struct {
		what      string
		do        func(center.Principal) error
		privilege map[string]string // who lacks which; "" means that it is allowed
	}{
		{"encrypt", reconfigure(plain, encrypt), map[string]string{"nocrypto": authz.CryptoEncrypt, "reader": authz.CryptoEncrypt, "nobody": authz.View, "zero": authz.View}},
		{"decrypt", reconfigure(enc, crypto(center.CryptoDecrypt)), map[string]string{"nocrypto": authz.CryptoDecrypt, "encrypter": authz.CryptoDecrypt}},
		{"recrypt", reconfigure(enc, crypto(center.CryptoShallow)), map[string]string{"nocrypto": authz.CryptoRecrypt, "encrypter": authz.CryptoRecrypt}},
		{"add a disk to an encrypted VM", reconfigure(enc, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskAdd, CapacityBytes: 1 << 20}}}),
			map[string]string{"nocrypto": authz.CryptoAddDisk}},
		{"create an encrypted VM", vmFault(func(p center.Principal) (inventory.Ref, error) {
			return w.c.CreateVM(ctx, p, vmSpec("x", policy.VMEncryption))
		}),
			map[string]string{"nocrypto": authz.CryptoEncryptNew, "reader": authz.VMCreate, "encrypter": authz.VMCreate, "nobody": authz.View}},
		{"create a plain VM", vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.CreateVM(ctx, p, vmSpec(p.User, "")) }), map[string]string{"nocrypto": ""}},
		{"power on", vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.PowerOn(ctx, p, plain) }),
			map[string]string{"reader": authz.VMPowerOn, "encrypter": authz.VMPowerOn, "nocrypto": ""}},
		{"power off", vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.PowerOff(ctx, p, enc) }), map[string]string{"reader": authz.VMPowerOff}},
		{"reset", vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.Reset(ctx, p, enc) }), map[string]string{"reader": authz.VMReset}},
		{"shut down", func(p center.Principal) error { return w.c.ShutdownGuest(ctx, p, enc) }, map[string]string{"reader": authz.VMPowerOff}},
		{"console", func(p center.Principal) error { _, err := w.c.Console(ctx, p, enc); return err }, map[string]string{"nocrypto": authz.CryptoAccess, "reader": authz.VMConsole}},
		{"import", func(p center.Principal) error { _, err := w.c.ImportDisk(ctx, p, enc, 2000, nil); return err }, map[string]string{"nocrypto": authz.CryptoAccess, "reader": authz.VMDiskRandom}},
		{"unlock", vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.CryptoUnlock(ctx, p, enc) }), map[string]string{"nocrypto": authz.CryptoRegisterVM}},
		{"unregister", func(p center.Principal) error { return w.c.UnregisterVM(ctx, p, plain) }, map[string]string{"reader": authz.VMUnregister}},
		{"destroy", vmFault(func(p center.Principal) (inventory.Ref, error) { return w.c.DestroyVM(ctx, p, plain) }), map[string]string{"reader": authz.VMDelete}},
		{"register", vmFault(func(p center.Principal) (inventory.Ref, error) {
			return w.c.RegisterVM(ctx, p, center.RegisterVMSpec{Path: "[ds1] a/a.vmx"})
		}), map[string]string{"reader": authz.VMRegister}},
		{"token", func(p center.Principal) error { _, err := w.c.CreateJoinToken(ctx, p, "x", 0); return err }, map[string]string{"nocrypto": authz.HostAddToCluster}},
		{"remove host", func(p center.Principal) error { return w.c.RemoveHost(ctx, p, host) }, map[string]string{"reader": authz.HostRemove}},
		{"add provider", func(p center.Principal) error { return w.c.RegisterProvider(ctx, p, "x") }, map[string]string{"nocrypto": authz.CryptoManageKeyServers}},
		{"trust server", func(p center.Principal) error { return w.c.TrustServerCertificate(ctx, p, provider, "", "") }, map[string]string{"nocrypto": authz.CryptoManageKeyServers}},
		{"upload client", func(p center.Principal) error { return w.c.UploadClientCert(ctx, p, provider, "", "") }, map[string]string{"nocrypto": authz.CryptoManageKeyServers}},
		{"set default", func(p center.Principal) error { return w.c.SetDefaultProvider(ctx, p, provider, "") }, map[string]string{"nocrypto": authz.CryptoManageKeyServers}},
		{"remove provider", func(p center.Principal) error { return w.c.RemoveProvider(ctx, p, provider) }, map[string]string{"nocrypto": authz.CryptoManageKeyServers}},
		{"list providers", func(p center.Principal) error { _, err := w.c.ListProviders(ctx, p); return err }, map[string]string{"nocrypto": authz.CryptoReadKeyServersInfo}},
		{"generate key", func(p center.Principal) error { _, err := w.c.GenerateKey(ctx, p, provider); return err }, map[string]string{"nocrypto": authz.CryptoManageKeys}},
		{"query keys", func(p center.Principal) error { _, err := w.c.QueryKeys(ctx, p, nil); return err }, map[string]string{"nocrypto": authz.CryptoManageKeys}},
		{"clone policy", func(p center.Principal) error {
			_, err := w.c.ClonePolicy(ctx, p, policy.VMEncryption, "x", "")
			return err
		},
			map[string]string{"nocrypto": authz.CryptoManageEncryptionPolicy, "reader": authz.ProfileUpdate}},
	} {
		for user, want := range c.privilege {
			err := c.do(who[user])
			var f *center.Fault
			if err != nil {
				f = task.AsFault(err)
			}
			switch {
			case want == "" && err != nil:
				t.Errorf("%s may not %s: %v", user, c.what, err)
			case want != "" && (f == nil || f.Kind != task.NoPermission || f.Privilege != want || !strings.Contains(f.Message, want)):
				t.Errorf("%s, %s: %v, want that %s is missing", c.what, user, err, want)
			}
		}
	}
	// Encrypt, but not decrypt.
	for _, ref := range w.c.View().All(inventory.KindTask) { // what nocrypto began
		w.end(ref, nil)
	}
	w.ok(w.c.PowerOff(ctx, w.p, plain))
	w.ok(w.c.ReconfigureVM(ctx, who["encrypter"], plain, encrypt))
	w.faulted(task.NoPermission, authz.CryptoDecrypt, second(w.c.ReconfigureVM(ctx, who["encrypter"], plain, crypto(center.CryptoDecrypt))))
	// A task can be cancelled by who began it, or who has the privilege.
	w.faulted(task.NoPermission, authz.GlobalCancelTask, w.c.CancelTask(ctx, who["reader"], w.c.View().All(inventory.KindTask)[0]))
}

// A conversion is interrupted in every way there is, and finishes when it is
// asked for again (R3, R4).
func TestInterruptedConversion(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", "")
	encrypt := center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt}}
	again := func(kind center.CryptoKind) *task.Record {
		t.Helper()
		return w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: kind}}))
	}

	// The datastore is full half way.
	w.ds.SetFull(true)
	w.fails(task.NoDiskSpace, "full", "", second2(w.end(w.c.ReconfigureVM(ctx, w.p, ref, encrypt))))
	vm := w.vm(ref)
	if !vm.Encrypted || vm.Converting != nil || vm.Disks[0].Encrypted || vm.Disks[0].Converting == nil || vm.Disks[0].Converting.Kind != inventory.ConvertEncrypt ||
		vm.Disks[0].Converting.BoundaryBytes != 4<<20 || vm.Disks[1].Converting != nil || vm.Disks[1].Encrypted {
		t.Errorf("half way: %+v", vm)
	}
	if !w.sawEvent(event.NoDiskSpace) {
		t.Error("no event tells of the full datastore")
	}
	target := *vm.Disks[0].Converting.Target
	if target != *vm.KeyID || !holds(w.host, &target, vm) {
		t.Errorf("the target is %v, the VM's key %v", target, vm.KeyID)
	}
	// Nothing else can be done with the disk meanwhile; the VM runs.
	w.faulted(task.InvalidState, "interrupted finish", second(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDecrypt}})))
	_, err := w.c.ImportDisk(ctx, w.p, ref, 2000, nil)
	w.faulted(task.InvalidState, "interrupted", err)
	other, err := w.c.GenerateKey(ctx, w.p, provider)
	w.must(err)
	f := w.faulted(task.InvalidVMConfig, target.Key, second(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: other}})))
	if f.MessageKey != "msg.hostd.configSpec.enc.mixedKeys" {
		t.Errorf("message key %q", f.MessageKey)
	}
	w.ok(w.c.PowerOn(ctx, w.p, ref))
	w.ok(w.c.PowerOff(ctx, w.p, ref))
	w.ds.SetFull(false)
	keys := len(w.kms.Keys())
	again(center.CryptoEncrypt)
	if vm = w.vm(ref); !vm.Disks[0].Encrypted || !vm.Disks[1].Encrypted || *vm.Disks[0].KeyID != target || *vm.Disks[1].KeyID != target || vm.Disks[0].Converting != nil || len(w.kms.Keys()) != keys {
		t.Errorf("after asking again: %+v", vm)
	}

	// A deep recrypt finds the datastore full, too. Meanwhile nothing else can be done.
	stepped := make(chan int, 100)
	w.host.OnStep(func(step int) {
		stepped <- step
		time.Sleep(20 * time.Millisecond)
	})
	w.ds.SetFull(true)
	deep := center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDeep}}
	taskRef, err := w.c.ReconfigureVM(ctx, w.p, ref, deep)
	w.must(err)
	<-stepped
	<-stepped
	w.faulted(task.TaskInProgress, string(taskRef)+" web", second(w.c.PowerOn(ctx, w.p, ref)))
	w.faulted(task.TaskInProgress, "web", w.c.UnregisterVM(ctx, w.p, ref))
	w.faulted(task.TaskInProgress, string(taskRef)+" web", second3(w.c.EstimateReconfigure(ctx, w.p, ref, deep)))
	w.faulted(task.NoDiskSpace, "full", second2(w.end(taskRef, nil)))
	w.host.OnStep(nil)
	w.ds.SetFull(false)
	vm = w.vm(ref)
	if vm.Disks[0].Converting == nil || *vm.Disks[0].KeyID != target || *vm.KeyID == target {
		t.Errorf("half way through a recrypt: %+v", vm)
	}
	for _, id := range []inventory.KeyID{target, *vm.Disks[0].Converting.Target} {
		if !holds(w.host, &id, vm) {
			t.Errorf("the host lost key %v; both are needed half way", id)
		}
	}
	// Both keys come back after a power cut.
	w.host.Restart()
	w.eventually("both keys are back", func() bool { return holds(w.host, &target, vm) && holds(w.host, vm.Disks[0].Converting.Target, vm) })
	keys = len(w.kms.Keys())
	again(center.CryptoDeep)
	if vm = w.vm(ref); *vm.Disks[0].KeyID != *vm.KeyID || *vm.Disks[1].KeyID != *vm.KeyID || holds(w.host, &target, vm) || len(w.kms.Keys()) != keys {
		t.Errorf("after finishing: %+v, the host holds %v", vm, w.host.Held())
	}

	// The host goes away in the middle and comes back.
	var cut atomic.Bool
	w.host.OnStep(func(step int) {
		if step == 3 && cut.CompareAndSwap(false, true) {
			go func() { w.host.Restart() }()
			time.Sleep(100 * time.Millisecond)
		}
	})
	again(center.CryptoDecrypt)
	w.host.OnStep(nil)
	if vm = w.vm(ref); vm.AnyEncrypted() || !cut.Load() {
		t.Errorf("after a decryption through a power cut: %+v", vm)
	}

	// The host dies for good: the task ends, the note stays.
	cut.Store(false)
	w.host.OnStep(func(step int) {
		if step == 3 && cut.CompareAndSwap(false, true) {
			go w.host.Stop()
			time.Sleep(100 * time.Millisecond)
		}
	})
	w.fails(task.HostDown, "esx1", "", second2(w.end(w.c.ReconfigureVM(ctx, w.p, ref, encrypt))))
	w.host.OnStep(nil)
	if vm = w.vm(ref); vm.Disks[0].Converting == nil || vm.Disks[0].Encrypted {
		t.Errorf("after the host's death: %+v", vm)
	}
	w.host.Start()
	w.eventually("the host is back", func() bool { return w.hostNamed("esx1").Connection == inventory.Connected })
	again(center.CryptoEncrypt)
	if vm = w.vm(ref); !vm.Encrypted || !vm.Disks[0].Encrypted || !vm.Disks[1].Encrypted {
		t.Errorf("at the end: %+v", vm)
	}
	if got := w.vm(ref).Disks[1].KeyID; *got != *vm.KeyID {
		t.Errorf("the last disk has key %v, the VM %v", got, vm.KeyID)
	}
}

// The inventory has the last word on encryption (E8): editing files never turns
// it off.
func TestTampering(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	for name, tamper := range map[string]func(*centertestTampered){
		"strip":     func(f *centertestTampered) { f.StripHome(); f.StripDisk(0); f.StripDisk(1) },
		"disk":      func(f *centertestTampered) { f.StripDisk(0) },
		"roll-back": func(f *centertestTampered) { f.Epoch(0) },
		"exchange":  func(f *centertestTampered) { f.UUID("00000000-0000-4000-8000-000000000000") },
	} {
		ref := w.createVM(name, policy.VMEncryption)
		w.ds.Tamper(w.vm(ref).Path, tamper)
		f := w.fails(task.GenericVMConfig, name, "", second2(w.end(w.c.PowerOn(ctx, w.p, ref))))
		if f.MessageKey != "msg.keysafe.locator" {
			t.Errorf("%s: message key %q", name, f.MessageKey)
		}
		vm := w.vm(ref)
		if !vm.Encrypted || !vm.Disks[0].Encrypted || vm.Power != inventory.PoweredOff {
			t.Errorf("%s: tampering changed the inventory: %+v", name, vm)
		}
		if name == "exchange" {
			w.fails(task.GenericVMConfig, "another", "", second2(w.end(w.c.DestroyVM(ctx, w.p, ref))))
			continue
		}
		// Leaving the inventory and coming back does not help.
		w.must(w.c.UnregisterVM(ctx, w.p, ref))
		spec := center.RegisterVMSpec{Path: "[ds1] " + vm.Path}
		w.fails(task.GenericVMConfig, "older "+name, "", second2(w.end(w.c.RegisterVM(ctx, w.p, spec))))
		spec.AcceptOlderEpoch = true
		if name == "disk" { // encrypted files with a plain disk are legal
			w.ok(w.c.RegisterVM(ctx, w.p, spec))
		}
	}
	// A key safe that names somebody else's key gets it from nobody.
	victim, thief := w.createVM("victim", policy.VMEncryption), w.createVM("thief", policy.VMEncryption)
	key := *w.vm(victim).KeyID
	w.ds.Tamper("thief/thief.vmx", func(f *centertestTampered) { f.NameKey(key.Provider, key.Key) })
	f := w.fails(task.KeyRequired, "thief", "", second2(w.end(w.c.PowerOn(ctx, w.p, thief))))
	if len(f.Keys) != 1 || f.Keys[0] != key || holds(w.host, &key, w.vm(thief)) || !w.sawEvent(event.KeyNotOurs) {
		t.Errorf("fault %+v; the host holds %v", f, w.host.Held())
	}

	nocrypto := w.user("nocrypto", authz.RoleNoCryptoAdmin, inventory.RootFolder)
	ref := w.createVM("restored", policy.VMEncryption)
	w.must(w.c.UnregisterVM(ctx, w.p, ref))
	w.ds.Tamper("restored/restored.vmx", func(f *centertestTampered) { f.Epoch(0) })
	spec := center.RegisterVMSpec{Path: "[ds1] restored/restored.vmx", AcceptOlderEpoch: true}
	w.fails(task.NoPermission, authz.CryptoRegisterVM, "", second2(w.end(w.c.RegisterVM(ctx, nocrypto, spec))))
	w.ok(w.c.RegisterVM(ctx, w.p, spec))
}

// Names, folders and UUIDs are taken once; what a failed creation took is free.
func TestNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", "")
	f := w.faulted(task.DuplicateName, "web", second(w.c.CreateVM(ctx, w.p, vmSpec("web", ""))))
	if f.Object != ref {
		t.Errorf("the name belongs to %s", f.Object)
	}
	spec := vmSpec("other", "")
	spec.UUID = w.vm(ref).UUID
	w.faulted(task.AlreadyExists, w.vm(ref).UUID, second(w.c.CreateVM(ctx, w.p, spec)))
	spec = vmSpec("other", "")
	spec.Path = "[ds1] web/web.vmx"
	w.faulted(task.AlreadyExists, "folder web", second(w.c.CreateVM(ctx, w.p, spec)))
	w.fails(task.AlreadyExists, w.vm(ref).UUID, "", second2(w.end(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] web/web.vmx", Name: "twice"}))))
	for _, c := range []struct{ field, path string }{{"", "web/web.vmx"}, {"", "[ds1] ../x/x.vmx"}, {"", "[ds1] /etc/passwd"}, {"", "[ds1] web"}, {"", "[] a/a.vmx"}} {
		w.faulted(task.InvalidArgument, "", second(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: c.path})))
	}
	w.faulted(task.NotFound, "nope", second(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[nope] a/a.vmx"})))
	w.fails(task.FileNotFound, "a/a.vmx", "", second2(w.end(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] a/a.vmx"}))))
	for _, bad := range []center.CreateVMSpec{{Name: ""}, {Name: "a/b"}, {Name: strings.Repeat("x", 81)}, {Name: "a\nb"}, {Name: " a"},
		{Name: "n", UUID: "12"}, {Name: "n", Hardware: center.HardwareSpec{CPUs: -1}}, {Name: "n", Disks: []center.NewDiskSpec{{CapacityBytes: -1}}},
		{Name: "n", Disks: []center.NewDiskSpec{{CapacityBytes: 1000}}}, {Name: "n", Crypto: center.CryptoSpec{Kind: center.CryptoDecrypt}},
		{Name: "n", Path: "[ds1] ../../x"}, {Name: "n", Datastore: "a", Path: "[b] x"}, {Name: "n", MigrateEncryption: "sometimes"}} {
		w.faulted(task.InvalidArgument, "", second(w.c.CreateVM(ctx, w.p, bad)))
	}
	w.faulted(task.InvalidDeviceSpec, "encrypt", second(w.c.CreateVM(ctx, w.p, center.CreateVMSpec{Name: "n", Disks: []center.NewDiskSpec{{CapacityBytes: 1 << 20, Profile: policy.VMEncryption}}})))
	w.faulted(task.NotFound, "group-v99", second(w.c.CreateVM(ctx, w.p, center.CreateVMSpec{Name: "n", Folder: "group-v99"})))
	w.faulted(task.InvalidArgument, "VMs", second(w.c.CreateVM(ctx, w.p, center.CreateVMSpec{Name: "n", Folder: inventory.DefaultHostFolder})))
	w.faulted(task.NotFound, "there", second(w.c.PowerOn(ctx, w.p, "vm-999")))

	// The host fails: nothing of the VM stays, and its key is named.
	w.ds.SetFull(true)
	w.fails(task.NoDiskSpace, "full", "", taskErr(w, vmSpec("full", policy.VMEncryption)))
	w.ds.SetFull(false)
	types, text := w.events()
	if !slices.Contains(types, event.KeyOrphaned) || !strings.Contains(text, "1 key was made and not used") {
		t.Errorf("no event names the orphaned key:\n%s", text)
	}
	orphans := len(w.kms.Keys())
	w.createVM("full", policy.VMEncryption)
	if len(w.kms.Keys()) != orphans+1 {
		t.Error("a rollback destroyed a key, or a new VM took the orphan")
	}
	// A host that cannot become safe takes no encrypted VM, and says why (E1).
	h := w.join("esx2")
	h.Stop()
	w.eventually("center misses the host", func() bool { return w.hostNamed("esx2").Connection == inventory.NotResponding })
	h.Incapable = []string{"swap on /dev/sda2 is not encrypted"}
	h.Start()
	w.eventually("the host is incapable", func() bool {
		return w.hostNamed("esx2").CryptoState == inventory.HostIncapable && w.hostNamed("esx2").Connection == inventory.Connected
	})
	spec = vmSpec("swapped", policy.VMEncryption)
	spec.Host = w.hostNamed("esx2").Ref
	w.fails(task.InvalidState, "esx2 swap", "", taskErr(w, spec))
	spec.Profile = ""
	w.ok(w.c.CreateVM(ctx, w.p, spec))
}

// The data paths: a disk's content goes in, a console goes both ways.
func TestImportAndConsole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", policy.VMEncryption)
	parts := &stream{parts: []part{{0, []byte("begin")}, {1 << 20, make([]byte, 3<<20)}, {8<<20 - 3, []byte("end")}}}
	n, err := w.c.ImportDisk(ctx, w.p, ref, 2000, parts)
	if err != nil || n != 5+3<<20+3 {
		t.Fatalf("%d bytes written, %v", n, err)
	}
	content := w.ds.Content(w.vm(ref).Path, 0)
	if string(content[:5]) != "begin" || string(content[8<<20-3:]) != "end" || w.vm(ref).Disks[0].AllocatedBytes == 0 {
		t.Error("the content is not what was sent")
	}
	for what, c := range map[string]struct {
		s    *stream
		key  int32
		kind task.FaultKind
	}{
		"beyond the end": {&stream{parts: []part{{8<<20 - 1, []byte("xx")}}}, 2000, task.InvalidArgument},
		"backwards":      {&stream{parts: []part{{4096, []byte("x")}, {0, []byte("x")}}}, 2000, task.InvalidArgument},
		"far out":        {&stream{parts: []part{{1 << 62, []byte("x")}}}, 2000, task.InvalidArgument},
		"negative":       {&stream{parts: []part{{-1, []byte("x")}}}, 2000, task.InvalidArgument},
		"broken off":     {&stream{parts: []part{{0, []byte("x")}}, err: io.ErrUnexpectedEOF}, 2000, task.InvalidArgument},
		"no such disk":   {&stream{}, 2009, task.NotFound},
	} {
		if _, err := w.c.ImportDisk(ctx, w.p, ref, c.key, c.s); !task.Is(err, c.kind) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = w.c.Console(ctx, w.p, ref)
	w.faulted(task.InvalidPowerState, "powered on", err)
	w.ok(w.c.PowerOn(ctx, w.p, ref))
	_, err = w.c.ImportDisk(ctx, w.p, ref, 2000, &stream{})
	w.faulted(task.InvalidPowerState, "powered off", err)
	con, err := w.c.Console(ctx, w.p, ref)
	w.must(err)
	for _, line := range []string{"hello\n", strings.Repeat("x", 100_000)} {
		go fmt.Fprint(con, line)
		got := make([]byte, len(line))
		if _, err := io.ReadFull(con, got); err != nil || string(got) != strings.ToUpper(line) {
			t.Errorf("the console says %.20q, %v", got, err)
		}
	}
	fmt.Fprint(con, "exit\n")
	if rest, err := io.ReadAll(con); err != nil || len(rest) != 0 {
		t.Errorf("at the end the console says %q, %v", rest, err)
	}
	con.Close()
	con, err = w.c.Console(ctx, w.p, ref)
	w.must(err)
	con.Close()
	if _, err := con.Read(make([]byte, 1)); err == nil {
		t.Error("a closed console can be read")
	}
}

type part struct {
	offset int64
	data   []byte
}

type stream struct {
	parts []part
	err   error
}

func (s *stream) Next() (int64, []byte, error) {
	if len(s.parts) == 0 {
		if s.err != nil {
			return 0, nil, s.err
		}
		return 0, nil, io.EOF
	}
	p := s.parts[0]
	s.parts = s.parts[1:]
	return p.offset, p.data, nil
}

// A host that does not do what it says is not believed.
func TestHostLies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", policy.VMEncryption)
	w.host.OnCall(func(method string) error {
		if method == "ReconfigureVM" {
			w.ds.Tamper("web/web.vmx", func(f *centertestTampered) { f.LieAbout(1) })
		}
		return nil
	})
	w.fails(task.Internal, "web not encrypted", "", second2(w.end(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Hardware: center.HardwareSpec{CPUs: 2}}))))
	if vm := w.vm(ref); !vm.Disks[1].Encrypted {
		t.Error("the inventory believed the host")
	}
	w.host.OnCall(func(method string) error {
		if method == "PowerOn" {
			return hostapi.Faultf(hostapi.Fault_IN_USE, "the extent is locked by another process")
		}
		return nil
	})
	w.fails(task.FileLocked, "locked web", "", second2(w.end(w.c.PowerOn(ctx, w.p, ref))))
}
