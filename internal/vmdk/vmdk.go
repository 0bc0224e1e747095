// Package vmdk reads, edits and writes VMDK descriptors: the small text file that
// describes one link of a virtual disk and names the extent that holds its data.
//
// A disk in clear is an ordinary flat VMDK, which qemu-img and VMware's tools
// open. Two forms are Mortise's own:
//
//	createType      extent type   what the extent holds
//	monolithicFlat  FLAT          a base disk in clear (also: vmfs with VMFS, twoGbMaxExtentFlat with FLAT)
//	mortiseFlat     XTSFLAT       an encrypted base disk
//	mortiseDelta    DELTA         a snapshot link in clear
//	mortiseDelta    XTSDELTA      an encrypted snapshot link
//
// No other program knows these two createTypes, and refuses them, so that none
// serves ciphertext or half a disk as if it were data.
//
// An encrypted link has six more entries (rule E3):
//
//	encryption.keySafe     the wrapped DEK, see package keysafe
//	encryption.cipher      "XTS-AES-256"
//	encryption.unitSize    "4096", bytes
//	encryption.epoch       counts the link's conversions
//	encryption.generation  counts this descriptor's changes
//	encryption.mac         64 hexadecimal digits
//
// While a deep recrypt gives it another DEK (rule R2), there is one entry more:
//
//	encryption.keySafe.target  the wrapped DEK that is coming
//
// The MAC is keysafe.MAC with MACInfo, keyed from the DEK (the one that is coming,
// if there is one), over every entry but
// encryption.mac and the ddb.* entries other than ddb.uuid (those may be edited
// without keys, rule E2), then every extent. Entries stand in the order of their
// lower-case keys as Line{"entry " + key, value}, extents in file order as
// Line{"extent", the extent's canonical line}. So an edit is found out (rule E8)
// although the text is in clear.
//
// What parses prints back byte for byte, without QEMU's padding; an edit changes only its own lines. The
// descriptor's syntax is that of VMware's "Virtual Disk Format 5.0" note.
//
// Place in the flow: level 1; vdisk opens chains through it, host and vmx make
// and inspect disks. It imports atomicfile, vmxfile and keysafe.
package vmdk

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmxfile"
)

// SectorSize is the unit in which descriptors count, in bytes.
const SectorSize = 512

// Limits of what is read and made.
const (
	MaxText    = 256 << 10 // bytes of a descriptor
	MaxLine    = 32 << 10  // bytes of a line
	MaxEntries = 1024      // entries and extents
	MaxSize    = 62 << 40  // bytes of a disk, as in vSphere
)

// MACInfo names the MAC of a descriptor for keysafe.NewMAC.
const MACInfo = "mortise vmdk descriptor v1"

// The createTypes that this package opens.
const (
	MonolithicFlat     = "monolithicFlat"
	VMFS               = "vmfs"
	TwoGbMaxExtentFlat = "twoGbMaxExtentFlat"
	MortiseFlat        = "mortiseFlat"
	MortiseDelta       = "mortiseDelta"
)

// The extent types that this package opens.
const (
	ExtentFlat     = "FLAT"
	ExtentVMFS     = "VMFS"
	ExtentXTSFlat  = "XTSFLAT"
	ExtentDelta    = "DELTA"
	ExtentXTSDelta = "XTSDELTA"
)

// NoParent is the parentCID of a base disk.
const NoParent = 0xffffffff

// The causes that an *Error wraps.
var (
	ErrSyntax      = errors.New("syntax error")
	ErrDuplicate   = errors.New("duplicate entry")
	ErrTruncated   = errors.New("truncated descriptor")
	ErrEdited      = errors.New("descriptor was edited or damaged")
	ErrUnsupported = errors.New("unsupported disk")
	ErrPath        = errors.New("file name leaves the VM's folder")
	ErrTooLarge    = errors.New("too large")
	ErrValue       = errors.New("bad value")
	ErrConflict    = errors.New("descriptor was changed meanwhile")
)

