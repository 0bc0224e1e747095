package cli

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// A state is how far some work is. Bytes are used where they are known
// (total > 0), else percent.
type state struct {
	percent     float64
	done, total int64 // bytes
	stage       string

	// Known better than by watching done, where holes are passed in no time; else zero.
	rate float64 // bytes per second
	left time.Duration

	limit  int64 // bytes per second; 0: none
	paused bool
}

func (s state) fraction() float64 {
	f := s.percent / 100
	if s.total > 0 {
		f = float64(s.done) / float64(s.total)
	}
	return max(0, min(f, 1))
}

// lineEvery is how often progress is told where there is no terminal.
const lineEvery = 5 * time.Second

// A progress shows work that goes on: a bar on a terminal, else a line when the
// stage changes and every few seconds. Its methods may be called concurrently.
type progress struct {
	title string
	out   io.Writer
	now   func() time.Time
	bars  *mpb.Progress // nil without a terminal
	bar   *mpb.Bar

	mu    sync.Mutex
	state state
	rate  meter
	told  time.Time // when the last line was printed
	begun time.Time
	ended bool
}

// barScale is the length of a bar in steps: bytes and percent share it.
const barScale = 1000

// progress begins to show work under a title.
func (s *streams) progress(title string) *progress {
	p := newProgress(s.err, clean(title), time.Now)
	if _, ok := terminal(s.err); ok {
		p.bars = mpb.New(mpb.WithOutput(s.err), mpb.WithRefreshRate(150*time.Millisecond))
		p.bar = p.bars.New(barScale, mpb.BarStyle().Rbound("]").Lbound("[").Filler("=").Tip(">").Padding(" "),
			mpb.BarWidth(30),
			mpb.PrependDecorators(decor.Name(p.title)),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.text()
			})))
	}
	return p
}

func newProgress(out io.Writer, title string, now func() time.Time) *progress {
	return &progress{title: title, out: out, now: now, begun: now()}
}

// update tells how far the work is.
func (p *progress) update(s state) {
	s.stage = clean(s.stage)
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	now := p.now()
	newStage := s.stage != p.state.stage || s.paused != p.state.paused
	if newStage || s.total != p.state.total {
		p.rate = meter{}
	}
	p.state = s
	if s.total > 0 {
		p.rate.add(now, s.done)
	}
	if p.bar != nil {
		p.mu.Unlock()
		p.bar.SetCurrent(min(int64(s.fraction()*barScale), barScale-1)) // only end completes it
		return
	}
	defer p.mu.Unlock()
	if s.stage == "" && s.fraction() == 0 {
		return // nothing to tell yet
	}
	if newStage || now.Sub(p.told) >= lineEvery {
		p.told = now
		fmt.Fprintf(p.out, "%s: %s\n", p.title, p.text())
	}
}

// end stops showing the work. A bar of work that succeeded is full.
func (p *progress) end(ok bool) {
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	p.ended = true
	if ok {
		p.state.percent, p.state.done, p.state.stage = 100, p.state.total, "done"
	}
	if p.bar == nil && ok && p.state.total > 0 {
		fmt.Fprintf(p.out, "%s: %s\n", p.title, p.text())
	}
	p.mu.Unlock()
	if p.bar == nil {
		return
	}
	if ok {
		p.bar.SetCurrent(barScale)
	} else {
		p.bar.Abort(false)
	}
	p.bars.Wait()
}

// text is the state in words; the caller holds mu.
func (p *progress) text() string {
	s := p.state
	t := fmt.Sprintf("%3.0f%%", 100*s.fraction())
	if s.total > 0 {
		t += fmt.Sprintf("  %s of %s", size(s.done), size(s.total))
		if p.ended {
			if d := p.now().Sub(p.begun); d >= time.Second {
				t += fmt.Sprintf(", %s/s", size(int64(float64(s.total)/d.Seconds())))
			}
		} else if s.paused {
			t += ", paused"
		} else if s.rate > 0 {
			t += fmt.Sprintf(", %s/s, %s left", size(int64(s.rate)), short(s.left))
		} else if rate := p.rate.perSecond(); rate > 0 {
			left := time.Duration(float64(s.total-s.done) / rate * float64(time.Second))
			t += fmt.Sprintf(", %s/s, %s left", size(int64(rate)), short(left))
		}
	}
	if s.total == 0 && s.paused && !p.ended {
		t += "  paused"
	}
	if s.stage != "" {
		t += "  " + s.stage
	}
	return t
}

// short prints a time left: "42s", "3m10s", "2h5m".
func short(d time.Duration) string {
	d = min(d, 1000*time.Hour).Round(time.Second)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
}

// A meter is the rate of the last seconds.
type meter struct {
	marks []mark // oldest first, about one per half second
}

type mark struct {
	at   time.Time
	done int64
}

const (
	markEvery = 500 * time.Millisecond
	maxMarks  = 20 // ten seconds
)

func (m *meter) add(at time.Time, done int64) {
	n := len(m.marks)
	if n > 0 && done < m.marks[n-1].done { // begun anew
		m.marks, n = nil, 0
	}
	if n > 1 && at.Sub(m.marks[n-2].at) < markEvery {
		m.marks[n-1] = mark{at, done}
		return
	}
	m.marks = append(m.marks, mark{at, done})
	if len(m.marks) > maxMarks {
		m.marks = m.marks[1:]
	}
}

// perSecond is the rate in bytes; 0 while it is not known.
func (m *meter) perSecond() float64 {
	if len(m.marks) < 2 {
		return 0
	}
	first, last := m.marks[0], m.marks[len(m.marks)-1]
	d := last.at.Sub(first.at).Seconds()
	if d < 0.2 {
		return 0
	}
	return float64(last.done-first.done) / d
}
