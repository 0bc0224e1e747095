package domain

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"
)

// namespace of the metadata element that marks our domains.
const namespace = "urn:mortise:vm:1"

const mark = `<mortise:vm xmlns:mortise="` + namespace + `"/>`

// A Machine is what the host gives every guest.
type Machine struct {
	KVM      bool // else TCG, QEMU's own translator
	Firmware OVMF // needed by EFI guests only
}

// OVMF names the files of an EFI firmware.
type OVMF struct {
	Code string // read-only code
	Vars string // what a new VM's variables begin as
}

// FindOVMF finds the distribution's EFI firmware. With secureBoot, the variables
// carry Microsoft's keys and the code enforces them.
func FindOVMF(secureBoot bool) (OVMF, error) {
	candidates := []OVMF{
		{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
		{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
	}
	if secureBoot {
		candidates = []OVMF{
			{"/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"},
			{"/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"},
		}
	}
	for _, c := range candidates {
		if readable(c.Code) && readable(c.Vars) {
			return c, nil
		}
	}
	return OVMF{}, fmt.Errorf("no EFI firmware at %s: install the Debian package ovmf", filepath.Dir(candidates[0].Code))
}

func readable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// XML is the libvirt domain of s on m.
func XML(s Spec, m Machine) (string, error) {
	if err := s.Validate(); err != nil {
		return "", err
	}
	d := libvirtxml.Domain{
		Type:     "qemu",
		Name:     domainName(s),
		UUID:     s.UUID,
		Title:    s.Name,
		Metadata: &libvirtxml.DomainMetadata{XML: mark},
		// Guest memory stays out of QEMU's core files (D1).
		Memory: &libvirtxml.DomainMemory{Value: uint(s.MemoryMiB), Unit: "MiB", DumpCore: "off"},
		VCPU:   &libvirtxml.DomainVCPU{Value: uint(s.CPUs)},
		OS:     osElement(s, m),
		Features: &libvirtxml.DomainFeatureList{
			ACPI: &libvirtxml.DomainFeature{},
			APIC: &libvirtxml.DomainFeatureAPIC{},
			// Guests must not take QEMU for VMware by its backdoor port.
			VMPort: &libvirtxml.DomainFeatureState{State: "off"},
		},
		CPU:        cpuElement(s, m),
		Clock:      clockElement(s, m),
		OnPoweroff: "destroy",
		OnReboot:   "restart",
		OnCrash:    "destroy",
		// Sleep inside the guest is not power state that center knows.
		PM: &libvirtxml.DomainPM{
			SuspendToMem:  &libvirtxml.DomainPMPolicy{Enabled: "no"},
			SuspendToDisk: &libvirtxml.DomainPMPolicy{Enabled: "no"},
		},
		Devices: devices(s),
	}
	if m.KVM {
		d.Type = "kvm"
	}
	if s.SecureBoot {
		d.Features.SMM = &libvirtxml.DomainFeatureSMM{State: "on"}
	}
	if windows(s) && m.KVM {
		on := &libvirtxml.DomainFeatureState{State: "on"}
		d.Features.HyperV = &libvirtxml.DomainFeatureHyperV{
			Relaxed: on, VAPIC: on,
			Spinlocks: &libvirtxml.DomainFeatureHyperVSpinlocks{DomainFeatureState: *on, Retries: 8191},
		}
	}
	return d.Marshal()
}

// domainName is unique as libvirt needs it, and begins as people know the VM.
func domainName(s Spec) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("-_.", r):
			return r
		}
		return '-'
	}, s.Name)
	name = strings.TrimLeft(name[:min(len(name), 40)], ".-")
	if name == "" {
		name = "vm"
	}
	return name + "-" + s.UUID[:8]
}

func windows(s Spec) bool { return strings.HasPrefix(strings.ToLower(s.GuestOS), "win") }