// An Error says which descriptor is wrong, where and why, and what to do. It
// wraps one of the causes above or a *keysafe.ForeignError.
type Error struct {
	File  string // path, or what Parse was told
	Line  int    // from 1; 0 when it is about the whole file
	Cause error
	Why   string // with the way out
}

func (e *Error) Error() string {
	at := e.File
	if e.Line > 0 {
		at += ":" + strconv.Itoa(e.Line)
	}
	return fmt.Sprintf("%s: %v: %s", at, e.Cause, e.Why)
}

func (e *Error) Unwrap() error { return e.Cause }

// restore is the way out of damage to a descriptor.
const restore = "restore this descriptor from a backup (the extent that holds the data is untouched)"

// An Extent is a line that names a file of data.
type Extent struct {
	Access  string // RW, RDONLY or NOACCESS
	Sectors uint64 // length, SectorSize each
	Type    string // one of the extent types
	File    string // name in the descriptor's folder
	Offset  uint64 // where the data begins in File, in sectors
}

// String is the extent's canonical line.
func (e Extent) String() string {
	return fmt.Sprintf(`%s %d %s "%s" %d`, e.Access, e.Sectors, e.Type, e.File, e.Offset)
}

// Encryption is what a descriptor says about the encryption of its link.
type Encryption struct {
	KeySafe    keysafe.Safe
	Target     keysafe.Safe // of the DEK that a deep recrypt gives the link; else empty
	Cipher     string       // keysafe.CipherXTS
	UnitSize   uint32       // bytes
	Epoch      uint64       // conversions of this link so far, from 1
	Generation uint64       // changes of this descriptor so far, from 1
}

// A Descriptor is a parsed descriptor. It is not safe for concurrent use.
type Descriptor struct {
	name    string
	lines   []line
	entries map[string]int // lower-case key → line
	stale   bool           // a line that the MAC covers was changed after Seal
}

// A Spec says what New makes.
type Spec struct {
	Size    int64     // bytes, a multiple of SectorSize, at most MaxSize
	UUID    uuid.UUID // the disk's identity, ddb.uuid
	CID     uint32    // content id, not NoParent
	Extent  string    // file name of the extent
	Adapter string    // ddb.adapterType; "" means lsilogic
	Thin    bool      // takes space as it is written to, see Thick

	// A snapshot link names its parent; both zero for a base disk.
	Parent    string // of the parent's descriptor, see CheckParentName
	ParentCID uint32
}

// New makes the descriptor of a link in clear; Seal then makes it an encrypted
// one. name is what errors call it.
func New(name string, s Spec) (*Descriptor, error) {
	d := &Descriptor{name: name, entries: map[string]int{}}
	createType, e := MonolithicFlat, Extent{"RW", uint64(s.Size) / SectorSize, ExtentFlat, s.Extent, 0}
	if s.Parent != "" {
		createType, e.Type = MortiseDelta, ExtentDelta
		if err := CheckParentName(s.Parent); err != nil {
			return nil, d.errorf(0, ErrPath, "parent %v", err)
		}
	} else {
		s.ParentCID = NoParent
	}
	switch {
	case s.Size <= 0 || s.Size%SectorSize != 0 || s.Size > MaxSize:
		return nil, d.errorf(0, ErrValue, "a disk of %d bytes: it has 1 to %d sectors of %d bytes", s.Size, MaxSize/SectorSize, SectorSize)
	case s.UUID == uuid.Nil:
		return nil, d.errorf(0, ErrValue, "a disk needs a UUID")
	case s.CID == NoParent:
		return nil, d.errorf(0, ErrValue, "content id ffffffff means no parent")
	}
	if err := CheckFileName(s.Extent); err != nil {
		return nil, d.errorf(0, ErrPath, "extent %v", err)
	}
	if s.Adapter == "" {
		s.Adapter = "lsilogic"
	}
	d.comment("# Disk DescriptorFile")
	d.put("version", "1", bare)
	d.put("encoding", "UTF-8", tight)
	d.put("CID", fmt.Sprintf("%08x", s.CID), bare)
	d.put("parentCID", fmt.Sprintf("%08x", s.ParentCID), bare)
	d.put("createType", createType, tight)
	if s.Parent != "" {
		d.put("parentFileNameHint", s.Parent, tight)
	}
	d.comment("")
	d.comment("# Extent description")
	d.lines = append(d.lines, line{raw: e.String() + "\n", extent: &e, end: "\n"})
	d.comment("")
	d.comment("# The Disk Data Base")
	d.comment("#DDB")
	d.comment("")
	d.put("ddb.adapterType", s.Adapter, wide)
	d.setGeometry(s.Adapter, uint64(s.Size))
	if s.Thin {
		d.put(thinKey, "1", wide)
	} else {
		d.put(thinKey, "0", wide)
	}
	d.put("ddb.uuid", vmxfile.FormatUUID(s.UUID), wide)
	d.put("ddb.virtualHWVersion", "19", wide)
	if err := d.check(); err != nil {
		return nil, err
	}
	return Parse(name, d.Bytes())
}

