package nbd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
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

// A flush on one connection covers what another one wrote.
func TestFlushCoversAllConnections(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, false)
	a, b := connect(t, path, true), connect(t, path, false)
	if a.flags&flagCanMultiConn == 0 {
		t.Error("multi-conn is not offered")
	}
	a.mustWrite(512, bytes.Repeat([]byte{1}, 512))
	if r := b.do(cmdFlush, 0, 0, 0, nil); r.err != 0 || !disk.durable() {
		t.Errorf("error %d, durable %v", r.err, disk.durable())
	}
	if got := b.mustRead(512, 512); got[0] != 1 {
		t.Error("a write is not seen on the other connection")
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

// Slow requests run at once and quick ones overtake them.
func TestParallel(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	release := make(chan struct{})
	entered := make(chan int64, 100)
	disk.failWith(func(op string, off int64) error {
		if off >= 512<<10 {
			entered <- off
			<-release
		}
		return nil
	})
	_, _, path := serve(t, disk, Options{Parallel: 8}, false)
	c := connect(t, path, true)
	for i := range uint64(7) {
		c.send(i, cmdRead, 0, 512<<10+i*65536, 65536, nil)
		if i == 6 {
			break
		}
	}
	for range 7 {
		select {
		case <-entered:
		case <-time.After(10 * time.Second):
			t.Fatal("requests do not run in parallel")
		}
	}
	for range 3 {
		c.mustRead(0, 512) // overtakes them
		if r := c.do(cmdFlush, 0, 0, 0, nil); r.err != 0 {
			t.Fatal("flush failed")
		}
	}
	close(release)
	for range 7 {
		if r := c.receive(0); r.err != 0 || len(r.data) != 65536 {
			t.Errorf("%+v", r)
		}
	}
}

// Small requests to a slow device run at once too, after the first has shown
// that it is slow.
func TestParallelSmall(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	const delay, n = 50 * time.Millisecond, 17
	disk.failWith(func(string, int64) error { time.Sleep(delay); return nil })
	_, _, path := serve(t, disk, Options{Parallel: 16}, false)
	c := connect(t, path, true)
	began := time.Now()
	for i := range uint64(n) {
		c.send(i, cmdRead, 0, i*4096, 4096, nil)
	}
	for range n {
		c.receive(0)
	}
	if took := time.Since(began); took > n*delay/3 {
		t.Errorf("%d requests of %v took %v", n, delay, took)
	}
}

// Large requests are served in pieces, which the client hardly notices.
func TestPieces(t *testing.T) {
	disk := randomDisk(t, 8<<20)
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	const off, n = 3*pieceSize - 512, 2*pieceSize + 1024 // touches four pieces
	r := c.do(cmdRead, 0, off, n, nil)
	if r.chunks != 4 || !bytes.Equal(r.data, disk.at(off, n)) {
		t.Errorf("read in %d chunks", r.chunks)
	}
	if r := c.do(cmdRead, cmdFlagDF, off, n, nil); r.chunks != 1 || !bytes.Equal(r.data, disk.at(off, n)) {
		t.Errorf("read with DF in %d chunks", r.chunks)
	}
	if calls := disk.calls.Load(); calls != 5 {
		t.Errorf("%d calls", calls)
	}
	if r := c.do(cmdWrite, cmdFlagFUA, off, n, make([]byte, n)); r.err != 0 || !isZero(disk.at(off, n)) || disk.flushes.Load() != 1 || !disk.durable() {
		t.Errorf("write with FUA: error %d, %d flushes", r.err, disk.flushes.Load())
	}
	if r := c.do(cmdRead, 0, off, n, nil); r.chunks != 4 || !r.hole {
		t.Errorf("read of zeros in %d chunks, hole %v", r.chunks, r.hole)
	}
	// One piece that fails fails the request, and the connection lives on.
	for piece := range int64(4) {
		disk.failWith(func(_ string, at int64) error {
			if at/pieceSize == off/pieceSize+piece {
				return syscall.ENOSPC
			}
			return nil
		})
		for _, cmd := range []command{cmdRead, cmdWrite} {
			var p []byte
			if cmd == cmdWrite {
				p = make([]byte, n)
			}
			if r := c.do(cmd, 0, off, n, p); r.err != eNOSPC {
				t.Errorf("%v with a bad piece %d: error %d", cmd, piece, r.err)
			}
		}
		if r := c.do(cmdWrite, cmdFlagFUA, off, n, make([]byte, n)); r.err != eNOSPC || disk.flushes.Load() != 1 {
			t.Error("a write that failed was flushed")
		}
		c.mustRead(4<<20, 4096)
	}
}

// A client that sends requests and takes no replies is not read from for ever,
// and others do not notice.
func TestClientThatDoesNotRead(t *testing.T) {
	disk := randomDisk(t, 64<<20)
	s, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	_ = c.c.SetWriteDeadline(time.Now().Add(time.Second))
	sent := 0
	for ; sent < 100_000; sent++ {
		if _, err := c.c.Write(header{cmd: cmdRead, off: 0, n: 1 << 20}.bytes()); err != nil {
			break
		}
	}
	if sent == 100_000 {
		t.Error("the server reads without end")
	}
	if n := disk.calls.Load() * pieceSize; n > maxInHandBytes+16<<20 {
		t.Errorf("%d MiB were read for a client that takes nothing", n>>20)
	}
	connect(t, path, true).mustRead(0, 4096)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown over a client that does not read: %v", err)
	}
}

