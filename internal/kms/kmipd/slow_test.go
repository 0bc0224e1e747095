package kmipd

import (
	"bufio"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
	"golang.org/x/sys/unix"

	"mortise/internal/pki"
)

// dripping sends what is written to it a byte at a time.
type dripping struct {
	net.Conn
	every time.Duration
}

func (d dripping) Write(b []byte) (int, error) {
	for i := range b {
		if _, err := d.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
		time.Sleep(d.every)
	}
	return len(b), nil
}

func wireOf(m kmip.RequestMessage) []byte { return ttlv.MarshalTTLV(&m) }

// TestSlowLoris: a client that is slow on purpose holds a connection no longer
// than the limits say, wherever it is slow.
func TestSlowLoris(t *testing.T) {
	t.Parallel()
	const limit = 500 * time.Millisecond
	b := serve(t, Options{HandshakeTimeout: limit, ReadTimeout: limit, WriteTimeout: limit})
	wire := wireOf(request(1, createAES(custom("x-a", strings.Repeat("long", 100)))))
	for where, behave := range map[string]func(t *testing.T) net.Conn{
		"in the handshake": func(t *testing.T) net.Conn {
			raw, err := net.Dial("tcp", b.addr)
			if err != nil {
				t.Fatal(err)
			}
			go tls.Client(dripping{raw, 20 * time.Millisecond}, b.config(b.client, tls.VersionTLS13)).Handshake()
			return raw
		},
		"in the header": func(t *testing.T) net.Conn {
			c := b.dial(t)
			go dripping{c, 200 * time.Millisecond}.Write(wire[:headerLen])
			return c
		},
		"in the body": func(t *testing.T) net.Conn {
			c := b.dial(t)
			c.Write(wire[:headerLen])
			go dripping{c, 20 * time.Millisecond}.Write(wire[headerLen:])
			return c
		},
		"between records": func(t *testing.T) net.Conn { // pieces of TLS records count as silence
			raw, err := net.Dial("tcp", b.addr)
			if err != nil {
				t.Fatal(err)
			}
			slow := &dripping{Conn: raw}
			c := tls.Client(slow, b.config(b.client, tls.VersionTLS13))
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			slow.every = 20 * time.Millisecond
			c.Write(wire[:4]) // whole, then the rest of the message in a dripping record
			go c.Write(wire[4:])
			return raw
		},
	} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			begin := time.Now()
			c := behave(t)
			defer c.Close()
			c.SetReadDeadline(time.Now().Add(15 * time.Second))
			_, err := io.Copy(io.Discard, c)
			if took := time.Since(begin); os.IsTimeout(err) || took > 6*time.Second {
				t.Errorf("the connection was held for %v: %v", took, err)
			}
		})
	}
	t.Run("in reading the answer", func(t *testing.T) {
		t.Parallel()
		raw, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.(*net.TCPConn).SetReadBuffer(4 << 10)
		c := tls.Client(raw, b.config(b.client, tls.VersionTLS13))
		var many []kmip.OperationPayload
		for range maxBatch {
			many = append(many, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionOperations, kmip.QueryFunctionObjects}})
		}
		wire := wireOf(request(4, many...))
		c.SetWriteDeadline(time.Now().Add(15 * time.Second))
		for err == nil {
			_, err = c.Write(wire)
		}
		if os.IsTimeout(err) {
			t.Error("the server waits for a client that does not read")
		}
	})
}

// TestHalfOpen: clients whose machine is gone without a word, or that close their
// side, leave no connection behind.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	b := serve(t, Options{MaxConnections: 1, HandshakeTimeout: 400 * time.Millisecond, ReadTimeout: 400 * time.Millisecond, IdleTimeout: 400 * time.Millisecond})
	wire := wireOf(request(1, createAES()))
	dial := func(t *testing.T) (*net.TCPConn, *tls.Conn) {
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			raw, err := net.Dial("tcp", b.addr)
			if err != nil {
				t.Fatal(err)
			}
			c := tls.Client(raw, b.config(b.client, tls.VersionTLS13))
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if err = c.Handshake(); err == nil {
				// In TLS 1.3 a refusal comes after the client's part.
				c.Write(wireOf(request(1, &payloads.DiscoverVersionsRequestPayload{})))
				_, _, err = receive(c)
			}
			if err == nil {
				return raw.(*net.TCPConn), c
			}
			raw.Close()
			if time.Now().After(end) {
				t.Fatalf("the one connection that may be open is never free again: %v", err)
			}
		}
	}
	for what, leave := range map[string]func(t *testing.T){
		"gone when idle":                  func(t *testing.T) { raw, _ := dial(t); vanish(t, raw) },
		"gone in the middle of a request": func(t *testing.T) { raw, c := dial(t); c.Write(wire[:50]); vanish(t, raw) },
		"gone before the answer":          func(t *testing.T) { raw, c := dial(t); c.Write(wire); vanish(t, raw) },
		"gone before the handshake": func(t *testing.T) {
			raw, c := dial(t)
			c.Close()
			raw.Close()
			time.Sleep(100 * time.Millisecond)
			silent, err := net.Dial("tcp", b.addr)
			if err != nil {
				t.Fatal(err)
			}
			vanish(t, silent.(*net.TCPConn))
		},
		"closed on one side": func(t *testing.T) { _, c := dial(t); c.CloseWrite() },
		"silent":             func(t *testing.T) { dial(t) },
	} {
		t.Run(what, func(t *testing.T) {
			leave(t)
			raw, _ := dial(t)
			raw.Close()
		})
	}
}

