package vdisk

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// A Target is what a conversion makes of a disk.
type Target struct {
	Kind  Conversion    // Encrypting, Decrypting or Recrypting
	Key   keysafe.KeyID // the KEK that wraps the new DEK, in Options.KEKs; not for Decrypting
	Epoch uint64        // of the new DEK; 0: one more than the present one, from 1
}

// Convert gives the disk another form, in place, while requests go on (rule R2).
// It returns when all is done and durable.
//
// When ctx ends, Convert stops within a zone's time at a durable boundary and
// returns its error. After that, or after an error or a crash, the disk works in
// its mixed form; Resume, or Convert with the same target, goes on (rule R4), and
// Cancel goes back. To a disk that is what t asks for, Convert does nothing; it can only tell when
// t has an Epoch or is Decrypting.
//
// report, which may be nil, is called at the start and after every zone.
func (d *Disk) Convert(ctx context.Context, t Target, report func(Progress)) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.op.Unlock()
	if d.kind == NotConverting {
		done, err := d.reached(t)
		if done || err != nil {
			return err
		}
		if err := d.start(t); err != nil {
			return err
		}
		d.opts.Log.Info("disk conversion begins", "disk", d.path, "kind", d.kind.String(), "key", t.Key.String())
	} else if err := d.continues(t); err != nil {
		return err
	} else if err := d.turn(false); err != nil {
		return err
	}
	return d.convert(ctx, report)
}

// Cancel undoes a conversion that was interrupted: its boundary runs back, under
// the guest like Convert, and the disk has its old form and its old key again.
// Without a conversion it does nothing. Cancel can be stopped and crash as Convert
// can: Resume goes on running back, Convert with the old target turns round.
func (d *Disk) Cancel(ctx context.Context, report func(Progress)) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.op.Unlock()
	if d.kind == NotConverting {
		return nil
	}
	if err := d.turn(true); err != nil {
		return err
	}
	d.opts.Log.Info("disk conversion runs back", "disk", d.path, "kind", d.kind.String(), "boundary", d.state.cur.Load().boundary)
	return d.convert(ctx, report)
}

// Resume goes on with a conversion that was interrupted, in the direction that it
// had; without one it does nothing. See Convert.
func (d *Disk) Resume(ctx context.Context, report func(Progress)) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.op.Unlock()
	if d.kind == NotConverting {
		return nil
	}
	d.opts.Log.Info("disk conversion resumes", "disk", d.path, "kind", d.kind.String(), "boundary", d.state.cur.Load().boundary)
	return d.convert(ctx, report)
}

// begin starts a structural operation, of which a disk has one at a time.
func (d *Disk) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.opts.ReadOnly {
		return &Error{Kind: ErrReadOnly, File: d.path, Fix: "open it for writing"}
	}
	if !d.op.TryLock() {
		return &Error{Kind: ErrConverting, File: d.path, Why: "another conversion or recrypt of this disk is running", Fix: "wait until it ends"}
	}
	if dead := d.ext.dead.Load(); dead != nil {
		d.op.Unlock()
		return dead
	}
	return nil
}

// reached says whether the disk is already what t asks for, and refuses what
// cannot be made of it.
func (d *Disk) reached(t Target) (bool, error) {
	refuse := func(format string, args ...any) (bool, error) {
		return false, fmt.Errorf("%s: cannot %s: %s", d.path, t.Kind, fmt.Sprintf(format, args...))
	}
	enc, encrypted := d.desc.Encryption()
	same := encrypted && t.Epoch != 0 && enc.Epoch == t.Epoch && slices.Contains(enc.KeySafe.KeyIDs(), t.Key)
	switch t.Kind {
	case Decrypting:
		return !encrypted, nil
	case Encrypting:
		if encrypted && !same {
			return refuse("it is encrypted already, with epoch %d; recrypt it instead", enc.Epoch)
		}
	case Recrypting:
		if !encrypted {
			return refuse("it is in clear; encrypt it instead")
		}
		if !same && t.Epoch != 0 && t.Epoch != enc.Epoch+1 {
			return refuse("its epoch is %d, the next one cannot be %d", enc.Epoch, t.Epoch)
		}
	default:
		return refuse("there is no such conversion")
	}
	return same, nil
}

