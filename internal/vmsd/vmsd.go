// Package vmsd reads and writes VMSD files: which snapshots a VM has, in the
// dictionary that VMware's products write beside the VMX. It says of each snapshot
// which link of each disk has what it froze; the links themselves say what stands
// on what, and the VMX which of them is a disk's top.
//
//	snapshot.lastUID = "2"               numbers are never used again
//	snapshot.current = "2"               what the disks stand on; absent: nothing
//	snapshot.numSnapshots = "2"
//	snapshot0.uid = "1"
//	snapshot0.displayName = "before the upgrade"
//	snapshot0.createTimeHigh = "404432"  microseconds since 1970, two signed halves
//	snapshot0.createTimeLow = "-1137541120"
//	snapshot0.numDisks = "1"
//	snapshot0.disk0.fileName = "vm.vmdk" the frozen link
//	snapshot0.disk0.node = "scsi0:0"
//	snapshot1.uid = "2"
//	snapshot1.parent = "1"
//
// Entries that begin with mortise. are ours: what an operation that may be
// interrupted has begun (see [Tree]).
//
// Nothing in the file is secret or authentic (rule E2): whoever can edit it could as
// well put older extents in the place of newer ones (doc/threat-model.md). A link
// that it names is opened as the disk that the VM's bundle says, or not at all.
//
// Place in the flow: level 1; vmx keeps the file. It imports vmxfile.
package vmsd

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"mortise/internal/vmxfile"
)

// A Tree is a VM's snapshots and what is being done to them.
type Tree struct {
	Snapshots []Snapshot // parents first
	Current   int        // UID of the snapshot that the disks stand on; 0: none
	LastUID   int

	// Making is the UID of a snapshot that is being made. Whether it was is what the
	// VMX says: then the disks are no longer on the links that it has frozen.
	Making int
	// Reverting is the UID of the snapshot that the VM is going back to, and New are the
	// links that are made for that. It has gone back when the VMX names those.
	Reverting int
	New       []string
	// Released are links, by the names of their descriptors, that no snapshot needs
	// any more. They are deleted or merged when they can be, unless the VMX names them.
	Released []string
	// Merge is the merge that is under way: of Link with its parent.
	Merge Merge
}

// A Merge makes one link of two. Which of them goes is seen afterwards.
type Merge struct{ Link, Parent string }

// A Snapshot is the disks of a VM at an instant.
type Snapshot struct {
	UID, Parent int // Parent 0: none
	Name        string
	Description string
	Created     time.Time // to the microsecond
	PoweredOn   bool      // a guest ran: its disks are as after a power cut
	Operation   string    // the id of the operation that made it, by which it is known when that is repeated
	Disks       []Disk
}

// A Disk is the link that a snapshot froze of one disk.
type Disk struct {
	Node string // the disk's place, "scsi0:0"
	File string // the link's descriptor, in the VM's folder
}

// Limits of what is read and kept.
const (
	MaxSnapshots = 1024
	maxDisks     = 256
)

// ErrFull: the VM has as many snapshots as there can be, or as its VMSD can hold.
var ErrFull = fmt.Errorf("no more snapshots: a VM has at most %d, and fewer if it has many disks", MaxSnapshots)

// Load reads the tree at path. A VM without the file has no snapshots. Errors are
// *vmxfile.Error or those of the file system.
func Load(path string) (*Tree, error) {
	f, err := vmxfile.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Tree{}, nil
	}
	if err != nil {
		return nil, err
	}
	return parse(f)
}

// Parse reads a tree from a file's text; name is what errors call it.
func Parse(name string, text []byte) (*Tree, error) {
	f, err := vmxfile.Parse(name, text)
	if err != nil {
		return nil, err
	}
	return parse(f)
}

// A reader keeps the first thing that is wrong.
type reader struct {
	f   *vmxfile.File
	err error
}

func (r *reader) fail(key, format string, args ...any) {
	if r.err == nil {
		r.err = &vmxfile.Error{File: r.f.Name(), Key: key, Cause: vmxfile.ErrValue, Why: fmt.Sprintf(format, args...) + "; restore the file from a backup, or delete it: then the VM has no snapshots, and its disks are as they are"}
	}
}

func (r *reader) int(key string, least, most int64) int64 {
	n, err := r.f.Int(key, max(least, 0))
	if err != nil {
		r.fail(key, "it is no number")
	} else if n < least || n > most {
		r.fail(key, "%d is not from %d to %d", n, least, most)
		n = least
	}
	return n
}

const maxUID = 1<<31 - 1

