package domain

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mortise/internal/vmxfile"
)

var update = flag.Bool("update", false, "rewrite testdata")

const base = `.encoding = "UTF-8"
uuid.bios = "56 4d 01 02 03 04 05 06-07 08 09 0a 0b 0c 0d 0e"
`

const oneDisk = `scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.deviceType = "scsi-hardDisk"
scsi0:0.fileName = "vm.vmdk"
`

func parse(t *testing.T, name, text string) *vmxfile.File {
	t.Helper()
	f, err := vmxfile.Parse(name, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// socketsOf names a socket for each disk that the text has.
func socketsOf(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text) {
		if place, ok := strings.CutSuffix(strings.Fields(line + " x")[0], ".fileName"); ok && strings.Contains(line, ".vmdk") {
			m[place] = "/run/mortise/vm/1/" + strings.Replace(place, ":", "-", 1) + ".sock"
		}
	}
	return m
}

// TestXML compares the whole way from VMX to domain XML with golden files; -update
// rewrites them, to be read before they are committed.
func TestXML(t *testing.T) {
	ovmf := OVMF{Code: "/usr/share/OVMF/OVMF_CODE_4M.fd", Vars: "/usr/share/OVMF/OVMF_VARS_4M.fd"}
	for _, tc := range []struct {
		name, vmx string
		m         Machine
	}{
		{"bios", base + oneDisk + `displayName = "web & <db>"
memsize = "512"
numvcpus = "2"
guestOS = "debian12-64"
ethernet0.present = "TRUE"
ethernet0.networkName = "VM Network"
ethernet0.virtualDev = "vmxnet3"
ethernet0.addressType = "generated"
ethernet0.generatedAddress = "00:0c:29:0c:0d:0e"
`, Machine{}},
		{"efi-windows-kvm", base + `displayName = "日本"
memsize = "4096"
numvcpus = "4"
cpuid.coresPerSocket = "2"
guestOS = "windows2019srv-64"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "a.vmdk"
scsi0:15.present = "TRUE"
scsi0:15.fileName = "b.vmdk"
sata0:0.present = "TRUE"
sata0:0.deviceType = "cdrom-raw"
sata0:0.startConnected = "FALSE"
ethernet1.present = "TRUE"
ethernet1.virtualDev = "e1000e"
ethernet1.address = "00:50:56:01:02:03"
ethernet1.startConnected = "FALSE"
`, Machine{KVM: true, Firmware: ovmf}},
		{"many-buses", base + `displayName = "vm"
bios.bootOrder = "ethernet0,hdd,cdrom"
bios.hddOrder = "scsi2:3,nvme0:0"
scsi0.virtualDev = "lsilogic"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "a.vmdk"
scsi2:3.present = "TRUE"
scsi2:3.fileName = "b.vmdk"
sata0:0.present = "TRUE"
sata0:0.fileName = "c.vmdk"
sata0:1.present = "TRUE"
sata0:1.fileName = "d.vmdk"
sata0:2.present = "TRUE"
sata0:2.fileName = "e.vmdk"
sata1:9.present = "TRUE"
sata1:9.fileName = "f.vmdk"
nvme0:0.present = "TRUE"
nvme0:0.fileName = "g.vmdk"
ide0:0.present = "TRUE"
ide0:0.fileName = "h.vmdk"
ide1:0.present = "TRUE"
ide1:0.deviceType = "cdrom-image"
ide1:0.fileName = "boot.iso"
ethernet0.present = "TRUE"
ethernet0.connectionType = "nat"
ethernet0.generatedAddress = "00:0c:29:00:00:01"
ethernet0.virtualDev = "e1000"
`, Machine{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := FromVMX(parse(t, "vm.vmx", tc.vmx), socketsOf(tc.vmx))
			if err != nil {
				t.Fatal(err)
			}
			s.ConsoleSocket = "/run/mortise/vm/1/console.sock"
			if s.Firmware == EFI {
				s.NVRAM = "/run/mortise/vm/1/files/vm.nvram"
			}
			if len(s.Disks) > 0 {
				s.Disks[0].Serial = "6000c290a0b0c0d0e0f0010203040506"
			}
			got, err := XML(s, tc.m)
			if err != nil {
				t.Fatal(err)
			}
			got += "\n<!-- " + strings.Join(s.Notes, "\n     ") + " -->\n"
			golden := filepath.Join("testdata", tc.name+".xml")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("differs from %s:\n%s", golden, got)
			}
		})
	}
}

