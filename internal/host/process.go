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
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

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
// own folder under the agent's run folder.
func (a *Agent) startProcess(ctx context.Context, runDir, vmxPath string) (*process, error) {
	if err := os.MkdirAll(runDir, 0o711); err != nil {
		return nil, fmt.Errorf("making the run folder of a vmx: %w", err)
	}
	sock := filepath.Join(runDir, controlSocket)
	if len(sock) > maxSocketPath {
		return nil, fmt.Errorf("the socket path %s is longer than %d bytes: set a shorter run_dir", sock, maxSocketPath)
	}
	if err := os.Remove(sock); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// What vmx logs belongs to the VM's log (E2: nothing of the guest's, no key).
	log, err := os.OpenFile(filepath.Join(filepath.Dir(vmxPath), "vmware.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the VM's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(a.cfg.Executable, append(append([]string(nil), a.cfg.VMXArgs...), "--run-dir", runDir, "--vmx", vmxPath, "--qemu-uid", strconv.Itoa(a.cfg.QEMUUID), "--qemu-gid", strconv.Itoa(a.cfg.QEMUGID))...)
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

// end closes the VM and waits until the process is gone. One that does not end
// within 30 s is killed: its disks are consistent at any instant.
func (p *process) end(ctx context.Context) error {
	_, err := p.Close(ctx, &hostapi.CloseRequest{})
	limit := 30 * time.Second
	if err != nil {
		limit = 2 * time.Second
	}
	select {
	case <-p.exited:
		err = nil
	case <-time.After(limit):
		_ = unix.Kill(p.pid, unix.SIGKILL)
		<-p.exited
	}
	p.conn.Close()
	unmountFiles(p.dir)
	return err
}

// guestDir is the part of a vmx's run folder that QEMU uses, and filesDir in it
// where the vmx mounts the clear view of its VM's files.
const (
	guestDir = "guest"
	filesDir = "files"
)

// unmountFiles lets go of the FUSE mount that a vmx left behind: inside its
// sandbox it may not unmount, and one that was killed could not.
func unmountFiles(runDir string) {
	for unix.Unmount(filepath.Join(runDir, guestDir, filesDir), unix.MNT_DETACH) == nil {
	}
}
