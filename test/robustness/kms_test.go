// Package robustness does to the built program what goes wrong on machines: it
// fills disks, kills processes, and changes certificates under load.
package robustness

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/test/kmsproc"
)

var programs, _ = os.MkdirTemp("", "mtsb")

var built = sync.OnceValues(func() (string, error) { return kmsproc.Build(programs) })

func TestMain(m *testing.M) {
	code := m.Run()
	os.RemoveAll(programs)
	os.Exit(code)
}

// shortDir is a folder whose socket paths fit; t.TempDir's may not.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mtsr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start runs a key server with its state in stateDir ("" for anywhere) and lets
// an administrator in.
func start(t *testing.T, stateDir string) (*kmsproc.Server, kmsproc.Client) {
	t.Helper()
	bin, err := built()
	if err != nil {
		t.Fatal(err)
	}
	s, err := kmsproc.New(bin, shortDir(t), stateDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			for line := range strings.Lines(s.Log()) {
				if !strings.Contains(line, "object created") {
					t.Log(strings.TrimSpace(line))
				}
			}
		}
	})
	c, err := s.Client(t.Context(), "admin", "administrator")
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func dial(t *testing.T, s *kmsproc.Server, c kmsproc.Client) *tls.Conn {
	t.Helper()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", s.Address, s.TLS(c))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// ask sends operations of KMIP 1.4 in one message.
func ask(c net.Conn, list ...kmip.OperationPayload) ([]kmip.ResponseBatchItem, error) {
	request := kmip.NewRequestMessage(kmip.V1_4, list...)
	raw, err := kmsproc.RoundTrip(c, ttlv.MarshalTTLV(&request))
	if err != nil {
		return nil, err
	}
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(raw, &m); err != nil {
		return nil, err
	}
	if len(m.BatchItem) == 0 {
		return nil, fmt.Errorf("an empty answer: %+v", m)
	}
	return m.BatchItem, nil
}

// one sends one operation, which must succeed.
func one[Answer kmip.OperationPayload](c net.Conn, p kmip.OperationPayload) (a Answer, err error) {
	items, err := ask(c, p)
	if err == nil {
		err = items[0].Err()
	}
	if err != nil {
		return a, err
	}
	return items[0].ResponsePayload.(Answer), nil
}

func must[Answer kmip.OperationPayload](t *testing.T, c net.Conn, p kmip.OperationPayload) Answer {
	t.Helper()
	a, err := one[Answer](c, p)
	if err != nil {
		t.Fatalf("%T: %v", p, err)
	}
	return a
}

func create(more ...kmip.Attribute) *payloads.CreateRequestPayload {
	return &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: append([]kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
	}, more...)}}
}

func material(t *testing.T, c net.Conn, id string) []byte {
	t.Helper()
	got := must[*payloads.GetResponsePayload](t, c, &payloads.GetRequestPayload{UniqueIdentifier: id})
	block := got.Object.(*kmip.SymmetricKey).KeyBlock
	b, err := block.GetBytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestHangup: SIGHUP brings a new certificate in, under load and without an
// error on connections that are open.
func TestHangup(t *testing.T) {
	s, c := start(t, "")
	old := dial(t, s, c)
	id := must[*payloads.CreateResponsePayload](t, old, create()).UniqueIdentifier
	was := s.TLS(c)
	if err := s.Renew(); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := tls.Dial("tcp", s.Address, s.TLS(c))
		if err == nil {
			material(t, conn, id)
			conn.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the new certificate is not shown: %v", err)
		}
	}
	if conn, err := tls.Dial("tcp", s.Address, was); err == nil {
		conn.Close()
		t.Error("the old certificate is shown still")
	}
	material(t, old, id)
}

