package vdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/vmdk"
)

// Open opens the disk whose descriptor is at path.
//
// It takes the extent's lock, checks that descriptor, state file and extent
// belong together and are what o expects, finishes what a crash has left
// half-done, and returns a disk that is ready for requests. A conversion that was
// interrupted is not continued before [Disk.Resume], but the disk works as it is.
//
// Errors are *Error of the kinds ErrInUse, ErrMissing, ErrShort, ErrUnsupported,
// ErrNotEncrypted, ErrStale, ErrTampered, ErrState, ErrKeysRequired and, when
// only reading, ErrConverting; or those of the file system. None of them has
// changed anything.
func Open(ctx context.Context, path string, o Options) (*Disk, error) {
	d, err := inspect(ctx, path, o)
	if err != nil {
		return nil, err
	}
	if err := d.ready(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// inspect is the part of Open that changes nothing.
func inspect(ctx context.Context, path string, o Options) (_ *Disk, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d := &Disk{path: path, opts: o.withDefaults()}
	defer func() {
		if err != nil && d.ext != nil {
			d.Close()
		}
	}()
	if err := d.lockExtent(); err != nil {
		return nil, err
	}
	if !o.ReadOnly {
		// A predecessor that was killed may have seen a rename that is not yet
		// durable; what is done from here on must not outlive it.
		if err := d.opts.fs.SyncDir(d.dir()); err != nil {
			return nil, fmt.Errorf("opening a disk: %w", err)
		}
	}
	if o.UUID != uuid.Nil && o.UUID != d.desc.UUID() {
		return nil, &Error{Kind: ErrTampered, File: path, Why: fmt.Sprintf("it describes disk %s, and disk %s should be here", d.desc.UUID(), o.UUID), Fix: "attach the right disk, or restore this descriptor from a backup"}
	}
	need := d.size
	if _, encrypted := d.desc.Encryption(); encrypted {
		err, need = d.openEncrypted(), d.end()
	} else if d.desc.IsDelta() {
		err = d.openClearDelta()
	} else {
		err = d.openClear()
	}
	if err != nil {
		return nil, err
	}
	if st, err := d.ext.f.Stat(); err != nil {
		return nil, fmt.Errorf("opening a disk: %w", err)
	} else if st.size < need {
		return nil, &Error{Kind: ErrShort, File: d.ext.name, Why: fmt.Sprintf("%d bytes, the disk has %d", st.size, need), Fix: "restore the extent from a backup"}
	}
	return d, nil
}

// ready is the part of Open that finishes what a crash has left half-done and
// counts the opening.
func (d *Disk) ready() error {
	defer d.setForm()
	if d.opts.ReadOnly {
		return nil
	}
	if d.stale {
		if err := d.removeState(); err != nil {
			return err
		}
	}
	d.thicken()
	if d.desc.IsDelta() {
		if err := d.recoverLive(); err != nil {
			return err
		}
	}
	if d.state != nil {
		if err := d.settle(); err != nil {
			return err
		}
		d.keep()
	}
	if d.desc.IsDelta() {
		return d.openBits()
	}
	return nil
}

// lockExtent reads the descriptor to find the extent, locks that, and reads the
// descriptor again: only now is it not being changed by somebody else.
func (d *Disk) lockExtent() error {
	_, first, err := loadDescriptor(d.opts.fs, d.path)
	if err != nil {
		return err
	}
	name, err := extentName(d.path, first)
	if err != nil {
		return err
	}
	var f file
	if d.opts.parent {
		f, err = openParent(d.opts.fs, name, !d.opts.ReadOnly, d.opts.openFlags())
	} else {
		f, err = openLocked(d.opts.fs, name, !d.opts.ReadOnly, d.opts.openFlags())
	}
	if err != nil {
		return err
	}
	d.ext = &extent{name: name, f: f, direct: d.opts.Direct}
	if d.text, d.desc, err = loadDescriptor(d.opts.fs, d.path); err != nil {
		return err
	}
	if again, err := extentName(d.path, d.desc); err != nil || again != name {
		return &Error{Kind: ErrInUse, File: d.path, Why: "it was changed while it was opened", Fix: "try again", Cause: err}
	}
	if d.desc.IsDelta() && !d.opts.link {
		return &Error{Kind: ErrUnsupported, File: d.path, Why: "it is a snapshot link", Fix: "open it with its chain"}
	}
	d.size, d.ext.thick = d.desc.Size(), d.desc.Thick()
	return nil
}

func loadDescriptor(fs fsys, path string) ([]byte, *vmdk.Descriptor, error) {
	text, err := fs.ReadFile(path, vmdk.MaxText)
	if err != nil {
		return nil, nil, descriptorError(path, err)
	}
	desc, err := vmdk.Parse(path, text)
	if err != nil {
		return nil, nil, descriptorError(path, err)
	}
	return text, desc, nil
}

// extentName is the path of the one extent that a disk must have.
func extentName(path string, desc *vmdk.Descriptor) (string, error) {
	no := func(why string) error {
		return &Error{Kind: ErrUnsupported, File: path, Why: why, Fix: `import it with "mortise vm import"`}
	}
	es := desc.Extents()
	switch {
	case len(es) != 1:
		return "", no(fmt.Sprintf("it has %d extents, and one is opened in place", len(es)))
	case es[0].Offset != 0 || es[0].Access != "RW":
		return "", no("its extent is not RW at offset 0")
	case desc.IsDelta() && es[0].File != filepath.Base(vmdk.DeltaName(path)):
		// So one link's descriptor does not pass for another's under its name.
		return "", &Error{Kind: ErrTampered, File: path, Why: fmt.Sprintf("it is the descriptor of another link, whose extent is %s", es[0].File), Fix: "restore the descriptor from a backup; " + untouched}
	}
	return filepath.Join(filepath.Dir(path), es[0].File), nil
}

// openClear checks that a disk whose descriptor says so really is in clear.
func (d *Disk) openClear() error {
	if d.opts.Expect.Encrypted {
		return &Error{Kind: ErrNotEncrypted, File: d.path, Why: "the VM's record says that this disk is encrypted, and the descriptor has no key safe", Fix: "restore the descriptor from a backup; " + untouched}
	}
	sf, err := openState(d.opts.fs, d.at, d.stateName(), false)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errTorn):
		// An encryption writes the state before the descriptor: it was not begun.
	case err != nil:
		return stateError(d.stateName(), err)
	default:
		s := sf.cur.Load()
		sf.f.Close()
		begun := s.kind != Encrypting || s.boundary > 0 || s.hotLen > 0
		ended := s.kind == Decrypting && s.boundary == roundUp(s.size, UnitSize)
		if begun && !ended {
			return &Error{Kind: ErrTampered, File: d.path, Why: fmt.Sprintf("it says that the disk is in clear, and %s says that the extent is encrypted", filepath.Base(d.stateName())), Fix: "restore the descriptor from a backup; " + untouched}
		}
	}
	d.stale = true
	return nil
}

