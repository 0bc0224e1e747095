package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The tools that others wrote: libnbd's and QEMU's.

func tool(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is missing: install libnbd-bin, python3-libnbd, fio and qemu-utils", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return out
}

func uri(path, export string) string { return "nbd+unix:///" + export + "?socket=" + path }

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sparseDisk has noise in every eighth MiB.
func sparseDisk(t *testing.T, size int) *memDisk {
	noise := randomDisk(t, 1<<20).data
	d := newMemDisk(t, size)
	for off := 0; off < size; off += 8 << 20 {
		copy(d.data[off:], noise)
		d.mark(int64(off), 1<<20, true)
	}
	return d
}

func TestNbdinfo(t *testing.T) {
	s, _, path := serve(t, sparseDisk(t, 64<<20), Options{}, false)
	if _, err := s.Add("locked", newMemDisk(t, 1<<20), true); err != nil {
		t.Fatal(err)
	}
	var info struct {
		Protocol   string
		TLS        bool
		Structured bool
		Exports    []map[string]any
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--json", "--list", uri(path, "")), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || info.TLS || !info.Structured || len(info.Exports) != 2 {
		t.Fatalf("%+v", info)
	}
	for key, want := range map[string]any{
		"export-name": "disk", "export-size": float64(64 << 20), "is_read_only": false,
		"can_df": true, "can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true, "can_trim": true, "can_zero": true, "can_cache": false,
		"block_size_minimum": 512.0, "block_size_preferred": 4096.0, "block_size_maximum": float64(maxPayload),
	} {
		if got := info.Exports[0][key]; got != want {
			t.Errorf("%s is %v, want %v", key, got, want)
		}
	}
	if fmt.Sprint(info.Exports[0]["contexts"]) != "[base:allocation]" {
		t.Errorf("contexts: %v", info.Exports[0]["contexts"])
	}
	if e := info.Exports[1]; e["export-name"] != "locked" || e["is_read_only"] != true || e["can_trim"] != false {
		t.Errorf("%v", e)
	}

	var list []struct {
		Offset, Length int64
		Type           Status
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--map", "--json", uri(path, "disk")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 16 || list[0].Type != 0 || list[0].Length != 1<<20 || list[15].Type != Hole|Zero || list[15].Offset != 57<<20 || list[15].Length != 7<<20 {
		t.Errorf("map: %+v", list)
	}
}

func TestNbdcopy(t *testing.T) {
	disk := sparseDisk(t, 32<<20)
	_, _, path := serve(t, disk, Options{}, false)
	for _, args := range [][]string{
		{"--connections=1", "--synchronous"},
		{"--connections=4", "--threads=2", "--requests=32"},
		{"--no-extents", "--connections=2"},
		{"--request-size=33554432", "--connections=1"},
	} {
		out := filepath.Join(t.TempDir(), "copy")
		tool(t, "nbdcopy", append(args, uri(path, "disk"), out)...)
		if !bytes.Equal(readFile(t, out), disk.all()) {
			t.Errorf("%v: the copy differs", args)
		}
		target := randomDisk(t, 32<<20)
		_, _, targetPath := serve(t, target, Options{}, false)
		tool(t, "nbdcopy", append(args, "--flush", out, uri(targetPath, "disk"))...)
		if !bytes.Equal(target.all(), disk.all()) {
			t.Errorf("%v: the copy back differs", args)
		}
		if !target.durable() {
			t.Errorf("%v: the copy is not durable", args)
		}
	}
	// From one of our servers to another.
	target := randomDisk(t, 32<<20)
	_, _, targetPath := serve(t, target, Options{}, false)
	tool(t, "nbdcopy", "--connections=4", uri(path, "disk"), uri(targetPath, "disk"))
	if !bytes.Equal(target.all(), disk.all()) {
		t.Error("the copy from server to server differs")
	}
	if target.isAllocated(2<<8) || !target.isAllocated(0) {
		t.Error("the copy is not sparse")
	}
}

