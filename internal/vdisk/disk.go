package vdisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// MaxSize is the largest disk, in bytes.
const MaxSize = vmdk.MaxSize

// Expect is what the caller knows of a disk from a place that a storage attacker
// cannot write: the VM's bundle or the inventory (rule E8). The zero Expect
// expects nothing.
//
// A caller records Encrypted when an encryption has returned, and takes it back
// before it starts a decryption; it records a new Epoch when the conversion that
// made it has returned.
type Expect struct {
	Encrypted bool   // the disk must be encrypted, whole
	Epoch     uint64 // the lowest that is accepted of an encrypted disk
}

// Options say how to open a disk.
type Options struct {
	VM     uuid.UUID    // the VM that the disk belongs to; needed if it is encrypted
	UUID   uuid.UUID    // the disk that it must be; zero: any
	KEKs   keysafe.KEKs // the caller's key cache; needed if it is encrypted
	Expect Expect

	// ReadOnly takes the extent's lock shared and changes no file. A disk whose
	// conversion was killed must be opened for writing once first.
	ReadOnly bool

	// Frozen opens a link that other links stand on, or that is sealed, to give it
	// another form or key: what it shows stays, and a write is refused (ErrSealed).
	Frozen bool

	// Direct has the data of extents go round the page cache (O_DIRECT). It is refused
	// (ErrUnsupported) where storage cannot do that with single sectors. Buffers on a
	// page are used as they are, others are copied.
	Direct bool

	// Live is a folder, best on a tmpfs, for the bitmaps of snapshot links that are
	// open for writing: what makes a kill of this process lose nothing. It must
	// outlive the process. "": defaultLive.
	Live string

	// Bases are folders of other VMs on whose sealed links this disk may stand: a
	// linked clone's (rule E12). A descriptor that leads anywhere else is refused.
	Bases []Base

	// Step, if not nil, is called at every step that changes what is on storage: tests
	// end the process there.
	Step func(name string)

	Log    *slog.Logger // nil: none
	Random io.Reader    // of keys and nonces; nil: crypto/rand

	link   bool         // it may be a snapshot link: a chain opens it
	parent bool         // of a link that is open: its lock is shared
	zone   int64        // bytes of a conversion's hot zone; 0: zoneSize
	piece  int64        // units that a merge moves at once; 0: mergeUnits or mergeUnitsLive
	fs     fsys         // nil: the operating system's
	at     func(string) // called at every persistence step; nil: not
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.zone == 0 {
		o.zone = zoneSize
	}
	if o.at == nil {
		o.at = o.Step
	}
	if o.Live == "" {
		o.Live = defaultLive
	}
	if o.fs == nil {
		o.fs = osFS{}
	}
	if o.at == nil {
		o.at = func(string) {}
	}
	return o
}

// A Disk is an open virtual disk. All methods may be called concurrently.
//
// Offsets and lengths are bytes and must be whole sectors inside the disk. An
// XTS unit needs not be written whole, as its sectors are encrypted
// independently, so nothing is ever read in order to be written.
type Disk struct {
	path string // of the descriptor
	size int64  // of the virtual disk, bytes
	opts Options
	ext  *extent
	pace pace // of conversions

	// op is held for the whole of a conversion, of a recrypt and of Close. Only
	// its holder changes the fields below, and holds mu too while it does, so that
	// Info need not wait for a conversion's end.
	op    sync.Mutex
	mu    sync.Mutex
	text  []byte           // the descriptor as it is on storage
	desc  *vmdk.Descriptor // text, parsed
	state *stateFile       // nil for a disk in clear
	key   *dataKey         // in force; while converting, above the boundary
	next  *dataKey         // while converting, below the boundary
	kind  Conversion

	stale bool    // there is a state file that means nothing
	bits  *bitmap // units that a snapshot link has, while it is open for writing
	slot  uint8   // its number in the chain's index
}

