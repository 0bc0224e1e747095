package center

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

func key(s string) *KeyID { return &KeyID{Provider: "p", Key: s} }

func converting(kind, target string) *inventory.Conversion {
	c := &inventory.Conversion{Kind: kind}
	if target != "" {
		c.Target = key(target)
	}
	return c
}

// testDisk is disk number i, under a key or in clear.
func testDisk(i int32, k *KeyID) inventory.Disk {
	return inventory.Disk{UUID: fmt.Sprint("disk", i), Key: 2000 + i, Path: fmt.Sprint("d", i), Encrypted: k != nil, KeyID: k}
}

func testVM(home *KeyID, disks ...*KeyID) *inventory.VM {
	vm := &inventory.VM{Entity: inventory.Entity{Ref: "vm-1", Name: "web"}, Encrypted: home != nil, KeyID: home}
	for i, k := range disks {
		vm.Disks = append(vm.Disks, testDisk(int32(i), k))
	}
	return vm
}

// describe prints a plan: "home:encrypt/vm 0:encrypt/vm keys vm=?p".
func (p *cryptoPlan) describe() string {
	var b strings.Builder
	if p.Home != "" {
		fmt.Fprintf(&b, "home:%s/%s ", p.Home, p.Slot)
	}
	for _, d := range p.Disks {
		fmt.Fprintf(&b, "%d:%s/%s ", d.Key-2000, d.Kind, d.Slot)
	}
	for _, k := range p.Keys {
		made := ""
		if k.Made {
			made = "new "
		}
		fmt.Fprintf(&b, "[%s %s%s]", k.Slot, made, k.ID)
	}
	return strings.TrimSpace(b.String())
}

