package vdisk

import (
	"github.com/google/uuid"

	"mortise/internal/vmdk"
)

// vmEntry is the descriptor's entry that names the VM to which the key safe is
// bound, for who opens the disk without the VM's record (mortise disk). The MAC does
// not cover it and needs not: with another VM's UUID the key safe does not open.
const vmEntry = "ddb.mortise.vm"

func recordVM(desc *vmdk.Descriptor, vm uuid.UUID) error {
	return desc.SetDDB(vmEntry, vm.String())
}

// recordedVM is zero where no VM, or nothing that is a UUID, is recorded.
func recordedVM(desc *vmdk.Descriptor) uuid.UUID {
	text, _ := desc.Get(vmEntry)
	vm, err := uuid.Parse(text)
	if err != nil {
		return uuid.Nil
	}
	return vm
}
