package vmx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/atomicfile"
	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
	"mortise/internal/vmfiles"
	"mortise/internal/vmxfile"
)

// Changing the encryption of the VM's files takes three steps: the new form of
// each file is written beside the old one, durably; one save of the VMX decides,
// for its bundle names the files' keys; the new forms take the old ones' places.
// A crash before the save leaves new forms that nothing needs, one after it new
// forms that settle puts in place. The suffix says which form a file has. All of
// it happens under the lock of the VMX, so that nobody settles what another is
// writing, and none of it while a guest, on whatever host, has the VM's disks.
const (
	newEncrypted = ".new-encrypted"
	newPlain     = ".new-plain"
)

// settle finishes, or undoes, a change of the VM's files that was interrupted.
func (v *vm) settle() error {
	return faultOf(vmxfile.Update(v.path, func(f *vmxfile.File) error {
		b, err := v.open(f)
		if err != nil {
			return err
		}
		defer b.Wipe()
		names, err := fileNames(f, v.path)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := v.settleFile(filepath.Join(filepath.Dir(v.path), name), b); err != nil {
				return err
			}
		}
		v.at("home.settled")
		return atomicfile.SyncDir(filepath.Dir(v.path))
	}))
}

// settleFile keeps of a file the form that the VMX on disk decided for; b is its
// bundle, nil when the VM is in clear. A form goes only when the other is proven.
func (v *vm) settleFile(path string, b *keysafe.Bundle) error {
	keep := func(suffix string, decided bool) error {
		if !exists(path + suffix) {
			return nil
		}
		v.at("home.settle" + suffix)
		if decided {
			return os.Rename(path+suffix, path)
		}
		return os.Remove(path + suffix)
	}
	if err := keep(newPlain, b == nil); err != nil {
		return err
	}
	if b == nil || !exists(path+newEncrypted) {
		return keep(newEncrypted, false)
	}
	key := b.Files[filepath.Base(path)]
	if key == nil {
		return hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is not one of the VM's encrypted files: it was put there; remove it, or restore it from a backup", path+newEncrypted)
	}
	failed := vmfiles.Verify(path+newEncrypted, key)
	if failed == nil {
		return keep(newEncrypted, true)
	}
	if err := vmfiles.Verify(path, key); err != nil {
		return fmt.Errorf("neither %s nor the file that was to replace it opens, and both were kept: restore one from a backup: %w", path, errors.Join(err, failed))
	}
	return keep(newEncrypted, false)
}

// replacing locks the VM's extents while its files are replaced: a guest of any
// host that has them open has the disks open too.
// Under a guest of this process they are locked already, and no file is open
// (checkLive).
func (v *vm) replacing(ctx context.Context, live map[uuid.UUID]*vdisk.Chain, change func() error) error {
	if live != nil {
		return change()
	}
	o, err := v.openAll(ctx)
	if err != nil {
		return err
	}
	return errors.Join(change(), o.closeDisks())
}

// changeHome encrypts the VM's files or gives them another KEK (shallow) or
// other keys altogether (deep).
func (v *vm) changeHome(ctx context.Context, kind hostapi.CryptoChange_Kind, to keysafe.KeyID, live map[uuid.UUID]*vdisk.Chain) error {
	f, err := loadVMX(v.path)
	if err != nil {
		return err
	}
	b, err := v.open(f)
	if err != nil {
		return err
	}
	defer b.Wipe()
	if b != nil {
		if ids := b.Safe().KeyIDs(); len(ids) == 1 && ids[0] == to {
			return v.settle() // an earlier call got here
		}
	}
	switch {
	case kind == hostapi.CryptoChange_ENCRYPT && b == nil:
		return v.replacing(ctx, live, func() error { return v.encryptHome(to) })
	case kind == hostapi.CryptoChange_ENCRYPT:
		return hostapi.Faultf(hostapi.Fault_INVALID, "%s is encrypted already, with key %s: use a shallow or deep recrypt to change the key", v.path, b.Safe().KeyIDs()[0])
	case kind == hostapi.CryptoChange_SHALLOW_RECRYPT:
		return v.rewrapHome(to)
	case kind == hostapi.CryptoChange_DEEP_RECRYPT:
		return v.replacing(ctx, live, func() error { return v.rekeyHome(to) })
	}
	return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "change %v of VM files is of a newer version: upgrade this host", kind)
}

// encryptHome makes a bundle, with a record of every disk as it is now.
func (v *vm) encryptHome(to keysafe.KeyID) error {
	return v.replaceFiles(func(f *vmxfile.File, _ *keysafe.Bundle) (*keysafe.Bundle, error) {
		b, err := v.newBundle(to)
		if err != nil {
			return nil, err
		}
		disks, err := v.members(f, nil)
		if err != nil {
			b.Wipe()
			return nil, err
		}
		for _, d := range disks {
			b.Disks[d.id] = keysafe.DiskRecord{Encrypted: d.info.Encrypted, Epoch: d.info.Epoch}
		}
		return b, nil
	})
}

