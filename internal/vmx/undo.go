package vmx

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/vdisk"
)

// undo makes the VM what it was before an earlier call with the changes of r,
// wherever that was stopped or killed. What is in the middle of a conversion runs
// back; a disk that had come to its end is converted once more, or, after a
// recrypt, wrapped under its old KEK again: its data stays under the new DEK, of
// which nobody else knows. Undo can be interrupted and repeated like what it
// undoes, and the same orders keep the same promises: the VM's files are encrypted
// before any disk is and decrypted after the last.
func (v *vm) undo(ctx context.Context, r *hostapi.ReconfigureVMRequest, live map[uuid.UUID]*vdisk.Chain, tell report) error {
	if err := v.checkLive(r, live); err != nil {
		return err
	}
	if err := v.changeHardware(r); err != nil {
		return err
	}
	if r.Home.GetKind() != hostapi.CryptoChange_NONE && r.HomeBefore.GetEncrypted() {
		tell("giving VM files their old key", vdisk.Progress{})
		kind := hostapi.CryptoChange_SHALLOW_RECRYPT
		if info, err := v.describe(); err != nil {
			return err
		} else if !info.Encrypted {
			kind = hostapi.CryptoChange_ENCRYPT
		}
		if err := v.changeHome(ctx, kind, fromWire(r.HomeBefore.Key), live); err != nil {
			return err
		}
	}
	for i, d := range slices.Backward(r.Disks) {
		stage := fmt.Sprintf("running back disk %d of %d", i+1, len(r.Disks))
		tell(stage, vdisk.Progress{Back: true})
		id, err := parseUUID("a disk", d.DiskUuid)
		if err != nil {
			return err
		}
		progress := func(p vdisk.Progress) { p.Back = true; tell(stage, p) }
		if err := v.undoDisk(ctx, id, d.Before, live[id], progress); err != nil {
			return err
		}
	}
	for _, d := range r.AddDisks {
		if err := v.dropDisk(ctx, d.Uuid, true); err != nil {
			return err
		}
	}
	for _, a := range r.AttachDisks {
		if err := v.detachDisk(ctx, a); err != nil {
			return err
		}
	}
	if r.Home.GetKind() != hostapi.CryptoChange_NONE && !r.HomeBefore.GetEncrypted() {
		tell("decrypting VM files", vdisk.Progress{Back: true})
		return v.decryptHome(ctx, live)
	}
	return nil
}

// undoDisk makes a disk what it was. The bundle promises nothing before it is true,
// as in changeDisk: a disk that is to be in clear loses the promise first, one that
// is encrypted again gets it last (E8).
func (v *vm) undoDisk(ctx context.Context, id uuid.UUID, before *hostapi.Before, open *vdisk.Chain, progress func(vdisk.Progress)) error {
	m, d, done, err := v.take(ctx, id, open)
	if err != nil {
		return err
	}
	defer done()
	if !before.GetEncrypted() && m.info.Encrypted {
		if err := v.record(id, false, m.info.Epoch); err != nil {
			return err
		}
	}
	v.at("undo.begin")
	// A former undo may have been in the middle of a conversion of its own, which
	// goes on.
	back := vdisk.Decrypting
	if before.GetEncrypted() {
		back = vdisk.Encrypting
	}
	own := slices.ContainsFunc(d.Links(), func(l vdisk.Info) bool { return l.Conversion == back })
	if !own {
		if err := v.pacing.of(d, func() error { return d.Cancel(ctx, progress) }); err != nil {
			return faultOf(err)
		}
		v.at("undo.back")
		m.info = d.Info()
	}
	key := fromWire(before.GetKey())
	target := vdisk.Target{Kind: back}
	if back == vdisk.Encrypting {
		target = v.target(m, key)
		target.Kind = back
	}
	// To links that are what they are to be, and so to most, this does nothing.
	err = v.pacing.of(d, func() error { return d.Convert(ctx, target, progress) })
	if err == nil && before.GetEncrypted() {
		err = d.ShallowRecrypt(ctx, key)
	}
	if err != nil {
		return faultOf(err)
	}
	v.at("undo.done")
	// Some links have the epoch that they had before.
	return v.record(id, before.GetEncrypted(), 0)
}

// detachDisk takes a disk that was attached out of VMX and bundle; its files stay.
func (v *vm) detachDisk(ctx context.Context, a *hostapi.AttachDisk) error {
	info, err := v.attached(a)
	if err != nil {
		return err
	}
	return v.dropDisk(ctx, info.UUID.String(), false)
}
