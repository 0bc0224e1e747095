package center

import (
	"fmt"
	"slices"

	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// cryptoPlan is what a ReconfigureSpec means for the encryption of a VM: for its
// files and for each disk a conversion or none, and the keys for them. It is
// computed once, from the VM as it is, and then only carried out.
type cryptoPlan struct {
	Home  string     `json:"home,omitempty"` // inventory.Convert…; empty: nothing
	Slot  string     `json:"slot,omitempty"` // of the key for it
	Disks []diskPlan `json:"disks,omitempty"`
	Keys  keyPlan    `json:"keys,omitempty"`
	Send  []KeyID    `json:"send,omitempty"` // CryptoRegister: sent to the host, nothing changed

	Final bool `json:"final,omitempty"` // VM files are encrypted in the end
}

type diskPlan struct {
	UUID string `json:"uuid"`
	Key  int32  `json:"key"`
	Kind string `json:"kind"`
	Slot string `json:"slot,omitempty"`
}

// planner plans one spec for one VM.
type planner struct {
	vm     *inventory.VM
	spec   *ReconfigureSpec
	policy func(policy.ID) (Policy, error)
	// key completes a key id, and checks the right to name it.
	key func(id KeyID, slot string) (plannedKey, error)

	plan cryptoPlan
}

// run decides on the VM files and on every disk, then checks the whole.
func (pl *planner) run() error {
	kind, err := pl.home()
	if err != nil {
		return err
	}
	if pl.spec.Crypto.Kind == CryptoRegister {
		pl.plan.Send = append(pl.vm.Keys(), pl.spec.Crypto.Keys...)
	}
	for i := range pl.vm.Disks {
		if err := pl.disk(&pl.vm.Disks[i], kind); err != nil {
			return err
		}
	}
	return pl.consistent()
}

// home decides on the VM files, and returns what disks without a change of
// their own inherit (E6: by default all disks follow the VM).
func (pl *planner) home() (inherit string, err error) {
	vm, spec := pl.vm, pl.spec
	pl.plan.Final = vm.Encrypted
	kind := conversion(spec.Crypto.Kind)
	if spec.Profile != nil {
		pol, err := pl.policy(*spec.Profile)
		if err != nil {
			return "", err
		}
		if contradicts(kind, pol) {
			return "", mismatch(fmt.Sprintf("VM %q", vm.Name), kind, pol)
		}
		if spec.Crypto.Kind == CryptoNone {
			kind = implied(pol, vm.Encrypted)
			if kind == "" && pol.Encrypts && pl.unfinished(inventory.ConvertEncrypt) || kind == "" && !pol.Encrypts && pl.unfinished(inventory.ConvertDecrypt) {
				kind = map[bool]string{true: inventory.ConvertEncrypt, false: inventory.ConvertDecrypt}[pol.Encrypts]
			}
		}
	}
	if kind == "" {
		return "", nil
	}
	resume := pl.unfinished(kind)
	if vm.Converting != nil && vm.Converting.Kind != kind {
		return "", halfWayHome(vm)
	}
	needed := true
	switch kind {
	case inventory.ConvertEncrypt:
		if vm.Encrypted && !resume {
			return "", vmFault(vm, "encrypted", "VM %q is encrypted already; recrypt it to change its key", vm.Name)
		}
		needed, pl.plan.Final = !vm.Encrypted, true
	default:
		if !vm.Encrypted && !resume {
			return "", vmFault(vm, "notEncrypted", "VM %q is not encrypted; there is nothing to %s", vm.Name, kind)
		}
		needed = vm.Encrypted
		if kind == inventory.ConvertDecrypt {
			pl.plan.Final = false
		}
	}
	if kind != inventory.ConvertDecrypt {
		id := spec.Crypto.Key
		if resume {
			if id, err = pl.resumed(kind, id); err != nil {
				return "", err
			}
			needed = needed && (vm.KeyID == nil || *vm.KeyID != id)
		}
		if err := pl.addKey(id, "vm"); err != nil {
			return "", err
		}
	}
	if needed && !resume && vm.KeyID != nil && pl.names(*vm.KeyID, spec.Crypto.Key, kind) {
		return "", vmFault(vm, "mixedKeys", "VM %q has the key %s already; name another key for the %s, or none to have one made", vm.Name, vm.KeyID, kind)
	}
	if needed {
		pl.plan.Home = kind
		if kind != inventory.ConvertDecrypt {
			pl.plan.Slot = "vm"
		}
	}
	return kind, nil
}

// unfinished tells whether a conversion of kind was interrupted somewhere in
// the VM: asking for it again goes on with it (R3, R4).
func (pl *planner) unfinished(kind string) bool {
	if c := pl.vm.Converting; c != nil && c.Kind == kind {
		return true
	}
	return slices.ContainsFunc(pl.vm.Disks, func(d inventory.Disk) bool { return d.Converting != nil && d.Converting.Kind == kind })
}

// resumed is the key of the unfinished conversion of kind; another one cannot
// be named for the rest of it.
func (pl *planner) resumed(kind string, named KeyID) (KeyID, error) {
	var target *KeyID
	if c := pl.vm.Converting; c != nil && c.Kind == kind {
		target = c.Target
	}
	for i := range pl.vm.Disks {
		if c := pl.vm.Disks[i].Converting; target == nil && c != nil && c.Kind == kind {
			target = c.Target
		}
	}
	if target == nil {
		return named, nil
	}
	if named.Key != "" && (named.Key != target.Key || named.Provider != "" && named.Provider != target.Provider) {
		return KeyID{}, vmFault(pl.vm, "mixedKeys", "the %s of VM %q was interrupted; it can only be finished with the key %s that it began with", kind, pl.vm.Name, target)
	}
	return *target, nil
}

// addKey plans a key under slot, once.
func (pl *planner) addKey(id KeyID, slot string) error {
	if pl.plan.Keys.id(slot) != nil {
		return nil
	}
	for _, have := range pl.vm.Keys() {
		if have == id { // the VM's own: nobody else's right is needed
			pl.plan.Keys = append(pl.plan.Keys, plannedKey{Slot: slot, ID: id})
			return nil
		}
	}
	k, err := pl.key(id, slot)
	pl.plan.Keys = append(pl.plan.Keys, k)
	return err
}

// disk decides on one disk that the VM has.
func (pl *planner) disk(d *inventory.Disk, inherit string) error {
	change := pl.changeOf(d.Key)
	own, kind := false, inherit
	if change != nil && change.Op == DiskRemove {
		return nil
	}
	if change != nil {
		var err error
		if own, kind, err = pl.ownKind(d, change, inherit); err != nil {
			return err
		}
	}
	if d.Converting != nil && kind != "" && d.Converting.Kind != kind {
		return halfWay(pl.vm, d)
	}
	if kind == "" {
		return nil
	}
	resume := d.Converting != nil
	switch {
	case resume:
	case kind == inventory.ConvertEncrypt && d.Encrypted:
		if own {
			return diskFault(pl.vm, d, "encrypted", "disk %s of VM %q is encrypted already; recrypt it to change its key", d.Path, pl.vm.Name)
		}
		return nil
	case kind != inventory.ConvertEncrypt && !d.Encrypted:
		if own {
			return diskFault(pl.vm, d, "notEncrypted", "disk %s of VM %q is not encrypted; there is nothing to %s", d.Path, pl.vm.Name, kind)
		}
		return nil // a plain disk of an encrypted VM stays as it is
	}
	plan := diskPlan{UUID: d.UUID, Key: d.Key, Kind: kind}
	if kind != inventory.ConvertDecrypt {
		slot, err := pl.diskKey(d, change, own, resume)
		if err != nil {
			return err
		}
		if id := pl.plan.Keys.id(slot); !resume && id.Key != "" && d.KeyID != nil && *id == *d.KeyID && !own {
			return nil // an earlier run of the same recrypt has done this disk
		}
		plan.Slot = slot
	}
	pl.plan.Disks = append(pl.plan.Disks, plan)
	return nil
}

// ownKind is what a disk's own change asks for; own is false when it inherits.
func (pl *planner) ownKind(d *inventory.Disk, change *DiskChange, inherit string) (own bool, kind string, err error) {
	kind = conversion(change.Crypto.Kind)
	if change.Profile != nil {
		pol, err := pl.policy(*change.Profile)
		if err != nil {
			return false, "", err
		}
		if contradicts(kind, pol) {
			return false, "", mismatch(fmt.Sprintf("disk %s of VM %q", d.Path, pl.vm.Name), kind, pol)
		}
		if change.Crypto.Kind == CryptoNone {
			kind = implied(pol, d.Encrypted)
			if d.Converting != nil && (d.Converting.Kind == inventory.ConvertEncrypt) == pol.Encrypts {
				kind = d.Converting.Kind
			}
			return false, kind, nil
		}
	}
	if change.Crypto.Kind == CryptoNone {
		return false, inherit, nil
	}
	return true, kind, nil
}

// diskKey plans the key of a disk's conversion: the one that it began with, its
// own, or the VM's.
func (pl *planner) diskKey(d *inventory.Disk, change *DiskChange, own, resume bool) (slot string, err error) {
	slot = fmt.Sprintf("disk-%d", d.Key)
	if resume && d.Converting.Target != nil {
		return slot, pl.addKey(*d.Converting.Target, slot)
	}
	if own {
		if d.KeyID != nil && pl.names(*d.KeyID, change.Crypto.Key, conversion(change.Crypto.Kind)) {
			return "", diskFault(pl.vm, d, "encrypted", "disk %s has the key %s already; name another key, or none to have one made", d.Path, d.KeyID)
		}
		return slot, pl.addKey(change.Crypto.Key, slot)
	}
	return pl.vmKey()
}

// names tells whether a recrypt names the key that is there already: it would
// change nothing.
func (pl *planner) names(have, named KeyID, kind string) bool {
	return (kind == inventory.ConvertShallow || kind == inventory.ConvertDeep) && named.Key == have.Key &&
		(named.Provider == "" || named.Provider == have.Provider)
}

// vmKey is the slot of the key that the VM files will have.
func (pl *planner) vmKey() (slot string, err error) {
	if pl.plan.Keys.id("vm") != nil {
		return "vm", nil
	}
	if pl.vm.KeyID != nil {
		return "home", pl.addKey(*pl.vm.KeyID, "home")
	}
	return "vm", pl.addKey(KeyID{}, "vm")
}

func (pl *planner) changeOf(key int32) *DiskChange {
	for i := range pl.spec.Disks {
		if c := &pl.spec.Disks[i]; c.Op != DiskAdd && c.Key == key {
			return c
		}
	}
	return nil
}

// consistent refuses what E6 forbids: an encrypted disk in a VM whose files are
// in clear.
func (pl *planner) consistent() error {
	if pl.plan.Final {
		return nil
	}
	for i := range pl.vm.Disks {
		d := &pl.vm.Disks[i]
		if c := pl.changeOf(d.Key); c != nil && c.Op == DiskRemove {
			continue
		}
		encrypted := d.Encrypted || d.Converting != nil && d.Converting.Kind == inventory.ConvertEncrypt
		for _, p := range pl.plan.Disks {
			if p.UUID == d.UUID {
				encrypted = p.Kind != inventory.ConvertDecrypt
			}
		}
		switch {
		case !encrypted:
		case pl.vm.Encrypted:
			return vmFault(pl.vm, "mismatch", "the files of VM %q cannot be decrypted while its disk %s stays encrypted; decrypt the disk too", pl.vm.Name, d.Path)
		default:
			return plainVM("disk " + d.Path)
		}
	}
	return nil
}

// newDisk decides on a disk that is added: encrypted or not, and the slot of its
// key.
func (pl *planner) newDisk(change *DiskChange, slot string) (string, error) {
	encrypt, own := pl.plan.Final, false
	switch change.Crypto.Kind {
	case CryptoEncrypt:
		encrypt, own = true, true
	case CryptoNoOp:
		encrypt = false
	case CryptoNone, CryptoRegister:
		if change.Profile != nil {
			pol, err := pl.policy(*change.Profile)
			if err != nil {
				return "", err
			}
			encrypt = pol.Encrypts
		}
	default:
		return "", invalid("deviceChange", "a new disk cannot be decrypted or recrypted; ask for encryption, or for nothing")
	}
	switch {
	case !encrypt:
		return "", nil
	case !pl.plan.Final:
		return "", plainVM("the new disk")
	case own:
		return slot, pl.addKey(change.Crypto.Key, slot)
	}
	return pl.vmKey()
}

// conversion is what a crypto spec asks for; none and no-op ask for nothing.
func conversion(k CryptoKind) string {
	switch k {
	case CryptoEncrypt:
		return inventory.ConvertEncrypt
	case CryptoDecrypt:
		return inventory.ConvertDecrypt
	case CryptoShallow:
		return inventory.ConvertShallow
	case CryptoDeep:
		return inventory.ConvertDeep
	}
	return ""
}

// implied is what a policy alone asks for.
func implied(p Policy, encrypted bool) string {
	switch p.Implies(encrypted) {
	case policy.Encrypt:
		return inventory.ConvertEncrypt
	case policy.Decrypt:
		return inventory.ConvertDecrypt
	}
	return ""
}

// contradicts tells whether a policy in the same spec wants the opposite.
func contradicts(kind string, p Policy) bool {
	return kind != "" && (kind == inventory.ConvertDecrypt) == p.Encrypts
}

func mismatch(what, kind string, p Policy) *Fault {
	f := fault(task.InvalidVMConfig, "%s: the storage policy %q and the crypto spec (%s) contradict each other; leave one of them out", what, p.Name, kind)
	f.MessageKey = "msg.hostd.configSpec.enc.mismatch"
	return f
}

func vmFault(vm *inventory.VM, key, format string, args ...any) *Fault {
	f := fault(task.InvalidVMConfig, format, args...)
	f.MessageKey, f.Object, f.Name = "msg.hostd.configSpec.enc."+key, vm.Ref, vm.Name
	return f
}

func diskFault(vm *inventory.VM, d *inventory.Disk, key, format string, args ...any) *Fault {
	f := fault(task.InvalidDeviceOp, format, args...)
	f.MessageKey, f.Object, f.Name = "msg.hostd.deviceSpec.enc."+key, vm.Ref, d.Path
	return f
}

// halfWay refuses to do something else with a disk whose conversion was
// interrupted.
func halfWay(vm *inventory.VM, d *inventory.Disk) error {
	f := fault(task.InvalidState, "the %s of disk %s of VM %q was interrupted; ask for it again to finish it first", d.Converting.Kind, d.Path, vm.Name)
	f.Object, f.Name = vm.Ref, d.Path
	return f
}

func halfWayHome(vm *inventory.VM) error {
	f := fault(task.InvalidState, "the %s of the files of VM %q was interrupted; ask for it again to finish it first", vm.Converting.Kind, vm.Name)
	f.Object, f.Name = vm.Ref, vm.Name
	return f
}
