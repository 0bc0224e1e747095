package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"mortise/internal/keysafe"
	"mortise/internal/nbd"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

// The nbd group serves one image of 1 GiB, full of noise and in the page cache,
// with our server and its peers, each in a process of its own, and lets fio and
// nbdcopy use them in turn. Rates are medians; the processor time is the
// server's alone.
const (
	nbdSize    = 1 << 30
	nbdTurns   = 5
	nbdSeconds = 1 // one run of fio
)

// nbdServe in the environment makes this program the server to be measured:
// "memory", "plain", "encrypted" or "chain", in the folder nbdDir names.
const (
	nbdServe = "BENCH_NBD_SERVE"
	nbdDir   = "BENCH_NBD_DIR"
)

type nbdServer struct {
	name string
	cmd  *exec.Cmd
	uri  string
	file string // pattern of the files that hold the data, if any do
	full bool   // it has filled its disk itself
}

type nbdLoad struct {
	name       string
	fio        []string // nil: nbdcopy of the whole disk
	sequential bool
	write      bool
	unit       string
	scale      float64 // from bytes to unit
}

func nbdLoads() []nbdLoad {
	load := func(name, rw, bs string, depth int, unit string, scale float64, more ...string) nbdLoad {
		return nbdLoad{name: name, unit: unit, scale: scale, sequential: bs == "1m", write: strings.HasSuffix(rw, "write"),
			fio: append([]string{"--rw=" + rw, "--bs=" + bs, "--iodepth=" + strconv.Itoa(depth)}, more...)}
	}
	four := []string{"--numjobs=4", "--group_reporting"} // a connection each
	return []nbdLoad{
		load("read-1m", "read", "1m", 8, "MiB/s", 1<<20),
		load("write-1m", "write", "1m", 8, "MiB/s", 1<<20),
		load("randread-4k", "randread", "4k", 32, "/s", 4096),
		load("randwrite-4k", "randwrite", "4k", 32, "/s", 4096),
		load("randread-4k-depth1", "randread", "4k", 1, "/s", 4096),
		load("randwrite-4k-depth1", "randwrite", "4k", 1, "/s", 4096),
		load("read-1m-conns4", "read", "1m", 8, "MiB/s", 1<<20, four...),
		load("write-1m-conns4", "write", "1m", 8, "MiB/s", 1<<20, four...),
		load("randread-4k-conns4", "randread", "4k", 32, "/s", 4096, four...),
		load("randwrite-4k-conns4", "randwrite", "4k", 32, "/s", 4096, four...),
		{name: "nbdcopy", unit: "MiB/s", scale: 1 << 20, sequential: true},
	}
}

