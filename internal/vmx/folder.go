package vmx

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
	"mortise/internal/vmdk"
	"mortise/internal/vmfiles"
	"mortise/internal/vmxfile"
)

// Inspect reads a VM's folder. It needs no key, takes no lock and changes
// nothing; what it says of encryption is what the files claim, and is proven only
// when the VM is opened.
func Inspect(path string) (*hostapi.VMInfo, error) {
	f, err := loadVMX(path)
	if err != nil {
		return nil, err
	}
	id, err := vmUUID(f)
	if err != nil {
		return nil, err
	}
	info := &hostapi.VMInfo{Ref: &hostapi.VMRef{Uuid: id.String()}, Name: f.String("displayName", baseName(path))}
	if info.Hardware, err = readHardware(f); err != nil {
		return nil, faultOf(err)
	}
	switch safe, err := keysafe.ReadSafe(f); {
	case err == nil:
		info.Encrypted = true
		info.Key = keyID(safe)
		n, err := f.Int(keysafe.GenerationEntry, 0)
		if err != nil {
			info.Problems = append(info.Problems, err.Error())
		}
		info.Epoch = uint64(max(n, 0))
	case errors.Is(err, keysafe.ErrNotEncrypted):
	case errors.As(err, new(*keysafe.ForeignError)):
		return nil, faultOf(err) // I6: only VMware's products open it
	default:
		info.Encrypted = true
		info.Problems = append(info.Problems, err.Error())
	}
	slots, err := diskSlots(f)
	if err != nil {
		return nil, faultOf(err)
	}
	for _, s := range slots {
		info.Disks = append(info.Disks, inspectDisk(path, s))
	}
	if err := inspectSnapshots(path, slots, info); err != nil {
		info.Problems = append(info.Problems, err.Error())
	}
	info.SizeBytes = folderSize(filepath.Dir(path))
	return info, nil
}

func inspectDisk(vmxPath string, s slot) *hostapi.DiskInfo {
	path, err := diskPath(vmxPath, s.file)
	if err != nil {
		return &hostapi.DiskInfo{Key: s.key, Path: s.file, Controller: s.controller, Problem: err.Error()}
	}
	d := InspectDisk(path)
	d.Key, d.Path, d.Controller = s.key, s.file, s.controller
	return d
}

// InspectDisk reads a disk's files as Inspect reads a VM's; what is wrong with
// them is in Problem. The epoch is the lowest of all links, those of other branches
// too: what may be expected of the disk whatever snapshot it goes back to.
func InspectDisk(path string) *hostapi.DiskInfo {
	d := &hostapi.DiskInfo{}
	info, _, err := vdisk.DescribeChain(path, nil)
	if err != nil {
		d.Problem = err.Error()
		return d
	}
	d.Uuid, d.CapacityBytes, d.AllocatedBytes = info.UUID.String(), info.Size, info.Allocated
	d.Encrypted, d.Epoch, d.Cipher, d.Thick = info.Encrypted, info.Epoch, info.Cipher, info.Thick
	links, err := diskLinks(path)
	if err != nil {
		d.Problem = err.Error()
	}
	for _, l := range links {
		if l.Encrypted && l.Epoch < d.Epoch {
			d.Epoch = l.Epoch
		}
	}
	d.KeyId = lastKey(info.Keys)
	if info.Conversion != vdisk.NotConverting {
		d.Conversion, d.BoundaryBytes = info.Conversion.String(), info.Boundary
		d.TargetKeyId, d.Back = lastKey(info.TargetKeys), info.Back
	}
	return d
}

// RequiredKeys lists the KEKs that open the VM, with all that its snapshots keep:
// for each key safe, first that of the VMX, the KEKs of which any one will do.
func RequiredKeys(path string) (safes [][]keysafe.KeyID, err error) {
	f, err := loadVMX(path)
	if err != nil {
		return nil, err
	}
	add := func(ids []keysafe.KeyID) {
		if len(ids) > 0 {
			safes = append(safes, ids)
		}
	}
	switch safe, err := keysafe.ReadSafe(f); {
	case err == nil:
		add(safe.KeyIDs())
	case !errors.Is(err, keysafe.ErrNotEncrypted):
		return nil, faultOf(err)
	}
	slots, err := diskSlots(f)
	if err != nil {
		return nil, faultOf(err)
	}
	for _, s := range slots {
		p, err := diskPath(path, s.file)
		if err != nil {
			return nil, err
		}
		links, _ := diskLinks(p) // opening it says what is wrong
		for _, l := range links {
			add(l.Keys)
			add(l.TargetKeys)
		}
	}
	return safes, nil
}

