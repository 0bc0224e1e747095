package vimapi

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/center"
	"mortise/internal/inventory"
	"mortise/internal/policy"
)

// This file turns vSphere's specs of VMs into center's. What a spec asks for
// and Mortise does not have is refused by name when leaving it out would change
// what the user gets; hints on performance and display are passed over.

// checkSpec refuses what no VM here has.
func checkSpec(spec *types.VirtualMachineConfigSpec) error {
	refuse := func(what, why string) error {
		return notSupported("the spec's %s is not supported: %s", what, why)
	}
	isTrue := func(b *bool) bool { return b != nil && *b }
	switch {
	case spec.FtInfo != nil:
		return refuse("ftInfo", "fault tolerance is not there, and never for encrypted VMs")
	case spec.RepConfig != nil:
		return refuse("repConfig", "replication is not there")
	case spec.VAppConfig != nil:
		return refuse("vAppConfig", "vApps are not there")
	case isTrue(spec.SevEnabled), isTrue(spec.SevSnpEnabled), isTrue(spec.TdxEnabled), spec.SgxInfo != nil:
		return refuse("confidential computing", "SEV, TDX and SGX are not there")
	case spec.Pmem != nil:
		return refuse("pmem", "persistent memory is not there")
	case spec.BootOptions != nil && isTrue(spec.BootOptions.EfiSecureBootEnabled):
		return refuse("bootOptions.efiSecureBootEnabled", "UEFI secure boot is not there yet")
	case spec.Flags != nil && isTrue(spec.Flags.VbsEnabled):
		return refuse("flags.vbsEnabled", "virtualization-based security is not there")
	}
	return nil
}

// cryptoSpec translates a CryptoSpec; nil is an absent one.
func cryptoSpec(spec types.BaseCryptoSpec) (center.CryptoSpec, error) {
	switch s := spec.(type) {
	case nil:
		return center.CryptoSpec{}, nil
	case *types.CryptoSpecEncrypt:
		return center.CryptoSpec{Kind: center.CryptoEncrypt, Key: fromKeyID(s.CryptoKeyId)}, nil
	case *types.CryptoSpecDecrypt:
		return center.CryptoSpec{Kind: center.CryptoDecrypt}, nil
	case *types.CryptoSpecShallowRecrypt:
		return center.CryptoSpec{Kind: center.CryptoShallow, Key: fromKeyID(s.NewKeyId)}, nil
	case *types.CryptoSpecDeepRecrypt:
		return center.CryptoSpec{Kind: center.CryptoDeep, Key: fromKeyID(s.NewKeyId)}, nil
	case *types.CryptoSpecRegister:
		return center.CryptoSpec{Kind: center.CryptoRegister, Keys: []inventory.KeyID{fromKeyID(s.CryptoKeyId)}}, nil
	case *types.CryptoSpecNoOp:
		return center.CryptoSpec{Kind: center.CryptoNoOp}, nil
	}
	return center.CryptoSpec{}, invalidArgument("spec.crypto", "a crypto spec of the type %s asks for nothing that is known", reflect.TypeOf(spec).Elem().Name())
}

// profileSpec translates profiles; nil when there are none.
func profileSpec(specs []types.BaseVirtualMachineProfileSpec) (*policy.ID, error) {
	if len(specs) == 0 {
		return nil, nil
	}
	if len(specs) > 1 {
		return nil, notSupported("one storage policy at a time can be applied, not %d", len(specs))
	}
	switch p := specs[0].(type) {
	case *types.VirtualMachineDefinedProfileSpec:
		id := policy.ID(p.ProfileId)
		return &id, nil
	case *types.VirtualMachineDefaultProfileSpec, *types.VirtualMachineEmptyProfileSpec:
		id := policy.DatastoreDefault
		return &id, nil
	}
	return nil, invalidArgument("spec.vmProfile", "a profile spec of the type %T is not known", specs[0])
}

// deviceSpecs is a spec's device changes, sorted by what they are.
type deviceSpecs struct {
	disks    []diskSpec
	nics     []*types.VirtualDeviceConfigSpec
	existing map[int32]place // controllers that the spec adds, by their key in it
}

type diskSpec struct {
	spec    *types.VirtualDeviceConfigSpec
	disk    *types.VirtualDisk
	crypto  center.CryptoSpec
	profile *policy.ID
}