// vanish closes a socket as a power cut does: nothing is sent.
func vanish(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
			t.Skipf("closing without a word needs CAP_NET_ADMIN: %v", err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	c.Close()
}

const (
	idleConnections = 10_000
	idleMemory      = 40 << 10 // bytes a connection may take while it is idle
)

// TestIdleConnections: 10,000 connections at once take little memory, and the
// last is served as the first. Their clients are a process of their own.
func TestIdleConnections(t *testing.T) {
	if address := os.Getenv("KMIPD_TEST_IDLE"); address != "" {
		idleClients(t, address)
		return
	}
	if testing.Short() || raceDetector {
		t.Skip("makes 10,000 connections, and measures memory")
	}
	limit := unix.Rlimit{Cur: idleConnections + 1000, Max: idleConnections + 1000}
	var have unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &have); err != nil || have.Cur < limit.Cur {
		limit.Max = max(limit.Max, have.Max)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Skipf("%d files may not be open: %v", limit.Cur, err)
		}
	}
	b := serve(t, Options{MaxConnections: idleConnections + 10})
	dir := t.TempDir()
	if err := pki.SaveCertificates(dir+"/ca.pem", b.server); err != nil {
		t.Fatal(err)
	}
	if err := saveClient(dir+"/client.pem", b.client); err != nil {
		t.Fatal(err)
	}
	before := inUse()
	clients := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestIdleConnections$", "-test.timeout", "120s")
	clients.Env = append(os.Environ(), "KMIPD_TEST_IDLE="+b.addr, "KMIPD_TEST_DIR="+dir)
	clients.Stderr = os.Stderr
	hold, err := clients.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := clients.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := clients.Start(); err != nil {
		t.Fatal(err)
	}
	defer clients.Wait()
	defer hold.Close()
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "all are open" {
		t.Fatalf("the clients say %q", lines.Text())
	}
	took := time.Since(begin)
	each := (inUse() - before) / idleConnections
	t.Logf("%d connections in %v, %d bytes each while idle", idleConnections, took.Round(time.Millisecond), each)
	if each > idleMemory {
		t.Errorf("an idle connection takes %d bytes, want at most %d", each, idleMemory)
	}
	if id := newKey(t, b.dial(t)); id == "" {
		t.Error("one more is not served")
	}
	fmt.Fprintln(hold, "go on")
	if !lines.Scan() || lines.Text() != "all are served" {
		t.Errorf("the clients say %q", lines.Text())
	}
}

// inUse is the memory that objects and stacks take.
func inUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// idleClients opens all connections, and uses each once when it is told to.
func idleClients(t *testing.T, address string) {
	dir := os.Getenv("KMIPD_TEST_DIR")
	pair, err := tls.LoadX509KeyPair(dir+"/client.pem", dir+"/client.pem")
	if err != nil {
		t.Fatal(err)
	}
	// That the server is who it says is not what this is about.
	cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	conns := make([]*tls.Conn, idleConnections)
	each := func(f func(i int) error) {
		var group sync.WaitGroup
		for g := range 8 {
			group.Go(func() {
				for i := g; i < len(conns); i += 8 {
					if err := f(i); err != nil {
						t.Errorf("connection %d: %v", i, err)
						return
					}
				}
			})
		}
		group.Wait()
	}
	each(func(i int) (err error) {
		conns[i], err = tls.Dial("tcp", address, cfg)
		return err
	})
	if t.Failed() {
		return
	}
	fmt.Println("all are open")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return
	}
	wire := wireOf(request(1, &payloads.DiscoverVersionsRequestPayload{}))
	each(func(i int) error {
		conns[i].SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := conns[i].Write(wire); err != nil {
			return err
		}
		m, _, err := receive(conns[i])
		if err == nil && (len(m.BatchItem) != 1 || m.BatchItem[0].Err() != nil) {
			err = fmt.Errorf("answer %s", strconv.Quote(fmt.Sprint(m)))
		}
		return err
	})
	if !t.Failed() {
		fmt.Println("all are served")
	}
}

func saveClient(path string, c tls.Certificate) error {
	return pki.SaveKeyPair(path, []*x509.Certificate{c.Leaf}, c.PrivateKey.(crypto.Signer))
}
