package nbd

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.sock")

	// A server that was killed leaves its file behind.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if err := os.WriteFile(path+socketSuffix, nil, 0o666); err != nil { // and died in the middle of a start once
		t.Fatal(err)
	}

	l, err := Listen(path)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("socket has mode %v, %v", fi.Mode(), err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("a served socket was taken over")
	}
	c, err := net.Dial("unix", path) // the refused start has not harmed it
	if err != nil {
		t.Fatal(err)
	}
	c.Close()

	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("files left behind: %v", left)
	}
}

// A late Close of an old server leaves its successor's socket alone.
func TestListenSuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".old"); err != nil { // keeps its inode in use
		t.Fatal(err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	old.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the successor's socket is gone: %v", err)
	}
	c.Close()
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"a file":        file,
		"a folder":      dir,
		"nothing":       "",
		"abstract name": "@abstract",
		"long path":     filepath.Join(dir, strings.Repeat("x", 120)),
		"no folder":     filepath.Join(dir, "missing", "s"),
	} {
		if l, err := Listen(path); err == nil {
			l.Close()
			t.Errorf("%s: listening on %q", name, path)
		} else if path != "" && !strings.Contains(err.Error(), path) {
			t.Errorf("%s: the error does not name the path: %v", name, err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Error("the file was harmed")
	}
}