func sortDevices(changes []types.BaseVirtualDeviceConfigSpec) (*deviceSpecs, error) {
	d := &deviceSpecs{existing: map[int32]place{}}
	for i, base := range changes {
		if base == nil {
			return nil, invalidArgument("spec.deviceChange", "device change %d is empty", i)
		}
		spec := base.GetVirtualDeviceConfigSpec()
		switch dev := spec.Device.(type) {
		case nil:
			return nil, fault(&types.InvalidDeviceSpec{DeviceIndex: int32(i)}, "device change %d has no device", i)
		case *types.VirtualDisk:
			n, err := newDiskSpec(spec, dev)
			if err != nil {
				return nil, err
			}
			d.disks = append(d.disks, n)
		case types.BaseVirtualController:
			if err := d.controller(spec, dev); err != nil {
				return nil, err
			}
		case types.BaseVirtualEthernetCard:
			d.nics = append(d.nics, spec)
		default:
			if spec.Operation == types.VirtualDeviceConfigSpecOperationEdit || harmless(dev) {
				continue // VMs are shown without these; there is nothing to change
			}
			return nil, &vimFault{&types.InvalidDeviceSpec{DeviceIndex: int32(i)}, refusal(dev)}
		}
	}
	return d, nil
}

// harmless tells devices that every VM has or does well without.
func harmless(dev types.BaseVirtualDevice) bool {
	switch dev.(type) {
	case *types.VirtualKeyboard, *types.VirtualPointingDevice, *types.VirtualMachineVideoCard, *types.VirtualMachineVMCIDevice:
		return true
	}
	return false
}

func refusal(dev types.BaseVirtualDevice) string {
	name := reflect.TypeOf(dev).Elem().Name()
	switch d := dev.(type) {
	case *types.VirtualTPM:
		return "a vTPM is not supported yet"
	case *types.VirtualSerialPort:
		if _, ok := d.Backing.(*types.VirtualSerialPortFileBackingInfo); ok {
			return "a serial port cannot write to a file: guest data would be outside in clear. Every VM has a console of its own (vm console)"
		}
		return "serial ports are not configurable: every VM has one, its console (vm console)"
	case *types.VirtualParallelPort:
		return "parallel ports are not supported: guest data would be outside in clear"
	}
	return fmt.Sprintf("devices of the type %s are not supported", name)
}

// controller notes a disk controller that disks of the same spec refer to. Real
// controllers come and go with their disks.
func (d *deviceSpecs) controller(spec *types.VirtualDeviceConfigSpec, dev types.BaseVirtualController) error {
	base := dev.GetVirtualController()
	if base.BusNumber < 0 || base.BusNumber > 3 {
		return fault(&types.InvalidDeviceSpec{}, "a controller has a bus number of 0 to 3, not %d", base.BusNumber)
	}
	switch dev.(type) {
	case types.BaseVirtualSCSIController:
		d.existing[base.Key] = place{bus: "scsi", busNumber: base.BusNumber}
	case types.BaseVirtualSATAController:
		d.existing[base.Key] = place{bus: "sata", busNumber: base.BusNumber}
	case *types.VirtualNVMEController:
		d.existing[base.Key] = place{bus: "nvme", busNumber: base.BusNumber}
	case *types.VirtualIDEController, *types.VirtualPCIController, *types.VirtualPS2Controller, *types.VirtualSIOController:
	default:
		return fault(&types.InvalidDeviceSpec{}, "controllers of the type %s are not supported; use SCSI, SATA or NVMe", reflect.TypeOf(dev).Elem().Name())
	}
	return nil
}

// place is where a disk is to be attached: "scsi0:1", or empty for the next free
// place.
func (d *deviceSpecs) place(dev *types.VirtualDisk) (string, error) {
	if dev.ControllerKey == 0 || dev.UnitNumber == nil || *dev.UnitNumber < 0 {
		return "", nil
	}
	p, ok := d.existing[dev.ControllerKey]
	if ok {
		p.unit = *dev.UnitNumber
	} else if p, ok = placeOf(dev.ControllerKey, *dev.UnitNumber); !ok {
		return "", fault(&types.InvalidDeviceSpec{}, "disk %d refers to controller %d, which is not there", dev.Key, dev.ControllerKey)
	}
	return p.String(), nil
}

func newDiskSpec(spec *types.VirtualDeviceConfigSpec, dev *types.VirtualDisk) (diskSpec, error) {
	n := diskSpec{spec: spec, disk: dev}
	var err error
	if b := spec.Backing; b != nil {
		for up := b.Parent; up != nil; up = up.Parent {
			if up.Crypto != nil {
				return n, notSupported("disk %d: the disk has no snapshots, so there is no parent to encrypt or recrypt", dev.Key)
			}
		}
		if n.crypto, err = cryptoSpec(b.Crypto); err != nil {
			return n, err
		}
	}
	n.profile, err = profileSpec(spec.Profile)
	return n, err
}

