package vimapi

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
)

// Device keys, as vSphere numbers them.
const (
	keyPCI  = 100
	keySCSI = 1000  // and the bus
	keySATA = 15000 // and the bus
	keyNVMe = 31000 // and the bus
)

// place is where a disk is attached: "scsi0:1".
type place struct {
	bus       string
	busNumber int32
	unit      int32
}

func parsePlace(text string) (place, bool) {
	for _, bus := range []string{"scsi", "sata", "nvme"} {
		rest, ok := strings.CutPrefix(text, bus)
		if !ok {
			continue
		}
		b, u, _ := strings.Cut(rest, ":")
		busNumber, err1 := strconv.ParseUint(b, 10, 7)
		unit, err2 := strconv.ParseUint(u, 10, 7)
		return place{bus, int32(busNumber), int32(unit)}, err1 == nil && err2 == nil
	}
	return place{}, false
}

// controllerKey is the key of the controller at p.
func (p place) controllerKey() int32 {
	switch p.bus {
	case "sata":
		return keySATA + p.busNumber
	case "nvme":
		return keyNVMe + p.busNumber
	}
	return keySCSI + p.busNumber
}

// placeOf is the inverse of controllerKey.
func placeOf(controller, unit int32) (place, bool) {
	switch {
	case controller >= keySCSI && controller < keySCSI+4:
		return place{"scsi", controller - keySCSI, unit}, true
	case controller >= keySATA && controller < keySATA+4:
		return place{"sata", controller - keySATA, unit}, true
	case controller >= keyNVMe && controller < keyNVMe+4:
		return place{"nvme", controller - keyNVMe, unit}, true
	}
	return place{}, false
}

func (p place) String() string { return fmt.Sprintf("%s%d:%d", p.bus, p.busNumber, p.unit) }

func label(text, summary string) *types.Description {
	return &types.Description{Label: text, Summary: summary}
}

// devices lists a VM's virtual devices: the controllers that its disks need,
// the disks, the network cards.
func (r *reader) devices(vm *inventory.VM) []types.BaseVirtualDevice {
	pci := &types.VirtualPCIController{VirtualController: types.VirtualController{
		VirtualDevice: types.VirtualDevice{Key: keyPCI, DeviceInfo: label("PCI controller 0", "PCI controller 0")},
	}}
	all := []types.BaseVirtualDevice{pci}
	controllers := map[int32]*types.VirtualController{}
	// A VM without disks still has a controller to attach the first to.
	places := []place{{bus: "scsi"}}
	var disks []types.BaseVirtualDevice
	for i := range vm.Disks {
		d := &vm.Disks[i]
		p, ok := parsePlace(d.Controller)
		if !ok {
			p = place{bus: "scsi", unit: int32(i)}
		}
		places = append(places, p)
		disks = append(disks, r.disk(vm, d, p, i))
	}
	for _, p := range places {
		key := p.controllerKey()
		if controllers[key] == nil {
			device, base := controller(p)
			controllers[key] = base
			pci.Device = append(pci.Device, key)
			all = append(all, device)
		}
	}
	for i, d := range disks {
		key := d.GetVirtualDevice().ControllerKey
		controllers[key].Device = append(controllers[key].Device, vm.Disks[i].Key)
	}
	all = append(all, disks...)
	for i := range vm.Hardware.NICs {
		n := &vm.Hardware.NICs[i]
		pci.Device = append(pci.Device, n.Key)
		all = append(all, r.nic(n, i))
	}
	return all
}

// controller makes the disk controller at p.
func controller(p place) (types.BaseVirtualDevice, *types.VirtualController) {
	base := types.VirtualController{
		VirtualDevice: types.VirtualDevice{Key: p.controllerKey(), ControllerKey: keyPCI, UnitNumber: ptr(p.busNumber)}, BusNumber: p.busNumber,
	}
	n := strconv.Itoa(int(p.busNumber))
	switch p.bus {
	case "sata":
		base.DeviceInfo = label("SATA controller "+n, "AHCI")
		d := &types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: base}}
		return d, &d.VirtualController
	case "nvme":
		base.DeviceInfo = label("NVME controller "+n, "NVME")
		d := &types.VirtualNVMEController{VirtualController: base}
		return d, &d.VirtualController
	}
	base.DeviceInfo = label("SCSI controller "+n, "virtio-scsi")
	d := &types.ParaVirtualSCSIController{VirtualSCSIController: types.VirtualSCSIController{
		VirtualController: base, HotAddRemove: ptr(true), SharedBus: types.VirtualSCSISharingNoSharing, ScsiCtlrUnitNumber: 7,
	}}
	return d, &d.VirtualController
}

func (r *reader) disk(vm *inventory.VM, d *inventory.Disk, p place, n int) types.BaseVirtualDevice {
	summary := strconv.FormatInt(d.CapacityBytes>>10, 10) + " KB"
	if d.Encrypted {
		summary += ", encrypted"
	}
	if d.Problem != "" {
		summary += ": " + d.Problem
	}
	return &types.VirtualDisk{
		VirtualDevice: types.VirtualDevice{
			Key: d.Key, ControllerKey: p.controllerKey(), UnitNumber: ptr(p.unit), DeviceInfo: label("Hard disk "+strconv.Itoa(n+1), summary),
			Backing: &types.VirtualDiskFlatVer2BackingInfo{
				VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: r.onDatastore(vm.Datastore, d.Path), Datastore: reference(vm.Datastore)},
				DiskMode:                     string(types.VirtualDiskModePersistent), Split: ptr(false), WriteThrough: ptr(false), ThinProvisioned: ptr(!d.Thick), EagerlyScrub: ptr(false),
				Uuid: d.UUID, KeyId: optionalKeyID(d.KeyID), Sharing: "sharingNone",
			},
		},
		CapacityInKB: d.CapacityBytes >> 10, CapacityInBytes: d.CapacityBytes,
	}
}

func (r *reader) nic(n *inventory.NIC, i int) types.BaseVirtualDevice {
	backing := &types.VirtualEthernetCardNetworkBackingInfo{
		VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: n.Network, UseAutoDetect: ptr(false)},
	}
	if ref, ok := r.network(n.Network); ok {
		backing.Network = reference(ref)
	}
	card := types.VirtualEthernetCard{
		VirtualDevice: types.VirtualDevice{
			Key: n.Key, ControllerKey: keyPCI, UnitNumber: ptr(int32(7 + i)), DeviceInfo: label("Network adapter "+strconv.Itoa(i+1), n.Network), Backing: backing,
			Connectable: &types.VirtualDeviceConnectInfo{StartConnected: true, Connected: true, AllowGuestControl: true, Status: "ok"},
		},
		AddressType: "manual", MacAddress: n.MAC, WakeOnLanEnabled: ptr(false),
	}
	switch n.Model {
	case "e1000":
		return &types.VirtualE1000{VirtualEthernetCard: card}
	case "e1000e":
		return &types.VirtualE1000e{VirtualEthernetCard: card}
	}
	return &types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: card}}
}
