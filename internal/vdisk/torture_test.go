package vdisk

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestTorture is TestPowerCut and TestChainPowerCut with disks that nobody has
// tried before, on all cores, for as long as MORTISE_TORTURE says: see `make
// torture`. The line of a disk that loses something names its seed.
func TestTorture(t *testing.T) {
	text := os.Getenv("MORTISE_TORTURE")
	if text == "" {
		t.Skip("runs by hand: make torture TORTURE=10m")
	}
	long, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	began := time.Now()
	var next, disks, ops, crashes, lost atomic.Uint64
	next.Store(uint64(began.UnixNano()))
	var all sync.WaitGroup
	for range runtime.NumCPU() {
		all.Go(func() {
			for time.Since(began) < long && lost.Load() == 0 {
				seed := next.Add(1)
				var err error
				var log []string
				if seed%3 == 0 {
					x := newTorture(t, w, seed)
					err, log = x.run(20), x.log
				} else {
					x := newChainTorture(w, seed)
					err, log = x.run(20), x.log
				}
				disks.Add(1)
				for _, line := range log {
					if strings.HasPrefix(line, "crash,") {
						crashes.Add(1)
					} else {
						ops.Add(1)
					}
				}
				if err != nil {
					lost.Add(1)
					t.Errorf("seed %d: %v\n%s", seed, err, strings.Join(log, "\n"))
				}
			}
		})
	}
	all.Wait()
	fmt.Printf("TORTURE disks=%d ops=%d crashes=%d lost=%d\n", disks.Load(), ops.Load(), crashes.Load(), lost.Load())
}
