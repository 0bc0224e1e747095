package dev

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// share makes each shared folder a mount whose later sub-mounts pass into
// libvirtd's namespace. Where the machine's own mounts are shared, as systemd
// has them, there is nothing to do; in many containers they are private.
func (l *Libvirtd) share() error {
	for _, dir := range l.cfg.Shared {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
		if dir, err = filepath.EvalSymlinks(dir); err != nil {
			return err
		}
		point, shared, err := mountOf(dir)
		if err != nil {
			return err
		}
		switch {
		case point == dir && bindOfItself(dir): // ours, from a time that was killed
		case shared:
			continue
		case point == dir:
			return fmt.Errorf("%s is a mount whose own mounts are private: choose a folder in it, or run: mount --make-shared %[1]s", dir)
		default:
			if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mounting %s on itself: %w", dir, err)
			}
		}
		l.shared = append(l.shared, dir)
		if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
			return fmt.Errorf("sharing the mounts of %s: %w", dir, err)
		}
	}
	return nil
}

// bindOfItself tells a mount of ours from a file system that someone mounted.
func bindOfItself(dir string) bool {
	var here, above unix.Stat_t
	return unix.Stat(dir, &here) == nil && unix.Stat(filepath.Dir(dir), &above) == nil && here.Dev == above.Dev
}

// unshare undoes share; no guest runs that needs it.
func (l *Libvirtd) unshare() error {
	var errs []error
	for _, dir := range l.shared {
		err := unix.Unmount(dir, 0)
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%s is still in use: end what uses it, then run: umount -R %[1]s", dir)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, err)
		}
	}
	l.shared = nil
	return errors.Join(errs...)
}

// mountOf finds the mount that holds a path, and whether mounts in it propagate;
// see proc_pid_mountinfo(5).
func mountOf(path string) (point string, shared bool, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 7 {
			continue
		}
		p := unescape.Replace(fields[4])
		// Of two mounts on one place the later one is seen.
		if len(p) < len(point) || p != "/" && p != path && !strings.HasPrefix(path, p+"/") {
			continue
		}
		point, shared = p, false
		for _, opt := range fields[6:] {
			if opt == "-" {
				break
			}
			shared = shared || strings.HasPrefix(opt, "shared:")
		}
	}
	if point == "" {
		return "", false, fmt.Errorf("%s: no mount holds it", path)
	}
	return point, shared, nil
}
