package vmfiles

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// server is the running FUSE connection.
type server struct{ *fuse.Server }

const maxTransfer = 1 << 20 // bytes of a FUSE request

// mount mounts by itself, without fusermount: the descriptor of the connection
// must not be inherited by a child, which would keep a dead view hanging.
func (v *View) mount() error {
	dir := v.o.Mount
	if err := os.MkdirAll(dir, 0o700); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := release(dir); err != nil {
		return err
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening /dev/fuse (load the fuse module; in a container, pass the device): %w", err)
	}
	options := []string{
		fmt.Sprintf("fd=%d", fd), "rootmode=40000", fmt.Sprintf("user_id=%d", os.Geteuid()), fmt.Sprintf("group_id=%d", os.Getegid()),
		fmt.Sprintf("max_read=%d", maxTransfer), "default_permissions",
	}
	if v.o.UID != os.Geteuid() || v.o.GID != os.Getegid() {
		options = append(options, "allow_other") // default_permissions lets in its owner only
	}
	if err := unix.Mount("mortise", dir, "fuse.mortise", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, strings.Join(options, ",")); err != nil {
		unix.Close(fd)
		return err
	}
	var none time.Duration
	root := &folder{v: v}
	srv, err := fuse.NewServer(fs.NewNodeFS(root, &fs.Options{
		EntryTimeout: &none, AttrTimeout: &none, NegativeTimeout: &none, NullPermissions: true,
	}), fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		MaxWrite: maxTransfer, DisableXAttrs: true, DisableReadDirPlus: true, Name: "mortise", FsName: "mortise",
		Logger: slog.NewLogLogger(v.o.Log.Handler(), slog.LevelWarn),
		PanicHandler: func(p any) fuse.Status {
			v.o.Log.Error("serving a file of the VM panicked", "folder", v.o.Folder, "panic", fmt.Sprint(p))
			return fuse.EIO
		},
	})
	if err != nil {
		unix.Unmount(dir, unix.MNT_DETACH)
		return err
	}
	v.srv.Server = srv
	go srv.Serve()
	return v.refusePoll()
}

// refusePoll has the kernel ask once whether files can be polled, and hear that
// they cannot: else it would ask in the middle of a Go program's own open of a
// file in its own view, holding the thread that should answer.
func (v *View) refusePoll() error {
	fd, err := unix.Open(filepath.Join(v.o.Mount, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		v.unmount()
		return err
	}
	defer unix.Close(fd)
	unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return nil
}

func (v *View) unmount() error {
	if v.srv.Server == nil {
		return nil
	}
	var err error
	for try := range 10 {
		if err = unix.Unmount(v.o.Mount, 0); err == nil {
			v.srv.Wait()
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(time.Duration(try) * 5 * time.Millisecond)
	}
	if errors.Is(err, unix.EBUSY) {
		v.o.Log.Warn("the files of a VM are unmounted while a program has them open", "folder", v.o.Folder, "mount", v.o.Mount)
		err = unix.Unmount(v.o.Mount, unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmounting %s: %w", v.o.Mount, err)
	}
	return nil
}

// isMounted says whether a live FUSE file system is mounted on dir; a dead one is
// ENOTCONN. One that gives no answer in five seconds is a live process that hangs.
func isMounted(dir string) (bool, error) {
	type answer struct {
		mounted bool
		err     error
	}
	c := make(chan answer, 1)
	go func() {
		var fs unix.Statfs_t
		var here, above unix.Stat_t
		err := unix.Statfs(dir, &fs)
		if err == nil {
			err = unix.Stat(dir, &here)
		}
		if err == nil {
			err = unix.Stat(filepath.Dir(filepath.Clean(dir)), &above)
		}
		c <- answer{fs.Type == unix.FUSE_SUPER_MAGIC && here.Dev != above.Dev, err}
	}()
	select {
	case a := <-c:
		return a.mounted, a.err
	case <-time.After(5 * time.Second):
		return false, fmt.Errorf("%s: %w: a process has mounted it and does not answer", dir, ErrInUse)
	}
}

// folder is the root of the view.
type folder struct {
	fs.Inode
	v *View
}

var (
	_ fs.NodeLookuper  = (*folder)(nil)
	_ fs.NodeReaddirer = (*folder)(nil)
	_ fs.NodeCreater   = (*folder)(nil)
	_ fs.NodeUnlinker  = (*folder)(nil)
	_ fs.NodeRmdirer   = (*folder)(nil)
	_ fs.NodeRenamer   = (*folder)(nil)
	_ fs.NodeGetattrer = (*folder)(nil)
	_ fs.NodeStatfser  = (*folder)(nil)
	_ fs.NodeFsyncer   = (*folder)(nil)
)

func (d *folder) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o700
	out.Uid, out.Gid = uint32(d.v.o.UID), uint32(d.v.o.GID)
	return 0
}

func (d *folder) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.v.o.Folder, &st); err != nil {
		return fs.ToErrno(err)
	}
	out.FromStatfsT(&st)
	return 0
}

func (d *folder) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	d.v.mu.Lock()
	e, err := d.v.lookup(name)
	d.v.mu.Unlock()
	if err != nil {
		return nil, d.v.errno("open", name, err)
	}
	return d.child(ctx, e, out), 0
}

func (d *folder) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	names, err := d.v.names()
	if err != nil {
		return nil, d.v.errno("list", "", err)
	}
	slices.Sort(names)
	entries := make([]fuse.DirEntry, len(names))
	for i, name := range names {
		entries[i] = fuse.DirEntry{Name: name, Mode: syscall.S_IFREG}
	}
	return fs.NewListDirStream(entries), 0
}

