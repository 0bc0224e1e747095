package center

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/store"
	"mortise/internal/task"
)

const (
	maxDisks      = 64
	maxNICs       = 10
	maxCapacity   = 62 << 40 // bytes, vSphere's largest disk
	defaultMemory = 1024     // MiB
)

// createData is what the task of a creation knows.
type createData struct {
	VM    inventory.VM `json:"vm"` // as it will be; Disks without what only the host knows
	Dir   string       `json:"dir"`
	Keys  keyPlan      `json:"keys,omitempty"`
	Slots []string     `json:"slots,omitempty"` // key slot of each disk; empty: in clear
	Begun bool         `json:"begun,omitempty"` // the host may have written something

	Failed *Fault `json:"failed,omitempty"` // why it is being undone
}

// CreateVM makes a VM, encrypted from its first byte if its policy or spec says
// so (E7). The task's result is the VM.
func (c *Center) CreateVM(ctx context.Context, p Principal, spec CreateVMSpec) (Ref, error) {
	data, claims, err := c.planCreate(ctx, p, spec)
	if err != nil {
		return "", err
	}
	ref, err := c.tasks.Submit(ctx, task.Spec{
		Type: taskCreate, Name: "Folder.createVm", Entity: data.VM.Parent, User: p.User,
		Locks: lockVM(data.VM.Ref), Cancelable: true, Data: data, Ops: claims,
	})
	if errors.Is(err, store.ErrExists) {
		return "", c.claimTaken(ctx, &data.VM)
	}
	return ref, err
}

// claimTaken says what of a new VM another one has already.
func (c *Center) claimTaken(ctx context.Context, vm *inventory.VM) error {
	if owner, ok, err := c.inv.Owner(ctx, inventory.ClaimName(vm.Parent, vm.Name)); err == nil && ok {
		f := fault(task.DuplicateName, "the folder has a VM %q already; choose another name", vm.Name)
		f.Object, f.Name = owner, vm.Name
		return f
	}
	if owner, ok, err := c.inv.Owner(ctx, inventory.ClaimUUID(vm.UUID)); err == nil && ok {
		f := fault(task.AlreadyExists, "the VM with UUID %s is in the inventory already, as %s; a copy needs a UUID of its own", vm.UUID, c.names([]Ref{owner}, 1))
		f.Object, f.Name = owner, vm.Name
		return f
	}
	f := fault(task.AlreadyExists, "another VM uses the folder %q of the datastore; choose another path", path.Dir(vm.Path))
	f.Name = vm.Name
	return f
}

// planCreate checks a spec and the privileges it needs, and fills in what it
// leaves open.
func (c *Center) planCreate(ctx context.Context, p Principal, spec CreateVMSpec) (*createData, []store.Op, error) {
	fail := func(err error) (*createData, []store.Op, error) { return nil, nil, err }
	if spec.Folder == "" {
		spec.Folder = inventory.DefaultVMFolder
	}
	folder, err := lookup[inventory.Folder](c, p, spec.Folder)
	if err != nil {
		return fail(err)
	}
	if !slices.Contains(folder.ChildKinds, inventory.KindVM) {
		return fail(invalid("folder", "folder %q does not hold VMs", folder.Name))
	}
	if err := errors.Join(c.Check(p, authz.VMCreate, folder.Ref), checkVMName(spec.Name)); err != nil {
		return fail(err)
	}
	home, slots, keys, err := c.planNewKeys(ctx, p, folder, &spec)
	if err != nil {
		return fail(err)
	}
	host, ds, dir, err := c.place(p, &spec, home != "")
	if err != nil {
		return fail(err)
	}
	if len(keys) > 0 {
		if err := c.Check(p, authz.CryptoEncryptNew, folder.Ref); err != nil {
			return fail(err)
		}
		if err := c.mayMakeSafe(p, host); err != nil {
			return fail(err)
		}
	}
	hw, err := c.planHardware(p, host, spec.Hardware)
	if err != nil {
		return fail(err)
	}
	if err := checkMigrate(spec.MigrateEncryption, home != ""); err != nil {
		return fail(err)
	}
	vm := inventory.VM{
		Host: host.Ref, Pool: spec.Pool, Datastore: ds.Ref, UUID: strings.ToLower(spec.UUID), InstanceUUID: uuid.NewString(), Hardware: hw,
		CreatedAt: c.now().UTC(), Power: inventory.PoweredOff, Profile: spec.Profile, MigrateEncryption: spec.MigrateEncryption,
	}
	if vm.UUID == "" {
		vm.UUID = uuid.NewString()
	} else if _, err := uuid.Parse(vm.UUID); err != nil || len(vm.UUID) != 36 {
		return fail(invalid("uuid", "%.60q is no UUID", spec.UUID))
	}
	if vm.MigrateEncryption == "" {
		vm.MigrateEncryption = inventory.MigrateOpportunistic
	}
	for _, d := range spec.Disks {
		vm.Disks = append(vm.Disks, inventory.Disk{UUID: uuid.NewString(), CapacityBytes: d.CapacityBytes, Controller: d.Controller, Thick: d.Thick, Profile: d.Profile})
	}
	if vm.Ref, err = c.inv.NextRef(ctx, "vm"); err != nil {
		return fail(err)
	}
	vm.Name, vm.Parent = spec.Name, folder.Ref
	if dir, err = c.freeFolder(ctx, ds, dir, folderName(spec.Name)); err != nil {
		return fail(err)
	}
	vm.Path = dir + "/" + path.Base(dir) + ".vmx"
	var claims []store.Op
	for _, claim := range claimsOf(&vm) {
		claims = append(claims, c.inv.Take(claim, vm.Ref))
	}
	return &createData{VM: vm, Dir: dir, Keys: keys, Slots: slots}, claims, nil
}

