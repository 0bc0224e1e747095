package vmx

import (
	"fmt"
	"path/filepath"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// confine leaves this process one VM's folder, its run folder and the sockets
// that it has, for good. What a hostile disk or client could make it do ends
// there. No new socket at all: landlock does not guard unix sockets, and libvirt's
// is one; io_uring, which a filter of system calls cannot see into, could make
// them too. Kernels without landlock keep the filter.
func (s *server) confine() error {
	if s.confined {
		return nil
	}
	rules := []landlock.Rule{
		landlock.RWDirs(filepath.Dir(s.cfg.VMX), s.cfg.RunDir),
		landlock.RWFiles("/dev/null"), // where go-fuse empties its pipes
		landlock.ROFiles("/etc/localtime").IgnoreIfMissing(),
	}
	if err := landlock.V5.BestEffort().RestrictPaths(rules...); err != nil {
		return fmt.Errorf("confining vmx to its folders: %w", err)
	}
	if err := landlock.V5.BestEffort().RestrictNet(); err != nil {
		return fmt.Errorf("confining vmx to its folders: %w", err)
	}
	filter := seccomp.Filter{
		NoNewPrivs: true,
		Flag:       seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls: []seccomp.SyscallGroup{
				{Action: seccomp.ActionErrno | seccomp.Action(unix.EPERM), Names: []string{
					"execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "bpf", "userfaultfd", "perf_event_open",
					"mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "kexec_load", "init_module", "finit_module", "delete_module",
					"add_key", "request_key", "keyctl", "open_by_handle_at", "swapon", "swapoff", "reboot", "ioperm", "iopl",
					"socket", "socketpair", "connect", "bind", "io_uring_setup", "io_uring_enter", "io_uring_register",
				}},
			},
		},
	}
	if seccomp.Supported() {
		if err := seccomp.LoadFilter(filter); err != nil {
			return fmt.Errorf("filtering the system calls of vmx: %w", err)
		}
	}
	s.confined = true
	return nil
}
