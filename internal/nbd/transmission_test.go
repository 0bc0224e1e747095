package nbd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"slices"
	"syscall"
	"testing"
)

func TestReadWrite(t *testing.T) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%v", structured), func(t *testing.T) {
			disk := randomDisk(t, 80<<20)
			_, _, path := serve(t, disk, Options{}, false)
			c := connect(t, path, structured)
			if c.size != 80<<20 {
				t.Errorf("size %d", c.size)
			}
			// Sizes around those at which the server's ways part.
			for _, n := range []int{512, 4096, pieceSize, pieceSize + 512, 3 * pieceSize, inboxSize - requestSize + 4, inboxSize, inboxSize + 512, 1 << 20, maxPayload} {
				n = n / 512 * 512
				off := uint64(mathrand.IntN((80<<20-n)/512) * 512)
				if got := c.mustRead(off, n); !bytes.Equal(got, disk.at(off, n)) {
					t.Errorf("read of %d: wrong data", n)
				}
				p := make([]byte, n)
				_, _ = rand.Read(p)
				want := bytes.Clone(p)
				c.mustWrite(off, p)
				if got := c.mustRead(off, n); !bytes.Equal(got, want) {
					t.Errorf("write of %d: wrong data", n)
				}
			}
			// The very end of the disk, and nothing at all.
			c.mustWrite(80<<20-512, make([]byte, 512))
			c.mustRead(80<<20, 0)
			c.mustWrite(80<<20, nil)
		})
	}
}

// A burst that the client sends in one go, small and large, is answered whole.
func TestBurst(t *testing.T) {
	disk := randomDisk(t, 8<<20)
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	var burst []byte
	const n = 300
	for i := range uint64(n) {
		off := i * 8192
		if i%3 == 0 {
			h := header{cmd: cmdWrite, cookie: i, off: off, n: 4096}
			burst = append(burst, join(h.bytes(), bytes.Repeat([]byte{byte(i)}, 4096))...)
		} else {
			burst = append(burst, header{cmd: cmdRead, cookie: i, off: off, n: uint32(512 * (i%128 + 1))}.bytes()...)
		}
	}
	before := disk.all()
	go func() { _, _ = c.c.Write(burst) }() // a failure shows as missing replies
	seen := map[uint64]bool{}
	for range n {
		r := c.receive(0)
		i := r.cookie
		if seen[i] || r.err != 0 {
			t.Fatalf("reply %d: twice or error %d", i, r.err)
		}
		seen[i] = true
		if i%3 != 0 && len(r.data) != int(512*(i%128+1)) {
			t.Fatalf("read %d: %d bytes", i, len(r.data))
		}
		if i%3 != 0 && !bytes.Equal(r.data[:512], before[i*8192:i*8192+512]) {
			// Reads reach over writes behind them, but begin elsewhere.
			t.Fatalf("read %d: wrong data", i)
		}
	}
	for i := uint64(0); i < n; i += 3 {
		if !bytes.Equal(disk.at(i*8192, 4096), bytes.Repeat([]byte{byte(i)}, 4096)) {
			t.Fatalf("write %d is not on the disk", i)
		}
	}
}

func TestRefusedRequests(t *testing.T) {
	const size = 64 << 20
	tests := []struct {
		name  string
		cmd   command
		flags uint16
		off   uint64
		n     uint32
		want  errno
	}{
		{"read beyond the end", cmdRead, 0, size - 512, 1024, eINVAL},
		{"read at the end of numbers", cmdRead, 0, 1<<64 - 512, 1024, eINVAL},
		{"read of 4 GiB", cmdRead, 0, 0, 0xfffffe00, eINVAL},
		{"read of more than a payload", cmdRead, 0, 0, maxPayload + 512, eOVERFLOW},
		{"read of half a sector", cmdRead, 0, 0, 256, eINVAL},
		{"read between sectors", cmdRead, 0, 100, 512, eINVAL},
		{"read with a hole flag", cmdRead, cmdFlagNoHole, 0, 512, eINVAL},
		{"read with an unknown flag", cmdRead, 1 << 9, 0, 512, eINVAL},
		{"write beyond the end", cmdWrite, 0, size, 512, eNOSPC},
		{"large write beyond the end", cmdWrite, 0, size - 512, 1 << 20, eNOSPC},
		{"write between sectors", cmdWrite, 0, 1, 512, eINVAL},
		{"write with DF", cmdWrite, cmdFlagDF, 0, 512, eINVAL},
		{"trim beyond the end", cmdTrim, 0, size, 512, eINVAL},
		{"trim with a fast flag", cmdTrim, cmdFlagFastZero, 0, 512, eINVAL},
		{"zeroes beyond the end", cmdWriteZeroes, 0, 512, size, eNOSPC},
		{"flush of a range", cmdFlush, 0, 512, 0, eINVAL},
		{"flush of a length", cmdFlush, 0, 0, 512, eINVAL},
		{"status beyond the end", cmdBlockStatus, 0, size, 512, eINVAL},
		{"status of nothing", cmdBlockStatus, 0, 0, 0, eINVAL},
		{"cache", 5, 0, 0, 512, eINVAL},
		{"resize", 8, 0, 0, 512, eINVAL},
		{"unknown", 0xffff, 0, 0, 0, eINVAL},
	}
	for _, structured := range []bool{false, true} {
		disk := newMemDisk(t, size)
		_, _, path := serve(t, disk, Options{}, false)
		c := connect(t, path, structured)
		for _, tt := range tests {
			var payload []byte
			if tt.cmd == cmdWrite {
				payload = make([]byte, tt.n)
			}
			r := c.do(tt.cmd, tt.flags, tt.off, tt.n, payload)
			want := tt.want
			if r.err != want {
				t.Errorf("structured=%v %s: error %d, want %d", structured, tt.name, r.err, want)
			}
			if structured && r.text == "" {
				t.Errorf("%s: no reason given", tt.name)
			}
		}
		if n := disk.calls.Load(); n != 0 {
			t.Errorf("%d refused requests reached the device", n)
		}
		c.mustRead(0, 512)
	}
	_, _, path := serve(t, newMemDisk(t, 1<<20), Options{}, false)
	c := connect(t, path, false)
	if r := c.do(cmdRead, cmdFlagDF, 0, 512, nil); r.err != eINVAL {
		t.Errorf("DF without structured replies: %d", r.err)
	}
	if r := c.do(cmdBlockStatus, 0, 0, 512, nil); r.err != eINVAL {
		t.Errorf("status without structured replies: %d", r.err)
	}
}