func TestQemuImg(t *testing.T) {
	disk := sparseDisk(t, 64<<20)
	_, _, path := serve(t, disk, Options{}, false)
	qcow := filepath.Join(t.TempDir(), "x.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(path, "disk"), qcow)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri(path, "disk"), qcow)
	if fi, err := os.Stat(qcow); err != nil || fi.Size() > 12<<20 {
		t.Errorf("8 MiB of data became %v bytes, %v", fi.Size(), err)
	}
	target := randomDisk(t, 64<<20)
	_, _, targetPath := serve(t, target, Options{}, false)
	tool(t, "qemu-img", "convert", "-n", "-W", "-t", "none", "-f", "qcow2", "-O", "raw", qcow, uri(targetPath, "disk"))
	if !bytes.Equal(target.all(), disk.all()) || !target.durable() {
		t.Error("the disk that qemu-img wrote differs, or is not durable")
	}
	var list []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri(path, "disk")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 16 || list[0].Zero || !list[1].Zero || list[1].Start != 1<<20 || list[1].Length != 7<<20 {
		t.Errorf("map: %+v", list)
	}
}

func TestQemuIO(t *testing.T) {
	disk := newMemDisk(t, 16<<20)
	_, _, path := serve(t, disk, Options{}, false)
	out := string(tool(t, "qemu-io", "-t", "none", "-f", "raw",
		"-c", "write -P 0x11 0 1M",
		"-c", "write -P 0x22 512 512", // a guest's 512-byte sector
		"-c", "write -P 0x33 -f 1M 64k", // FUA
		"-c", "write -z -u 2M 1M",
		"-c", "write -z 4M 64k",
		"-c", "discard 512k 512k",
		"-c", "writev -P 0x44 8M 4k 8k 4k",
		"-c", "aio_write -P 0x55 9M 2M",
		"-c", "aio_read -P 0x22 512 512",
		"-c", "aio_flush",
		"-c", "read -P 0x11 0 512", "-c", "read -P 0x22 512 512", "-c", "read -P 0x11 1k 511k", "-c", "read -P 0 512k 512k",
		"-c", "read -P 0x33 1M 64k", "-c", "read -P 0x55 9M 2M", "-c", "read -P 0x44 8M 16k", "-c", "flush", uri(path, "disk")))
	if strings.Contains(out, "ailed") || strings.Count(out, "ops;") < 15 {
		t.Errorf("qemu-io:\n%s", out)
	}
	if disk.flushes.Load() < 2 || !disk.durable() {
		t.Error("flush or FUA did not arrive")
	}
}

func TestFio(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	disk := newMemDisk(t, 32<<20)
	_, _, path := serve(t, disk, Options{}, false)
	tool(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri(path, "disk"), "--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned=0", "--blockalign=512",
		"--iodepth=32", "--size=32M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--serialize_overlap=1")
}

// A QEMU that lost its server waits for the next one and sends its requests
// again: the guest notices a delay.
func TestQemuReconnects(t *testing.T) {
	qemuIO, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Skip("qemu-io is missing: install qemu-utils")
	}
	disk := newMemDisk(t, 4<<20)
	path := filepath.Join(t.TempDir(), "s")
	start := func() (stop func()) {
		s := New(Options{})
		if _, err := s.Add("disk", disk, false); err != nil {
			t.Fatal(err)
		}
		l, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- s.Serve(context.Background(), l) }()
		return func() {
			if err := s.Shutdown(soon(t)); err != nil {
				t.Error(err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	stop := start()
	cmd := exec.Command(qemuIO, "--image-opts", "driver=nbd,server.type=unix,server.path="+path+",export=disk,reconnect-delay=30")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	outPipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(40*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	out := bufio.NewReader(outPipe)
	var said strings.Builder
	expect := func(what string) {
		t.Helper()
		var line strings.Builder
		for !strings.Contains(line.String(), what) {
			b, err := out.ReadByte()
			if err != nil {
				t.Fatalf("qemu-io ended before %q: %v\n%s", what, err, said.String()+line.String())
			}
			line.WriteByte(b)
		}
		said.WriteString(line.String())
	}
	for i := range 4 {
		fmt.Fprintf(in, "write -P %d %dk 64k\n", i+1, i*64)
		expect(fmt.Sprintf("wrote 65536/65536 bytes at offset %d\n", i<<16))
		if i%2 == 1 {
			stop()
			stop = start()
			continue
		}
		stop()
		fmt.Fprintf(in, "aio_read -P %d %dk 64k\nflush\n", i+1, i*64) // sent while nobody is there
		time.Sleep(100 * time.Millisecond)
		stop = start()
	}
	fmt.Fprint(in, "aio_flush\nread -P 1 0 64k\nread -P 4 192k 64k\nquit\n")
	_ = in.Close()
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("qemu-io: %v", err)
	}
	if all := said.String() + string(rest); strings.Contains(all, "ailed") || strings.Contains(all, "rror") {
		t.Errorf("qemu-io:\n%s", all)
	}
	for i := range 4 {
		if !bytes.Equal(disk.at(uint64(i)<<16, 1<<16), bytes.Repeat([]byte{byte(i + 1)}, 1<<16)) {
			t.Errorf("write %d is not on the disk", i)
		}
	}
	stop()
}

// libnbd's shell, which speaks every part of the protocol that libnbd knows.
func TestNbdsh(t *testing.T) {
	disk := newMemDisk(t, 8<<20)
	_, exp, path := serve(t, disk, Options{}, false)
	for _, name := range []string{"b1", "b2"} {
		if err := exp.Track(newBitmapFor(t, name, disk)); err != nil {
			t.Fatal(err)
		}
	}
	script := `
import errno
for c in ["base:allocation", "qemu:dirty-bitmap:b1", "qemu:dirty-bitmap:b2"]:
    h.add_meta_context(c)
h.connect_uri(URI)
assert h.get_protocol() == "newstyle-fixed" and h.get_structured_replies_negotiated()
for f in ["can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn", "can_df"]:
    assert getattr(h, f)(), f
assert not h.is_read_only() and not h.can_cache()
assert h.get_size() == 8 << 20 and h.get_block_size(nbd.SIZE_MINIMUM) == 512
seen = {}
def status(context, offset, entries, err):
    seen.setdefault(context, []).extend(entries)
    return 0
h.pwrite(b"x" * 65536, 1 << 20, nbd.CMD_FLAG_FUA)
h.zero(65536, 2 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
h.zero(65536, 3 << 20)
h.trim(65536, 1 << 20)
h.flush()
h.block_status(8 << 20, 0, status)
dirty = [1 << 20, 0, 65536, 1, 983040, 0, 65536, 1, 983040, 0, 65536, 1, 4 * (1 << 20) + 983040, 0]
assert seen["qemu:dirty-bitmap:b1"] == dirty, seen
assert seen["qemu:dirty-bitmap:b2"] == dirty, seen
assert seen["base:allocation"] == [2 << 20, 3, 65536, 0, 6 * (1 << 20) - 65536, 3], seen
chunks = []
def chunk(buf, offset, status, err):
    chunks.append((offset, len(buf), status))
    return 0
h.pread_structured(1 << 20, 2 << 20, chunk)
assert sum(n for _, n, _ in chunks) == 1 << 20 and all(s == nbd.READ_HOLE for _, _, s in chunks), chunks
h.set_strict_mode(0)
for what, want in [
    (lambda: h.pread(512, 8 << 20), errno.EINVAL),
    (lambda: h.pread(100, 0), errno.EINVAL),
    (lambda: h.pwrite(b"x" * 512, 8 << 20), errno.ENOSPC),
    (lambda: h.flush(1 << 3), errno.EINVAL),
]:
    try:
        what()
        raise SystemExit("no error")
    except nbd.Error as ex:
        assert ex.errnum == want, ex
assert h.pread(512, 0) == b"\0" * 512
h.shutdown()
print("conforms")
`
	// nbdsh itself takes whichever python3 comes first.
	const python = "/usr/bin/python3"
	if err := exec.Command(python, "-c", "import nbd").Run(); err != nil {
		t.Skip("libnbd's Python module is missing: install python3-libnbd")
	}
	out := tool(t, python, "-m", "nbd", "-c", "URI = '"+uri(path, "disk")+"'", "-c", script)
	if !strings.Contains(string(out), "conforms") {
		t.Errorf("nbdsh said %q", out)
	}
}