// setGeometry writes the geometry that a BIOS would make up for the disk; only
// very old guests look at it.
func (d *Descriptor) setGeometry(adapter string, size uint64) {
	heads, sectors, most := uint64(255), uint64(63), uint64(1<<32)
	switch {
	case adapter == "ide":
		heads, most = 16, 16383
	case size < 1<<30:
		heads, sectors = 64, 32
	case size < 2<<30:
		heads, sectors = 128, 32
	}
	cylinders := min(max(size/(heads*sectors*SectorSize), 1), most)
	d.put("ddb.geometry.cylinders", strconv.FormatUint(cylinders, 10), wide)
	d.put("ddb.geometry.heads", strconv.FormatUint(heads, 10), wide)
	d.put("ddb.geometry.sectors", strconv.FormatUint(sectors, 10), wide)
}

// Name is what errors call the descriptor: its path when it was loaded.
func (d *Descriptor) Name() string { return d.name }

// Get returns an entry's value without quotes; keys are case-insensitive.
func (d *Descriptor) Get(key string) (value string, ok bool) {
	i, ok := d.entries[strings.ToLower(key)]
	if !ok {
		return "", false
	}
	return d.lines[i].value, true
}

// CreateType is one of the createTypes above.
func (d *Descriptor) CreateType() string { v, _ := d.Get("createType"); return v }

// CID is the content id: it changes when the link's data first changes after its
// child was made.
func (d *Descriptor) CID() uint32 { return d.hex32("CID") }

// ParentCID is the parent's content id when this link was made, or NoParent.
func (d *Descriptor) ParentCID() uint32 { return d.hex32("parentCID") }

func (d *Descriptor) hex32(key string) uint32 {
	v, _ := d.Get(key)
	n, _ := strconv.ParseUint(v, 16, 32) // check has seen that it is one
	return uint32(n)
}

// Parent is the parent's descriptor, see CheckParentName; "" for a base disk.
func (d *Descriptor) Parent() string { v, _ := d.Get("parentFileNameHint"); return v }

// IsDelta says whether the link is a snapshot's.
func (d *Descriptor) IsDelta() bool { return d.CreateType() == MortiseDelta }

// thinKey says whether a disk is thin. VMware writes only "1"; the "0" tells a disk
// whose space Mortise keeps allocated from a foreign one, which says nothing and may
// be sparse.
const thinKey = "ddb.thinProvisioned"

// Thick says whether all of the disk's space is to be allocated all the time. It is
// no secret and not covered by the MAC: an edit costs space, or frees it.
func (d *Descriptor) Thick() bool { v, _ := d.Get(thinKey); return v == "0" && !d.IsDelta() }

// UUID is the disk's identity; zero when a foreign descriptor has none.
func (d *Descriptor) UUID() uuid.UUID {
	v, _ := d.Get("ddb.uuid")
	u, _ := vmxfile.ParseUUID(v) // check has seen that it is one
	return u
}

// Extents lists the extents in the order of the disk.
func (d *Descriptor) Extents() []Extent {
	var es []Extent
	for _, l := range d.lines {
		if l.extent != nil {
			es = append(es, *l.extent)
		}
	}
	return es
}