// openClearDelta checks the state file that a snapshot link in clear has for its
// bitmap.
func (d *Disk) openClearDelta() (err error) {
	if d.opts.Expect.Encrypted {
		return &Error{Kind: ErrNotEncrypted, File: d.path, Why: "the VM's record says that this disk is encrypted, and the descriptor of this link has no key safe", Fix: "restore the descriptor from a backup; " + untouched}
	}
	if d.state, err = openState(d.opts.fs, d.at, d.stateName(), !d.opts.ReadOnly); err != nil {
		return stateError(d.stateName(), err)
	}
	s := d.state.cur.Load()
	never := s.kind == Encrypting && s.boundary == 0 && s.hotLen == 0
	ended := s.kind == Decrypting && s.boundary == roundUp(s.size, UnitSize)
	switch {
	case s.disk != d.desc.UUID() || s.size != d.size || !s.delta:
		return &Error{Kind: ErrState, File: d.stateName(), Why: fmt.Sprintf("it belongs to disk %s of %d bytes", s.disk, s.size), Fix: "restore the state file of this link from a backup"}
	case !never && !ended && (s.kind != NotConverting || s.epoch != 0 || s.check != keyCheck{}):
		return &Error{Kind: ErrTampered, File: d.path, Why: fmt.Sprintf("it says that the link is in clear, and %s says that the extent is encrypted", filepath.Base(d.stateName())), Fix: "restore the descriptor from a backup; " + untouched}
	}
	return nil
}

