package vmx

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
	"mortise/internal/vmsd"
	"mortise/internal/vmxfile"
)

// A report tells how far a change is; p is zero where there is nothing to count.
type report func(stage string, p vdisk.Progress)

// reconfigure makes the changes of r, in an order in which each step leaves a VM
// that opens: hardware, VM files encrypted, disks, VM files decrypted. A call
// that was interrupted is repeated as it was; steps that are done are passed
// over. A guest, if there is one, uses the disks through live.
func (v *vm) reconfigure(ctx context.Context, r *hostapi.ReconfigureVMRequest, live map[uuid.UUID]*vdisk.Chain, tell report) error {
	if err := v.checkChange(r, live); err != nil {
		return err
	}
	if err := v.changeHardware(r); err != nil {
		return err
	}
	if k := r.Home.GetKind(); k != hostapi.CryptoChange_NONE && k != hostapi.CryptoChange_DECRYPT {
		tell(verbs[k]+" VM files", vdisk.Progress{})
		if err := v.changeHome(ctx, k, fromWire(r.Home.Key), live); err != nil {
			return err
		}
	}
	for i, d := range r.AddDisks {
		tell(fmt.Sprintf("adding disk %d of %d", i+1, len(r.AddDisks)), vdisk.Progress{})
		if err := v.addNewDisk(ctx, d); err != nil {
			return err
		}
	}
	for _, d := range r.AttachDisks {
		if err := v.attachDisk(ctx, d); err != nil {
			return err
		}
	}
	for i, d := range r.Disks {
		stage := fmt.Sprintf("%s disk %d of %d", verbs[d.Change.GetKind()], i+1, len(r.Disks))
		tell(stage, vdisk.Progress{})
		id, err := parseUUID("a disk", d.DiskUuid)
		if err != nil {
			return err
		}
		if err := v.changeDisk(ctx, id, d.Change, live[id], func(p vdisk.Progress) { tell(stage, p) }); err != nil {
			return err
		}
	}
	for _, id := range r.RemoveDiskUuids {
		if err := v.dropDisk(ctx, id, r.DeleteRemoved); err != nil {
			return err
		}
	}
	if r.Home.GetKind() == hostapi.CryptoChange_DECRYPT {
		tell("decrypting VM files", vdisk.Progress{})
		return v.decryptHome(ctx, live)
	}
	return nil
}

// changeHardware writes what is not encrypted of a VMX.
func (v *vm) changeHardware(r *hostapi.ReconfigureVMRequest) error {
	if r.Hardware == nil && r.Name == "" {
		return nil
	}
	return v.edit(func(f *vmxfile.File, _ *keysafe.Bundle) error {
		if r.Name != "" {
			if err := f.Set("displayName", r.Name); err != nil {
				return err
			}
		}
		if r.Hardware == nil {
			return nil
		}
		return writeHardware(f, r.Hardware)
	})
}

var verbs = map[hostapi.CryptoChange_Kind]string{
	hostapi.CryptoChange_ENCRYPT:         "encrypting",
	hostapi.CryptoChange_DECRYPT:         "decrypting",
	hostapi.CryptoChange_SHALLOW_RECRYPT: "giving a new KEK to",
	hostapi.CryptoChange_DEEP_RECRYPT:    "giving new keys to",
}

