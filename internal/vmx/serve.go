package vmx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/nbd"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
	"mortise/internal/vmfiles"
	"mortise/internal/vmxfile"
)

// An opened VM has its extents locked; with a guest, its disks are served.
type opened struct {
	disks map[uuid.UUID]*vdisk.Chain
	order []member
	serve *service // nil without a guest
}

// openAll opens every disk of the VM, and settles what an interrupted change has left.
// The extents' locks are held from here on.
func (v *vm) openAll(ctx context.Context) (o *opened, err error) {
	if err := v.settle(); err != nil {
		return nil, err
	}
	if o, err = v.openDisks(ctx); err != nil {
		return nil, err
	}
	if _, err := v.settledTree(); err != nil {
		return nil, errors.Join(err, o.closeDisks())
	}
	return o, nil
}

func (v *vm) openDisks(ctx context.Context) (o *opened, err error) {
	f, err := loadVMX(v.path)
	if err != nil {
		return nil, err
	}
	b, err := v.open(f)
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	all := &opened{disks: map[uuid.UUID]*vdisk.Chain{}}
	defer func() {
		if err != nil {
			_ = all.closeDisks()
		}
	}()
	if all.order, err = v.members(f, b); err != nil {
		return nil, err
	}
	for _, m := range all.order {
		d, err := v.openDisk(ctx, m, false)
		if err != nil {
			return nil, err
		}
		all.disks[m.id] = d
	}
	return all, nil
}

func (o *opened) closeDisks() (err error) {
	for _, d := range o.disks {
		err = errors.Join(err, d.Close())
	}
	return err
}

// A service is what a running guest sees of its VM: disks on NBD sockets, files
// in a FUSE mount.
type service struct {
	servers []*nbd.Server
	running sync.WaitGroup
	stop    context.CancelFunc
	served  []*hostapi.ServedDisk
	view    *vmfiles.View // nil when the VM is in clear
	nvram   string
}

// A device is a disk as the NBD server wants one: the two count statuses alike
// and know nothing of each other. It marks the run folder before the guest hears
// of a failed fsync: that is final for the guest, also when this process dies and
// the next one finds storage that answers again (design §4 Failure).
type device struct {
	*vdisk.Chain
	failed func(error)
}

func (d device) check(err error) error {
	if err != nil {
		if dead := d.Failed(); dead != nil {
			d.failed(dead)
		}
	}
	return err
}

func (d device) ReadAt(p []byte, off int64) error  { return d.check(d.Chain.ReadAt(p, off)) }
func (d device) WriteAt(p []byte, off int64) error { return d.check(d.Chain.WriteAt(p, off)) }
func (d device) Flush(ctx context.Context) error   { return d.check(d.Chain.Flush(ctx)) }
func (d device) Trim(off, n int64) error           { return d.check(d.Chain.Trim(off, n)) }

func (d device) WriteZeroes(off, n int64, punch bool) error {
	return d.check(d.Chain.WriteZeroes(off, n, punch))
}

// FailedFile is the mark that a disk of a VM failed for good, in the vmx's run
// folder. It holds the reason, in words.
const FailedFile = "failed"