func osElement(s Spec, m Machine) *libvirtxml.DomainOS {
	os := &libvirtxml.DomainOS{
		Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "q35", Type: "hvm"},
		// SeaBIOS speaks on the console too: a disk that does not boot is seen.
		BIOS: &libvirtxml.DomainBIOS{UseSerial: "yes"},
	}
	if s.Firmware == EFI {
		os.BIOS = nil
		os.Loader = &libvirtxml.DomainLoader{Path: m.Firmware.Code, Readonly: "yes", Type: "pflash"}
		os.NVRam = &libvirtxml.DomainNVRam{NVRam: s.NVRAM, Template: m.Firmware.Vars}
		if s.SecureBoot {
			os.Loader.Secure = "yes"
		}
	}
	return os
}

// cpuElement: under KVM the host's model by name, so that a guest can move to a
// host that has it. Under TCG the newest named model that TCG does whole.
func cpuElement(s Spec, m Machine) *libvirtxml.DomainCPU {
	cpu := &libvirtxml.DomainCPU{Mode: "host-model"}
	if !m.KVM {
		cpu = &libvirtxml.DomainCPU{Mode: "custom", Match: "exact", Check: "none", Model: &libvirtxml.DomainCPUModel{Fallback: "forbid", Value: "Westmere"}}
	}
	if n := s.CoresPerSocket; n > 0 {
		cpu.Topology = &libvirtxml.DomainCPUTopology{Sockets: s.CPUs / n, Cores: n, Threads: 1}
	}
	return cpu
}

func clockElement(s Spec, m Machine) *libvirtxml.DomainClock {
	c := &libvirtxml.DomainClock{Offset: "utc", Timer: []libvirtxml.DomainTimer{
		{Name: "rtc", TickPolicy: "catchup"}, {Name: "pit", TickPolicy: "delay"}, {Name: "hpet", Present: "no"},
	}}
	if windows(s) {
		c.Offset = "localtime"
		if m.KVM {
			c.Timer = append(c.Timer, libvirtxml.DomainTimer{Name: "hypervclock", Present: "yes"})
		}
	}
	return c
}

func devices(s Spec) *libvirtxml.DomainDeviceList {
	list := &libvirtxml.DomainDeviceList{
		Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
		MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
		Serials: []libvirtxml.DomainSerial{{
			Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind", Path: s.ConsoleSocket}},
			Target: &libvirtxml.DomainSerialTarget{Type: "isa-serial", Port: new(uint)},
		}},
		RNGs: []libvirtxml.DomainRNG{{
			Model:   "virtio",
			Backend: &libvirtxml.DomainRNGBackend{Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"}},
		}},
	}
	var scsi []string // controllers in use; libvirt's index is the place here
	sata := uint(0)   // ports taken, six to a controller
	for i, d := range s.Disks {
		controller, unit := splitPlace(d.Place)
		disk := diskElement(s, d)
		disk.Target = &libvirtxml.DomainDiskTarget{Dev: sdName(i), Bus: "scsi"}
		if d.Model == AHCI {
			disk.Target.Bus = "sata"
			disk.Address = driveAddress(sata/6, 0, sata%6)
			sata++
		} else {
			at := slices.Index(scsi, controller)
			if at < 0 {
				at = len(scsi)
				scsi = append(scsi, controller)
				index := uint(at)
				c := libvirtxml.DomainController{Type: "scsi", Index: &index, Model: string(d.Model)}
				if d.Model == VirtioSCSI {
					queues := uint(min(s.CPUs, 8))
					c.Driver = &libvirtxml.DomainControllerDriver{Queues: &queues}
				}
				list.Controllers = append(list.Controllers, c)
			}
			// Targets, not units: only virtio has more than one unit to a target.
			disk.Address = driveAddress(uint(at), uint(max(unit, 0)), 0)
		}
		list.Disks = append(list.Disks, disk)
	}
	for i, c := range s.CDROMs {
		cd := libvirtxml.DomainDisk{
			Device:   "cdrom",
			Driver:   &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw"},
			Source:   &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: c.Image}},
			Target:   &libvirtxml.DomainDiskTarget{Dev: sdName(len(s.Disks) + i), Bus: "sata"},
			ReadOnly: &libvirtxml.DomainDiskReadOnly{},
			Boot:     boot(c.Boot),
			Address:  driveAddress(sata/6, 0, sata%6),
			Alias:    &libvirtxml.DomainAlias{Name: alias(c.Place)},
		}
		sata++
		list.Disks = append(list.Disks, cd)
	}
	for _, n := range s.NICs {
		nic := libvirtxml.DomainInterface{
			MAC:   &libvirtxml.DomainInterfaceMAC{Address: n.MAC},
			Model: &libvirtxml.DomainInterfaceModel{Type: n.Model},
			Boot:  boot(n.Boot),
			Alias: &libvirtxml.DomainAlias{Name: alias(n.Place)},
		}
		if n.Connected {
			nic.Source = &libvirtxml.DomainInterfaceSource{Network: &libvirtxml.DomainInterfaceSourceNetwork{Network: n.Network}}
		} else {
			// QEMU's user network behind an unplugged cable: no packet passes.
			nic.Source = &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}}
			nic.Link = &libvirtxml.DomainInterfaceLink{State: "down"}
		}
		if n.Boot == 0 {
			nic.ROM = &libvirtxml.DomainROM{Enabled: "no"}
		}
		list.Interfaces = append(list.Interfaces, nic)
	}
	return list
}