// What a spec means, for every state that a VM can be in (reference:
// vsphere-api.md, Semantics; rules E6, E7, R3).
func TestPlan(t *testing.T) {
	gold, none := policy.ID("gold"), policy.ID("none")
	spec := func(k CryptoKind, disks ...DiskChange) ReconfigureSpec {
		return ReconfigureSpec{Crypto: CryptoSpec{Kind: k}, Disks: disks}
	}
	edit := func(i int32, k CryptoKind) DiskChange {
		return DiskChange{Op: DiskEdit, Key: 2000 + i, Crypto: CryptoSpec{Kind: k}}
	}
	profile := func(p policy.ID) ReconfigureSpec { return ReconfigureSpec{Profile: &p} }
	diskProfile := func(i int32, p policy.ID) DiskChange { return DiskChange{Op: DiskEdit, Key: 2000 + i, Profile: &p} }
	named := func(k CryptoKind, id string) ReconfigureSpec {
		return ReconfigureSpec{Crypto: CryptoSpec{Kind: k, Key: *key(id)}}
	}
	half := func(vm *inventory.VM, i int, c *inventory.Conversion) *inventory.VM {
		vm.Disks[i].Converting = c
		return vm
	}
	a, b := key("a"), key("b")
	for _, c := range []struct {
		what string
		vm   *inventory.VM
		spec ReconfigureSpec
		want string // the plan, or the message key of the fault
	}{
		{"nothing", testVM(a, a), ReconfigureSpec{}, ""},
		{"encrypt: disks follow", testVM(nil, nil, nil), spec(CryptoEncrypt), "home:encrypt/vm 0:encrypt/vm 1:encrypt/vm [vm new default/]"},
		{"encrypt without disks", testVM(nil), spec(CryptoEncrypt), "home:encrypt/vm [vm new default/]"},
		{"encrypt with a named key", testVM(nil, nil), named(CryptoEncrypt, "x"), "home:encrypt/vm 0:encrypt/vm [vm p/x]"},
		{"encrypt all but one", testVM(nil, nil, nil), spec(CryptoEncrypt, edit(1, CryptoNoOp)), "home:encrypt/vm 0:encrypt/vm [vm new default/]"},
		{"encrypt, one with its own key", testVM(nil, nil, nil), spec(CryptoEncrypt, edit(1, CryptoEncrypt)), "home:encrypt/vm 0:encrypt/vm 1:encrypt/disk-2001 [vm new default/][disk-2001 new default/]"},
		{"encrypt the encrypted", testVM(a, a), spec(CryptoEncrypt), "!msg.hostd.configSpec.enc.encrypted"},
		{"one more disk", testVM(a, a, nil), spec(CryptoNone, edit(1, CryptoEncrypt)), "1:encrypt/disk-2001 [disk-2001 new default/]"},
		{"a disk of a plain VM", testVM(nil, nil), spec(CryptoNone, edit(0, CryptoEncrypt)), "!msg.hostd.deviceSpec.add.noencrypt"},
		{"a disk twice", testVM(a, a), spec(CryptoNone, edit(0, CryptoEncrypt)), "!msg.hostd.deviceSpec.enc.encrypted"},

		{"decrypt: disks follow", testVM(a, a, b, nil), spec(CryptoDecrypt), "home:decrypt/ 0:decrypt/ 1:decrypt/"},
		{"decrypt the plain", testVM(nil, nil), spec(CryptoDecrypt), "!msg.hostd.configSpec.enc.notEncrypted"},
		{"decrypt without a disk", testVM(a, a), spec(CryptoDecrypt, edit(0, CryptoNoOp)), "!msg.hostd.configSpec.enc.mismatch"},
		{"decrypt, remove the disk", testVM(a, a), spec(CryptoDecrypt, DiskChange{Op: DiskRemove, Key: 2000}), "home:decrypt/"},
		{"decrypt one disk", testVM(a, a, a), spec(CryptoNone, edit(1, CryptoDecrypt)), "1:decrypt/"},
		{"decrypt a plain disk", testVM(a, nil), spec(CryptoNone, edit(0, CryptoDecrypt)), "!msg.hostd.deviceSpec.enc.notEncrypted"},

		{"shallow", testVM(a, a, b, nil), spec(CryptoShallow), "home:shallow recrypt/vm 0:shallow recrypt/vm 1:shallow recrypt/vm [vm new default/]"},
		{"shallow of the plain", testVM(nil, nil), spec(CryptoShallow), "!msg.hostd.configSpec.enc.notEncrypted"},
		{"shallow, the same key", testVM(a, a), named(CryptoShallow, "a"), "!msg.hostd.configSpec.enc.mixedKeys"},
		{"deep", testVM(a, a), spec(CryptoDeep), "home:deep recrypt/vm 0:deep recrypt/vm [vm new default/]"},
		{"deep and shallow", testVM(a, a, a), spec(CryptoDeep, edit(1, CryptoShallow)), "home:deep recrypt/vm 0:deep recrypt/vm 1:shallow recrypt/disk-2001 [vm new default/][disk-2001 new default/]"},
		{"deep of one disk", testVM(a, a, a), spec(CryptoNone, edit(0, CryptoDeep)), "0:deep recrypt/disk-2000 [disk-2000 new default/]"},
		{"deep of a plain disk", testVM(a, nil), spec(CryptoNone, edit(0, CryptoDeep)), "!msg.hostd.deviceSpec.enc.notEncrypted"},

		{"policy encrypts", testVM(nil, nil), profile(gold), "home:encrypt/vm 0:encrypt/vm [vm new default/]"},
		{"policy on the encrypted", testVM(a, a), profile(gold), ""},
		{"policy leaves a plain disk", testVM(a, nil), profile(gold), ""},
		{"policy decrypts", testVM(a, a), profile(none), "home:decrypt/ 0:decrypt/"},
		{"policy on the plain", testVM(nil, nil), profile(none), ""},
		{"policy and no-op", testVM(nil, nil), ReconfigureSpec{Profile: &gold, Crypto: CryptoSpec{Kind: CryptoNoOp}}, ""},
		{"policy of a disk", testVM(a, nil), spec(CryptoNone, diskProfile(0, gold)), "0:encrypt/home [home p/a]"},
		{"policy of a disk, with its VM", testVM(nil, nil), ReconfigureSpec{Profile: &gold, Disks: []DiskChange{diskProfile(0, gold)}}, "home:encrypt/vm 0:encrypt/vm [vm new default/]"},
		{"policy of a disk of a plain VM", testVM(nil, nil), spec(CryptoNone, diskProfile(0, gold)), "!msg.hostd.deviceSpec.add.noencrypt"},
		{"policy and spec agree", testVM(nil, nil), ReconfigureSpec{Profile: &gold, Crypto: CryptoSpec{Kind: CryptoEncrypt}}, "home:encrypt/vm 0:encrypt/vm [vm new default/]"},
		{"policy against spec", testVM(nil, nil), ReconfigureSpec{Profile: &none, Crypto: CryptoSpec{Kind: CryptoEncrypt}}, "!msg.hostd.configSpec.enc.mismatch"},
		{"VM policy, disk against it", testVM(nil, nil, nil), ReconfigureSpec{Profile: &gold, Disks: []DiskChange{diskProfile(1, none)}}, "home:encrypt/vm 0:encrypt/vm [vm new default/]"},
		{"VM default policy, disk encrypts", testVM(a, a), ReconfigureSpec{Profile: &none, Disks: []DiskChange{diskProfile(0, gold)}}, "!msg.hostd.configSpec.enc.mismatch"},

		{"finish encrypting", half(testVM(a, a, nil, nil), 1, converting(inventory.ConvertEncrypt, "a")), spec(CryptoEncrypt), "1:encrypt/disk-2001 2:encrypt/vm [vm p/a][disk-2001 p/a]"},
		{"finish by policy", half(testVM(a, nil), 0, converting(inventory.ConvertEncrypt, "a")), profile(gold), "0:encrypt/disk-2000 [vm p/a][disk-2000 p/a]"},
		{"finish with another key", half(testVM(a, nil), 0, converting(inventory.ConvertEncrypt, "a")), named(CryptoEncrypt, "x"), "!msg.hostd.configSpec.enc.mixedKeys"},
		{"finish deep", half(testVM(b, a, b), 0, converting(inventory.ConvertDeep, "b")), spec(CryptoDeep), "0:deep recrypt/disk-2000 [vm p/b][disk-2000 p/b]"},
		{"finish deep, files too", half(testVM(a, a, b), 0, converting(inventory.ConvertDeep, "b")), spec(CryptoDeep), "home:deep recrypt/vm 0:deep recrypt/disk-2000 [vm p/b][disk-2000 p/b]"},
		{"finish shallow", half(testVM(b, a, b), 0, converting(inventory.ConvertShallow, "b")), spec(CryptoShallow), "0:shallow recrypt/disk-2000 [vm p/b][disk-2000 p/b]"},
		{"finish decrypting", half(testVM(a, a, nil), 0, converting(inventory.ConvertDecrypt, "")), spec(CryptoDecrypt), "home:decrypt/ 0:decrypt/"},
		{"finish one disk", half(testVM(a, a), 0, converting(inventory.ConvertDeep, "b")), spec(CryptoNone, edit(0, CryptoDeep)), "0:deep recrypt/disk-2000 [disk-2000 p/b]"},
		{"something else half way", half(testVM(a, a), 0, converting(inventory.ConvertDeep, "b")), spec(CryptoDecrypt), "!"},
		{"another disk meanwhile", half(testVM(a, a, a), 0, converting(inventory.ConvertDeep, "b")), spec(CryptoNone, edit(1, CryptoDecrypt)), "1:decrypt/"},
		{"half way and plain", half(testVM(a, nil), 0, converting(inventory.ConvertEncrypt, "a")), spec(CryptoDecrypt), "!"},
	} {
		t.Run(c.what, func(t *testing.T) {
			pl := planner{vm: c.vm, spec: &c.spec,
				policy: func(id policy.ID) (Policy, error) {
					return Policy{ID: id, Name: string(id), Encrypts: id == gold}, nil
				},
				key: func(id KeyID, slot string) (plannedKey, error) {
					if id.Provider == "" {
						id.Provider = "default"
					}
					return plannedKey{Slot: slot, ID: id, Made: id.Key == ""}, nil
				},
			}
			err := pl.run()
			if faultKey, wanted := strings.CutPrefix(c.want, "!"); wanted {
				var f *Fault
				if !errors.As(err, &f) || f.MessageKey != faultKey {
					t.Fatalf("got %v (%s), plan %s; want the fault %s", err, task.AsFault(err).MessageKey, pl.plan.describe(), faultKey)
				}
				return
			}
			if err != nil || pl.plan.describe() != c.want {
				t.Errorf("plan %q, %v; want %q", pl.plan.describe(), err, c.want)
			}
		})
	}
}