// planNewKeys decides what of a new VM is encrypted, and with which keys: the
// VM by its spec or profile, each disk by its own, or like the VM (E6).
func (c *Center) planNewKeys(ctx context.Context, p Principal, folder *inventory.Folder, spec *CreateVMSpec) (home string, slots []string, keys keyPlan, err error) {
	encrypt, err := c.wantsEncryption(ctx, spec.Crypto, spec.Profile, false, "spec.crypto")
	if err != nil {
		return "", nil, nil, err
	}
	at := folder.Entity
	if spec.Host != "" {
		at = inventory.Entity{Ref: spec.Host, Name: folder.Name}
	}
	add := func(id KeyID, slot string) error {
		k, err := c.planKey(ctx, p, id, slot, at, "")
		keys = append(keys, k)
		return err
	}
	if encrypt {
		home = "vm"
		if err := add(spec.Crypto.Key, home); err != nil {
			return "", nil, nil, err
		}
	}
	if len(spec.Disks) > maxDisks {
		return "", nil, nil, invalid("spec.deviceChange", "a VM has at most %d disks, not %d", maxDisks, len(spec.Disks))
	}
	for i, d := range spec.Disks {
		field := fmt.Sprintf("disk %d", i+1)
		if d.CapacityBytes <= 0 || d.CapacityBytes > maxCapacity || d.CapacityBytes%512 != 0 {
			return "", nil, nil, invalid(field, "%s has %d bytes; a disk has a multiple of 512, up to 62 TiB", field, d.CapacityBytes)
		}
		encrypt, err := c.wantsEncryption(ctx, d.Crypto, d.Profile, home != "", field)
		if err != nil {
			return "", nil, nil, err
		}
		slot := ""
		switch {
		case !encrypt:
		case home == "":
			return "", nil, nil, plainVM(field)
		case d.Crypto.Kind != CryptoEncrypt:
			slot = home
		default:
			slot = fmt.Sprintf("disk-%d", i+1)
			if err := add(d.Crypto.Key, slot); err != nil {
				return "", nil, nil, err
			}
		}
		slots = append(slots, slot)
	}
	return home, slots, keys, nil
}

// plainVM is E6: no encrypted disk in a VM whose files are in clear.
func plainVM(disk string) *Fault {
	f := fault(task.InvalidDeviceSpec, "%s would be encrypted while the VM's files are not; encrypt the VM too", disk)
	f.MessageKey = "msg.hostd.deviceSpec.add.noencrypt"
	return f
}