// Size is the length of the disk in bytes.
func (d *Descriptor) Size() int64 {
	var n uint64
	for _, e := range d.Extents() {
		n += e.Sectors
	}
	return int64(n * SectorSize) // check has seen that it is at most MaxSize
}

// SetCID changes the content id.
func (d *Descriptor) SetCID(cid uint32) { d.put("CID", fmt.Sprintf("%08x", cid), bare) }

// SetParent re-points a snapshot link to another parent.
func (d *Descriptor) SetParent(file string, cid uint32) error {
	if !d.IsDelta() {
		return d.errorf(0, ErrValue, "a base disk has no parent")
	}
	if err := CheckParentName(file); err != nil {
		return d.errorf(0, ErrPath, "parent %v", err)
	}
	d.put("parentFileNameHint", file, tight)
	d.put("parentCID", fmt.Sprintf("%08x", cid), bare)
	return nil
}

// SetSize changes the length of a disk of one extent, with its geometry; the
// caller has grown the extent.
func (d *Descriptor) SetSize(size int64) error {
	if size <= 0 || size%SectorSize != 0 || size > MaxSize {
		return d.errorf(0, ErrValue, "a disk of %d bytes: it has 1 to %d sectors of %d bytes", size, MaxSize/SectorSize, SectorSize)
	}
	if n := len(d.Extents()); n != 1 {
		return d.errorf(0, ErrUnsupported, "a disk of %d extents cannot change its size; convert it first", n)
	}
	d.editExtents(func(e *Extent) { e.Sectors = uint64(size) / SectorSize })
	adapter, _ := d.Get("ddb.adapterType")
	d.setGeometry(adapter, uint64(size))
	return nil
}

// SetUUID gives the disk a new identity, as a copy needs. An encrypted link must
// be sealed again with a key safe that is bound to the new UUID.
func (d *Descriptor) SetUUID(u uuid.UUID) { d.put("ddb.uuid", vmxfile.FormatUUID(u), wide) }

// SetDDB writes an entry of the disk data base, such as "ddb.adapterType".
func (d *Descriptor) SetDDB(key, value string) error {
	low := strings.ToLower(key)
	if !strings.HasPrefix(low, "ddb.") || low == "ddb.uuid" || strings.ContainsAny(key, " \t\r\n\"=#") || strings.ContainsAny(value, "\r\n\"") || len(key)+len(value) > MaxLine/2 {
		return d.errorf(0, ErrValue, "%.64q is no entry of the disk data base that can be set", key)
	}
	d.put(key, value, wide)
	return nil
}

// The entries by which a link says what may not happen to it.
const (
	sealedKey    = "mortise.sealed"
	receivingKey = "mortise.receiving"
)

// Sealed says why the link must not be changed any more, "" if it may be: more
// than one link stands on it.
func (d *Descriptor) Sealed() string { v, _ := d.Get(sealedKey); return v }

// Receiving is the file name of the child whose data is being merged into the
// link, "" if none is.
func (d *Descriptor) Receiving() string { v, _ := d.Get(receivingKey); return v }

// SetSealed and SetReceiving change these; "" removes the entry. An encrypted link
// must be sealed again, in the sense of Seal.
func (d *Descriptor) SetSealed(why string)     { d.setOwn(sealedKey, why) }
func (d *Descriptor) SetReceiving(file string) { d.setOwn(receivingKey, file) }

func (d *Descriptor) setOwn(key, value string) {
	if value == "" {
		d.remove(func(low string) bool { return low == key })
		d.stale = true
		return
	}
	d.put(key, value, tight)
}

func (d *Descriptor) editExtents(edit func(*Extent)) {
	for i, l := range d.lines {
		if l.extent != nil {
			e := *l.extent
			edit(&e)
			if e != *l.extent {
				d.lines[i] = line{raw: e.String() + l.end, extent: &e, end: l.end}
				d.stale = true
			}
		}
	}
}

func (d *Descriptor) errorf(line int, cause error, format string, args ...any) *Error {
	return &Error{File: d.name, Line: line, Cause: cause, Why: fmt.Sprintf(format, args...)}
}
