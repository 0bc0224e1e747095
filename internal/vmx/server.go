package vmx

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"

	"mortise/internal/hostapi"
	"mortise/internal/nbd"
	"mortise/internal/vdisk"
)

// Config is what a vmx process is told on its command line.
type Config struct {
	VMX    string // path of the VM's VMX; its folder is the VM's
	RunDir string // for its sockets and the mount of its files
	UID    int    // of the user that QEMU runs as; 0: root
	GID    int
	Direct bool // disks are read and written round the page cache (vdisk.Options)
	Logger *slog.Logger

	at       func(step string) // tests: called at every step of a change that is on disk; nil: not
	diskStep func(step string) // tests: the same of each disk's own steps
}

const (
	controlSocket = "control.sock"
	liveDir       = "live"
)

// Run is the whole life of a vmx process: it listens for its host agent until
// Close is called or ctx ends, and then leaves disks flushed, locks released and
// keys wiped.
func Run(ctx context.Context, cfg Config) error {
	l, err := nbd.Listen(filepath.Join(cfg.RunDir, controlSocket))
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if cfg.at == nil {
		cfg.at = func(string) {}
	}
	closing, interrupt := context.WithCancel(ctx)
	defer interrupt()
	s := &server{cfg: cfg, log: cfg.Logger, stop: stop, closing: closing, interrupt: interrupt, vm: &vm{log: cfg.Logger, path: cfg.VMX, live: filepath.Join(cfg.RunDir, liveDir), direct: cfg.Direct, at: cfg.at, diskStep: cfg.diskStep}}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(4 << 20))
	hostapi.RegisterVMXServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	s.log.Info("vmx started", "folder", filepath.Dir(cfg.VMX))
	select {
	case err = <-done:
	case <-ctx.Done():
		finished := make(chan struct{})
		go func() { g.GracefulStop(); close(finished) }()
		select {
		case <-finished:
		case <-time.After(5 * time.Second):
			g.Stop()
		}
	}
	cerr := s.close()
	s.log.Info("vmx ended")
	return errors.Join(err, cerr)
}

// server is the VMX service. One operation runs at a time: op holds a token.
type server struct {
	hostapi.UnimplementedVMXServer
	cfg  Config
	log  *slog.Logger
	stop context.CancelFunc

	closing   context.Context // ends when the VM is to be closed: what runs then stops
	interrupt context.CancelFunc

	op sync.Mutex // held by whatever opens, changes or closes the VM

	confined bool // by confine, under op

	mu   sync.Mutex // protects what follows; taken inside op
	vm   *vm
	open *opened
}

// Create implements hostapi.VMXServer.
func (s *server) Create(ctx context.Context, r *hostapi.VMXCreateRequest) (*hostapi.VMInfo, error) {
	s.op.Lock()
	defer s.op.Unlock()
	if err := s.vm.takeKeys(r.Keys); err != nil {
		return nil, err
	}
	if err := s.confine(); err != nil {
		return nil, err
	}
	if err := s.vm.create(ctx, r.Vm); err != nil {
		return nil, faultOf(err)
	}
	return s.vm.describe()
}

// Open implements hostapi.VMXServer.
func (s *server) Open(ctx context.Context, r *hostapi.OpenRequest) (*hostapi.VMXStatus, error) {
	s.op.Lock()
	defer s.op.Unlock()
	if err := s.vm.takeKeys(r.Keys); err != nil {
		return nil, err
	}
	if s.open != nil {
		return s.status()
	}
	if err := s.vm.identify(r.Ref); err != nil {
		return nil, err
	}
	s.log.Info("opening the VM", "for a guest", r.Serve, "restarted", r.Restarted)
	o, err := s.openWithRetry(ctx, r.Restarted)
	if err != nil {
		return nil, err
	}
	if r.Restarted {
		// What the process before wrote and never flushed must not be lost with
		// the power after this one has acknowledged a flush (design §4 Failure).
		for _, d := range o.disks {
			if err := d.Flush(ctx); err != nil {
				_ = o.closeDisks()
				return nil, faultOf(err)
			}
		}
	}
	if r.Serve { // the sandbox forbids to mount and to listen
		if o.serve, err = s.vm.startService(o, s.cfg); err != nil {
			_ = o.closeDisks()
			return nil, faultOf(err)
		}
	}
	s.mu.Lock()
	s.open = o
	s.mu.Unlock()
	if err := s.confine(); err != nil {
		return nil, err
	}
	return s.status()
}