// openEncrypted opens the key safe, and checks the descriptor with the DEK and
// the state file with both.
func (d *Disk) openEncrypted() error {
	enc, _ := d.desc.Encryption()
	switch {
	case enc.UnitSize != UnitSize:
		return &Error{Kind: ErrUnsupported, File: d.path, Why: fmt.Sprintf("units of %d bytes; this version has %d", enc.UnitSize, UnitSize), Fix: "open it with the version that made it"}
	case d.opts.VM == uuid.Nil || d.opts.KEKs == nil:
		return &Error{Kind: ErrKeysRequired, File: d.path, Why: "it is encrypted, and was opened without a VM and its keys", Fix: "open it as a disk of its VM"}
	case enc.Epoch < d.opts.Expect.Epoch:
		return &Error{Kind: ErrStale, File: d.path, Why: fmt.Sprintf("its key is of epoch %d, and the VM's record says %d", enc.Epoch, d.opts.Expect.Epoch), Fix: "restore descriptor and state file of the same time as the extent; a VM restored as a whole is registered anew"}
	}
	b := binding(d.opts.VM, d.desc.UUID())
	dek, _, err := enc.KeySafe.Unwrap(b, d.opts.KEKs)
	if err != nil {
		return unwrapError(d.path, "encryption.keySafe", err)
	}
	if d.key, err = expand(dek); err != nil {
		return err
	}
	newest := d.key
	if !enc.Target.Empty() {
		if dek, _, err = enc.Target.Unwrap(b, d.opts.KEKs); err != nil {
			return unwrapError(d.path, "encryption.keySafe.target", err)
		}
		if d.next, err = expand(dek); err != nil {
			return err
		}
		newest = d.next
	}
	if err := d.desc.Verify(newest.descriptor); err != nil {
		return &Error{Kind: ErrTampered, File: d.path, Cause: err}
	}
	d.state, err = openState(d.opts.fs, d.at, d.stateName(), !d.opts.ReadOnly)
	if err != nil {
		return stateError(d.stateName(), err)
	}
	if err := d.matchState(enc); err != nil {
		return err
	}
	if d.opts.Expect.Encrypted && (d.kind == Encrypting || d.kind == Decrypting) {
		return &Error{Kind: ErrNotEncrypted, File: d.stateName(), Why: fmt.Sprintf("it says that the disk is in clear from byte %d on in the middle of a conversion, and the VM's record says that it is encrypted", d.state.cur.Load().boundary), Fix: "restore the state file from a backup of the same time as the extent"}
	}
	if d.state.cur.Load().hotLen > 0 && d.opts.ReadOnly {
		return &Error{Kind: ErrConverting, File: d.stateName(), Why: "a conversion was killed and its last zone is not settled", Fix: "open the disk for writing once"}
	}
	return nil
}

// matchState finds out in which step of which conversion descriptor and state
// file are; d.key and d.next are those of the descriptor's key safes. Every
// other combination is not one that a crash leaves.
func (d *Disk) matchState(enc vmdk.Encryption) error {
	s := d.state.cur.Load()
	if s.disk != d.desc.UUID() || s.size != d.size && !s.grown(d.size) || s.delta != d.desc.IsDelta() {
		return &Error{Kind: ErrState, File: d.stateName(), Why: fmt.Sprintf("it belongs to disk %s of %d bytes", s.disk, s.size), Fix: "restore the state file of this disk from a backup"}
	}
	from := func(k *dataKey, epoch uint64) bool { // the key in force is k
		return s.epoch == epoch && s.check == k.id() && (k == nil || s.verify(k.state, s.mac))
	}
	to := func(k *dataKey, epoch uint64) bool { // the key that is coming is k
		return s.targetEpoch == epoch && s.targetCheck == k.id() && (k == nil || s.verify(k.state, s.targetMAC))
	}
	switch {
	case d.next == nil && s.kind == NotConverting && from(d.key, enc.Epoch):
	case d.next == nil && s.kind == Encrypting && from(nil, 0) && to(d.key, enc.Epoch):
		d.kind, d.key, d.next = s.kind, nil, d.key
	case d.next == nil && s.kind == Decrypting && from(d.key, enc.Epoch) && to(nil, 0):
		d.kind = s.kind
	case d.next == nil && s.kind == Recrypting && from(d.key, enc.Epoch) && s.boundary == 0 && s.hotLen == 0:
		// The descriptor never got its second key safe: not begun.
	case d.next != nil && s.kind == Recrypting && from(d.key, enc.Epoch) && to(d.next, enc.Epoch+1):
		d.kind = s.kind
	case d.next != nil && s.kind == NotConverting && from(d.next, enc.Epoch+1):
		// The descriptor still has the first key safe: all but ended.
		d.kind = Recrypting
	default:
		return &Error{Kind: ErrState, File: d.stateName(), Why: "it was edited, or is older or newer than the descriptor", Fix: "restore descriptor and state file from a backup of the same time as the extent; " + untouched}
	}
	return nil
}

