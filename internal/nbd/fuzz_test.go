package nbd

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// socketPair is a connected pair of unix sockets without a name.
func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if c[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return c[0], c[1]
}

// FuzzConnection sends a server any bytes at all. Whatever comes, it must not
// panic, must keep its promises to the device, must end when the client does,
// and must not keep what it took.
func FuzzConnection(f *testing.F) {
	hello := be32(3)
	open := join(hello, optionBytes(optStructuredReply, nil), optionBytes(optSetMetaContext, metaQuery("disk", metaAllocation)), optionBytes(optGo, infoRequest("disk", 3)))
	f.Add([]byte{}, false)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), false)
	f.Add(join(hello, optionBytes(optExportName, []byte("disk")), header{cmd: cmdRead, n: 4096}.bytes(), header{cmd: cmdDisconnect}.bytes()), false)
	f.Add(join(hello, optionBytes(optList, nil), optionBytes(optInfo, infoRequest("disk")), optionBytes(optListMetaContext, metaQuery("disk")), optionBytes(optAbort, nil)), false)
	f.Add(join(hello, optionBytes(optSetMetaContext, join(wireString("disk"), be32(1<<32-1), be32(1<<31)))), false)
	f.Add(join(open,
		header{cmd: cmdWrite, cookie: 1, n: 1024, flags: cmdFlagFUA}.bytes(), bytes.Repeat([]byte{3}, 1024),
		header{cmd: cmdRead, cookie: 2, n: 1 << 20}.bytes(),
		header{cmd: cmdFlush, cookie: 3}.bytes(),
		header{cmd: cmdTrim, cookie: 4, off: 512, n: 4096}.bytes(),
		header{cmd: cmdWriteZeroes, cookie: 5, n: 1 << 20, flags: cmdFlagFastZero | cmdFlagNoHole}.bytes(),
		header{cmd: cmdBlockStatus, cookie: 6, n: 1 << 20, flags: cmdFlagReqOne}.bytes(),
		header{cmd: cmdDisconnect}.bytes()), true)
	f.Add(join(open, header{cmd: cmdRead, off: 1<<64 - 1, n: 1<<32 - 1}.bytes(), header{cmd: cmdWrite, n: 1<<32 - 1}.bytes()), false)
	f.Add(join(open, header{cmd: cmdWrite, off: 1<<20 - 512, n: 4096}.bytes(), make([]byte, 4000)), true)
	f.Add(join(open,
		header{cmd: cmdWrite, cookie: 1, off: pieceSize - 512, n: pieceSize + 1024}.bytes(), bytes.Repeat([]byte{3}, pieceSize+1024),
		header{cmd: cmdRead, cookie: 2, off: 512, n: 1<<20 - 512}.bytes(),
		header{cmd: cmdRead, cookie: 3, n: 1 << 20, flags: cmdFlagDF}.bytes()), false)
	f.Fuzz(func(t *testing.T, b []byte, readOnly bool) {
		s := New(Options{Logger: slog.New(slog.DiscardHandler), HandshakeTimeout: 5 * time.Second})
		if _, err := s.Add("disk", newMemDisk(t, 1<<20), readOnly); err != nil {
			t.Fatal(err)
		}
		ours, theirs := socketPair(t)
		s.start(context.Background(), theirs, nil)
		read := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, ours)
			read <- err
		}()
		_ = ours.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = ours.Write(b) // the server may hang up before it has read all
		_ = ours.(*net.UnixConn).CloseWrite()
		if err := <-read; timedOut(err) {
			t.Fatal("the server does not end")
		}
		ours.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Fatalf("Shutdown: %v", err)
		}
	})
}
