package vdisk

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// Info is what the files of a disk say, without a key and so without proof.
type Info struct {
	Path      string    // of the descriptor
	Extent    string    // path of the extent
	Parent    string    // what the descriptor calls the link that it stands on; "" for a base
	Sealed    string    // why the link is not changed any more; "" if it may be
	UUID      uuid.UUID // zero when a foreign descriptor has none
	VM        uuid.UUID // that the key safe is bound to, as the descriptor says; zero when it does not
	Size      int64     // of the disk, bytes
	Allocated int64     // of storage that the extent takes, bytes
	Thick     bool      // all of its space is allocated, and stays so; of a whole disk: that of a link of its own is

	Encrypted bool            // the descriptor has a key safe; also in the middle of a conversion
	Cipher    string          // "" in clear
	Epoch     uint64          // 0 in clear
	Keys      []keysafe.KeyID // any of which opens the disk, or the part still to be converted

	Conversion Conversion      // under way or interrupted
	Back       bool            // cancelled: it runs back
	Boundary   int64           // bytes that have been converted
	TargetKeys []keysafe.KeyID // of the conversion; nil when decrypting
}

// Cloned says whether linked clones stand on the link, which is never changed or
// deleted then.
func (i Info) Cloned() bool { return i.Sealed == sealedForClones }

// Describe reads a disk's files. It needs no key and takes no lock: what it
// says may be changing.
func Describe(path string) (Info, error) { return describeIn(osFS{}, path) }

func describeIn(fsys fsys, path string) (Info, error) {
	_, desc, err := loadDescriptor(fsys, path)
	if err != nil {
		return Info{}, err
	}
	i := describe(path, desc)
	name, err := extentName(path, desc)
	if err != nil {
		return i, err
	}
	st, err := fsys.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return i, missingExtent(name)
	}
	if err != nil {
		return i, err
	}
	i.Allocated = st.allocated
	sf, err := openState(fsys, nil, name+stateSuffix, false)
	switch {
	case err == nil:
		i.addState(sf.cur.Load())
		return i, sf.f.Close()
	case i.Encrypted:
		return i, stateError(name+stateSuffix, err)
	}
	return i, nil
}

func describe(path string, desc *vmdk.Descriptor) Info {
	i := Info{Path: path, UUID: desc.UUID(), VM: recordedVM(desc), Size: desc.Size(), Parent: desc.Parent(), Sealed: desc.Sealed(), Thick: desc.Thick(), Extent: filepath.Join(filepath.Dir(path), desc.Extents()[0].File)}
	if enc, ok := desc.Encryption(); ok {
		i.Encrypted, i.Cipher, i.Epoch = true, enc.Cipher, enc.Epoch
		i.Keys, i.TargetKeys = enc.KeySafe.KeyIDs(), enc.Target.KeyIDs()
	}
	return i
}

// addState adds what a state file says about a disk with a key safe.
func (i *Info) addState(s *state) {
	if !i.Encrypted || s.kind == NotConverting {
		return
	}
	i.Conversion, i.Back, i.Boundary = s.kind, s.back, min(s.boundary, i.Size)
	if s.kind == Encrypting {
		i.Keys, i.TargetKeys = nil, i.Keys
	}
}
