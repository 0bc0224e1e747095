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

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// What is killed: each is one operation on the disk that the one named before
// has left.
var killOps = []struct {
	name string
	run  func(ctx context.Context, path string, w world, at func(string)) error
	done func(i Info) bool
}{
	{"create", creating(false), func(i Info) bool { return i.Encrypted && i.Epoch == 1 && !i.Thick && i.Allocated < killSize/2 }},
	{"shallow", func(ctx context.Context, path string, w world, at func(string)) error {
		return withDisk(ctx, path, w, at, func(d *Disk) error { return d.ShallowRecrypt(ctx, kekB) })
	}, func(i Info) bool { return len(i.Keys) == 1 && i.Keys[0] == kekB }},
	{"recrypt cancelled", cancelling(Target{Kind: Recrypting, Key: kekA, Epoch: 2}), func(i Info) bool { return i.Epoch == 1 && i.Keys[0] == kekB }},
	{"recrypt", converting(Target{Kind: Recrypting, Key: kekA, Epoch: 2}), func(i Info) bool { return i.Epoch == 2 && i.Keys[0] == kekA }},
	{"decrypt cancelled", cancelling(Target{Kind: Decrypting}), func(i Info) bool { return i.Epoch == 2 && i.Keys[0] == kekA }},
	{"decrypt", converting(Target{Kind: Decrypting}), func(i Info) bool { return !i.Encrypted }},
	{"encrypt cancelled", cancelling(Target{Kind: Encrypting, Key: kekA, Epoch: 3}), func(i Info) bool { return !i.Encrypted }},
	{"encrypt", converting(Target{Kind: Encrypting, Key: kekB, Epoch: 3}), func(i Info) bool { return i.Epoch == 3 && i.Keys[0] == kekB }},
	{"create thick", creating(true), func(i Info) bool { return i.Encrypted && i.Thick && i.Allocated >= killSize }},
}

const (
	killSize = 24*UnitSize - 3*SectorSize
	killZone = 4 * UnitSize
)

// creating makes a disk where there is none: what a killed one has left is taken
// over, also by one that is not so thick.
func creating(thick bool) func(context.Context, string, world, func(string)) error {
	return func(ctx context.Context, path string, w world, at func(string)) error {
		s := w.spec(killSize, kekA)
		s.at, s.Thick = at, thick
		return Create(ctx, path, s)
	}
}

func converting(t Target) func(context.Context, string, world, func(string)) error {
	return func(ctx context.Context, path string, w world, at func(string)) error {
		return withDisk(ctx, path, w, at, func(d *Disk) error { return d.Convert(ctx, t, nil) })
	}
}

// cancelling stops a conversion after its third zone and runs it back.
func cancelling(t Target) func(context.Context, string, world, func(string)) error {
	return func(ctx context.Context, path string, w world, at func(string)) error {
		return withDisk(ctx, path, w, at, func(d *Disk) error {
			if d.Info().Conversion != NotConverting { // that was killed
				return d.Cancel(ctx, nil)
			}
			some, stop := context.WithCancel(ctx)
			defer stop()
			zones := 0
			err := d.Convert(some, t, func(Progress) {
				if zones++; zones == 4 {
					stop()
				}
			})
			if err != nil && some.Err() == nil {
				return err
			}
			return d.Cancel(ctx, nil)
		})
	}
}

func withDisk(ctx context.Context, path string, w world, at func(string), f func(*Disk) error) error {
	o := w.options()
	o.at, o.zone = at, killZone
	d, err := Open(ctx, path, o)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(d)
}

// fixedWorld has the same keys in every process.
func fixedWorld() world {
	w := world{vm: uuid.MustParse("564d0102-0304-0506-0708-090a0b0c0d0e"), keks: keysafe.KEKSet{}}
	for i, id := range []keysafe.KeyID{kekA, kekB} {
		k, err := secret.Take(randomBytes(uint64(i)+40, keysafe.KEKSize))
		if err != nil {
			panic(err)
		}
		w.keks[id] = k
	}
	return w
}

// TestKillChild is the process that is killed: it runs one operation and kills
// itself at the n-th persistence step.
func TestKillChild(t *testing.T) {
	args := strings.Split(os.Getenv("VDISK_KILL"), " ")
	if len(args) != 3 {
		t.Skip("only as a child of TestKill")
	}
	op, _ := strconv.Atoi(args[0])
	n, _ := strconv.Atoi(args[1])
	err := killOps[op].run(t.Context(), args[2], fixedWorld(), func(string) {
		if n--; n == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	t.Fatalf("not killed: %v", err)
}

// Killed at each persistence step of each operation, the disk opens, every sector
// is right, and running the operation again finishes it.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("one process does one thing after the other here; see build/test.sh")
	}
	w := fixedWorld()
	folder := t.TempDir()
	model := make([]byte, killSize)
	for op, k := range killOps {
		before := filepath.Join(folder, k.name+".before")
		after := filepath.Join(folder, k.name+".after")
		fresh := strings.HasPrefix(k.name, "create")
		if fresh {
			mkdir(t, before)
		} else {
			copyFolder(t, filepath.Join(folder, killOps[op-1].name+".after"), before)
		}
		copyFolder(t, before, after)
		var points []string
		if err := k.run(t.Context(), filepath.Join(after, "vm.vmdk"), w, func(p string) { points = append(points, p) }); err != nil {
			t.Fatal(err)
		}
		if op == 0 {
			d := open(t, filepath.Join(after, "vm.vmdk"), w.options())
			scribble(t, d, model, rand.New(rand.NewPCG(3, 4)), 30)
			d.Close()
		}
		for n, point := range points {
			t.Run(fmt.Sprintf("%s/%d %s", k.name, n+1, point), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				copyFolder(t, before, dir)
				path := filepath.Join(dir, "vm.vmdk")
				cmd := exec.Command(os.Args[0], "-test.run=^TestKillChild$")
				cmd.Env = append(os.Environ(), fmt.Sprintf("VDISK_KILL=%d %d %s", op, n+1, path))
				out, _ := cmd.CombinedOutput()
				if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
					t.Fatalf("the child was not killed: %s", out)
				}
				if fresh {
					if _, err := os.Stat(path); err == nil { // the descriptor is last: the disk is whole
						compare(t, open(t, path, w.options()), make([]byte, killSize))
						return
					}
				} else if err := withDisk(t.Context(), path, w, nil, func(d *Disk) error { compare(t, d, model); return nil }); err != nil {
					t.Fatalf("opening after the kill: %v", err)
				}
				if err := k.run(t.Context(), path, w, nil); err != nil {
					t.Fatalf("again: %v", err)
				}
				info, err := Describe(path)
				if err != nil || !k.done(info) || info.Conversion != NotConverting {
					t.Fatalf("at the end: %+v, %v", info, err)
				}
				if !fresh {
					compare(t, open(t, path, w.options()), model)
				}
			})
		}
	}
}

func mkdir(t *testing.T, dir string) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

// copyFolder keeps holes: a copy without them has other data to encrypt.
func copyFolder(t *testing.T, from, to string) {
	mkdir(t, to)
	if out, err := exec.Command("cp", "-r", "--sparse=auto", from+"/.", to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
