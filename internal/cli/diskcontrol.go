package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"mortise/internal/vdisk"
)

// The control socket of a running serve takes one request on a connection, a line of
// JSON, and answers with lines of JSON: progress, and at last a result. What the
// connection asked for stops, on a durable boundary, when the connection ends. The
// socket is its owner's only, who could read the disk and its keys anyway; no key goes
// through it, but the names of key files and servers, which serve reads itself.

// maxControl bounds a request and an answer, in bytes.
const maxControl = 64 << 10

type controlRequest struct {
	Disk     string          `json:"disk"` // absolute: a request for another disk is refused
	Convert  *convertRequest `json:"convert,omitempty"`
	Snapshot bool            `json:"snapshot,omitempty"`
	Merge    string          `json:"merge,omitempty"` // a link, with its parent
}

type controlAnswer struct {
	Progress *vdisk.Progress `json:"progress,omitempty"`
	Done     bool            `json:"done,omitempty"`
	Top      string          `json:"top,omitempty"` // descriptor of the top link, with Done
	Error    string          `json:"error,omitempty"`
}

// A diskJob is an open disk that is served, and what is done to it meanwhile.
type diskJob struct {
	path     string
	volume   volume
	ring     *keyring
	log      *slog.Logger
	readOnly bool
	flags    *diskFlags
}

func (j *diskJob) pace(limit int64) {
	if limit > 0 {
		j.volume.SetPace(vdisk.Pace{Limit: limit})
	}
}

// background does what serve was asked for with --convert.
func (j *diskJob) background(ctx context.Context, s *streams, r convertRequest) {
	p, report := s.diskProgress(string(r.Kind) + " " + filepath.Base(j.path))
	err := convertVolume(ctx, j.volume, j.ring, r, report)
	p.end(err == nil)
	switch {
	case ctx.Err() != nil && err != nil:
		j.log.Info("the conversion stopped on a durable boundary", "disk", j.path, "resume", "serve --convert resume")
	case err != nil:
		j.log.Error("the conversion failed; the disk works as it is", "disk", j.path, "error", err)
	}
}

// listen answers on the control socket until ctx ends.
func (j *diskJob) listen(ctx context.Context, l net.Listener) {
	var running sync.WaitGroup
	defer running.Wait()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // its file goes with it
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil {
				j.log.Error("the control socket ended", "error", err)
			}
			return
		}
		running.Go(func() {
			defer c.Close()
			if err := j.answer(ctx, c); err != nil && ctx.Err() == nil {
				j.log.Warn("a client of the control socket left", "error", err)
			}
		})
	}
}

func (j *diskJob) answer(ctx context.Context, c net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second)) // a unix socket takes it
	in := json.NewDecoder(io.LimitReader(c, maxControl))
	in.DisallowUnknownFields()
	out := json.NewEncoder(c)
	var r controlRequest
	if err := in.Decode(&r); err != nil {
		return out.Encode(controlAnswer{Error: "not a request: " + err.Error()})
	}
	_ = c.SetReadDeadline(time.Time{})
	go func() { // the client's end is the only thing that still comes
		_, _ = io.Copy(io.Discard, c)
		cancel()
	}()
	err := j.do(ctx, r, func(p vdisk.Progress) {
		_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if out.Encode(controlAnswer{Progress: &p}) != nil {
			cancel()
		}
	})
	if err != nil {
		return out.Encode(controlAnswer{Error: err.Error()})
	}
	return out.Encode(controlAnswer{Done: true, Top: j.volume.Info().Path})
}

func (j *diskJob) do(ctx context.Context, r controlRequest, report func(vdisk.Progress)) error {
	mine, err := os.Stat(j.volume.Info().Extent)
	if err != nil {
		return err
	}
	top, err := topOf(r.Disk)
	if err != nil {
		return err
	}
	i, err := vdisk.Describe(top)
	if err != nil {
		return err
	}
	if theirs, err := os.Stat(i.Extent); err != nil || !os.SameFile(mine, theirs) {
		return fmt.Errorf("this socket is of %s, and the request is for %s", j.path, r.Disk)
	}
	if j.readOnly {
		return fmt.Errorf("%s is served with --read-only: it cannot be changed", j.path)
	}
	switch chain, ok := j.volume.(*vdisk.Chain); {
	case r.Snapshot && ok:
		_, err := chain.Snapshot(ctx, vdisk.LinkSpec{})
		return err
	case r.Merge != "" && ok:
		return chain.Consolidate(ctx, vdisk.MergeSpec{Link: filepath.Base(r.Merge), Commit: func(string) error { return nil }})
	case r.Convert == nil:
		return errors.New("the request asks for nothing that this version knows")
	}
	if _, err := parseConversion(string(r.Convert.Kind)); err != nil {
		return err
	}
	j.log.Info("asked on the control socket", "disk", j.path, "kind", string(r.Convert.Kind))
	return convertVolume(ctx, j.volume, j.ring, *r.Convert, report)
}

// askServed has the serve behind a control socket do something to its disk.
func (s *streams) askServed(ctx context.Context, path, socket string, r controlRequest, report func(vdisk.Progress)) (a controlAnswer, err error) {
	if r.Disk, err = filepath.Abs(path); err != nil {
		return a, err
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return a, fmt.Errorf("--socket: %w; is mortise disk serve running? It names its control socket", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { // half of it: the answer, that it has stopped, still comes
		_ = c.(*net.UnixConn).CloseWrite()
	})
	defer stop()
	if err := json.NewEncoder(c).Encode(r); err != nil {
		return a, err
	}
	in := json.NewDecoder(c)
	for {
		a = controlAnswer{}
		if err := in.Decode(&a); err != nil {
			return a, fmt.Errorf("the serve behind %s ended in the middle: %w; what it did is durable, go on when it is back", socket, err)
		}
		switch {
		case a.Progress != nil:
			if report != nil {
				report(*a.Progress)
			}
		case a.Done:
			return a, nil
		case ctx.Err() != nil:
			return a, ctx.Err()
		default:
			return a, errors.New(a.Error)
		}
	}
}

// absolute makes names of files such that another process finds them.
func (k *diskKeys) absolute() (err error) {
	for i := range k.Files {
		if k.Files[i], err = filepath.Abs(k.Files[i]); err != nil {
			return err
		}
	}
	for _, f := range []*string{&k.Cert, &k.Key, &k.CA, &k.NewFile} {
		if *f != "" {
			if *f, err = filepath.Abs(*f); err != nil {
				return err
			}
		}
	}
	return nil
}
