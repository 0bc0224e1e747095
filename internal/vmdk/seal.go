package vmdk

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"mortise/internal/keysafe"
)

// UnitSizes that an encrypted link may have, in bytes.
const (
	MinUnitSize = 512
	MaxUnitSize = 65536
)

const (
	keySafeKey    = "encryption.keySafe"
	targetKey     = "encryption.keySafe.target"
	cipherKey     = "encryption.cipher"
	unitSizeKey   = "encryption.unitSize"
	epochKey      = "encryption.epoch"
	generationKey = "encryption.generation"
	macKey        = "encryption.mac"
)

// Encryption returns what an encrypted link says of its encryption, and whether
// it is one. Nothing of it is authentic before Verify.
func (d *Descriptor) Encryption() (Encryption, bool) {
	if t := d.Extents()[0].Type; t != ExtentXTSFlat && t != ExtentXTSDelta {
		return Encryption{}, false
	}
	e, err := d.encryption()
	return e, err == nil // check has seen that it parses
}

func (d *Descriptor) encryption() (e Encryption, err error) {
	for _, key := range [...]string{keySafeKey, cipherKey, unitSizeKey, epochKey, generationKey, macKey} {
		if !d.has(key) {
			return e, d.errorf(0, ErrTruncated, "the disk is encrypted but entry %s is missing; %s", key, restore)
		}
	}
	if !d.has("ddb.uuid") {
		return e, d.errorf(0, ErrTruncated, "the disk is encrypted but entry ddb.uuid is missing; %s", restore)
	}
	text, _ := d.Get(keySafeKey)
	if e.KeySafe, err = keysafe.Parse(text); err != nil {
		return e, &Error{File: d.name, Line: d.lineOf(keySafeKey), Cause: ErrEdited, Why: fmt.Sprintf("entry %s: %v", keySafeKey, err)}
	}
	if text, ok := d.Get(targetKey); ok {
		if e.Target, err = keysafe.Parse(text); err != nil {
			return e, &Error{File: d.name, Line: d.lineOf(targetKey), Cause: ErrEdited, Why: fmt.Sprintf("entry %s: %v", targetKey, err)}
		}
	}
	e.Cipher, _ = d.Get(cipherKey)
	if e.Cipher != keysafe.CipherXTS {
		return e, d.errorf(d.lineOf(cipherKey), ErrUnsupported, "cipher %.32q; this version opens %s; if no newer Mortise wrote it, %s", e.Cipher, keysafe.CipherXTS, restore)
	}
	for _, n := range [...]struct {
		key  string
		to   *uint64
		bits int
	}{{epochKey, &e.Epoch, 64}, {generationKey, &e.Generation, 64}} {
		v, _ := d.Get(n.key)
		if *n.to, err = strconv.ParseUint(v, 10, n.bits); err != nil || *n.to == 0 {
			return e, d.errorf(d.lineOf(n.key), ErrEdited, "%s %.32q is no count from 1; %s", n.key, v, restore)
		}
	}
	v, _ := d.Get(unitSizeKey)
	unit, err := strconv.ParseUint(v, 10, 32)
	if err != nil || unit < MinUnitSize || unit > MaxUnitSize || unit&(unit-1) != 0 {
		return e, d.errorf(d.lineOf(unitSizeKey), ErrEdited, "unit size %.32q is no power of two from %d to %d; %s", v, MinUnitSize, MaxUnitSize, restore)
	}
	e.UnitSize = uint32(unit)
	v, _ = d.Get(macKey)
	if m, err := hex.DecodeString(v); err != nil || len(m) != keysafe.MACSize {
		return e, d.errorf(d.lineOf(macKey), ErrEdited, "%s has %d hexadecimal digits; %s", macKey, 2*keysafe.MACSize, restore)
	}
	return e, nil
}