// wantsEncryption says whether something new is to be encrypted: by the crypto
// spec, else by its profile, else as inherited.
func (c *Center) wantsEncryption(ctx context.Context, spec CryptoSpec, profile policy.ID, inherited bool, field string) (bool, error) {
	switch spec.Kind {
	case CryptoEncrypt:
		return true, nil
	case CryptoNoOp:
		return false, nil
	case CryptoNone, CryptoRegister:
		if profile == "" {
			return inherited, nil
		}
		pol, err := c.Policy(ctx, profile)
		return pol.Encrypts, err
	}
	return false, invalid(field, "%s: what is new cannot be decrypted or recrypted; ask for encryption, or for nothing", field)
}

// mayMakeSafe checks the privilege to make a host safe, when its first
// encrypted VM is about to arrive (H1).
func (c *Center) mayMakeSafe(p Principal, host *inventory.Host) error {
	if host.CryptoState == inventory.HostSafe {
		return nil
	}
	return c.Check(p, authz.CryptoRegisterHost, host.Ref)
}

// place chooses host, datastore and, if the spec names one, folder.
func (c *Center) place(p Principal, spec *CreateVMSpec, encrypted bool) (*inventory.Host, *inventory.Datastore, string, error) {
	fail := func(err error) (*inventory.Host, *inventory.Datastore, string, error) { return nil, nil, "", err }
	dir := ""
	if spec.Path != "" {
		name, file, err := parsePath(spec.Path)
		if err != nil {
			return fail(err)
		}
		if spec.Datastore != "" && spec.Datastore != name {
			return fail(invalid("spec.files", "the path %q and the datastore %q contradict each other", spec.Path, spec.Datastore))
		}
		spec.Datastore = name
		if dir = file; strings.HasSuffix(file, ".vmx") {
			dir = path.Dir(file)
		}
		if dir == "." {
			dir = ""
		}
	}
	if spec.Pool == "" {
		spec.Pool = inventory.DefaultPool
	}
	pool, err := lookup[inventory.ResourcePool](c, p, spec.Pool)
	if err != nil {
		return fail(err)
	}
	if err := c.Check(p, authz.ResourceAssignVM, pool.Ref); err != nil {
		return fail(err)
	}
	var ds *inventory.Datastore
	if spec.Datastore != "" {
		if ds, err = c.datastoreNamed(spec.Datastore); err != nil {
			return fail(err)
		}
	}
	host, err := c.chooseHost(p, spec.Host, pool, ds, encrypted)
	if err != nil {
		return fail(err)
	}
	if ds == nil {
		if ds = c.roomiest(host); ds == nil {
			return fail(fault(task.InvalidState, "host %q has no datastore that can be used; mount one", host.Name))
		}
	}
	if err := c.Check(p, authz.DatastoreAllocate, ds.Ref); err != nil {
		return fail(err)
	}
	_, err = c.mountName(ds.Ref, host.Ref)
	return host, ds, dir, err
}

// chooseHost takes the host that is asked for, or the connected one with the
// fewest VMs that has the datastore and may hold the VM.
func (c *Center) chooseHost(p Principal, want Ref, pool *inventory.ResourcePool, ds *inventory.Datastore, encrypted bool) (*inventory.Host, error) {
	if want != "" {
		h, err := lookup[inventory.Host](c, p, want)
		if err != nil {
			return nil, err
		}
		if h.Parent != pool.Owner {
			return nil, invalid("host", "host %q is not in the cluster of resource pool %q", h.Name, pool.Name)
		}
		return h, c.mustReach(want, "creating a VM")
	}
	load := map[Ref]int{}
	inventory.Each(c.view, func(vm *inventory.VM) bool { load[vm.Host]++; return true })
	var best *inventory.Host
	var why []string
	for _, ref := range c.view.Children(pool.Owner) {
		h, ok := inventory.Lookup[inventory.Host](c.view, ref)
		if !ok {
			continue
		}
		_, _, up := c.links.connected(ref)
		switch {
		case !up:
			why = append(why, fmt.Sprintf("%q is not connected", h.Name))
		case ds != nil && !slices.Contains(ds.Hosts(), ref):
			why = append(why, fmt.Sprintf("%q does not mount datastore %q", h.Name, ds.Name))
		case ds == nil && c.roomiest(h) == nil:
			why = append(why, fmt.Sprintf("%q has no datastore", h.Name))
		case encrypted && h.CryptoState == inventory.HostIncapable:
			why = append(why, fmt.Sprintf("%q cannot hold encrypted VMs (%s)", h.Name, strings.Join(h.CryptoReasons, "; ")))
		case best == nil || load[ref] < load[best.Ref]:
			best = h
		}
	}
	if best != nil {
		return best, nil
	}
	if len(why) == 0 {
		return nil, fault(task.HostDown, "no host has joined yet; make a token on center (mortise center token create) and join one")
	}
	return nil, fault(task.HostDown, "no host can take the VM: %s", strings.Join(why, ", "))
}

