package main

import (
	"testing"
	"testing/fstest"
)

func TestMemoryThereIs(t *testing.T) {
	for what, c := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"nothing known":        {nil, 0},
		"the machine's":        {map[string]string{"proc/meminfo": "MemTotal:        2048 kB\nMemFree: 1 kB\n"}, 2 << 20},
		"the group's":          {map[string]string{"proc/meminfo": "MemTotal: 2048 kB\n", "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1000\n"}, 1000},
		"a group above":        {map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.high": "3000\n"}, 3000},
		"a container's":        {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5000\n"}, 5000},
		"no limit":             {map[string]string{"proc/meminfo": "MemTotal: 4 kB\n", "proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 4096},
		"more than there is":   {map[string]string{"proc/meminfo": "MemTotal: 4 kB\n", "proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "99999\n"}, 4096},
		"version 1 only":       {map[string]string{"proc/meminfo": "MemTotal: 4 kB\n", "proc/self/cgroup": "4:memory:/a\n"}, 4096},
		"what cannot be right": {map[string]string{"proc/meminfo": "MemTotal: -4 kB\n", "proc/self/cgroup": "0::/../..\n"}, 0},
	} {
		root := fstest.MapFS{}
		for name, text := range c.files {
			root[name] = &fstest.MapFile{Data: []byte(text)}
		}
		if got := memoryThereIs(root); got != c.want {
			t.Errorf("%s: %d, want %d", what, got, c.want)
		}
	}
}
