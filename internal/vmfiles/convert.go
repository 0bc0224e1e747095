package vmfiles

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
	"mortise/internal/secret"
)

// clearFile is a file of a VM as it is.
type clearFile struct{ *os.File }

func (f clearFile) Size() int64 {
	st, err := f.Stat()
	if err != nil {
		return 0
	}
	return st.Size()
}

type content interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	Sync() error
	Close() error
}

// Convert copies the content of the file src into the new file dst, and makes it
// durable. from and to are the DEKs that src has and dst shall have; nil means in
// clear. A file that is at dst is replaced, src stays. Nothing in clear is written
// unless to is nil. Errors are those of Open; when it fails there is no dst.
func Convert(dst string, to *secret.Key, src string, from *secret.Key) (err error) {
	in, err := openContent(src, from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.Remove(dst); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	out, err := createContent(dst, to)
	if err != nil {
		return err
	}
	if err = copyContent(out, in); err == nil {
		err = out.Sync()
	}
	err = errors.Join(err, out.Close())
	if err == nil {
		err = atomicfile.SyncDir(filepath.Dir(dst))
	}
	if err != nil {
		os.Remove(dst)
		return fmt.Errorf("converting %s to %s: %w", src, dst, err)
	}
	return nil
}

func openContent(path string, dek *secret.Key) (content, error) {
	if dek != nil {
		return Open(path, dek, true)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s: it is no regular file (%v)", path, err)
	}
	return clearFile{f}, nil
}

func createContent(path string, dek *secret.Key) (content, error) {
	if dek != nil {
		return Create(path, dek)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return clearFile{f}, nil
}

// copyContent copies all of src to the start of dst.
func copyContent(dst io.WriterAt, src interface {
	io.ReaderAt
	Size() int64
}) error {
	b := make([]byte, maxChunk)
	defer clear(b)
	for off, size := int64(0), src.Size(); off < size; {
		n, err := src.ReadAt(b[:min(int64(len(b)), size-off)], off)
		if n == 0 && err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF // it shrank while we read it
			}
			return err
		}
		if _, err := dst.WriteAt(b[:n], off); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}
