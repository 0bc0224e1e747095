package main

import (
	"bufio"
	"bytes"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// boundMemory makes the garbage collector work harder once the heap comes near the
// memory that there is, instead of letting it grow to twice what is live, as it
// does while many requests are served. Three quarters of the machine's memory, or
// of the control group's if that has less, are the heap's; the rest is for the
// mapped database and the system. GOMEMLIMIT overrules it.
func boundMemory(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if all := memoryThereIs(os.DirFS("/")); all > 0 {
		debug.SetMemoryLimit(all / 4 * 3)
		log.Debug("the heap is kept to three quarters of the memory", "memory", all)
	}
}

// memoryThereIs is the least of the machine's memory and the limits of the control
// groups (version 2) that this process is in, in bytes; 0 if it cannot be known.
func memoryThereIs(root fs.FS) int64 {
	least := int64(math.MaxInt64)
	lower := func(n int64, err error) {
		if err == nil && n > 0 {
			least = min(least, n)
		}
	}
	if text, err := fs.ReadFile(root, "proc/meminfo"); err == nil {
		for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
			if kib, is := strings.CutPrefix(lines.Text(), "MemTotal:"); is {
				n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(kib, "kB")), 10, 53)
				lower(n<<10, err)
			}
		}
	}
	if text, err := fs.ReadFile(root, "proc/self/cgroup"); err == nil {
		for line := range strings.Lines(string(text)) {
			group, is := strings.CutPrefix(strings.TrimSpace(line), "0::/")
			for ; is; group = path.Dir(group) {
				for _, name := range []string{"memory.max", "memory.high"} {
					if text, err := fs.ReadFile(root, path.Join("sys/fs/cgroup", group, name)); err == nil {
						lower(strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)) // "max" is no number
					}
				}
				if group == "" || group == "." {
					break
				}
			}
		}
	}
	if least == math.MaxInt64 {
		return 0
	}
	return least
}
