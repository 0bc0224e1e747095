package vdisk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// A Spec says what Create makes.
type Spec struct {
	Size    int64         // bytes, a multiple of SectorSize
	VM      uuid.UUID     // the VM that the disk belongs to; needed with a Key
	UUID    uuid.UUID     // its identity, ddb.uuid; zero: a new one
	Adapter string        // ddb.adapterType; "": lsilogic
	Key     keysafe.KeyID // the KEK that wraps the disk's DEK; zero: a disk in clear
	KEKs    keysafe.KEKs  // has Key
	Epoch   uint64        // of the DEK; 0: 1
	Thick   bool          // its whole space is allocated now, and stays so
	Random  io.Reader     // of keys and nonces; nil: crypto/rand

	parent    string // of a snapshot link: what its descriptor calls the parent
	parentCID uint32
	opens     uint64 // 0: what a crash leaves of it may be removed

	fs fsys
	at func(string)
}

// Create makes a disk, thin unless s.Thick, whose descriptor is path, which must end
// in .vmdk and must not exist. Everything is durable when it returns. The descriptor
// is written last: after a crash there is a whole disk, or none and Create can be
// called again. A thick disk for which there is no space (ENOSPC), or whose storage
// cannot reserve any (ErrUnsupported), is refused and leaves nothing.
func Create(ctx context.Context, path string, s Spec) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	o := Options{fs: s.fs, at: s.at}.withDefaults()
	if filepath.Ext(path) != ".vmdk" || vmdk.IsExtentName(filepath.Base(path)) {
		return fmt.Errorf("creating a disk: %s is no name of a descriptor: it ends in .vmdk, and not as an extent's", path)
	}
	if s.UUID == uuid.Nil {
		s.UUID = uuid.New()
	}
	delta := s.parent != ""
	cid, name := s.UUID, vmdk.FlatName(path)
	if delta {
		cid, name = uuid.New(), vmdk.DeltaName(path) // the links of a disk have one UUID
	}
	desc, err := vmdk.New(path, vmdk.Spec{
		Size: s.Size, UUID: s.UUID, CID: binary.LittleEndian.Uint32(cid[12:]) &^ 1, // any but NoParent
		Extent: filepath.Base(name), Adapter: s.Adapter, Thin: !s.Thick, Parent: s.parent, ParentCID: s.parentCID,
	})
	if err != nil {
		return fmt.Errorf("creating a disk: %w", err)
	}
	var key *dataKey
	if s.Key != (keysafe.KeyID{}) {
		if key, err = newDataKey(s.Random); err != nil {
			return err
		}
		defer key.wipe()
		if err := sealNew(desc, s, key); err != nil {
			return fmt.Errorf("creating %s: %w", path, err)
		}
	}

	if err := vacant(o.fs, path); err != nil {
		return err
	}
	f, err := o.fs.Open(name, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return fmt.Errorf("creating an extent: %w", err)
	}
	defer f.Close()
	if err := lock(o.fs, name, f, true); err != nil {
		return err
	}
	if err := errors.Join(vacant(o.fs, path), empty(name, f)); err != nil {
		return err
	}
	defer func() { // nothing of value has these names
		if err != nil {
			err = errors.Join(err, removeAll(o.fs, path, name+stateSuffix, name))
		}
	}()
	length := s.Size
	if key != nil || delta {
		length = roundUp(s.Size, UnitSize)
	}
	// What a crash has left may be longer, or have space that this one does not want.
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("creating an extent: %w", err)
	}
	if s.Thick {
		err = allocate(o.fs, name, f, length, length)
	} else {
		err = f.Truncate(length)
	}
	if err != nil {
		return fmt.Errorf("creating an extent: %w", err)
	}
	o.at("create.sized")
	if err := f.Sync(); err != nil {
		return fmt.Errorf("creating an extent: %w", err)
	}
	o.at("create.extent")
	if key != nil || delta {
		st := &state{disk: s.UUID, size: s.Size, delta: delta, opens: s.opens, check: key.id()}
		if key != nil {
			st.epoch = max(s.Epoch, 1)
		}
		sf, err := createState(o.fs, o.at, name+stateSuffix, st, key.mac(), nil)
		if err != nil {
			return fmt.Errorf("creating a state file: %w", err)
		}
		if err := sf.f.Close(); err != nil {
			return fmt.Errorf("creating a state file: %w", err)
		}
	}
	// The descriptor must not outlive a power cut without what it names.
	if err := o.fs.SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("creating a disk: %w", err)
	}
	o.at("create.descriptor")
	if err := o.fs.ReplaceFile(path, desc.Bytes()); err != nil {
		return fmt.Errorf("creating a disk descriptor: %w", err)
	}
	o.at("create.durable")
	return nil
}