func (c *Center) roomiest(h *inventory.Host) *inventory.Datastore {
	var best *inventory.Datastore
	for _, ref := range h.Datastores {
		d, ok := inventory.Lookup[inventory.Datastore](c.view, ref)
		if !ok {
			continue
		}
		if _, err := c.mountName(ref, h.Ref); err == nil && (best == nil || d.Free > best.Free) {
			best = d
		}
	}
	return best
}

// freeFolder is the folder that was asked for, or one named after the VM that no
// other VM has.
func (c *Center) freeFolder(ctx context.Context, ds *inventory.Datastore, want, name string) (string, error) {
	if want != "" {
		return want, nil
	}
	for n := 0; ; n++ {
		dir := name
		if n > 0 {
			dir = fmt.Sprintf("%s_%d", name, n)
		}
		_, taken, err := c.inv.Owner(ctx, inventory.ClaimPath(ds.Ref, dir))
		if err != nil || !taken {
			return dir, err
		}
	}
}

// planHardware checks a hardware spec and fills in what it leaves open.
func (c *Center) planHardware(p Principal, host *inventory.Host, spec HardwareSpec) (inventory.Hardware, error) {
	h := inventory.Hardware{MemoryMiB: spec.MemoryMiB, CPUs: spec.CPUs, Firmware: spec.Firmware, GuestOS: spec.GuestOS, Annotation: spec.Annotation}
	if h.MemoryMiB == 0 {
		h.MemoryMiB = defaultMemory
	}
	if h.CPUs == 0 {
		h.CPUs = 1
	}
	if h.Firmware == "" {
		h.Firmware = "bios"
	}
	if h.GuestOS == "" {
		h.GuestOS = "otherGuest64"
	}
	if err := checkHardware(spec); err != nil {
		return h, err
	}
	var err error
	h.NICs, err = c.planNICs(p, host, spec.NICs)
	return h, err
}

func checkHardware(h HardwareSpec) error {
	switch {
	case h.MemoryMiB != 0 && (h.MemoryMiB < 4 || h.MemoryMiB > 24<<20):
		return invalid("spec.memoryMB", "%d MiB of memory; a VM has 4 MiB to 24 TiB", h.MemoryMiB)
	case h.CPUs < 0 || h.CPUs > 768:
		return invalid("spec.numCPUs", "%d CPUs; a VM has 1 to 768", h.CPUs)
	case h.Firmware != "" && h.Firmware != "bios" && h.Firmware != "efi":
		return invalid("spec.firmware", "firmware %.40q; it is bios or efi", h.Firmware)
	case len(h.GuestOS) > 80:
		return invalid("spec.guestId", "the guest id has %d bytes; 80 are the most", len(h.GuestOS))
	case len(h.Annotation) > 16<<10:
		return invalid("spec.annotation", "the annotation has %d bytes; 16384 are the most", len(h.Annotation))
	}
	return nil
}

// planNICs checks network cards and gives each a key and a MAC address.
func (c *Center) planNICs(p Principal, host *inventory.Host, nics []inventory.NIC) ([]inventory.NIC, error) {
	if len(nics) > maxNICs {
		return nil, invalid("spec.deviceChange", "a VM has at most %d network cards, not %d", maxNICs, len(nics))
	}
	nics = slices.Clone(nics)
	used := map[int32]bool{}
	for _, n := range nics {
		if n.Key != 0 && used[n.Key] {
			return nil, invalid("spec.deviceChange", "two network cards have the key %d", n.Key)
		}
		used[n.Key] = true
	}
	next := int32(4000)
	for i := range nics {
		n := &nics[i]
		network, ok := c.inv.PeekOwner(inventory.ClaimName(inventory.DefaultNetworks, n.Network))
		if !ok || !slices.Contains(host.Networks, network) {
			f := fault(task.NotFound, "host %q has no network %q; define it in the host's libvirt, or choose another", host.Name, trim(n.Network, 100))
			f.Name = n.Network
			return nil, f
		}
		if err := c.Check(p, authz.NetworkAssign, network); err != nil {
			return nil, err
		}
		for n.Key == 0 {
			if !used[next] {
				n.Key, used[next] = next, true
			}
			next++
		}
		if n.MAC == "" {
			mac, err := newMAC()
			if err != nil {
				return nil, err
			}
			n.MAC = mac
		}
		if n.Model == "" {
			n.Model = "virtio"
		}
	}
	return nics, nil
}

