package center

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
	"mortise/internal/task"
)

// vmRef names a VM to its host, with what the inventory expects of its files.
func (c *Center) vmRef(vm *inventory.VM) (*hostapi.VMRef, error) {
	name, err := c.mountName(vm.Datastore, vm.Host)
	if err != nil {
		return nil, err
	}
	return &hostapi.VMRef{Uuid: vm.UUID, Datastore: name, Path: vm.Path, Expect: expectation(vm)}, nil
}

// expectation is center's word on a VM's encryption (E8): a host refuses a
// folder that says less. While something is being encrypted or decrypted either
// form is right; a recrypt never passes through a form in clear.
func expectation(vm *inventory.VM) *hostapi.Expect {
	e := &hostapi.Expect{Encrypted: vm.Encrypted, Epoch: vm.Epoch}
	if vm.Converting != nil && (vm.Converting.Kind == inventory.ConvertEncrypt || vm.Converting.Kind == inventory.ConvertDecrypt) {
		e.Encrypted, e.Epoch = false, 0
	}
	for _, d := range vm.Disks {
		x := &hostapi.DiskExpect{Uuid: d.UUID, Encrypted: d.Encrypted, Epoch: d.Epoch}
		if d.Converting != nil {
			switch d.Converting.Kind {
			case inventory.ConvertEncrypt, inventory.ConvertDecrypt:
				x.Converting = true
			case inventory.DiskAdding, inventory.DiskRemoving:
				x.Optional = true
			}
		}
		e.Disks = append(e.Disks, x)
	}
	return e
}

// mountName is what a host calls a datastore.
func (c *Center) mountName(datastore, host Ref) (string, error) {
	ds, ok := inventory.Lookup[inventory.Datastore](c.view, datastore)
	if !ok {
		return "", fault(task.NotFound, "datastore %s is not in the inventory any more", datastore)
	}
	for _, m := range ds.Mounts {
		if m.Host != host {
			continue
		}
		if m.Problem != "" {
			return "", fault(task.InvalidState, "datastore %q cannot be used on its host: %s", ds.Name, m.Problem)
		}
		return m.Name, nil
	}
	name := string(host)
	if h, ok := inventory.Lookup[inventory.Host](c.view, host); ok {
		name = h.Name
	}
	return "", fault(task.InvalidState, "datastore %q is not mounted on host %q; mount it there", ds.Name, name)
}

const (
	busyPause   = 500 * time.Millisecond
	busyTries   = 60
	unavailable = 20 // how often a call is begun again because the host went away
)

