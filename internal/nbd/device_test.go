package nbd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"
)

// memDisk is a Device in memory that holds the server to its promises: ranges
// inside the disk and of whole sectors, aligned buffers. It allocates blocks
// of 4096 bytes as they are written and gives them up when they are punched.
type memDisk struct {
	t testing.TB

	mu        sync.RWMutex
	data      []byte
	allocated []bool
	flushed   []byte // what a power cut would leave

	cannotZero bool         // WriteZeroes is not supported
	fail       atomic.Value // func(op string, off int64) error
	flushes    atomic.Int64
	calls      atomic.Int64
}

func newMemDisk(t testing.TB, size int) *memDisk {
	return &memDisk{t: t, data: make([]byte, size), allocated: make([]bool, (size+4095)/4096), flushed: make([]byte, size)}
}

// randomDisk is full of noise.
func randomDisk(t testing.TB, size int) *memDisk {
	d := newMemDisk(t, size)
	_, _ = rand.Read(d.data) // never fails
	for i := range d.allocated {
		d.allocated[i] = true
	}
	return d
}

func (d *memDisk) failWith(f func(op string, off int64) error) { d.fail.Store(f) }

func (d *memDisk) check(op string, p []byte, off, n int64) error {
	d.calls.Add(1)
	if off < 0 || n <= 0 || off%SectorSize != 0 || n%SectorSize != 0 || off+n > d.Size() {
		d.t.Errorf("%s of %d bytes at %d on a disk of %d", op, n, off, d.Size())
		return errors.New("range")
	}
	if p != nil && uintptr(unsafe.Pointer(&p[0]))%4096 != 0 {
		d.t.Errorf("%s with a buffer at %p", op, &p[0])
	}
	if f, ok := d.fail.Load().(func(string, int64) error); ok {
		return f(op, off)
	}
	return nil
}

func (d *memDisk) Size() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return int64(len(d.data))
}

func (d *memDisk) ReadAt(p []byte, off int64) error {
	if err := d.check("read", p, off, int64(len(p))); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	copy(p, d.data[off:])
	return nil
}

// WriteAt spoils p, as an encrypting device does.
func (d *memDisk) WriteAt(p []byte, off int64) error {
	if err := d.check("write", p, off, int64(len(p))); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.data[off:], p)
	d.mark(off, int64(len(p)), true)
	for i := 0; i < len(p); i += 64 {
		p[i] ^= 0x5a
	}
	return nil
}

func (d *memDisk) mark(off, n int64, allocated bool) {
	for b := off / 4096; b*4096 < off+n; b++ {
		if allocated || b*4096 >= off && min((b+1)*4096, int64(len(d.data))) <= off+n {
			d.allocated[b] = allocated
		}
	}
}

func (d *memDisk) Flush(context.Context) error {
	if err := d.check("flush", nil, 0, SectorSize); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.flushed, d.data)
	d.flushes.Add(1)
	return nil
}

func (d *memDisk) Trim(off, n int64) error {
	if err := d.check("trim", nil, off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	d.mark(off, n, false)
	return nil
}

func (d *memDisk) WriteZeroes(off, n int64, punch bool) error {
	if err := d.check("zero", nil, off, n); err != nil {
		return err
	}
	if d.cannotZero {
		return fmt.Errorf("memory: %w", errors.ErrUnsupported)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	d.mark(off, n, !punch)
	return nil
}

func (d *memDisk) BlockStatus(off, n int64, emit func(int64, Status) bool) error {
	if err := d.check("status", nil, off, n); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	for at := off; at < off+n; {
		b := at / 4096
		s := Hole | Zero
		if d.allocated[b] {
			s = 0
		}
		if !emit((b+1)*4096-at, s) { // the last one may reach beyond the range
			return nil
		}
		at = (b + 1) * 4096
	}
	return nil
}

// at returns a copy of n bytes at off.
func (d *memDisk) at(off uint64, n int) []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return bytes.Clone(d.data[off : off+uint64(n)])
}

func (d *memDisk) all() []byte { return d.at(0, len(d.data)) }

func (d *memDisk) isAllocated(block int) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.allocated[block]
}

// grow appends n bytes of zeros.
func (d *memDisk) grow(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data = append(d.data, make([]byte, n)...)
	d.flushed = append(d.flushed, make([]byte, n)...)
	d.allocated = append(d.allocated, make([]bool, n/4096)...)
}

func (d *memDisk) durable() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return bytes.Equal(d.data, d.flushed)
}

// powerCut returns what a power cut would leave.
func (d *memDisk) powerCut() []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return bytes.Clone(d.flushed)
}
