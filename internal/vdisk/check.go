package vdisk

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"

	"mortise/internal/keysafe"
)

// A Finding is one thing that Check looked at.
type Finding struct {
	What string // that was looked at
	Said string // what it is, when it is right
	Err  error  // what is wrong with it; nil when it is right
	Open bool   // it could not be proven, for want of a key
}

// CheckOptions say how deep Check looks.
type CheckOptions struct {
	Options
	Read bool // every sector that has content is read
	Hash bool // and a SHA-256 is made of the whole disk as a guest sees it
	// Report, which may be nil, is called while sectors are read, with bytes of the disk.
	Report func(done, total int64)
}

// A CheckReport is what Check found.
type CheckReport struct {
	Findings []Finding
	Bad      []Range // that cannot be read
	Read     int64   // bytes that were read
	Hash     []byte  // of the disk; nil unless it was asked for and all could be read
}

// A Range is a piece of a disk, in bytes.
type Range struct{ Off, Len int64 }

// Whole says whether nothing wrong was found.
func (r *CheckReport) Whole() bool {
	for _, f := range r.Findings {
		if f.Err != nil {
			return false
		}
	}
	return len(r.Bad) == 0
}

func (r *CheckReport) add(what string, err error, format string, args ...any) bool {
	f := Finding{What: what, Err: err}
	if err == nil {
		f.Said = fmt.Sprintf(format, args...)
	}
	r.Findings = append(r.Findings, f)
	return err == nil
}

// maxBad bounds how many unreadable ranges a check lists.
const maxBad = 1000

// Check looks at everything that a disk of one link consists of, and changes nothing: the
// descriptor and its MAC, each pair of its key safes whose KEK the caller has, the state
// file, that they fit, that the extent is long enough; and, if asked, reads every sector
// that has content. Without KEKs only what needs no key is checked. The error is that of
// ctx; what is wrong with the disk is in the report.
func Check(ctx context.Context, path string, o CheckOptions) (*CheckReport, error) {
	o.Options = o.withDefaults()
	o.ReadOnly, o.link = true, true
	r := &CheckReport{}
	_, desc, err := loadDescriptor(o.fs, path)
	if !r.add("descriptor", err, "syntax and entries are right") {
		return r, nil
	}
	info, err := describeIn(o.fs, path)
	if !r.add("files", err, "extent of %d bytes on storage, state file as it should be", info.Allocated) {
		return r, nil
	}
	enc, encrypted := desc.Encryption()
	if encrypted && o.KEKs != nil {
		b := binding(o.VM, desc.UUID())
		r.checkSafe("key safe", enc.KeySafe, b, o.KEKs)
		if !enc.Target.Empty() {
			r.checkSafe("key safe of the new key", enc.Target, b, o.KEKs)
		}
	}
	if encrypted && o.KEKs == nil {
		r.Findings = append(r.Findings, Finding{What: "authenticity", Open: true, Said: "not proven: that needs a key"})
		return r, nil
	}
	d, err := Open(ctx, path, o.Options)
	if ctx.Err() != nil {
		return r, ctx.Err()
	}
	if !r.add("authenticity", err, "descriptor, key safe, state file and extent belong together, nobody edited them") {
		return r, nil
	}
	defer d.Close()
	if d.kind != NotConverting {
		r.add("conversion", nil, "%s, at byte %d: go on with it, or cancel it", d.kind, d.state.cur.Load().boundary)
	}
	if d.desc.IsDelta() {
		units := int64(0)
		err := d.eachRun(func(from, to int64) { units += to - from })
		r.add("presence bitmap", err, "%d units of %d", units, d.end()/UnitSize)
	}
	if !o.Read && !o.Hash {
		return r, nil
	}
	return r, r.read(ctx, d, o)
}

// checkSafe opens every pair whose KEK there is, and compares what they hold.
func (r *CheckReport) checkSafe(what string, s keysafe.Safe, b keysafe.Binding, keks keysafe.KEKs) {
	missing := 0
	for _, id := range s.KeyIDs() {
		kek, ok := keks.KEK(id)
		if !ok {
			missing++
			r.Findings = append(r.Findings, Finding{What: what, Open: true, Said: fmt.Sprintf("pair of %s not proven: its key was not given", id)})
			continue
		}
		kek.Wipe()
		one, err := s.Only(id)
		if err == nil {
			err = one.Prove(b, keks)
		}
		r.add(what, err, "the pair of %s opens", id)
	}
	if missing == 0 && len(s.KeyIDs()) > 1 {
		r.add(what, s.Prove(b, keks), "its %d pairs hold one key", len(s.KeyIDs()))
	}
}

// readPiece is how much a check reads at once, in bytes.
const readPiece = 1 << 20

// read reads the sectors that have content; the rest reads as zeros by definition.
func (r *CheckReport) read(ctx context.Context, d *Disk, o CheckOptions) error {
	var sum hash.Hash
	if o.Hash {
		sum = sha256.New()
	}
	err := walk(ctx, d, sum, o.Report, func(p []byte, off int64) error {
		r.Read += int64(len(p))
		r.readPiece(d, p, off)
		return nil
	})
	if err == nil && sum != nil && len(r.Bad) == 0 {
		r.Hash = sum.Sum(nil)
	}
	return err
}

// A content is a disk whose sectors are looked at.
type content interface {
	Size() int64
	ReadAt(p []byte, off int64) error
	BlockStatus(off, n int64, emit func(n int64, s Status) bool) error
}

// Hash is the SHA-256 of a whole disk as a guest sees it, a *Disk or a *Chain. report,
// which may be nil, is called with bytes of the disk.
func Hash(ctx context.Context, d content, report func(done, total int64)) ([]byte, error) {
	sum := sha256.New()
	if err := walk(ctx, d, sum, report, d.ReadAt); err != nil {
		return nil, err
	}
	return sum.Sum(nil), nil
}

// walk goes through a disk, has read read what has content, and adds all of it to sum,
// unless that is nil.
func walk(ctx context.Context, d content, sum hash.Hash, report func(done, total int64), read func(p []byte, off int64) error) error {
	buf, zeros := make([]byte, readPiece), make([]byte, readPiece)
	for off, size := int64(0), d.Size(); off < size; {
		end, status := off, Status(0)
		err := d.BlockStatus(off, size-off, func(n int64, s Status) bool {
			end, status = min(off+n, size), s
			return false
		})
		if err != nil {
			return err
		}
		for off < end {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(readPiece, end-off)
			p := zeros[:n]
			if status&Zero == 0 {
				p = buf[:n]
				if err := read(p, off); err != nil {
					return err
				}
			}
			if sum != nil {
				sum.Write(p)
			}
			if off += n; report != nil {
				report(off, size)
			}
		}
	}
	return nil
}

// readPiece finds what of a piece cannot be read, to the sector.
func (r *CheckReport) readPiece(d *Disk, p []byte, off int64) {
	err := d.ReadAt(p, off)
	if err == nil || len(r.Bad) >= maxBad {
		return
	}
	if errors.Is(err, ErrFailed) || errors.Is(err, ErrClosed) || len(p) == SectorSize {
		if n := len(r.Bad); n > 0 && r.Bad[n-1].Off+r.Bad[n-1].Len == off {
			r.Bad[n-1].Len += int64(len(p))
		} else {
			r.Bad = append(r.Bad, Range{off, int64(len(p))})
		}
		return
	}
	half := len(p) / 2 / SectorSize * SectorSize
	r.readPiece(d, p[:half], off)
	r.readPiece(d, p[half:], off+int64(half))
}