// Bytes that are no request end one connection.
func TestTransmissionGarbage(t *testing.T) {
	disk := newMemDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, false)
	for name, b := range map[string][]byte{
		"wrong magic":      make([]byte, requestSize),
		"write of 4 GiB":   header{cmd: cmdWrite, n: 1<<32 - 1}.bytes(),
		"write just large": header{cmd: cmdWrite, n: maxPayload + 512}.bytes(),
		"disconnect":       header{cmd: cmdDisconnect}.bytes(),
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, path, true)
			c.send(1, cmdRead, 0, 0, 4096, nil)
			c.write(b)
			if r := c.receive(0); r.cookie != 1 || r.err != 0 {
				t.Error("the request before was not answered")
			}
			c.closed()
		})
	}
	t.Run("half a write", func(t *testing.T) {
		c := connect(t, path, true)
		calls := disk.calls.Load()
		c.send(1, cmdWrite, 0, 0, 1<<20, make([]byte, 1000))
		c.c.Close()
		connect(t, path, true).mustRead(0, 512)
		if disk.calls.Load() != calls+1 {
			t.Error("half a piece of a write reached the device")
		}
	})
}

// Requests cost no memory that the collector would have to find.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget")
	}
	disk := randomDisk(t, 16<<20)
	disk.failWith(func(string, int64) error { return nil })
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	burst := join(
		header{cmd: cmdRead, off: 0, n: 4096}.bytes(),
		header{cmd: cmdWrite, off: 0, n: 4096}.bytes(), make([]byte, 4096),
		header{cmd: cmdRead, off: 0, n: 128 << 10}.bytes(),
		header{cmd: cmdWrite, off: 0, n: 64 << 10}.bytes(), make([]byte, 64<<10),
		header{cmd: cmdFlush}.bytes(),
		header{cmd: cmdTrim, off: 4096, n: 4096}.bytes(),
		header{cmd: cmdBlockStatus, off: 0, n: 1 << 20}.bytes(),
		header{cmd: cmdRead, off: 512, n: 0xffff}.bytes(), // refused
	)
	replies := make([]byte, 1<<20)
	round := func(rounds int) {
		for range rounds {
			c.write(burst)
			for got := 0; got < 8; got++ {
				c.skipReply(replies)
			}
		}
	}
	_ = c.c.SetDeadline(time.Now().Add(time.Minute))
	round(200) // fills the pools
	var before, after runtime.MemStats
	const rounds = 1000
	runtime.ReadMemStats(&before)
	round(rounds)
	runtime.ReadMemStats(&after)
	if n := float64(after.Mallocs-before.Mallocs) / (8 * rounds); n > 0.1 {
		t.Errorf("%.2f allocations a request", n)
	}
}

