package vdisk

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/keysafe"
)

// BenchmarkChain compares a chain of 32 links with one link, from storage and in the
// page cache, where what a request costs besides shows most: the same requests go to one and the other in turn, and
// "ratio" is the
// median processor time of one link by that of 32, from storage the time. Each link has overwritten random
// pieces of 64 KiB, so that a megabyte is in about 16 of them.
func BenchmarkChain(b *testing.B) {
	const size, links, piece = 128 << 20, 32, 64 << 10
	start := time.Now()
	for _, key := range []keysafe.KeyID{{}, kekA} {
		w := newWorld(b)
		o := w.chainOptions(b)
		build := func(links int) *Chain {
			path := diskPath(b)
			create(b, path, w.spec(size, key))
			d := openChain(b, path, o)
			buf := make([]byte, piece)
			r := rand.New(rand.NewPCG(1, 1))
			for _, i := range r.Perm(size / piece) { // as scattered as what the links get
				if err := d.WriteAt(buf[:piece], int64(i)*piece); err != nil {
					b.Fatal(err)
				}
			}
			for range links - 1 {
				if _, err := d.Snapshot(b.Context(), LinkSpec{}); err != nil {
					b.Fatal(err)
				}
				for range size / piece / links {
					if err := d.WriteAt(buf[:piece], r.Int64N(size/piece)*piece); err != nil {
						b.Fatal(err)
					}
				}
			}
			for off := int64(size / 2); links > 1 && off < size; off += piece { // writes to the upper half are to what is there
				if err := d.WriteAt(buf, off); err != nil {
					b.Fatal(err)
				}
			}
			if err := d.Flush(b.Context()); err != nil {
				b.Fatal(err)
			}
			return d
		}
		one, many := build(1), build(links)
		name := map[bool]string{true: "clear", false: "encrypted"}[key == keysafe.KeyID{}]
		read := func(d *Chain, p []byte, off int64) error { return d.ReadAt(p, off) }
		write := func(d *Chain, p []byte, off int64) error { return d.WriteAt(p, off) }
		for _, c := range []struct {
			name string
			n    int64
			do   func(d *Chain, p []byte, off int64) error
		}{{"cold-read-4k", 4 << 10, read}, {"cold-read-1m", 1 << 20, read}, {"read-4k", 4 << 10, read}, {"read-1m", 1 << 20, read}, {"write-4k", 4 << 10, write}, {"write-1m", 1 << 20, write}} {
			b.Run(name+"/"+c.name, func(b *testing.B) {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				buf := make([]byte, c.n)
				r := rand.New(rand.NewPCG(2, 2))
				batch := int(max(1, (1<<20)/c.n))
				clock, cold := threadTime, strings.HasPrefix(c.name, "cold")
				if cold {
					clock = func(*testing.B) time.Duration { return time.Since(start) }
				}
				var took [2][]time.Duration
				pass := func() {
					var offs [256]int64
					for i := range offs {
						offs[i] = r.Int64N(size/2/c.n) * c.n
						if c.name[0] == 'w' {
							offs[i] += size / 2
						}
					}
					for _, i := range r.Perm(2) {
						d := []*Chain{one, many}[i]
						for _, l := range d.links {
							if cold {
								l.ext.f.Forget(0, size)
							}
						}
						began := clock(b)
						for _, off := range offs[:batch] {
							if err := c.do(d, buf, off); err != nil {
								b.Fatal(err)
							}
						}
						took[i] = append(took[i], clock(b)-began)
					}
				}
				for b.Loop() {
					pass()
				}
				b.SetBytes(int64(batch) * c.n * 2)
				for i := range took {
					slices.Sort(took[i])
				}
				n := len(took[0]) / 2
				b.ReportMetric(took[0][n].Seconds()/took[1][n].Seconds(), "ratio")
			})
		}
	}
}

// threadTime is the processor time, user and system, that this thread has used.
func threadTime(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}
