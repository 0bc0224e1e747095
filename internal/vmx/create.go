package vmx

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
	"mortise/internal/vmxfile"
)

// create makes a VM's files in its folder, encrypted from the first byte when
// keys are named (E7). The VMX is written last: until it is there, the folder is
// no VM, and the same call finishes what an earlier one began. Disks of an
// earlier attempt are found by their UUIDs.
func (v *vm) create(ctx context.Context, r *hostapi.CreateVMRequest) (err error) {
	if v.id, err = parseUUID("the new VM", r.Uuid); err != nil {
		return err
	}
	if r.Name == "" {
		return hostapi.Faultf(hostapi.Fault_INVALID, "a VM needs a name")
	}
	if exists(v.path) {
		f, err := loadVMX(v.path)
		if err != nil {
			return err
		}
		if id, err := vmUUID(f); err != nil || id != v.id || keysafe.IsEncrypted(f) != (r.HomeKey != nil) {
			return hostapi.Faultf(hostapi.Fault_EXISTS, "%s exists and is another VM's: choose another name", v.path)
		}
		return nil // an earlier call got here; its answer was lost
	}
	f := vmxfile.New()
	base := baseName(v.path)
	if err := setAll(f,
		[2]string{"config.version", "8"}, [2]string{"virtualHW.version", "19"},
		[2]string{"displayName", r.Name}, [2]string{"uuid.bios", vmxfile.FormatUUID(v.id)},
		[2]string{"nvram", base + ".nvram"},
	); err != nil {
		return hostapi.Faultf(hostapi.Fault_INVALID, "name %q: %w", r.Name, err)
	}
	hw := r.Hardware
	if hw == nil {
		hw = &hostapi.Hardware{}
	}
	if hw.MemoryMib == 0 {
		hw.MemoryMib = 1024
	}
	if hw.Cpus == 0 {
		hw.Cpus = 1
	}
	if hw.Firmware == "" {
		hw.Firmware = "bios"
	}
	if hw.GuestOs == "" {
		hw.GuestOs = "otherlinux-64"
	}
	if err := writeHardware(f, hw); err != nil {
		return faultOf(err)
	}
	var b *keysafe.Bundle
	if r.HomeKey != nil {
		id := fromWire(r.HomeKey)
		kek, ok := v.KEK(id)
		if !ok {
			return faultOf(&keysafe.KeysRequiredError{Required: []keysafe.KeyID{id}})
		}
		defer kek.Wipe()
		if b, err = keysafe.NewBundle(v.random, v.id, id, kek); err != nil {
			return err
		}
		defer b.Wipe()
	}
	defer func() {
		if err == nil || exists(v.path) {
			return
		}
		for _, d := range r.Disks { // empty, and nothing names them
			if rerr := v.removeDiskFiles(d.Uuid); rerr != nil {
				v.log.Warn("removing a disk of a VM that could not be created", "disk", d.Uuid, "error", rerr)
			}
		}
	}()
	for i, d := range r.Disks {
		if err := v.addDisk(ctx, f, b, d, i); err != nil {
			return err
		}
		v.at("create.disk")
	}
	if b != nil {
		if err := b.Seal(v.random, f); err != nil {
			return err
		}
	}
	if err := f.Save(v.path); err != nil {
		return faultOf(err)
	}
	v.at("create.done")
	return nil
}

// addDisk makes a disk and enters it into VMX and bundle, which the caller saves.
func (v *vm) addDisk(ctx context.Context, f *vmxfile.File, b *keysafe.Bundle, d *hostapi.NewDisk, n int) error {
	id, err := parseUUID("the new disk", d.Uuid)
	if err != nil {
		return err
	}
	at, err := place(f, d.Controller)
	if err != nil {
		return err
	}
	spec := vdisk.Spec{Size: d.CapacityBytes, UUID: id, VM: v.id, KEKs: v, Random: v.random, Thick: d.Thick}
	if d.KeyId != nil {
		if b == nil {
			return hostapi.Faultf(hostapi.Fault_INVALID, "disk %s cannot be encrypted while its VM is not: encrypt the VM too (E6)", d.Uuid)
		}
		spec.Key = fromWire(d.KeyId)
	}
	file, err := v.diskName(id, n)
	if err != nil {
		return err
	}
	path := filepath.Join(filepath.Dir(v.path), file)
	if !exists(path) {
		if err := vdisk.Create(ctx, path, spec); err != nil {
			return faultOf(err)
		}
	}
	info, err := vdisk.Describe(path)
	if err != nil {
		return faultOf(err)
	}
	if info.UUID != id || info.Encrypted != (d.KeyId != nil) || info.Size != d.CapacityBytes || info.Thick != d.Thick {
		return hostapi.Faultf(hostapi.Fault_EXISTS, "%s exists and is another disk: remove it, or choose another name", path)
	}
	if b != nil {
		b.Disks[id] = keysafe.DiskRecord{Encrypted: info.Encrypted, Epoch: info.Epoch}
	}
	return addDisk(f, at, file)
}

// diskName is vm.vmdk, vm_1.vmdk…: the first that is free, or that is the disk
// with this UUID already.
func (v *vm) diskName(id uuid.UUID, n int) (string, error) {
	base := baseName(v.path)
	for ; n < 1000; n++ {
		file := base + ".vmdk"
		if n > 0 {
			file = fmt.Sprintf("%s_%d.vmdk", base, n)
		}
		path := filepath.Join(filepath.Dir(v.path), file)
		if !exists(path) {
			return file, nil
		}
		if info, err := vdisk.Describe(path); err == nil && info.UUID == id {
			return file, nil
		}
	}
	return "", hostapi.Faultf(hostapi.Fault_INVALID, "%s: no free name for a disk", filepath.Dir(v.path))
}