func TestReadOnly(t *testing.T) {
	disk := randomDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, true)
	before := disk.all()
	c := connect(t, path, true)
	for _, cmd := range []command{cmdWrite, cmdTrim, cmdWriteZeroes} {
		var p []byte
		if cmd == cmdWrite {
			p = make([]byte, 512)
		}
		if r := c.do(cmd, 0, 0, 512, p); r.err != ePERM {
			t.Errorf("%v: error %d", cmd, r.err)
		}
	}
	if r := c.do(cmdFlush, 0, 0, 0, nil); r.err != 0 {
		t.Errorf("flush: error %d", r.err)
	}
	if !bytes.Equal(disk.all(), before) || !bytes.Equal(c.mustRead(0, 1<<20), before) {
		t.Error("the disk has changed")
	}
}

func TestDeviceErrors(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, false)
	for _, structured := range []bool{false, true} {
		c := connect(t, path, structured)
		for _, tt := range []struct {
			err  error
			want errno
		}{
			{errors.New("broken"), eIO},
			{syscall.EIO, eIO},
			{&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, eNOSPC},
			{fmt.Errorf("quota: %w", syscall.EDQUOT), eNOSPC},
			{syscall.EFBIG, eNOSPC},
			{syscall.EROFS, ePERM},
			{syscall.EACCES, ePERM},
			{syscall.EPERM, ePERM},
			{syscall.EINVAL, eINVAL},
			{syscall.ENOMEM, eNOMEM},
			{syscall.EOVERFLOW, eOVERFLOW},
			{syscall.ESHUTDOWN, eSHUTDOWN},
			{context.Canceled, eSHUTDOWN},
			{syscall.ENOENT, eIO},
		} {
			disk.failWith(func(string, int64) error { return tt.err })
			for _, cmd := range []command{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes, cmdFlush, cmdBlockStatus} {
				if cmd == cmdBlockStatus && !structured {
					continue
				}
				n, p := uint32(512), []byte(nil)
				switch cmd {
				case cmdFlush:
					n = 0
				case cmdWrite:
					p = make([]byte, n)
				}
				if r := c.do(cmd, 0, 0, n, p); r.err != tt.want {
					t.Errorf("%v: %v became %d, want %d", cmd, tt.err, r.err, tt.want)
				}
			}
		}
		disk.failWith(func(string, int64) error { return nil })
		c.mustRead(0, 512)
	}
}