// Seal makes the link an encrypted one, or an encrypted one's entries new, and
// authenticates everything. mac is that of the link's DEK with MACInfo; with a
// Target, that of the target's DEK. Sealing
// again needs a greater Generation than the descriptor has: ErrConflict
// otherwise, so that of two who changed the same descriptor the second notices.
func (d *Descriptor) Seal(e Encryption, mac *keysafe.MAC) error {
	old, sealed := d.Encryption()
	switch {
	case sealed && e.Generation <= old.Generation:
		return d.errorf(0, ErrConflict, "generation %d, the descriptor has %d: load it again", e.Generation, old.Generation)
	case e.KeySafe.Empty():
		return d.errorf(0, ErrValue, "an encrypted disk needs a key safe")
	}
	switch d.CreateType() {
	case MortiseFlat, MortiseDelta:
	default:
		if es := d.Extents(); len(es) != 1 || es[0].Offset != 0 || es[0].Access != "RW" {
			return d.errorf(0, ErrUnsupported, "a disk of several extents, or one with an offset, cannot be encrypted in place; convert it with \"mortise vm import\"")
		}
		d.put("createType", MortiseFlat, tight)
	}
	d.editExtents(func(x *Extent) {
		if d.IsDelta() {
			x.Type = ExtentXTSDelta
		} else {
			x.Type = ExtentXTSFlat
		}
	})
	if !sealed {
		d.finishLastLine()
		d.comment("")
		d.comment("# Encryption: do not edit, it is authenticated")
	}
	d.put(keySafeKey, e.KeySafe.String(), wide)
	if e.Target.Empty() {
		d.remove(func(low string) bool { return low == strings.ToLower(targetKey) })
	} else {
		d.put(targetKey, e.Target.String(), wide)
	}
	d.put(cipherKey, e.Cipher, wide)
	d.put(unitSizeKey, strconv.FormatUint(uint64(e.UnitSize), 10), wide)
	d.put(epochKey, strconv.FormatUint(e.Epoch, 10), wide)
	d.put(generationKey, strconv.FormatUint(e.Generation, 10), wide)
	sum := mac.Sum(d.macLines()...)
	d.put(macKey, hex.EncodeToString(sum[:]), wide)
	d.stale = false
	return d.check()
}

// Verify checks that the descriptor is as it was sealed: ErrEdited otherwise
// (rule E8). mac is that of the link's DEK, or the target's if there is one, with
// MACInfo.
func (d *Descriptor) Verify(mac *keysafe.MAC) error {
	v, _ := d.Get(macKey)
	sum, err := hex.DecodeString(v)
	if err != nil || !mac.Verify(sum, d.macLines()...) {
		return d.errorf(d.lineOf(macKey), ErrEdited, "its lines do not match %s; %s", macKey, restore)
	}
	return nil
}

// Unseal makes the link one in clear again; the caller has decrypted its data.
func (d *Descriptor) Unseal() error {
	d.remove(func(low string) bool { return strings.HasPrefix(low, "encryption.") })
	if !d.IsDelta() {
		d.put("createType", MonolithicFlat, tight)
	}
	d.editExtents(func(x *Extent) {
		if d.IsDelta() {
			x.Type = ExtentDelta
		} else {
			x.Type = ExtentFlat
		}
	})
	for i, l := range d.lines {
		if strings.HasPrefix(l.raw, "# Encryption: do not edit") {
			d.dropLine(i)
			break
		}
	}
	d.stale = false
	return d.check()
}

func (d *Descriptor) dropLine(i int) {
	d.lines = slices.Delete(d.lines, i, i+1)
	for low, at := range d.entries {
		if at > i {
			d.entries[low] = at - 1
		}
	}
}

// covered says whether the MAC covers an entry.
func covered(low string) bool {
	return low != macKey && (low == "ddb.uuid" || !strings.HasPrefix(low, "ddb."))
}

func (d *Descriptor) macLines() []keysafe.Line {
	var ls []keysafe.Line
	for low, i := range d.entries {
		if covered(low) {
			ls = append(ls, keysafe.Line{Name: "entry " + low, Value: d.lines[i].value})
		}
	}
	slices.SortFunc(ls, func(a, b keysafe.Line) int { return strings.Compare(a.Name, b.Name) })
	for _, e := range d.Extents() {
		ls = append(ls, keysafe.Line{Name: "extent", Value: e.String()})
	}
	return ls
}
