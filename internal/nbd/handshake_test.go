package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestOptions(t *testing.T) {
	_, _, path := serve(t, newMemDisk(t, 1<<20), Options{}, false)
	tests := []struct {
		name       string
		structured bool
		opt        option
		data       []byte
		kind       uint32
		infos      int
	}{
		{"list", false, optList, nil, repAck, 1},
		{"list with data", false, optList, []byte{1}, repErrInvalid, 0},
		{"info", false, optInfo, infoRequest("disk"), repAck, 2},
		{"info asking for everything", false, optInfo, infoRequest("disk", 0, 1, 2, 3, 99), repAck, 2},
		{"info of an unknown export", false, optInfo, infoRequest("nothing"), repErrUnknown, 0},
		{"go to an unknown export", false, optGo, infoRequest("nothing"), repErrUnknown, 0},
		{"info without data", false, optInfo, nil, repErrInvalid, 0},
		{"info with a long name", false, optInfo, infoRequest(strings.Repeat("x", maxName+1)), repErrInvalid, 0},
		{"info with a name beyond its data", false, optInfo, be32(5), repErrInvalid, 0},
		{"info with too few requests", false, optInfo, append(wireString("disk"), be16(2)...), repErrInvalid, 0},
		{"info with bytes to spare", false, optInfo, append(infoRequest("disk"), 0), repErrInvalid, 0},
		{"TLS on a unix socket", false, optStartTLS, nil, repErrPolicy, 0},
		{"peek", false, 4, []byte("disk"), repErrUnsup, 0},
		{"extended headers", true, 11, nil, repErrUnsup, 0},
		{"unknown", false, 0xfffffff0, bytes.Repeat([]byte{7}, maxOptionData), repErrUnsup, 0},
		{"structured replies with data", false, optStructuredReply, []byte{0}, repErrInvalid, 0},
		{"contexts before structured replies", false, optListMetaContext, metaQuery("disk"), repErrInvalid, 0},
		{"list all contexts", true, optListMetaContext, metaQuery("disk"), repAck, 1},
		{"list base contexts", true, optListMetaContext, metaQuery("disk", "base:"), repAck, 1},
		{"list one context", true, optListMetaContext, metaQuery("disk", metaAllocation), repAck, 1},
		{"list foreign contexts", true, optListMetaContext, metaQuery("disk", "qemu:dirty-bitmap:x"), repAck, 0},
		{"contexts of an unknown export", true, optListMetaContext, metaQuery("nothing", metaAllocation), repErrUnknown, 0},
		{"set among others", true, optSetMetaContext, metaQuery("disk", "x-y:z", metaAllocation), repAck, 1},
		{"set nothing", true, optSetMetaContext, metaQuery("disk"), repAck, 0},
		{"set a name space", true, optSetMetaContext, metaQuery("disk", "base:"), repAck, 0},
		{"set with a lying count", true, optSetMetaContext, join(wireString("disk"), be32(1<<31)), repErrInvalid, 0},
		{"set with bytes to spare", true, optSetMetaContext, append(metaQuery("disk"), 0), repErrInvalid, 0},
		{"set without data", true, optSetMetaContext, nil, repErrInvalid, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, path)
			if tt.structured {
				c.structuredReplies()
			}
			r := c.option(tt.opt, tt.data)
			if r.kind != tt.kind || len(r.infos) != tt.infos {
				t.Errorf("reply %#x with %d infos, want %#x with %d", r.kind, len(r.infos), tt.kind, tt.infos)
			}
			c.transmit("disk") // the connection is still good
			c.mustRead(0, 512)
		})
	}
}

func TestExportFacts(t *testing.T) {
	s := New(Options{})
	for name, readOnly := range map[string]bool{"b": false, "": false, "a-ro": true} {
		if _, err := s.Add(name, newMemDisk(t, 3<<20), readOnly); err != nil {
			t.Fatal(err)
		}
	}
	path := listenAndServe(t, s)

	c := dial(t, path)
	var names []string
	for _, b := range c.option(optList, nil).infos {
		names = append(names, string(b[4:]))
	}
	if !slices.Equal(names, []string{"", "a-ro", "b"}) {
		t.Errorf("LIST: %q", names)
	}
	c.structuredReplies()
	r := c.option(optInfo, infoRequest(""))
	want := join(be16(infoExport), be64(3<<20), be16(flagHasFlags|flagSendFlush|flagSendFUA|flagSendTrim|flagSendWriteZeroes|flagSendDF|flagCanMultiConn|flagSendFastZero))
	if !bytes.Equal(r.infos[0], want) {
		t.Errorf("export info %x, want %x", r.infos[0], want)
	}
	if want := join(be16(infoBlockSize), be32(512), be32(4096), be32(32<<20)); !bytes.Equal(r.infos[1], want) {
		t.Errorf("block sizes %x, want %x", r.infos[1], want)
	}
	r = c.option(optInfo, infoRequest("a-ro"))
	if flags := binary.BigEndian.Uint16(r.infos[0][10:]); flags != flagHasFlags|flagReadOnly|flagSendFlush|flagSendFUA|flagSendDF|flagCanMultiConn {
		t.Errorf("flags of a read-only export: %#x", flags)
	}
}