// What a host is told to expect, before and during a change (E8).
func TestExpectation(t *testing.T) {
	vm := testVM(key("a"), key("a"), nil)
	vm.Epoch, vm.Disks[0].Epoch = 7, 3
	for _, c := range []struct {
		home, disk *inventory.Conversion
		want       string
	}{
		{nil, nil, "true 7; true 3 false false; false 0 false false"},
		{converting(inventory.ConvertDecrypt, ""), converting(inventory.ConvertDecrypt, ""), "false 0; true 3 true false; false 0 false false"},
		{converting(inventory.ConvertEncrypt, "b"), converting(inventory.ConvertEncrypt, "b"), "false 0; true 3 true false; false 0 false false"},
		// A recrypt never passes through a form in clear.
		{converting(inventory.ConvertDeep, "b"), converting(inventory.ConvertDeep, "b"), "true 7; true 3 false false; false 0 false false"},
		{converting(inventory.ConvertShallow, "b"), converting(inventory.ConvertShallow, "b"), "true 7; true 3 false false; false 0 false false"},
		{nil, converting(inventory.DiskRemoving, ""), "true 7; true 3 false true; false 0 false false"},
	} {
		vm.Converting, vm.Disks[0].Converting = c.home, c.disk
		e := expectation(vm)
		got := fmt.Sprint(e.Encrypted, e.Epoch)
		for _, d := range e.Disks {
			got += fmt.Sprintf("; %v %d %v %v", d.Encrypted, d.Epoch, d.Converting, d.Optional)
		}
		if got != c.want {
			t.Errorf("%+v, %+v: %s; want %s", c.home, c.disk, got, c.want)
		}
	}
}