// benchNBD measures disks over NBD: ours encrypted against ours in clear, and
// both against what else serves such disks.
func benchNBD(ctx context.Context) error {
	if kind := os.Getenv(nbdServe); kind != "" {
		return serveNBD(ctx, kind, os.Getenv(nbdDir))
	}
	for _, tool := range []string{"fio", "nbdcopy", "nbdkit", "qemu-nbd", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: install fio, libnbd-bin, nbdkit and qemu-utils", err)
		}
	}
	dir, err := os.MkdirTemp("", "mortise-bench-") // not tmpfs: a real file system
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, stop := context.WithCancel(ctx)
	servers, err := startNBD(ctx, dir)
	defer func() {
		stop()
		for _, s := range servers {
			_ = s.cmd.Wait() // it was killed
		}
	}()
	if err != nil {
		return err
	}
	noise := filepath.Join(dir, "noise")
	if err := writeNoise(noise); err != nil {
		return err
	}
	for _, s := range servers {
		if !s.full {
			if err := quietly(ctx, "nbdcopy", "--connections=1", "--flush", noise, s.uri); err != nil {
				return fmt.Errorf("filling the disk of %s: %w", s.name, err)
			}
		}
		if s.file == "" {
			continue
		}
		files, err := filepath.Glob(s.file)
		if err != nil || len(files) == 0 {
			return fmt.Errorf("the files of %s: %w", s.name, errors.Join(err, os.ErrNotExist))
		}
		for _, f := range files {
			if err := recache(f); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(noise); err != nil {
		return err
	}
	for _, l := range nbdLoads() {
		rate, cpu := map[string]float64{}, map[string]float64{}
		rates, cpus := map[string][]float64{}, map[string][]float64{}
		for turn := range nbdTurns {
			for i := range servers {
				s := servers[(i+turn)%len(servers)] // nobody always goes first
				r, c, err := l.run(ctx, s)
				if err != nil {
					return fmt.Errorf("%s of %s: %w", l.name, s.name, err)
				}
				rates[s.name], cpus[s.name] = append(rates[s.name], r/l.scale), append(cpus[s.name], c)
			}
		}
		for name := range rates {
			rate[name], cpu[name] = median(rates[name]), median(cpus[name])
		}
		l.print(rate, cpu)
	}
	return nil
}

// print compares the servers. GiB/cpu-s is what a server moves in a second of
// processor time.
func (l nbdLoad) print(rate, cpu map[string]float64) {
	luks := 1.5
	if l.sequential {
		luks = 4
	}
	for _, f := range []struct {
		suffix, ours, peer string
		target             float64
	}{
		{"enc", "encrypted", "plain", 0.95},
		{"chain", "chain", "encrypted", 0.9},
		{"enc", "encrypted", "qemu-nbd-luks", luks},
		{"enc", "encrypted", "nbdkit-luks", 1.5},
		{"plain", "plain", "qemu-nbd", 1.2},
		{"memory", "memory", "nbdkit-memory", 1},
	} {
		peer := f.peer
		switch peer {
		case "plain":
			peer = "ours-plain"
		case "encrypted":
			peer = "one-link"
		}
		name := "nbd/" + l.name + "-" + f.suffix
		figure{name: name, ours: rate[f.ours], peer: rate[f.peer], unit: l.unit, peerName: peer, target: f.target}.print()
		figure{name: name + "-cpu", ours: cpu[f.ours], peer: cpu[f.peer], unit: "GiB/cpu-s", peerName: peer, target: f.target}.print()
	}
}

// run lets a client load s and returns bytes a second and GiB a second of the
// server's processor time.
func (l nbdLoad) run(ctx context.Context, s *nbdServer) (rate, perCPU float64, err error) {
	before, err := cpuTime(s.cmd.Process.Pid)
	if err != nil {
		return 0, 0, err
	}
	var n float64
	if l.fio == nil {
		n = nbdSize
		began := time.Now()
		if err := quietly(ctx, "nbdcopy", "--no-extents", "--connections=1", s.uri, "null:"); err != nil {
			return 0, 0, err
		}
		rate = n / time.Since(began).Seconds()
	} else if n, rate, err = l.runFio(ctx, s); err != nil {
		return 0, 0, err
	}
	after, err := cpuTime(s.cmd.Process.Pid)
	if err != nil {
		return 0, 0, err
	}
	if l.write { // what the kernel writes back is nobody's turn
		unix.Sync()
	}
	return rate, n / (1 << 30) / max((after-before).Seconds(), 0.01), nil
}

func (l nbdLoad) runFio(ctx context.Context, s *nbdServer) (n, rate float64, err error) {
	args := append([]string{"--name=load", "--ioengine=nbd", "--uri=" + s.uri, "--size=1g", "--time_based", "--norandommap", "--randrepeat=0",
		fmt.Sprintf("--runtime=%ds", nbdSeconds), "--output-format=json"}, l.fio...)
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, 0, err
	}
	var result struct {
		Jobs []struct {
			Read, Write struct {
				Bytes float64 `json:"io_bytes"`
				Rate  float64 `json:"bw_bytes"`
			}
		}
	}
	if err := json.Unmarshal(out[max(bytes.IndexByte(out, '{'), 0):], &result); err != nil || len(result.Jobs) != 1 {
		return 0, 0, fmt.Errorf("fio's result: %d jobs, %w", len(result.Jobs), err)
	}
	j := result.Jobs[0]
	if n, rate = j.Read.Bytes+j.Write.Bytes, j.Read.Rate+j.Write.Rate; rate == 0 {
		return 0, 0, errors.New("fio moved nothing")
	}
	return n, rate, nil
}

