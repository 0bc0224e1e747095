package vmdk

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// A deep recrypt's descriptor holds two key safes and is authenticated by the
// DEK that is coming; when it ends, only that safe is left.
func TestSealWithTarget(t *testing.T) {
	key := func(n int) *secret.Key {
		k, err := secret.Random(nil, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(k.Wipe)
		return k
	}
	disk := uuid.New()
	bind := keysafe.Binding{VM: uuid.New(), Disk: disk, Role: keysafe.RoleDisk, Cipher: keysafe.CipherXTS, UnitSize: 4096}
	safe := func(name string, dek *secret.Key) keysafe.Safe {
		s, err := keysafe.Wrap(nil, bind, keysafe.KeyID{Provider: "p", Key: name}, key(keysafe.KEKSize), dek)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	mac := func(dek *secret.Key) *keysafe.MAC {
		m, err := keysafe.NewMAC(dek, MACInfo)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	old, next := key(64), key(64)
	d, err := New("vm.vmdk", Spec{Size: 1 << 20, UUID: disk, CID: 7, Extent: "vm-flat.vmdk"})
	if err != nil {
		t.Fatal(err)
	}
	e := Encryption{KeySafe: safe("old", old), Target: safe("new", next), Cipher: keysafe.CipherXTS, UnitSize: 4096, Epoch: 1, Generation: 1}
	if err := d.Seal(e, mac(next)); err != nil {
		t.Fatal(err)
	}
	d, err = Parse("vm.vmdk", d.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	got, _ := d.Encryption()
	if got.KeySafe.String() != e.KeySafe.String() || got.Target.String() != e.Target.String() {
		t.Fatalf("read back %+v", got)
	}
	if err := d.Verify(mac(next)); err != nil {
		t.Fatal(err)
	}
	if err := d.Verify(mac(old)); !errors.Is(err, ErrEdited) {
		t.Fatalf("verified with the DEK that is leaving: %v", err)
	}
	// Somebody who drops or swaps the target is found out.
	for name, edit := range map[string]func(*Descriptor){
		"drop": func(d *Descriptor) { d.remove(func(low string) bool { return low == "encryption.keysafe.target" }) },
		"swap": func(d *Descriptor) {
			d.put(keySafeKey, e.Target.String(), wide)
			d.put(targetKey, e.KeySafe.String(), wide)
		},
	} {
		c, _ := Parse("vm.vmdk", d.Bytes())
		edit(c)
		if err := c.Verify(mac(next)); !errors.Is(err, ErrEdited) {
			t.Errorf("%s: verified: %v", name, err)
		}
	}
	e = Encryption{KeySafe: e.Target, Cipher: keysafe.CipherXTS, UnitSize: 4096, Epoch: 2, Generation: 2}
	if err := d.Seal(e, mac(next)); err != nil {
		t.Fatal(err)
	}
	if d, err = Parse("vm.vmdk", d.Bytes()); err != nil {
		t.Fatal(err)
	}
	if got, _ = d.Encryption(); !got.Target.Empty() || got.Epoch != 2 {
		t.Fatalf("after the recrypt: %+v", got)
	}
}

// QEMU pads a descriptor that it has opened for writing to whole sectors.
func TestParsePadded(t *testing.T) {
	d, err := New("vm.vmdk", Spec{Size: 1 << 20, UUID: uuid.New(), CID: 7, Extent: "vm-flat.vmdk"})
	if err != nil {
		t.Fatal(err)
	}
	text := d.Bytes()
	padded := append(bytes.Clone(text), make([]byte, SectorSize-len(text)%SectorSize)...)
	p, err := Parse("vm.vmdk", padded)
	if err != nil || !bytes.Equal(p.Bytes(), text) {
		t.Fatalf("%v: %q", err, p.Bytes())
	}
}