// rekeyHome makes a new configuration key and new file keys.
func (v *vm) rekeyHome(to keysafe.KeyID) error {
	return v.replaceFiles(func(_ *vmxfile.File, old *keysafe.Bundle) (*keysafe.Bundle, error) {
		if old == nil {
			return nil, fmt.Errorf("%s: %w", v.path, keysafe.ErrNotEncrypted)
		}
		b, err := v.newBundle(to)
		if err != nil {
			return nil, err
		}
		for id, rec := range old.Disks {
			b.Disks[id] = rec
		}
		for name, s := range old.Secrets {
			if b.Secrets[name], err = s.Clone(); err != nil {
				b.Wipe()
				return nil, err
			}
		}
		b.Succeed(old)
		return b, nil
	})
}

// decryptHome takes the bundle away; checkChange has seen that no disk needs it.
func (v *vm) decryptHome(ctx context.Context, live map[uuid.UUID]*vdisk.Chain) error {
	f, err := loadVMX(v.path)
	if err != nil {
		return err
	}
	if !keysafe.IsEncrypted(f) {
		return v.settle()
	}
	return v.replacing(ctx, live, func() error { return v.replaceFiles(v.noBundle) })
}

func (v *vm) noBundle(f *vmxfile.File, old *keysafe.Bundle) (*keysafe.Bundle, error) {
	disks, err := v.members(f, old)
	if err != nil {
		return nil, err
	}
	for _, d := range disks {
		if d.info.Encrypted {
			return nil, hostapi.Faultf(hostapi.Fault_INVALID, "%s is still encrypted: decrypt it first (E6)", d.path)
		}
	}
	return nil, nil
}

func (v *vm) newBundle(to keysafe.KeyID) (*keysafe.Bundle, error) {
	kek, ok := v.KEK(to)
	if !ok {
		return nil, faultOf(&keysafe.KeysRequiredError{Required: []keysafe.KeyID{to}})
	}
	defer kek.Wipe()
	return keysafe.NewBundle(v.random, v.id, to, kek)
}

// replaceFiles changes the VM's files from the form of the bundle on disk to
// that of the one that next makes; nil is in clear.
func (v *vm) replaceFiles(next func(f *vmxfile.File, old *keysafe.Bundle) (*keysafe.Bundle, error)) error {
	err := vmxfile.Update(v.path, func(f *vmxfile.File) error {
		old, err := v.open(f)
		if err != nil {
			return err
		}
		defer old.Wipe()
		b, err := next(f, old)
		if err != nil {
			return err
		}
		defer b.Wipe()
		names, err := fileNames(f, v.path)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := v.writeForm(name, old, b); err != nil {
				return err
			}
		}
		v.at("home.written")
		if b == nil {
			keysafe.RemoveBundle(f)
			return nil
		}
		return b.Seal(v.random, f)
	})
	if err != nil {
		return faultOf(err)
	}
	v.at("home.decided")
	return v.settle()
}

// writeForm writes a file's new form beside it.
func (v *vm) writeForm(name string, old, next *keysafe.Bundle) error {
	path := filepath.Join(filepath.Dir(v.path), name)
	if !exists(path) {
		return nil
	}
	var from, to *secret.Key
	if old != nil {
		if from = old.Files[name]; from == nil {
			return hostapi.Faultf(hostapi.Fault_TAMPERED, "%s is not one of the VM's encrypted files: it was put there; remove it, or restore it from a backup", path)
		}
	}
	suffix := newPlain
	if next != nil {
		k, err := secret.Random(v.random, keysafe.DEKSize(keysafe.CipherXTS))
		if err != nil {
			return err
		}
		next.Files[name], to, suffix = k, k, newEncrypted
	}
	if err := vmfiles.Convert(path+suffix, to, path, from); err != nil {
		return fmt.Errorf("writing %s: %w", path+suffix, err)
	}
	v.at("home.form")
	return nil
}

// rewrapHome is the shallow recrypt of the bundle (R1): the new pair is added,
// what was saved is read back and proven to hold one key under both, and only
// then the old pair goes.
func (v *vm) rewrapHome(to keysafe.KeyID) error {
	rewrap := func(f *vmxfile.File, b *keysafe.Bundle) error { return b.Rewrap(v.random, v, to) }
	if err := v.edit(rewrap); err != nil {
		return err
	}
	v.at("home.both")
	return v.edit(func(f *vmxfile.File, b *keysafe.Bundle) error {
		if err := b.Safe().Prove(b.Binding(), v); err != nil {
			return err
		}
		return b.Keep(to)
	})
}
