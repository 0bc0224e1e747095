package vmdk

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"mortise/internal/atomicfile"
)

// Load reads and parses the descriptor at path.
func Load(path string) (*Descriptor, error) {
	b, err := atomicfile.Read(path, MaxText)
	if errors.Is(err, atomicfile.ErrTooLarge) {
		return nil, &Error{File: path, Cause: ErrTooLarge, Why: fmt.Sprintf("a descriptor has at most %d bytes; is this an extent, or a sparse VMDK to import?", MaxText)}
	}
	if err != nil {
		return nil, fmt.Errorf("reading a disk descriptor: %w", err)
	}
	return Parse(path, b)
}

// Save replaces the file at path durably and in one step. Only the holder of the
// extent's lock may call it. A sealed descriptor that was changed since is
// refused: it would not verify.
func (d *Descriptor) Save(path string) error {
	if err := d.check(); err != nil {
		return err
	}
	if _, sealed := d.Encryption(); sealed && d.stale {
		return d.errorf(0, ErrEdited, "it was changed in memory after it was sealed; seal it again before it is saved")
	}
	b := d.Bytes()
	if len(b) > MaxText {
		return d.errorf(0, ErrTooLarge, "%d bytes, a descriptor has at most %d", len(b), MaxText)
	}
	return atomicfile.Write(path, b, 0o600)
}

// suffix of every descriptor and extent.
const suffix = ".vmdk"

// FlatName is the extent's name of a base disk: vm.vmdk has vm-flat.vmdk.
func FlatName(descriptor string) string {
	return strings.TrimSuffix(descriptor, suffix) + "-flat" + suffix
}

// DeltaName is the extent's name of a snapshot link: vm-000001.vmdk has
// vm-000001-delta.vmdk.
func DeltaName(descriptor string) string {
	return strings.TrimSuffix(descriptor, suffix) + "-delta" + suffix
}

// LinkName is the descriptor's name of a base disk's n-th snapshot link, n from
// 1: vm.vmdk has vm-000001.vmdk.
func LinkName(base string, n int) string {
	return fmt.Sprintf("%s-%06d%s", strings.TrimSuffix(base, suffix), n, suffix)
}

var linkName = regexp.MustCompile(`^(.+)-([0-9]{6})\.vmdk$`)

// ParseLinkName undoes LinkName. ok is false for what is not, by its name, a
// snapshot link.
func ParseLinkName(descriptor string) (base string, n int, ok bool) {
	m := linkName.FindStringSubmatch(descriptor)
	if m == nil {
		return "", 0, false
	}
	n, _ = strconv.Atoi(m[2])
	return m[1] + suffix, n, true
}

// IsExtentName says whether a file of a VM's folder is, by its name, an extent
// and no descriptor.
func IsExtentName(name string) bool {
	return strings.HasSuffix(name, "-flat"+suffix) || strings.HasSuffix(name, "-delta"+suffix)
}