func TestFromVMXRefuses(t *testing.T) {
	for _, tc := range []struct{ name, vmx, want string }{
		{"no uuid", ".encoding = \"UTF-8\"\n", "uuid.bios is missing"},
		{"bad uuid", "uuid.bios = \"56 4d\"\n", "uuid.bios"},
		{"firmware", base + "firmware = \"coreboot\"\n", "bios or efi"},
		{"memory", base + "memsize = \"lots\"\n", "memsize"},
		{"present", base + "scsi0:0.present = \"maybe\"\n", "scsi0:0.present"},
		{"vtpm", base + "vtpm.present = \"TRUE\"\n", "vtpm.present"},
		{"controller", base + strings.Replace(oneDisk, "pvscsi", "adaptec", 1), "adaptec"},
		{"device", base + strings.Replace(oneDisk, "scsi-hardDisk", "scsi-passthru", 1), "scsi-passthru"},
		{"mode", base + oneDisk + "scsi0:0.mode = \"independent-nonpersistent\"\n", "nonpersistent"},
		{"no network", base + "ethernet0.present = \"TRUE\"\nethernet0.address = \"00:50:56:00:00:01\"\n", "names no network"},
		{"no MAC", base + "ethernet0.present = \"TRUE\"\nethernet0.networkName = \"a\"\n", "MAC address"},
		{"multicast MAC", base + "ethernet0.present = \"TRUE\"\nethernet0.networkName = \"a\"\nethernet0.address = \"01:50:56:00:00:01\"\n", "MAC address"},
		{"NIC model", base + "ethernet0.present = \"TRUE\"\nethernet0.virtualDev = \"ne2k\"\n", "ne2k"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := FromVMX(parse(t, "dir/vm.vmx", tc.vmx), socketsOf(tc.vmx)); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "dir/vm.vmx") && tc.name != "memory" {
				t.Errorf("error: %v", err)
			}
		})
	}
	f := parse(t, "vm.vmx", base+oneDisk)
	if _, err := FromVMX(f, nil); err == nil || !strings.Contains(err.Error(), "scsi0:0") {
		t.Errorf("a disk that is not served: %v", err)
	}
	if _, err := FromVMX(f, map[string]string{"scsi0:0": "/a", "scsi0:1": "/b"}); err == nil || !strings.Contains(err.Error(), "scsi0:1") {
		t.Errorf("a served disk that the VMX lacks: %v", err)
	}
}

// A CD-ROM image must be in the VM's folder: a VMX is no way to read the host.
func TestCDROMImageStaysInFolder(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	vm := filepath.Join(dir, "vm")
	for _, p := range []string{filepath.Join(dir, "secret"), filepath.Join(vm, "good.iso"), filepath.Join(vm, "sub", "deep.iso")} {
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(vm, "link.iso")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..", filepath.Join(vm, "up")); err != nil {
		t.Fatal(err)
	}
	for image, want := range map[string]string{
		"good.iso": filepath.Join(vm, "good.iso"), "sub/deep.iso": filepath.Join(vm, "sub", "deep.iso"),
		"../secret": "", filepath.Join(dir, "secret"): "", "link.iso": "", "up/secret": "", "none.iso": "",
	} {
		text := base + fmt.Sprintf("sata0:0.present = \"TRUE\"\nsata0:0.deviceType = \"cdrom-image\"\nsata0:0.fileName = %q\n", image)
		s, err := FromVMX(parse(t, filepath.Join(vm, "vm.vmx"), text), nil)
		if err != nil {
			t.Fatal(err)
		}
		if s.CDROMs[0].Image != want || (want == "") != (len(s.Notes) == 1) {
			t.Errorf("%s: image %q, notes %q", image, s.CDROMs[0].Image, s.Notes)
		}
	}
}