// continues refuses a target that is not that of the conversion under way.
func (d *Disk) continues(t Target) error {
	enc, _ := d.desc.Encryption()
	safe := enc.KeySafe
	if d.kind == Recrypting {
		safe = enc.Target
	}
	if t.Kind != d.kind || d.kind != Decrypting && !slices.Contains(safe.KeyIDs(), t.Key) {
		return &Error{Kind: ErrConverting, File: d.path, Why: fmt.Sprintf("it is in the middle of: %s, keys %v", d.kind, safe.KeyIDs()), Fix: "finish that first: resume it"}
	}
	return nil
}

// turn makes a conversion's direction durable, when the zone that was half-written
// in the other one is done.
func (d *Disk) turn(back bool) error {
	s := *d.state.cur.Load()
	if s.back == back || s.kind == NotConverting { // the latter is all but ended
		return nil
	}
	if s.hotLen > 0 {
		if err := d.recoverZone(); err != nil {
			return err
		}
		s = *d.state.cur.Load()
	}
	s.back = back
	if err := d.writeState(&s); err != nil {
		return err
	}
	d.at("convert.turned")
	return nil
}

// start makes durable that a conversion to t has begun: first in the state, then
// in the descriptor, which gets the key safe of the new DEK before a byte is
// written with it. A state that names a key which the descriptor lacks was not
// begun; a descriptor that names one which the state lacks cannot come about.
func (d *Disk) start(t Target) error {
	s := state{disk: d.desc.UUID(), size: d.size, kind: t.Kind}
	if d.state != nil {
		cur := d.state.cur.Load()
		s.opens, s.epoch, s.check = cur.opens, cur.epoch, cur.check
	}
	if t.Kind == Decrypting {
		if err := d.state.reserve(); err != nil {
			return d.stateWriteError(err)
		}
		if err := d.keepConverting(); err != nil {
			return err
		}
		if err := d.writeState(&s); err != nil {
			return err
		}
		d.become(t.Kind, nil)
		return nil
	}

	next, err := newDataKey(d.opts.Random)
	if err != nil {
		return err
	}
	err = func() error {
		desc, err := d.descriptorWith(&s, t, next)
		if err != nil {
			return err
		}
		if t.Kind == Encrypting {
			err = d.createState(&s, next)
		} else if err = errors.Join(d.keepConverting(), d.state.reserve()); err == nil {
			err = d.state.write(&s, d.key.mac(), next.mac())
		}
		if err != nil {
			return d.stateWriteError(err)
		}
		d.at("convert.state")
		return d.save(desc)
	}()
	if err != nil {
		next.wipe()
		if d.key == nil && d.state != nil && d.desc.IsDelta() {
			if d.ext.dead.Load() == nil {
				err = errors.Join(err, d.clearState())
			}
		} else if d.key == nil && d.state != nil {
			err = errors.Join(err, d.state.f.Close())
			d.setState(nil)
			if d.ext.dead.Load() == nil { // the descriptor is surely still that of a disk in clear
				err = errors.Join(err, d.removeState())
			}
		}
		return err
	}
	d.become(t.Kind, next)
	return nil
}