// sealNew makes the descriptor that of a disk encrypted with key.
func sealNew(desc *vmdk.Descriptor, s Spec, key *dataKey) error {
	if s.VM == uuid.Nil || s.KEKs == nil {
		return errors.New("an encrypted disk needs a VM and its keys")
	}
	kek, ok := s.KEKs.KEK(s.Key)
	if !ok {
		return &Error{Kind: ErrKeysRequired, File: desc.Name(), Cause: &keysafe.KeysRequiredError{Required: []keysafe.KeyID{s.Key}}}
	}
	defer kek.Wipe()
	safe, err := keysafe.Wrap(s.Random, binding(s.VM, s.UUID), s.Key, kek, key.dek)
	if err != nil {
		return err
	}
	if err := recordVM(desc, s.VM); err != nil {
		return err
	}
	return desc.Seal(vmdk.Encryption{KeySafe: safe, Cipher: keysafe.CipherXTS, UnitSize: UnitSize, Epoch: max(s.Epoch, 1), Generation: 1}, key.descriptor)
}

// vacant refuses a name that a descriptor has.
func vacant(fsys fsys, path string) error {
	_, err := fsys.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("creating a disk: %w", err)
	}
	return &Error{Kind: ErrExists, File: path, Fix: "choose another name, or delete the disk first"}
}

// empty refuses an extent that has data. One that is a single hole was left by a
// crash in Create, or has just been made.
func empty(name string, f file) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	data, err := f.NextData(0)
	if err != nil {
		return err
	}
	if data < st.size {
		return &Error{Kind: ErrExists, File: name, Why: "an extent with data is here, without a descriptor", Fix: "restore its descriptor, or move it away"}
	}
	return nil
}

// removeAll removes files; those that are not there are fine.
func removeAll(fsys fsys, names ...string) error {
	for _, n := range names {
		if err := fsys.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Delete deletes a disk, or one snapshot link, that nobody uses and that no link
// of its folder stands on: first the descriptor, without which the
// rest is only ciphertext. The KEK stays with its provider (rule K9). Files that
// are not there are fine.
func Delete(ctx context.Context, path string) error { return deleteIn(ctx, osFS{}, path) }

func deleteIn(ctx context.Context, fsys fsys, path string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	name := vmdk.FlatName(path)
	if _, desc, err := loadDescriptor(fsys, path); err == nil {
		if name, err = extentName(path, desc); err != nil {
			return err
		}
	} else if _, err := fsys.Stat(vmdk.DeltaName(path)); err == nil {
		name = vmdk.DeltaName(path)
	}
	f, err := openLocked(fsys, name, true, 0)
	if err == nil {
		defer f.Close()
	} else if !errors.Is(err, ErrMissing) {
		return err
	}
	// Whoever puts a link on this one holds its lock shared meanwhile.
	if _, desc, err := loadDescriptor(fsys, path); err == nil && desc.Sealed() == sealedForClones {
		return &Error{Kind: ErrSealed, File: path, Why: sealedForClones, Fix: "delete the linked clones, and then its files by hand"}
	}
	if kids, err := children(fsys, path, true); err != nil {
		return err
	} else if len(kids) > 0 {
		return &Error{Kind: ErrChildren, File: path, Why: fmt.Sprintf("snapshot link %s stands on it", filepath.Base(kids[0].Name())), Fix: "delete that first, or consolidate it"}
	}
	for _, names := range [][]string{{path}, {name + stateSuffix, name, keptName(path)}} {
		if err := errors.Join(removeAll(fsys, names...), fsys.SyncDir(filepath.Dir(path))); err != nil {
			return fmt.Errorf("deleting a disk: %w", err)
		}
	}
	return nil
}
