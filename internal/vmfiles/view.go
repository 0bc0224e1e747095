package vmfiles

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
	"mortise/internal/secret"
)

// Options say what a View shows and where.
type Options struct {
	Folder string // the VM's folder on the datastore
	Mount  string // the view's mount point, made when it is missing; private to the VM

	// Keys are the DEKs of the files that are there, by name. They stay the
	// caller's.
	Keys map[string]*secret.Key
	// NewKey makes the DEK of a new file and persists it before it returns: no
	// byte is written under a key that could be lost. The view wipes it.
	NewKey func(name string) (*secret.Key, error)
	// Names says which names the view may hold; nil means Encrypted.
	Names func(name string) bool

	// UID and GID own the files in the view. When they are not the process's own,
	// that user, and root, may use the view; else nobody but the process's own
	// user.
	UID, GID int

	Log *slog.Logger
}

// A View is a mounted folder that shows encrypted files in clear.
type View struct {
	o   Options
	srv server

	mu    sync.Mutex // held over every change of what names mean
	keys  map[string]*secret.Key
	files map[string]*entry   // open files by name; they stay open while they have it
	open  map[*entry]struct{} // these, and removed ones that a program still has open
	ino   uint64
}

// An entry is an open file of the view.
type entry struct {
	f    *File
	name string // guarded by View.mu
	ino  uint64
}

// renamePrefix marks the copy that a rename makes; one left by a crash is removed
// by the next mount.
const renamePrefix = ".mortise-rename-"