// descriptorWith returns the descriptor with the key safe of next, and completes
// s, which goes with it.
func (d *Disk) descriptorWith(s *state, t Target, next *dataKey) (*vmdk.Descriptor, error) {
	if d.opts.VM == uuid.Nil || d.opts.KEKs == nil {
		return nil, &Error{Kind: ErrKeysRequired, File: d.path, Why: "it was opened without a VM and its keys", Fix: "open it as a disk of its VM"}
	}
	desc, err := vmdk.Parse(d.path, d.text)
	if err != nil {
		return nil, err
	}
	if desc.UUID() == uuid.Nil { // a foreign descriptor need not have one
		desc.SetUUID(uuid.New())
	}
	s.disk = desc.UUID()
	kek, ok := d.opts.KEKs.KEK(t.Key)
	if !ok {
		return nil, &Error{Kind: ErrKeysRequired, File: d.path, Cause: &keysafe.KeysRequiredError{Required: []keysafe.KeyID{t.Key}}}
	}
	defer kek.Wipe()
	safe, err := keysafe.Wrap(d.opts.Random, binding(d.opts.VM, s.disk), t.Key, kek, next.dek)
	if err != nil {
		return nil, err
	}
	if err := recordVM(desc, d.opts.VM); err != nil {
		return nil, err
	}
	enc, _ := desc.Encryption()
	enc.Generation++
	if t.Kind == Encrypting {
		enc.KeySafe, enc.Cipher, enc.UnitSize, enc.Epoch = safe, keysafe.CipherXTS, UnitSize, max(t.Epoch, 1)
		s.targetEpoch = enc.Epoch
	} else {
		enc.Target = safe
		s.targetEpoch = enc.Epoch + 1
	}
	s.targetCheck = next.check
	return desc, desc.Seal(enc, next.descriptor)
}

// createState makes the state file of a disk that is about to be encrypted, and
// the extent as long as its last unit needs.
func (d *Disk) createState(s *state, next *dataKey) error {
	if d.desc.IsDelta() { // it has one, for its bitmap
		if err := d.state.reserve(); err != nil {
			return err
		}
		return d.state.write(s, nil, next.mac())
	}
	if st, err := d.ext.f.Stat(); err != nil {
		return err
	} else if st.size < d.end() {
		if err := d.extend(st.size, d.end()); err != nil {
			return err
		}
		if err := d.ext.sync(); err != nil {
			return err
		}
	}
	sf, err := createState(d.opts.fs, d.at, d.stateName(), s, nil, next.mac())
	if err != nil {
		return err
	}
	d.setState(sf)
	if err := sf.reserve(); err != nil {
		return err
	}
	return d.opts.fs.SyncDir(d.dir())
}

// become makes the extent one that is being converted.
func (d *Disk) become(kind Conversion, next *dataKey) {
	d.mu.Lock()
	d.kind, d.next = kind, next
	d.mu.Unlock()
	d.setForm()
	d.keep()
}

func (d *Disk) setState(sf *stateFile) {
	d.mu.Lock()
	d.state = sf
	d.mu.Unlock()
}

// convert does the work of a conversion that has begun, and ends it.
func (d *Disk) convert(ctx context.Context, report func(Progress)) error {
	kind, back := d.kind, d.state.cur.Load().back
	if s := d.state.cur.Load(); s.kind != NotConverting && s.boundary != d.goal() {
		if err := d.moveBoundary(ctx, report); err != nil {
			d.opts.Log.Warn("disk conversion stops", "disk", d.path, "kind", kind.String(), "back", back, "boundary", d.state.cur.Load().boundary, "error", err)
			return err
		}
	}
	var err error
	switch {
	case kind == Encrypting && !back:
		err = d.endEncrypt()
	case kind == Encrypting, kind == Decrypting && !back:
		err = d.endInClear()
	case kind == Recrypting && !back:
		err = d.endRecrypt()
	default:
		err = d.endWithOld()
	}
	if err == nil {
		d.opts.Log.Info("disk conversion ends", "disk", d.path, "kind", kind.String(), "back", back)
	}
	return err
}

// endEncrypt: the descriptor is final since the start; only the state has to
// say that nothing is in clear any more.
func (d *Disk) endEncrypt() error {
	if err := d.steady(); err != nil {
		return err
	}
	d.finish(d.next)
	return nil
}

