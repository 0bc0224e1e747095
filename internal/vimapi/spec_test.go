package vimapi_test

import (
	"strings"
	"testing"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
	"mortise/internal/vimapi/vimapitest"
)

func objectVM(w *vimapitest.World, id inventory.Ref) *object.VirtualMachine {
	return object.NewVirtualMachine(w.Client().Client, vmRef(id))
}

// What a spec asks for and no VM here can have is refused by name, and nothing
// of the spec is done.
func TestRefusedSpecs(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	id := w.CreateVM("web1")
	vm := objectVM(w, id)
	device := func(op types.VirtualDeviceConfigSpecOperation, d types.BaseVirtualDevice) types.VirtualMachineConfigSpec {
		return types.VirtualMachineConfigSpec{Name: "renamed", DeviceChange: []types.BaseVirtualDeviceConfigSpec{&types.VirtualDeviceConfigSpec{Operation: op, Device: d}}}
	}
	add := types.VirtualDeviceConfigSpecOperationAdd
	yes := types.NewBool(true)
	for _, c := range []struct {
		name, want string
		spec       types.VirtualMachineConfigSpec
	}{
		{"vTPM", "vTPM", device(add, &types.VirtualTPM{})},
		{"serial port to a file", "guest data", device(add, &types.VirtualSerialPort{VirtualDevice: types.VirtualDevice{Backing: &types.VirtualSerialPortFileBackingInfo{}}})},
		{"parallel port", "parallel", device(add, &types.VirtualParallelPort{})},
		{"USB", "VirtualUSBController", device(add, &types.VirtualUSBController{})},
		{"a controller's bus", "bus number", device(add, &types.ParaVirtualSCSIController{VirtualSCSIController: types.VirtualSCSIController{VirtualController: types.VirtualController{BusNumber: 9}}})},
		{"a card that is not there", "no network card", device(types.VirtualDeviceConfigSpecOperationRemove, &types.VirtualVmxnet3{})},
		{"a card without a network", "needs a network", device(add, &types.VirtualVmxnet3{})},
		{"a disk at no controller", "controller 77", device(add, &types.VirtualDisk{VirtualDevice: types.VirtualDevice{ControllerKey: 77, UnitNumber: types.NewInt32(0)}})},
		{"a disk that is not there", "2009", device(types.VirtualDeviceConfigSpecOperationEdit, &types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2009}})},
		{"an impossible capacity", "capacity", device(add, &types.VirtualDisk{CapacityInKB: -1})},
		{"secure boot", "secure boot", types.VirtualMachineConfigSpec{Name: "renamed", BootOptions: &types.VirtualMachineBootOptions{EfiSecureBootEnabled: yes}}},
		{"fault tolerance", "fault tolerance", types.VirtualMachineConfigSpec{Name: "renamed", FtInfo: &types.FaultToleranceConfigInfo{}}},
		{"SEV", "SEV", types.VirtualMachineConfigSpec{Name: "renamed", SevEnabled: yes}},
		{"a crypto spec of no kind", "CryptoSpec", types.VirtualMachineConfigSpec{Name: "renamed", Crypto: &types.CryptoSpec{}}},
		{"two policies", "one storage policy", types.VirtualMachineConfigSpec{Name: "renamed", VmProfile: []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineEmptyProfileSpec{}, &types.VirtualMachineEmptyProfileSpec{}}}},
		{"a policy that is not there", "policy", types.VirtualMachineConfigSpec{Name: "renamed", VmProfile: []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineDefinedProfileSpec{ProfileId: "none"}}}},
		{"encryption without a provider", "key provider", types.VirtualMachineConfigSpec{Name: "renamed", Crypto: &types.CryptoSpecEncrypt{}}},
		{"decrypting what is in clear", "not encrypted", types.VirtualMachineConfigSpec{Name: "renamed", Crypto: &types.CryptoSpecDecrypt{}}},
	} {
		task, err := vm.Reconfigure(t.Context(), c.spec)
		if err == nil {
			err = task.Wait(t.Context())
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, ok := w.VM("web1"); !ok {
		t.Error("a refused spec renamed the VM")
	}
}

// Faults of center arrive as vSphere's, with its fields.
func TestFaults(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	id := w.CreateVM("web1")
	vm := objectVM(w, id)
	ctx := t.Context()
	fault := func(err error) types.BaseMethodFault {
		t.Helper()
		if err == nil {
			t.Fatal("no fault")
		}
		if !soap.IsSoapFault(err) {
			t.Fatalf("%T %v is no SOAP fault", err, err)
		}
		f, _ := soap.ToSoapFault(err).VimFault().(types.BaseMethodFault)
		if f == nil {
			switch v := soap.ToSoapFault(err).VimFault().(type) {
			case types.InvalidPowerState:
				return &v
			case types.DuplicateName:
				return &v
			case types.ManagedObjectNotFound:
				return &v
			case types.NotSupported:
				return &v
			case types.ResourceInUse:
				return &v
			}
			t.Fatalf("the fault is %T", soap.ToSoapFault(err).VimFault())
		}
		return f
	}
	_, err := vm.PowerOff(ctx)
	if f, ok := fault(err).(*types.InvalidPowerState); !ok || f.ExistingState != types.VirtualMachinePowerStatePoweredOff || f.RequestedState != types.VirtualMachinePowerStatePoweredOn {
		t.Errorf("powering off what is off: %v", err)
	}
	other := w.CreateVM("web2")
	_, err = objectVM(w, other).Rename(ctx, "web1")
	if err == nil {
		t.Error("two VMs have one name")
	} else if f, ok := fault(err).(*types.DuplicateName); !ok || f.Name != "web1" || f.Object.Value != string(id) {
		t.Errorf("the name of another: %v %+v", err, f)
	}
	_, err = objectVM(w, "vm-999").PowerOn(ctx)
	if f, ok := fault(err).(*types.ManagedObjectNotFound); !ok || f.Obj.Value != "vm-999" {
		t.Errorf("a VM that is not there: %v", err)
	}
	folder := object.NewFolder(w.Client().Client, types.ManagedObjectReference{Type: "Folder", Value: string(inventory.DefaultVMFolder)})
	_, err = folder.Destroy(ctx)
	if _, ok := fault(err).(*types.NotSupported); !ok {
		t.Errorf("deleting a folder: %v", err)
	}
}
