package vdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// damagedSuffix is added to the name of a file that Repair has replaced.
const damagedSuffix = ".damaged"

// RepairOptions say what Repair may do.
type RepairOptions struct {
	Options
	// State lets a state file that is lost or damaged be made anew, as that of a disk
	// without a conversion. Only an administrator knows whether the extent is of the same
	// time as the kept copy that says so.
	State bool
	// DryRun finds out what would be done, and changes nothing.
	DryRun bool
}

// Repair restores the small files of an encrypted disk from the kept copy of its
// descriptor (see kept.go), and says what it did; nothing if all is well. The extent is
// not touched, and a conversion's boundary is never made up: when the state file of a disk
// that was being converted is lost, only a backup of the same time can say which form a
// sector has. What is replaced is kept under the suffix ".damaged".
//
// The copy is believed only if the caller's KEK opens its key safe for this VM and disk,
// the DEK proves the MACs of the copy and of the descriptor in it, its epoch is not
// older than o.Expect says, and the state file, if it can be read, is of the same DEK. So
// a copy of another disk, another VM or an older key is refused, with the same errors as
// such a descriptor.
func Repair(ctx context.Context, path string, o RepairOptions) (done []string, err error) {
	o.Options = o.withDefaults()
	o.ReadOnly, o.link = true, true
	whole, err := Open(ctx, path, o.Options)
	if err == nil {
		err = errors.Join(o.clearedBehind(whole), whole.Close())
	}
	switch {
	case err == nil:
		return nil, nil
	case errors.Is(err, ErrInUse), errors.Is(err, ErrKeysRequired), errors.Is(err, ErrConverting), ctx.Err() != nil:
		return nil, err // no damage
	}
	broken := err
	k, err := loadKept(o.fs, path)
	if err != nil {
		return nil, keptError(path, err, broken)
	}
	name, err := extentName(path, k.desc)
	if err != nil {
		return nil, err
	}
	if own := vmdk.FlatName(path); name != own && name != vmdk.DeltaName(path) {
		return nil, &Error{Kind: ErrTampered, File: keptName(path), Why: fmt.Sprintf("it is the copy of a disk whose extent is %s, and this one's is %s", filepath.Base(name), filepath.Base(own)), Fix: "restore the descriptor from a backup; " + untouched}
	}
	f, err := openLocked(o.fs, name, true, 0)
	if err != nil {
		return nil, err
	}
	d := &Disk{path: path, opts: o.Options, size: k.desc.Size(), text: k.text, desc: k.desc, ext: &extent{name: name, f: f}}
	defer func() { err = errors.Join(err, d.Close()) }()

	if err := d.proveKept(k); err != nil {
		return nil, err
	}
	now, rerr := o.fs.ReadFile(path, vmdk.MaxText)
	if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return nil, descriptorError(path, rerr)
	}
	same := bytes.Equal(now, k.text)
	if !same && d.newer(now, k) {
		return nil, &Error{Kind: ErrStale, File: keptName(path), Why: "the descriptor is whole and newer than its copy: what is wrong is something else", Cause: broken, Fix: "restore what that names from a backup"}
	}
	fresh, err := d.repairState(k, o, &done)
	if err != nil {
		return nil, err
	}
	if !same {
		done = append(done, path+": restored from "+filepath.Base(keptName(path)))
	}
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if st.size < d.end() {
		return nil, &Error{Kind: ErrShort, File: name, Why: fmt.Sprintf("%d bytes, the disk has %d", st.size, d.end()), Fix: "restore the extent from a backup"}
	}
	if o.DryRun {
		return done, nil
	}
	return done, d.repair(fresh, now, same)
}

// clearedBehind says whether a disk that opens in clear has a copy that says that it is
// encrypted. A decryption marks the copy before it begins, and removes it at its end.
func (o RepairOptions) clearedBehind(d *Disk) error {
	if _, encrypted := d.desc.Encryption(); encrypted || o.KEKs == nil {
		return nil
	}
	if k, err := loadKept(o.fs, d.path); err != nil || !k.steady {
		return nil
	}
	return &Error{Kind: ErrTampered, File: d.path, Why: "it says that the disk is in clear, and its kept copy that it is encrypted"}
}

// repair writes what is to be replaced: the state before the descriptor that depends on
// it.
func (d *Disk) repair(fresh *state, old []byte, same bool) error {
	if fresh != nil {
		if err := setAside(d.opts.fs, d.stateName()); err != nil {
			return err
		}
		sf, err := createState(d.opts.fs, d.at, d.stateName(), fresh, d.key.mac(), nil)
		if err != nil {
			return fmt.Errorf("repairing a state file: %w", err)
		}
		if err := errors.Join(sf.f.Close(), d.opts.fs.SyncDir(d.dir())); err != nil {
			return fmt.Errorf("repairing a state file: %w", err)
		}
		d.at("repair.state")
	}
	if same {
		return nil
	}
	if old != nil {
		if err := d.opts.fs.ReplaceFile(d.path+damagedSuffix, old); err != nil {
			return fmt.Errorf("keeping the damaged descriptor: %w", err)
		}
	}
	if err := d.opts.fs.ReplaceFile(d.path, d.text); err != nil {
		return fmt.Errorf("repairing a descriptor: %w", err)
	}
	d.at("repair.descriptor")
	return nil
}

// setAside copies a file under another name; a file that is not there is fine.
func setAside(fsys fsys, name string) error {
	b, err := fsys.ReadFile(name, stateKeep)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = fsys.ReplaceFile(name+damagedSuffix, b)
	}
	if err != nil {
		return fmt.Errorf("keeping the damaged %s: %w", filepath.Base(name), err)
	}
	return nil
}

