package center_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/center/centertest"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// The KMS is away (K8): what needs no key from it goes on, the rest says so, and
// all comes right by itself when it is back.
func TestKMSDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", policy.VMEncryption)
	other := w.createVM("other", policy.VMEncryption)
	w.kms.Stop()

	keys, vms := len(w.host.Held()), w.ds.VMs()
	f := w.fails(task.ProviderDown, provider+" server network", "", taskErr(w, vmSpec("new", policy.VMEncryption)))
	if f.Name != provider || w.ds.VMs() != vms || len(w.host.Held()) != keys {
		t.Errorf("a creation that failed left something; fault %+v", f)
	}
	w.fails(task.ProviderDown, provider, "", second2(w.end(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoShallow}}))))

	// The host holds the keys: nobody asks the KMS.
	w.ok(w.c.PowerOn(ctx, w.p, ref))
	w.ok(w.c.Reset(ctx, w.p, ref))
	w.ok(w.c.PowerOff(ctx, w.p, ref))
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDecrypt}}))
	w.ok(w.c.ReconfigureVM(ctx, w.p, other, center.ReconfigureSpec{Hardware: center.HardwareSpec{CPUs: 2}}))

	// After a power cut of the host its memory is empty.
	w.ok(w.c.PowerOn(ctx, w.p, other))
	w.host.Restart()
	w.eventually("the VM is locked", func() bool {
		vm := w.vm(other)
		return vm.CryptoState == inventory.Locked && vm.Power == inventory.PoweredOff && vm.LockedReason != ""
	})
	w.fails(task.ProviderDown, "locked other "+provider, "", second2(w.end(w.c.PowerOn(ctx, w.p, other))))
	w.fails(task.ProviderDown, provider, "", second2(w.end(w.c.CryptoUnlock(ctx, w.p, other))))
	w.ok(w.c.PowerOn(ctx, w.p, ref)) // in clear: no key, no KMS

	w.kms.Start()
	w.eventually("the VM is unlocked when the KMS is back", func() bool { return w.vm(other).CryptoState == inventory.Unlocked })
	w.ok(w.c.PowerOn(ctx, w.p, other))
	if !w.host.Running(w.vm(other).UUID) {
		t.Error("the guest does not run")
	}
	h := w.hostNamed("esx1")
	if _, held := w.host.Held()[h.HostKey.String()]; !held {
		t.Error("the host key was not pushed again (H2)")
	}
	for _, e := range []string{event.VMLockedCluster, event.VMUnlocked, event.SendKeyError, event.KeyGenerateFail} {
		if !w.sawEvent(e) {
			t.Errorf("no event %s", e)
		}
	}
}

// taskErr creates a VM and returns the task's fault.
func taskErr(w *world, spec center.CreateVMSpec) error {
	return second2(w.end(w.c.CreateVM(context.Background(), w.p, spec)))
}

func second2(r *task.Record) error {
	if r.Error == nil {
		return nil
	}
	return r.Error
}

