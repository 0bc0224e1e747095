package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"
)

func TestNextPlace(t *testing.T) {
	seen := map[place]bool{}
	for n := range 60 {
		p := nextPlace(n)
		if seen[p] || p.unit == 7 || p.unit > 15 || p.busNumber > 3 {
			t.Errorf("disk %d is at %s", n, p)
		}
		seen[p] = true
	}
	if p := nextPlace(7); p.String() != "scsi0:8" {
		t.Errorf("disk 7 is at %s", p)
	}
}

func vmDisk(key, controller, unit int32, encrypted bool) *types.VirtualDisk {
	b := &types.VirtualDiskFlatVer2BackingInfo{}
	if encrypted {
		b.KeyId = &types.CryptoKeyId{KeyId: "k"}
	}
	return &types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: key, ControllerKey: controller, UnitNumber: &unit, Backing: b}, CapacityInBytes: 100}
}

// TestConversionSpec: what is meant by a verb's flags is what vSphere's spec says,
// with its rules of inheritance.
func TestConversionSpec(t *testing.T) {
	devices := []types.BaseVirtualDevice{&types.VirtualPCIController{}, vmDisk(2000, 1000, 0, false), vmDisk(2001, 15000, 1, true)}
	crypto := &types.CryptoSpecEncrypt{}
	t.Run("all", func(t *testing.T) {
		c := conversion{crypto: crypto, policy: "p"}
		spec, disks, err := c.spec(devices)
		if err != nil || spec.Crypto != crypto || len(spec.VmProfile) != 1 || len(spec.DeviceChange) != 0 || len(disks) != 2 {
			t.Errorf("%+v, %d disks, %v", spec, len(disks), err)
		}
	})
	t.Run("VM files only", func(t *testing.T) {
		c := conversion{crypto: crypto, policy: "p", homeOnly: true}
		spec, disks, err := c.spec(devices)
		if err != nil || spec.Crypto != crypto || len(spec.DeviceChange) != 2 || len(disks) != 0 {
			t.Fatalf("%+v, %d disks, %v", spec, len(disks), err)
		}
		for _, d := range spec.DeviceChange {
			if _, ok := d.GetVirtualDeviceConfigSpec().Backing.Crypto.(*types.CryptoSpecNoOp); !ok {
				t.Error("a disk would inherit")
			}
		}
	})
	t.Run("one disk", func(t *testing.T) {
		for _, name := range []string{"sata0:1", "SATA0:1", "2001"} {
			c := conversion{crypto: crypto, disks: []string{name}}
			spec, disks, err := c.spec(devices)
			if err != nil || spec.Crypto != nil || spec.VmProfile != nil || len(spec.DeviceChange) != 1 || len(disks) != 1 || disks[0].Key != 2001 {
				t.Errorf("%s: %+v, %v", name, spec, err)
			}
		}
		for _, names := range [][]string{{"scsi0:1"}, {"2000", "scsi0:0"}, {""}} {
			c := conversion{crypto: crypto, disks: names}
			if _, _, err := c.spec(devices); err == nil {
				t.Errorf("%q was accepted", names)
			}
		}
	})
	t.Run("what is still in clear", func(t *testing.T) {
		conf := &types.VirtualMachineConfigInfo{KeyId: &types.CryptoKeyId{KeyId: "k"}}
		conf.Hardware.Device = devices
		c := conversion{crypto: crypto}
		if err := c.onlyPlain(conf); err != nil || len(c.disks) != 1 || c.disks[0] != "scsi0:0" {
			t.Errorf("%v, %v", c.disks, err)
		}
		conf.Hardware.Device = devices[2:]
		for _, c := range []conversion{{crypto: crypto}, {crypto: crypto, homeOnly: true}} {
			if err := c.onlyPlain(conf); err == nil || !strings.Contains(err.Error(), "recrypt") {
				t.Errorf("encrypting what is encrypted: %v", err)
			}
		}
		c = conversion{crypto: &types.CryptoSpecDecrypt{}}
		if err := c.onlyPlain(conf); err != nil || c.disks != nil {
			t.Errorf("%v, %v", c.disks, err)
		}
	})
}

func TestMachineSpec(t *testing.T) {
	m := machine{name: "a", disks: []machineDisk{{place{"scsi", 1, 2}, 1 << 30, false}, {place{"scsi", 1, 3}, 512, true}, {place{"nvme", 0, 0}, 512, false}}, nics: []machineNIC{{"net", "00:50:56:00:00:01", "e1000e"}, {"net", "", ""}}}
	spec := m.spec()
	var got []string
	controllers := map[int32]bool{}
	for _, c := range spec.DeviceChange {
		d := c.GetVirtualDeviceConfigSpec()
		if d.Operation != types.VirtualDeviceConfigSpecOperationAdd {
			t.Errorf("operation %s", d.Operation)
		}
		switch dev := d.Device.(type) {
		case types.BaseVirtualController:
			controllers[dev.GetVirtualController().Key] = true
			got = append(got, "controller")
		case *types.VirtualDisk:
			if !controllers[dev.ControllerKey] || d.FileOperation != types.VirtualDeviceConfigSpecFileOperationCreate {
				t.Errorf("disk at controller %d, file %q", dev.ControllerKey, d.FileOperation)
			}
			name := diskName(dev)
			if !*dev.Backing.(*types.VirtualDiskFlatVer2BackingInfo).ThinProvisioned {
				name += " thick"
			}
			got = append(got, name)
		case types.BaseVirtualEthernetCard:
			got = append(got, "card "+dev.GetVirtualEthernetCard().MacAddress)
		}
	}
	if s := strings.Join(got, ", "); s != "controller, scsi1:2, scsi1:3 thick, controller, nvme0:0, card 00:50:56:00:00:01, card " {
		t.Error(s)
	}
}

func FuzzReadVMX(f *testing.F) {
	f.Add([]byte("displayName = \"a\"\nuuid.bios = \"56 4d 01 02 03 04 05 06-07 08 09 0a 0b 0c 0d 0e\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"a.vmdk\"\nethernet0.present = \"TRUE\"\nethernet0.address = \"00:50:56:01:02:03\"\n"))
	f.Add([]byte("ide0:0.present = \"TRUE\"\nide0:0.fileName = \"a.vmdk\"\nide0:1.present = \"TRUE\"\nide0:1.fileName = \"b.vmdk\"\nnumvcpus = \"99999999999\"\n"))
	f.Add([]byte("encryption.keySafe = \"vmware:key/x\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "a.vmx")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		v, err := readVMX(path)
		if err != nil {
			return
		}
		if len(v.files) != len(v.disks) {
			t.Fatalf("%d files for %d disks", len(v.files), len(v.disks))
		}
		seen := map[place]bool{}
		for i, d := range v.disks {
			if seen[d.place] {
				t.Fatalf("two disks at %s", d.place)
			}
			seen[d.place] = true
			if filepath.Base(v.files[i]) != v.files[i] || v.files[i] == ".." {
				t.Fatalf("disk %q leads out of the folder", v.files[i])
			}
		}
		v.spec()
	})
}