// What is known after a change was broken off.
func TestStock(t *testing.T) {
	w := func(s string) *hostapi.KeyID { return &hostapi.KeyID{Provider: "p", Key: s} }
	for _, c := range []struct {
		kind, target string
		encrypted    bool
		key          string
		converting   string
		done, begun  bool
	}{
		{inventory.ConvertEncrypt, "b", true, "b", "", true, false},
		{inventory.ConvertEncrypt, "b", false, "", "", false, false},
		{inventory.ConvertEncrypt, "b", true, "b", "encrypt", false, true},
		{inventory.ConvertEncrypt, "b", true, "z", "", false, false}, // somebody else's work is not taken for ours
		{inventory.ConvertDecrypt, "", false, "", "", true, false},
		{inventory.ConvertDecrypt, "", true, "a", "", false, false},
		{inventory.ConvertDecrypt, "", true, "a", "decrypt", false, true},
		{inventory.ConvertDeep, "b", true, "b", "", true, false},
		{inventory.ConvertDeep, "b", true, "a", "", false, false},
		{inventory.ConvertDeep, "b", true, "a", "deep recrypt", false, true},
		{inventory.ConvertDeep, "b", false, "", "", false, false}, // and never a form in clear
		{inventory.ConvertShallow, "b", true, "b", "", true, true},
		{inventory.ConvertShallow, "b", true, "a", "", false, true}, // both may be in the key safe
	} {
		var k *hostapi.KeyID
		if c.key != "" {
			k = w(c.key)
		}
		done, begun := stock(converting(c.kind, c.target), key("a"), c.encrypted, k, c.converting)
		if done != c.done || !done && begun != c.begun {
			t.Errorf("%+v: done %v, begun %v", c, done, begun)
		}
	}
}

func TestPaths(t *testing.T) {
	for s, want := range map[string]string{
		"[ds] a/a.vmx": "ds|a/a.vmx", "[ds]": "ds|", " [my ds]  b ": "my ds|b", "[ds] a b/c d.vmx": "ds|a b/c d.vmx",
		"ds a": "!", "[ds a": "!", "[] a": "!", "[ds] /a": "!", "[ds] ../a": "!", "[ds] a/../../b": "!", "[ds] a//b": "!", "[ds] a/": "!", "[ds] a\nb": "!", "": "!",
	} {
		ds, file, err := parsePath(s)
		got := ds + "|" + file
		if err != nil {
			got = "!"
		}
		if got != want {
			t.Errorf("%q is %s, want %s", s, got, want)
		}
	}
	for name, want := range map[string]string{"web": "web", "a:b*c": "a_b_c", "..": "vm", " x. ": "x", strings.Repeat("é", 80): strings.Repeat("é", 60)} {
		if got := folderName(name); got != want {
			t.Errorf("the folder of %q is %q", name, got)
		}
	}
}

func FuzzPath(f *testing.F) {
	for _, s := range []string{"[ds] a/a.vmx", "[ds]", "[", "[]", "[ds] ../x", "[ds] a/../b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ds, file, err := parsePath(s)
		if err == nil && (ds == "" || strings.HasPrefix(file, "/") || slices.Contains(strings.Split(file, "/"), "..")) {
			t.Errorf("%q was taken as %q, %q", s, ds, file)
		}
	})
}

func FuzzFolderName(f *testing.F) {
	for _, s := range []string{"web", "..", "a/b", "\x00", "[x]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if checkVMName(s) != nil {
			return
		}
		if d := folderName(s); d == "" || d == "." || d == ".." || strings.ContainsAny(d, "/\x00[]") || len(d) > 120 {
			t.Errorf("VM %q gets the folder %q", s, d)
		}
	})
}

func FuzzJoinAddress(f *testing.F) {
	for _, s := range []string{"127.0.0.1:8446", "[::1]:1", "esx1:8446", ":8446", "0.0.0.0:1", "a:b", "", "a:70000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := joinAddress(t.Context(), s)
		if err != nil {
			return
		}
		if host, port, err := net.SplitHostPort(got); err != nil || host == "" || port == "" || net.ParseIP(host) != nil && net.ParseIP(host).IsUnspecified() {
			t.Errorf("%q was taken as %q", s, got)
		}
	})
}