// capacity is a disk's in bytes; 0 when the spec says none.
func capacity(dev *types.VirtualDisk) (int64, error) {
	switch {
	case dev.CapacityInBytes < 0, dev.CapacityInKB < 0, dev.CapacityInKB > 1<<52:
		return 0, fault(&types.InvalidDeviceSpec{}, "disk %d has an impossible capacity", dev.Key)
	case dev.CapacityInBytes > 0:
		return dev.CapacityInBytes, nil
	}
	return dev.CapacityInKB << 10, nil
}

// thick says whether a new disk is to have all of its space from the beginning: a
// spec that says nothing means a thin one.
func thick(dev *types.VirtualDisk) (bool, error) {
	b, ok := dev.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
	if !ok {
		return false, nil
	}
	set := func(v *bool) bool { return v != nil && *v }
	if set(b.ThinProvisioned) && set(b.EagerlyScrub) {
		return false, fault(&types.InvalidDeviceBacking{}, "disk %d cannot be thinProvisioned and eagerlyScrub: a thin disk has no space to scrub; give one of them", dev.Key)
	}
	return b.ThinProvisioned != nil && !*b.ThinProvisioned || set(b.EagerlyScrub), nil
}

// backingFile is the path in a disk's backing.
func backingFile(dev *types.VirtualDisk) string {
	if b, ok := dev.Backing.(types.BaseVirtualDeviceFileBackingInfo); ok {
		return b.GetVirtualDeviceFileBackingInfo().FileName
	}
	return ""
}

// newNIC translates a card. Fields that the spec leaves open stay those of old.
func (r *reader) newNIC(dev types.BaseVirtualDevice, old inventory.NIC) (inventory.NIC, error) {
	card := dev.(types.BaseVirtualEthernetCard).GetVirtualEthernetCard()
	n := old
	if card.MacAddress != "" {
		n.MAC = strings.ToLower(card.MacAddress)
	}
	if old.Model == "" {
		switch dev.(type) {
		case *types.VirtualVmxnet3:
			n.Model = "vmxnet3"
		case *types.VirtualE1000:
			n.Model = "e1000"
		case *types.VirtualE1000e:
			n.Model = "e1000e"
		case *types.VirtualPCNet32:
			n.Model = "vlance"
		case *types.VirtualEthernetCard, *types.VirtualVmxnet:
			n.Model = "" // center's choice
		default:
			return n, fault(&types.InvalidDeviceSpec{}, "network cards of the type %s are not supported; use vmxnet3, e1000e or e1000", reflect.TypeOf(dev).Elem().Name())
		}
	}
	switch b := card.Backing.(type) {
	case nil:
	case *types.VirtualEthernetCardNetworkBackingInfo:
		n.Network = b.DeviceName
		if b.Network != nil {
			if net, ok := inventory.Lookup[inventory.Network](r.view, ref(*b.Network)); ok {
				n.Network = net.Name
			}
		}
	default:
		return n, fault(&types.InvalidDeviceBacking{}, "network cards are attached to networks of the inventory; the backing %T is something else", card.Backing)
	}
	if n.Network == "" {
		return n, fault(&types.InvalidDeviceBacking{}, "a network card needs a network")
	}
	return n, nil
}

// nicList applies changes to a VM's cards; nil when there are none.
func (r *reader) nicList(have []inventory.NIC, changes []*types.VirtualDeviceConfigSpec) ([]inventory.NIC, error) {
	if len(changes) == 0 {
		return nil, nil
	}
	list := append([]inventory.NIC{}, have...)
	for _, c := range changes {
		key := c.Device.GetVirtualDevice().Key
		at := slices.IndexFunc(list, func(n inventory.NIC) bool { return n.Key == key })
		switch {
		case c.Operation == types.VirtualDeviceConfigSpecOperationAdd:
			n, err := r.newNIC(c.Device, inventory.NIC{})
			if err != nil {
				return nil, err
			}
			list = append(list, n)
		case at < 0:
			return nil, fault(&types.InvalidDeviceSpec{}, "the VM has no network card with the key %d", key)
		case c.Operation == types.VirtualDeviceConfigSpecOperationRemove:
			list = slices.Delete(list, at, at+1)
		default:
			n, err := r.newNIC(c.Device, list[at])
			if err != nil {
				return nil, err
			}
			list[at] = n
		}
	}
	return list, nil
}

func hardwareSpec(spec *types.VirtualMachineConfigSpec) center.HardwareSpec {
	return center.HardwareSpec{
		MemoryMiB: spec.MemoryMB, CPUs: spec.NumCPUs, Firmware: spec.Firmware, GuestOS: spec.GuestId, Annotation: spec.Annotation,
	}
}

