package store

import (
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"sync"
	"time"
)

// Reading a database in leaves several times as much garbage as it keeps, and
// begins with a small heap, which is collected the more often. So while much is
// read, the heap may always grow by loadRoom before it is collected, or by as much
// as is live, as ever, whichever is more.
const (
	loadRoom = 256 << 20
	// smallLoad is how much there is to read, in bytes, when it is not worth it.
	smallLoad = 64 << 20
)

// giveRoom lets the heap grow by room between collections until end is called.
// GOGC is what holds then, and for ever if it is off.
func giveRoom(room uint64) (end func()) {
	usual := gcPercent()
	if usual < 0 {
		return func() {}
	}
	var done sync.WaitGroup
	stop := make(chan struct{})
	done.Go(func() {
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		set := 0
		for {
			metrics.Read(live)
			percent := max(usual, int(room*100/max(live[0].Value.Uint64(), 4<<20)))
			if percent != set {
				debug.SetGCPercent(percent) // returns when no collection is under way
				set = percent
			}
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	})
	return func() {
		close(stop)
		done.Wait()
		debug.SetGCPercent(usual)
	}
}

// gcPercent is what GOGC says, -1 for off. What is set now may be somebody else's
// room.
func gcPercent() int {
	text := os.Getenv("GOGC")
	if text == "off" {
		return -1
	}
	if n, err := strconv.Atoi(text); err == nil {
		return n
	}
	return 100
}

// startRoom is giveRoom for the start of etcd in dir.
func startRoom(dir string) (end func()) {
	info, err := os.Stat(filepath.Join(dir, "etcd", "member", "snap", "db"))
	if err != nil || info.Size() < smallLoad {
		return func() {}
	}
	return giveRoom(min(uint64(info.Size()), loadRoom))
}
