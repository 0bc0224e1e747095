package vmx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
	"mortise/internal/vmxfile"
)

// A vm is one VM's folder and the KEKs that open it.
type vm struct {
	log      *slog.Logger
	random   io.Reader // nil: crypto/rand
	path     string    // of the VMX
	live     string    // folder of its disks' live bitmaps, which outlives the process
	direct   bool      // its disks are opened with direct I/O
	at       func(step string)
	diskStep func(step string) // vdisk's; nil: not
	id       uuid.UUID         // written once, by whoever opens or creates the VM
	pacing   pacing

	mu     sync.Mutex // protects what follows: the files' mount asks from its own goroutines
	keks   keysafe.KEKSet
	expect *hostapi.Expect // nil: center expects nothing
}

// takeKeys moves the KEKs of a message into locked memory and clears the
// message. Keys that are there already stay.
func (v *vm) takeKeys(keys []*hostapi.KEK) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keks == nil {
		v.keks = keysafe.KEKSet{}
	}
	var failed error
	for _, k := range keys {
		id := fromWire(k.Id)
		if v.keks[id] != nil || failed != nil {
			clear(k.Bytes)
			continue
		}
		key, err := secret.Take(k.Bytes)
		if err != nil {
			failed = err
			continue
		}
		v.keks[id] = key
	}
	return failed
}

// KEK implements keysafe.KEKs.
func (v *vm) KEK(id keysafe.KeyID) (*secret.Key, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.keks.KEK(id)
}

func (v *vm) wipe() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for id, k := range v.keks {
		k.Wipe()
		delete(v.keks, id)
	}
}

