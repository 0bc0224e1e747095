package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"mortise/internal/nbd"
	"mortise/internal/vdisk"
)

// keptBitmaps are the bitmaps of a disk that is being served: what has changed
// since each was made, for incremental backup.
type keptBitmaps struct {
	top  string // descriptor
	list []*nbd.Bitmap
}

// diskSeal is what a bitmap knows a disk's last opening by. sure means that it stays
// the same if this process dies: an encrypted disk counts its openings. Of one in
// clear only the times of its file tell whether it was changed, once it is closed.
func diskSeal(top string) (seal string, sure bool, err error) {
	i, err := vdisk.Describe(top)
	if err != nil {
		return "", false, err
	}
	st, err := os.Stat(i.Extent)
	if err != nil {
		return "", false, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return "", false, fmt.Errorf("%s: this system does not tell a file's number", i.Extent)
	}
	if f, err := vdisk.DescribeFiles(top); err != nil {
		return "", false, err
	} else if f.State.Err == nil {
		return fmt.Sprintf("%x opened %d", sys.Ino, f.State.Opened), true, nil
	}
	return fmt.Sprintf("%x %x %x", sys.Ino, st.ModTime().UnixNano(), sys.Ctim.Nano()), false, nil
}

// bitmapFlags are those of mortise disk serve.
type bitmapFlags struct {
	make, drop []string
}

// keep opens the disk's bitmaps, makes new ones, and lets exp keep and offer them.
// found is the seal of before the disk was opened. One that cannot be trusted is left
// alone: a backup program that does not find it makes a full backup.
func (b bitmapFlags) keep(exp *nbd.Export, top, found string, size int64, log *slog.Logger) (k *keptBitmaps, err error) {
	k = &keptBitmaps{top: top}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.close())
		}
	}()
	i, err := vdisk.Describe(top)
	if err != nil {
		return k, err
	}
	for _, name := range b.drop {
		if !nbd.ValidBitmapName(name) {
			return k, fmt.Errorf("--drop-bitmap: %q is no name of a bitmap", name)
		}
		if err := os.Remove(nbd.BitmapPath(i.Extent, name)); err != nil {
			return k, fmt.Errorf("--drop-bitmap: %w", err)
		}
	}
	during, sure, err := diskSeal(top)
	if err != nil {
		return k, err
	}
	if !sure {
		during = ""
	}
	files, err := nbd.FindBitmaps(i.Extent)
	if err != nil {
		return k, err
	}
	for _, file := range files {
		bitmap, err := nbd.OpenBitmap(file, size, found, during, log)
		if err != nil {
			log.Warn("a bitmap cannot be used: the next backup must be a full one", "error", err)
			continue
		}
		k.list = append(k.list, bitmap)
	}
	for _, name := range b.make {
		if !nbd.ValidBitmapName(name) {
			return k, fmt.Errorf("--new-bitmap: %q is no name of a bitmap: 1 to 64 letters, digits, '.', '_', '-'", name)
		}
		bitmap, err := nbd.CreateBitmap(nbd.BitmapPath(i.Extent, name), nbd.BitmapSpec{Name: name, Size: size}, during, log)
		if errors.Is(err, os.ErrExist) {
			return k, fmt.Errorf("--new-bitmap %s: there is one; what is there is kept without a flag, and --drop-bitmap %s removes it", name, name)
		}
		if err != nil {
			return k, fmt.Errorf("--new-bitmap: %w", err)
		}
		k.list = append(k.list, bitmap)
	}
	for _, bitmap := range k.list {
		if err := exp.Track(bitmap); err != nil {
			return k, err
		}
		log.Info("keeping a bitmap of what changes", "bitmap", bitmap.Name(), "changed", bitmap.Dirty(), "granularity", bitmap.Granularity())
	}
	return k, nil
}

// close writes the bitmaps; the disk is closed already.
func (k *keptBitmaps) close() error {
	if k == nil || len(k.list) == 0 {
		return nil
	}
	seal, _, err := diskSeal(k.top)
	if err != nil {
		seal = "" // then nobody will trust them
	}
	for _, b := range k.list {
		err = errors.Join(err, b.Close(seal))
	}
	k.list = nil
	return err
}
