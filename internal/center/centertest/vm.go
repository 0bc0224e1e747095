package centertest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"

	"mortise/internal/hostapi"
)

// steps is how many parts a conversion has.
const steps = 8

// Datastore is a folder that one or more hosts mount. It outlives them.
type Datastore struct {
	Name, UUID string

	mu  sync.Mutex // guards what follows
	vms map[string]*folder
	// Full makes every conversion end for want of space.
	Full bool
}

// NewDatastore makes an empty datastore.
func NewDatastore(name string) *Datastore {
	return &Datastore{Name: name, UUID: uuid.NewString(), vms: map[string]*folder{}}
}

// folder is a VM's folder.
type folder struct {
	uuid, name, path string
	hardware         *hostapi.Hardware
	home             sealed
	disks            []*disk
	snapshots        snapshots
}

type disk struct {
	uuid, path, controller string
	key                    int32
	link                   int // which of its links is on top; 0: the base
	capacity               int64
	thick                  bool
	content                []byte
	sealed
	converting string // the conversion under way
	back       bool   // it runs back
	done       int    // steps of it
	target     *hostapi.KeyID
	lie        bool
}

// sealed is the encryption of VM files or of a disk. With the KEK one can make
// proof, without it one cannot.
type sealed struct {
	key   *hostapi.KeyID // nil: in clear
	proof []byte
	epoch uint64
}

func prove(kek []byte, what string) []byte {
	m := hmac.New(sha256.New, kek)
	io.WriteString(m, what)
	return m.Sum(nil)
}

// VMs counts the VMs on the datastore.
func (d *Datastore) VMs() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.vms)
}

// SetFull lets conversions fail for want of space, or not any more.
func (d *Datastore) SetFull(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.Full = full
}

// Tamper lets f change a VM's folder as a person with an editor would.
func (d *Datastore) Tamper(vmxPath string, f func(t *Tampered)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(&Tampered{d.vms[vmxPath]})
}

// Tampered is a VM's folder in the hands of somebody with an editor.
type Tampered struct{ f *folder }

// StripHome makes the VMX say that the VM is not encrypted.
func (t *Tampered) StripHome() { t.f.home = sealed{} }

// StripDisk makes a descriptor say that the disk is not encrypted.
func (t *Tampered) StripDisk(i int) { t.f.disks[i].sealed = sealed{} }

// Epoch sets the VMX back to an older epoch.
func (t *Tampered) Epoch(e uint64) { t.f.home.epoch = e }

// UUID puts another VM's VMX in the place.
func (t *Tampered) UUID(uuid string) { t.f.uuid = uuid }

// Content returns what was imported into a disk.
func (d *Datastore) Content(vmxPath string, i int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.vms[vmxPath].disks[i].content)
}

// open finds a VM's folder, and checks it against what center expects and that
// the keys to open it are here, as a real host does. The datastore's lock is
// held.
func (h *Host) open(d *Datastore, ref *hostapi.VMRef) (*folder, error) {
	f := d.vms[ref.GetPath()]
	if f == nil {
		return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s: no such file", ref.GetPath())
	}
	if ref.Uuid != "" && ref.Uuid != f.uuid {
		return nil, hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is of VM %s, not of %s", f.path, f.uuid, ref.Uuid)
	}
	tampered := func(format string, args ...any) (*folder, error) {
		return nil, hostapi.Faultf(hostapi.Fault_TAMPERED, format, args...)
	}
	e := ref.Expect
	if e == nil {
		return f, nil
	}
	if e.Encrypted && f.home.key == nil {
		return tampered("%s must be encrypted, and has no key safe", f.path)
	}
	if f.home.key != nil && f.home.epoch < e.Epoch {
		return tampered("%s is of epoch %d, at least %d is expected", f.path, f.home.epoch, e.Epoch)
	}
	known := map[string]*hostapi.DiskExpect{}
	for _, x := range e.Disks {
		known[x.Uuid] = x
	}
	for _, disk := range f.disks {
		x := known[disk.uuid]
		switch {
		case x == nil:
			return tampered("%s is a disk that center does not know", disk.path)
		case x.Encrypted && !x.Converting && disk.sealed.key == nil:
			return tampered("%s must be encrypted, and has no key safe", disk.path)
		case !x.Converting && disk.sealed.key != nil && disk.epoch < x.Epoch:
			return tampered("%s is of epoch %d, at least %d is expected", disk.path, disk.epoch, x.Epoch)
		}
		delete(known, disk.uuid)
	}
	for id, x := range known {
		if !x.Optional {
			return tampered("%s has no disk %s, which center knows", f.path, id)
		}
	}
	return f, nil
}

