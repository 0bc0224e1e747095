package vmfiles

import (
	"fmt"
	"path/filepath"
	"testing"
)

// BenchmarkWriteAt overwrites a file in place, encrypted, without syncs: what the
// view adds to the kernel's own cost.
func BenchmarkWriteAt(b *testing.B) {
	for _, n := range []int{512, 4096, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			f := create(b, filepath.Join(b.TempDir(), "f"), newKey(b))
			if err := f.Truncate(64 << 20); err != nil {
				b.Fatal(err)
			}
			p := make([]byte, n)
			b.SetBytes(int64(n))
			for i := 0; b.Loop(); i++ {
				if _, err := f.WriteAt(p, int64(i*n)%(64<<20)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