func TestFUA(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	step := func(name string, cmd command, flags uint16, durable bool) {
		t.Helper()
		p := []byte(nil)
		if cmd == cmdWrite {
			p = bytes.Repeat([]byte{byte(disk.calls.Load() + 1)}, 512)
		}
		if r := c.do(cmd, flags, 0, 512, p); r.err != 0 {
			t.Fatalf("%s: error %d", name, r.err)
		}
		if disk.durable() != durable {
			t.Errorf("%s: durable is %v", name, !durable)
		}
	}
	step("write", cmdWrite, 0, false)
	step("write with FUA", cmdWrite, cmdFlagFUA, true)
	step("zeroes", cmdWriteZeroes, 0, false)
	step("zeroes with FUA", cmdWriteZeroes, cmdFlagFUA, true)
	step("write", cmdWrite, 0, false)
	step("trim with FUA", cmdTrim, cmdFlagFUA, true)
	step("write", cmdWrite, 0, false)
	if r := c.do(cmdFlush, 0, 0, 0, nil); r.err != 0 || !disk.durable() {
		t.Errorf("flush: error %d", r.err)
	}
	before := disk.flushes.Load()
	c.do(cmdRead, cmdFlagFUA, 0, 512, nil)
	c.do(cmdBlockStatus, cmdFlagFUA, 0, 512, nil)
	if n := disk.flushes.Load(); n != before {
		t.Error("FUA on a read flushed")
	}
	// A flush that fails fails the write that asked for it.
	disk.failWith(func(op string, _ int64) error {
		if op == "flush" {
			return syscall.EIO
		}
		return nil
	})
	if r := c.do(cmdWrite, cmdFlagFUA, 0, 512, make([]byte, 512)); r.err != eIO {
		t.Errorf("write with FUA on a disk that cannot flush: %d", r.err)
	}
}

func TestZeroes(t *testing.T) {
	for _, cannot := range []bool{false, true} {
		disk := randomDisk(t, 4<<20)
		disk.cannotZero = cannot
		_, _, path := serve(t, disk, Options{}, false)
		c := connect(t, path, true)
		if r := c.do(cmdWriteZeroes, 0, 512, 3<<20, nil); r.err != 0 {
			t.Fatalf("error %d", r.err)
		}
		if !isZero(disk.at(512, 3<<20)) || isZero(disk.at(3<<20+512, 512)) {
			t.Errorf("cannot=%v: wrong range was zeroed", cannot)
		}
		want := eSuccess
		if cannot {
			want = eNOTSUP
		}
		if r := c.do(cmdWriteZeroes, cmdFlagFastZero, 3<<20, 1<<20, nil); r.err != want {
			t.Errorf("cannot=%v: fast zeroes: error %d", cannot, r.err)
		}
		if cannot == isZero(disk.at(3<<20+512, 1<<20-512)) {
			t.Errorf("cannot=%v: fast zeroes did something else than they said", cannot)
		}
		if r := c.do(cmdWriteZeroes, cmdFlagNoHole, 8192, 8192, nil); r.err != 0 {
			t.Errorf("error %d", r.err)
		}
		if !disk.isAllocated(2) || !disk.isAllocated(3) || !cannot && disk.isAllocated(4) {
			t.Errorf("cannot=%v: allocation is not as asked for", cannot)
		}
	}
}

func TestHoles(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	c.mustWrite(64<<10, bytes.Repeat([]byte{9}, 4096))
	for _, tt := range []struct {
		off   uint64
		n     uint32
		flags uint16
		hole  bool
	}{
		{0, 64 << 10, 0, true}, {0, 64 << 10, cmdFlagDF, true}, {0, 512, 0, true},
		{0, 64<<10 + 512, 0, false}, {64 << 10, 4096, 0, false}, {68 << 10, 5120, 0, true},
	} {
		r := c.do(cmdRead, tt.flags, tt.off, tt.n, nil)
		if r.err != 0 || r.hole != tt.hole || !bytes.Equal(r.data, disk.at(tt.off, int(tt.n))) {
			t.Errorf("%+v: hole %v, error %d", tt, r.hole, r.err)
		}
	}
	// Without structured replies zeros travel.
	if got := connect(t, path, false).mustRead(0, 4096); !isZero(got) {
		t.Error("wrong data")
	}
}

func TestBlockStatus(t *testing.T) {
	disk := newMemDisk(t, 4<<20)
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	c.mustWrite(8192, make([]byte, 8192))
	const empty = Hole | Zero
	for _, tt := range []struct {
		off   uint64
		n     uint32
		flags uint16
		want  []extent
	}{
		{0, 4 << 20, 0, []extent{{8192, empty}, {8192, 0}, {4<<20 - 16384, empty}}},
		{0, 4 << 20, cmdFlagReqOne, []extent{{8192, empty}}},
		{8704, 1024, 0, []extent{{1024, 0}}},
		{4096, 4608, 0, []extent{{4096, empty}, {512, 0}}},
	} {
		if r := c.do(cmdBlockStatus, tt.flags, tt.off, tt.n, nil); r.err != 0 || !slices.Equal(r.extents, tt.want) {
			t.Errorf("%+v: %+v", tt, r)
		}
	}
	// More extents than an answer takes: it is short and correct.
	for i := range uint64(512) {
		c.mustWrite(i*8192, make([]byte, 512))
	}
	r := c.do(cmdBlockStatus, 0, 0, 4<<20, nil)
	if len(r.extents) != maxExtents || r.extents[0] != (extent{4096, 0}) || r.extents[maxExtents-1] != (extent{4096, empty}) {
		t.Errorf("%d extents: %v…", len(r.extents), r.extents[:2])
	}
}