// checkChange refuses, before anything is changed, what would end in a VM that
// is not allowed (E6) or cannot be done now.
func (v *vm) checkChange(r *hostapi.ReconfigureVMRequest, live map[uuid.UUID]*vdisk.Chain) error {
	f, err := loadVMX(v.path)
	if err != nil {
		return err
	}
	b, err := v.open(f)
	if err != nil {
		return err
	}
	defer b.Wipe()
	disks, err := v.members(f, b)
	if err != nil {
		return err
	}
	final := b != nil
	switch r.Home.GetKind() {
	case hostapi.CryptoChange_ENCRYPT:
		final = true
	case hostapi.CryptoChange_DECRYPT:
		final = false
	case hostapi.CryptoChange_SHALLOW_RECRYPT, hostapi.CryptoChange_DEEP_RECRYPT:
		if b == nil {
			return hostapi.Faultf(hostapi.Fault_INVALID, "%s is not encrypted: encrypt it instead of recrypting it", v.path)
		}
	}
	changes := map[uuid.UUID]hostapi.CryptoChange_Kind{}
	for _, d := range r.Disks {
		id, err := parseUUID("a disk", d.DiskUuid)
		if err != nil {
			return err
		}
		if _, twice := changes[id]; twice {
			return hostapi.Faultf(hostapi.Fault_INVALID, "disk %s is named twice", id)
		}
		changes[id] = d.Change.GetKind()
	}
	removed := map[string]bool{}
	for _, id := range r.RemoveDiskUuids {
		removed[id] = true
	}
	for _, m := range disks {
		kind := changes[m.id]
		delete(changes, m.id)
		encrypted := m.info.Encrypted
		switch kind {
		case hostapi.CryptoChange_ENCRYPT:
			encrypted = true
		case hostapi.CryptoChange_DECRYPT:
			encrypted = false
		case hostapi.CryptoChange_SHALLOW_RECRYPT, hostapi.CryptoChange_DEEP_RECRYPT:
			if !m.info.Encrypted {
				return hostapi.Faultf(hostapi.Fault_INVALID, "%s is not encrypted: encrypt it instead of recrypting it", m.path)
			}
		}
		if encrypted && !final && !removed[m.id.String()] {
			return hostapi.Faultf(hostapi.Fault_INVALID, "%s would be encrypted while its VM is not: encrypt the VM too, or decrypt every disk with it (E6)", m.path)
		}
	}
	for id := range changes {
		return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s has no disk %s", v.path, id)
	}
	for _, d := range r.AddDisks {
		if d.KeyId != nil && !final {
			return hostapi.Faultf(hostapi.Fault_INVALID, "an encrypted disk cannot be added to a VM that is not encrypted: encrypt the VM too (E6)")
		}
	}
	if len(r.AddDisks)+len(r.AttachDisks)+len(r.RemoveDiskUuids) > 0 {
		t, err := vmsd.Load(vmsdPath(v.path))
		if err != nil {
			return faultOf(err)
		}
		if n := len(t.Snapshots); n > 0 {
			return hostapi.Faultf(hostapi.Fault_INVALID, "VM %s has %d snapshots, of the disks that it has now: delete them before disks are added or removed", v.id, n)
		}
	}
	return v.checkLive(r, live)
}

// checkLive refuses what cannot be done under a guest. Disks change their form
// under it (R2). The files that QEMU has open do not: home changes only while
// there are none, which is so of a guest with a BIOS.
func (v *vm) checkLive(r *hostapi.ReconfigureVMRequest, live map[uuid.UUID]*vdisk.Chain) error {
	if live == nil {
		return nil
	}
	if k := r.Home.GetKind(); k != hostapi.CryptoChange_NONE && k != hostapi.CryptoChange_SHALLOW_RECRYPT {
		f, err := loadVMX(v.path)
		if err != nil {
			return err
		}
		names, err := fileNames(f, v.path)
		if err != nil {
			return err
		}
		for _, n := range names {
			if exists(filepath.Join(filepath.Dir(v.path), n)) {
				return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "%s the files of VM %s needs it powered off: its guest has %s open. While it runs, its keys can be shallow recrypted, and its disks changed one by one", verbs[k], v.id, n)
			}
		}
	}
	if len(r.AddDisks)+len(r.AttachDisks)+len(r.RemoveDiskUuids) > 0 {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "disks of VM %s are added and removed while it is powered off", v.id)
	}
	return nil
}