func (d *folder) Create(ctx context.Context, name string, _, _ uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	e, err := d.v.create(name)
	if err != nil {
		return nil, nil, 0, d.v.errno("create", name, err)
	}
	return d.child(ctx, e, out), nil, fuse.FOPEN_DIRECT_IO, 0
}

// child makes the inode of e; while the kernel knows e already, it is that one,
// since the number is the same.
func (d *folder) child(ctx context.Context, e *entry, out *fuse.EntryOut) *fs.Inode {
	n := &node{v: d.v, e: e, f: e.f}
	n.attr(&out.Attr)
	return d.NewInode(ctx, n, fs.StableAttr{Mode: syscall.S_IFREG, Ino: e.ino})
}

func (d *folder) Unlink(_ context.Context, name string) syscall.Errno {
	return d.v.errno("remove", name, d.v.unlink(name))
}

func (d *folder) Rmdir(context.Context, string) syscall.Errno { return syscall.ENOTDIR }

func (d *folder) Rename(_ context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if newParent != fs.InodeEmbedder(d) || flags&^unix.RENAME_NOREPLACE != 0 {
		return syscall.EINVAL
	}
	return d.v.errno("rename", name, d.v.rename(name, newName, flags&unix.RENAME_NOREPLACE == 0))
}

// Fsync of the folder has nothing to do: every change of it was durable before it
// was acknowledged.
func (d *folder) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

// node is one file of the view. Files have no state per open: reads and writes go
// straight to the File, without the kernel's page cache.
type node struct {
	fs.Inode
	v *View
	e *entry
	f *File // e's
}

var (
	_ fs.NodeOpener      = (*node)(nil)
	_ fs.NodeReader      = (*node)(nil)
	_ fs.NodeWriter      = (*node)(nil)
	_ fs.NodeFsyncer     = (*node)(nil)
	_ fs.NodeFlusher     = (*node)(nil)
	_ fs.NodeGetattrer   = (*node)(nil)
	_ fs.NodeSetattrer   = (*node)(nil)
	_ fs.NodeAllocater   = (*node)(nil)
	_ fs.NodeOnForgetter = (*node)(nil)
)

func (n *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_TRUNC != 0 {
		if err := n.f.Truncate(0); err != nil {
			return nil, 0, n.errno("truncate", err)
		}
	}
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	m, err := n.f.ReadAt(dest, off)
	if err != nil && err != io.EOF {
		return nil, n.errno("read", err)
	}
	return fuse.ReadResultData(dest[:m]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	m, err := n.f.WriteAt(data, off)
	if err != nil && m == 0 {
		return 0, n.errno("write", err)
	}
	return uint32(m), 0
}

func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return n.errno("sync", n.f.Sync())
}

// Flush is called at close, which promises no durability; what was written is in
// the host's page cache, as ciphertext.
func (n *node) Flush(context.Context, fs.FileHandle) syscall.Errno { return 0 }

func (n *node) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if mode != 0 {
		return syscall.EOPNOTSUPP
	}
	if off > MaxLength || size > MaxLength {
		return syscall.EFBIG
	}
	if end := int64(off + size); end > n.f.Size() {
		return n.errno("allocate", n.f.Truncate(end))
	}
	return 0
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.attr(&out.Attr)
	return 0
}

// Setattr changes the length. Owner and mode are the view's and stay; times are
// those of the encrypted file, and setting them has no effect.
func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if mode, ok := in.GetMode(); ok && mode&0o077 != 0 {
		return syscall.EPERM
	}
	uid, setUID := in.GetUID()
	gid, setGID := in.GetGID()
	if setUID && int(uid) != n.v.o.UID || setGID && int(gid) != n.v.o.GID {
		return syscall.EPERM
	}
	if size, ok := in.GetSize(); ok {
		if size > MaxLength {
			return syscall.EFBIG
		}
		if err := n.f.Truncate(int64(size)); err != nil {
			return n.errno("truncate", err)
		}
	}
	n.attr(&out.Attr)
	return 0
}

func (n *node) attr(out *fuse.Attr) {
	st := n.f.stat()
	out.Ino = n.e.ino
	out.Mode = syscall.S_IFREG | 0o600
	out.Nlink = 1
	out.Uid, out.Gid = uint32(n.v.o.UID), uint32(n.v.o.GID)
	out.Size = uint64(n.f.Size())
	out.Blocks = uint64(st.Blocks)
	out.Blksize = blockSize
	out.Mtime, out.Mtimensec = uint64(st.Mtim.Sec), uint32(st.Mtim.Nsec)
	out.Ctime, out.Ctimensec = uint64(st.Ctim.Sec), uint32(st.Ctim.Nsec)
	out.Atime, out.Atimensec = out.Mtime, out.Mtimensec
}

// OnForget is called when no program has the file open and no name leads to it.
func (n *node) OnForget() { n.v.forget(n.e) }

func (n *node) errno(op string, err error) syscall.Errno {
	if err == nil {
		return 0
	}
	n.v.mu.Lock()
	name := n.e.name
	n.v.mu.Unlock()
	return n.v.errno(op, name, err)
}

// stat is about the encrypted file; zero when it cannot be asked.
func (f *File) stat() (st unix.Stat_t) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.f != nil {
		_ = unix.Fstat(int(f.f.Fd()), &st)
	}
	return st
}