// endWithOld ends what has run back to the old key. A second key safe leaves the
// descriptor first: a state whose boundary is at 0 and a descriptor without it are
// what a conversion that was never begun looks like.
func (d *Disk) endWithOld() error {
	if enc, _ := d.desc.Encryption(); !enc.Target.Empty() {
		desc, err := vmdk.Parse(d.path, d.text)
		if err != nil {
			return err
		}
		enc.Target, enc.Generation = keysafe.Safe{}, enc.Generation+1
		if err := desc.Seal(enc, d.key.descriptor); err != nil {
			return err
		}
		if err := d.save(desc); err != nil {
			return err
		}
	}
	cur := d.state.cur.Load()
	s := state{disk: cur.disk, size: cur.size, opens: cur.opens, epoch: cur.epoch, check: cur.check}
	if err := d.state.write(&s, d.key.mac(), nil); err != nil {
		return d.stateWriteError(err)
	}
	d.at("convert.steady")
	d.state.shrink()
	d.finish(d.key)
	return nil
}

// endRecrypt: the state says that only the new DEK is needed; then the old one's
// key safe leaves the descriptor.
func (d *Disk) endRecrypt() error {
	if d.state.cur.Load().kind != NotConverting {
		if err := d.steady(); err != nil {
			return err
		}
	}
	enc, _ := d.desc.Encryption()
	desc, err := vmdk.Parse(d.path, d.text)
	if err != nil {
		return err
	}
	enc.KeySafe, enc.Target, enc.Epoch, enc.Generation = enc.Target, keysafe.Safe{}, enc.Epoch+1, enc.Generation+1
	if err := desc.Seal(enc, d.next.descriptor); err != nil {
		return err
	}
	if err := d.save(desc); err != nil {
		return err
	}
	d.finish(d.next)
	return nil
}

// endInClear: the descriptor becomes that of a disk in clear, and the state file,
// whose boundary says that nothing is encrypted, means nothing any more.
func (d *Disk) endInClear() error {
	desc, err := vmdk.Parse(d.path, d.text)
	if err != nil {
		return err
	}
	if err := desc.Unseal(); err != nil {
		return err
	}
	if err := d.save(desc); err != nil {
		return err
	}
	if d.desc.IsDelta() {
		if err := d.clearState(); err != nil {
			return err
		}
		d.finish(nil)
		return nil
	}
	sf := d.state
	d.setState(nil)
	d.finish(nil)
	// The rest of the last unit is no part of the disk. Whoever reads the extent
	// as a raw image should not find it; nothing depends on it.
	if st, err := d.ext.f.Stat(); err == nil && st.size == d.end() && st.size > d.size {
		_ = d.ext.f.Truncate(d.size)
	}
	return errors.Join(sf.f.Close(), d.removeState())
}

// clearState records that a snapshot link, which keeps its state file, is in clear.
func (d *Disk) clearState() error {
	cur := d.state.cur.Load()
	s := state{disk: cur.disk, size: cur.size, opens: cur.opens}
	if err := d.state.write(&s, nil, nil); err != nil {
		return d.stateWriteError(err)
	}
	d.at("convert.steady")
	d.state.shrink()
	return nil
}

// steady records that the whole extent has the new key and none other.
func (d *Disk) steady() error {
	cur := d.state.cur.Load()
	s := state{disk: cur.disk, size: cur.size, opens: cur.opens, epoch: cur.targetEpoch, check: cur.targetCheck}
	if err := d.state.write(&s, d.next.mac(), nil); err != nil {
		return d.stateWriteError(err)
	}
	d.at("convert.steady")
	d.state.shrink()
	return nil
}

// finish makes key the only one.
func (d *Disk) finish(key *dataKey) {
	keys := []*dataKey{d.key, d.next}
	d.mu.Lock()
	d.kind, d.key, d.next = NotConverting, key, nil
	d.mu.Unlock()
	d.setForm()
	d.keep()
	for _, k := range keys {
		if k != key {
			k.wipe() // setForm has waited for the requests that used it
		}
	}
}