// changeDisk does one disk's change. What the bundle says of the disk is never
// more than what is true: when an encryption begins it says "either", and "must
// be encrypted" only when that is done; a decryption takes the promise back
// first (E8).
func (v *vm) changeDisk(ctx context.Context, id uuid.UUID, c *hostapi.CryptoChange, open *vdisk.Chain, progress func(vdisk.Progress)) error {
	if c.GetKind() == hostapi.CryptoChange_NONE {
		return nil
	}
	key := fromWire(c.Key)
	if c.Kind == hostapi.CryptoChange_DECRYPT {
		if err := v.record(id, false, 0); err != nil {
			return err
		}
	}
	v.at("disk.begin")
	m, d, done, err := v.take(ctx, id, open)
	if err != nil {
		return err
	}
	defer done()
	if err := v.checkKey(m, c.Kind, key); err != nil {
		return err
	}
	target := v.target(m, key)
	switch c.Kind {
	case hostapi.CryptoChange_SHALLOW_RECRYPT:
		target = vdisk.Target{}
		err = d.ShallowRecrypt(ctx, key)
	case hostapi.CryptoChange_DECRYPT:
		target = vdisk.Target{Kind: vdisk.Decrypting}
	case hostapi.CryptoChange_ENCRYPT:
		target.Kind = vdisk.Encrypting
	case hostapi.CryptoChange_DEEP_RECRYPT:
		target.Kind = vdisk.Recrypting
	default:
		return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "change %v is of a newer version: upgrade this host", c.Kind)
	}
	if err == nil && target.Kind != vdisk.NotConverting {
		err = v.pacing.of(d, func() error { return d.Convert(ctx, target, progress) })
	}
	if err != nil {
		return faultOf(err)
	}
	v.at("disk.done")
	// Every link, of other branches too, has at least the target's epoch now.
	return v.record(id, c.Kind != hostapi.CryptoChange_DECRYPT, min(target.Epoch, d.Info().Epoch))
}

// take opens a disk of the VM, or uses the one that a guest has open, and says
// what it is, proven by its MACs.
func (v *vm) take(ctx context.Context, id uuid.UUID, open *vdisk.Chain) (m member, d *vdisk.Chain, done func(), err error) {
	if m, err = v.member(id); err != nil {
		return m, nil, nil, err
	}
	d, done = open, func() {}
	if d == nil {
		if d, err = v.openDisk(ctx, m, false); err != nil {
			return m, nil, nil, err
		}
		done = func() { _ = d.Close() }
	}
	m.info = d.Info()
	return m, d, done, nil
}

// target is what a conversion of a disk to key has besides its kind. Epochs only
// grow, over decryptions and cancelled encryptions too: the bundle remembers the
// last one. A conversion that was interrupted goes on with its own, and one whose
// answer only was lost, or that has only other branches left, does not begin anew.
func (v *vm) target(m member, key keysafe.KeyID) vdisk.Target {
	t := vdisk.Target{Key: key, Epoch: max(m.recorded, m.info.Epoch) + 1}
	if m.info.Conversion == vdisk.Encrypting || m.arrived(key) {
		t.Epoch = m.info.Epoch
	}
	return t
}

// arrived tells whether the links that the VM's disk stands on are all under key.
func (m member) arrived(key keysafe.KeyID) bool {
	return m.info.Encrypted && m.info.Conversion == vdisk.NotConverting && len(m.info.Keys) == 1 && m.info.Keys[0] == key
}

// checkKey refuses what would look as if it was done, and do nothing: a deep recrypt
// to the key that the disk had before, and the encryption of an encrypted disk.
func (v *vm) checkKey(m member, kind hostapi.CryptoChange_Kind, key keysafe.KeyID) error {
	switch {
	case kind == hostapi.CryptoChange_ENCRYPT && m.info.Encrypted && m.info.Conversion == vdisk.NotConverting && !m.arrived(key):
		return hostapi.Faultf(hostapi.Fault_INVALID, "%s is encrypted already, with key %s: use a shallow or deep recrypt to change the key", m.path, m.info.Keys[0])
	case kind != hostapi.CryptoChange_DEEP_RECRYPT || !m.arrived(key):
		return nil
	}
	for _, e := range v.expect.GetDisks() {
		if e.Uuid == m.id.String() && e.Epoch >= m.info.Epoch {
			return hostapi.Faultf(hostapi.Fault_INVALID, "%s has key %s already: a deep recrypt needs a new one", m.path, key)
		}
	}
	return nil
}

// member finds a disk of the VM with what must be true of it.
func (v *vm) member(id uuid.UUID) (member, error) {
	f, err := loadVMX(v.path)
	if err != nil {
		return member{}, err
	}
	b, err := v.open(f)
	if err != nil {
		return member{}, err
	}
	defer b.Wipe()
	disks, err := v.members(f, b)
	if err != nil {
		return member{}, err
	}
	for _, m := range disks {
		if m.id == id {
			return m, nil
		}
	}
	return member{}, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s has no disk %s", v.path, id)
}