// Mount mounts a view. A mount that a killed process left on the mount point is
// released first; a live one is ErrInUse.
func Mount(o Options) (*View, error) {
	if o.Names == nil {
		o.Names = Encrypted
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	v := &View{o: o, keys: map[string]*secret.Key{}, files: map[string]*entry{}, open: map[*entry]struct{}{}, ino: 1}
	for name, k := range o.Keys {
		c, err := k.Clone()
		if err != nil {
			v.wipe()
			return nil, err
		}
		v.keys[name] = c
	}
	if err := v.removeLeftovers(); err != nil {
		v.wipe()
		return nil, err
	}
	if err := v.mount(); err != nil {
		v.wipe()
		return nil, fmt.Errorf("mounting the files of %s: %w", o.Folder, err)
	}
	return v, nil
}

func (v *View) removeLeftovers() error {
	entries, err := os.ReadDir(v.o.Folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), renamePrefix) {
			if err := os.Remove(v.path(e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close unmounts the view, makes every file durable and wipes the keys. When a
// program still has files open, the mount point is freed and the program gets
// errors from then on.
func (v *View) Close() error {
	err := v.unmount()
	v.mu.Lock()
	defer v.mu.Unlock()
	for e := range v.open {
		err = errors.Join(err, e.f.Close())
	}
	clear(v.open)
	clear(v.files)
	v.wipe()
	return err
}

func (v *View) wipe() {
	for _, k := range v.keys {
		k.Wipe()
	}
	clear(v.keys)
}

// holds says whether name may be in the view.
func (v *View) holds(name string) bool {
	return v.o.Names(name) && !strings.HasPrefix(name, renamePrefix)
}

func (v *View) path(name string) string { return filepath.Join(v.o.Folder, name) }

// lookup returns the open file of name. The caller holds v.mu.
func (v *View) lookup(name string) (*entry, error) {
	if e := v.files[name]; e != nil {
		return e, nil
	}
	if !v.holds(name) {
		return nil, syscall.ENOENT
	}
	if _, err := os.Lstat(v.path(name)); err != nil {
		return nil, err
	}
	k := v.keys[name]
	if k == nil {
		return nil, fmt.Errorf("%s: %w: the VM has no key for it, so it was put there; remove it, or restore it from a backup", v.path(name), ErrNotEncrypted)
	}
	f, err := Open(v.path(name), k, false)
	if err != nil {
		return nil, err
	}
	return v.add(name, f), nil
}

func (v *View) add(name string, f *File) *entry {
	v.ino++
	e := &entry{f: f, name: name, ino: v.ino}
	v.files[name] = e
	v.open[e] = struct{}{}
	return e
}

// key returns the DEK of name, a new one when it has none yet.
func (v *View) key(name string) (*secret.Key, error) {
	if k := v.keys[name]; k != nil {
		return k, nil
	}
	if v.o.NewKey == nil {
		return nil, fmt.Errorf("%s: this view makes no new files: %w", v.path(name), syscall.EPERM)
	}
	k, err := v.o.NewKey(name)
	if err != nil {
		return nil, fmt.Errorf("making a key for %s: %w", v.path(name), err)
	}
	v.keys[name] = k
	return k, nil
}

// create makes name, empty.
func (v *View) create(name string) (*entry, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.holds(name) {
		return nil, fmt.Errorf("%s: no file of that name is encrypted, and this view holds no other: %w", v.path(name), syscall.EPERM)
	}
	k, err := v.key(name)
	if err != nil {
		return nil, err
	}
	f, err := Create(v.path(name), k)
	if err != nil {
		return nil, err
	}
	return v.add(name, f), nil
}

// unlink removes name. Programs that have it open keep it until they close it.
func (v *View) unlink(name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.holds(name) {
		return syscall.ENOENT
	}
	if err := os.Remove(v.path(name)); err != nil {
		return err
	}
	delete(v.files, name) // forget closes it
	return atomicfile.SyncDir(v.o.Folder)
}

// rename gives the file from the name to: its content is copied under that name's
// DEK, and the copy takes the name in one step. A crash before that step leaves
// both as they were; one after it may leave the old name too, with the same
// content.
func (v *View) rename(from, to string, replace bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, err := v.lookup(from)
	if err != nil {
		return err
	}
	if from == to {
		return nil
	}
	if !v.holds(to) {
		return fmt.Errorf("%s: no file of that name is encrypted, and this view holds no other: %w", v.path(to), syscall.EPERM)
	}
	if _, err := os.Lstat(v.path(to)); err == nil && !replace {
		return syscall.EEXIST
	}
	k, err := v.key(to)
	if err != nil {
		return err
	}
	if err := e.f.moveTo(v.path(to), v.path(renamePrefix+to), k); err != nil {
		return err
	}
	delete(v.files, from)
	e.name, v.files[to] = to, e
	if err := os.Remove(v.path(from)); err != nil {
		return err
	}
	return atomicfile.SyncDir(v.o.Folder)
}

// moveTo makes f the file at path, under dek, by way of a copy at temporary. Who
// has f open goes on with it there.
func (f *File) moveTo(path, temporary string, dek *secret.Key) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	g, err := Create(temporary, dek)
	if err != nil {
		return err
	}
	if err = copyContent(g, lockedFile{f}); err == nil {
		err = g.Sync()
	}
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		g.Close()
		os.Remove(temporary)
		return fmt.Errorf("renaming %s to %s: %w", f.path, path, err)
	}
	f.f.Close()
	f.cipher.Wipe()
	f.mac.Wipe()
	f.path, f.f, f.d, f.cipher, f.mac = path, g.f, g.d, g.cipher, g.mac
	f.h, f.current, f.durable, f.tailClean = g.h, g.current, g.durable, g.tailClean
	if err := atomicfile.SyncDir(filepath.Dir(path)); err != nil {
		f.failed = fmt.Errorf("%s: its new name could not be made durable: %w", path, err)
		return f.failed
	}
	return nil
}

// lockedFile reads a file whose lock the caller holds.
type lockedFile struct{ f *File }

func (l lockedFile) ReadAt(p []byte, off int64) (int, error) { return l.f.readAt(p, off) }
func (l lockedFile) Size() int64                             { return l.f.h.length }

// names lists what the folder holds of the view.
func (v *View) names() ([]string, error) {
	entries, err := os.ReadDir(v.o.Folder)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if v.holds(e.Name()) && e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// forget closes a file that has no name any more and that nobody has open.
func (v *View) forget(e *entry) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, open := v.open[e]; open && v.files[e.name] != e {
		delete(v.open, e)
		v.log("close", e.name, e.f.Close())
	}
}

// errno is what a program sees of err; what is not its own mistake is logged.
func (v *View) errno(op, name string, err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, os.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, os.ErrExist):
		return syscall.EEXIST
	case errors.Is(err, ErrInUse):
		e = syscall.EBUSY
	case errors.Is(err, ErrNotEncrypted) || !errors.As(err, &e):
		e = syscall.EIO
	}
	v.log(op, name, err)
	return e
}

func (v *View) log(op, name string, err error) {
	if err != nil {
		v.o.Log.Error("a file of the VM failed", "op", op, "file", v.path(name), "err", err)
	}
}

// release frees a mount point from what a killed process left on it.
func release(dir string) error {
	for range 16 {
		mounted, err := isMounted(dir)
		switch {
		case errors.Is(err, unix.ENOTCONN):
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("releasing the mount that a killed process left on %s: %w", dir, err)
			}
		case err != nil:
			return err
		case mounted:
			return fmt.Errorf("%s: %w: a live process has mounted it", dir, ErrInUse)
		default:
			return nil
		}
	}
	return fmt.Errorf("%s: too many mounts on top of one another", dir)
}