func (r *reader) uid(key string) int { return int(r.int(key, 0, maxUID)) }

// file reads the name of a link.
func (r *reader) file(key string) string {
	name := r.f.String(key, "")
	if !validName(name) {
		r.fail(key, "%q is not a disk of the VM's folder", name)
	}
	return name
}

func (r *reader) files(key string) (names []string) {
	for i := range r.int(key+".num", 0, MaxSnapshots*maxDisks) {
		if r.err != nil {
			return nil
		}
		names = append(names, r.file(fmt.Sprintf("%s%d", key, i)))
	}
	return names
}

func validName(n string) bool {
	return n == filepath.Base(n) && len(n) > len(".vmdk") && strings.HasSuffix(n, ".vmdk") && !strings.ContainsAny(n, "/\x00")
}

func parse(f *vmxfile.File) (*Tree, error) {
	r := &reader{f: f}
	t := &Tree{
		Current: r.uid("snapshot.current"), LastUID: r.uid("snapshot.lastUID"),
		Making: r.uid("mortise.making"), Reverting: r.uid("mortise.reverting"),
	}
	var read []Snapshot
	for i := range r.int("snapshot.numSnapshots", 0, MaxSnapshots) {
		if read = append(read, r.snapshot(fmt.Sprintf("snapshot%d.", i))); r.err != nil {
			return nil, r.err
		}
	}
	t.Released, t.New = r.files("mortise.released"), r.files("mortise.new")
	if _, merging := f.Get("mortise.merge.link"); merging {
		t.Merge = Merge{r.file("mortise.merge.link"), r.file("mortise.merge.parent")}
	}
	// Parents first: what is left over when no more come has no parent, or itself.
	for len(read) > 0 {
		n := len(t.Snapshots)
		read = slices.DeleteFunc(read, func(s Snapshot) bool {
			root := s.Parent == 0 || t.Find(s.Parent) != nil
			if root {
				if t.Find(s.UID) != nil {
					r.fail("snapshot.numSnapshots", "two snapshots have the uid %d", s.UID)
				}
				t.Snapshots = append(t.Snapshots, s)
				t.LastUID = max(t.LastUID, s.UID)
			}
			return root
		})
		if n == len(t.Snapshots) {
			r.fail("snapshot.numSnapshots", "the parent of snapshot %d, %d, is not there", read[0].UID, read[0].Parent)
			break
		}
	}
	for key, uid := range map[string]int{"snapshot.current": t.Current, "mortise.making": t.Making, "mortise.reverting": t.Reverting} {
		if uid != 0 && t.Find(uid) == nil {
			r.fail(key, "there is no snapshot %d", uid)
		}
	}
	if r.err != nil {
		return nil, r.err
	}
	return t, nil
}

func (r *reader) snapshot(at string) Snapshot {
	on, err := r.f.Bool(at+"mortisePoweredOn", false)
	if err != nil {
		r.fail(at+"mortisePoweredOn", "it is neither TRUE nor FALSE")
	}
	const half = 1 << 31
	high, low := r.int(at+"createTimeHigh", -half, half-1), r.int(at+"createTimeLow", -half, half-1)
	s := Snapshot{
		UID: r.uid(at + "uid"), Parent: r.uid(at + "parent"),
		Name: r.f.String(at+"displayName", ""), Description: r.f.String(at+"description", ""), PoweredOn: on,
		Created: time.UnixMicro(high<<32 | int64(uint32(low))).UTC(), Operation: r.f.String(at+"mortiseOperation", ""),
	}
	if s.UID == 0 {
		r.fail(at+"uid", "a snapshot has a number from 1")
	}
	for i := range r.int(at+"numDisks", 0, maxDisks) {
		d := fmt.Sprintf("%sdisk%d.", at, i)
		s.Disks = append(s.Disks, Disk{r.f.String(d+"node", ""), r.file(d + "fileName")})
	}
	return s
}

