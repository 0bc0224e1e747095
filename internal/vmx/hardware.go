package vmx

import (
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/vmxfile"
)

// A bus is a kind of disk controller and how many places it has, as VMware names
// them in a VMX.
type bus struct {
	name                     string
	controllers, units, skip int   // skip: the unit that the controller takes itself, or -1
	firstKey                 int32 // vSphere device key of the first place
	keysPer                  int32 // device keys of a controller
}

var buses = []bus{
	{"scsi", 4, 16, 7, 2000, 16},
	{"ide", 2, 2, -1, 3000, 2},
	{"sata", 4, 30, -1, 16000, 30},
	{"nvme", 4, 15, -1, 32000, 15},
}

// A slot is a place for a disk, and what the VMX has there.
type slot struct {
	controller string // "scsi0:0"
	key        int32
	file       string // descriptor, relative to the VM's folder
}

// diskSlots lists the VM's disks in the order of their places.
func diskSlots(f *vmxfile.File) (disks []slot, err error) {
	err = eachPlace(func(place string, key int32) error {
		present, err := f.Bool(place+".present", false)
		if err != nil || !present {
			return err
		}
		file := f.String(place+".fileName", "")
		kind := strings.ToLower(f.String(place+".deviceType", "disk"))
		if strings.Contains(kind, "cdrom") || !strings.HasSuffix(strings.ToLower(file), ".vmdk") {
			return nil
		}
		disks = append(disks, slot{place, key, file})
		return nil
	})
	return disks, err
}

