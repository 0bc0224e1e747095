package domain

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestProbe(t *testing.T) {
	// Under TCG the tiny guest always runs, so that a failure under KVM is KVM's.
	if err := probe(t.Context(), "qemu-system-x86_64", "tcg"); err != nil {
		t.Errorf("under TCG: %v (Debian package qemu-system-x86)", err)
	}
	for name, qemu := range map[string]string{"ends at once": "true", "fails": "false", "is missing": "/nonexistent/qemu"} {
		if err := probe(t.Context(), qemu, "kvm"); err == nil {
			t.Errorf("a QEMU that %s: no error", name)
		}
	}
}

// The embedded bytes are those of the source beside them.
func TestProbeIsItsSource(t *testing.T) {
	dir := t.TempDir()
	o, bin := filepath.Join(dir, "probe.o"), filepath.Join(dir, "probe.bin")
	for _, cmd := range [][]string{
		{"as", "-o", o, "kvmprobe/probe.asm"},
		{"ld", "-m", "elf_x86_64", "-Ttext=0", "-e", "0", "--oformat", "binary", "-o", bin, o},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s (Debian package binutils)", cmd, err, out)
		}
	}
	if got, err := os.ReadFile(bin); err != nil || !bytes.Equal(got, probeCode) {
		t.Errorf("kvmprobe/probe.bin is not what probe.asm makes (%v): assemble it again", err)
	}
}

func TestConnectNamesTheReason(t *testing.T) {
	dir := t.TempDir()
	if _, err := Connect(t.Context(), Config{Socket: filepath.Join(dir, "none")}); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "libvirt-daemon") {
		t.Errorf("no socket: %v", err)
	}
	// Something else that listens there: it talks, in another language.
	for name, says := range map[string]string{"short length": "\x00\x00\x00\x05hello", "huge length": "\xff\xff\xff\xff", "text": "220 mail ESMTP\r\n", "nothing": ""} {
		path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, says)
				io.CopyN(io.Discard, c, 8)
				if says == "" {
					c.Close()
				}
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, err := Connect(ctx, Config{Socket: path}); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		if ctx.Err() != nil {
			t.Errorf("%s: it waited for the time limit", name)
		}
		cancel()
		l.Close()
	}
}

// fakeConn gives a byte string in pieces.
type fakeConn struct {
	net.Conn
	r io.Reader
}

func (f fakeConn) Read(p []byte) (int, error) { return f.r.Read(p) }
func (f fakeConn) Close() error               { return nil }

// What passes a checkedConn is whole packets of lengths within the limits, and
// exactly the bytes that came.
func FuzzCheckedConn(f *testing.F) {
	packet := func(n int) []byte {
		p := make([]byte, n)
		binary.BigEndian.PutUint32(p, uint32(n))
		return p
	}
	f.Add(append(packet(28), packet(40)...), 3)
	f.Add(packet(28)[:20], 100)
	f.Add([]byte{0, 0, 0, 4}, 1)
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n"), 7)
	f.Fuzz(func(t *testing.T, in []byte, piece int) {
		c := newCheckedConn(fakeConn{r: bytes.NewReader(in)})
		var out []byte
		buf := make([]byte, 1+(piece&0xff))
		for {
			n, err := c.Read(buf)
			out = append(out, buf[:n]...)
			if err != nil {
				break
			}
		}
		select {
		case <-c.done:
		default:
			t.Error("the end is not told")
		}
		if !bytes.HasPrefix(in, out) {
			t.Fatalf("%x became %x", in, out)
		}
		for p := out; len(p) > 0; {
			if len(p) < 4 {
				t.Fatal("part of a length")
			}
			n := binary.BigEndian.Uint32(p)
			if n < minPacket || n > maxPacket {
				t.Fatalf("a packet of %d bytes passed", n)
			}
			p = p[min(len(p), int(n)):]
		}
	})
}
