package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// TestProgressLines: without a terminal there is a line when the stage changes
// and every few seconds, with rate and time left.
func TestProgressLines(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	p := newProgress(&out, "importing a", func() time.Time { return now })
	p.update(state{}) // nothing to tell
	p.update(state{percent: 1, stage: "reading\x1b[2J"})
	for i := range 101 {
		p.update(state{done: int64(i) << 20, total: 100 << 20, stage: "writing"})
		now = now.Add(100 * time.Millisecond)
	}
	p.end(true)
	p.update(state{done: 1, total: 2}) // too late
	p.end(false)
	want := strings.Join([]string{
		"importing a:   1%  reading[2J",
		"importing a:   0%  0 B of 100.0 MiB  writing",
		"importing a:  50%  50.0 MiB of 100.0 MiB, 10.0 MiB/s, 5s left  writing",
		"importing a: 100%  100.0 MiB of 100.0 MiB, 10.0 MiB/s, 0s left  writing",
		"importing a: 100%  100.0 MiB of 100.0 MiB, 9.9 MiB/s  done",
		"",
	}, "\n")
	if got := out.String(); got != want {
		t.Errorf("printed\n%s\nwant\n%s", got, want)
	}
}

func TestProgressFailed(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out, "x", time.Now)
	p.update(state{done: 5, total: 10})
	p.end(false)
	if strings.Contains(out.String(), "100%") || strings.Contains(out.String(), "done") {
		t.Errorf("work that failed looks done: %q", out.String())
	}
}

func TestFraction(t *testing.T) {
	for _, c := range []struct {
		s    state
		want float64
	}{{state{}, 0}, {state{percent: 50}, 0.5}, {state{percent: 250}, 1}, {state{percent: -1}, 0}, {state{done: 1, total: 4, percent: 99}, 0.25}, {state{done: 9, total: 4}, 1}} {
		if got := c.s.fraction(); got != c.want {
			t.Errorf("%+v: %v, want %v", c.s, got, c.want)
		}
	}
}

func TestMeterStartsAnew(t *testing.T) {
	var m meter
	at := time.Unix(0, 0)
	for i := range 100 {
		m.add(at.Add(time.Duration(i)*time.Second), int64(i)*1000)
	}
	if got := m.perSecond(); got != 1000 {
		t.Errorf("%v bytes a second, want 1000", got)
	}
	m.add(at.Add(101*time.Second), 5) // runs back
	if got := m.perSecond(); got != 0 {
		t.Errorf("%v bytes a second right after a new start", got)
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m1s", 2*time.Hour + 5*time.Minute: "2h5m", 1 << 62: "1000h0m",
	} {
		if got := short(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