// TestTerminate: on SIGTERM requests under way are finished, and the process ends
// in time and with success.
func TestTerminate(t *testing.T) {
	s, c := start(t, "")
	busy, idle := dial(t, s, c), dial(t, s, c)
	must[*payloads.CreateResponsePayload](t, idle, create())
	var many []kmip.OperationPayload
	for range 300 {
		many = append(many, create())
	}
	type answer struct {
		items []kmip.ResponseBatchItem
		err   error
	}
	answered := make(chan answer, 1)
	go func() {
		items, err := ask(busy, many...)
		answered <- answer{items, err}
	}()
	time.Sleep(20 * time.Millisecond)
	begin := time.Now()
	if err := s.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	a := <-answered
	if a.err != nil || len(a.items) != len(many) || a.items[len(many)-1].Err() != nil {
		t.Errorf("the request under way: %d items, %v", len(a.items), a.err)
	}
	select {
	case <-s.Ended():
	case <-time.After(15 * time.Second):
		t.Error("the process does not end")
	}
	if err := s.Stop(); err != nil {
		t.Errorf("the process ended with %v", err)
	}
	t.Logf("ended after %v", time.Since(begin).Round(time.Millisecond))
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, s, c)
	for _, it := range a.items {
		material(t, conn, it.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier)
	}
}

// TestFullDisk: the disk of the state folder is full. Nothing is acknowledged
// that is not kept, the process goes on and serves what it has, and when there is
// room it makes keys again by itself.
func TestFullDisk(t *testing.T) {
	disk := filepath.Join(shortDir(t), "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	// In memory, because that can be full without harm to the machine: durability
	// is not what this is about.
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=420m,mode=0700"); err != nil {
		t.Skipf("a small disk cannot be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s, c := start(t, filepath.Join(disk, "state"))
	conn := dial(t, s, c)
	keys := map[string][]byte{}
	more := func() error {
		made, err := one[*payloads.CreateResponsePayload](conn, create(kmip.Attribute{AttributeName: "x-ballast", AttributeValue: strings.Repeat("b", 4<<10)}))
		if err == nil {
			keys[made.UniqueIdentifier] = material(t, conn, made.UniqueIdentifier)
		}
		return err
	}
	for range 20 {
		if err := more(); err != nil {
			t.Fatal(err)
		}
	}
	ballast := filepath.Join(disk, "ballast")
	for _, rest := range []int64{80 << 20, 0} { // little room, and none at all
		fill(t, ballast, rest)
		var err error
		for end := time.Now().Add(20 * time.Second); err == nil; err = more() {
			if time.Now().After(end) {
				t.Fatal("the disk is full, and keys are made without end")
			}
		}
		if !strings.Contains(err.Error(), "full") {
			t.Errorf("a key is refused with %q, which does not say why", err)
		}
	}
	time.Sleep(time.Second) // in which etcd does what it does by itself
	select {
	case <-s.Ended():
		t.Fatal("the process has ended")
	default:
	}
	fresh := dial(t, s, c)
	for id, want := range keys {
		if !bytes.Equal(material(t, fresh, id), want) {
			t.Error("a key is another one")
		}
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := more()
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("there is room, and no key can be made: %v", err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Errorf("the process ended with %v", err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn = dial(t, s, c)
	for id, want := range keys {
		if !bytes.Equal(material(t, conn, id), want) {
			t.Error("a key is another one after a start")
		}
	}
}

// fill takes all space but rest bytes.
func fill(t *testing.T, path string, rest int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for end := time.Now().Add(10 * time.Second); ; {
		var fs syscall.Statfs_t
		if err := syscall.Fstatfs(int(f.Fd()), &fs); err != nil {
			t.Fatal(err)
		}
		n := int64(fs.Bavail)*fs.Bsize - rest
		if n <= 0 {
			return
		}
		at, err := f.Seek(0, io.SeekEnd)
		if err == nil {
			err = syscall.Fallocate(int(f.Fd()), 0, at, n)
		}
		if err != nil && time.Now().After(end) { // etcd takes space ahead, and may just now
			t.Fatalf("taking %d bytes: %v", n, err)
		}
	}
}

// dialOnce is dial with an error.
func dialOnce(s *kmsproc.Server, c kmsproc.Client) (*tls.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", s.Address, s.TLS(c))
}