// createSpec translates Folder.CreateVM_Task.
func (c *call) createSpec(q *types.CreateVM_Task) (center.CreateVMSpec, error) {
	conf := &q.Config
	spec := center.CreateVMSpec{
		Name: conf.Name, Folder: ref(q.This), Host: optionalRef(q.Host), Pool: ref(q.Pool), UUID: conf.Uuid, Hardware: hardwareSpec(conf),
		MigrateEncryption: conf.MigrateEncryption, Annotation: conf.Annotation,
	}
	if err := checkSpec(conf); err != nil {
		return spec, err
	}
	if conf.Files != nil {
		spec.Path = conf.Files.VmPathName
	}
	var err error
	if spec.Crypto, err = cryptoSpec(conf.Crypto); err != nil {
		return spec, err
	}
	home, err := profileSpec(conf.VmProfile)
	if err != nil {
		return spec, err
	}
	if home != nil {
		spec.Profile = *home
	}
	devices, err := sortDevices(conf.DeviceChange)
	if err != nil {
		return spec, err
	}
	r := c.reader()
	if spec.Hardware.NICs, err = r.nicList(nil, devices.nics); err != nil {
		return spec, err
	}
	for _, d := range devices.disks {
		if d.spec.Operation != types.VirtualDeviceConfigSpecOperationAdd && d.spec.Operation != "" {
			return spec, fault(&types.InvalidDeviceSpec{}, "a new VM has no disk %d yet to edit or remove", d.disk.Key)
		}
		if d.spec.FileOperation == "" && backingFile(d.disk) != "" {
			return spec, notSupported("a new VM's disks are new: attach %q to the VM when it is there", clip(backingFile(d.disk)))
		}
		n := center.NewDiskSpec{Crypto: d.crypto}
		if n.CapacityBytes, err = capacity(d.disk); err != nil {
			return spec, err
		}
		if n.Controller, err = devices.place(d.disk); err != nil {
			return spec, err
		}
		if n.Thick, err = thick(d.disk); err != nil {
			return spec, err
		}
		if d.profile != nil {
			n.Profile = *d.profile
		}
		spec.Disks = append(spec.Disks, n)
	}
	return spec, nil
}

// reconfigureSpec translates VirtualMachine.ReconfigVM_Task.
func (c *call) reconfigureSpec(vm *inventory.VM, conf *types.VirtualMachineConfigSpec) (center.ReconfigureSpec, error) {
	spec := center.ReconfigureSpec{Name: conf.Name, Hardware: hardwareSpec(conf), MigrateEncryption: conf.MigrateEncryption}
	if err := checkSpec(conf); err != nil {
		return spec, err
	}
	var err error
	if spec.Crypto, err = cryptoSpec(conf.Crypto); err != nil {
		return spec, err
	}
	if spec.Profile, err = profileSpec(conf.VmProfile); err != nil {
		return spec, err
	}
	devices, err := sortDevices(conf.DeviceChange)
	if err != nil {
		return spec, err
	}
	if spec.Hardware.NICs, err = c.reader().nicList(vm.Hardware.NICs, devices.nics); err != nil {
		return spec, err
	}
	for _, d := range devices.disks {
		n, err := devices.diskChange(vm, d)
		if err != nil {
			return spec, err
		}
		spec.Disks = append(spec.Disks, n)
	}
	return spec, nil
}

func (devices *deviceSpecs) diskChange(vm *inventory.VM, d diskSpec) (center.DiskChange, error) {
	n := center.DiskChange{Key: d.disk.Key, Crypto: d.crypto, Profile: d.profile}
	size, err := capacity(d.disk)
	if err != nil {
		return n, err
	}
	switch d.spec.Operation {
	case types.VirtualDeviceConfigSpecOperationAdd:
		n.Op, n.Key = center.DiskAdd, 0
		if n.Controller, err = devices.place(d.disk); err != nil {
			return n, err
		}
		if d.spec.FileOperation == types.VirtualDeviceConfigSpecFileOperationCreate {
			n.CapacityBytes = size
			n.Thick, err = thick(d.disk)
		} else {
			n.Path = backingFile(d.disk)
		}
		return n, err
	case types.VirtualDeviceConfigSpecOperationRemove:
		n.Op, n.Destroy = center.DiskRemove, d.spec.FileOperation == types.VirtualDeviceConfigSpecFileOperationDestroy
		return n, nil
	case types.VirtualDeviceConfigSpecOperationEdit, "":
		n.Op = center.DiskEdit
		// Clients send the whole device back; only a new capacity is a change.
		if have := vm.Disk(d.disk.Key); have != nil && size != 0 && size != have.CapacityBytes && size>>10 != have.CapacityBytes>>10 {
			n.CapacityBytes = size
		}
		return n, nil
	}
	return n, fault(&types.InvalidDeviceSpec{}, "device operation %q is not known", clip(string(d.spec.Operation)))
}
