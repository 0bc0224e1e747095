package vdisk

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"
)

// BenchmarkDirect compares requests through the page cache, which has the disk
// (cached) or not (cold), with direct ones: bytes per second, and processor time for a
// GiB. Writes end with a flush. Best with -benchtime=1x: an iteration is a fixed
// amount of work. The kernel's threads that write a cache back are not counted.
func BenchmarkDirect(b *testing.B) {
	const size = 1 << 30
	w, path := directWorld(b), diskPath(b)
	create(b, path, w.spec(size, kekA))
	w.direct = false
	full := open(b, path, w.options())
	for off := int64(0); off < size; off += 4 << 20 {
		if err := full.WriteAt(randomBytes(uint64(off), 4<<20), off); err != nil {
			b.Fatal(err)
		}
	}
	if err := full.Flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	full.Close()
	for _, work := range []struct {
		name         string
		length       int64 // of a request
		depth, total int64
		random       bool
	}{{"4k-random-depth-1", 4 << 10, 1, 16 << 20, true}, {"4k-random-depth-32", 4 << 10, 32, 64 << 20, true}, {"1m-sequential", 1 << 20, 1, size, false}} {
		for _, verb := range []string{"read", "write"} {
			for _, way := range []string{"cached", "cold", "direct"} {
				b.Run(fmt.Sprintf("%s/%s/%s", work.name, verb, way), func(b *testing.B) {
					w.direct = way == "direct"
					d := open(b, path, w.options())
					defer d.Close()
					request := d.ReadAt
					if verb == "write" {
						request = d.WriteAt
					}
					var took, cpu time.Duration
					for b.Loop() {
						cache(b, d, way == "cached")
						began, used := time.Now(), processorTime(b)
						var wg sync.WaitGroup
						for i := range work.depth {
							wg.Go(func() {
								r := rand.New(rand.NewPCG(uint64(i), 1))
								buf := alignedBuffer(int(work.length))
								for n := int64(0); n < work.total/work.depth; n += work.length {
									off := n
									if work.random {
										off = r.Int64N(size/work.length) * work.length
									}
									if err := request(buf, off); err != nil {
										b.Error(err)
										return
									}
								}
							})
						}
						wg.Wait()
						if err := d.Flush(b.Context()); err != nil {
							b.Fatal(err)
						}
						took, cpu = took+time.Since(began), cpu+processorTime(b)-used
					}
					done := float64(work.total) * float64(b.N)
					b.ReportMetric(done/1e6/took.Seconds(), "MB/s")
					b.ReportMetric(cpu.Seconds()/done*(1<<30), "cpu-s/GiB")
				})
			}
		}
	}
}

// cache has the page cache hold a disk, or nothing of it.
func cache(b *testing.B, d *Disk, all bool) {
	d.ext.f.Forget(0, d.end())
	buf := make([]byte, 4<<20)
	for off := int64(0); all && off < d.end(); off += int64(len(buf)) {
		if err := readFull(d.ext.f, buf, off); err != nil {
			b.Fatal(err)
		}
	}
}

// processorTime is what this process has used, in user mode and in the kernel.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