func (c Config) markFailed(failure error) {
	f, err := os.OpenFile(filepath.Join(c.RunDir, FailedFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return
	}
	if err == nil {
		_, err = f.WriteString(failure.Error())
		err = errors.Join(err, f.Close())
	}
	c.Logger.Error("a disk failed for good", "error", failure, "mark", err)
}

func (d device) BlockStatus(off, n int64, emit func(n int64, s nbd.Status) bool) error {
	return d.Chain.BlockStatus(off, n, func(n int64, s vdisk.Status) bool { return emit(n, nbd.Status(s)) })
}

// guestDir is the part of the run folder that QEMU's user may enter: disk
// sockets, the console's, and filesDir, where the clear view of the VM's files is
// mounted. The host agent unmounts that when this process has ended.
const (
	guestDir = "guest"
	filesDir = "files"
)

// handOver gives a file to the user that QEMU runs as.
func (c Config) handOver(path string) error {
	if c.UID == 0 && c.GID == 0 {
		return nil
	}
	return os.Chown(path, c.UID, c.GID)
}

// startService serves the opened disks first and the files after: a guest that
// runs already waits for its disks (design §4 Failure).
func (v *vm) startService(o *opened, cfg Config) (_ *service, err error) {
	log := cfg.Logger
	runDir := filepath.Join(cfg.RunDir, guestDir)
	if err := errors.Join(os.MkdirAll(runDir, 0o700), cfg.handOver(runDir)); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &service{stop: stop}
	defer func() {
		if err != nil {
			s.end(time.Second)
		}
	}()
	for i, m := range o.order {
		sock := filepath.Join(runDir, fmt.Sprintf("disk%d.sock", i))
		l, err := nbd.Listen(sock)
		if err != nil {
			return nil, err
		}
		if err := cfg.handOver(sock); err != nil {
			return nil, err
		}
		srv := nbd.New(nbd.Options{Logger: log.With("disk", m.controller)})
		s.servers = append(s.servers, srv)
		if _, err := srv.Add("", device{o.disks[m.id], cfg.markFailed}, false); err != nil {
			return nil, err
		}
		s.running.Go(func() { serveDisk(ctx, srv, l, log) })
		s.served = append(s.served, &hostapi.ServedDisk{Uuid: m.id.String(), NbdSocket: sock, Controller: m.controller})
	}
	f, err := loadVMX(v.path)
	if err != nil {
		return nil, err
	}
	folder := filepath.Dir(v.path)
	if keysafe.IsEncrypted(f) {
		folder = filepath.Join(runDir, filesDir)
		if s.view, err = v.mountFiles(f, folder, cfg); err != nil {
			return nil, err
		}
	}
	if f.String("firmware", "bios") == "efi" {
		s.nvram = filepath.Join(folder, nvramName(f, v.path))
	}
	return s, nil
}

func serveDisk(ctx context.Context, srv *nbd.Server, l net.Listener, log *slog.Logger) {
	if err := srv.Serve(ctx, l); err != nil && ctx.Err() == nil {
		log.Error("a disk's server ended", "error", err)
	}
}

// mountFiles shows the VM's encrypted files in clear, to its QEMU only. A new
// file's DEK is in the bundle on disk before the file's first byte is.
func (v *vm) mountFiles(f *vmxfile.File, at string, cfg Config) (*vmfiles.View, error) {
	b, err := v.open(f)
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	keys := map[string]*secret.Key{}
	for name, k := range b.Files {
		keys[name] = k
	}
	return vmfiles.Mount(vmfiles.Options{
		Folder: filepath.Dir(v.path), Mount: at, Keys: keys, Log: cfg.Logger, UID: cfg.UID, GID: cfg.GID,
		NewKey: func(name string) (*secret.Key, error) {
			key, err := secret.Random(v.random, keysafe.DEKSize(keysafe.CipherXTS))
			if err != nil {
				return nil, err
			}
			err = v.edit(func(_ *vmxfile.File, b *keysafe.Bundle) error {
				if b == nil { // decrypted under its guest
					return fmt.Errorf("%s: %w", v.path, keysafe.ErrNotEncrypted)
				}
				kept, err := key.Clone()
				if err != nil {
					return err
				}
				b.Files[name] = kept
				return nil
			})
			if err != nil {
				key.Wipe()
				return nil, err
			}
			return key, nil
		},
	})
}

// end answers the requests that were read, then closes the connections.
func (s *service) end(limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, srv := range s.servers {
		_ = srv.Shutdown(ctx)
	}
	s.stop()
	s.running.Wait()
	if s.view != nil {
		// Its mount stays: the sandbox forbids to unmount, the agent does it.
		_ = s.view.Close()
	}
}