// newMAC makes an address in the range that QEMU and libvirt use for guests.
func newMAC() (string, error) {
	var b [3]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2]), nil
}

func checkMigrate(setting string, encrypted bool) error {
	switch setting {
	case "", inventory.MigrateRequired:
		return nil
	case inventory.MigrateDisabled, inventory.MigrateOpportunistic:
		if encrypted {
			return invalid("spec.migrateEncryption", "encrypted VMs always migrate encrypted; %q cannot be set on one", setting)
		}
		return nil
	}
	return invalid("spec.migrateEncryption", "%.40q; it is disabled, opportunistic or required", setting)
}

// createVM is the task: keys, then the host's work, then the record.
func (c *Center) createVM(ctx context.Context, run *task.Run) error {
	var data createData
	if err := run.Load(&data); err != nil {
		return err
	}
	if data.Failed != nil { // a former process got here: there is no way back to creating
		return c.undoCreate(ctx, run, &data)
	}
	err := c.create(ctx, run, &data)
	if err == nil || run.Stopping(ctx) {
		return err
	}
	ctx, stop := undoing(ctx, run)
	defer stop()
	data.Failed = canceledFault(run, err)
	if err := run.Save(ctx, "undo", data); err != nil {
		return err
	}
	return c.undoCreate(ctx, run, &data)
}

func (c *Center) create(ctx context.Context, run *task.Run, data *createData) error {
	vm := &data.VM
	run.Progress(ctx, "making keys", 0, 0)
	save := func(step string) error { return run.Save(ctx, step, data) }
	if err := c.complete(ctx, run, data.Keys, vm.UUID, save); err != nil {
		return err
	}
	vm.KeyID, vm.Encrypted = data.Keys.id("vm"), data.Keys.id("vm") != nil
	for i, slot := range data.Slots {
		vm.Disks[i].KeyID, vm.Disks[i].Encrypted = data.Keys.id(slot), slot != ""
	}
	if !data.Begun {
		// From here on the host may hold key safes: forward only.
		if err := run.SetCancelable(ctx, false); err != nil {
			return err
		}
		data.Begun = true
		if err := run.Save(ctx, "begin", data); err != nil {
			return err
		}
	}
	var info *hostapi.VMInfo
	err := c.onHost(ctx, vm.Host, "creating the VM", func(l *link, h *inventory.Host, client hostapi.HostClient) error {
		if vm.Encrypted {
			if err := c.ensureSafe(ctx, h.Ref, client); err != nil {
				return err
			}
		}
		run.Progress(ctx, "sending keys", 0, 0)
		if err := c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, vm.Keys(), fmt.Sprintf("VM %q is created", vm.Name)); err != nil {
			return err
		}
		run.Progress(ctx, "creating the VM on host "+h.Name, 0, 0)
		request, err := c.createRequest(run, data)
		if err != nil {
			return err
		}
		info, err = client.CreateVM(ctx, request)
		return hostFault(h, vm, "creating the VM", err)
	})
	if err != nil {
		return err
	}
	if err := c.created(vm, info); err != nil {
		return err
	}
	if err := run.Save(ctx, "register", data, c.inv.VMs.Create(string(vm.Ref), *vm)); err != nil && !errors.Is(err, store.ErrExists) {
		return err
	}
	c.events.Post(ctx, Event{Type: event.VMCreated, User: run.User(), Entity: vm.Ref, Task: run.Ref(), Keys: vm.Keys(),
		Message: fmt.Sprintf("VM %q was created on host %s", vm.Name, c.names([]Ref{vm.Host}, 1))})
	return run.SetResult(ctx, vm.Ref)
}

