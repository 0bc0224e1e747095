package cli

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/vmxfile"
)

// A vmxFolder is a VM as a VMware product keeps it, read from its VMX: what is
// kept of it, and in notes what is not.
type vmxFolder struct {
	machine
	files []string // the disks' descriptors, beside machine.disks
	notes []string
}

// findVMX is the VMX that path names: itself, or the only one in a folder.
func findVMX(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil || !st.IsDir() {
		return path, err
	}
	found, err := filepath.Glob(filepath.Join(globQuote(path), "*.vmx"))
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", fmt.Errorf("%s holds no .vmx file: name a VM's folder, its .vmx, or a disk", path)
	case len(found) > 1:
		return "", fmt.Errorf("%s holds %d .vmx files: name the one that is meant", path, len(found))
	}
	return found[0], nil
}

func globQuote(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// readVMX reads a VMX. Names of disks stay relative to its folder, and may not
// lead out of it.
func readVMX(path string) (*vmxFolder, error) {
	f, err := vmxfile.Load(path)
	if err != nil {
		return nil, err
	}
	if safe, ok := f.Get("encryption.keySafe"); ok {
		if strings.HasPrefix(strings.ToLower(safe), "vmware:key/") {
			return nil, foreignDisk(path)
		}
		return nil, fmt.Errorf(`%s is encrypted by Mortise already: bring it in with mortise vm register "[DATASTORE] FOLDER/FILE.vmx"`, path)
	}
	if st, err := os.Stat(path + vmxfile.LockSuffix); err == nil && st.IsDir() {
		return nil, fmt.Errorf("%s is open in a VMware product (there is %s): close it there first, or remove that folder if nothing has it open", path, filepath.Base(path)+vmxfile.LockSuffix)
	}
	if v := f.String("checkpoint.vmState", ""); v != "" {
		return nil, fmt.Errorf("%s is suspended (%s): resume it and shut its guest down first, or the disks are not consistent", path, v)
	}
	v := &vmxFolder{}
	for _, read := range []func(*vmxfile.File) error{v.general, v.drives, v.cards, v.devices} {
		if err := read(f); err != nil {
			return nil, err
		}
	}
	return v, nil
}

func (v *vmxFolder) note(format string, args ...any) {
	v.notes = append(v.notes, fmt.Sprintf(format, args...))
}

func (v *vmxFolder) general(f *vmxfile.File) error {
	v.name = f.String("displayName", strings.TrimSuffix(filepath.Base(f.Name()), filepath.Ext(f.Name())))
	if text, ok := f.Get("uuid.bios"); ok && text != "" {
		id, err := vmxfile.ParseUUID(text)
		if err != nil {
			return fmt.Errorf("%s: uuid.bios: %w", f.Name(), err)
		}
		v.uuid = id
	} else {
		v.note("it has no uuid.bios: it gets a new UUID")
	}
	mem, err := f.Int("memsize", 256)
	if err != nil {
		return err
	}
	cpus, err := f.Int("numvcpus", 1)
	if err != nil {
		return err
	}
	if mem < 1 || cpus < 1 || cpus > 1<<15 {
		return fmt.Errorf("%s: memsize %d or numvcpus %d makes no sense", f.Name(), mem, cpus)
	}
	v.memoryMiB, v.cpus = mem, int32(cpus)
	v.firmware = strings.ToLower(f.String("firmware", "bios"))
	if v.firmware != "bios" && v.firmware != "efi" {
		return fmt.Errorf("%s: firmware = %q: want bios or efi", f.Name(), v.firmware)
	}
	secure, err := f.Bool("uefi.secureBoot.enabled", false)
	if err != nil {
		return err
	}
	if secure {
		v.note("secure boot is off: its firmware variables start anew")
	} else if v.firmware == "efi" {
		v.note("its firmware variables start anew: if it does not boot, choose the boot file in the firmware's menu once")
	}
	v.guest = f.String("guestOS", "")
	v.annotation = f.String("annotation", "")
	return nil
}

// busPlaces are VMware's disk buses.
var busPlaces = []struct {
	name               string
	controllers, units int
}{{"scsi", 4, 16}, {"sata", 4, 30}, {"nvme", 4, 15}, {"ide", 2, 2}}

func (v *vmxFolder) drives(f *vmxfile.File) error {
	taken := map[place]bool{}
	var ide []string
	for _, b := range busPlaces {
		for bus := range b.controllers {
			for unit := range b.units {
				at := fmt.Sprintf("%s%d:%d", b.name, bus, unit)
				present, err := f.Bool(at+".present", false)
				if err != nil {
					return err
				}
				if !present {
					continue
				}
				file := f.String(at+".fileName", "")
				kind := strings.ToLower(f.String(at+".deviceType", "disk"))
				if strings.Contains(kind, "cdrom") {
					if strings.Contains(kind, "image") && file != "" {
						v.note("CD-ROM %s (%s) is left out", at, file)
					}
					continue
				}
				if !strings.HasSuffix(kind, "disk") {
					v.note("%s (%s) is left out: it is no disk", at, kind)
					continue
				}
				if mode := strings.ToLower(f.String(at+".mode", "persistent")); mode != "persistent" && mode != "independent-persistent" {
					return fmt.Errorf("%s: %s.mode = %q: a disk that forgets is not offered; set it to persistent", f.Name(), at, mode)
				}
				if file == "" || filepath.Base(file) != file {
					return fmt.Errorf("%s: disk %s is %q, outside the VM's folder: copy it into the folder and change %s.fileName", f.Name(), at, file, at)
				}
				if b.name == "ide" {
					ide = append(ide, file)
					v.note("disk %s becomes a SATA disk", at)
					continue
				}
				p := place{b.name, int32(bus), int32(unit)}
				taken[p] = true
				v.disks = append(v.disks, machineDisk{place: p})
				v.files = append(v.files, file)
			}
		}
	}
	for unit := int32(0); len(ide) > 0; unit++ {
		if p := (place{"sata", 0, unit}); !taken[p] {
			v.disks = append(v.disks, machineDisk{place: p})
			v.files, ide = append(v.files, ide[0]), ide[1:]
		}
	}
	return nil
}

func (v *vmxFolder) cards(f *vmxfile.File) error {
	for n := range 10 {
		eth := fmt.Sprintf("ethernet%d", n)
		present, err := f.Bool(eth+".present", false)
		if err != nil {
			return err
		}
		if !present {
			continue
		}
		mac := f.String(eth+".address", f.String(eth+".generatedAddress", ""))
		if hw, err := net.ParseMAC(mac); err != nil || len(hw) != 6 || hw[0]&1 != 0 {
			v.note("card %s has no usable MAC address (%q): it gets a new one", eth, mac)
			mac = ""
		} else {
			mac = hw.String()
		}
		model := strings.ToLower(f.String(eth+".virtualDev", "vmxnet3"))
		switch model {
		case "vmxnet3", "e1000", "e1000e", "vlance":
		case "vmxnet", "vmxnet2":
			model = "vmxnet3"
		default:
			v.note("card %s (%s) becomes vmxnet3", eth, model)
			model = "vmxnet3"
		}
		v.nics = append(v.nics, machineNIC{network: f.String(eth+".networkName", ""), mac: mac, model: model})
	}
	return nil
}

// devices looks at what is not kept, so that nobody finds out later.
func (v *vmxFolder) devices(f *vmxfile.File) error {
	tpm, err := f.Bool("vtpm.present", false)
	if err != nil {
		return err
	}
	if tpm {
		return fmt.Errorf("%s has a vTPM, whose content only VMware's products can read: what its guest keeps there, such as a BitLocker key, would be lost. Suspend BitLocker or save its recovery key, remove the vTPM there, and import again", f.Name())
	}
	for _, d := range []string{"usb", "ehci", "usb_xhci", "sound", "floppy0", "pciPassthru0"} {
		present, err := f.Bool(d+".present", false)
		if err != nil {
			return err
		}
		if present {
			v.note("device %s is left out", d)
		}
	}
	for n := range 4 {
		for _, d := range []string{"serial", "parallel"} {
			if f.String(fmt.Sprintf("%s%d.fileType", d, n), "") == "file" {
				v.note("%s%d's output to a file is left out: mortise vm console shows the serial console", d, n)
			}
		}
	}
	return nil
}

// newIdentity makes a copy of it another VM: UUID and MAC addresses are new.
func (v *vmxFolder) newIdentity() {
	v.uuid = uuid.Nil
	for i := range v.nics {
		v.nics[i].mac = ""
	}
}
