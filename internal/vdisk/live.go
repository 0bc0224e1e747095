package vdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cespare/xxhash/v2"
)

// defaultLive is the folder of live bitmaps that Options.Live names otherwise.
const defaultLive = "/dev/shm/mortise"

// A live bitmap is a file that holds the bits of a snapshot link while it is open
// for writing, durable or not. It outlives the process and not the machine's
// memory: after a kill it says which units the page cache has, after a power cut
// it must not be believed. So its header names the boot, the extent, and which
// opening of the extent it belongs to; another one is no error, just not ours.
const (
	liveMagic  = "MORTLIVE"
	liveHeader = 4096
)

// liveTag is what a live bitmap must say to be believed.
func (d *Disk) liveTag(st fileStat, opens uint64) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, 128)
	b = append(b, liveMagic...)
	b = le.AppendUint16(b, stateVersion)
	id := d.desc.UUID()
	b = append(b, id[:]...)
	b = le.AppendUint32(b, d.desc.CID())
	b = le.AppendUint64(b, st.dev)
	b = le.AppendUint64(b, st.ino)
	b = le.AppendUint64(b, opens)
	b = append(b, bootID()...)
	return le.AppendUint64(b, xxhash.Sum64(b))
}

// bootID changes when the machine boots.
func bootID() []byte {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it a folder that a boot empties is enough
	return bytes.TrimSpace(b)
}

func (d *Disk) liveName(st fileStat) string {
	return filepath.Join(d.opts.Live, fmt.Sprintf("%x-%x-%08x.bits", st.dev, st.ino, d.desc.CID()))
}

// openLive opens the live bitmap that a killed process has left, nil if there is
// none of the extent's last opening.
func (d *Disk) openLive() (file, error) {
	st, err := d.ext.f.Stat()
	if err != nil {
		return nil, err
	}
	f, err := d.opts.fs.Open(d.liveName(st), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("opening a live bitmap: %w", err)
	}
	want := d.liveTag(st, d.state.cur.Load().opens)
	have := make([]byte, len(want))
	if err := readOrZero(f, have, 0); err != nil || !bytes.Equal(have, want) {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// createLive makes the live bitmap of this opening of the extent, empty: what the
// one before had is durable.
func (d *Disk) createLive() (file, error) {
	st, err := d.ext.f.Stat()
	if err != nil {
		return nil, err
	}
	if err := d.opts.fs.Mkdir(d.opts.Live); err != nil {
		return nil, fmt.Errorf("making the folder of live bitmaps, without which a killed process would lose writes: %w", err)
	}
	f, err := d.opts.fs.Open(d.liveName(st), os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("creating a live bitmap: %w", err)
	}
	err = f.Truncate(0) // with the old bits the old header goes
	if err == nil {
		_, err = f.WriteAt(d.liveTag(st, d.state.cur.Load().opens), 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("creating a live bitmap: %w", err), f.Close())
	}
	return f, nil
}

// dropLive removes the live bitmap of a link that is closed with everything
// durable.
func (d *Disk) dropLive() error {
	st, err := d.ext.f.Stat()
	if err != nil {
		return err
	}
	return removeAll(d.opts.fs, d.liveName(st))
}