// settle brings the files of an encrypted disk from what a crash has left to
// what they say: counts the opening, which makes the newest slot durable in case
// that it was not, converts what is left of the hot zone, and lets go of a
// conversion that was not begun or only not recorded as ended.
func (d *Disk) settle() error {
	s := *d.state.cur.Load()
	s.opens++
	if d.kind == NotConverting && s.kind != NotConverting { // not begun, or all but ended in clear
		s = state{seq: s.seq, disk: s.disk, size: s.size, opens: s.opens, epoch: s.epoch, check: s.check}
		if d.key == nil {
			s.epoch, s.check = 0, keyCheck{}
		}
	}
	s.size = d.size // a growth that was not finished
	if d.kind == Recrypting && s.kind == NotConverting {
		if err := d.state.write(&s, d.next.mac(), nil); err != nil {
			return d.stateWriteError(err)
		}
		return d.endRecrypt()
	}
	if err := d.writeState(&s); err != nil {
		return err
	}
	if s.hotLen > 0 {
		return d.recoverZone()
	}
	return nil
}

// setForm tells the extent what the keys and the state say.
func (d *Disk) setForm() {
	if d.kind == NotConverting {
		d.ext.form(d.key.cipher())
		return
	}
	d.ext.set(func() {
		e := d.ext
		e.below, e.above = d.next.cipher(), d.key.cipher()
		e.boundary, e.frozen, e.hot, e.next = d.state.cur.Load().boundary, span{}, nil, nil
		if d.state.cur.Load().kind == NotConverting { // a recrypt that is all but ended
			e.boundary = d.end()
		}
	})
}

// writeState makes s durable. After a failed fsync the disk is dead.
func (d *Disk) writeState(s *state) error {
	return d.stateWriteError(d.state.write(s, d.key.mac(), d.next.mac()))
}

func (d *Disk) stateWriteError(err error) error {
	if err == nil {
		return nil
	}
	if d.ext.dead.Load() == nil && errors.As(err, new(*syncError)) {
		return d.ext.fail(err)
	}
	return fmt.Errorf("writing a disk's state file: %w", err)
}

// stateError gives an error of opening a state file its kind.
func stateError(name string, err error) error {
	e := &Error{Kind: ErrState, File: name, Cause: err, Fix: "restore the state file from a backup of the same time as the extent; " + untouched}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Why, e.Cause = "it is missing", nil
	case errors.Is(err, errTorn):
		e.Why, e.Cause = "neither of its slots is readable", nil
	case errors.Is(err, errVersion):
		e.Kind, e.Fix = ErrUnsupported, "open the disk with the version that wrote it"
	}
	return e
}

// save replaces the descriptor by what desc is now, if nobody has changed it
// behind our back since it was read.
func (d *Disk) save(desc *vmdk.Descriptor) error {
	now, err := d.opts.fs.ReadFile(d.path, vmdk.MaxText)
	if err != nil {
		return descriptorError(d.path, err)
	}
	if !bytes.Equal(now, d.text) {
		return &Error{Kind: ErrStale, File: d.path, Why: "somebody changed it while the disk was open", Fix: "undo that change, or open the disk again"}
	}
	text := desc.Bytes()
	d.at("descriptor.write")
	if err := d.opts.fs.ReplaceFile(d.path, text); err != nil {
		// It may have been renamed and not be durable. Only if it surely was
		// not can the disk go on.
		if now, rerr := d.opts.fs.ReadFile(d.path, vmdk.MaxText); rerr == nil && bytes.Equal(now, d.text) {
			return fmt.Errorf("writing a disk descriptor: %w", err)
		}
		return d.ext.fail(err)
	}
	d.at("descriptor.durable")
	d.mu.Lock()
	d.text, d.desc = text, desc
	d.mu.Unlock()
	d.keep()
	return nil
}

// removeState removes a state file that means nothing any more.
func (d *Disk) removeState() error {
	if err := d.opts.fs.Remove(d.stateName()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a disk's old state file: %w", err)
	}
	d.at("state.removed")
	return nil
}
