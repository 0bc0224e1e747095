package vdisk

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mortise/internal/keysafe"
)

// A limit is kept on average, a paused conversion waits for ever, and a change of
// either is heeded at once.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		p.set(Pace{Limit: 1 << 20})
		for range 60 {
			if err := p.hold(ctx, 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took < 59*time.Second || took > 61*time.Second {
			t.Errorf("60 MiB at 1 MiB/s took %v", took)
		}

		held := make(chan error)
		p.set(Pace{Limit: 1})
		go func() { held <- p.hold(ctx, 1<<30) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		p.set(Pace{Paused: true})
		time.Sleep(time.Hour)
		select {
		case <-held:
			t.Fatal("a paused conversion goes on")
		default:
		}
		p.set(Pace{})
		if err := <-held; err != nil {
			t.Error(err)
		}

		p.set(Pace{Paused: true})
		go func() { held <- p.hold(ctx, 1) }()
		cancel()
		if err := <-held; !errors.Is(err, context.Canceled) {
			t.Errorf("a paused conversion that is stopped: %v", err)
		}
	})
}

// A paused conversion rests at a boundary that is durable, and requests anywhere
// go on.
func TestPausedConversion(t *testing.T) {
	w := newWorld(t)
	const size = 4 << 20
	path := diskPath(t)
	create(t, path, w.spec(size, keysafe.KeyID{}))
	o := w.options()
	o.zone = 16 * UnitSize
	d := open(t, path, o)
	model := make([]byte, size)
	r := rand.New(rand.NewPCG(31, 32))
	for off := int64(0); off < size; off += 1 << 20 {
		copy(model[off:], randomBytes(uint64(off), 1<<20))
		if err := d.WriteAt(append([]byte(nil), model[off:off+1<<20]...), off); err != nil {
			t.Fatal(err)
		}
	}
	paused := make(chan struct{})
	var zones atomic.Int64
	ended := make(chan error, 1)
	go func() {
		ended <- d.Convert(t.Context(), Target{Kind: Encrypting, Key: kekA}, func(Progress) {
			if zones.Add(1) == 10 {
				d.SetPace(Pace{Paused: true})
				close(paused)
			}
		})
	}()
	<-paused
	scribble(t, d, model, r, 200)
	compare(t, d, model)
	time.Sleep(50 * time.Millisecond)
	at := zones.Load()
	scribble(t, d, model, r, 200)
	time.Sleep(50 * time.Millisecond)
	if i := d.Info(); zones.Load() != at || i.Boundary == 0 || i.Boundary == size || d.state.cur.Load().hotLen != 0 {
		t.Errorf("paused after %d zones, now %d: %+v", at, zones.Load(), i)
	}
	d.SetPace(Pace{})
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	compare(t, d, model)
}

// What storage returns is compared with what it was given.
func TestConversionIsVerified(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	var lose atomic.Bool
	o := w.options()
	o.fs = lossyFS{lose: &lose}
	d := open(t, path, o)
	if err := d.WriteAt(randomBytes(1, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	lose.Store(true)
	err := d.Convert(t.Context(), Target{Kind: Recrypting, Key: kekB}, nil)
	if !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "other bytes at") {
		t.Fatalf("storage that loses a write: %v", err)
	}
	if err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, ErrFailed) {
		t.Errorf("a read after it: %v", err)
	}
}

// lossyFS acknowledges writes of extents and does not make them.
type lossyFS struct {
	osFS
	lose *atomic.Bool
}

func (l lossyFS) Open(name string, flag int) (file, error) {
	f, err := l.osFS.Open(name, flag)
	if err != nil || !isFlat(name) {
		return f, err
	}
	return &lossyFile{f, l.lose}, nil
}

type lossyFile struct {
	file
	lose *atomic.Bool
}

func (f *lossyFile) WriteAt(p []byte, off int64) (int, error) {
	if f.lose.Load() {
		return len(p), nil
	}
	return f.file.WriteAt(p, off)
}

func (f *lossyFile) WriteDurably(p []byte, off int64) error {
	_, err := f.WriteAt(p, off)
	return err
}

func TestEstimate(t *testing.T) {
	w := newWorld(t)
	const size = 256 << 20
	path := diskPath(t)
	create(t, path, w.spec(size, keysafe.KeyID{}))
	d := open(t, path, w.options())
	if e, err := d.Estimate(t.Context()); err != nil || e != (Estimate{}) {
		t.Errorf("of an empty disk: %+v, %v", e, err)
	}
	for _, off := range []int64{0, 100 << 20, 255 << 20} {
		if err := d.WriteAt(randomBytes(uint64(off), 1<<20), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	e, err := d.Estimate(t.Context())
	if err != nil || e.Bytes < 3<<20 || e.Bytes > 4<<20 || e.Rate <= 0 || e.Took <= 0 || e.Busy <= e.Took {
		t.Errorf("%+v, %v", e, err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); err != nil || len(left) != 2 {
		t.Errorf("the folder has %v, %v", left, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Estimate(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
}
