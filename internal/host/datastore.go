package host

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
	"mortise/internal/hostapi"
	"mortise/internal/storage"
)

// A Datastore is a folder that this host mounts (E5). Two hosts that mount the
// same storage find the same marker file in it, and so the same UUID.
type Datastore struct {
	Name string `toml:"name"`
	Path string `toml:"path"`
}

// markerFile makes a folder a datastore. A mount point whose storage is away
// lacks it, and nothing is ever written there by mistake.
const markerFile = ".mortise-datastore"

type marker struct {
	Version int    `json:"version"`
	UUID    string `json:"uuid"`
	Name    string `json:"name"`
}

// InitDatastore makes the folder a datastore by writing its marker, if its storage
// may hold disks (E5). One that has a marker keeps it.
func InitDatastore(d Datastore) error {
	if _, err := d.marker(); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	report, err := storage.Probe(ctx, d.Path)
	if err == nil {
		err = report.Err()
	}
	if err != nil {
		return fmt.Errorf("making %s a datastore: %w", d.Path, err)
	}
	m := marker{Version: 1, UUID: newUUID(), Name: d.Name}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(d.Path, markerFile), append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("making %s a datastore: %w", d.Path, err)
	}
	return nil
}

func (d Datastore) marker() (marker, error) {
	var m marker
	name := filepath.Join(d.Path, markerFile)
	f, err := os.Open(name)
	if err != nil {
		return m, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return m, fmt.Errorf("reading %s: %w", name, err)
	}
	if err := json.Unmarshal(text, &m); err != nil || m.UUID == "" {
		return m, fmt.Errorf("%s is damaged: restore it from a backup of the datastore, or from another host's view of it", name)
	}
	if m.Version != 1 {
		return m, fmt.Errorf("%s has version %d, which this version of Mortise does not know: upgrade the host", name, m.Version)
	}
	return m, nil
}

// info describes the datastore as it is now. One that cannot be used says why.
func (d Datastore) info() *hostapi.DatastoreInfo {
	info := &hostapi.DatastoreInfo{Name: d.Name, Path: d.Path}
	m, err := d.marker()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		info.Problem = fmt.Sprintf("%s has no %s file: is the storage mounted? Run 'mortise host datastore init' once on a new one", d.Path, markerFile)
	case err != nil:
		info.Problem = err.Error()
	}
	info.Uuid = m.UUID
	var st unix.Statfs_t
	if err := unix.Statfs(d.Path, &st); err != nil {
		info.Problem = fmt.Sprintf("statfs %s: %v", d.Path, err)
		return info
	}
	info.CapacityBytes = int64(st.Blocks) * st.Bsize
	info.FreeBytes = int64(st.Bavail) * st.Bsize
	info.Type = fsName(st.Type)
	return info
}

func fsName(magic int64) string {
	switch magic {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	default:
		return fmt.Sprintf("0x%x", magic)
	}
}

// resolve turns a name inside the datastore ("web1/web1.vmx") into a path of
// this host. It refuses to leave the datastore, by ".." or by symbolic link.
func (d Datastore) resolve(name string) (string, error) {
	if name == "" || !fs.ValidPath(name) || strings.ContainsAny(name, "\x00\n\"\\") {
		return "", fmt.Errorf("%q is not a path inside datastore %s", name, d.Name)
	}
	if p := d.info(); p.Problem != "" {
		return "", fmt.Errorf("datastore %s cannot be used: %s", d.Name, p.Problem)
	}
	full := filepath.Join(d.Path, filepath.FromSlash(name))
	root, err := filepath.EvalSymlinks(d.Path)
	if err != nil {
		return "", err
	}
	// The folder must be inside; the last element need not exist yet.
	dir, err := filepath.EvalSymlinks(filepath.Dir(full))
	if errors.Is(err, fs.ErrNotExist) && path.Dir(name) != "." {
		// A folder that does not exist cannot be a link: its parent decides.
		parent, perr := filepath.EvalSymlinks(filepath.Dir(filepath.Dir(full)))
		if perr != nil {
			return "", perr
		}
		dir, err = filepath.Join(parent, filepath.Base(filepath.Dir(full))), nil
	}
	if err != nil {
		return "", err
	}
	if dir != root && !strings.HasPrefix(dir, root+string(filepath.Separator)) {
		return "", fmt.Errorf("%q leaves datastore %s through a symbolic link", name, d.Name)
	}
	return filepath.Join(dir, filepath.Base(full)), nil
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
