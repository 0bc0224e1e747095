// Package atomicfile reads and replaces the small text files of a VM's folder:
// VMX dictionaries, disk descriptors, headers. A reader sees the old content or
// the new, whole, also after a power cut.
//
// Place in the flow: level 0, below vmxfile and vmdk. It imports nothing of
// Mortise.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrTooLarge is wrapped by Read for a file that exceeds the caller's limit.
var ErrTooLarge = errors.New("file too large")

// Read returns the content of the regular file at path. A file of more than
// limit bytes gives ErrTooLarge: whoever can write a datastore must not be able
// to exhaust the reader's memory. A FIFO or device is refused without opening it
// for long: it could block for ever.
func Read(path string, limit int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: is not a regular file", path)
	}
	if st.Size() > int64(limit) {
		return nil, fmt.Errorf("%s: %w: %d bytes, at most %d are read", path, ErrTooLarge, st.Size(), limit)
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(b) > limit {
		return nil, fmt.Errorf("%s: %w: it grew past %d bytes while it was read", path, ErrTooLarge, limit)
	}
	return b, nil
}

// Write makes data the content of path: temporary file in the same folder,
// fsync, rename, fsync of the folder. It returns only when all of that is
// durable. An existing file's permission bits and owner are kept; a new file
// gets perm. When it fails before the rename, path is as it was; when only the
// last fsync fails, the new content is there and may be lost in a power cut.
//
// Two concurrent writers of one path leave one writer's whole content; who must
// not lose an update holds a lock round read and write.
func Write(path string, data []byte, perm fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name()) // after the rename there is nothing of that name
			err = fmt.Errorf("replacing %s: %w", path, err)
		}
	}()
	if st, serr := os.Lstat(path); serr == nil && st.Mode().IsRegular() {
		perm = st.Mode().Perm()
		if err := keepOwner(f, st); err != nil {
			return err
		}
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// keepOwner gives f the owner of the file that it replaces. Who is not
// privileged and not the owner keeps its own ids, as any editor would.
func keepOwner(f *os.File, st fs.FileInfo) error {
	var old, now unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &now); err != nil {
		return err
	}
	if err := unix.Lstat(filepath.Join(filepath.Dir(f.Name()), st.Name()), &old); err != nil {
		return err
	}
	if old.Uid == now.Uid && old.Gid == now.Gid {
		return nil
	}
	if err := f.Chown(int(old.Uid), int(old.Gid)); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
}

// SyncDir makes creations, renames and removals in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