// diskLinks describes every link of the disk whose top is at path, those of other
// branches too. With an error it returns those that can be read.
func diskLinks(path string) ([]vdisk.Info, error) {
	top, chain, err := vdisk.DescribeChain(path, nil)
	if err != nil {
		return nil, err
	}
	all, err := vdisk.DescribeFolder(filepath.Dir(path))
	return append(chain, slices.DeleteFunc(all, func(i vdisk.Info) bool {
		// A base is in the chain: another one with its UUID is a copy.
		return i.UUID != top.UUID || i.UUID == uuid.Nil || i.Parent == "" || slices.ContainsFunc(chain, func(l vdisk.Info) bool { return l.Path == i.Path })
	})...), err
}

// Unreadable says whether something in the folder could not be read, so that
// what the VM needs is not known whole.
func Unreadable(info *hostapi.VMInfo) bool {
	return len(info.Problems) > 0 || slices.ContainsFunc(info.Disks, func(d *hostapi.DiskInfo) bool { return d.Problem != "" })
}

// Delete removes the files of a VM that is powered off: its VMX last, so that
// what an interrupted call leaves can be deleted again. Files that are not the
// VM's stay and are named. A disk that another process has open is refused, and a
// folder that holds another VM than the one meant.
func Delete(path, vm string) (left []string, err error) {
	f, err := loadVMX(path)
	if err != nil {
		return nil, err
	}
	if id, err := vmUUID(f); err != nil {
		return nil, err
	} else if id.String() != vm {
		return nil, hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is of VM %s, not of %s, which was to be deleted: nothing was removed", path, id, vm)
	}
	dir := filepath.Dir(path)
	slots, err := diskSlots(f)
	if err != nil {
		return nil, faultOf(err)
	}
	for _, s := range slots {
		p, err := diskPath(path, s.file)
		if err != nil {
			return nil, err
		}
		if err := deleteDisk(p); err != nil {
			return nil, err
		}
	}
	names, err := fileNames(f, path)
	if err != nil {
		return nil, err
	}
	base := baseName(path)
	mine := []string{base + ".vmsd", "vmware.log", filepath.Base(path) + vmxfile.LockSuffix}
	for _, n := range names {
		if n == nvramName(f, path) || strings.HasPrefix(n, base) {
			mine = append(mine, n, n+newEncrypted, n+newPlain)
		}
	}
	for _, n := range append(mine, filepath.Base(path)) {
		if err := os.Remove(filepath.Join(dir, n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	rest, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range rest {
		left = append(left, e.Name())
	}
	if len(left) == 0 {
		return nil, os.Remove(dir)
	}
	return left, nil
}

// deleteDisk deletes a disk with every link of it: one that nothing stands on, then
// the next.
func deleteDisk(path string) error {
	links, err := diskLinks(path)
	if err != nil { // it is damaged, or deleted in part: its links have its name
		if links, err = namesakes(path); err != nil {
			return err
		}
	}
	if i := slices.IndexFunc(links, vdisk.Info.Cloned); i >= 0 {
		return hostapi.Faultf(hostapi.Fault_IN_USE, "linked clones stand on %s: delete them first, and then the files of this disk by hand", links[i].Path)
	}
	for len(links) > 0 {
		leaf := slices.IndexFunc(links, func(l vdisk.Info) bool {
			return !slices.ContainsFunc(links, func(o vdisk.Info) bool { return o.Parent == filepath.Base(l.Path) })
		})
		if leaf < 0 {
			return hostapi.Faultf(hostapi.Fault_TAMPERED, "the snapshot links of %s stand on each other in a circle: delete its files by hand", path)
		}
		if err := vdisk.Delete(context.Background(), links[leaf].Path); err != nil && !errors.Is(err, vdisk.ErrMissing) {
			return faultOf(err)
		}
		links = slices.Delete(links, leaf, leaf+1)
	}
	return nil
}

// namesakes are the disk at path and the links that by their names are of the same
// disk.
func namesakes(path string) ([]vdisk.Info, error) {
	all, err := vdisk.DescribeFolder(filepath.Dir(path))
	if all == nil && err != nil {
		return nil, err
	}
	base := path
	if of, _, ok := vmdk.ParseLinkName(path); ok {
		base = of
	}
	links := slices.DeleteFunc(all, func(i vdisk.Info) bool {
		of, _, ok := vmdk.ParseLinkName(i.Path)
		return i.Path != base && (!ok || of != base || i.Parent == "")
	})
	if !slices.ContainsFunc(links, func(i vdisk.Info) bool { return i.Path == path }) {
		links = append(links, vdisk.Info{Path: path})
	}
	return links, nil
}

func loadVMX(path string) (*vmxfile.File, error) {
	f, err := vmxfile.Load(path)
	if err != nil {
		return nil, faultOf(err)
	}
	return f, nil
}

// diskPath is where a VMX's disk is. Disks stand in the VM's folder: a VMX from
// elsewhere must not make a vmx open a file of another VM.
func diskPath(vmxPath, file string) (string, error) {
	if file != filepath.Base(file) || file == "." || file == ".." {
		return "", hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "%s: disk %q is not in the VM's folder: move it there, or import it with 'mortise vm import'", vmxPath, file)
	}
	return filepath.Join(filepath.Dir(vmxPath), file), nil
}

func baseName(path string) string { return strings.TrimSuffix(filepath.Base(path), ".vmx") }

// nvramName is the file of the firmware's variables, in the VM's folder.
func nvramName(f *vmxfile.File, path string) string {
	if name := f.String("nvram", ""); name == filepath.Base(name) && vmfiles.Encrypted(name) {
		return name
	}
	return baseName(path) + ".nvram"
}

// fileNames lists the VM's files, besides disks, that hold guest data (E1):
// those that are in its folder, in whatever form.
func fileNames(f *vmxfile.File, path string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	names := []string{nvramName(f, path)}
	for _, e := range entries {
		n := strings.TrimSuffix(strings.TrimSuffix(e.Name(), newEncrypted), newPlain)
		if vmfiles.Encrypted(n) && !strings.HasPrefix(n, ".") && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names, nil
}

func folderSize(dir string) (n int64) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		n += allocated(filepath.Join(dir, e.Name()))
	}
	return n
}

func keyID(s keysafe.Safe) *hostapi.KeyID { return lastKey(s.KeyIDs()) }

// lastKey is the KEK that counts: during a shallow recrypt the new one is last.
func lastKey(ids []keysafe.KeyID) *hostapi.KeyID {
	if len(ids) == 0 {
		return nil
	}
	id := ids[len(ids)-1]
	return &hostapi.KeyID{Provider: id.Provider, Key: id.Key}
}

func fromWire(id *hostapi.KeyID) keysafe.KeyID {
	return keysafe.KeyID{Provider: id.GetProvider(), Key: id.GetKey()}
}

func parseUUID(what, s string) (uuid.UUID, error) {
	u, err := uuid.Parse(s)
	if err != nil || len(s) != 36 || u == uuid.Nil {
		return uuid.Nil, hostapi.Faultf(hostapi.Fault_INVALID, "%s: %q is no UUID", what, s)
	}
	return u, nil
}

// faultOf gives an error of the lower packages its kind on the wire.
func faultOf(err error) error {
	if err == nil || errors.As(err, new(*hostapi.FaultError)) {
		return err
	}
	fault := &hostapi.Fault{}
	var keys *keysafe.KeysRequiredError
	var file *vdisk.Error
	if errors.As(err, &file) {
		fault.File = file.File
	}
	switch {
	case errors.As(err, &keys):
		fault.Kind = hostapi.Fault_MISSING_KEYS
		for _, id := range keys.Required {
			fault.Missing = append(fault.Missing, &hostapi.KeyID{Provider: id.Provider, Key: id.Key})
		}
	case errors.Is(err, vdisk.ErrInUse):
		fault.Kind = hostapi.Fault_IN_USE
	case errors.Is(err, os.ErrNotExist), errors.Is(err, vdisk.ErrMissing):
		fault.Kind = hostapi.Fault_NOT_FOUND
	case errors.Is(err, vdisk.ErrExists):
		fault.Kind = hostapi.Fault_EXISTS
	case isNoSpace(err):
		fault.Kind = hostapi.Fault_NO_SPACE
	case errors.As(err, new(*keysafe.ForeignError)), errors.Is(err, vdisk.ErrUnsupported):
		fault.Kind = hostapi.Fault_NOT_SUPPORTED
	case errors.As(err, new(*keysafe.TamperedError)), errors.As(err, new(*keysafe.MissingError)), errors.As(err, new(*keysafe.StaleError)),
		errors.Is(err, vdisk.ErrTampered), errors.Is(err, vdisk.ErrNotEncrypted), errors.Is(err, vdisk.ErrStale), errors.Is(err, vdisk.ErrState), errors.Is(err, vdisk.ErrShort):
		fault.Kind = hostapi.Fault_TAMPERED
	case errors.As(err, new(*vmxfile.Error)):
		fault.Kind = hostapi.Fault_INVALID
	}
	return &hostapi.FaultError{Fault: fault, Err: err}
}