// record writes into the bundle whether a disk must be encrypted, and the epoch
// that all its links are proven to have, or, when it is to be in clear, one to be
// used no more. 0 leaves the one that is recorded.
func (v *vm) record(id uuid.UUID, encrypted bool, epoch uint64) error {
	return v.edit(func(_ *vmxfile.File, b *keysafe.Bundle) error {
		if b == nil {
			return nil // nothing is promised of a VM in clear
		}
		rec := b.Disks[id]
		rec.Encrypted, rec.Epoch = encrypted, max(rec.Epoch, epoch)
		b.Disks[id] = rec
		return nil
	})
}

func (v *vm) addNewDisk(ctx context.Context, d *hostapi.NewDisk) error {
	if id, err := parseUUID("the new disk", d.Uuid); err != nil {
		return err
	} else if _, err := v.member(id); err == nil {
		return nil // an earlier call got here
	}
	return v.edit(func(f *vmxfile.File, b *keysafe.Bundle) error {
		return v.addDisk(ctx, f, b, d, 0)
	})
}

// attachDisk enters a disk of the VM's folder that exists into VMX and bundle. An
// encrypted one must open as a disk of this VM.
func (v *vm) attachDisk(ctx context.Context, a *hostapi.AttachDisk) error {
	info, err := v.attached(a)
	if err != nil {
		return err
	}
	path := info.Path
	if _, err := v.member(info.UUID); err == nil {
		return nil // an earlier call got here
	}
	if f, err := loadVMX(v.path); err != nil {
		return err
	} else if info.Encrypted && !keysafe.IsEncrypted(f) {
		return hostapi.Faultf(hostapi.Fault_INVALID, "%s is encrypted and VM %s is not: encrypt the VM first, or decrypt the disk where it belongs (E6)", path, v.id)
	}
	d, err := v.openDisk(ctx, member{path: path, id: info.UUID, want: vdisk.Expect{Encrypted: info.Encrypted}}, true)
	if err != nil {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	return v.edit(func(f *vmxfile.File, b *keysafe.Bundle) error {
		at, err := place(f, a.Controller)
		if err != nil {
			return err
		}
		if b != nil {
			b.Disks[info.UUID] = keysafe.DiskRecord{Encrypted: info.Encrypted, Epoch: info.Epoch}
		}
		return addDisk(f, at, filepath.Base(path))
	})
}

// attached describes a disk that is to be attached.
func (v *vm) attached(a *hostapi.AttachDisk) (vdisk.Info, error) {
	if filepath.Base(filepath.Dir(v.path)) != filepath.Base(filepath.Dir(a.Path)) {
		return vdisk.Info{}, hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "%s is not in the folder of %s: move it there first, or import it with 'mortise vm import'", a.Path, v.path)
	}
	path, err := diskPath(v.path, filepath.Base(a.Path))
	if err != nil {
		return vdisk.Info{}, err
	}
	info, err := vdisk.Describe(path)
	return info, faultOf(err)
}

// dropDisk takes a disk out of VMX and bundle, then deletes its files if asked.
// A call that was interrupted between the two finds the files by their UUID.
func (v *vm) dropDisk(ctx context.Context, id string, remove bool) error {
	u, err := parseUUID("a disk", id)
	if err != nil {
		return err
	}
	err = v.edit(func(f *vmxfile.File, b *keysafe.Bundle) error {
		slots, err := diskSlots(f)
		if err != nil {
			return err
		}
		for _, s := range slots {
			p, err := diskPath(v.path, s.file)
			if err != nil {
				return err
			}
			info, _, err := vdisk.DescribeChain(p, nil)
			if err != nil {
				return err // it may be the one that is meant
			}
			if info.UUID == u {
				removeDisk(f, s.controller)
			}
		}
		if b != nil {
			delete(b.Disks, u)
		}
		return nil
	})
	if err != nil || !remove {
		return err
	}
	v.at("disk.dropped")
	return v.removeDiskFiles(u.String())
}

// removeDiskFiles deletes the disk of the VM's folder that has this UUID, if there
// is one.
func (v *vm) removeDiskFiles(id string) error {
	all, err := vdisk.DescribeFolder(filepath.Dir(v.path))
	if err != nil {
		return faultOf(err)
	}
	for _, i := range all {
		if i.UUID.String() == id {
			return deleteDisk(i.Path)
		}
	}
	return nil
}