// One request that the device sits on holds up nobody, though the device was
// quick before.
func TestStuckRequest(t *testing.T) {
	disk := randomDisk(t, 1<<20)
	release := make(chan struct{})
	disk.failWith(func(_ string, off int64) error {
		if off < 8192 {
			<-release
		}
		return nil
	})
	_, _, path := serve(t, disk, Options{Parallel: 3}, false)
	c := connect(t, path, true)
	for round := range 3 { // the third time the guard has gone to sleep
		if round == 2 {
			time.Sleep(2 * guardSleep)
		}
		c.mustRead(64<<10, 4096)
	}
	c.send(1, cmdRead, 0, 0, 512, nil)
	c.send(2, cmdWrite, 0, 4096, 512, make([]byte, 512))
	for range 100 {
		c.mustRead(64<<10, 4096)
	}
	close(release)
	if a, b := c.receive(0), c.receive(0); a.cookie+b.cookie != 3 {
		t.Errorf("replies %d and %d", a.cookie, b.cookie)
	}
}

// A device that is quick or slow without a rule, under clients that keep many
// requests of all sizes on their way: the token goes from hand to hand, and
// everybody gets his own data.
func TestErraticDevice(t *testing.T) {
	const slots, slotSize, rounds = 24, 512 << 10, 12
	disk := newMemDisk(t, 2*slots*slotSize)
	disk.failWith(func(string, int64) error {
		switch mathrand.IntN(16) {
		case 0:
			time.Sleep(time.Duration(mathrand.IntN(4)) * time.Millisecond)
		case 1:
			time.Sleep(50 * time.Microsecond)
		}
		return nil
	})
	_, _, path := serve(t, disk, Options{Parallel: 4}, false)
	together(2, func(client int) {
		c := connect(t, path, true)
		base := uint64(client) * slots * slotSize
		for round := range byte(rounds) {
			size := func(slot int) int { return 512 << ((slot + int(round)) % 11) } // to 512 KiB
			var burst []byte
			for slot := range slots {
				h := header{cmd: cmdWrite, cookie: uint64(slot), off: base + uint64(slot)*slotSize, n: uint32(size(slot))}
				if slot%7 == 0 {
					h.flags = cmdFlagFUA
				}
				burst = append(burst, join(h.bytes(), bytes.Repeat([]byte{byte(slot) ^ round | 0x80}, size(slot)))...)
			}
			go func() { _, _ = c.c.Write(burst) }() // a failure shows as missing replies
			for range slots {
				if r := c.receive(0); r.err != 0 {
					t.Errorf("write %d: error %d", r.cookie, r.err)
					return
				}
			}
			for slot := range slots {
				c.send(uint64(slot), cmdRead, 0, base+uint64(slot)*slotSize, uint32(size(slot)), nil)
			}
			for range slots {
				r := c.receive(0)
				slot := int(r.cookie)
				if r.err != 0 || !bytes.Equal(r.data, bytes.Repeat([]byte{byte(slot) ^ round | 0x80}, size(slot))) {
					t.Errorf("read %d: error %d, or not what was written", slot, r.err)
					return
				}
			}
		}
	})
}

// A client may send all it has before it takes a reply.
func TestClientThatSendsFirst(t *testing.T) {
	disk := randomDisk(t, 4<<20)
	_, _, path := serve(t, disk, Options{}, false)
	c := connect(t, path, true)
	const n = 8
	for i := range uint64(n) { // far more than the socket's buffers hold
		c.send(2*i, cmdRead, 0, 0, 2<<20, nil)
		c.send(2*i+1, cmdWrite, 0, 2<<20, 2<<20, make([]byte, 2<<20))
	}
	for range 2 * n {
		if r := c.receive(0); r.err != 0 || r.cookie%2 == 0 && len(r.data) != 2<<20 {
			t.Fatalf("reply %d: error %d, %d bytes", r.cookie, r.err, len(r.data))
		}
	}
}
