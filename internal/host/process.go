package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"mortise/internal/hostapi"
)

// A process is a running vmx process as the agent sees it. It is no child in the
// sense that matters: it lives on when the agent dies, and an agent that starts
// again adopts it by its socket.
type process struct {
	hostapi.VMXClient
	dir    string // its run folder
	pid    int
	exited <-chan struct{} // closed when the process is gone, whoever started it
	conn   *grpc.ClientConn
}

// controlSocket is the name of a vmx's socket in its run folder.
const controlSocket = "control.sock"

// maxSocketPath is what sockaddr_un holds, less the closing zero byte.
const maxSocketPath = 107

// startProcess runs a vmx for the VM whose VMX is at vmxPath. runDir is its
// own folder under the agent's run folder, and no vmx runs in it.
func (a *Agent) startProcess(ctx context.Context, runDir, vmxPath string) (*process, error) {
	sock := filepath.Join(runDir, controlSocket)
	if len(sock) > maxSocketPath {
		return nil, fmt.Errorf("the socket path %s is longer than %d bytes: set a shorter run_dir", sock, maxSocketPath)
	}
	if err := os.Remove(sock); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// What vmx logs belongs to the VM's log (E2: nothing of the guest's, no key).
	log, err := openLog(filepath.Join(filepath.Dir(vmxPath), "vmware.log"))
	if err != nil {
		return nil, fmt.Errorf("opening the VM's log: %w", err)
	}
	defer log.Close()
	args := append(slices.Clone(a.cfg.VMXArgs), "--run-dir", runDir, "--vmx", vmxPath, "--qemu-uid", strconv.Itoa(a.cfg.QEMUUID), "--qemu-gid", strconv.Itoa(a.cfg.QEMUGID))
	if a.cfg.DirectIO {
		args = append(args, "--direct-io")
	}
	cmd := exec.Command(a.cfg.Executable, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	cmd.Env = append(cmd.Env, a.cfg.VMXEnv...)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting vmx: %w", err)
	}
	// A child is reaped here; adopted processes are init's.
	go func() { _ = cmd.Wait() }()
	p, err := a.adoptWithin(ctx, runDir, 20*time.Second, cmd.Process.Pid)
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, fmt.Errorf("%w; see %s", err, filepath.Join(filepath.Dir(vmxPath), "vmware.log"))
	}
	return p, nil
}

// openLog opens a log to append to. Whoever can write the datastore must not lead
// us elsewhere by a link, nor hang us with a FIFO.
func openLog(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0o600)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s is no regular file (%v): remove it", name, err)
	}
	return f, nil
}

// adoptWithin waits for a starting vmx to answer.
func (a *Agent) adoptWithin(ctx context.Context, runDir string, limit time.Duration, pid int) (*process, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		p, err := adopt(runDir)
		if err == nil {
			return p, nil
		}
		if unix.Kill(pid, 0) == unix.ESRCH {
			return nil, fmt.Errorf("vmx ended while it was starting")
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("vmx does not answer: %w", err)
		case <-time.After(wait):
		}
	}
}

// adopt connects to the vmx that listens in runDir. It fails at once when there
// is none.
func adopt(runDir string) (*process, error) {
	sock := filepath.Join(runDir, controlSocket)
	probe, err := net.Dial("unix", sock)
	if err != nil {
		return nil, err
	}
	defer probe.Close()
	pid, err := peerPID(probe.(*net.UnixConn))
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("watching vmx process %d: %w", pid, err)
	}
	conn, err := grpc.NewClient("unix:"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(false)))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		defer unix.Close(fd)
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(poll, -1); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	return &process{VMXClient: hostapi.NewVMXClient(conn), dir: runDir, pid: pid, exited: exited, conn: conn}, nil
}

// peerPID asks the kernel who listens, so that a process id that was reused
// since is never mistaken for a vmx.
func peerPID(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	if cred.Uid != uint32(os.Getuid()) {
		return 0, fmt.Errorf("the vmx socket is served by user %d, not by us", cred.Uid)
	}
	return int(cred.Pid), nil
}

func (p *process) alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// closeTime bounds how long a vmx may take to make its disks durable.
const closeTime = time.Minute

// end closes the VM and waits until the process is gone. One that does not end is
// killed: its disks are consistent at any instant. The error is what the vmx says
// of its disks, or that it cannot be killed.
func (p *process) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	_, err := p.Close(ctx, &hostapi.CloseRequest{})
	patience := 20 * time.Second
	if gone(err) {
		patience, err = 2*time.Second, nil
	}
	select {
	case <-p.exited:
	case <-time.After(patience):
		_ = unix.Kill(p.pid, unix.SIGKILL)
		select {
		case <-p.exited:
		case <-time.After(10 * time.Second):
			err = errors.Join(err, fmt.Errorf("vmx process %d cannot be killed: its storage does not answer, and it keeps the locks of its disks", p.pid))
		}
	}
	p.conn.Close()
	return errors.Join(err, unmountFiles(p.dir))
}

// gone says whether a call failed because the process does not answer.
func gone(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return true
	}
	return false
}