// A key is revoked or destroyed (K7): the VM goes on where its host holds the
// key, and is locked elsewhere.
func TestKeyRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	revoked, destroyed := w.createVM("revoked", policy.VMEncryption), w.createVM("destroyed", policy.VMEncryption)
	oneDisk := w.ok(w.c.CreateVM(ctx, w.p, center.CreateVMSpec{Name: "onedisk", Profile: policy.VMEncryption, Disks: []center.NewDiskSpec{
		{CapacityBytes: 1 << 20}, {CapacityBytes: 1 << 20, Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt}}}})).Result
	w.kms.Revoke(w.vm(revoked).KeyID.Key)
	w.kms.Destroy(w.vm(destroyed).KeyID.Key)
	w.kms.Revoke(w.vm(oneDisk).Disks[1].KeyID.Key)

	w.ok(w.c.PowerOn(ctx, w.p, revoked)) // from the host's memory
	w.ok(w.c.PowerOff(ctx, w.p, revoked))
	infos, err := w.c.QueryKeys(ctx, w.p, []inventory.KeyID{*w.vm(revoked).KeyID, *w.vm(destroyed).KeyID, {Provider: provider, Key: "4711"}, {Provider: "gone", Key: "1"}, *w.vm(oneDisk).KeyID})
	w.must(err)
	for i, want := range []struct {
		state, reason string
		available     bool
		vms           int
	}{{"Deactivated", "KeyStateNotActiveOrEnabled", false, 1}, {"Destroyed", "KeyStateNotActiveOrEnabled", false, 1},
		{"", "KeyStateMissingInKMS", false, 0}, {"", "KeyStateClusterInvalid", false, 0}, {"Active", "", true, 1}} {
		g := infos[i]
		if g.State != want.state || g.Reason != want.reason || g.Available != want.available || len(g.VMs) != want.vms || (want.vms == 1) != (len(g.Hosts) == 1) {
			t.Errorf("key %d: %+v, want %+v", i, g, want)
		}
	}
	plain := w.createVM("plain", "")
	f := w.fails(task.KeyState, "Deactivated", "", second2(w.end(w.c.ReconfigureVM(ctx, w.p, plain,
		center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: *w.vm(revoked).KeyID}}))))
	if len(f.Keys) != 1 || w.vm(plain).AnyEncrypted() {
		t.Errorf("fault %+v, VM %+v", f, w.vm(plain))
	}
	// Recrypt is the way out while a host holds the key.
	w.ok(w.c.ReconfigureVM(ctx, w.p, revoked, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoShallow}}))
	w.kms.Revoke(w.vm(revoked).KeyID.Key)

	w.host.Restart()
	w.eventually("the VMs are locked", func() bool {
		return w.vm(revoked).CryptoState == inventory.Locked && w.vm(destroyed).CryptoState == inventory.Locked
	})
	w.fails(task.KeyState, "revoked locked Deactivated "+w.vm(revoked).KeyID.Key, "", second2(w.end(w.c.PowerOn(ctx, w.p, revoked))))
	w.fails(task.KeyState, "destroyed locked Destroyed", "", second2(w.end(w.c.PowerOn(ctx, w.p, destroyed))))
	if !w.sawEvent(event.VMLockedKMS) {
		t.Error("no event says that a VM is locked")
	}
	// A missing key of one disk does not lock the VM; it fails the power-on by
	// name (K6).
	w.eventually("the other VM's key is pushed", func() bool { return holds(w.host, w.vm(oneDisk).KeyID, w.vm(oneDisk)) })
	w.fails(task.KeyState, "onedisk_1.vmdk Deactivated", "", second2(w.end(w.c.PowerOn(ctx, w.p, oneDisk))))
	if w.vm(oneDisk).CryptoState != inventory.Unlocked {
		t.Errorf("the VM is %s", w.vm(oneDisk).CryptoState)
	}
}

// Naming a key gives no right to it, neither in a spec nor in a file.
func TestNamingAKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	theirs := w.createVM("theirs", policy.VMEncryption)
	mine := w.createVM("mine", "")
	key := *w.vm(theirs).KeyID

	everything, err := w.c.Authority().CreateRole(ctx, "everything", authz.Privileges())
	w.must(err)
	eve := w.user("eve", everything.ID, mine)
	spec := center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: key}}
	for _, on := range []inventory.Ref{w.hostNamed("esx1").Ref, inventory.DefaultPool, w.vm(mine).Datastore} {
		w.user("eve", everything.ID, on)
	}
	f := w.faulted(task.NoPermission, "in use theirs "+authz.CryptoAccess, second(w.c.ReconfigureVM(ctx, eve, mine, spec)))
	if f.Object != theirs || f.Privilege != authz.CryptoAccess || len(f.Keys) != 1 {
		t.Errorf("fault %+v", f)
	}
	send := center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoRegister, Keys: []inventory.KeyID{key}}}
	w.faulted(task.NoPermission, "theirs", second(w.c.ReconfigureVM(ctx, eve, mine, send)))
	add := center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt},
		Disks: []center.DiskChange{{Op: center.DiskAdd, CapacityBytes: 1 << 20, Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: key}}}}
	w.faulted(task.NoPermission, "theirs", second(w.c.ReconfigureVM(ctx, eve, mine, add)))
	w.user("eve", everything.ID, inventory.DefaultVMFolder)
	w.user("eve", authz.RoleNoAccess, theirs)
	create := vmSpec("new", policy.VMEncryption)
	create.Crypto = center.CryptoSpec{Kind: center.CryptoEncrypt, Key: key}
	w.faulted(task.NoPermission, "theirs", second(w.c.CreateVM(ctx, eve, create)))
	if holds(w.host, &key, w.vm(mine)) {
		t.Error("the key reached the host for the wrong VM")
	}
	// A host key is nobody's to name.
	hostKey := *w.hostNamed("esx1").HostKey
	w.faulted(task.NoPermission, "host key esx1", second(w.c.ReconfigureVM(ctx, w.p, mine, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: hostKey}})))
	// With a right to the data that the key protects, it can be named.
	w.user("eve", everything.ID, theirs)
	w.ok(w.c.ReconfigureVM(ctx, eve, mine, spec))
	if *w.vm(mine).KeyID != key || !holds(w.host, &key, w.vm(mine)) || !holds(w.host, &key, w.vm(theirs)) {
		t.Error("the VMs do not share the key")
	}
	// A file names keys too: a copy of somebody's folder gives no right to it.
	w.must(w.c.UnregisterVM(ctx, w.p, mine))
	w.user("eve", authz.RoleNoAccess, theirs)
	w.fails(task.NoPermission, "theirs", "", second2(w.end(w.c.RegisterVM(ctx, eve, center.RegisterVMSpec{Path: "[ds1] mine/mine.vmx"}))))
	if holds(w.host, &key, &inventory.VM{UUID: w.uuidOf("mine/mine.vmx")}) {
		t.Error("the key reached the host for a VM that was not registered")
	}
	w.ok(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] mine/mine.vmx"}))
}

