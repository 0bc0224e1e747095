package vmdk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

var diskUUID = uuid.MustParse("6000c293-7ba0-3a03-9f22-56c52993b727")

func plain(t testing.TB) *Descriptor {
	t.Helper()
	d, err := New("vm.vmdk", Spec{Size: 3 << 20, UUID: diskUUID, CID: 0x1234abcd, Extent: "vm-flat.vmdk", Thin: true})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type keys struct {
	safe     keysafe.Safe
	mac      *keysafe.MAC
	binding  keysafe.Binding
	kek, dek *secret.Key
}

func makeKeys(t testing.TB) keys {
	t.Helper()
	k := keys{binding: keysafe.Binding{VM: uuid.MustParse("564d0102-0304-0506-0708-090a0b0c0d0e"), Disk: diskUUID, Role: keysafe.RoleDisk, Cipher: keysafe.CipherXTS, UnitSize: 4096}}
	var err error
	check := func() {
		if err != nil {
			t.Fatal(err)
		}
	}
	k.kek, err = secret.Random(nil, 32)
	check()
	k.dek, err = secret.Random(nil, 64)
	check()
	k.safe, err = keysafe.Wrap(nil, k.binding, keysafe.KeyID{Provider: "kms", Key: "k1"}, k.kek, k.dek)
	check()
	k.mac, err = keysafe.NewMAC(k.dek, MACInfo)
	check()
	t.Cleanup(func() { k.kek.Wipe(); k.dek.Wipe(); k.mac.Wipe() })
	return k
}

func (k keys) encryption(generation uint64) Encryption {
	return Encryption{KeySafe: k.safe, Cipher: keysafe.CipherXTS, UnitSize: 4096, Epoch: 1, Generation: generation}
}

func sealed(t testing.TB) (*Descriptor, keys) {
	t.Helper()
	d, k := plain(t), makeKeys(t)
	if err := d.Seal(k.encryption(1), k.mac); err != nil {
		t.Fatal(err)
	}
	return d, k
}

func TestSealLoadVerifyUnseal(t *testing.T) {
	d, k := sealed(t)
	path := filepath.Join(t.TempDir(), "vm.vmdk")
	if err := d.Save(path); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), d.Bytes()) {
		t.Errorf("loaded\n%s\nwant\n%s", got.Bytes(), d.Bytes())
	}
	if err := got.Verify(k.mac); err != nil {
		t.Error(err)
	}
	e, ok := got.Encryption()
	if !ok || e.Cipher != keysafe.CipherXTS || e.UnitSize != 4096 || e.Epoch != 1 || e.Generation != 1 || e.KeySafe.String() != k.safe.String() {
		t.Errorf("encryption %+v, %v", e, ok)
	}
	if got.UUID() != diskUUID || got.Size() != 3<<20 || got.CID() != 0x1234abcd || got.ParentCID() != NoParent || got.CreateType() != MortiseFlat {
		t.Errorf("descriptor reads %v %d %x %x %s", got.UUID(), got.Size(), got.CID(), got.ParentCID(), got.CreateType())
	}
	if err := got.Seal(k.encryption(1), k.mac); !errors.Is(err, ErrConflict) {
		t.Errorf("sealing generation 1 over 1: %v", err)
	}
	got.SetCID(7)
	if err := got.Save(path); !errors.Is(err, ErrEdited) {
		t.Errorf("saving an unsealed change: %v", err)
	}
	if err := got.Seal(k.encryption(2), k.mac); err != nil {
		t.Fatal(err)
	}
	if err := got.Save(path); err != nil {
		t.Fatal(err)
	}
	if err := got.Unseal(); err != nil {
		t.Fatal(err)
	}
	got.SetCID(0x1234abcd)
	if want := plain(t).Bytes(); !bytes.Equal(got.Bytes(), append(want, '\n')) && !bytes.Equal(got.Bytes(), want) {
		t.Errorf("decrypted descriptor\n%s\nwant\n%s", got.Bytes(), want)
	}
}

func qemuImg(t testing.TB, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	return string(out), err
}

// TestQemuOpensPlain: a disk in clear is an ordinary VMDK.
func TestQemuOpensPlain(t *testing.T) {
	dir := t.TempDir()
	data := make([]byte, 3<<20)
	rand.New(rand.NewSource(1)).Read(data)
	if err := os.WriteFile(filepath.Join(dir, "vm-flat.vmdk"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "vm.vmdk")
	if err := plain(t).Save(path); err != nil {
		t.Fatal(err)
	}
	out, err := qemuImg(t, "info", path)
	if err != nil || !strings.Contains(out, "file format: vmdk") || !strings.Contains(out, fmt.Sprint(len(data), " bytes")) || !strings.Contains(out, "create type: monolithicFlat") {
		t.Errorf("qemu-img info: %v\n%s", err, out)
	}
	raw := filepath.Join(dir, "raw")
	if out, err := qemuImg(t, "convert", "-O", "raw", path, raw); err != nil {
		t.Fatalf("qemu-img convert: %v\n%s", err, out)
	}
	if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, data) {
		t.Errorf("qemu-img read other data than the extent holds (%v)", err)
	}
}

// TestQemuRefusesOurs: what is not a disk in clear is an error to qemu-img, whether
// it guesses the format or is told, and never data.
func TestQemuRefusesOurs(t *testing.T) {
	enc, k := sealed(t)
	delta, err := New("vm-000001.vmdk", Spec{Size: 3 << 20, UUID: diskUUID, CID: 1, Extent: "vm-000001-delta.vmdk", Parent: "vm.vmdk", ParentCID: 2})
	if err != nil {
		t.Fatal(err)
	}
	encDelta, _ := Parse("x", delta.Bytes())
	if err := encDelta.Seal(k.encryption(1), k.mac); err != nil {
		t.Fatal(err)
	}
	for name, d := range map[string]*Descriptor{"encrypted": enc, "delta": delta, "encrypted delta": encDelta} {
		dir := t.TempDir()
		path := filepath.Join(dir, "vm.vmdk")
		if err := d.Save(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, d.Extents()[0].File), make([]byte, 3<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"info", path}, {"convert", "-O", "raw", path, path + ".raw"}, {"convert", "-f", "vmdk", "-O", "raw", path, path + ".raw"}, {"check", path}} {
			if out, err := qemuImg(t, args...); err == nil || !strings.Contains(out, "Unsupported image type 'mortise") {
				t.Errorf("%s: qemu-img %s: %v\n%s", name, args[0], err, out)
			}
		}
		if st, err := os.Stat(path + ".raw"); err == nil && st.Size() > 0 {
			t.Errorf("%s: qemu-img wrote %d bytes", name, st.Size())
		}
	}
}
