package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"mortise/internal/keysafe"
	"mortise/internal/nbd"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

const (
	convertTurns = 3
	// liveSeconds is one run of fio beside conversions, long enough for several.
	liveSeconds = 4
)

// A subject is a disk that is converted to and fro under ever new keys.
type subject struct {
	*vdisk.Chain
	extent string
	keks   keysafe.KEKSet
	keys   int
}

// benchConvert measures conversions: of a cold disk against a straight copy of
// its file with O_DIRECT by dd, and what is left to a guest meanwhile against
// what it has without.
func benchConvert(ctx context.Context) error {
	for _, tool := range []string{"fio", "dd"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: install fio and coreutils", err)
		}
	}
	dir, err := os.MkdirTemp("", "mortise-bench-") // not tmpfs: a real file system
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d, err := newSubject(ctx, dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.cold(ctx, dir); err != nil {
		return err
	}
	return d.live(ctx, dir)
}

func newSubject(ctx context.Context, dir string) (*subject, error) {
	s := &subject{extent: filepath.Join(dir, "vm-flat.vmdk"), keks: keysafe.KEKSet{}}
	path, vm := filepath.Join(dir, "vm.vmdk"), uuid.New()
	if err := vdisk.Create(ctx, path, vdisk.Spec{Size: nbdSize}); err != nil {
		return nil, err
	}
	noise := filepath.Join(dir, "noise")
	if err := writeNoise(noise); err != nil {
		return nil, err
	}
	// Whole, without a hole: a conversion passes over holes.
	if err := quietly(ctx, "dd", "if="+noise, "of="+s.extent, "bs=4M", "conv=notrunc,fsync"); err != nil {
		return nil, err
	}
	if err := os.Remove(noise); err != nil {
		return nil, err
	}
	var err error
	s.Chain, err = vdisk.OpenChain(ctx, path, vdisk.Options{VM: vm, KEKs: s.keks})
	return s, err
}

// target makes a KEK and asks for a conversion to it.
func (s *subject) target(kind vdisk.Conversion) (vdisk.Target, error) {
	t := vdisk.Target{Kind: kind}
	if kind == vdisk.Decrypting {
		return t, nil
	}
	kek, err := secret.Random(nil, 32)
	if err != nil {
		return t, err
	}
	s.keys++
	t.Key = keysafe.KeyID{Provider: "bench", Key: fmt.Sprint(s.keys)}
	s.keks[t.Key] = kek
	return t, nil
}

func (s *subject) convert(ctx context.Context, kind vdisk.Conversion) error {
	t, err := s.target(kind)
	if err != nil {
		return err
	}
	return s.Convert(ctx, t, nil)
}

// cold converts what is not in the page cache.
func (s *subject) cold(ctx context.Context, dir string) error {
	names := []string{"copy", "encrypt", "recrypt", "decrypt"}
	rates, cpus := map[string][]float64{}, map[string][]float64{}
	for range convertTurns {
		for i, kind := range []vdisk.Conversion{vdisk.NotConverting, vdisk.Encrypting, vdisk.Recrypting, vdisk.Decrypting} {
			if err := chill(s.extent); err != nil {
				return err
			}
			cpu, err := ownCPU()
			if err != nil {
				return err
			}
			began := time.Now()
			if kind == vdisk.NotConverting {
				out := filepath.Join(dir, "copy")
				err = quietly(ctx, "dd", "if="+s.extent, "of="+out, "bs=4M", "iflag=direct", "oflag=direct", "conv=fsync")
				defer os.Remove(out)
			} else {
				err = s.convert(ctx, kind)
			}
			if err != nil {
				return err
			}
			took := time.Since(began).Seconds()
			after, err := ownCPU()
			if err != nil {
				return err
			}
			rates[names[i]] = append(rates[names[i]], nbdSize/took/(1<<20))
			cpus[names[i]] = append(cpus[names[i]], (after - cpu).Seconds())
		}
	}
	for _, name := range names[1:] {
		figure{name: "convert/cold-" + name, ours: median(rates[name]), peer: median(rates["copy"]), unit: "MiB/s", peerName: "dd-direct", target: 0.8}.print()
		fmt.Printf("BENCH convert/cold-%s-cpu ours=%.2fcpu-s/GiB\n", name, median(cpus[name]))
	}
	return nil
}

// live loads the disk over NBD, alone and while it is re-keyed over and over.
func (s *subject) live(ctx context.Context, dir string) error {
	ctx, stop := context.WithCancel(ctx)
	srv := nbd.New(nbd.Options{})
	if _, err := srv.Add("", diskDevice{s.Chain}, false); err != nil {
		stop()
		return err
	}
	socket := filepath.Join(dir, "live.sock")
	l, err := nbd.Listen(socket)
	if err != nil {
		stop()
		return err
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	defer func() { stop(); <-served }()
	if err := s.convert(ctx, vdisk.Encrypting); err != nil {
		return err
	}
	target := &nbdServer{uri: "nbd+unix:///?socket=" + socket}
	for _, load := range nbdLoads() {
		if load.fio == nil {
			continue
		}
		load.fio = append(load.fio, fmt.Sprintf("--runtime=%ds", liveSeconds))
		var alone, beside, rates []float64
		for range convertTurns {
			_, r, err := load.runFio(ctx, target)
			if err != nil {
				return err
			}
			alone = append(alone, r/load.scale)
			r, conversion, err := s.beside(ctx, load, target)
			if err != nil {
				return err
			}
			beside, rates = append(beside, r/load.scale), append(rates, conversion)
		}
		figure{name: "convert/guest-" + load.name, ours: median(beside), peer: median(alone), unit: load.unit, peerName: "without", target: 0.7}.print()
		fmt.Printf("BENCH convert/beside-%s ours=%.0fMiB/s\n", load.name, median(rates))
	}
	return nil
}

// beside runs fio while the disk is re-keyed, and returns bytes a second of
// both, the conversion's in MiB.
func (s *subject) beside(ctx context.Context, load nbdLoad, target *nbdServer) (rate, conversion float64, err error) {
	run, enough := context.WithCancel(ctx)
	ended := make(chan error, 1)
	var done int64
	began := time.Now()
	go func() {
		for {
			var last int64
			t, err := s.target(vdisk.Recrypting)
			if err == nil {
				err = s.Convert(run, t, func(p vdisk.Progress) { done += p.Done - last; last = p.Done })
			}
			if err != nil {
				if errors.Is(err, context.Canceled) {
					err = nil
				}
				ended <- err
				return
			}
		}
	}()
	_, rate, err = load.runFio(ctx, target)
	enough()
	err = errors.Join(err, <-ended)
	conversion = float64(done) / time.Since(began).Seconds() / (1 << 20)
	return rate, conversion, errors.Join(err, s.Resume(ctx, nil)) // the next run begins on a whole disk
}

// chill writes a file back and drops it from the page cache.
func chill(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// ownCPU is the processor time of this process and its ended children.
func ownCPU() (time.Duration, error) {
	var sum int64
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += u.Utime.Nano() + u.Stime.Nano()
	}
	return time.Duration(sum), nil
}