// diskElement: 512-byte logical on 4096-byte physical sectors, discards passed
// on, nothing cached by QEMU, and the guest stopped rather than shown an error.
func diskElement(s Spec, d Disk) libvirtxml.DomainDisk {
	delay := s.ReconnectDelay
	if delay == 0 {
		delay = DefaultReconnectDelay
	}
	disk := libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{
			Name: "qemu", Type: "raw", Cache: "none", Discard: "unmap", DetectZeros: "off",
			ErrorPolicy: "stop", RErrorPolicy: "stop",
		},
		Source: &libvirtxml.DomainDiskSource{Network: &libvirtxml.DomainDiskSourceNetwork{
			Protocol:  "nbd",
			Hosts:     []libvirtxml.DomainDiskSourceHost{{Transport: "unix", Socket: d.Socket}},
			Reconnect: &libvirtxml.DomainDiskSourceNetworkReconnect{Delay: fmt.Sprint(int64(delay / time.Second))},
		}},
		BlockIO: &libvirtxml.DomainDiskBlockIO{LogicalBlockSize: 512, PhysicalBlockSize: 4096},
		Serial:  d.Serial,
		Boot:    boot(d.Boot),
		Alias:   &libvirtxml.DomainAlias{Name: alias(d.Place)},
	}
	if d.ReadOnly {
		disk.ReadOnly = &libvirtxml.DomainDiskReadOnly{}
	}
	return disk
}

func driveAddress(controller, target, unit uint) *libvirtxml.DomainAddress {
	bus := uint(0)
	return &libvirtxml.DomainAddress{Drive: &libvirtxml.DomainAddressDrive{Controller: &controller, Bus: &bus, Target: &target, Unit: &unit}}
}

func boot(order int) *libvirtxml.DomainDeviceBoot {
	if order == 0 {
		return nil
	}
	return &libvirtxml.DomainDeviceBoot{Order: uint(order)}
}

// alias names a device after its place in the VMX; libvirt wants the prefix, and
// says the alias in events. placeOf is its inverse.
func alias(place string) string { return "ua-" + strings.Replace(place, ":", "_", 1) }

func placeOf(alias string) string {
	place, ours := strings.CutPrefix(alias, "ua-")
	if !ours {
		return alias
	}
	return strings.Replace(place, "_", ":", 1)
}

// sdName is sda … sdz, sdaa …
func sdName(n int) string {
	name := ""
	for n++; n > 0; n = (n - 1) / 26 {
		name = string(rune('a'+(n-1)%26)) + name
	}
	return "sd" + name
}