// The oldest way in: EXPORT_NAME, with and without its zeros.
func TestExportName(t *testing.T) {
	disk := randomDisk(t, 1<<20)
	_, _, path := serve(t, disk, Options{}, false)
	for _, clientFlags := range []uint32{1, 3, 0} {
		nc, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		c := &client{t: t, c: nc}
		c.read(18)
		c.write(be32(clientFlags))
		// The first request follows at once, though a client should wait.
		c.write(append(optionBytes(optExportName, []byte("disk")), header{cmd: cmdRead, cookie: 9, off: 512, n: 1024}.bytes()...))
		if size := binary.BigEndian.Uint64(c.read(8)); size != 1<<20 {
			t.Errorf("size %d", size)
		}
		c.read(2)
		if clientFlags&2 == 0 && !isZero(c.read(124)) {
			t.Error("no zeros")
		}
		if r := c.receive(1024); r.cookie != 9 || !bytes.Equal(r.data, disk.at(512, 1024)) {
			t.Errorf("flags %d: wrong data", clientFlags)
		}
	}
	c := dial(t, path)
	c.write(optionBytes(optExportName, []byte("nothing")))
	c.closed()
}

func TestAbort(t *testing.T) {
	_, _, path := serve(t, newMemDisk(t, 512), Options{}, false)
	c := dial(t, path)
	if r := c.option(optAbort, nil); r.kind != repAck {
		t.Errorf("ABORT: %+v", r)
	}
	c.closed()
}

// Whoever breaks the rules loses the connection, and nobody else does.
func TestHandshakeGarbage(t *testing.T) {
	_, _, path := serve(t, newMemDisk(t, 1<<20), Options{HandshakeTimeout: 2 * time.Second}, false)
	good := connect(t, path, true)
	tests := map[string][]byte{
		"unknown client flags":    be32(0xff),
		"wrong option magic":      join(be32(3), be64(magicInit), be32(7), be32(0)),
		"option of 4 GiB":         join(be32(3), be64(magicOption), be32(7), be32(1<<32-1)),
		"option just too long":    join(be32(3), be64(magicOption), be32(7), be32(maxOptionData+1)),
		"half an option":          join(be32(3), be64(magicOption)),
		"nothing at all":          {},
		"a web client":            []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"options without an end":  join(be32(3), bytes.Repeat(optionBytes(5, nil), maxOptions)),
		"export name of 64 KiB":   join(be32(3), optionBytes(optExportName, make([]byte, maxOptionData))),
		"export name with a zero": join(be32(3), optionBytes(optExportName, []byte("disk\x00"))),
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = c.Write(b) // the server may hang up before it has read all
			if _, err := io.Copy(io.Discard, c); timedOut(err) {
				t.Errorf("the server keeps the connection: %v", err)
			}
		})
	}
	good.mustRead(0, 512)
}

func timedOut(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func TestTooManyConnections(t *testing.T) {
	_, _, path := serve(t, newMemDisk(t, 512), Options{MaxConns: 2}, false)
	a, b := connect(t, path, false), connect(t, path, false)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	(&client{t: t, c: c}).closed()
	a.mustRead(0, 512)
	b.send(1, cmdDisconnect, 0, 0, 0, nil)
	b.closed()
	for range 100 { // the server notices in its own time
		if c, err := net.Dial("unix", path); err == nil {
			n, _ := c.Read(make([]byte, 18))
			c.Close()
			if n == 18 {
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("no place after a client has left")
}

// A metadata context counts only for the export it was chosen for.
func TestMetaContextOfAnotherExport(t *testing.T) {
	s, _, path := serve(t, newMemDisk(t, 1<<20), Options{}, false)
	if _, err := s.Add("other", newMemDisk(t, 1<<20), false); err != nil {
		t.Fatal(err)
	}
	c := dial(t, path)
	c.structuredReplies()
	c.option(optSetMetaContext, metaQuery("other", metaAllocation))
	c.transmit("disk")
	if r := c.do(cmdBlockStatus, 0, 0, 512, nil); r.err != eINVAL {
		t.Errorf("block status without a context: %+v", r)
	}
}

func TestAddRefuses(t *testing.T) {
	s := New(Options{})
	for name, dev := range map[string]Device{
		"no size": newMemDisk(t, 0), "half a sector": newMemDisk(t, 700), strings.Repeat("x", maxName+1): newMemDisk(t, 512),
	} {
		if _, err := s.Add(name, dev, false); err == nil {
			t.Errorf("%.20q was added", name)
		}
	}
	if _, err := s.Add("a", newMemDisk(t, 512), false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add("a", newMemDisk(t, 512), false); err == nil {
		t.Error("a name was added twice")
	}
}
