package center_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mortise/internal/center"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// An encrypted VM's life, and after it: no key is anywhere in center's state.
func TestEncryptedVM(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	if h := w.hostNamed("esx1"); h.CryptoState != inventory.HostPrepared {
		t.Fatalf("before its first encrypted VM the host is %s", h.CryptoState)
	}
	spec := vmSpec("web", policy.VMEncryption)
	spec.Hardware.Firmware = "efi" // whose variables a running guest has open
	ref := w.ok(w.c.CreateVM(ctx, w.p, spec)).Result
	vm := w.vm(ref)
	first := *vm.KeyID
	if !vm.Encrypted || vm.CryptoState != inventory.Unlocked || vm.MigrateEncryption != inventory.MigrateRequired || vm.Profile != policy.VMEncryption ||
		vm.Path != "web/web.vmx" || len(vm.Disks) != 2 || first.Provider != provider || len(vm.Hardware.NICs) != 1 || vm.Hardware.NICs[0].MAC == "" {
		t.Fatalf("the VM is %+v", vm)
	}
	for _, d := range vm.Disks {
		if !d.Encrypted || *d.KeyID != first || d.Cipher == "" || d.Epoch == 0 {
			t.Errorf("by default a disk follows its VM (E6); this one is %+v", d)
		}
	}
	h := w.hostNamed("esx1")
	if _, held := w.host.Held()[h.HostKey.String()]; h.CryptoState != inventory.HostSafe || !held {
		t.Errorf("after its first encrypted VM the host is %s, with host key %v (H1)", h.CryptoState, h.HostKey)
	}
	if len(w.kms.Keys()) != 2 { // the VM's and the host's
		t.Errorf("the KMS has %d keys", len(w.kms.Keys()))
	}

	w.ok(w.c.PowerOn(ctx, w.p, ref))
	if vm = w.vm(ref); vm.Power != inventory.PoweredOn || vm.BootTime.IsZero() || !w.host.Running(vm.UUID) {
		t.Errorf("after power-on: %+v", vm)
	}
	w.fails(task.InvalidPowerState, "powered off", "", second(w.c.PowerOn(ctx, w.p, ref)))
	for _, kind := range []center.CryptoKind{center.CryptoDeep, center.CryptoDecrypt} {
		w.fails(task.InvalidPowerState, "web powered", "", second(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: kind}})))
	}

	// Shallow, under the running guest (R1).
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoShallow}}))
	vm = w.vm(ref)
	shallow := *vm.KeyID
	if shallow == first || *vm.Disks[0].KeyID != shallow || *vm.Disks[1].KeyID != shallow || vm.Converting != nil || vm.Disks[0].Converting != nil {
		t.Errorf("after a shallow recrypt: %+v", vm)
	}
	if holds(w.host, &first, vm) || !holds(w.host, &shallow, vm) {
		t.Errorf("the host holds %v", w.host.Held())
	}
	w.ok(w.c.Reset(ctx, w.p, ref))
	w.ok(w.c.PowerOff(ctx, w.p, ref))

	// Deep, each with a key of its own for one disk.
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{
		Crypto: center.CryptoSpec{Kind: center.CryptoDeep},
		Disks:  []center.DiskChange{{Op: center.DiskEdit, Key: vm.Disks[1].Key, Crypto: center.CryptoSpec{Kind: center.CryptoDeep}}},
	}))
	vm = w.vm(ref)
	if *vm.KeyID == shallow || *vm.Disks[0].KeyID != *vm.KeyID || *vm.Disks[1].KeyID == *vm.KeyID || *vm.Disks[1].KeyID == shallow {
		t.Errorf("after a deep recrypt: %v, disks %v, %v", vm.KeyID, vm.Disks[0].KeyID, vm.Disks[1].KeyID)
	}

	// Decrypt through the default policy, then encrypt through a clone (E7).
	none := policy.DatastoreDefault
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Profile: &none}))
	vm = w.vm(ref)
	if vm.AnyEncrypted() || vm.CryptoState != "" || vm.Profile != none || vm.Disks[0].Profile != none || vm.MigrateEncryption != inventory.MigrateRequired {
		t.Errorf("after decryption: %+v (V3: it stays required)", vm)
	}
	for key, vms := range w.host.Held() {
		if slices.Contains(vms, vm.UUID) {
			t.Errorf("the host still holds %s for the VM", key)
		}
	}
	gold, err := w.c.ClonePolicy(ctx, w.p, policy.VMEncryption, "gold", "")
	w.must(err)
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Profile: &gold.ID}))
	if vm = w.vm(ref); !vm.Encrypted || !vm.Disks[1].Encrypted || vm.Profile != gold.ID || vm.Disks[1].Profile != gold.ID {
		t.Errorf("after encryption: %+v", vm)
	}
	w.faulted(task.ResourceInUse, "gold web", w.c.DeletePolicy(ctx, w.p, gold.ID))
	// The same policy again changes nothing and makes no key.
	before := len(w.kms.Keys())
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Profile: &gold.ID}))
	if len(w.kms.Keys()) != before || *w.vm(ref).KeyID != *vm.KeyID {
		t.Error("applying the same policy again changed keys")
	}

	last := *vm.KeyID
	w.ok(w.c.DestroyVM(ctx, w.p, ref))
	if _, ok := w.c.View().Get(ref); ok || w.ds.VMs() != 0 || w.host.Held()[last.String()] != nil {
		t.Error("something of the deleted VM is left")
	}
	if !slices.Contains(w.kms.Keys(), last.Key) {
		t.Error("deleting a VM deleted its key at the KMS (K9: it must not)")
	}
	types, text := w.events()
	for _, want := range []string{event.VMCreated, event.KeyPushed, event.HostCryptoEnabled, event.VMPoweredOn, event.VMReset, event.VMPoweredOff, event.VMReconfigured,
		event.VMRemoved, event.KeyOrphaned, event.PolicyChanged, event.ProviderChanged} {
		if !slices.Contains(types, want) {
			t.Errorf("no event %s in\n%s", want, text)
		}
	}
	w.noKeysIn(w.dir)
}