func (c *Center) createRequest(run *task.Run, data *createData) (*hostapi.CreateVMRequest, error) {
	vm := &data.VM
	datastore, err := c.mountName(vm.Datastore, vm.Host)
	if err != nil {
		return nil, err
	}
	r := &hostapi.CreateVMRequest{Header: c.header(run.Operation()), Uuid: vm.UUID, Name: vm.Name, Datastore: datastore, Folder: data.Dir,
		Hardware: wireHardware(vm.Hardware), HomeKey: wireKeyID(vm.KeyID)}
	for _, d := range vm.Disks {
		r.Disks = append(r.Disks, &hostapi.NewDisk{Uuid: d.UUID, CapacityBytes: d.CapacityBytes, Controller: d.Controller, Thick: d.Thick, KeyId: wireKeyID(d.KeyID)})
	}
	return r, nil
}

// created takes over what the host made, having checked that it is what was
// asked for: a disk in clear must not pass for an encrypted one.
func (c *Center) created(vm *inventory.VM, info *hostapi.VMInfo) error {
	want := cloneVM(vm)
	takeInfo(vm, info)
	takeCrypto(vm, info)
	vm.Path = info.GetRef().GetPath()
	if vm.Encrypted != want.Encrypted || len(vm.Disks) != len(want.Disks) {
		return fault(task.Internal, "host made something else of VM %q than it was asked for; its folder is left as it is", vm.Name)
	}
	for _, w := range want.Disks {
		i := slices.IndexFunc(vm.Disks, func(d inventory.Disk) bool { return d.UUID == w.UUID })
		if i < 0 || vm.Disks[i].Encrypted != w.Encrypted || w.Encrypted && (vm.Disks[i].KeyID == nil || *vm.Disks[i].KeyID != *w.KeyID) {
			return fault(task.Internal, "host made something else of a disk of VM %q than it was asked for; its folder is left as it is", vm.Name)
		}
	}
	return nil
}

// undoCreate removes what a failed creation left: files of a VM that never was,
// claims, the keys' copies on the host. The keys stay at their provider.
func (c *Center) undoCreate(ctx context.Context, run *task.Run, data *createData) error {
	vm := &data.VM
	if data.Begun {
		left := c.removeHalfMade(ctx, run, data)
		if left != "" {
			c.events.Post(ctx, Event{Type: event.HostAlarm, Severity: event.Warning, Entity: vm.Host, Task: run.Ref(),
				Message: fmt.Sprintf("Files of VM %q, which could not be created, may be left in folder %q: %s", vm.Name, data.Dir, left)})
		}
		c.dropKeys(ctx, vm.Host, vm.UUID, data.Keys.ids())
	}
	c.orphaned(ctx, run, vm.Parent, data.Keys, data.Failed)
	for _, claim := range claimsOf(vm) {
		owner, taken, err := c.inv.Owner(ctx, claim)
		if err == nil && taken && owner == vm.Ref {
			err = c.inv.Commit(ctx, c.inv.Release(claim))
		}
		if err != nil {
			c.log.Warn("the name of a VM that was not created is still taken", "claim", claim, "error", err)
		}
	}
	return data.Failed
}

// removeHalfMade has the host delete the files of a VM that could not be
// created, and says why some may be left. A folder that holds another VM is why
// the creation failed, and is left alone.
func (c *Center) removeHalfMade(ctx context.Context, run *task.Run, data *createData) string {
	vm := &data.VM
	_, client, ok := c.links.connected(vm.Host)
	if !ok {
		return "its host is not connected"
	}
	datastore, err := c.mountName(vm.Datastore, vm.Host)
	if err != nil {
		return err.Error()
	}
	ref := &hostapi.VMRef{Datastore: datastore, Path: vm.Path}
	info, err := client.InspectVM(ctx, &hostapi.InspectVMRequest{Ref: ref})
	if err == nil && info.GetRef().GetUuid() != vm.UUID {
		return ""
	}
	if err == nil {
		ref.Uuid = vm.UUID
		_, err = client.DeleteVM(ctx, &hostapi.PowerRequest{Header: c.header(run.Operation() + "-undo"), Ref: ref})
	}
	if f, text := hostapi.AsFault(err); err != nil && f.Kind != hostapi.Fault_NOT_FOUND {
		return text
	}
	return ""
}
