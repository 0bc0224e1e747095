package storage

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// device reads what the kernel knows of the disk below a mount: of what size its
// sectors are, which it writes whole, and whether a write of more can be. A
// network's storage has none.
func (r *Report) device(m mount) {
	link, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", m.Major, m.Minor))
	if err != nil {
		return
	}
	if _, err := os.Stat(filepath.Join(link, "partition")); err == nil {
		link = filepath.Dir(link) // the disk has the queue
	}
	r.Sector = queueValue(link, "logical_block_size")
}

func queueValue(disk, name string) int64 {
	text, err := os.ReadFile(filepath.Join(disk, "queue", name))
	if err != nil {
		return 0
	}
	v, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0
	}
	return v
}
