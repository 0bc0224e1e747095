package vdisk

import (
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/vmdk"
)

// Files is what each of a disk's small files says by itself, damaged ones included,
// without a key and so without proof.
type Files struct {
	Descriptor DescriptorInfo
	Kept       DescriptorInfo // the copy for Repair
	State      StateInfo
}

// A DescriptorInfo is what a descriptor says, or why it does not.
type DescriptorInfo struct {
	Err        error
	UUID, VM   uuid.UUID
	Encrypted  bool
	Encryption vmdk.Encryption
	Steady     bool // of a kept copy: the extent had one form only when it was written
}

// A StateInfo is what the newest slot of a state file says, or why none does.
type StateInfo struct {
	Err                error
	UUID               uuid.UUID
	Size               int64 // of the disk, bytes
	Sequence, Opened   uint64
	Epoch, TargetEpoch uint64 // 0: in clear, or no conversion
	Conversion         Conversion
	Back               bool
	Boundary, HotZone  int64 // bytes
}

// DescribeFiles reads the small files of the disk whose descriptor is, or should be, at
// path. Like [Describe] it takes no lock.
func DescribeFiles(path string) (f Files, err error) {
	fsys := osFS{}
	name := vmdk.FlatName(path)
	if _, desc, err := loadDescriptor(fsys, path); err != nil {
		f.Descriptor.Err = err
	} else {
		f.Descriptor = describeDescriptor(desc)
		if n, err := extentName(path, desc); err != nil {
			f.Descriptor.Err = err
		} else {
			name = n
		}
	}
	k, err := loadKept(fsys, path)
	if err != nil {
		f.Kept.Err = &Error{Kind: ErrMissing, File: keptName(path), Why: "there is none, or it is damaged", Cause: err}
	} else {
		f.Kept = describeDescriptor(k.desc)
		f.Kept.Steady = k.steady
		if f.Descriptor.Err != nil && k.desc.IsDelta() {
			name = vmdk.DeltaName(path)
		}
	}
	sf, err := openState(fsys, nil, name+stateSuffix, false)
	if err != nil {
		f.State.Err = stateError(filepath.Clean(name+stateSuffix), err)
		return f, nil
	}
	s := sf.cur.Load()
	f.State = StateInfo{UUID: s.disk, Size: s.size, Sequence: s.seq, Opened: s.opens, Epoch: s.epoch, TargetEpoch: s.targetEpoch,
		Conversion: s.kind, Back: s.back, Boundary: s.boundary, HotZone: s.hotLen}
	return f, sf.f.Close()
}

func describeDescriptor(desc *vmdk.Descriptor) DescriptorInfo {
	d := DescriptorInfo{UUID: desc.UUID(), VM: recordedVM(desc)}
	d.Encryption, d.Encrypted = desc.Encryption()
	return d
}
