package vdisk

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"mortise/internal/xts"
)

// Progress says how far a conversion is.
type Progress struct {
	Kind        Conversion
	Back        bool          // cancelled: it runs back to the old form
	Done, Total int64         // bytes of the extent, holes included
	Rate        float64       // bytes per second rewritten lately; 0: not known yet
	Left        time.Duration // at that rate; 0: not known
}

// rateSpan is how far back a rate looks.
const rateSpan = 10 * time.Second

type progress struct {
	report func(Progress)
	state  Progress
	todo   int64 // bytes of data that are left, about
	last   time.Time
}

func (d *Disk) startProgress(report func(Progress)) *progress {
	s := d.state.cur.Load()
	p := &progress{report: report, state: Progress{Kind: d.kind, Back: s.back, Total: d.end()}, last: time.Now()}
	left := span{s.boundary, d.end()}
	if s.back {
		left = span{0, s.boundary}
	}
	if n, err := d.data(left); err == nil {
		p.todo = n
	}
	p.say(s.boundary)
	return p
}

func (z *zone) bytes() (n int64) {
	for _, sp := range z.data {
		n += sp.end - sp.off
	}
	return n
}

func (p *progress) zoneDone(z *zone, boundary int64) {
	now, n := time.Now(), z.bytes()
	took := max(now.Sub(p.last), time.Microsecond).Seconds()
	p.last, p.todo = now, max(0, p.todo-n)
	weight := 1.0
	if p.state.Rate > 0 {
		weight = 1 - math.Exp(-took/rateSpan.Seconds())
	}
	p.state.Rate += (float64(n)/took - p.state.Rate) * weight
	p.say(boundary)
}

func (p *progress) say(boundary int64) {
	if p.report == nil {
		return
	}
	p.state.Done = boundary
	if p.state.Back {
		p.state.Done = p.state.Total - boundary
	}
	if p.state.Left = 0; p.state.Rate > 0 {
		p.state.Left = time.Duration(float64(p.todo) / p.state.Rate * float64(time.Second)).Round(time.Second)
	}
	p.report(p.state)
}

// An Estimate says what a conversion of a disk would cost.
type Estimate struct {
	Bytes int64         // data to rewrite; holes stay holes
	Rate  float64       // bytes per second, by a trial on this storage; 0 without data
	Took  time.Duration // Bytes at Rate: what it takes beside an idle guest
	Busy  time.Duration // at most, beside a guest that is never idle
}

// trialPiece and trialPieces are how much a trial rewrites, in bytes.
const (
	trialPiece  = 8 << 20
	trialPieces = 8
)

// Estimate tries a conversion on copies of some pieces of the disk, in a file
// beside it that has no name, and says how long one would take. It changes nothing
// and takes about a second.
func (d *Disk) Estimate(ctx context.Context) (e Estimate, err error) {
	if e.Bytes, err = d.data(span{0, d.end()}); err != nil {
		return e, fmt.Errorf("estimating a conversion: %w", err)
	}
	if e.Bytes == 0 {
		return e, nil
	}
	name := d.ext.name + ".trial"
	f, err := d.opts.fs.Open(name, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return e, fmt.Errorf("estimating a conversion: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := d.opts.fs.Remove(name); err != nil {
		return e, fmt.Errorf("estimating a conversion: %w", err)
	}
	key, err := newDataKey(d.opts.Random)
	if err != nil {
		return e, err
	}
	defer key.wipe()
	n, took, err := d.trial(ctx, f, key.xts)
	if err != nil || n == 0 {
		return e, err
	}
	e.Rate = float64(n) / took.Seconds()
	e.Took = time.Duration(float64(e.Bytes) / e.Rate * float64(time.Second))
	e.Busy = (1 + courtesy) * e.Took
	return e, nil
}

// trial does what a zone takes with pieces spread over the disk: reads,
// encrypts, writes, syncs and reads back.
func (d *Disk) trial(ctx context.Context, f file, cipher *xts.Cipher) (n int64, took time.Duration, err error) {
	buf, again := make([]byte, trialPiece), make([]byte, trialPiece)
	step := max(roundUp(d.end()/trialPieces, UnitSize), trialPiece)
	for at := int64(0); at < d.end(); at += step {
		if err := ctx.Err(); err != nil {
			return n, took, err
		}
		data, err := d.nextData(at)
		if err != nil {
			return n, took, err
		}
		off := roundDown(data, UnitSize)
		if off >= at+step || off >= d.end() {
			continue
		}
		p := buf[:min(trialPiece, d.size-off)] // an extent in clear need not have the rest of the last unit
		d.ext.f.Forget(off, int64(len(p)))
		began := time.Now()
		if err := readFull(d.ext.f, p, off); err != nil {
			return n, took, d.ext.readError(err, off)
		}
		cipher.EncryptAt(p, p, unitOf(off), 0)
		if _, err := f.WriteAt(p, 0); err != nil {
			return n, took, fmt.Errorf("estimating a conversion: %w", err)
		}
		if err := f.Sync(); err != nil {
			return n, took, fmt.Errorf("estimating a conversion: %w", err)
		}
		f.Forget(0, int64(len(p)))
		if err := readFull(f, again[:len(p)], 0); err != nil {
			return n, took, fmt.Errorf("estimating a conversion: %w", err)
		}
		n, took = n+int64(len(p)), took+time.Since(began)
	}
	return n, took, nil
}