// cpuTime is user and system time of a process, from proc(5).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // the third field first
	if len(f) < 13 {
		return 0, fmt.Errorf("short /proc/%d/stat", pid)
	}
	user, err1 := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

func quietly(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

func writeNoise(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.Reader, nbdSize)
	return errors.Join(err, f.Close())
}

// recache brings a file into the page cache anew, in folios of one page. How big
// they are depends on how a server wrote the file, and with ext4 a 4 KiB write
// into a folio of 2 MiB takes 75 µs instead of a few: the servers should differ
// in nothing but themselves.
func recache(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	if err := errors.Join(f.Sync(), unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED), unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, f)
	return err
}

// startNBD starts every server on a disk of its own.
func startNBD(ctx context.Context, dir string) (servers []*nbdServer, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	raw, luks, kitLUKS := filepath.Join(dir, "raw"), filepath.Join(dir, "luks"), filepath.Join(dir, "kit-luks")
	pass := filepath.Join(dir, "passphrase")
	if err := os.WriteFile(pass, []byte("benchmark"), 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(raw, nbdSize); err != nil {
		return nil, err
	}
	object := "secret,id=s,file=" + pass
	for _, path := range []string{luks, kitLUKS} {
		if err := quietly(ctx, "qemu-img", "create", "-f", "luks", "--object", object, "-o", "key-secret=s,iter-time=10", path, strconv.Itoa(nbdSize)); err != nil {
			return nil, err
		}
	}
	for _, s := range []struct {
		name, file string
		args       []string
	}{
		{"encrypted", filepath.Join(dir, "encrypted-flat.vmdk"), []string{self, "nbd"}},
		{"plain", filepath.Join(dir, "plain-flat.vmdk"), []string{self, "nbd"}},
		{"chain", filepath.Join(dir, "chain*-[fd]*.vmdk"), []string{self, "nbd"}},
		{"memory", "", []string{self, "nbd"}},
		{"qemu-nbd", raw, []string{"qemu-nbd", "-t", "-e", "8", "-f", "raw", "-k", "", raw}},
		{"qemu-nbd-luks", luks, []string{"qemu-nbd", "-t", "-e", "8", "--object", object, "-k", "", "--image-opts", "driver=luks,key-secret=s,file.filename=" + luks}},
		{"nbdkit-luks", kitLUKS, []string{"nbdkit", "-f", "-U", "", "--filter=luks", "file", kitLUKS, "passphrase=+" + pass}},
		{"nbdkit-memory", "", []string{"nbdkit", "-f", "-U", "", "memory", strconv.Itoa(nbdSize)}},
	} {
		socket := filepath.Join(dir, s.name+".sock")
		for i, a := range s.args {
			if a == "" {
				s.args[i] = socket
			}
		}
		cmd := exec.CommandContext(ctx, s.args[0], s.args[1:]...)
		cmd.Env = append(os.Environ(), nbdServe+"="+s.name, nbdDir+"="+dir)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return servers, err
		}
		servers = append(servers, &nbdServer{name: s.name, cmd: cmd, uri: "nbd+unix:///?socket=" + socket, file: s.file, full: s.name == "chain"})
		if err := waitFor(ctx, socket); err != nil {
			return servers, fmt.Errorf("%s does not start: %w", s.name, err)
		}
	}
	return servers, nil
}