// stateKeep bounds what of a damaged state file is kept, in bytes.
const stateKeep = 64 << 20

// proveKept opens the copy's key safes and checks its MACs; d.key and d.next are then
// those of the copy.
func (d *Disk) proveKept(k *kept) error {
	name := keptName(d.path)
	enc, _ := k.desc.Encryption()
	switch {
	case d.opts.VM == uuid.Nil || d.opts.KEKs == nil:
		return &Error{Kind: ErrKeysRequired, File: name, Why: "the copy is believed only with a key that proves it", Fix: "give the VM and its key"}
	case d.opts.UUID != uuid.Nil && d.opts.UUID != k.desc.UUID():
		return &Error{Kind: ErrTampered, File: name, Why: fmt.Sprintf("it is of disk %s, and disk %s should be here", k.desc.UUID(), d.opts.UUID), Fix: untouched}
	case enc.Epoch < d.opts.Expect.Epoch:
		return &Error{Kind: ErrStale, File: name, Why: fmt.Sprintf("its key is of epoch %d, and the VM's record says %d", enc.Epoch, d.opts.Expect.Epoch), Fix: "restore the descriptor from a backup; " + untouched}
	}
	open := func(safe keysafe.Safe, entry string) (*dataKey, error) {
		dek, _, err := safe.Unwrap(binding(d.opts.VM, k.desc.UUID()), d.opts.KEKs)
		if err != nil {
			return nil, unwrapError(name, entry, err)
		}
		return expand(dek)
	}
	var err error
	if d.key, err = open(enc.KeySafe, "encryption.keySafe"); err != nil {
		return err
	}
	newest := d.key
	if !enc.Target.Empty() {
		if d.next, err = open(enc.Target, "encryption.keySafe.target"); err != nil {
			return err
		}
		newest = d.next
	}
	wrote, err := k.verify(newest)
	if err != nil {
		return err
	}
	if err := k.desc.Verify(newest.descriptor); err != nil || !wrote {
		return &Error{Kind: ErrTampered, File: name, Why: "the copy itself was edited or damaged", Cause: err, Fix: "restore the descriptor from a backup; " + untouched}
	}
	return nil
}

// newer says whether text is a whole descriptor of this disk of a later generation than
// the copy.
func (d *Disk) newer(text []byte, k *kept) bool {
	desc, err := vmdk.Parse(d.path, text)
	if err != nil || desc.UUID() != k.desc.UUID() {
		return false
	}
	now, encrypted := desc.Encryption()
	was, _ := k.desc.Encryption()
	if !encrypted || now.Generation <= was.Generation {
		return false
	}
	for _, safe := range []keysafe.Safe{now.Target, now.KeySafe} {
		if safe.Empty() {
			continue
		}
		dek, _, err := safe.Unwrap(binding(d.opts.VM, desc.UUID()), d.opts.KEKs)
		if err != nil {
			return false
		}
		key, err := expand(dek)
		if err != nil {
			return false
		}
		defer key.wipe()
		return desc.Verify(key.descriptor) == nil
	}
	return false
}

// repairState checks that the state file fits to the copy, and returns the one to write
// if it is lost or damaged and may be made anew.
func (d *Disk) repairState(k *kept, o RepairOptions, done *[]string) (*state, error) {
	enc, _ := k.desc.Encryption()
	sf, err := openState(o.fs, d.at, d.stateName(), false)
	if err == nil {
		d.state = sf
		if err = d.matchState(enc); err == nil {
			return nil, nil
		}
		// Of a key that the copy does not have: the copy is what is old.
		if s := sf.cur.Load(); s.check != d.key.id() && s.targetCheck != d.key.id() {
			return nil, &Error{Kind: ErrStale, File: keptName(d.path), Why: "the copy is of another key than the extent has", Cause: err, Fix: "restore the descriptor from a backup; " + untouched}
		}
	} else if err = stateError(d.stateName(), err); errors.Is(err, ErrUnsupported) {
		return nil, err
	}
	lost := func(why, fix string) error {
		return &Error{Kind: ErrState, File: d.stateName(), Why: why, Cause: err, Fix: fix}
	}
	const backup = "restore the state file from a backup of the same time as the extent; "
	switch {
	case k.desc.IsDelta():
		return nil, lost("it is damaged, and has the only list of what the snapshot link holds", backup+untouched)
	case !k.steady:
		return nil, lost("it is damaged, and a conversion was under way: nothing else says how far it came", backup+untouched)
	case !o.State:
		return nil, lost("it is damaged; the kept copy says that no conversion was under way", "if the extent is of the same time as the copy, let it be made anew (--rebuild-state); else "+backup+untouched)
	}
	s := &state{disk: d.desc.UUID(), size: d.size, epoch: enc.Epoch, check: d.key.check}
	if sf != nil {
		s.opens = sf.cur.Load().opens
		s.seq = sf.cur.Load().seq
	}
	*done = append(*done, d.stateName()+": made anew, without a conversion")
	return s, nil
}

func keptError(path string, err, broken error) error {
	why := "there is no kept copy of the descriptor to repair it from"
	if !errors.Is(err, os.ErrNotExist) {
		why = "the kept copy of the descriptor cannot be used: " + err.Error()
	}
	return &Error{Kind: ErrMissing, File: keptName(path), Why: why, Cause: broken, Fix: "restore what is damaged from a backup; " + untouched}
}
