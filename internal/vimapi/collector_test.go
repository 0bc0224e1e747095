package vimapi

import (
	"testing"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/vim25/mo"
)

func TestFinder(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 3)
	c := w.client(t)
	f := find.NewFinder(c.Client)
	dc, err := f.DefaultDatacenter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.SetDatacenter(dc)
	vms, err := f.VirtualMachineList(t.Context(), "*")
	if err != nil || len(vms) != 3 {
		t.Fatalf("%d VMs, %v; want 3", len(vms), err)
	}
	var vm mo.VirtualMachine
	if err := vms[0].Properties(t.Context(), vms[0].Reference(), nil, &vm); err != nil {
		t.Fatal(err)
	}
	if vm.Config.Name != vm.Name || vm.Runtime.FaultToleranceState == "" {
		t.Fatalf("VM reads %+v", vm)
	}
}
