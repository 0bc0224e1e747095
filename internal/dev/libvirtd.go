package dev

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// LibvirtdConfig describes one host's private libvirtd.
type LibvirtdConfig struct {
	Dir  string // its state; made when missing
	Name string // the host's name
	// Shared names folders in which mounts are made later that QEMU must see: the
	// FUSE views of VMs. They are made when missing.
	Shared []string
	Log    *slog.Logger
}

// A Libvirtd is a libvirtd of its own for one host of several on one machine. It
// runs in a mount and a UTS namespace with its own folders in place of
// /run/libvirt, /var/lib/libvirt, /var/log/libvirt, /var/cache/libvirt and
// /etc/libvirt, its own host UUID and host name.
//
// Guests outlive it: they find the same files again in the namespace of the next
// libvirtd of the same folder, and that one finds them.
type Libvirtd struct {
	cfg    LibvirtdConfig
	lock   *os.File // held while we are responsible for the folder
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // of the process; read after exited
	socket string
	link   string // short name of the run folder; empty when none was needed
	shared []string
}

// places are libvirt's folders on a machine and ours for each.
var places = [][2]string{
	{"/run/libvirt", "run"}, {"/var/lib/libvirt", "lib"}, {"/var/log/libvirt", "log"},
	{"/var/cache/libvirt", "cache"}, {"/etc/libvirt", "etc"},
}

// readyTime is how long libvirtd may take to answer. A first start asks QEMU for
// its abilities, which takes seconds on a busy machine.
const readyTime = 60 * time.Second

// StartLibvirtd starts the libvirtd of cfg.Dir and waits until it answers. One
// that a killed process left behind is ended first; its guests run on and are
// found again. It needs root.
func StartLibvirtd(ctx context.Context, cfg LibvirtdConfig) (l *Libvirtd, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("libvirtd of host %s: %w", cfg.Name, err)
		}
	}()
	if os.Geteuid() != 0 {
		return nil, errors.New("a private libvirtd needs root (mount namespaces, QEMU): run as root")
	}
	if err := checkPrograms(); err != nil {
		return nil, err
	}
	if cfg.Name == "" || strings.Trim(cfg.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") != "" {
		return nil, fmt.Errorf("%.64q is no host name: use letters, digits and -", cfg.Name)
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if strings.ContainsAny(cfg.Dir, "\n\"\\") {
		return nil, fmt.Errorf("state folder %q: its name has characters that libvirt's configuration cannot hold", cfg.Dir)
	}
	l = &Libvirtd{cfg: cfg, exited: make(chan struct{})}
	if err := l.prepare(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.release()
		}
	}()
	if err := l.endStale(ctx); err != nil {
		return nil, err
	}
	if err := l.share(); err != nil {
		return nil, err
	}
	if err := l.start(); err != nil {
		return nil, err
	}
	if err := l.waitReady(ctx); err != nil {
		l.end(context.WithoutCancel(ctx))
		return nil, err
	}
	cfg.Log.Info("libvirtd runs", "host", cfg.Name, "pid", l.cmd.Process.Pid, "socket", l.socket)
	return l, nil
}

// Socket is where libvirtd listens, short enough for any program.
func (l *Libvirtd) Socket() string { return l.socket }

// Exited is closed when the process has ended, on its own or by Stop.
func (l *Libvirtd) Exited() <-chan struct{} { return l.exited }

// Stop ends libvirtd. Guests run on unless powerOff is set, which pulls the plug
// of every one of them first.
func (l *Libvirtd) Stop(ctx context.Context, powerOff bool) error {
	var errs []error
	if powerOff {
		errs = append(errs, l.powerOffAll(ctx))
	}
	errs = append(errs, l.end(ctx))
	if len(l.guests()) == 0 {
		errs = append(errs, l.unshare())
	}
	l.release()
	return errors.Join(errs...)
}

// powerOffAll pulls the plug of every guest, those of other tools included.
// QEMU's processes are ended themselves: it works without libvirtd too.
func (l *Libvirtd) powerOffAll(ctx context.Context) error {
	var errs []error
	for _, pid := range l.guests() {
		errs = append(errs, l.endProcess(ctx, pid, qemu))
	}
	return errors.Join(errs...)
}