// Size is the length of the disk in bytes, a multiple of SectorSize.
func (d *Disk) Size() int64 { return d.size }

// ReadAt fills p with the sectors at off.
func (d *Disk) ReadAt(p []byte, off int64) error {
	if err := d.check("read", off, int64(len(p)), false); err != nil {
		return err
	}
	return d.ext.read(p, off)
}

// WriteAt writes the sectors of p at off. They are durable after the next Flush.
// It may change p: encryption is in place.
func (d *Disk) WriteAt(p []byte, off int64) error {
	if err := d.check("write", off, int64(len(p)), true); err != nil {
		return err
	}
	return d.ext.write(p, off)
}

// Flush makes durable every write, trim and zeroing that returned before it was
// called. When it fails the disk refuses everything from then on ([ErrFailed]).
func (d *Disk) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.opts.ReadOnly {
		return nil
	}
	return d.ext.sync()
}

// Trim gives the space of n bytes at off back where storage can do that; they
// then read as zeros. It is a hint.
func (d *Disk) Trim(off, n int64) error {
	if err := d.check("trim", off, n, true); err != nil || n == 0 {
		return err
	}
	if err := d.ext.zero(off, n, true); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// WriteZeroes makes n bytes at off read as zeros; if punch, it gives their space
// back. Where storage has no fast way it changes nothing and returns an error
// that wraps [errors.ErrUnsupported]: the caller then writes zeros.
func (d *Disk) WriteZeroes(off, n int64, punch bool) error {
	if err := d.check("zero", off, n, true); err != nil || n == 0 {
		return err
	}
	return d.ext.zero(off, n, punch)
}

// Status describes a range of a disk; the bits are those of NBD's
// base:allocation. Zero, the safe answer, is allocated data.
type Status uint32

const (
	Hole Status = 1 << 0 // takes no space
	Zero Status = 1 << 1 // reads as zeros
)

// BlockStatus calls emit for the data and the holes of n bytes at off in turn,
// until emit returns false or the range is covered.
func (d *Disk) BlockStatus(off, n int64, emit func(n int64, s Status) bool) error {
	if err := d.check("map", off, n, false); err != nil {
		return err
	}
	return d.ext.status(off, n, emit)
}

func (d *Disk) check(verb string, off, n int64, write bool) error {
	if off < 0 || n < 0 || off > d.size || n > d.size-off || (off|n)%SectorSize != 0 {
		return fmt.Errorf("%s: cannot %s %d bytes at %d: a request is whole sectors of %d bytes inside the disk of %d", d.path, verb, n, off, SectorSize, d.size)
	}
	if write && d.opts.ReadOnly {
		return &Error{Kind: ErrReadOnly, File: d.path, Fix: "open it for writing"}
	}
	return nil
}

// Close ends all requests, wipes the keys and releases the lock. It does not
// flush. A conversion must have been stopped before; it goes on when the disk is
// opened again.
func (d *Disk) Close() error {
	d.op.Lock()
	defer d.op.Unlock()
	err := errors.Join(d.closeBits(), d.ext.close())
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != nil {
		err = errors.Join(err, d.state.f.Close())
		d.state = nil
	}
	d.key.wipe()
	d.next.wipe()
	d.key, d.next = nil, nil
	return err
}

// Info describes the open disk.
func (d *Disk) Info() Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := describe(d.path, d.desc)
	if st, err := d.ext.f.Stat(); err == nil {
		i.Allocated = st.allocated
	}
	if d.state != nil {
		i.addState(d.state.cur.Load())
	}
	return i
}

func (d *Disk) at(point string) { d.opts.at(point) }

func (d *Disk) dir() string       { return filepath.Dir(d.path) }
func (d *Disk) stateName() string { return d.ext.name + stateSuffix }

// end is the length of the extent in whole units.
func (d *Disk) end() int64 { return roundUp(d.size, UnitSize) }
