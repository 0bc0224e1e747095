package audit

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"mortise/internal/atomicfile"
)

// A Sink is another place for anchors, off the member if it is to be of use
// against who is root there.
type Sink interface {
	// Anchor returns once the place has the head.
	Anchor(ctx context.Context, h Head) error
	// String names the place.
	String() string
}

// ParseSink makes a sink of what an administrator writes:
//
//	/mnt/elsewhere/anchors.jsonl       a file, a line for each head
//	tcp://loghost:514                  syslog (RFC 5424, framed as in RFC 6587)
//	tls://loghost:6514?ca=/etc/ca.pem  the same in TLS (RFC 5425)
func ParseSink(text string) (Sink, error) {
	if len(text) > 0 && text[0] == '/' {
		return &fileSink{path: text}, nil
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "tcp" && u.Scheme != "tls" || u.Port() == "" || u.Hostname() == "" || u.Path != "" {
		return nil, fmt.Errorf("audit: %q is no place for anchors: write /path/of/a/file, tcp://host:514 or tls://host:6514?ca=/path/of/its/ca.pem", text)
	}
	s := &syslogSink{name: text, address: u.Host}
	if u.Scheme == "tls" {
		s.tls = &tls.Config{ServerName: u.Hostname(), MinVersion: tls.VersionTLS12}
		if path := u.Query().Get("ca"); path != "" {
			text, err := atomicfile.Read(path, 1<<20)
			if err != nil {
				return nil, fmt.Errorf("audit: reading the CA of %s: %w", u.Host, err)
			}
			s.tls.RootCAs = x509.NewCertPool()
			if !s.tls.RootCAs.AppendCertsFromPEM(text) {
				return nil, fmt.Errorf("audit: %s holds no PEM certificate", path)
			}
		}
	}
	if s.host, err = os.Hostname(); err != nil {
		s.host = "-"
	}
	return s, nil
}

// maxAnchorFile is where a file of anchors is renamed to FILE.old, so that it
// does not grow for ever: some days of a busy server.
const maxAnchorFile = 64 << 20

type fileSink struct{ path string }

func (s *fileSink) String() string { return s.path }

func (s *fileSink) Anchor(_ context.Context, h Head) error {
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if st, err := os.Stat(s.path); err == nil && st.Size() > maxAnchorFile {
		if err := os.Rename(s.path, s.path+".old"); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Sync(), f.Close())
}

// syslogTimeout bounds connecting and sending.
const syslogTimeout = 5 * time.Second

type syslogSink struct {
	name, address, host string
	tls                 *tls.Config // nil: plain TCP
	conn                net.Conn    // nil: not connected
}

func (s *syslogSink) String() string { return s.name }

// Anchor is for one goroutine at a time.
func (s *syslogSink) Anchor(ctx context.Context, h Head) error {
	body, err := json.Marshal(h)
	if err != nil {
		return err
	}
	// Facility 13 (log audit), severity 6 (informational).
	message := fmt.Appendf(nil, "<110>1 %s %s mortise-kms %d audit-head - %s", h.Time.UTC().Format("2006-01-02T15:04:05.000000Z"), s.host, os.Getpid(), body)
	frame := append(strconv.AppendInt(nil, int64(len(message)), 10), ' ')
	frame = append(frame, message...)
	// A connection that the other side has closed is found by a write that
	// fails; the write before that may be lost, and the next head makes up for it.
	for fresh := false; ; fresh = true {
		if s.conn == nil {
			if s.conn, err = s.dial(ctx); err != nil {
				s.conn = nil
				return err
			}
			fresh = true
		}
		s.conn.SetWriteDeadline(time.Now().Add(syslogTimeout))
		if _, err = s.conn.Write(frame); err == nil {
			return nil
		}
		s.conn.Close()
		s.conn = nil
		if fresh {
			return err
		}
	}
}

func (s *syslogSink) dial(ctx context.Context) (net.Conn, error) {
	d := &net.Dialer{Timeout: syslogTimeout, KeepAlive: 15 * time.Second}
	if s.tls == nil {
		return d.DialContext(ctx, "tcp", s.address)
	}
	return (&tls.Dialer{NetDialer: d, Config: s.tls}).DialContext(ctx, "tcp", s.address)
}

// An Anchorer brings heads to one sink, in the background: only the newest
// counts, so a sink that is slow or away costs nothing but its protection.
type Anchorer struct {
	sink   Sink
	log    *slog.Logger
	newest atomic.Pointer[Head]
	there  atomic.Uint64
	since  atomic.Int64 // when it began to fail, Unix seconds; 0: it works
	wake   chan struct{}
	stop   context.CancelFunc
	done   sync.WaitGroup
}

// NewAnchorer begins to serve a sink.
func NewAnchorer(sink Sink, log *slog.Logger) *Anchorer {
	ctx, stop := context.WithCancel(context.Background())
	a := &Anchorer{sink: sink, log: log, wake: make(chan struct{}, 1), stop: stop}
	a.done.Go(func() { a.run(ctx) })
	return a
}

// Anchor takes a head; it does not wait.
func (a *Anchorer) Anchor(h Head) {
	a.newest.Store(&h)
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Status tells up to which entry the sink has anchors, and since when it fails;
// the zero time if it does not.
func (a *Anchorer) Status() (name string, there uint64, failing time.Time) {
	if s := a.since.Load(); s != 0 {
		failing = time.Unix(s, 0)
	}
	return a.sink.String(), a.there.Load(), failing
}

// Close gives up what is not there yet.
func (a *Anchorer) Close() {
	a.stop()
	a.done.Wait()
}

// sinkRetry is how long a sink that failed is left alone.
const sinkRetry = 5 * time.Second

func (a *Anchorer) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
		}
		h := a.newest.Load()
		if h == nil || h.Sequence == a.there.Load() {
			continue
		}
		err := a.sink.Anchor(ctx, *h)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			if a.since.Swap(0) != 0 {
				a.log.Info("audit: anchors are kept again", "sink", a.sink.String())
			}
			a.there.Store(h.Sequence)
			continue
		}
		if a.since.CompareAndSwap(0, time.Now().Unix()) {
			a.log.Error("audit: anchors cannot be kept; it is tried again", "sink", a.sink.String(), "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(sinkRetry):
		}
		select { // what came meanwhile, or the same again
		case a.wake <- struct{}{}:
		default:
		}
	}
}
