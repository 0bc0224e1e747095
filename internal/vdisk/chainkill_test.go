package vdisk

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// What is killed: each is one operation on a copy of the same disk of three links,
// begun by writing what nobody flushes. The file top says which link is the top, as
// a VMX does.
var chainKillOps = []struct {
	name string
	run  func(ctx context.Context, d *Chain, commit func(string) error) error
	done func(links int, size int64) bool
}{
	{"write", func(ctx context.Context, d *Chain, _ func(string) error) error { return d.Flush(ctx) },
		func(links int, _ int64) bool { return links == 3 }},
	{"snapshot", func(ctx context.Context, d *Chain, commit func(string) error) error {
		_, err := d.Snapshot(ctx, LinkSpec{Commit: commit})
		return err
	}, func(links int, _ int64) bool { return links >= 4 }},
	{"merge the top", func(ctx context.Context, d *Chain, commit func(string) error) error {
		if len(d.links) < 3 {
			return nil
		}
		return d.Consolidate(ctx, MergeSpec{Link: "vm-000002.vmdk", Commit: commit})
	}, func(links int, _ int64) bool { return links == 2 }},
	{"merge the middle", func(ctx context.Context, d *Chain, commit func(string) error) error {
		if len(d.links) < 3 {
			return nil
		}
		return d.Consolidate(ctx, MergeSpec{Link: "vm-000001.vmdk", Commit: commit})
	}, func(links int, _ int64) bool { return links == 2 }},
	{"convert", func(ctx context.Context, d *Chain, _ func(string) error) error {
		return d.Convert(ctx, Target{Kind: Recrypting, Key: kekB, Epoch: 2}, nil)
	}, func(links int, _ int64) bool { return links == 3 }},
}

const chainKillSize = 40*UnitSize - 3*SectorSize

// chainKill does one operation of chainKillOps in a folder.
func chainKill(ctx context.Context, op int, dir string, at func(string), write func(*Chain) error) error {
	d, err := openKilled(ctx, dir, at)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := write(d); err != nil {
		return err
	}
	return chainKillOps[op].run(ctx, d, func(top string) error {
		at("top")
		if err := (osFS{}).ReplaceFile(filepath.Join(dir, "top"), []byte(filepath.Base(top))); err != nil {
			return err
		}
		at("top.durable")
		return nil
	})
}

func openKilled(ctx context.Context, dir string, at func(string)) (*Chain, error) {
	top, err := os.ReadFile(filepath.Join(dir, "top"))
	if err != nil {
		return nil, err
	}
	o := fixedWorld().options()
	o.at, o.zone, o.piece, o.Live = at, 4*UnitSize, 8, filepath.Join(dir, "live")
	return OpenChain(ctx, filepath.Join(dir, string(top)), o)
}

// unflushed writes what the disk has when it is killed, with the model of before or
// without.
func unflushed(write func(p []byte, off int64) error, model []byte) error {
	r := rand.New(rand.NewPCG(51, 52))
	for range 40 {
		off := r.Int64N(chainKillSize/SectorSize) * SectorSize
		b := randomBytes(r.Uint64(), min(chainKillSize-off, (1+r.Int64N(20))*SectorSize))
		if model != nil {
			copy(model[off:], b)
		}
		if err := write(b, off); err != nil {
			return err
		}
	}
	return nil
}

// TestChainKillChild is the process that is killed, at the n-th persistence step.
func TestChainKillChild(t *testing.T) {
	args := strings.Split(os.Getenv("VDISK_CHAIN_KILL"), " ")
	if len(args) != 3 {
		t.Skip("only as a child of TestChainKill")
	}
	op, _ := strconv.Atoi(args[0])
	n, _ := strconv.Atoi(args[1])
	written := false
	err := chainKill(t.Context(), op, args[2], func(string) {
		if !written {
			return
		}
		if n--; n == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}, func(d *Chain) error {
		err := unflushed(d.WriteAt, nil)
		written = true
		if n == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return err
	})
	t.Fatalf("not killed: %v", err)
}

// Killed at each persistence step, with writes that nobody has flushed, the chain
// opens and has them all, and running the operation again finishes it.
func TestChainKill(t *testing.T) {
	if testing.Short() {
		t.Skip("one process does one thing after the other here; see build/test.sh")
	}
	w := fixedWorld()
	before := t.TempDir()
	path := filepath.Join(before, "vm.vmdk")
	create(t, path, w.spec(chainKillSize, kekA))
	if err := os.WriteFile(filepath.Join(before, "top"), []byte("vm.vmdk"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := openKilled(t.Context(), before, nil)
	if err != nil {
		t.Fatal(err)
	}
	model := make([]byte, chainKillSize)
	for i := range 3 {
		scribble(t, d, model, rand.New(rand.NewPCG(3, uint64(i))), 20)
		if i < 2 {
			path = takeSnapshot(t, d)
		}
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeChain(t, d)
	if err := os.WriteFile(filepath.Join(before, "top"), []byte(filepath.Base(path)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unflushed(func([]byte, int64) error { return nil }, model); err != nil {
		t.Fatal(err)
	}
	for op, k := range chainKillOps {
		after := t.TempDir()
		copyFolder(t, before, after)
		points := []string{"the writes"}
		written := false
		err := chainKill(t.Context(), op, after, func(p string) {
			if written {
				points = append(points, p)
			}
		}, func(d *Chain) error { written = true; return unflushed(d.WriteAt, nil) })
		if err != nil {
			t.Fatal(err)
		}
		times := map[string]int{}
		for n, point := range points {
			if times[point]++; times[point] > 2 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d %s", k.name, n, point), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				copyFolder(t, before, dir)
				cmd := exec.Command(os.Args[0], "-test.run=^TestChainKillChild$")
				cmd.Env = append(os.Environ(), fmt.Sprintf("VDISK_CHAIN_KILL=%d %d %s", op, n, dir))
				out, _ := cmd.CombinedOutput()
				if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
					t.Fatalf("the child was not killed: %s", out)
				}
				d, err := openKilled(t.Context(), dir, nil)
				if err != nil {
					t.Fatalf("opening after the kill: %v", err)
				}
				compare(t, d, model)
				closeChain(t, d)
				if err := chainKill(t.Context(), op, dir, func(string) {}, func(*Chain) error { return nil }); err != nil {
					t.Fatalf("again: %v", err)
				}
				if d, err = openKilled(t.Context(), dir, nil); err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				compare(t, d, model)
				if !k.done(len(d.links), d.Size()) {
					t.Errorf("%d links", len(d.links))
				}
			})
		}
	}
}