func second(_ inventory.Ref, err error) error { return err }

// noKeysIn searches every file below dir for the bytes of every key of the KMS.
func (w *world) noKeysIn(dir string) {
	w.t.Helper()
	w.close() // so that everything is on disk
	var needles [][]byte
	ids := w.kms.Keys()
	if len(ids) < 2 {
		w.t.Fatalf("only %d keys to search for", len(ids))
	}
	for _, id := range ids {
		b := w.kms.Bytes(id)
		needles = append(needles, b, []byte(hex.EncodeToString(b)), []byte(strings.ToUpper(hex.EncodeToString(b))),
			// Any alignment of base64 holds the middle of one of these.
			[]byte(base64.RawStdEncoding.EncodeToString(b)[:40]), []byte(base64.RawStdEncoding.EncodeToString(b[1:])[:36]), []byte(base64.RawStdEncoding.EncodeToString(b[2:])[:36]),
			[]byte(base64.RawURLEncoding.EncodeToString(b)[:40]))
	}
	files, found := 0, false
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for _, n := range needles {
			if bytes.Contains(content, n) {
				w.t.Errorf("%s holds a KEK (K2)", path)
			}
		}
		// The search itself must be able to find something.
		found = found || bytes.Contains(content, []byte(ids[0]))
		return nil
	})
	if err != nil || files < 3 || !found {
		w.t.Errorf("%d files searched, a key id found: %v, %v", files, found, err)
	}
}

