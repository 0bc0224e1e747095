package main

import (
	"os"
	"strings"
	"sync"
	"time"
)

// testClock is a clock that a test sets wrong through a file that holds a
// duration. Only state of 'mortise dev' takes it.
func testClock(path string) func() time.Time {
	var mu sync.Mutex
	var read time.Time
	var off time.Duration
	return func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if now.Sub(read) > 100*time.Millisecond {
			read = now
			if text, err := os.ReadFile(path); err == nil {
				off, _ = time.ParseDuration(strings.TrimSpace(string(text)))
			}
		}
		return now.Add(off)
	}
}