func eachPlace(f func(place string, key int32) error) error {
	for _, b := range buses {
		for c := range b.controllers {
			for u := range b.units {
				if u == b.skip {
					continue
				}
				if err := f(fmt.Sprintf("%s%d:%d", b.name, c, u), b.firstKey+int32(c)*b.keysPer+int32(u)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// place finds where a new disk goes: where it is asked for, or the first free
// place of the first SCSI controller.
func place(f *vmxfile.File, wish string) (string, error) {
	found := ""
	err := eachPlace(func(p string, _ int32) error {
		if found != "" || wish != "" && p != wish || wish == "" && !strings.HasPrefix(p, "scsi") {
			return nil
		}
		present, err := f.Bool(p+".present", false)
		if err != nil {
			return err
		}
		if present && wish != "" {
			return hostapi.Faultf(hostapi.Fault_EXISTS, "%s: there is a device at %s already", f.Name(), p)
		}
		if !present {
			found = p
		}
		return nil
	})
	if err == nil && found == "" {
		err = hostapi.Faultf(hostapi.Fault_INVALID, "%s: %q is no free place for a disk: use e.g. scsi0:1, sata0:0 or nvme0:0", f.Name(), wish)
	}
	return found, err
}

func addDisk(f *vmxfile.File, place, file string) error {
	controller, _, _ := strings.Cut(place, ":")
	set := [][2]string{{controller + ".present", "TRUE"}}
	set = append(set, [2]string{place + ".present", "TRUE"}, [2]string{place + ".fileName", file},
		[2]string{place + ".deviceType", strings.TrimRight(controller, "0123456789") + "-hardDisk"})
	return setAll(f, set...)
}

func removeDisk(f *vmxfile.File, place string) {
	for _, k := range []string{".present", ".fileName", ".deviceType"} {
		f.Delete(place + k)
	}
}

func setAll(f *vmxfile.File, pairs ...[2]string) error {
	for _, p := range pairs {
		if err := f.Set(p[0], p[1]); err != nil {
			return err
		}
	}
	return nil
}

// readHardware is the part of a VMX that center shows and changes.
func readHardware(f *vmxfile.File) (*hostapi.Hardware, error) {
	mem, err := f.Int("memsize", 256)
	if err != nil {
		return nil, err
	}
	cpus, err := f.Int("numvcpus", 1)
	if err != nil {
		return nil, err
	}
	hw := &hostapi.Hardware{
		MemoryMib: mem, Cpus: int32(cpus),
		Firmware: f.String("firmware", "bios"), GuestOs: f.String("guestOS", "other"), Annotation: f.String("annotation", ""),
	}
	for n := range 10 {
		eth := "ethernet" + strconv.Itoa(n)
		present, err := f.Bool(eth+".present", false)
		if err != nil {
			return nil, err
		}
		if !present {
			continue
		}
		hw.Nics = append(hw.Nics, &hostapi.NIC{
			Key: 4000 + int32(n), Network: f.String(eth+".networkName", ""),
			Mac: f.String(eth+".address", f.String(eth+".generatedAddress", "")), Model: f.String(eth+".virtualDev", "vmxnet3"),
		})
	}
	return hw, nil
}

// Limits of a guest's hardware: those of vSphere 8.
const (
	maxMemoryMiB = 24 << 20
	maxCPUs      = 768
)

// writeHardware changes what hw sets and leaves the rest.
func writeHardware(f *vmxfile.File, hw *hostapi.Hardware) error {
	var set [][2]string
	if hw.MemoryMib != 0 {
		if hw.MemoryMib < 4 || hw.MemoryMib > maxMemoryMiB {
			return hostapi.Faultf(hostapi.Fault_INVALID, "%d MiB of memory: a VM has 4 to %d", hw.MemoryMib, maxMemoryMiB)
		}
		set = append(set, [2]string{"memsize", strconv.FormatInt(hw.MemoryMib, 10)})
	}
	if hw.Cpus != 0 {
		if hw.Cpus < 1 || hw.Cpus > maxCPUs {
			return hostapi.Faultf(hostapi.Fault_INVALID, "%d CPUs: a VM has 1 to %d", hw.Cpus, maxCPUs)
		}
		set = append(set, [2]string{"numvcpus", strconv.Itoa(int(hw.Cpus))})
	}
	switch hw.Firmware {
	case "":
	case "bios", "efi":
		set = append(set, [2]string{"firmware", hw.Firmware})
	default:
		return hostapi.Faultf(hostapi.Fault_INVALID, "firmware %q: want bios or efi", hw.Firmware)
	}
	if hw.GuestOs != "" {
		set = append(set, [2]string{"guestOS", hw.GuestOs})
	}
	if hw.Annotation != "" {
		set = append(set, [2]string{"annotation", hw.Annotation})
	}
	for i, n := range hw.Nics {
		at := int32(i)
		if n.Key != 0 {
			at = n.Key - 4000
		}
		if at < 0 || at > 9 {
			return hostapi.Faultf(hostapi.Fault_INVALID, "network adapter %d: a VM has at most 10", n.Key)
		}
		eth := fmt.Sprintf("ethernet%d", at)
		mac, kind := n.Mac, "static"
		if mac == "" {
			mac, kind = newMAC(), "generated"
		}
		model := n.Model
		if model == "" {
			model = "vmxnet3"
		}
		set = append(set, [2]string{eth + ".present", "TRUE"}, [2]string{eth + ".networkName", n.Network},
			[2]string{eth + ".virtualDev", model}, [2]string{eth + ".addressType", kind})
		if kind == "static" {
			set = append(set, [2]string{eth + ".address", mac})
		} else {
			set = append(set, [2]string{eth + ".generatedAddress", mac})
		}
	}
	return setAll(f, set...)
}

// newMAC makes an address of VMware's range for generated ones, 00:0c:29.
func newMAC() string {
	var b [3]byte
	rand.Read(b[:])
	return fmt.Sprintf("00:0c:29:%02x:%02x:%02x", b[0], b[1], b[2])
}

func vmUUID(f *vmxfile.File) (uuid.UUID, error) {
	text, ok := f.Get("uuid.bios")
	if !ok {
		return uuid.Nil, hostapi.Faultf(hostapi.Fault_INVALID, "%s has no uuid.bios: add one, e.g. uuid.bios = %q", f.Name(), vmxfile.FormatUUID(uuid.New()))
	}
	u, err := vmxfile.ParseUUID(text)
	if err != nil {
		return uuid.Nil, hostapi.Faultf(hostapi.Fault_INVALID, "%s: uuid.bios: %w", f.Name(), err)
	}
	return u, nil
}
