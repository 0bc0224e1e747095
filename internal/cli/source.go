package cli

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// A source is a disk to import, opened: what it holds, raw, in files of this
// machine.
type source struct {
	name   string // for messages
	format string // as it was found
	size   int64  // bytes, of the disk
	runs   []run
	files  []*os.File
}

// A run is a stretch of the disk that lies in one file; between runs it is zero.
type run struct {
	file   *os.File
	offset int64 // in the file
	at     int64 // on the disk
	length int64
}

func (s *source) close() {
	for _, f := range s.files {
		f.Close()
	}
}

// sectorSize is what a disk's size is a multiple of.
const sectorSize = 512

// openSource opens a disk of any format. Raw images and flat VMDKs are read in
// place; what qemu-img must read first goes through an unlinked file in tmp, by
// default the source's own folder.
func openSource(ctx context.Context, path, format, tmp string, tell func(state)) (*source, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() && st.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		return nil, fmt.Errorf("%s is neither a file nor a block device", path)
	}
	if format == "" && strings.EqualFold(filepath.Ext(path), ".raw") {
		format = "raw" // whatever the guest has written into its first sector
	}
	if format == "" || format == "vmdk" {
		if err := checkNotEncrypted(path); err != nil {
			return nil, err
		}
		s, err := openFlat(path)
		if s != nil || err != nil {
			return s, err
		}
	}
	info, err := inspect(ctx, path, format)
	if err != nil {
		return nil, err
	}
	if info.Format == "raw" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		return rawSource(path, info.Format, f)
	}
	if tmp == "" {
		tmp = filepath.Dir(path)
	}
	f, err := toRaw(ctx, path, info, tmp, tell)
	if err != nil {
		return nil, err
	}
	return rawSource(path, info.Format, f)
}

// rawSource is a disk in one raw file, which it closes at the end.
func rawSource(name, format string, f *os.File) (*source, error) {
	length, err := f.Seek(0, io.SeekEnd)
	if err == nil && length == 0 {
		err = fmt.Errorf("%s is empty", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &source{
		name: name, format: format, size: (length + sectorSize - 1) / sectorSize * sectorSize,
		runs: []run{{file: f, length: length}}, files: []*os.File{f},
	}, nil
}

// openFlat opens a VMDK whose extents are plain files; nil for anything else.
func openFlat(path string) (_ *source, err error) {
	d, err := vmdk.Load(path)
	if err != nil {
		var foreign *keysafe.ForeignError
		if errors.As(err, &foreign) {
			return nil, foreignDisk(path)
		}
		return nil, nil // another kind, which qemu-img knows or refuses
	}
	if _, sealed := d.Encryption(); sealed {
		return nil, fmt.Errorf(`%s is encrypted by Mortise already: bring its VM in with mortise vm register "[DATASTORE] FOLDER/FILE.vmx"`, path)
	}
	if d.IsDelta() {
		return nil, fmt.Errorf("%s is a snapshot of a Mortise VM: export the VM, or consolidate it, first", path)
	}
	s := &source{name: path, format: "vmdk", size: d.Size()}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	dir, err := realFolder(path)
	if err != nil {
		return nil, err
	}
	at := int64(0)
	for _, e := range d.Extents() {
		if err := staysIn(dir, path, e.File); err != nil {
			return nil, err
		}
		f, err := os.Open(filepath.Join(filepath.Dir(path), e.File))
		if err != nil {
			return nil, fmt.Errorf("extent of %s: %w", path, err)
		}
		s.files = append(s.files, f)
		// vmdk bounds both to the size of the largest disk.
		length, offset := int64(e.Sectors)*vmdk.SectorSize, int64(e.Offset)*vmdk.SectorSize
		have, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return nil, err
		}
		if have < offset+length {
			return nil, fmt.Errorf("%s is too short: %s says that it holds %d bytes from %d, and it has %d", f.Name(), path, length, offset, have)
		}
		s.runs = append(s.runs, run{file: f, offset: offset, at: at, length: length})
		at += length
	}
	return s, nil
}

// foreignDisk refuses a disk that a VMware product encrypted (rule I6).
func foreignDisk(path string) error {
	return fmt.Errorf("%s is encrypted by a VMware product, which alone can open it: decrypt the VM there (vSphere: apply the policy Datastore Default; Workstation: remove the encryption), or export it there as OVF, and import the result", path)
}

// checkNotEncrypted recognises a VMDK that a VMware product encrypted, also one
// whose descriptor is inside a sparse extent.
func checkNotEncrypted(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 64)
	if _, err := io.ReadFull(f, head); err != nil || !bytes.HasPrefix(head, []byte("KDMV")) {
		return nil // too short, or no sparse extent
	}
	// Format: VMware's Virtual Disk Format 5.0, struct SparseExtentHeader.
	offset := binary.LittleEndian.Uint64(head[28:]) * vmdk.SectorSize
	length := binary.LittleEndian.Uint64(head[36:]) * vmdk.SectorSize
	if offset == 0 || offset > 1<<40 || length == 0 {
		return nil
	}
	text := make([]byte, min(length, vmdk.MaxText))
	n, _ := f.ReadAt(text, int64(offset))
	low := bytes.ToLower(text[:n])
	if bytes.Contains(low, []byte("vmware:key/")) || bytes.Contains(low, []byte("vmwarevmcrypt")) {
		return foreignDisk(path)
	}
	return nil
}
