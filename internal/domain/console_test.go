package domain

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// line is QEMU's end of a console.
func line(t *testing.T) (*Console, *net.UnixListener) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c")
	c := OpenConsole(path, slog.New(slog.DiscardHandler)) // before QEMU listens
	t.Cleanup(c.Close)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return c, l
}

func accept(t *testing.T, l *net.UnixListener) net.Conn {
	t.Helper()
	l.SetDeadline(time.Now().Add(10 * time.Second))
	q, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q
}

func attach(t *testing.T, c *Console) io.ReadWriteCloser {
	t.Helper()
	s, err := c.Attach()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	buf := make([]byte, len(want))
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != want {
		t.Fatalf("read %q, %v; want %q", buf, err, want)
	}
}

func TestConsoleFanOut(t *testing.T) {
	c, l := line(t)
	q := accept(t, l)
	io.WriteString(q, "boot\n")
	a, b := attach(t, c), attach(t, c)
	expect(t, a, "boot\n")
	expect(t, b, "boot\n")
	io.WriteString(q, "login:")
	expect(t, a, "login:")
	expect(t, b, "login:")
	// Both write, whole.
	for _, s := range []io.Writer{a, b} {
		if _, err := io.WriteString(s, "x\n"); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, q, "x\nx\n")
	// A late stream sees the past; closing one ends its waiting reader only.
	late := attach(t, c)
	expect(t, late, "boot\nlogin:")
	ended := make(chan error, 1)
	go func() { _, err := a.Read(make([]byte, 1)); ended <- err }()
	a.Close()
	if err := <-ended; err != io.EOF {
		t.Fatalf("closed stream: %v", err)
	}
	if _, err := a.Write([]byte("x")); !errors.Is(err, ErrClosed) {
		t.Fatalf("write to a closed stream: %v", err)
	}
	// QEMU restarts; the same streams go on.
	q.Close()
	q = accept(t, l)
	io.WriteString(q, "again")
	expect(t, late, "again")
	expect(t, b, "again")
	// The end: what is left is read, then EOF.
	io.WriteString(q, "bye")
	third := attach(t, c)
	expect(t, third, "boot\nlogin:againbye")
	c.Close()
	if rest, err := io.ReadAll(b); err != nil || string(rest) != "bye" {
		t.Fatalf("at the end: %q, %v", rest, err)
	}
	if _, err := c.Attach(); !errors.Is(err, ErrClosed) {
		t.Fatalf("attach to a closed console: %v", err)
	}
}

func TestConsoleSlowReader(t *testing.T) {
	c, l := line(t)
	q := accept(t, l)
	slow := attach(t, c)
	io.WriteString(q, "start")
	expect(t, slow, "start")
	text := strings.Repeat("0123456789abcdef", 3*ringSize/16) // more than the ring holds
	io.WriteString(q, text+"END")
	fast := attach(t, c)
	seen := readUntil(t, fast, "END")
	if !strings.HasSuffix(text+"END", string(seen[len(seen)-ringSize/2:])) {
		t.Error("the reader that keeps up sees something else")
	}
	seen = readUntil(t, slow, "END")
	note := fmt.Sprintf("\r\n[%d bytes of the console were lost]\r\n", len(text)+3-ringSize)
	if !bytes.HasPrefix(seen, []byte(note)) || string(seen[len(note):]) != (text + "END")[len(text)+3-ringSize:] {
		t.Errorf("the slow reader sees %d bytes beginning %q; want %q", len(seen), seen[:60], note)
	}
}

func readUntil(t *testing.T, r io.Reader, end string) (all []byte) {
	t.Helper()
	buf := make([]byte, 1000)
	for !bytes.HasSuffix(all, []byte(end)) {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, buf[:n]...)
	}
	return all
}