// What may be encrypted with what (E6), and other rules of reconfiguration.
func TestReconfigureRules(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	plain := w.createVM("plain", "")
	enc := w.createVM("enc", policy.VMEncryption)
	disk := func(ref inventory.Ref, i int, kind center.CryptoKind) center.DiskChange {
		return center.DiskChange{Op: center.DiskEdit, Key: w.vm(ref).Disks[i].Key, Crypto: center.CryptoSpec{Kind: kind}}
	}
	try := func(ref inventory.Ref, s center.ReconfigureSpec) (inventory.Ref, error) {
		return w.c.ReconfigureVM(ctx, w.p, ref, s)
	}
	crypto := func(k center.CryptoKind) center.ReconfigureSpec {
		return center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: k}}
	}
	none, gold := policy.DatastoreDefault, policy.VMEncryption
	for _, c := range []struct {
		what string
		ref  inventory.Ref
		spec center.ReconfigureSpec
		kind task.FaultKind
		key  string
		says string
	}{
		{"encrypt twice", enc, crypto(center.CryptoEncrypt), task.InvalidVMConfig, "msg.hostd.configSpec.enc.encrypted", "enc recrypt"},
		{"decrypt plain", plain, crypto(center.CryptoDecrypt), task.InvalidVMConfig, "msg.hostd.configSpec.enc.notEncrypted", "plain"},
		{"shallow plain", plain, crypto(center.CryptoShallow), task.InvalidVMConfig, "msg.hostd.configSpec.enc.notEncrypted", "plain"},
		{"disk of a plain VM", plain, center.ReconfigureSpec{Disks: []center.DiskChange{disk(plain, 0, center.CryptoEncrypt)}},
			task.InvalidDeviceSpec, "msg.hostd.deviceSpec.add.noencrypt", "encrypt VM"},
		{"VM without its disk", enc, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDecrypt}, Disks: []center.DiskChange{disk(enc, 1, center.CryptoNoOp)}},
			task.InvalidVMConfig, "msg.hostd.configSpec.enc.mismatch", "enc_1.vmdk"},
		{"disk encrypted twice", enc, center.ReconfigureSpec{Disks: []center.DiskChange{disk(enc, 0, center.CryptoEncrypt)}},
			task.InvalidDeviceOp, "msg.hostd.deviceSpec.enc.encrypted", "recrypt"},
		{"contradiction", enc, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoShallow}, Profile: &none},
			task.InvalidVMConfig, "msg.hostd.configSpec.enc.mismatch", "Default"},
		{"contradiction of a disk", enc, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskEdit, Key: 2000, Profile: &gold, Crypto: center.CryptoSpec{Kind: center.CryptoDecrypt}}}},
			task.InvalidVMConfig, "msg.hostd.configSpec.enc.mismatch", "Encryption"},
		{"no such disk", enc, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskEdit, Key: 2099}}}, task.InvalidDeviceSpec, "", "2099"},
		{"one disk twice", enc, center.ReconfigureSpec{Disks: []center.DiskChange{disk(enc, 0, center.CryptoShallow), disk(enc, 0, center.CryptoDecrypt)}}, task.InvalidArgument, "", "twice"},
		{"no such policy", enc, center.ReconfigureSpec{Profile: ptr[policy.ID]("nope")}, task.NotFound, "", "nope"},
		{"no such provider", plain, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: inventory.KeyID{Provider: "other"}}}, task.ProviderError, "", "other add"},
		{"no such key", plain, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt, Key: inventory.KeyID{Provider: provider, Key: "4711"}}}, task.KeyRequired, "", "4711 " + provider},
		{"the same key", enc, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDeep, Key: *w.vm(enc).KeyID}}, task.InvalidVMConfig, "msg.hostd.configSpec.enc.mixedKeys", "already"},
		{"migrate plainly", enc, center.ReconfigureSpec{MigrateEncryption: inventory.MigrateDisabled}, task.InvalidArgument, "", "always"},
		{"taken name", enc, center.ReconfigureSpec{Name: "plain"}, task.DuplicateName, "", "plain"},
		{"bad name", enc, center.ReconfigureSpec{Name: "a/b"}, task.InvalidArgument, "", "slash"},
		{"memory", enc, center.ReconfigureSpec{Hardware: center.HardwareSpec{MemoryMiB: 1}}, task.InvalidArgument, "", "MiB"},
		{"no such network", enc, center.ReconfigureSpec{Hardware: center.HardwareSpec{NICs: []inventory.NIC{{Key: 4000, Network: "dmz"}}}}, task.NotFound, "", "dmz"},
	} {
		t.Run(c.what, func(t *testing.T) {
			v := &world{t: t, c: w.c}
			ref, err := try(c.ref, c.spec)
			if f := v.fails(c.kind, c.says, ref, err); f.MessageKey != c.key && c.key != "" {
				t.Errorf("message key %q, want %q", f.MessageKey, c.key)
			}
		})
	}
	if n := w.vm(enc); n.Converting != nil || n.Disks[0].Converting != nil || !n.Disks[1].Encrypted {
		t.Errorf("after refusals the VM is %+v", n)
	}

	// One disk can be plain while the VM is encrypted, and be encrypted again.
	w.ok(try(enc, center.ReconfigureSpec{Disks: []center.DiskChange{disk(enc, 1, center.CryptoDecrypt)}}))
	if n := w.vm(enc); !n.Encrypted || !n.Disks[0].Encrypted || n.Disks[1].Encrypted {
		t.Errorf("after decrypting one disk: %+v", n)
	}
	w.ok(try(enc, crypto(center.CryptoShallow))) // passes over the plain disk
	keys := len(w.kms.Keys())
	w.ok(try(enc, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskEdit, Key: 2001, Profile: &gold}}}))
	if n := w.vm(enc); !n.Disks[1].Encrypted || *n.Disks[1].KeyID != *n.KeyID || len(w.kms.Keys()) != keys || n.Disks[1].Profile != gold {
		t.Errorf("a disk encrypted by its policy alone takes the VM's key: %+v", n)
	}

	// Disks come and go; new ones follow the VM.
	w.ok(try(enc, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskAdd, CapacityBytes: 1 << 20}, {Op: center.DiskRemove, Key: 2001, Destroy: true}}}))
	if n := w.vm(enc); len(n.Disks) != 2 || !n.Disks[1].Encrypted || n.Disks[1].CapacityBytes != 1<<20 || n.Disks[1].Converting != nil {
		t.Errorf("after adding and removing: %+v", n.Disks)
	}
	w.ok(try(plain, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskAdd, CapacityBytes: 1 << 20}}}))
	w.fails(task.InvalidDeviceSpec, "encrypt VM", "", second(try(plain, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskAdd, CapacityBytes: 1 << 20, Profile: &gold}}})))
	// An encrypted disk cannot be attached to a VM in clear (E6), nor one that
	// is another VM's to any.
	w.fails(task.InvalidDeviceSpec, "belongs enc", "", second(try(plain, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskAdd, Path: "[ds1] enc/enc_0.vmdk"}}})))
	ghost := w.vm(enc).Disks[0].Path
	w.must(w.c.UnregisterVM(ctx, w.p, enc))
	f := w.fails(task.InvalidDeviceSpec, "encrypt VM", "", second(try(plain, center.ReconfigureSpec{Disks: []center.DiskChange{{Op: center.DiskAdd, Path: "[ds1] " + ghost}}})))
	if f.MessageKey != "msg.hostd.deviceSpec.add.noencrypt" {
		t.Errorf("message key %q", f.MessageKey)
	}

	// Name, hardware and notes.
	w.ok(try(plain, center.ReconfigureSpec{Name: "plain2", Hardware: center.HardwareSpec{CPUs: 2, Annotation: "a note"}, MigrateEncryption: inventory.MigrateDisabled}))
	if n := w.vm(plain); n.Name != "plain2" || n.Hardware.CPUs != 2 || n.Hardware.MemoryMiB != 256 || n.Hardware.Annotation != "a note" || n.MigrateEncryption != inventory.MigrateDisabled {
		t.Errorf("after a reconfiguration: %+v", n)
	}
	w.createVM("plain", "") // the old name is free again
}

func ptr[T any](v T) *T { return &v }
