package vimapi_test

import (
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/vimapi/vimapitest"
)

// A disk is thick if the spec says that it is not thin, or eagerly scrubbed; so it is
// made, and so it is shown.
func TestThickDisks(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	vm := objectVM(w, w.CreateVM("web1"))
	yes, no := types.NewBool(true), types.NewBool(false)
	for i, c := range []struct {
		thin, scrub *bool
		thick       bool
	}{{nil, nil, false}, {yes, no, false}, {no, nil, true}, {nil, yes, true}, {no, yes, true}} {
		task, err := vm.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{DeviceChange: []types.BaseVirtualDeviceConfigSpec{&types.VirtualDeviceConfigSpec{
			Operation: types.VirtualDeviceConfigSpecOperationAdd, FileOperation: types.VirtualDeviceConfigSpecFileOperationCreate,
			Device: &types.VirtualDisk{CapacityInKB: 1 << 10, VirtualDevice: types.VirtualDevice{Backing: &types.VirtualDiskFlatVer2BackingInfo{ThinProvisioned: c.thin, EagerlyScrub: c.scrub}}},
		}}})
		if err == nil {
			err = task.Wait(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		devices, err := vm.Device(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		disks := devices.SelectByType((*types.VirtualDisk)(nil))
		b, ok := disks[len(disks)-1].GetVirtualDevice().Backing.(*types.VirtualDiskFlatVer2BackingInfo)
		if !ok || len(disks) != i+2 || b.ThinProvisioned == nil || *b.ThinProvisioned == c.thick {
			t.Errorf("%+v: disk %d is shown as %+v", c, len(disks), b)
		}
	}
	task, err := vm.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{DeviceChange: []types.BaseVirtualDeviceConfigSpec{&types.VirtualDeviceConfigSpec{
		Operation: types.VirtualDeviceConfigSpecOperationAdd, FileOperation: types.VirtualDeviceConfigSpecFileOperationCreate,
		Device: &types.VirtualDisk{CapacityInKB: 1 << 10, VirtualDevice: types.VirtualDevice{Backing: &types.VirtualDiskFlatVer2BackingInfo{ThinProvisioned: yes, EagerlyScrub: yes}}},
	}}})
	if err == nil {
		err = task.Wait(t.Context())
	}
	if err == nil || !strings.Contains(err.Error(), "thin") {
		t.Errorf("both: %v", err)
	}
}
