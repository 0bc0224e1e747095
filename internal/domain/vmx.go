package domain

import (
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"mortise/internal/vmxfile"
)

// buses are VMware's disk buses, in the order in which disks are numbered.
var buses = []struct {
	name               string
	controllers, units int
}{{"scsi", 4, 16}, {"sata", 4, 30}, {"nvme", 4, 15}, {"ide", 2, 2}}

// FromVMX reads a VM's hardware from its dictionary. sockets names, for each
// place that has a disk ("scsi0:0"), the unix socket where that disk is served;
// it must name exactly the disks of the VMX. The caller adds NVRAM,
// ConsoleSocket and serial numbers.
//
// Keys are VMware's: displayName, uuid.bios, memsize, numvcpus,
// cpuid.coresPerSocket, guestOS, firmware, uefi.secureBoot.enabled,
// bios.bootOrder, bios.hddOrder, and those of scsi, sata, nvme, ide and ethernet
// devices. Where QEMU has no such device the nearest is taken and Spec.Notes
// says so. What cannot be done safely is an error.
func FromVMX(f *vmxfile.File, sockets map[string]string) (Spec, error) {
	r := vmxReader{f: f, sockets: sockets}
	r.general()
	r.drives()
	r.adapters()
	r.bootOrder()
	r.refuse()
	if r.err != nil {
		return Spec{}, r.err
	}
	return r.spec, nil
}

// vmxReader keeps the first error, so that reading needs no branches.
type vmxReader struct {
	f       *vmxfile.File
	sockets map[string]string
	spec    Spec
	err     error
}

func (r *vmxReader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%s: %w", r.f.Name(), fmt.Errorf(format, args...))
	}
}

func (r *vmxReader) note(format string, args ...any) {
	r.spec.Notes = append(r.spec.Notes, fmt.Sprintf(format, args...))
}

func (r *vmxReader) bool(key string, def bool) bool {
	v, err := r.f.Bool(key, def)
	if err != nil && r.err == nil {
		r.err = err
	}
	return v
}

func (r *vmxReader) int(key string, def int64) int64 {
	v, err := r.f.Int(key, def)
	if err != nil && r.err == nil {
		r.err = err
	}
	return v
}

func (r *vmxReader) general() {
	s := &r.spec
	text, ok := r.f.Get("uuid.bios")
	if !ok {
		r.fail("uuid.bios is missing: it is the VM's identity; add it")
		return
	}
	id, err := vmxfile.ParseUUID(text)
	if err != nil {
		r.fail("uuid.bios: %w", err)
		return
	}
	s.UUID = id.String()
	s.Name = r.f.String("displayName", "")
	if s.Name == "" {
		s.Name = strings.TrimSuffix(filepath.Base(r.f.Name()), filepath.Ext(r.f.Name()))
	}
	s.MemoryMiB = r.int("memsize", 256)
	s.CPUs = int(min(r.int("numvcpus", 1), 1<<20))
	s.CoresPerSocket = int(min(r.int("cpuid.coresPerSocket", 0), 1<<20))
	s.GuestOS = r.f.String("guestOS", "other")
	s.Firmware = Firmware(strings.ToLower(r.f.String("firmware", "bios")))
	if s.Firmware != BIOS && s.Firmware != EFI {
		r.fail("firmware = %q: want bios or efi", s.Firmware)
	}
	s.SecureBoot = s.Firmware == EFI && r.bool("uefi.secureBoot.enabled", false)
}