// identify checks that the folder holds the VM that is meant.
func (v *vm) identify(ref *hostapi.VMRef) error {
	f, err := loadVMX(v.path)
	if err != nil {
		return err
	}
	id, err := vmUUID(f)
	if err != nil {
		return err
	}
	if want := ref.GetUuid(); want != "" && want != id.String() {
		return hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is of VM %s, not of %s: another VM's folder was put in its place", v.path, id, want)
	}
	if v.id == uuid.Nil {
		v.id = id
	} else if v.id != id {
		return hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is of VM %s now, and was of %s: another VM's folder was put in its place", v.path, id, v.id)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.expect = ref.GetExpect()
	return nil
}

// forget wipes the KEKs that the VM's files do not name any more: after a recrypt
// an old one must not come back with the next agent (K9). While a disk cannot be
// read, what it needs is not known and all stay.
func (v *vm) forget() {
	used := map[keysafe.KeyID]bool{}
	safes, err := RequiredKeys(v.path)
	if info, ierr := Inspect(v.path); err != nil || ierr != nil || Unreadable(info) {
		return
	}
	for _, alternatives := range safes {
		for _, id := range alternatives {
			used[id] = true
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for id, k := range v.keks {
		if !used[id] {
			k.Wipe()
			delete(v.keks, id)
		}
	}
}

// bundleExpectation is what center knows of the VMX's bundle.
func (v *vm) bundleExpectation() keysafe.Expectation {
	v.mu.Lock()
	defer v.mu.Unlock()
	return keysafe.Expectation{Encrypted: v.expect.GetEncrypted(), Generation: v.expect.GetEpoch()}
}

// open opens the bundle as it is on disk; nil when the VM is not encrypted and
// need not be. The caller wipes it.
func (v *vm) open(f *vmxfile.File) (*keysafe.Bundle, error) {
	b, err := keysafe.OpenBundle(f, v.id, v, v.bundleExpectation())
	if errors.Is(err, keysafe.ErrNotEncrypted) {
		return nil, nil
	}
	return b, faultOf(err)
}

// edit changes VMX and bundle together, durably; b is nil when the VM is not
// encrypted.
func (v *vm) edit(change func(f *vmxfile.File, b *keysafe.Bundle) error) error {
	return faultOf(vmxfile.Update(v.path, func(f *vmxfile.File) error {
		b, err := v.open(f)
		if err != nil {
			return err
		}
		defer b.Wipe()
		if err := change(f, b); err != nil {
			return err
		}
		if b == nil {
			return nil
		}
		return b.Seal(v.random, f)
	}))
}

// A member is a disk of the VM and what must be true of it.
type member struct {
	slot
	path     string
	id       uuid.UUID
	info     vdisk.Info
	want     vdisk.Expect
	recorded uint64 // epoch in the bundle
}

// members lists the VM's disks and checks that they are exactly those that the
// bundle and center know: a descriptor that was exchanged for another disk's, in
// clear, must not pass as a new disk (E8).
func (v *vm) members(f *vmxfile.File, b *keysafe.Bundle) ([]member, error) {
	slots, err := diskSlots(f)
	if err != nil {
		return nil, faultOf(err)
	}
	known := map[string]*hostapi.DiskExpect{}
	for _, d := range v.expect.GetDisks() {
		known[d.Uuid] = d
	}
	var all []member
	for _, s := range slots {
		m := member{slot: s}
		if m.path, err = diskPath(v.path, s.file); err != nil {
			return nil, err
		}
		if m.info, _, err = vdisk.DescribeChain(m.path, nil); err != nil {
			return nil, faultOf(err)
		}
		m.id = m.info.UUID
		if i := slices.IndexFunc(all, func(o member) bool { return o.id == m.id }); i >= 0 {
			return nil, hostapi.Faultf(hostapi.Fault_INVALID, "%s and %s are both disk %s: one is a copy; import it as a disk of its own instead, or take it out of %s", all[i].path, m.path, m.id, v.path)
		}
		var must bool
		var epoch uint64
		if b != nil {
			rec, ok := b.Disks[m.id]
			if !ok {
				return nil, foreignDisk(m.path, m.id, "the VM's encryption bundle")
			}
			must, epoch = rec.Encrypted, rec.Epoch
		} else if m.info.Encrypted {
			return nil, hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is encrypted but its VM is not: an encrypted disk belongs to an encrypted VM (E6); restore %s from a backup, or attach the disk to the VM it is from", m.path, v.path)
		}
		if v.expect != nil {
			e := known[m.id.String()]
			if e == nil {
				return nil, foreignDisk(m.path, m.id, "center's inventory")
			}
			delete(known, m.id.String())
			if !e.Converting {
				must, epoch = must || e.Encrypted, max(epoch, e.Epoch)
			}
		}
		m.want = vdisk.Expect{Encrypted: must, Epoch: epoch}
		m.recorded = epochOf(b, m.id)
		all = append(all, m)
	}
	for id, e := range known {
		if e.Optional {
			continue // center is adding or removing it
		}
		return nil, hostapi.Faultf(hostapi.Fault_TAMPERED, "%s has no disk %s, which center's inventory knows: restore the VMX from a backup", v.path, id)
	}
	return all, nil
}

func epochOf(b *keysafe.Bundle, disk uuid.UUID) uint64 {
	if b == nil {
		return 0
	}
	return b.Disks[disk].Epoch
}

func foreignDisk(path string, id uuid.UUID, who string) error {
	return hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is disk %s, which %s does not know: it was put in the place of another; restore that one, or attach this one as a new disk", path, id, who)
}

func (v *vm) openDisk(ctx context.Context, m member, readOnly bool) (*vdisk.Chain, error) {
	o := v.diskOptions(m)
	o.ReadOnly = readOnly
	d, err := vdisk.OpenChain(ctx, m.path, o)
	return d, faultOf(err)
}

func (v *vm) diskOptions(m member) vdisk.Options {
	return vdisk.Options{VM: v.id, UUID: m.id, KEKs: v, Expect: m.want, Live: v.live, Step: v.diskStep, Direct: v.direct, Log: v.log, Random: v.random}
}

func allocated(path string) int64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}
	return st.Blocks * 512
}

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// describe is Inspect after a change of ours.
func (v *vm) describe() (*hostapi.VMInfo, error) {
	info, err := Inspect(v.path)
	if err != nil {
		return nil, fmt.Errorf("reading back %s: %w", v.path, err)
	}
	return info, nil
}