// guests lists the QEMU processes that libvirtd of this folder has noted.
func (l *Libvirtd) guests() (pids []int) {
	files, _ := filepath.Glob(filepath.Join(l.path("run"), "qemu", "*.pid"))
	for _, f := range files {
		if pid, err := readPID(f); err == nil && l.isOurs(pid, qemu) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (l *Libvirtd) path(name string) string { return filepath.Join(l.cfg.Dir, name) }

// checkPrograms names the Debian packages of what is missing.
func checkPrograms() error {
	var missing []string
	for _, p := range [][2]string{
		{"unshare", "util-linux"}, {"mount", "mount"}, {"libvirtd", "libvirt-daemon"},
		{"qemu-system-x86_64", "qemu-system-x86"}, {"qemu-img", "qemu-utils"},
	} {
		if _, err := find(p[0]); err != nil {
			missing = append(missing, p[1])
		}
	}
	if drivers, _ := filepath.Glob("/usr/lib*/*/libvirt/connection-driver/libvirt_driver_qemu.so"); len(drivers) == 0 {
		if drivers, _ = filepath.Glob("/usr/lib*/libvirt/connection-driver/libvirt_driver_qemu.so"); len(drivers) == 0 {
			missing = append(missing, "libvirt-daemon-driver-qemu")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("programs are missing: install them with: apt-get install --no-install-recommends %s", strings.Join(missing, " "))
	}
	return nil
}

// find looks a program up also where root's programs are.
func find(program string) (string, error) {
	if path, err := exec.LookPath(program); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", program, exec.ErrNotFound)
}

// prepare makes the folders and configuration and takes the folder's lock.
func (l *Libvirtd) prepare() error {
	for _, p := range places {
		if err := os.MkdirAll(l.path(p[1]), 0o711); err != nil {
			return err
		}
		// The mount points must exist on the machine; they stay empty there.
		if err := os.MkdirAll(p[0], 0o755); err != nil {
			return err
		}
	}
	lock, err := os.OpenFile(l.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return fmt.Errorf("%s is in use by another process: end it, or choose another state folder", l.cfg.Dir)
	}
	l.lock = lock

	id, err := os.ReadFile(l.path("host-uuid"))
	if errors.Is(err, os.ErrNotExist) {
		id = []byte(uuid.NewString())
		err = os.WriteFile(l.path("host-uuid"), id, 0o600)
	}
	if err == nil {
		_, err = uuid.ParseBytes(id)
	}
	if err != nil {
		l.release()
		return fmt.Errorf("%s: %w; remove the file, a new one is made", l.path("host-uuid"), err)
	}
	for name, text := range map[string]string{"libvirtd.conf": fmt.Sprintf(libvirtdConf, id), "qemu.conf": qemuConf} {
		if err := os.WriteFile(filepath.Join(l.path("etc"), name), []byte(text), 0o600); err != nil {
			l.release()
			return err
		}
	}

	l.socket = filepath.Join(l.path("run"), "libvirt-sock")
	// Room for the longest name in that folder, libvirt-admin-sock.
	if len(l.path("run"))+len("/libvirt-admin-sock") > 107 {
		sum := sha256.Sum256([]byte(l.cfg.Dir))
		l.link = fmt.Sprintf("/run/mortise-%x", sum[:6])
		_ = os.Remove(l.link)
		if err := os.Symlink(l.path("run"), l.link); err != nil {
			l.release()
			return fmt.Errorf("a short name for the socket of %s: %w", l.cfg.Dir, err)
		}
		l.socket = filepath.Join(l.link, "libvirt-sock")
	}
	return nil
}

// libvirtdConf: only root may connect; a guest whose disk is away may hold one
// request, so there is room for many.
const libvirtdConf = `host_uuid = "%s"
unix_sock_group = "root"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
max_client_requests = 100
max_workers = 40
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
`

// qemuConf: QEMU as root, as is fit for a trial on one's own machine; no cores,
// which would hold what the guest's memory holds (D1).
const qemuConf = `user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
max_core = 0
dump_guest_core = 0
`

// script runs inside the new namespaces and becomes libvirtd. Its arguments are
// the host's name, libvirtd, and pairs of our folder and libvirt's.
const script = `set -e
hostname "$1"; libvirtd=$2; shift 2
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
exec "$libvirtd" --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid
`

func (l *Libvirtd) start() error {
	// A socket without a listener would look like a libvirtd that is starting.
	for _, s := range []string{"libvirt-sock", "libvirt-sock-ro", "libvirt-admin-sock"} {
		if err := os.Remove(filepath.Join(l.path("run"), s)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	unshare, err := find("unshare")
	if err != nil {
		return err
	}
	daemon, err := find("libvirtd")
	if err != nil {
		return err
	}
	// Mounts in shared folders pass into the namespace (slave), none out of it.
	args := []string{"--mount", "--uts", "--propagation", "slave", "sh", "-c", script, "sh", l.cfg.Name, daemon}
	for _, p := range places {
		args = append(args, l.path(p[1]), p[0])
	}
	l.cmd = exec.Command(unshare, args...)
	// Nothing of our environment; and no signal of our terminal.
	l.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := os.Create(filepath.Join(l.path("log"), "start.log"))
	if err != nil {
		return err
	}
	defer out.Close()
	l.cmd.Stdout, l.cmd.Stderr = out, out
	if err := l.cmd.Start(); err != nil {
		return err
	}
	go func() {
		l.err = l.cmd.Wait()
		close(l.exited)
	}()
	return nil
}

func (l *Libvirtd) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	for {
		c, err := net.Dial("unix", l.socket)
		if err == nil {
			c.Close()
			return nil
		}
		select {
		case <-l.exited:
			said, _ := os.ReadFile(filepath.Join(l.path("log"), "start.log"))
			said = bytes.TrimSpace(said)
			return fmt.Errorf("it ended at once: %w: %s (more in %s)", l.err, said[max(0, len(said)-500):], filepath.Join(l.path("log"), "libvirtd.log"))
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w (see %s)", ctx.Err(), l.path("log"))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// end asks our libvirtd to end, and kills it when it does not.
func (l *Libvirtd) end(ctx context.Context) error {
	_ = l.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-l.exited:
	case <-ctx.Done():
		_ = l.cmd.Process.Kill()
		<-l.exited
	case <-time.After(10 * time.Second):
		// It waits for a QEMU that waits for its disk.
		_ = l.cmd.Process.Kill()
		<-l.exited
	}
	return nil
}

// endStale ends the libvirtd that an earlier process left behind.
func (l *Libvirtd) endStale(ctx context.Context) error {
	pid, err := readPID(filepath.Join(l.path("run"), "libvirtd.pid"))
	if err != nil || !l.isOurs(pid, libvirtd) {
		return nil // none, or the number belongs to another process by now
	}
	l.cfg.Log.Warn("taking over from a libvirtd that was left behind", "host", l.cfg.Name, "pid", pid)
	return l.endProcess(ctx, pid, libvirtd)
}

// Programs, as isOurs knows them by the beginning of their names.
const (
	libvirtd = "libvirtd"
	qemu     = "qemu-system-"
)

// isOurs tells whether a process runs that program and has our folder in place of
// /run/libvirt.
func (l *Libvirtd) isOurs(pid int, program string) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil || !strings.HasPrefix(filepath.Base(exe), program) {
		return false
	}
	var theirs, ours unix.Stat_t
	return unix.Stat(fmt.Sprintf("/proc/%d/root/run/libvirt", pid), &theirs) == nil &&
		unix.Stat(l.path("run"), &ours) == nil && theirs.Dev == ours.Dev && theirs.Ino == ours.Ino
}

// endProcess ends a process of ours: it asks, waits, and kills.
func (l *Libvirtd) endProcess(ctx context.Context, pid int, program string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	if !l.isOurs(pid, program) { // it was, before the descriptor held it
		return nil
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("ending %s, process %d: %w", program, pid, err)
		}
		for range 250 {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20)
			switch {
			case n > 0:
				return nil
			case err != nil && !errors.Is(err, unix.EINTR):
				return err
			case ctx.Err() != nil:
				return ctx.Err()
			}
		}
	}
	return fmt.Errorf("%s, process %d, cannot be ended", program, pid)
}

func readPID(file string) (int, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid < 2 {
		return 0, fmt.Errorf("%s: %.20q is no process id", file, text)
	}
	return pid, nil
}

// release gives the folder up.
func (l *Libvirtd) release() {
	if l.link != "" {
		_ = os.Remove(l.link)
	}
	if l.lock != nil {
		l.lock.Close()
		l.lock = nil
	}
}