func (r *vmxReader) drives() {
	served := map[string]bool{}
	for _, b := range buses {
		for c := range b.controllers {
			controller := fmt.Sprintf("%s%d", b.name, c)
			model, modelNote := Model(""), ""
			for u := range b.units {
				place := fmt.Sprintf("%s:%d", controller, u)
				if !r.bool(place+".present", false) || b.name == "scsi" && u == 7 {
					continue
				}
				file := r.f.String(place+".fileName", "")
				kind := strings.ToLower(r.f.String(place+".deviceType", "disk"))
				if strings.Contains(kind, "cdrom") {
					r.cdrom(place, kind, file)
					continue
				}
				if !strings.HasSuffix(kind, "disk") {
					r.fail("%s.deviceType = %q: only disks and CD-ROMs can be given to a guest; set %s.present to FALSE", place, kind, place)
					return
				}
				mode := strings.ToLower(r.f.String(place+".mode", "persistent"))
				if mode != "persistent" && mode != "independent-persistent" {
					r.fail("%s.mode = %q is not offered: make it persistent", place, mode)
					return
				}
				socket := r.sockets[place]
				if socket == "" {
					r.fail("%s: disk %s is not served: the VM's vmx process does not know it", place, file)
					return
				}
				served[place] = true
				if model == "" {
					model, modelNote = r.model(b.name, controller)
					if modelNote != "" {
						r.note("%s: %s", controller, modelNote)
					}
				}
				r.spec.Disks = append(r.spec.Disks, Disk{Place: place, Model: model, Socket: socket})
			}
		}
	}
	for place := range r.sockets {
		if !served[place] {
			r.fail("a disk is served for %s, where the VMX has none", place)
		}
	}
}

// model chooses the QEMU controller for one of the VMX. A guest that came from
// VMware has drivers for VMware's controllers, so they are kept where QEMU has
// them and the firmware can boot from them: SeaBIOS can, OVMF as distributions
// build it has drivers for virtio, SATA and NVMe only.
func (r *vmxReader) model(bus, controller string) (Model, string) {
	switch bus {
	case "sata":
		return AHCI, ""
	case "nvme", "ide":
		return AHCI, strings.ToUpper(bus) + " becomes SATA, which every guest knows"
	}
	dev := strings.ToLower(r.f.String(controller+".virtualDev", "virtio-scsi"))
	switch dev {
	case "virtio-scsi":
		return VirtioSCSI, ""
	case "pvscsi", "lsisas1068", "lsilogic", "buslogic":
	default:
		r.fail("%s.virtualDev = %q: want pvscsi, lsisas1068, lsilogic or virtio-scsi", controller, dev)
		return "", ""
	}
	if r.spec.Firmware == EFI {
		return VirtioSCSI, fmt.Sprintf("%s becomes virtio-scsi: the EFI firmware here cannot boot from %[1]s", dev)
	}
	switch dev {
	case "pvscsi":
		return PVSCSI, ""
	case "lsisas1068":
		return LSISAS, ""
	}
	return LSISAS, dev + " becomes lsisas1068, the nearest that QEMU has"
}

func (r *vmxReader) cdrom(place, kind, file string) {
	c := CDROM{Place: place}
	switch {
	case kind != "cdrom-image" || file == "" || !r.bool(place+".startConnected", true):
	case !filepath.IsLocal(file):
		// A VMX must not be a way to read any file of the host.
		r.note("%s: the drive is empty: image %s is not in the VM's folder", place, file)
	default:
		image, err := inFolder(filepath.Dir(r.f.Name()), file)
		if err != nil {
			r.note("%s: the drive is empty: image %s is missing, or a link out of the VM's folder", place, file)
		}
		c.Image = image
	}
	r.spec.CDROMs = append(r.spec.CDROMs, c)
}

// inFolder is the path of a file in a VM's folder; a link must not lead out of it.
func inFolder(dir, file string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", err
	}
	path, err := filepath.EvalSymlinks(filepath.Join(dir, file))
	if err != nil {
		return "", err
	}
	if rel, err := filepath.Rel(dir, path); err != nil || !filepath.IsLocal(rel) {
		return "", fmt.Errorf("%s leads out of the VM's folder", file)
	}
	return path, nil
}