// onHost calls f with the connection to a host. While the host is away, or still
// busy with what a broken connection left running, it waits and calls f again:
// f must be safe to repeat.
func (c *Center) onHost(ctx context.Context, host Ref, doing string, f func(*link, *inventory.Host, hostapi.HostClient) error) error {
	for busy, down, lost := 0, 0, 0; ; {
		l, client, err := c.links.wait(ctx, host, c.cfg.HostWait, doing)
		if err != nil {
			return err
		}
		h, ok := inventory.Lookup[inventory.Host](c.view, host)
		if !ok {
			return fault(task.NotFound, "%s needs host %s, which has been removed", doing, host)
		}
		err = f(l, h, client)
		pause := busyPause
		switch {
		case errors.Is(err, context.Canceled) && ctx.Err() == nil && down < unavailable:
			down++ // the host gave up the call, not we
		case task.Is(err, task.HostDown) && down < unavailable:
			down++
			c.log.Info("a host went away during a call; waiting for it", "host", h.Name, "doing", doing, "error", err)
		case task.Is(err, task.ResourceInUse) && busy < busyTries:
			busy++
		case cacheLacks(err) && lost == 0:
			lost++ // its memory was emptied between the look and the call
		default:
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// cacheLacks tells whether a host says that keys are not in its memory.
func cacheLacks(err error) bool {
	f, _ := hostapi.AsFault(err)
	return f.Kind == hostapi.Fault_MISSING_KEYS
}

// foreignKeys raises an event when a host asks for keys that the inventory does
// not know of the VM: somebody has put another key safe into its folder. It gets
// none of them.
func (c *Center) foreignKeys(ctx context.Context, vm *inventory.VM, err error) {
	if !cacheLacks(err) {
		return
	}
	now, ok := inventory.Lookup[inventory.VM](c.view, vm.Ref)
	if !ok {
		return
	}
	foreign := slices.DeleteFunc(slices.Clone(task.AsFault(err).Keys), func(k KeyID) bool { return slices.Contains(now.Keys(), k) })
	if len(foreign) > 0 {
		c.events.Post(ctx, Event{Type: event.KeyNotOurs, Severity: event.Error, Entity: vm.Ref, Keys: foreign,
			Message: fmt.Sprintf("The folder of VM %q names keys that are not the VM's; they are not sent. Restore its VMX and disk descriptors from a backup", vm.Name)})
	}
}

// mustReach fails at once when a host is not connected, before a task is begun
// that would only wait for it.
func (c *Center) mustReach(host Ref, doing string) error {
	h, ok := inventory.Lookup[inventory.Host](c.view, host)
	if !ok {
		return fault(task.InvalidState, "%s needs a host, and the VM has none any more; unregister it and register it on another host", doing)
	}
	if _, _, ok := c.links.connected(host); !ok {
		return hostDown(h, doing)
	}
	return nil
}

// saveVM makes a task's data durable together with a change of a VM's record,
// until nobody else has changed the record meanwhile.
func (c *Center) saveVM(ctx context.Context, run *task.Run, step string, data any, ref Ref, change func(*inventory.VM) error, more ...store.Op) error {
	for {
		e, err := c.inv.VMs.Get(ctx, string(ref))
		if err != nil {
			return err
		}
		vm := cloneVM(&e.Value)
		if err := change(vm); err != nil {
			return err
		}
		ops := append([]store.Op{c.inv.VMs.Update(string(ref), e.Revision, *vm)}, more...)
		if err = run.Save(ctx, step, data, ops...); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
}

// takeInfo brings what a host read in a VM's folder into the record, all but
// what encryption it has: the epochs only rise.
func takeInfo(vm *inventory.VM, info *hostapi.VMInfo) {
	if h := info.GetHardware(); h != nil {
		vm.Hardware = inventory.Hardware{MemoryMiB: h.MemoryMib, CPUs: h.Cpus, Firmware: h.Firmware, GuestOS: h.GuestOs, Annotation: h.Annotation}
		for _, n := range h.Nics {
			vm.Hardware.NICs = append(vm.Hardware.NICs, inventory.NIC{Key: n.Key, Network: n.Network, MAC: n.Mac, Model: n.Model})
		}
	}
	vm.SizeBytes = info.SizeBytes
	takeSnapshots(vm, info)
	vm.Epoch = max(vm.Epoch, info.Epoch)
	old := vm.Disks
	vm.Disks = nil
	for _, d := range info.Disks {
		disk := inventory.Disk{UUID: d.Uuid}
		if i := slices.IndexFunc(old, func(o inventory.Disk) bool { return o.UUID == d.Uuid }); i >= 0 {
			disk = old[i]
		}
		disk.Key, disk.Controller, disk.Path, disk.Cipher, disk.Problem = d.Key, d.Controller, d.Path, d.Cipher, d.Problem
		disk.CapacityBytes, disk.AllocatedBytes, disk.Thick = d.CapacityBytes, d.AllocatedBytes, d.Thick
		if disk.Converting == nil {
			disk.Epoch = max(disk.Epoch, d.Epoch)
		} else if d.Conversion != "" {
			next := *disk.Converting
			next.BoundaryBytes = d.BoundaryBytes
			disk.Converting = &next
		}
		vm.Disks = append(vm.Disks, disk)
	}
}

// takeCrypto brings the encryption that a host read into the record: for a VM
// that center has just created, registered or changed.
func takeCrypto(vm *inventory.VM, info *hostapi.VMInfo) {
	vm.Encrypted, vm.KeyID, vm.Epoch = info.Encrypted, keyID(info.Key), info.Epoch
	if !vm.Encrypted {
		vm.KeyID, vm.CryptoState, vm.LockedReason = nil, "", ""
	} else {
		vm.CryptoState = inventory.Unlocked
		if info.Locked {
			vm.CryptoState, vm.LockedReason = inventory.Locked, info.LockedReason
		}
		vm.MigrateEncryption = inventory.MigrateRequired // V3
	}
	for _, d := range info.Disks {
		for i := range vm.Disks {
			if vm.Disks[i].UUID == d.Uuid {
				takeDiskCrypto(&vm.Disks[i], d)
			}
		}
	}
}

func takeDiskCrypto(disk *inventory.Disk, d *hostapi.DiskInfo) {
	disk.Encrypted, disk.KeyID, disk.Epoch = d.Encrypted, keyID(d.KeyId), d.Epoch
	if !d.Encrypted {
		disk.KeyID = nil
	}
	disk.Converting = nil
	if d.Conversion != "" {
		disk.Converting = &inventory.Conversion{Kind: d.Conversion, BoundaryBytes: d.BoundaryBytes, Target: keyID(d.TargetKeyId)}
	}
}

func wireHardware(h inventory.Hardware) *hostapi.Hardware {
	w := &hostapi.Hardware{MemoryMib: h.MemoryMiB, Cpus: h.CPUs, Firmware: h.Firmware, GuestOs: h.GuestOS, Annotation: h.Annotation}
	for _, n := range h.NICs {
		w.Nics = append(w.Nics, &hostapi.NIC{Key: n.Key, Network: n.Network, Mac: n.MAC, Model: n.Model})
	}
	return w
}

// checkVMName refuses names that could not be listed or found again.
func checkVMName(name string) error {
	switch {
	case name == "":
		return invalid("name", "a VM needs a name")
	case utf8.RuneCountInString(name) > 80 || !utf8.ValidString(name):
		return invalid("name", "a VM's name has at most 80 characters; %.60q… is longer or no UTF-8", name)
	case strings.ContainsFunc(name, func(r rune) bool { return r == '/' || !unicode.IsPrint(r) }):
		return invalid("name", "the VM name %q holds a slash or a character that cannot be printed", name)
	case strings.TrimSpace(name) != name:
		return invalid("name", "the VM name %q begins or ends with a space", name)
	}
	return nil
}

// folderName makes a file name of a VM's name.
func folderName(name string) string {
	s := strings.Map(func(r rune) rune {
		if strings.ContainsRune(`\:*?"<>|[]`, r) {
			return '_'
		}
		return r
	}, name)
	for len(s) > 120 {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	s = strings.Trim(s, " .")
	if s == "" {
		s = "vm"
	}
	return s
}

// parsePath reads "[datastore] folder/file"; folder and file may be missing.
func parsePath(s string) (datastore, file string, err error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), "[")
	datastore, file, closed := strings.Cut(rest, "]")
	file = strings.TrimSpace(file)
	if !ok || !closed || datastore == "" {
		return "", "", invalid("path", "%.200q is no datastore path; write [datastore] folder/file", s)
	}
	if file != "" {
		if len(file) > 512 || path.IsAbs(file) || path.Clean(file) != file || file == ".." || strings.HasPrefix(file, "../") || strings.ContainsFunc(file, unicode.IsControl) {
			return "", "", invalid("path", "%.200q leads out of the datastore, or is no plain path", s)
		}
	}
	return datastore, file, nil
}

// datastoreNamed finds a datastore by its name in the inventory.
func (c *Center) datastoreNamed(name string) (*inventory.Datastore, error) {
	var found *inventory.Datastore
	inventory.Each(c.view, func(d *inventory.Datastore) bool {
		if d.Name == name {
			found = d
		}
		return found == nil
	})
	if found == nil {
		f := fault(task.NotFound, "there is no datastore %q; the inventory lists them", name)
		f.Name = name
		return nil, f
	}
	return found, nil
}

// orphaned says which keys were made for something that did not come about.
// They are not revoked or destroyed: a person decides.
func (c *Center) orphaned(ctx context.Context, run *task.Run, entity Ref, keys keyPlan, why error) {
	var made []KeyID
	for _, k := range keys {
		if k.Made && k.ID.Key != "" && len(c.vmsUsing(k.ID)) == 0 {
			made = append(made, k.ID)
		}
	}
	if len(made) == 0 {
		return
	}
	c.events.Post(ctx, Event{Type: event.KeyOrphaned, Severity: event.Warning, User: run.User(), Entity: entity, Task: run.Ref(), Keys: made,
		Message: fmt.Sprintf("%s made and not used, for the task failed: %v. What was made stays at the key provider", were(len(made), "key"), why)})
}

// A plannedKey is a key that a task needs: named in the spec, or made by it.
type plannedKey struct {
	Slot string `json:"slot"` // what it is for: "vm", "disk-1"; part of the operation id
	ID   KeyID  `json:"id"`   // Key is empty until it is made
	Made bool   `json:"made"` // by this task
}

type keyPlan []plannedKey

func (k keyPlan) id(slot string) *KeyID {
	for i := range k {
		if k[i].Slot == slot {
			return &k[i].ID
		}
	}
	return nil
}

func (k keyPlan) ids() []KeyID {
	var ids []KeyID
	for _, p := range k {
		if !slices.Contains(ids, p.ID) {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

// complete makes the keys that are to be made and sees that the named ones may
// encrypt (K7). save makes each new id durable before the next step.
func (c *Center) complete(ctx context.Context, run *task.Run, keys keyPlan, uuid string, save func(step string) error) error {
	for i := range keys {
		k := &keys[i]
		if !k.Made {
			if err := c.providers.usableState(ctx, k.ID); err != nil {
				return err
			}
			continue
		}
		if k.ID.Key != "" {
			continue
		}
		id, err := c.providers.newKEK(ctx, k.ID.Provider, run.Operation()+"-"+k.Slot, keyTag{Name: "x-Identifier", Value: uuid})
		if err != nil {
			c.events.Post(ctx, Event{Type: event.KeyGenerateFail, Severity: event.Error, User: run.User(), Entity: run.Entity(), Task: run.Ref(),
				Message: "A key could not be made: " + err.Error()})
			return err
		}
		k.ID = id
		if err := save("key " + k.Slot); err != nil {
			return err
		}
	}
	return nil
}

// planKey fills in a spec's key: the provider that is meant, and whether the key
// is to be made. at is where the default provider is looked up from.
func (c *Center) planKey(ctx context.Context, p Principal, spec KeyID, slot string, at inventory.Entity, self Ref) (plannedKey, error) {
	k := plannedKey{Slot: slot, ID: spec, Made: spec.Key == ""}
	if len(spec.Key) > 1024 {
		return k, invalid("crypto.keyId", "the key id has %d bytes; 1024 are the most", len(spec.Key))
	}
	if k.ID.Provider == "" {
		id, ok, err := c.defaultProvider(ctx, at.Ref)
		if err != nil {
			return k, err
		}
		if !ok {
			return k, noDefault(at)
		}
		k.ID.Provider = id
	}
	if !k.Made {
		if err := c.mayName(p, k.ID, self); err != nil {
			return k, err
		}
	}
	_, err := c.providers.get(ctx, k.ID.Provider)
	return k, err
}