func TestValidate(t *testing.T) {
	good := func() Spec {
		return Spec{Name: "vm", UUID: "564d0102-0304-0506-0708-090a0b0c0d0e", MemoryMiB: 256, CPUs: 2, Firmware: BIOS, ConsoleSocket: "/c",
			Disks: []Disk{{Place: "scsi0:0", Model: PVSCSI, Socket: "/d"}}}
	}
	s := good()
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(*Spec){
		"uuid":              func(s *Spec) { s.UUID = "564d010203040506070809 0a0b0c0d0e" },
		"name":              func(s *Spec) { s.Name = "a\nb" },
		"invalid UTF-8":     func(s *Spec) { s.Name = "a\xff" },
		"memory":            func(s *Spec) { s.MemoryMiB = 1 << 40 },
		"CPUs":              func(s *Spec) { s.CPUs = 0 },
		"cores":             func(s *Spec) { s.CoresPerSocket = 3 },
		"secure BIOS":       func(s *Spec) { s.SecureBoot = true },
		"EFI without NVRAM": func(s *Spec) { s.Firmware = EFI },
		"no console":        func(s *Spec) { s.ConsoleSocket = "" },
		"long socket":       func(s *Spec) { s.Disks[0].Socket = "/" + strings.Repeat("x", 107) },
		"relative socket":   func(s *Spec) { s.Disks[0].Socket = "d" },
		"two at a place":    func(s *Spec) { s.Disks = append(s.Disks, s.Disks[0]) },
		"two models":        func(s *Spec) { s.Disks = append(s.Disks, Disk{Place: "scsi0:1", Model: LSISAS, Socket: "/e"}) },
		"serial":            func(s *Spec) { s.Disks[0].Serial = "a,b" },
		"read-only SATA":    func(s *Spec) { s.Disks[0] = Disk{Place: "sata0:0", Model: AHCI, Socket: "/d", ReadOnly: true} },
		"model":             func(s *Spec) { s.Disks[0].Model = "floppy" },
		"network":           func(s *Spec) { s.NICs = []NIC{{Place: "ethernet0", Connected: true}} },
		"delay":             func(s *Spec) { s.ReconnectDelay = 1500e6 },
	} {
		s := good()
		breakIt(&s)
		if _, err := XML(s, Machine{}); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}

// Whatever a VMX says, it makes an error or XML, never a panic.
func FuzzFromVMX(f *testing.F) {
	f.Add([]byte(base + oneDisk))
	f.Add([]byte(base + "numvcpus = \"99999999999\"\nmemsize = \"-1\"\n"))
	f.Add([]byte(base + "ide0:0.present = \"TRUE\"\nide0:0.deviceType = \"cdrom-image\"\nide0:0.fileName = \"../../etc/passwd\"\nbios.bootOrder = \",,cdrom\"\n"))
	f.Add([]byte(base + "firmware = \"efi\"\nethernet0.present = \"1\"\nethernet0.address = \"00:50:56:00:00:01\"\nethernet0.networkName = \"<a>\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := vmxfile.Parse("fuzz.vmx", text)
		if err != nil {
			return
		}
		s, err := FromVMX(file, socketsOf(string(text)))
		if err != nil {
			return
		}
		for _, c := range s.CDROMs {
			if c.Image != "" && strings.Contains(c.Image, "..") {
				t.Errorf("image %q", c.Image)
			}
		}
		s.ConsoleSocket, s.NVRAM = "/c", "/n"
		if text, err := XML(s, Machine{KVM: true}); err == nil && !strings.Contains(text, s.UUID) {
			t.Error("XML without the UUID")
		}
	})
}

func TestSdName(t *testing.T) {
	for n, want := range map[int]string{0: "sda", 25: "sdz", 26: "sdaa", 51: "sdaz", 52: "sdba", 701: "sdzz", 702: "sdaaa"} {
		if got := sdName(n); got != want {
			t.Errorf("%d: %s, not %s", n, got, want)
		}
	}
}

func TestAlias(t *testing.T) {
	for _, place := range []string{"scsi0:0", "sata3:29", "ethernet9"} {
		if got := placeOf(alias(place)); got != place {
			t.Errorf("%s became %s", place, got)
		}
	}
}