// nicModels: VMware's names and libvirt's own, as libvirt's.
var nicModels = map[string]string{
	"vmxnet3": "vmxnet3", "vmxnet2": "vmxnet3", "vmxnet": "vmxnet3",
	"e1000": "e1000", "e1000e": "e1000e", "vlance": "pcnet", "virtio": "virtio",
}

func (r *vmxReader) adapters() {
	for n := range 10 {
		eth := fmt.Sprintf("ethernet%d", n)
		if !r.bool(eth+".present", false) {
			continue
		}
		dev := strings.ToLower(r.f.String(eth+".virtualDev", "vmxnet3"))
		model, ok := nicModels[dev]
		if !ok {
			r.fail("%s.virtualDev = %q: want vmxnet3, e1000, e1000e, vlance or virtio", eth, dev)
			return
		}
		mac := r.f.String(eth+".address", r.f.String(eth+".generatedAddress", ""))
		hw, err := net.ParseMAC(mac)
		if err != nil || len(hw) != 6 || hw[0]&1 != 0 {
			r.fail("%s: MAC address %.32q is none of one adapter: set %s.address, e.g. \"00:50:56:00:00:01\"", eth, mac, eth)
			return
		}
		nic := NIC{
			Place: eth, Network: r.f.String(eth+".networkName", ""), MAC: hw.String(), Model: model,
			Connected: r.bool(eth+".startConnected", true),
		}
		if nic.Network == "" && strings.EqualFold(r.f.String(eth+".connectionType", ""), "nat") {
			nic.Network = "default" // libvirt's own NAT network
		}
		if nic.Network == "" && nic.Connected {
			r.fail("%s names no network: set %[1]s.networkName to a libvirt network of the host, or %[1]s.startConnected to FALSE", eth)
			return
		}
		r.spec.NICs = append(r.spec.NICs, nic)
	}
}

// bootOrder follows bios.bootOrder ("cdrom,hdd") and bios.hddOrder
// ("scsi0:1,scsi0:0"); without them: disks by place, then CD-ROMs. A network
// adapter is booted from only when bios.bootOrder names it.
func (r *vmxReader) bootOrder() {
	s, next := &r.spec, 1
	take := func(boot *int) {
		if *boot == 0 {
			*boot = next
			next++
		}
	}
	disks := func() {
		for place := range strings.SplitSeq(r.f.String("bios.hddOrder", ""), ",") {
			if i := slices.IndexFunc(s.Disks, func(d Disk) bool { return strings.EqualFold(d.Place, strings.TrimSpace(place)) }); i >= 0 {
				take(&s.Disks[i].Boot)
			}
		}
		for i := range s.Disks {
			take(&s.Disks[i].Boot)
		}
	}
	cdroms := func() {
		for i := range s.CDROMs {
			take(&s.CDROMs[i].Boot)
		}
	}
	for class := range strings.SplitSeq(r.f.String("bios.bootOrder", "hdd,cdrom"), ",") {
		class = strings.ToLower(strings.TrimSpace(class))
		switch {
		case class == "hdd":
			disks()
		case class == "cdrom":
			cdroms()
		case strings.HasPrefix(class, "ethernet"):
			for i := range s.NICs {
				if class == "ethernet" || class == s.NICs[i].Place {
					take(&s.NICs[i].Boot)
				}
			}
		}
	}
	if len(s.Disks) > 0 && next == 1 {
		disks() // an order that names nothing here
	}
}

// refuse names devices that a guest would silently lack.
func (r *vmxReader) refuse() {
	if r.bool("vtpm.present", false) {
		r.fail("vtpm.present: this version has no vTPM; remove the device from the VM")
	}
	for n := range 4 {
		for _, port := range []string{"serial", "parallel"} {
			p := fmt.Sprintf("%s%d", port, n)
			if r.bool(p+".present", false) {
				r.note("%s: the port is not connected: a guest has one serial port, its console", p)
			}
		}
	}
	if r.bool("floppy0.present", false) && r.bool("floppy0.startConnected", false) {
		r.note("floppy0: there is no floppy drive")
	}
}
