package nbd

import (
	"bytes"
	"context"
	"errors"
	mathrand "math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"
)

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
	if took := time.Since(began); took > n*delay/2 {
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