func (w *world) uuidOf(path string) string { return w.ds.UUIDOf(path) }

// Keys leave a host's memory when nothing there needs them (K9), also when the
// host was away.
func TestKeysLeave(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	a := w.createVM("a", policy.VMEncryption)
	shared := *w.vm(a).KeyID
	b := w.ok(w.c.CreateVM(ctx, w.p, center.CreateVMSpec{Name: "b", Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: shared}})).Result
	vmA, vmB := w.vm(a), w.vm(b)
	w.must(w.c.UnregisterVM(ctx, w.p, a))
	if holds(w.host, &shared, vmA) || !holds(w.host, &shared, vmB) {
		t.Errorf("after one of two VMs is gone the host holds %v", w.host.Held())
	}
	if _, known := w.c.View().Get(a); known {
		t.Error("the VM is still in the inventory")
	}
	w.host.Stop()
	w.eventually("center misses the host", func() bool { return w.hostNamed("esx1").Connection == inventory.NotResponding })
	w.fails(task.HostDown, "esx1", "", second(w.c.DestroyVM(ctx, w.p, b)))
	w.fails(task.HostDown, "esx1", "", second(w.c.PowerOn(ctx, w.p, b)))
	w.fails(task.HostDown, "esx1 not connected", "", second(w.c.CreateVM(ctx, w.p, vmSpec("c", ""))))
	w.must(w.c.UnregisterVM(ctx, w.p, b))
	if _, held := w.host.Held()[shared.String()]; !held {
		t.Fatal("this test needs the host to hold the key still")
	}
	w.host.Start()
	w.eventually("the key is wiped when the host is back", func() bool {
		_, held := w.host.Held()[shared.String()]
		return !held
	})
	if !w.sawEvent(event.HostLost) || !w.sawEvent(event.KeyRemoved) {
		t.Error("no event tells of it")
	}
	w.eventually("nothing waits to be removed", func() bool { return len(w.hostNamed("esx1").RemoveKeys) == 0 })
	if !slices.Contains(w.kms.Keys(), shared.Key) {
		t.Error("the KMS lost the key")
	}
	// A VM restored from backup still opens.
	ref := w.ok(w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] b/b.vmx"})).Result
	w.ok(w.c.PowerOn(ctx, w.p, ref))
}

