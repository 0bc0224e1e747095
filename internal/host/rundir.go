package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"mortise/internal/hostapi"
)

// The run folder is on tmpfs and lives as long as the kernel does: what the next
// agent must know of guests that run on is in it, and no secret. Files:
//
//	agent.lock  locked by the agent that runs
//	term        of center's last command
//	vm/UUID/    of a VM that is open: its record, its vmx's sockets and marks
const (
	lockFile   = "agent.lock"
	termFile   = "term"
	recordFile = "vm.json"
)

// lockRunDir makes the caller the only agent of a run folder: two would fight for
// the same sockets. The lock dies with the process.
func lockRunDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another host agent uses the run folder %s: stop it, or give this one another --run-dir (%w)", dir, err)
	}
	return f, nil
}

func readTerm(dir string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(dir, termFile))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	term, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s is damaged: remove it when no other member of center leads: %w", filepath.Join(dir, termFile), err)
	}
	return term, nil
}

func writeTerm(dir string, term int64) error {
	return replace(filepath.Join(dir, termFile), strconv.AppendInt(nil, term, 10))
}

// replace swaps a small file in one step. The folder does not outlive a power
// cut, so nothing is synced.
func replace(name string, text []byte) error {
	if err := os.WriteFile(name+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// A record says which VM a run folder is for.
type record struct {
	Ref       *hostapi.VMRef
	Boot      int64 // Unix time of the power-on; 0: it is not powered on
	NVRAMLost bool  // see machine.lostNVRAM
}

type recordJSON struct {
	Ref       json.RawMessage `json:"ref"`
	Boot      int64           `json:"boot,omitempty"`
	NVRAMLost bool            `json:"nvramLost,omitempty"`
}

func writeRecord(dir string, r record) error {
	ref, err := protojson.Marshal(r.Ref)
	if err != nil {
		return err
	}
	text, err := json.Marshal(recordJSON{ref, r.Boot, r.NVRAMLost})
	if err != nil {
		return err
	}
	return replace(filepath.Join(dir, recordFile), text)
}

// readRecord reads the record of the VM with this UUID.
func readRecord(dir, uuid string) (r record, err error) {
	text, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return r, err
	}
	var j recordJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return r, err
	}
	r = record{Ref: &hostapi.VMRef{}, Boot: j.Boot, NVRAMLost: j.NVRAMLost}
	if err := protojson.Unmarshal(j.Ref, r.Ref); err != nil {
		return r, err
	}
	if r.Ref.Uuid != uuid {
		return r, fmt.Errorf("%s is of VM %q", filepath.Join(dir, recordFile), r.Ref.Uuid)
	}
	return r, nil
}

// guestDir is the part of a vmx's run folder that QEMU uses, and filesDir in it
// where the vmx mounts the clear view of its VM's files.
const (
	guestDir = "guest"
	filesDir = "files"
)

// unmountFiles lets go of the FUSE mount that a vmx left behind: inside its
// sandbox it may not unmount, and one that was killed could not.
func unmountFiles(runDir string) error {
	for {
		err := unix.Unmount(filepath.Join(runDir, guestDir, filesDir), unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil // nothing is mounted any more
		}
		if err != nil {
			return fmt.Errorf("unmounting the files of a VM: %w", err)
		}
	}
}

// removeRunDir removes the run folder of a VM that is closed. Never while its
// files are mounted in it: that would delete them.
func removeRunDir(dir string) error {
	if err := unmountFiles(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
