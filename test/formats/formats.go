// Package formats keeps artefacts of every released format version for ever: VM folders
// with disks in clear, encrypted, in the middle of each conversion and with snapshots, a
// VMX bundle and encrypted files, whose keys are fixed and known. Its test opens each with
// the present code and compares what a guest would see. An archive that is there is never
// made anew: generate writes those of a new version.
//
// It is used by tests only.
package formats

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// VM and the KEKs of every artefact.
var (
	VM   = uuid.MustParse("4d4f5254-4953-4500-8000-00000000f0f1")
	KEKA = keysafe.KeyID{Provider: "formats", Key: "a"}
	KEKB = keysafe.KeyID{Provider: "formats", Key: "b"}
)

// KEKs are the KEKs, which are no secrets; the caller wipes them.
func KEKs() (keysafe.KEKSet, error) {
	set := keysafe.KEKSet{}
	for _, id := range []keysafe.KeyID{KEKA, KEKB} {
		sum := sha256.Sum256([]byte("mortise frozen artefacts, KEK " + id.String()))
		k, err := secret.Copy(sum[:])
		if err != nil {
			return nil, err
		}
		set[id] = k
	}
	return set, nil
}

// Digest is the SHA-256 of a key's bytes, to compare with what Expected says.
func Digest(k *secret.Key) (sum string) {
	k.Use(func(b []byte) { sum = fmt.Sprintf("%x", sha256.Sum256(b)) })
	return sum
}

// Expected is what an archive holds: by the name of an artefact, which is a folder in it.
type Expected struct {
	Version int             `json:"version"`
	Disks   map[string]Disk `json:"disks"`
	Bundle  Bundle          `json:"bundle"`
	Files   map[string]File `json:"files"` // of the folder "vm", by name
}

// A Disk is what one artefact shows.
type Disk struct {
	Top        string `json:"top"` // the descriptor to open
	Size       int64  `json:"size"`
	SHA256     string `json:"sha256"` // of the whole disk as a guest sees it
	Encrypted  bool   `json:"encrypted"`
	Epoch      uint64 `json:"epoch"`
	Links      int    `json:"links"`
	Conversion string `json:"conversion,omitempty"`
	Back       bool   `json:"back,omitempty"`
	Hot        bool   `json:"hot,omitempty"` // killed in the middle of a zone
	Boundary   int64  `json:"boundary,omitempty"`
}

// A Bundle is what the VMX bundle of the folder "vm" holds.
type Bundle struct {
	Generation uint64            `json:"generation"`
	Files      map[string]string `json:"files"`   // name: Digest of its DEK
	Secrets    map[string]string `json:"secrets"` // name: Digest
	Disk       string            `json:"disk"`    // UUID of the one disk
	Epoch      uint64            `json:"epoch"`
}

// A File is an encrypted file.
type File struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// An archive is a gzipped tar. Extents are sparse, and tar in Go's library cannot say so:
// each run of blocks that are not zero is an entry of its own, with the file's name, and
// where it belongs and how long the file is in two PAX records.
const (
	offsetRecord = "MORTISE.offset"
	sizeRecord   = "MORTISE.size"
	blockSize    = 4096
)

// Pack packs a tree of regular files.
func Pack(w io.Writer, dir string) error {
	zip, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	t := tar.NewWriter(zip)
	var names []string
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, path := range names {
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if err := packFile(t, filepath.ToSlash(name), path); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), zip.Close())
}

func packFile(t *tar.Writer, name, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	zeros := make([]byte, blockSize)
	put := func(off int, run []byte) error {
		err := t.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(run)),
			PAXRecords: map[string]string{offsetRecord: strconv.Itoa(off), sizeRecord: strconv.Itoa(len(b))}})
		if err == nil {
			_, err = t.Write(run)
		}
		return err
	}
	start := -1
	for off := 0; off < len(b); off += blockSize {
		data := !bytes.Equal(b[off:min(off+blockSize, len(b))], zeros[:min(blockSize, len(b)-off)])
		switch {
		case data && start < 0:
			start = off
		case !data && start >= 0:
			if err := put(start, b[start:off]); err != nil {
				return err
			}
			start = -1
		}
	}
	if start < 0 { // also an empty file, or one that is a hole, or ends in one
		return put(len(b), nil)
	}
	return put(start, b[start:])
}

// Unpack is Pack's reverse; holes are holes again.
func Unpack(r io.Reader, dir string) error {
	zip, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	for t := tar.NewReader(zip); ; {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if !filepath.IsLocal(h.Name) || strings.Contains(h.Name, `\`) {
			return fmt.Errorf("%q leaves the folder", h.Name)
		}
		off, oerr := strconv.ParseInt(h.PAXRecords[offsetRecord], 10, 64)
		size, serr := strconv.ParseInt(h.PAXRecords[sizeRecord], 10, 64)
		if err := errors.Join(oerr, serr); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		err = f.Truncate(size)
		if err == nil {
			_, err = io.Copy(io.NewOffsetWriter(f, off), t)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}