// Save replaces the file at path durably and in one step. What is too much for one
// file is not saved (ErrFull).
func (t *Tree) Save(path string) error {
	f, err := t.file()
	if err == nil {
		err = f.Save(path)
	}
	if errors.Is(err, vmxfile.ErrTooLarge) {
		err = fmt.Errorf("%w: %w", ErrFull, err)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func (t *Tree) file() (f *vmxfile.File, err error) {
	f = vmxfile.New()
	set := func(key, value string) {
		if err == nil {
			err = f.Set(key, value)
		}
	}
	number := func(key string, n int) {
		if n != 0 {
			set(key, strconv.Itoa(n))
		}
	}
	set("snapshot.lastUID", strconv.Itoa(t.LastUID))
	number("snapshot.current", t.Current)
	set("snapshot.numSnapshots", strconv.Itoa(len(t.Snapshots)))
	for i, s := range t.Snapshots {
		at := fmt.Sprintf("snapshot%d.", i)
		number(at+"uid", s.UID)
		number(at+"parent", s.Parent)
		set(at+"displayName", s.Name)
		if s.Description != "" {
			set(at+"description", s.Description)
		}
		µs := s.Created.UnixMicro()
		set(at+"createTimeHigh", strconv.FormatInt(µs>>32, 10))
		set(at+"createTimeLow", strconv.FormatInt(int64(int32(µs)), 10))
		if s.PoweredOn {
			set(at+"mortisePoweredOn", "TRUE")
		}
		if s.Operation != "" {
			set(at+"mortiseOperation", s.Operation)
		}
		number(at+"numDisks", len(s.Disks))
		for j, d := range s.Disks {
			set(fmt.Sprintf("%sdisk%d.fileName", at, j), d.File)
			set(fmt.Sprintf("%sdisk%d.node", at, j), d.Node)
		}
	}
	number("mortise.making", t.Making)
	number("mortise.reverting", t.Reverting)
	for key, names := range map[string][]string{"mortise.released": t.Released, "mortise.new": t.New} {
		number(key+".num", len(names))
		for i, n := range names {
			set(fmt.Sprintf("%s%d", key, i), n)
		}
	}
	if t.Merge != (Merge{}) {
		set("mortise.merge.link", t.Merge.Link)
		set("mortise.merge.parent", t.Merge.Parent)
	}
	return f, err
}

// Find returns the snapshot with a UID, nil if there is none.
func (t *Tree) Find(uid int) *Snapshot {
	i := slices.IndexFunc(t.Snapshots, func(s Snapshot) bool { return s.UID == uid })
	if i < 0 {
		return nil
	}
	return &t.Snapshots[i]
}

// Add puts a snapshot on the current one. It gives it its UID, and makes it neither
// current nor durable.
func (t *Tree) Add(s Snapshot) (uid int, err error) {
	if len(t.Snapshots) == MaxSnapshots || t.LastUID == maxUID {
		return 0, ErrFull
	}
	t.LastUID++
	s.UID, s.Parent = t.LastUID, t.Current
	t.Snapshots = append(t.Snapshots, s)
	return s.UID, nil
}

// Remove takes a snapshot out, with those below it if children. What stood on it
// stands on its parent then. The links that it alone needed are released.
func (t *Tree) Remove(uid int, children bool) {
	if t.Find(uid) == nil {
		return
	}
	gone := []int{uid}
	for _, s := range t.Snapshots { // parents first
		if children && slices.Contains(gone, s.Parent) {
			gone = append(gone, s.UID)
		}
	}
	for _, uid := range gone {
		s := t.Find(uid)
		if s == nil {
			continue
		}
		parent := s.Parent
		for _, d := range s.Disks {
			t.Release(d.File)
		}
		t.Snapshots = slices.DeleteFunc(t.Snapshots, func(o Snapshot) bool { return o.UID == uid })
		for i := range t.Snapshots {
			if t.Snapshots[i].Parent == uid {
				t.Snapshots[i].Parent = parent
			}
		}
		for _, at := range []*int{&t.Current, &t.Reverting} {
			if *at == uid {
				*at = parent
			}
		}
		if t.Making == uid {
			t.Making = 0
		}
	}
	t.Released = slices.DeleteFunc(t.Released, t.Needs)
}

// Release notes that a link is not needed any more.
func (t *Tree) Release(file string) {
	if !slices.Contains(t.Released, file) {
		t.Released = append(t.Released, file)
	}
}

// Needs tells whether a snapshot has frozen the link.
func (t *Tree) Needs(file string) bool {
	return slices.ContainsFunc(t.Snapshots, func(s Snapshot) bool {
		return slices.ContainsFunc(s.Disks, func(d Disk) bool { return d.File == file })
	})
}

// Replace notes that what a link had is in another one now.
func (t *Tree) Replace(file, by string) {
	for i := range t.Snapshots {
		for j := range t.Snapshots[i].Disks {
			if d := &t.Snapshots[i].Disks[j]; d.File == file {
				d.File = by
			}
		}
	}
	for i := range t.Released {
		if t.Released[i] == file {
			t.Released[i] = by
		}
	}
}