// unlock checks that every key that f needs is held, and is the right one.
func (h *Host) unlock(f *folder) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	check := func(s sealed, what string) error {
		if s.key == nil {
			return nil
		}
		kek, err := h.key(f.uuid, s.key)
		if err == nil && !hmac.Equal(prove(kek, what), s.proof) {
			err = hostapi.Faultf(hostapi.Fault_TAMPERED, "key %s does not open %s", keyName(s.key), what)
		}
		return err
	}
	err := check(f.home, f.uuid)
	for _, d := range f.disks {
		err = errors.Join(err, check(d.sealed, d.uuid))
		if d.target != nil && err == nil {
			_, err = h.key(f.uuid, d.target)
		}
	}
	var fault *hostapi.FaultError
	if errors.As(err, &fault) {
		return fault
	}
	return err
}

// seal makes the sealed form of what under a key that the host must hold for vm.
func (h *Host) seal(vm string, id *hostapi.KeyID, what string, epoch uint64) (sealed, error) {
	if id == nil {
		return sealed{}, nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	kek, err := h.key(vm, id)
	if err != nil {
		return sealed{}, err
	}
	return sealed{key: id, proof: prove(kek, what), epoch: epoch}, nil
}

func (s *service) CreateVM(_ context.Context, r *hostapi.CreateVMRequest) (*hostapi.VMInfo, error) {
	h := s.h
	ref := &hostapi.VMRef{Uuid: r.Uuid, Datastore: r.Datastore, Path: r.Folder + "/" + path.Base(r.Folder) + ".vmx"}
	d, end, err := h.begin("CreateVM", r.Header, ref)
	if err != nil {
		return nil, err
	}
	defer end()
	d.mu.Lock()
	defer d.mu.Unlock()
	if old := d.vms[ref.Path]; old != nil && old.uuid != r.Uuid {
		return nil, hostapi.Faultf(hostapi.Fault_EXISTS, "%s is there already", ref.Path)
	}
	f := &folder{uuid: r.Uuid, name: r.Name, path: ref.Path, hardware: r.Hardware}
	if f.home, err = h.seal(f.uuid, r.HomeKey, f.uuid, 1); err != nil {
		return nil, err
	}
	for _, n := range r.Disks {
		if err := h.addDisk(f, n); err != nil {
			return nil, err
		}
	}
	if d.Full {
		return nil, hostapi.Faultf(hostapi.Fault_NO_SPACE, "datastore %s is full", d.Name)
	}
	d.vms[ref.Path] = f
	return h.info(d, f), nil
}

func (h *Host) addDisk(f *folder, n *hostapi.NewDisk) (err error) {
	at := 0
	for slices.ContainsFunc(f.disks, func(o *disk) bool { return o.key == int32(2000+at) }) {
		at++
	}
	name := fmt.Sprintf("%s/%s_%d.vmdk", path.Dir(f.path), path.Base(path.Dir(f.path)), at)
	disk := &disk{uuid: n.Uuid, path: name, controller: n.Controller, key: int32(2000 + at), capacity: n.CapacityBytes, thick: n.Thick}
	if disk.controller == "" {
		disk.controller = fmt.Sprintf("scsi0:%d", at)
	}
	disk.sealed, err = h.seal(f.uuid, n.KeyId, n.Uuid, 1)
	f.disks = append(f.disks, disk)
	return err
}

// info is what the folder says. The datastore's lock is held.
func (h *Host) info(d *Datastore, f *folder) *hostapi.VMInfo {
	i := &hostapi.VMInfo{Ref: &hostapi.VMRef{Uuid: f.uuid, Datastore: d.Name, Path: f.path}, Name: f.name, Hardware: f.hardware,
		Encrypted: f.home.key != nil, Key: f.home.key, Epoch: f.home.epoch, SizeBytes: 4096}
	h.mu.Lock()
	defer h.mu.Unlock()
	i.Runtime = h.runtime(f.uuid)
	missing := func(id *hostapi.KeyID) bool {
		if id == nil {
			return false
		}
		_, err := h.key(f.uuid, id)
		if err != nil {
			i.Runtime.HasKeys, i.Runtime.Missing = false, append(i.Runtime.Missing, id)
		}
		return err != nil
	}
	if missing(f.home.key) {
		i.Locked, i.LockedReason = true, "the key "+keyName(f.home.key)+" is not here"
	}
	f.snapshots.info(i)
	for _, disk := range f.disks {
		missing(disk.sealed.key)
		x := &hostapi.DiskInfo{Uuid: disk.uuid, Key: disk.key, Path: disk.top(), Controller: disk.controller, CapacityBytes: disk.capacity, AllocatedBytes: int64(len(disk.content)), Thick: disk.thick,
			Encrypted: disk.sealed.key != nil, KeyId: disk.sealed.key, Epoch: disk.epoch}
		if x.Encrypted {
			x.Cipher = "XTS-AES-256"
		}
		if disk.lie {
			x.Encrypted, x.KeyId = false, nil
		}
		if disk.converting != "" {
			x.Conversion, x.BoundaryBytes, x.TargetKeyId, x.Back = disk.converting, disk.capacity*int64(disk.done)/steps, disk.target, disk.back
		}
		i.Disks = append(i.Disks, x)
	}
	return i
}

func (s *service) InspectVM(_ context.Context, r *hostapi.InspectVMRequest) (*hostapi.VMInfo, error) {
	if err := s.h.enter("InspectVM", nil); err != nil {
		return nil, err
	}
	d, err := s.h.store(r.Ref.GetDatastore())
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.vms[r.Ref.GetPath()]
	if f == nil {
		return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s: no such file", r.Ref.GetPath())
	}
	return s.h.info(d, f), nil
}

func (s *service) InspectDisk(_ context.Context, r *hostapi.InspectDiskRequest) (*hostapi.DiskInfo, error) {
	if err := s.h.enter("InspectDisk", nil); err != nil {
		return nil, err
	}
	d, err := s.h.store(r.Datastore)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.vms {
		for i, disk := range f.disks {
			if disk.top() == r.Path {
				return s.h.info(d, f).Disks[i], nil
			}
		}
	}
	return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s: no such file", r.Path)
}

func (s *service) ReconfigureVM(r *hostapi.ReconfigureVMRequest, stream grpc.ServerStreamingServer[hostapi.Progress]) error {
	h := s.h
	d, end, err := h.begin("ReconfigureVM", r.Header, r.Ref)
	if err != nil {
		return err
	}
	defer end()
	d.mu.Lock()
	f, err := h.open(d, r.Ref)
	d.mu.Unlock()
	if err == nil {
		err = h.unlock(f)
	}
	if err == nil {
		h.setPace(f.uuid, r.Pace, true)
		defer h.endPace(f.uuid)
		change := h.reconfigure
		if r.Undo {
			change = h.undo
		}
		err = change(stream.Context(), d, f, r, func(p *hostapi.Progress) { stream.Send(p) })
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	info := h.info(d, f)
	keep := []string{keyName(info.Key)}
	for _, disk := range info.Disks {
		keep = append(keep, keyName(disk.KeyId))
	}
	d.mu.Unlock()
	h.mu.Lock()
	h.dropVM(f.uuid, keep...)
	h.mu.Unlock()
	return stream.Send(&hostapi.Progress{Stage: "done", Result: info})
}

// reconfigure does what r asks for, in the order of a real host; what an earlier
// call did is passed over.
func (h *Host) reconfigure(ctx context.Context, d *Datastore, f *folder, r *hostapi.ReconfigureVMRequest, tell func(*hostapi.Progress)) error {
	d.mu.Lock()
	if err := f.snapshots.fixed(r); err != nil {
		d.mu.Unlock()
		return err
	}
	if r.Hardware != nil {
		f.hardware = r.Hardware
	}
	if r.Name != "" {
		f.name = r.Name
	}
	var err error
	if k := r.Home.GetKind(); k != hostapi.CryptoChange_NONE && k != hostapi.CryptoChange_DECRYPT && !same(f.home.key, r.Home.Key) {
		f.home, err = h.seal(f.uuid, r.Home.Key, f.uuid, f.home.epoch+1)
	}
	for _, n := range r.AddDisks {
		if err == nil && !slices.ContainsFunc(f.disks, func(o *disk) bool { return o.uuid == n.Uuid }) {
			err = h.addDisk(f, n)
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	for i, c := range r.Disks {
		at := slices.IndexFunc(f.disks, func(o *disk) bool { return o.uuid == c.DiskUuid })
		if at < 0 {
			return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "no disk %s", c.DiskUuid)
		}
		stage := fmt.Sprintf("%s disk %d of %d", c.Change.Kind, i+1, len(r.Disks))
		if err := h.convert(ctx, d, f, f.disks[at], c.Change, stage, tell); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	f.disks = slices.DeleteFunc(f.disks, func(o *disk) bool { return slices.Contains(r.RemoveDiskUuids, o.uuid) })
	if r.Home.GetKind() == hostapi.CryptoChange_DECRYPT {
		for _, disk := range f.disks {
			if disk.sealed.key != nil {
				return hostapi.Faultf(hostapi.Fault_INVALID, "%s is still encrypted", disk.path)
			}
		}
		f.home = sealed{}
	}
	return nil
}

func same(a, b *hostapi.KeyID) bool { return a != nil && b != nil && keyName(a) == keyName(b) }

// convert changes one disk, step by step. Cancelling stops between two steps.
func (h *Host) convert(ctx context.Context, d *Datastore, f *folder, disk *disk, c *hostapi.CryptoChange, stage string, tell func(*hostapi.Progress)) error {
	kind := map[hostapi.CryptoChange_Kind]string{hostapi.CryptoChange_ENCRYPT: "encrypt", hostapi.CryptoChange_DECRYPT: "decrypt", hostapi.CryptoChange_DEEP_RECRYPT: "deep recrypt"}[c.Kind]
	d.mu.Lock()
	next, err := h.seal(f.uuid, c.Key, disk.uuid, disk.epoch+1)
	if err != nil {
		d.mu.Unlock()
		return err
	}
	if disk.converting == "" {
		done := c.Kind == hostapi.CryptoChange_DECRYPT && disk.sealed.key == nil || same(disk.sealed.key, c.Key)
		if done {
			d.mu.Unlock()
			return nil
		}
		if c.Kind == hostapi.CryptoChange_SHALLOW_RECRYPT {
			next.epoch = disk.epoch
			disk.sealed = next
			d.mu.Unlock()
			return nil
		}
		disk.converting, disk.done, disk.target = kind, 0, c.Key
		if c.Kind == hostapi.CryptoChange_ENCRYPT {
			disk.sealed = next // the key safe is there before the first byte is
		}
	} else if disk.converting != kind || c.Key != nil && !same(disk.target, c.Key) {
		d.mu.Unlock()
		return hostapi.Faultf(hostapi.Fault_INVALID, "%s is in the middle of: %s", disk.path, disk.converting)
	}
	d.mu.Unlock()
	for {
		d.mu.Lock()
		disk.back = false
		at, full := disk.done, d.Full
		d.mu.Unlock()
		if at == steps {
			break
		}
		if err := h.hold(ctx, f.uuid); err != nil {
			return err
		}
		h.mu.Lock()
		hook := h.onStep
		h.mu.Unlock()
		if hook != nil {
			hook(at)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if full && at == steps/2 {
			return hostapi.Faultf(hostapi.Fault_NO_SPACE, "datastore %s is full; free space and repeat", d.Name)
		}
		d.mu.Lock()
		disk.done++
		d.mu.Unlock()
		tell(&hostapi.Progress{Stage: stage, DoneBytes: disk.capacity * int64(at+1) / steps, TotalBytes: disk.capacity,
			BytesPerSecond: 1 << 20, LeftSeconds: float64(steps - at - 1)})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	disk.converting, disk.target = "", nil
	if c.Kind != hostapi.CryptoChange_ENCRYPT {
		disk.sealed = next
	}
	return nil
}

func (s *service) power(method string, r *hostapi.PowerRequest, f func(h *Host, d *Datastore, vm *folder) error) (*hostapi.VMInfo, error) {
	h := s.h
	d, end, err := h.begin(method, r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	d.mu.Lock()
	defer d.mu.Unlock()
	vm, err := h.open(d, r.Ref)
	if err == nil {
		err = f(h, d, vm)
	}
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	ev := &hostapi.HostEvent{Kind: hostapi.HostEvent_VM, Vm: h.runtime(vm.uuid)}
	h.mu.Unlock()
	h.tell(ev)
	return h.info(d, vm), nil
}

func (h *Host) isOn(vm string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running[vm] == nil {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered off", vm)
	}
	return nil
}

func (s *service) PowerOn(_ context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power("PowerOn", r, func(h *Host, d *Datastore, f *folder) error {
		if h.isOn(f.uuid) == nil {
			return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered on already", f.uuid)
		}
		if err := h.unlock(f); err != nil {
			return err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.running[f.uuid] = &guest{since: time.Now(), at: d, path: f.path, lines: make(chan []byte, 16)}
		return nil
	})
}

func (s *service) PowerOff(_ context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power("PowerOff", r, func(h *Host, _ *Datastore, f *folder) error {
		err := h.isOn(f.uuid)
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.running, f.uuid)
		return err
	})
}

func (s *service) Shutdown(_ context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power("Shutdown", r, func(h *Host, _ *Datastore, f *folder) error {
		err := h.isOn(f.uuid)
		if err == nil {
			go h.Crash(f.uuid) // the guest obeys
		}
		return err
	})
}

func (s *service) Reset(_ context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power("Reset", r, func(h *Host, _ *Datastore, f *folder) error { return h.isOn(f.uuid) })
}

func (s *service) Release(_ context.Context, r *hostapi.PowerRequest) (*hostapi.ReleaseReply, error) {
	h := s.h
	_, end, err := h.begin("Release", r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if h.isOn(r.Ref.Uuid) == nil {
		return nil, hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered on", r.Ref.Uuid)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropVM(r.Ref.Uuid)
	return &hostapi.ReleaseReply{}, nil
}

func (s *service) DeleteVM(_ context.Context, r *hostapi.PowerRequest) (*hostapi.DeleteVMReply, error) {
	h := s.h
	d, end, err := h.begin("DeleteVM", r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.vms[r.Ref.Path] == nil {
		return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s: no such file", r.Ref.Path)
	}
	if h.isOn(r.Ref.Uuid) == nil {
		return nil, hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered on", r.Ref.Uuid)
	}
	delete(d.vms, r.Ref.Path)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropVM(r.Ref.Uuid)
	return &hostapi.DeleteVMReply{}, nil
}

func (s *service) ImportDisk(stream grpc.ClientStreamingServer[hostapi.ImportChunk, hostapi.ImportReply]) error {
	h := s.h
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	d, end, err := h.begin("ImportDisk", first.Header, first.Ref)
	if err != nil {
		return err
	}
	defer end()
	d.mu.Lock()
	f, err := h.open(d, first.Ref)
	d.mu.Unlock()
	if err == nil {
		err = h.unlock(f)
	}
	if err != nil {
		return err
	}
	at := slices.IndexFunc(f.disks, func(o *disk) bool { return o.uuid == first.DiskUuid })
	if at < 0 {
		return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "no disk %s", first.DiskUuid)
	}
	content := make([]byte, f.disks[at].capacity)
	var written int64
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		written += int64(copy(content[m.Offset:], m.Data))
	}
	d.mu.Lock()
	f.disks[at].content = content
	d.mu.Unlock()
	return stream.SendAndClose(&hostapi.ImportReply{WrittenBytes: written})
}

// Console echoes what is typed, in capitals.
func (s *service) Console(stream grpc.BidiStreamingServer[hostapi.ConsoleData, hostapi.ConsoleData]) error {
	if err := s.h.enter("Console", nil); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := s.h.isOn(first.Ref.GetUuid()); err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil
		}
		if string(m.Data) == "exit\n" {
			return nil
		}
		if err := stream.Send(&hostapi.ConsoleData{Data: bytes.ToUpper(m.Data)}); err != nil {
			return err
		}
	}
}

// UUIDOf is the UUID that a VMX says.
func (d *Datastore) UUIDOf(vmxPath string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f := d.vms[vmxPath]; f != nil {
		return f.uuid
	}
	return ""
}

// LieAbout makes the host say of a disk that it is in clear, from now on, while
// it opens as before.
func (t *Tampered) LieAbout(i int) { t.f.disks[i].lie = true }

// NameKey puts another key's id into the VMX's key safe.
func (t *Tampered) NameKey(provider, key string) {
	t.f.home.key = &hostapi.KeyID{Provider: provider, Key: key}
}