// After a host's restart every key that its VMs need comes in one batch, and a
// restart of center changes nothing for running guests.
func TestRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	var refs []inventory.Ref
	for _, name := range []string{"a", "b", "c"} {
		refs = append(refs, w.createVM(name, policy.VMEncryption))
	}
	pushes := w.host.Calls("PushKeys")
	w.host.Restart()
	w.eventually("all keys are back", func() bool {
		for _, ref := range refs {
			if !holds(w.host, w.vm(ref).KeyID, w.vm(ref)) {
				return false
			}
		}
		return true
	})
	if n := w.host.Calls("PushKeys") - pushes; n != 1 {
		t.Errorf("%d messages brought the keys", n)
	}
	if !w.sawEvent(event.HostRestarted) {
		t.Error("no alarm tells of the host's restart (H2)")
	}
	w.ok(w.c.PowerOn(ctx, w.p, refs[0]))
	uuid := w.vm(refs[0]).UUID
	w.reopen()
	if w.c.InitialPassword() != "" {
		t.Error("a second start made another password")
	}
	w.eventually("the host is connected", func() bool { return w.hostNamed("esx1").Connection == inventory.Connected })
	if !w.host.Running(uuid) || w.vm(refs[0]).Power != inventory.PoweredOn {
		t.Error("a running guest did not survive center's restart")
	}
	w.host.Crash(uuid)
	w.eventually("center learns that the guest ended", func() bool { return w.vm(refs[0]).Power == inventory.PoweredOff })
	w.ok(w.c.PowerOn(ctx, w.p, refs[0]))
	w.must(w.c.ShutdownGuest(ctx, w.p, refs[0]))
	w.eventually("the guest has shut down", func() bool { return w.vm(refs[0]).Power == inventory.PoweredOff })
	// A host that came back from a power cut reports nothing of a VM that ran.
	w.ok(w.c.PowerOn(ctx, w.p, refs[1]))
	w.host.Restart()
	w.eventually("center learns of the power cut", func() bool { return w.vm(refs[1]).Power == inventory.PoweredOff })
}

// A provider in use goes, and comes back under its name (K6).
func TestProviderRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", policy.VMEncryption)
	w.faulted(task.ResourceInUse, "web "+provider, w.c.RemoveProvider(ctx, w.p, provider))
	w.faulted(task.ResourceInUse, "web", w.c.RemoveKmipServer(ctx, w.p, provider, "kms-1"))
	w.faulted(task.InvalidState, "web", w.c.RemoveProviderAnyway(ctx, w.p, provider, nil))
	vms, hosts := w.c.WhatLocks(provider)
	if len(vms) != 1 || vms[0] != ref || len(hosts) != 1 {
		t.Errorf("it would lock %v, %v", vms, hosts)
	}
	w.must(w.c.RemoveProviderAnyway(ctx, w.p, provider, vms))
	w.ok(w.c.PowerOn(ctx, w.p, ref)) // the host holds the key
	w.host.Restart()
	w.eventually("the VM is locked", func() bool { return w.vm(ref).CryptoState == inventory.Locked })
	w.fails(task.ProviderError, provider+" add", "", second2(w.end(w.c.PowerOn(ctx, w.p, ref))))
	start := time.Now()
	w.setUpProvider()
	w.eventually("the VM is unlocked", func() bool { return w.vm(ref).CryptoState == inventory.Unlocked })
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("it took %v; adding a provider should have keys asked for at once", d)
	}
	w.ok(w.c.PowerOn(ctx, w.p, ref))
}

// The servers of a provider must prove that they share keys, before a key is
// made there (K5).
func TestServersShareKeys(t *testing.T) {
	t.Parallel()
	w := newEmptyWorld(t)
	w.setUpProvider()
	ctx := context.Background()
	add := func(name string, k *centertest.KMS) {
		w.must(w.c.RegisterKmipServer(ctx, w.p, provider, center.KmipServer{Name: name, Address: "127.0.0.1", Port: k.Port}))
		w.must(w.c.TrustServerCertificate(ctx, w.p, provider, name, k.Certificate()))
	}
	add("kms-2", w.kms) // another address of the same cluster, as it were
	if _, err := w.c.GenerateKey(ctx, w.p, provider); err != nil {
		t.Fatalf("with two servers that share keys: %v", err)
	}
	made := len(w.kms.Keys())
	if _, err := w.c.GenerateKey(ctx, w.p, provider); err != nil || len(w.kms.Keys()) != made+1 {
		t.Errorf("it is proven once: %d keys became %d, %v", made, len(w.kms.Keys()), err)
	}
	other := centertest.StartKMS(t)
	cert, err := w.c.ClientCert(ctx, w.p, provider)
	w.must(err)
	other.Trust(cert)
	add("stranger", other)
	_, err = w.c.GenerateKey(ctx, w.p, provider)
	w.faulted(task.ProviderError, "share "+provider, err)
	w.must(w.c.RemoveKmipServer(ctx, w.p, provider, "stranger"))
	if _, err := w.c.GenerateKey(ctx, w.p, provider); err != nil {
		t.Errorf("without the stranger: %v", err)
	}
}
