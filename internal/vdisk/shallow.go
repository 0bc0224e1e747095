package vdisk

import (
	"context"
	"fmt"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// ShallowRecrypt wraps the disk's DEK under the KEK to, and then no longer under
// any other (rule R1), neither in the descriptor nor in its kept copy. Requests go on meanwhile; no data is rewritten. Interrupted
// at any instant, the disk opens with the old KEK or the new one, and running it
// again finishes. A conversion that was interrupted must be finished first.
//
// The caller's key cache must hold the present KEK and the new one.
func (d *Disk) ShallowRecrypt(ctx context.Context, to keysafe.KeyID) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.op.Unlock()
	enc, encrypted := d.desc.Encryption()
	switch {
	case !encrypted:
		return fmt.Errorf("%s: cannot recrypt: it is in clear; encrypt it instead", d.path)
	case d.kind != NotConverting:
		return &Error{Kind: ErrConverting, File: d.path, Why: "it is in the middle of: " + d.kind.String(), Fix: "finish that first: resume it"}
	}
	if ids := enc.KeySafe.KeyIDs(); len(ids) == 1 && ids[0] == to {
		return d.keepOnly()
	}
	b := binding(d.opts.VM, d.desc.UUID())
	both, err := enc.KeySafe.Rewrap(d.opts.Random, b, d.opts.KEKs, to)
	if err != nil {
		return unwrapError(d.path, "encryption.keySafe", err)
	}
	if both.String() != enc.KeySafe.String() {
		if err := d.saveSafe(both); err != nil {
			return err
		}
	}
	d.at("shallow.both")

	// What is on storage must open with the new KEK, and to the DEK in use,
	// before the old pair goes.
	_, stored, err := loadDescriptor(d.opts.fs, d.path)
	if err != nil {
		return err
	}
	if enc, encrypted = stored.Encryption(); !encrypted {
		return &Error{Kind: ErrTampered, File: d.path, Why: "it does not read back as it was written", Fix: untouched}
	}
	only, err := enc.KeySafe.Only(to)
	if err != nil {
		return err
	}
	dek, _, err := only.Unwrap(b, d.opts.KEKs)
	if err != nil {
		return unwrapError(d.path, "encryption.keySafe", err)
	}
	same := dek.Equal(d.key.dek)
	dek.Wipe()
	if !same {
		return &Error{Kind: ErrTampered, File: d.path, Why: fmt.Sprintf("its pair of key %s holds another key than the disk has", to), Fix: "restore the descriptor from a backup; " + untouched}
	}
	if err := d.saveSafe(only); err != nil {
		return err
	}
	if err := d.keepOnly(); err != nil {
		return err
	}
	d.opts.Log.Info("disk recrypted", "disk", d.path, "kind", "shallow", "key", to.String())
	return nil
}

// saveSafe replaces the key safe in the descriptor.
func (d *Disk) saveSafe(safe keysafe.Safe) error {
	desc, err := vmdk.Parse(d.path, d.text)
	if err != nil {
		return err
	}
	enc, _ := desc.Encryption()
	enc.KeySafe = safe
	enc.Generation++
	if err := desc.Seal(enc, d.key.descriptor); err != nil {
		return err
	}
	return d.save(desc)
}
