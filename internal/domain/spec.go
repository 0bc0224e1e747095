package domain

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Firmware is what the guest boots with.
type Firmware string

// The firmwares that a VMX can name.
const (
	BIOS Firmware = "bios" // SeaBIOS
	EFI  Firmware = "efi"  // OVMF
)

// DefaultReconnectDelay is how long QEMU holds a guest's requests while a disk's
// server is away before it pauses the guest. It is shorter than the 30 s after
// which a Linux guest's SCSI layer begins to abort commands. Older libvirt (9.0
// of Debian 12) has no such setting and ignores it: QEMU pauses the guest at once.
const DefaultReconnectDelay = 10 * time.Second

// maxSocketPath is what sun_path holds, less its final NUL; see unix(7).
const maxSocketPath = 107

// A Spec is a guest's hardware, complete but for what XML chooses by itself.
type Spec struct {
	Name           string // the VM's display name; it need not be unique
	UUID           string // uuid.bios as 8-4-4-4-12 hexadecimal digits
	MemoryMiB      int64
	CPUs           int
	CoresPerSocket int    // 0: every CPU is a socket
	GuestOS        string // VMware's guest id, e.g. "debian12-64"
	Firmware       Firmware
	SecureBoot     bool // only with EFI

	Disks  []Disk
	CDROMs []CDROM
	NICs   []NIC

	// NVRAM is the file of EFI variables, in the VM's FUSE view. When it does not
	// exist libvirt makes it of OVMF's template.
	NVRAM string
	// ConsoleSocket is where QEMU listens for the console's reader.
	ConsoleSocket string
	// ReconnectDelay is a whole number of seconds; 0 means DefaultReconnectDelay.
	ReconnectDelay time.Duration

	// Notes say what of the VMX this hypervisor does differently, for the log.
	Notes []string
}

// A Disk is served over NBD on a unix socket.
type Disk struct {
	Place    string // in the VMX, e.g. "scsi0:0"
	Model    Model  // of its controller; all disks of one controller have the same
	Socket   string
	Serial   string // what the guest sees, at most 36 characters; may be empty
	ReadOnly bool
	Boot     int // place in the boot order from 1; 0: not booted from
}

// A CDROM is a drive with an image, or empty.
type CDROM struct {
	Place string
	Image string // absolute path; empty: no medium
	Boot  int
}

// A NIC is a network adapter.
type NIC struct {
	Place     string // "ethernet0"
	Network   string // libvirt network
	MAC       string // "00:50:56:…"
	Model     string // as libvirt names it: vmxnet3, e1000e, virtio, …
	Connected bool   // false: the cable is unplugged and Network is not needed
	Boot      int
}

// Model is a disk controller as libvirt names it.
type Model string

// Controllers.
const (
	VirtioSCSI Model = "virtio-scsi"
	PVSCSI     Model = "vmpvscsi"
	LSISAS     Model = "lsisas1068"
	AHCI       Model = "ahci"
)

// Validate says what is wrong with the Spec, or nil. XML and Start call it.
func (s *Spec) Validate() error {
	if _, err := uuid.Parse(s.UUID); err != nil || len(s.UUID) != 36 {
		return fmt.Errorf("UUID %.64q: want 8-4-4-4-12 hexadecimal digits", s.UUID)
	}
	if s.Name == "" || strings.ContainsFunc(s.Name, func(r rune) bool { return r < ' ' || r == 0x7f || r == 0xfffd || r == 0xfffe || r == 0xffff }) {
		return fmt.Errorf("VM name %.64q: it is empty or has control characters", s.Name)
	}
	if s.MemoryMiB < 4 || s.MemoryMiB > 24<<20 {
		return fmt.Errorf("%d MiB of memory: a VM has 4 to %d", s.MemoryMiB, 24<<20)
	}
	if s.CPUs < 1 || s.CPUs > 768 {
		return fmt.Errorf("%d CPUs: a VM has 1 to 768", s.CPUs)
	}
	if s.CoresPerSocket < 0 || s.CoresPerSocket > 0 && s.CPUs%s.CoresPerSocket != 0 {
		return fmt.Errorf("%d CPUs cannot be %d to a socket", s.CPUs, s.CoresPerSocket)
	}
	switch s.Firmware {
	case BIOS:
		if s.SecureBoot {
			return fmt.Errorf("secure boot needs firmware efi, not bios")
		}
	case EFI:
		if !filepath.IsAbs(s.NVRAM) {
			return fmt.Errorf("an EFI guest needs the path of its variables, not %q", s.NVRAM)
		}
	default:
		return fmt.Errorf("firmware %.64q: want bios or efi", s.Firmware)
	}
	if s.ReconnectDelay < 0 || s.ReconnectDelay%time.Second != 0 {
		return fmt.Errorf("reconnect delay %v: want whole seconds", s.ReconnectDelay)
	}
	if err := checkSocket("console", s.ConsoleSocket); err != nil {
		return err
	}
	places := map[string]bool{}
	take := func(place string) error {
		if place == "" || places[place] {
			return fmt.Errorf("two devices at %q", place)
		}
		places[place] = true
		return nil
	}
	models := map[string]Model{}
	for _, d := range s.Disks {
		if err := take(d.Place); err != nil {
			return err
		}
		if err := checkSocket("disk "+d.Place, d.Socket); err != nil {
			return err
		}
		if len(d.Serial) > 36 || strings.Trim(d.Serial, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_.+-") != "" {
			return fmt.Errorf("disk %s: serial number %.64q: want at most 36 letters and digits", d.Place, d.Serial)
		}
		c, _ := splitPlace(d.Place)
		if m, ok := models[c]; ok && m != d.Model {
			return fmt.Errorf("disk %s: its controller is both %s and %s", d.Place, m, d.Model)
		}
		models[c] = d.Model
		switch d.Model {
		case VirtioSCSI, PVSCSI, LSISAS:
		case AHCI:
			if d.ReadOnly {
				return fmt.Errorf("disk %s: a SATA disk cannot be read-only", d.Place)
			}
		default:
			return fmt.Errorf("disk %s: unknown controller model %.64q", d.Place, d.Model)
		}
	}
	for _, c := range s.CDROMs {
		if err := take(c.Place); err != nil {
			return err
		}
		if c.Image != "" && !filepath.IsAbs(c.Image) {
			return fmt.Errorf("CD-ROM %s: image %q is no absolute path", c.Place, c.Image)
		}
	}
	for _, n := range s.NICs {
		if err := take(n.Place); err != nil {
			return err
		}
		if n.Connected && n.Network == "" {
			return fmt.Errorf("network adapter %s names no network", n.Place)
		}
	}
	return nil
}

func checkSocket(what, path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s: socket %q is no absolute path", what, path)
	}
	if len(path) > maxSocketPath {
		return fmt.Errorf("%s: socket %s is %d bytes long, but Linux takes at most %d: use a shorter state folder", what, path, len(path), maxSocketPath)
	}
	return nil
}

// splitPlace cuts "scsi0:1" into "scsi0" and 1; -1 when there is no unit.
func splitPlace(place string) (controller string, unit int) {
	controller, u, ok := strings.Cut(place, ":")
	unit = -1
	if ok {
		if _, err := fmt.Sscanf(u, "%d", &unit); err != nil {
			unit = -1
		}
	}
	return controller, unit
}
