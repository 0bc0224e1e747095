package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// imageInfo is what qemu-img says of an image file.
type imageInfo struct {
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
	ActualSize  int64  `json:"actual-size"`
	Encrypted   bool   `json:"encrypted"`
	Backing     string `json:"full-backing-filename"`
	BackingName string `json:"backing-filename"`
	Specific    struct {
		Data struct {
			DataFile string `json:"data-file"`
			Extents  []struct {
				Filename string `json:"filename"`
			} `json:"extents"`
			Encrypt json.RawMessage `json:"encrypt"`
		} `json:"data"`
	} `json:"format-specific"`
}

// maxChain bounds how many images may lie on one another.
const maxChain = 64

// runQemuImg runs qemu-img and words how it failed. Of several things that go wrong the end of ctx counts.
func runQemuImg(ctx context.Context, cmd *exec.Cmd) error {
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("qemu-img is not installed: it reads the source's format; install the package qemu-utils")
	}
	text := strings.TrimPrefix(clean(strings.TrimSpace(errs.String())), "qemu-img: ")
	if text == "" {
		return fmt.Errorf("qemu-img: %w", err)
	}
	if strings.Contains(text, "Failed to get") && strings.Contains(text, "lock") {
		text += ". The image is in use: shut the VM that uses it down first"
	}
	return errors.New(text)
}

// inspect has qemu-img describe the image at path. Every file that it consists
// of must lie in its own folder: an image names others, and one that came from a
// stranger could name any file of this machine.
func inspect(ctx context.Context, path, format string) (*imageInfo, error) {
	top, err := describeImage(ctx, path, format)
	if err != nil {
		return nil, err
	}
	dir, err := realFolder(path)
	if err != nil {
		return nil, err
	}
	for layer, at, n := top, path, 0; ; n++ {
		files := []string{layer.Specific.Data.DataFile}
		for _, e := range layer.Specific.Data.Extents {
			files = append(files, e.Filename)
		}
		for _, f := range append(files, layer.Backing) {
			if err := staysIn(dir, at, f); err != nil {
				return nil, err
			}
		}
		if layer.Encrypted || len(layer.Specific.Data.Encrypt) > 0 {
			return nil, fmt.Errorf("%s is encrypted by QEMU (LUKS): decrypt it with qemu-img convert --object secret,… first, to where its plaintext may lie, and import the result", at)
		}
		if layer.BackingName == "" {
			return top, nil
		}
		if n == maxChain {
			return nil, fmt.Errorf("%s: more than %d images lie on one another", path, maxChain)
		}
		if at = layer.Backing; at == "" {
			at = filepath.Join(filepath.Dir(path), layer.BackingName)
		}
		if layer, err = describeImage(ctx, at, ""); err != nil {
			return nil, err
		}
	}
}

func describeImage(ctx context.Context, path, format string) (*imageInfo, error) {
	args := []string{"info", "--output=json"}
	if format != "" {
		args = append(args, "-f", format)
	}
	cmd := exec.CommandContext(ctx, "qemu-img", append(args, path)...)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := runQemuImg(ctx, cmd); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	info := &imageInfo{}
	if err := json.Unmarshal(out.Bytes(), info); err != nil {
		return nil, fmt.Errorf("reading what qemu-img says of %s: %w", path, err)
	}
	return info, nil
}

func realFolder(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	return filepath.Dir(real), nil
}

// staysIn refuses a file that an image names when it is not beside the image.
func staysIn(dir, image, file string) error {
	if file == "" {
		return nil
	}
	refuse := fmt.Errorf("%s refers to %q, which is not in its own folder: if you trust it, make one file of it with qemu-img convert, and import that", image, file)
	if !filepath.IsAbs(file) {
		if strings.Contains(file, ":") {
			return refuse
		}
		file = filepath.Join(filepath.Dir(image), file)
	}
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return fmt.Errorf("%s refers to %s: %w", image, file, err)
	}
	if filepath.Dir(real) != dir {
		return refuse
	}
	return nil
}

// unlinkedFile makes a file in dir that has no name: it is gone when this
// process ends, however it ends, so that no plaintext is left behind.
func unlinkedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(temporary file)")), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, &os.PathError{Op: "making a temporary file in", Path: dir, Err: err}
	}
	// A file system without O_TMPFILE, such as NFS.
	f, err := os.CreateTemp(dir, ".mortise-import-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// toRaw converts an image to raw in an unlinked sparse file in dir.
func toRaw(ctx context.Context, path string, info *imageInfo, dir string, tell func(state)) (_ *os.File, err error) {
	f, err := unlinkedFile(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: name another folder with --tmp", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := f.Truncate(info.VirtualSize); err != nil {
		return nil, err
	}
	// The target is there and reads as zeros; the child has it as descriptor 3.
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-p", "-n", "--target-is-zero", "-f", info.Format, "-O", "raw", path, "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stdout = &percentWriter{tell: func(p float64) { tell(state{percent: p, stage: "reading " + info.Format}) }}
	if err := runQemuImg(ctx, cmd); err != nil {
		return nil, fmt.Errorf("converting %s to a temporary file in %s: %w", path, dir, err)
	}
	return f, nil
}

// percentWriter reads qemu-img's progress, "    (12.34/100%)\r".
type percentWriter struct {
	tell func(percent float64)
	line []byte
}

func (w *percentWriter) Write(b []byte) (int, error) {
	for _, c := range b {
		if c != '\r' && c != '\n' {
			if len(w.line) < 64 {
				w.line = append(w.line, c)
			}
			continue
		}
		number, _, ok := strings.Cut(strings.Trim(string(w.line), " ("), "/")
		if p, err := strconv.ParseFloat(number, 64); ok && err == nil {
			w.tell(p)
		}
		w.line = w.line[:0]
	}
	return len(b), nil
}
