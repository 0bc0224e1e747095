// Package storage finds out what the storage below a folder is and can do, before
// a VM's disks are put there (rule E5), and says what is unsafe about it, why, and
// what to do instead.
//
// [Probe] asks the kernel what is mounted and how, and tries out in a small file
// what disks will need: locks, durable writes, durable renames, holes, direct I/O.
// What cannot be tried, such as whether a server keeps what it has acknowledged, is
// judged from the kind of file system and its mount options; what cannot be known
// is not assumed: a write counts as whole in sectors of 512 bytes and no more.
//
// Place in the flow: level 0; the host agent uses it when a folder is made a
// datastore, and before disks are created and guests started there. It imports
// nothing of Mortise.
package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Report is what a folder's storage is and can do.
type Report struct {
	Path    string `json:"path"`
	Type    string `json:"type"`    // as the kernel names it: ext4, xfs, nfs4, …
	Source  string `json:"source"`  // device or server:/export
	Mount   string `json:"mount"`   // where it is mounted
	Options string `json:"options"` // of the mount and of the file system

	Capacity int64 `json:"capacity"` // bytes
	Free     int64 `json:"free"`     // bytes that Mortise may use
	MaxFile  int64 `json:"maxFile"`  // length of a file, bytes, at least; the largest disk

	Direct  Direct `json:"direct"`
	Sector  int64  `json:"sector"`  // bytes that the device writes whole; 0: unknown, 512 is assumed
	Atomic  int64  `json:"atomic"`  // bytes that a direct write can be made whole of (RWF_ATOMIC); 0: none
	Punch   bool   `json:"punch"`   // a hole can be made in a file, and gives its space back
	Zero    bool   `json:"zero"`    // a range can be made zeros without writing them
	Reserve bool   `json:"reserve"` // space can be reserved
	Sparse  bool   `json:"sparse"`  // holes can be found again (SEEK_HOLE)
	DSync   bool   `json:"dsync"`   // one write can be made durable without the others (RWF_DSYNC)
	Locks   bool   `json:"locks"`   // a lock keeps another opening out
	Network bool   `json:"network"` // other machines may see the same files

	Unsafe   []Finding `json:"unsafe,omitempty"`   // why no disk may be put here
	Warnings []Finding `json:"warnings,omitempty"` // what an administrator should know
}

// Direct is what O_DIRECT wants buffers, offsets and lengths to be multiples of, in
// bytes. Zero: there is no direct I/O.
type Direct struct {
	Memory int64 `json:"memory"`
	Offset int64 `json:"offset"`
}

// A Finding is something about storage that an administrator has to decide.
type Finding struct {
	What string `json:"what"` // that is so
	Why  string `json:"why"`  // that matters
	Fix  string `json:"fix"`
}

func (f Finding) String() string { return f.What + ": " + f.Why + "; " + f.Fix }

// UnsafeError means that storage must not hold disks.
type UnsafeError struct {
	Path, Type string
	Findings   []Finding
}

func (e *UnsafeError) Error() string {
	var why []string
	for _, f := range e.Findings {
		why = append(why, f.String())
	}
	return fmt.Sprintf("%s (%s) must not hold disks: %s", e.Path, e.Type, strings.Join(why, "; also "))
}

// Err is an *UnsafeError if the storage must not hold disks.
func (r *Report) Err() error {
	if len(r.Unsafe) == 0 {
		return nil
	}
	return &UnsafeError{r.Path, r.Type, r.Unsafe}
}

func (r *Report) unsafe(what, why, fix string) {
	r.Unsafe = append(r.Unsafe, Finding{what, why, fix})
}

func (r *Report) warn(what, why, fix string) {
	r.Warnings = append(r.Warnings, Finding{what, why, fix})
}

// ErrSilent means that storage did not answer in time, such as a server that is
// away. What was begun there goes on when it answers.
var ErrSilent = errors.New("the storage does not answer: is its server up?")

// Probe examines the storage of a folder. It writes there, about 2 MiB, and
// removes that again. An error means that it could not be found out; a report of
// unsafe storage is none ([Report.Err]).
func Probe(ctx context.Context, dir string) (*Report, error) { return within(ctx, dir, probe) }

// Identity tells a mount from others, as long as it is mounted: when it changes, a
// report is out of date.
func Identity(ctx context.Context, dir string) (uint64, error) { return within(ctx, dir, identity) }

// within runs f until it ends or ctx does: a call to a server that is away cannot
// be broken off.
func within[T any](ctx context.Context, dir string, f func(string) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f(dir)
		done <- result{value, err}
	}()
	var none T
	select {
	case got := <-done:
		if got.err != nil {
			return none, fmt.Errorf("probing the storage of %s: %w", dir, got.err)
		}
		return got.value, nil
	case <-ctx.Done():
		return none, fmt.Errorf("probing the storage of %s: %w (%w)", dir, ErrSilent, ctx.Err())
	}
}

func probe(dir string) (*Report, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if st, err := os.Stat(dir); err != nil {
		return nil, err
	} else if !st.IsDir() {
		return nil, fmt.Errorf("%s is no folder", dir)
	}
	r := &Report{Path: dir}
	m, err := mountOf(dir)
	if err != nil {
		return nil, err
	}
	r.Type, r.Source, r.Mount = m.Type, m.Source, m.Point
	r.Options = strings.Join(m.all(), ",")
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	r.Capacity, r.Free = int64(st.Blocks)*st.Bsize, int64(st.Bavail)*st.Bsize
	r.judge(m)
	if len(r.Unsafe) > 0 {
		return r, nil // what it can do does not matter
	}
	r.device(m)
	if err := r.try(); err != nil {
		return nil, err
	}
	return r, nil
}

func identity(dir string) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID, &st); err != nil {
		return 0, &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	return st.Mnt_id<<32 | uint64(st.Dev_major)<<20 | uint64(st.Dev_minor), nil
}