// openWithRetry waits, after a restart, for the locks of the process before: it
// may be dying still.
func (s *server) openWithRetry(ctx context.Context, restarted bool) (*opened, error) {
	limit := time.Now().Add(10 * time.Second)
	for {
		o, err := s.vm.openAll(ctx)
		if err == nil || !restarted || !errors.Is(err, vdisk.ErrInUse) || time.Now().After(limit) {
			return o, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *server) status() (*hostapi.VMXStatus, error) {
	s.mu.Lock()
	o := s.open
	s.mu.Unlock()
	if o == nil {
		return &hostapi.VMXStatus{}, nil
	}
	st := &hostapi.VMXStatus{Uuid: s.vm.id.String(), Open: true}
	for _, d := range o.disks {
		if err := d.Failed(); err != nil {
			st.Problem = err.Error()
		}
	}
	if o.serve != nil {
		st.Serving, st.Disks, st.NvramPath = true, o.serve.served, o.serve.nvram
		if o.serve.view != nil {
			st.FilesMount = filepath.Join(s.cfg.RunDir, guestDir, filesDir)
		}
	}
	return st, nil
}

// Status implements hostapi.VMXServer.
func (s *server) Status(context.Context, *hostapi.StatusRequest) (*hostapi.VMXStatus, error) {
	return s.status()
}

// Reconfigure implements hostapi.VMXServer.
func (s *server) Reconfigure(r *hostapi.VMXReconfigureRequest, stream hostapi.VMX_ReconfigureServer) error {
	s.op.Lock()
	defer s.op.Unlock()
	live, err := s.beginChange(r.Keys, r.Change.GetRef())
	if err != nil {
		return err
	}
	tell := progressTo(stream)
	change := s.vm.reconfigure
	if r.Change.Undo {
		change = s.vm.undo
	}
	ctx, done := s.whileOpen(stream.Context())
	defer done()
	defer s.vm.forget()
	if err := change(ctx, r.Change, live, tell); err != nil {
		if ctx.Err() != nil {
			s.log.Info("a change was stopped at a durable point", "operation", r.Change.Header.GetOperationId())
		}
		return faultOf(err)
	}
	info, err := s.vm.describe()
	if err != nil {
		return err
	}
	return stream.Send(&hostapi.Progress{Stage: "done", Result: info})
}

// beginChange is how every change of a VM that exists begins. live are its disks if
// they are open.
func (s *server) beginChange(keys []*hostapi.KEK, ref *hostapi.VMRef) (live map[uuid.UUID]*vdisk.Chain, err error) {
	if err := s.vm.takeKeys(keys); err != nil {
		return nil, err
	}
	if err := s.vm.identify(ref); err != nil {
		return nil, err
	}
	if err := s.confine(); err != nil {
		return nil, err
	}
	if s.open != nil {
		live = s.open.disks
	}
	return live, nil
}

// ChangeSnapshots implements hostapi.VMXServer.
func (s *server) ChangeSnapshots(r *hostapi.VMXSnapshotRequest, stream hostapi.VMX_ChangeSnapshotsServer) error {
	s.op.Lock()
	defer s.op.Unlock()
	live, err := s.beginChange(r.Keys, r.Change.GetRef())
	if err != nil {
		return err
	}
	ctx, done := s.whileOpen(stream.Context())
	defer done()
	if err := s.vm.changeSnapshots(ctx, r.Change, r.Running, live, progressTo(stream)); err != nil {
		return faultOf(err)
	}
	info, err := s.vm.describe()
	if err != nil {
		return err
	}
	return stream.Send(&hostapi.Progress{Stage: "done", Result: info})
}

// progressTo sends how far a change is, now and then. A caller that went away cancels
// the context.
func progressTo(stream interface{ Send(*hostapi.Progress) error }) report {
	var last time.Time
	return func(stage string, p vdisk.Progress) {
		if now := time.Now(); p.Total == 0 || p.Done == p.Total || now.Sub(last) > 200*time.Millisecond {
			last = now
			_ = stream.Send(&hostapi.Progress{Stage: stage, DoneBytes: p.Done, TotalBytes: p.Total, BytesPerSecond: int64(p.Rate), LeftSeconds: p.Left.Seconds(), Back: p.Back})
		}
	}
}

// whileOpen is a call's context, which also ends when the VM is to be closed.
func (s *server) whileOpen(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.closing, cancel)
	return ctx, func() { stop(); cancel() }
}

// ImportDisk implements hostapi.VMXServer.
func (s *server) ImportDisk(stream hostapi.VMX_ImportDiskServer) error {
	s.op.Lock()
	defer s.op.Unlock()
	chunk, err := stream.Recv()
	if err != nil {
		return err
	}
	if s.open == nil {
		return hostapi.Faultf(hostapi.Fault_INVALID, "the VM is not open")
	}
	id, err := parseUUID("a disk", chunk.DiskUuid)
	if err != nil {
		return err
	}
	d := s.open.disks[id]
	if d == nil {
		return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s has no disk %s", s.cfg.VMX, id)
	}
	reply := &hostapi.ImportReply{}
	for ; err == nil; chunk, err = stream.Recv() {
		if len(chunk.Data) == 0 {
			continue
		}
		n := int64(len(chunk.Data))
		if chunk.Offset < 0 || n > d.Size() || chunk.Offset > d.Size()-n {
			return hostapi.Faultf(hostapi.Fault_INVALID, "the import has %d bytes at %d of a disk of %d bytes: the image is larger than the disk", n, chunk.Offset, d.Size())
		}
		if chunk.Offset%vdisk.SectorSize != 0 || n%vdisk.SectorSize != 0 {
			return hostapi.Faultf(hostapi.Fault_INVALID, "the import has %d bytes at %d: it comes in whole sectors of %d bytes", n, chunk.Offset, vdisk.SectorSize)
		}
		if s.closing.Err() != nil {
			return hostapi.Faultf(hostapi.Fault_BUSY, "the VM is being closed: import again")
		}
		if err := d.WriteAt(chunk.Data, chunk.Offset); err != nil {
			return faultOf(err)
		}
		reply.WrittenBytes += int64(len(chunk.Data))
	}
	if err != io.EOF {
		return err
	}
	if err := d.Flush(stream.Context()); err != nil {
		return faultOf(err)
	}
	return stream.SendAndClose(reply)
}

// Keys implements hostapi.VMXServer.
func (s *server) Keys(context.Context, *hostapi.KeysRequest) (*hostapi.OpenRequest, error) {
	s.op.Lock()
	defer s.op.Unlock()
	r := &hostapi.OpenRequest{Ref: &hostapi.VMRef{Uuid: s.vm.id.String()}}
	s.vm.mu.Lock()
	defer s.vm.mu.Unlock()
	for id, k := range s.vm.keks {
		kek := &hostapi.KEK{Id: &hostapi.KeyID{Provider: id.Provider, Key: id.Key}}
		k.Use(func(b []byte) { kek.Bytes = append([]byte(nil), b...) })
		r.Keys = append(r.Keys, kek)
	}
	return r, nil
}

// Close implements hostapi.VMXServer.
func (s *server) Close(context.Context, *hostapi.CloseRequest) (*hostapi.CloseReply, error) {
	s.interrupt()
	err := s.close()
	s.stop()
	return &hostapi.CloseReply{}, faultOf(err)
}

func (s *server) close() error {
	s.op.Lock()
	defer s.op.Unlock()
	s.mu.Lock()
	o := s.open
	s.open = nil
	s.mu.Unlock()
	var err error
	if o != nil {
		if o.serve != nil {
			o.serve.end(5 * time.Second)
		}
		// A disk that was served is durable when its VM is powered off.
		for _, d := range o.disks {
			err = errors.Join(err, d.Flush(context.Background()))
		}
		err = errors.Join(err, o.closeDisks())
	}
	s.vm.wipe()
	return err
}
