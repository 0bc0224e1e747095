package storage

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a line of /proc/self/mountinfo, proc_pid_mountinfo(5).
type mount struct {
	ID           int
	Major, Minor int
	Point        string
	Options      []string // of the mount
	Type, Source string
	Super        []string // options of the file system
}

func (m mount) all() []string {
	all := slices.Clone(m.Options)
	for _, o := range m.Super {
		if !slices.Contains(all, o) {
			all = append(all, o)
		}
	}
	return all
}

func (m mount) has(option string) bool {
	return slices.Contains(m.Options, option) || slices.Contains(m.Super, option)
}

// value is what an option is set to.
func (m mount) value(option string) string {
	for _, o := range m.all() {
		if v, ok := strings.CutPrefix(o, option+"="); ok {
			return v
		}
	}
	return ""
}

// mountOf finds what dir is on.
func mountOf(dir string) (mount, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID, &st); err != nil {
		return mount{}, &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return mount{}, fmt.Errorf("this kernel does not tell what %s is mounted from: Linux 5.8 or newer is needed", dir)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mount{}, err
	}
	for line := range strings.Lines(string(text)) {
		m, err := parseMount(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return mount{}, err
		}
		if uint64(m.ID) == st.Mnt_id {
			return m, nil
		}
	}
	return mount{}, fmt.Errorf("mount %d of %s is not in /proc/self/mountinfo", st.Mnt_id, dir)
}

// parseMount reads a line: id, parent, major:minor, root, mount point, options,
// any number of optional fields, "-", type, source, options of the file system.
func parseMount(line string) (m mount, err error) {
	before, after, ok := strings.Cut(line, " - ")
	f, g := strings.Split(before, " "), strings.Split(after, " ")
	if !ok || len(f) < 6 || len(g) < 3 {
		return m, fmt.Errorf("/proc/self/mountinfo: no mount: %q", line)
	}
	major, minor, _ := strings.Cut(f[2], ":")
	var errs [3]error
	m.ID, errs[0] = strconv.Atoi(f[0])
	m.Major, errs[1] = strconv.Atoi(major)
	m.Minor, errs[2] = strconv.Atoi(minor)
	for _, e := range errs {
		if e != nil {
			return mount{}, fmt.Errorf("/proc/self/mountinfo: no mount: %q", line)
		}
	}
	m.Point, m.Options = unescape(f[4]), strings.Split(f[5], ",")
	m.Type, m.Source, m.Super = unescape(g[0]), unescape(g[1]), strings.Split(unescape(g[2]), ",")
	return m, nil
}

// unescape turns the octal escapes of a blank, a tab, a newline and a backslash
// back.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// judge finds what is unsafe, or should be known, about a mount.
func (r *Report) judge(m mount) {
	const lose = "what a guest was told is on disk would be lost"
	if m.has("ro") {
		r.unsafe("it is mounted read-only", "no disk can be written there", "mount it read-write")
	}
	switch t := m.Type; {
	case t == "tmpfs" || t == "ramfs" || t == "hugetlbfs" || t == "devtmpfs":
		r.unsafe("it is in memory ("+t+")", "everything on it is gone after a power cut or a restart", "choose a folder on ext4, XFS or NFSv4")
	case t == "nfs4":
		r.Network = true
		r.judgeNFS(m)
	case t == "nfs":
		r.Network = true
		r.unsafe("it is mounted with NFS version "+orUnknown(m.value("vers")), "its locks are kept by a protocol of their own, and a server that restarts gives them to whoever asks first", "mount it with -t nfs4 -o vers=4.2")
	case t == "overlay":
		if m.has("volatile") || m.value("fsync") == "volatile" { // older and newer kernels print it so
			r.unsafe("it is an overlay mounted volatile", "it ignores fsync: "+lose, "mount it without volatile, or choose a folder below it")
			return
		}
		r.warn("it is an overlay, as containers have", "its upper layer decides what is durable, and may be removed with the container", "put disks on a volume of the host")
	case t == "ext4" || t == "ext3" || t == "xfs":
		r.judgeLocal(m)
	case t == "btrfs":
		r.judgeLocal(m)
		r.warn("it is Btrfs", "it copies on every write, which makes disks slow and fragmented", "choose ext4 or XFS")
	case t == "cifs" || t == "smb3" || t == "9p" || t == "vfat" || t == "exfat" || t == "msdos" || t == "ecryptfs" || t == "iso9660" || t == "squashfs":
		r.unsafe("it is "+t, "it lacks locks, holes or durability that disks rely on", "choose ext4, XFS or NFSv4")
	case t == "fuse" || t == "virtiofs" || strings.HasPrefix(t, "fuse."):
		r.unsafe("it is "+t, "nobody can tell from here whether its locks reach other machines, and what its fsync does", "choose ext4, XFS or NFSv4")
	default:
		r.warn("it is "+t, "Mortise is not tested on it", "choose ext4, XFS or NFSv4")
	}
}

func orUnknown(v string) string {
	if v == "" {
		return "unknown"
	}
	return v
}

// judgeLocal looks at the options of a file system on a disk.
func (r *Report) judgeLocal(m mount) {
	if m.has("nobarrier") || m.value("barrier") == "0" {
		r.unsafe("it is mounted without barriers", "the disk's cache is not flushed: what a guest was told is on disk would be lost in a power cut", "mount it without nobarrier")
	}
	if m.value("data") == "writeback" {
		r.warn("it is mounted with data=writeback", "a crash can leave old bytes of deleted files in files that were growing", "mount it with data=ordered")
	}
	if m.value("data") == "journal" {
		r.warn("it is mounted with data=journal", "it has no direct I/O and writes everything twice", "mount it with data=ordered")
	}
}

// judgeNFS looks at the options of an NFSv4 mount, nfs(5).
func (r *Report) judgeNFS(m mount) {
	if v := m.value("vers"); v != "" && v[0] != '4' {
		r.unsafe("it is mounted with NFS version "+v, "locks of older versions do not survive a restart of the server", "mount it with -o vers=4.2")
	}
	if l := m.value("local_lock"); m.has("nolock") || l == "all" || l == "posix" {
		r.unsafe("its locks stay on this machine (nolock or local_lock)", "another host could open a disk that is in use here, and destroy it", "mount it without nolock and local_lock")
	}
	if m.has("soft") || m.has("softerr") {
		r.unsafe("it is mounted soft", "a server that is slow for a while looks like a disk that failed for good, and writes are lost without a word (nfs(5))", "mount it hard, which is the default")
	}
	r.warn("it is on an NFS server", "a server that exports async acknowledges what it has not written, and this cannot be seen from here", "see that its exports say sync")
}
