package ha

import (
	"context"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// disk is a member's file system: a folder seen through FUSE, whose syncs can be
// made slow and which can be full. What is written goes to the real folder, so
// nothing of durability is lost in between.
type disk struct {
	slow atomic.Int64 // nanoseconds that a sync takes longer
	full atomic.Bool  // new bytes are refused: ENOSPC
}

// mount shows the folder real at path.
func mount(t *testing.T, real, path string) *disk {
	t.Helper()
	d := &disk{}
	root := &fs.LoopbackRoot{Path: real}
	//lint:ignore SA1019 WrapChild wraps the loopback's node; this one embeds it
	root.NewNode = func(_ *fs.LoopbackRoot, _ *fs.Inode, _ string, _ *syscall.Stat_t) fs.InodeEmbedder {
		return &diskNode{LoopbackNode: fs.LoopbackNode{RootData: root}, d: d}
	}
	second := time.Second
	server, err := fs.Mount(path, &diskNode{LoopbackNode: fs.LoopbackNode{RootData: root}, d: d}, &fs.Options{
		AttrTimeout: &second, EntryTimeout: &second,
		MountOptions: fuse.MountOptions{FsName: "ha", Name: "mortise-ha", DirectMountStrict: true, Logger: nil},
	})
	if err != nil {
		t.Skipf("FUSE cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		for range 50 {
			if server.Unmount() == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		syscall.Unmount(path, syscall.MNT_DETACH)
	})
	return d
}

func (d *disk) pause() {
	if ns := d.slow.Load(); ns > 0 {
		time.Sleep(time.Duration(ns))
	}
}

type diskNode struct {
	fs.LoopbackNode
	d *disk
}

var (
	_ fs.NodeOpener  = (*diskNode)(nil)
	_ fs.NodeCreater = (*diskNode)(nil)
)

func (n *diskNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	h, f, errno := n.LoopbackNode.Open(ctx, flags)
	return n.wrap(h), f, errno
}

func (n *diskNode) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if n.d.full.Load() {
		return nil, nil, 0, syscall.ENOSPC
	}
	i, h, f, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	return i, n.wrap(h), f, errno
}

func (n *diskNode) wrap(h fs.FileHandle) fs.FileHandle {
	if f, ok := h.(*fs.LoopbackFile); ok {
		return &diskFile{LoopbackFile: f, d: n.d}
	}
	return h
}

type diskFile struct {
	*fs.LoopbackFile
	d *disk
}

// PassthroughFd keeps the kernel from writing past this.
func (f *diskFile) PassthroughFd() (int, bool) { return 0, false }

func (f *diskFile) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	if f.d.full.Load() {
		return 0, syscall.ENOSPC
	}
	return f.LoopbackFile.Write(ctx, data, off)
}

func (f *diskFile) Allocate(ctx context.Context, off, size uint64, mode uint32) syscall.Errno {
	if f.d.full.Load() {
		return syscall.ENOSPC
	}
	return f.LoopbackFile.Allocate(ctx, off, size, mode)
}

func (f *diskFile) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	f.d.pause()
	return f.LoopbackFile.Fsync(ctx, flags)
}
