package vdisk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// Beside the descriptor of an encrypted disk stands a copy of it, <descriptor>.kept, for
// Repair: a few damaged bytes in a key safe are otherwise the end of a disk. The copy
// also says whether the extent had one form only, *steady*, when it was written; it is
// marked otherwise before a conversion begins, so that a lost state file is never
// rebuilt as if there had been none. It is written behind every change of the
// descriptor, and nothing that opens a disk reads it.
//
// Its form is a line each of keptMagic, the status, the MAC of both with the text that
// follows, and then the descriptor. The MAC is keyed from the DEK that seals the
// descriptor, with keptInfo.
const (
	keptSuffix     = ".kept"
	keptMagic      = "mortise kept descriptor v1"
	keptInfo       = "mortise vmdk kept v1"
	keptSteady     = "steady"
	keptConverting = "converting"
)

// keptMax bounds the file, in bytes.
const keptMax = vmdk.MaxText + 256

func keptName(path string) string { return path + keptSuffix }

func keptLines(status string, text []byte) []keysafe.Line {
	return []keysafe.Line{{Name: "status", Value: status}, {Name: "descriptor", Value: string(text)}}
}

// encodeKept makes the copy of a descriptor that key seals.
func encodeKept(status string, text []byte, key *dataKey) ([]byte, error) {
	mac, err := keysafe.NewMAC(key.dek, keptInfo)
	if err != nil {
		return nil, err
	}
	defer mac.Wipe()
	sum := mac.Sum(keptLines(status, text)...)
	return fmt.Appendf(nil, "%s\n%s\n%x\n%s", keptMagic, status, sum, text), nil
}

// A kept is a copy as it was read. Nothing of it is authentic before verify.
type kept struct {
	steady bool
	status string
	mac    []byte
	text   []byte
	desc   *vmdk.Descriptor
}

var errKept = errors.New("it is not a copy of a descriptor that this version wrote")

// loadKept reads the copy that belongs to the descriptor at path.
func loadKept(fsys fsys, path string) (*kept, error) {
	name := keptName(path)
	b, err := fsys.ReadFile(name, keptMax)
	if err != nil {
		return nil, err
	}
	return parseKept(name, b)
}

func parseKept(name string, b []byte) (*kept, error) {
	part := bytes.SplitN(b, []byte("\n"), 4)
	if len(part) != 4 || string(part[0]) != keptMagic {
		return nil, errKept
	}
	k := &kept{status: string(part[1]), text: part[3]}
	k.steady = k.status == keptSteady
	if !k.steady && k.status != keptConverting {
		return nil, errKept
	}
	var err error
	if k.mac, err = hex.DecodeString(string(part[2])); err != nil || len(k.mac) != keysafe.MACSize {
		return nil, errKept
	}
	if k.desc, err = vmdk.Parse(name, k.text); err != nil {
		return nil, err
	}
	if _, encrypted := k.desc.Encryption(); !encrypted {
		return nil, errKept
	}
	return k, nil
}

// verify says whether key wrote the copy.
func (k *kept) verify(key *dataKey) (bool, error) {
	mac, err := keysafe.NewMAC(key.dek, keptInfo)
	if err != nil {
		return false, err
	}
	defer mac.Wipe()
	return mac.Verify(k.mac, keptLines(k.status, k.text)...), nil
}

// keep writes the copy of the descriptor as it is now; of a disk in clear there is none.
// Nothing depends on it but Repair: a copy that cannot be written, or that a crash has
// kept from it, is made good when the disk is opened next.
func (d *Disk) keep() {
	if err := d.keepNow(); err != nil {
		d.opts.Log.Warn("no copy of a descriptor is kept: a damaged one could not be repaired", "disk", d.path, "error", err)
	}
}

func (d *Disk) keepNow() error {
	if _, encrypted := d.desc.Encryption(); !encrypted {
		return removeAll(d.opts.fs, keptName(d.path))
	}
	status := keptSteady
	if d.state == nil || d.state.cur.Load().kind != NotConverting {
		status = keptConverting
	}
	return d.keepAs(status)
}

// keepOnly sees to it that no copy has a key safe other than the descriptor's: one
// that cannot be written anew is removed. Otherwise who has a KEK that was replaced
// would still have the DEK.
func (d *Disk) keepOnly() error {
	err := d.keepNow()
	if err == nil {
		return nil
	}
	if gone := removeAll(d.opts.fs, keptName(d.path)); gone != nil {
		return fmt.Errorf("%s: the kept copy still has the key safe of before, and can be neither written nor removed; remove it, or run this again: %w", keptName(d.path), errors.Join(err, gone))
	}
	d.opts.Log.Warn("no copy of a descriptor is kept: a damaged one could not be repaired", "disk", d.path, "error", err)
	return nil
}

// keepConverting marks the copy before a conversion begins. If that fails, the
// conversion does not begin.
func (d *Disk) keepConverting() error {
	if _, encrypted := d.desc.Encryption(); !encrypted {
		return nil
	}
	if err := d.keepAs(keptConverting); err != nil {
		return fmt.Errorf("marking the kept copy of a descriptor: %w", err)
	}
	return nil
}

func (d *Disk) keepAs(status string) error {
	var key *dataKey
	for _, k := range []*dataKey{d.next, d.key} {
		if k != nil && d.desc.Verify(k.descriptor) == nil {
			key = k
			break
		}
	}
	if key == nil { // a conversion is being begun: it calls again when it has
		return nil
	}
	b, err := encodeKept(status, d.text, key)
	if err != nil {
		return err
	}
	if now, err := d.opts.fs.ReadFile(keptName(d.path), keptMax); err == nil && bytes.Equal(now, b) {
		return nil
	}
	d.at("kept.write")
	return d.opts.fs.ReplaceFile(keptName(d.path), b)
}
