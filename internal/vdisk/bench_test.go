package vdisk

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mortise/internal/keysafe"
)

// BenchmarkIO compares the encrypted path with the plain one, in the page cache.
func BenchmarkIO(b *testing.B) {
	w := newWorld(b)
	const size = 256 << 20
	for _, c := range []struct {
		name string
		key  keysafe.KeyID
	}{{"plain", keysafe.KeyID{}}, {"encrypted", kekA}} {
		path := diskPath(b)
		create(b, path, w.spec(size, c.key))
		d := open(b, path, w.options())
		buf := make([]byte, 1<<20)
		for off := int64(0); off < size; off += 1 << 20 {
			if err := d.WriteAt(randomBytes(uint64(off), 1<<20), off); err != nil {
				b.Fatal(err)
			}
		}
		for _, n := range []int64{4 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/read-%dk", c.name, n>>10), func(b *testing.B) {
				b.SetBytes(n)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if err := d.ReadAt(buf[:n], int64(i)*7919*n%size); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run(fmt.Sprintf("%s/write-%dk", c.name, n>>10), func(b *testing.B) {
				b.SetBytes(n)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if err := d.WriteAt(buf[:n], int64(i)*7919*n%size); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkConvert compares conversions of a cold disk with a straight O_DIRECT
// copy of the same file, in the same run.
func BenchmarkConvert(b *testing.B) {
	w := newWorld(b)
	const size = 1 << 30
	path := diskPath(b)
	create(b, path, w.spec(size, keysafe.KeyID{}))
	d := open(b, path, w.options())
	for off := int64(0); off < size; off += 4 << 20 {
		if err := d.WriteAt(randomBytes(uint64(off), 4<<20), off); err != nil {
			b.Fatal(err)
		}
	}
	cold := func(b *testing.B) {
		if err := d.Flush(b.Context()); err != nil {
			b.Fatal(err)
		}
		d.ext.f.Forget(0, size)
	}
	b.Run("copy", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			cold(b)
			b.StartTimer()
			copyDirect(b, d.ext.name, filepath.Join(filepath.Dir(path), "copy"))
		}
		b.SetBytes(size)
	})
	for _, t := range []Target{{Kind: Encrypting, Key: kekA}, {Kind: Recrypting, Key: kekB}, {Kind: Decrypting}} {
		b.Run(t.Kind.String(), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				if i > 0 && t.Kind != Recrypting {
					back := Target{Kind: Decrypting}
					if t.Kind == Decrypting {
						back = Target{Kind: Encrypting, Key: kekA}
					}
					if err := d.Convert(b.Context(), back, nil); err != nil {
						b.Fatal(err)
					}
				}
				cold(b)
				b.StartTimer()
				if err := d.Convert(b.Context(), t, nil); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(size)
		})
	}
}

func copyDirect(b testing.TB, from, to string) {
	in, err := os.OpenFile(from, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer out.Close()
	buf := make([]byte, 8<<20)
	for {
		n, err := io.ReadFull(in, buf)
		if n == 0 {
			break
		}
		if _, err := out.Write(buf[:n]); err != nil {
			b.Fatal(err)
		}
		if err != nil {
			break
		}
	}
	if err := out.Sync(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkIOWhileConverting says what a guest gets of its disk meanwhile.
func BenchmarkIOWhileConverting(b *testing.B) {
	w := newWorld(b)
	const size = 512 << 20
	path := diskPath(b)
	create(b, path, w.spec(size, kekA))
	d := open(b, path, w.options())
	for off := int64(0); off < size; off += 4 << 20 {
		if err := d.WriteAt(randomBytes(uint64(off), 4<<20), off); err != nil {
			b.Fatal(err)
		}
	}
	guest := func(b *testing.B) {
		r := rand.New(rand.NewPCG(1, 2))
		buf := make([]byte, 4096)
		var worst time.Duration
		for b.Loop() {
			began := time.Now()
			off := r.Int64N(size/4096) * 4096
			var err error
			if r.IntN(2) == 0 {
				err = d.ReadAt(buf, off)
			} else {
				err = d.WriteAt(buf, off)
			}
			if err != nil {
				b.Fatal(err)
			}
			worst = max(worst, time.Since(began))
		}
		b.ReportMetric(float64(worst.Milliseconds()), "worst-ms")
	}
	b.Run("idle", guest)
	b.Run("converting", func(b *testing.B) {
		var stop atomic.Bool
		done := make(chan struct{})
		go func() {
			defer close(done)
			for key := kekA; !stop.Load(); {
				if err := d.Convert(b.Context(), Target{Kind: Recrypting, Key: key}, nil); err != nil {
					b.Error(err)
					return
				}
			}
		}()
		guest(b)
		stop.Store(true)
		<-done
	})
}