func waitFor(ctx context.Context, socket string) error {
	var err error
	for range 1200 { // a chain is filled before it is served
		var c net.Conn
		if c, err = net.Dial("unix", socket); err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return err
}

// serveNBD is our server in a process of its own.
func serveNBD(ctx context.Context, kind, dir string) error {
	var dev nbd.Device = memoryDisk(make([]byte, nbdSize))
	if kind != "memory" {
		disk, err := createDisk(ctx, filepath.Join(dir, kind+".vmdk"), kind != "plain")
		if err != nil {
			return err
		}
		defer disk.Close()
		if kind == "chain" {
			if err := lengthen(ctx, disk); err != nil {
				return err
			}
		}
		dev = diskDevice{disk}
	}
	s := nbd.New(nbd.Options{})
	if _, err := s.Add("", dev, false); err != nil {
		return err
	}
	l, err := nbd.Listen(filepath.Join(dir, kind+".sock"))
	if err != nil {
		return err
	}
	if err := s.Serve(ctx, l); ctx.Err() == nil {
		return err
	}
	return nil
}

// chainLinks is how long a chain is measured, and chainPiece how much of the disk in
// one place a link has: every request of 1 MiB finds sixteen links.
const (
	chainLinks = 32
	chainPiece = 64 << 10
)

// lengthen fills a disk, every link with its share.
func lengthen(ctx context.Context, disk *vdisk.Chain) error {
	piece := make([]byte, chainPiece)
	for link := range int64(chainLinks) {
		if link > 0 {
			if _, err := disk.Snapshot(ctx, vdisk.LinkSpec{}); err != nil {
				return err
			}
		}
		for off := link * chainPiece; off < nbdSize; off += chainLinks * chainPiece {
			rand.Read(piece)
			if err := disk.WriteAt(piece, off); err != nil {
				return err
			}
		}
	}
	return disk.Flush(ctx)
}

func createDisk(ctx context.Context, path string, encrypted bool) (*vdisk.Chain, error) {
	spec, opt := vdisk.Spec{Size: nbdSize}, vdisk.Options{Live: filepath.Join(filepath.Dir(path), "live")}
	if encrypted {
		kek, err := secret.Random(nil, 32)
		if err != nil {
			return nil, err
		}
		// Not wiped: snapshots wrap their keys under it, too.
		id := keysafe.KeyID{Provider: "bench", Key: "1"}
		spec.VM, spec.Key, spec.KEKs = uuid.New(), id, keysafe.KEKSet{id: kek}
		opt.VM, opt.KEKs, opt.Expect.Encrypted = spec.VM, spec.KEKs, true
	}
	if err := vdisk.Create(ctx, path, spec); err != nil {
		return nil, err
	}
	return vdisk.OpenChain(ctx, path, opt)
}

// diskDevice is a disk as the server knows devices.
type diskDevice struct{ *vdisk.Chain }

func (d diskDevice) BlockStatus(off, n int64, emit func(int64, nbd.Status) bool) error {
	return d.Chain.BlockStatus(off, n, func(n int64, s vdisk.Status) bool { return emit(n, nbd.Status(s)) })
}

// memoryDisk shows what the server does without a disk below it.
type memoryDisk []byte

func (m memoryDisk) Size() int64                            { return int64(len(m)) }
func (m memoryDisk) ReadAt(p []byte, off int64) error       { copy(p, m[off:]); return nil }
func (m memoryDisk) WriteAt(p []byte, off int64) error      { copy(m[off:], p); return nil }
func (m memoryDisk) Flush(context.Context) error            { return nil }
func (m memoryDisk) Trim(int64, int64) error                { return nil }
func (m memoryDisk) WriteZeroes(off, n int64, _ bool) error { clear(m[off : off+n]); return nil }
func (m memoryDisk) BlockStatus(_, n int64, emit func(int64, nbd.Status) bool) error {
	emit(n, 0)
	return nil
}
