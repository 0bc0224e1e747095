package event

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

func open(t *testing.T, dir string, out *bytes.Buffer) (*Log, *store.Store) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: dir, Name: "center-1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	l, err := Open(t.Context(), s, slog.New(slog.NewTextHandler(out, nil)), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return l, s
}

func TestLogIsARing(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	l, s := open(t, dir, &out)
	l.keep = 5
	posted := l.Posted()
	for i := range 12 {
		l.Post(t.Context(), Event{Type: KeyPushed, Message: fmt.Sprint("event number ", i+1), User: "u", Keys: []inventory.KeyID{{Provider: "p", Key: "k"}}})
	}
	select {
	case <-posted:
	default:
		t.Error("nobody was woken")
	}
	check := func(l *Log, after int64, max int, want ...int64) {
		t.Helper()
		list, err := l.After(t.Context(), after, max)
		if err != nil {
			t.Fatal(err)
		}
		var got []int64
		for _, e := range list {
			got = append(got, e.ID)
			if e.Message != fmt.Sprint("event number ", e.ID) || e.Severity != Info || e.Time.IsZero() {
				t.Errorf("event %+v", e)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("after %d: %v, want %v", after, got, want)
		}
	}
	check(l, 0, 100, 8, 9, 10, 11, 12)
	check(l, 10, 100, 11, 12)
	check(l, 0, 2, 11, 12)
	check(l, 12, 100)
	if got := strings.Count(out.String(), "\n"); got != 12 || !strings.Contains(out.String(), "event=com.mortise.crypto.KeyPushed") {
		t.Errorf("%d log lines:\n%s", got, &out)
	}
	s.Close()
	l, _ = open(t, dir, &out)
	l.Post(t.Context(), Event{Message: "event number 13"})
	check(l, 11, 100, 12, 13)
}

// An event of something that happened is written although who asked for it has
// gone.
func TestPostAfterCallerHasGone(t *testing.T) {
	var out bytes.Buffer
	l, _ := open(t, t.TempDir(), &out)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l.Post(ctx, Event{Message: "event number 1", Severity: Error})
	if list, err := l.After(t.Context(), 0, 10); len(list) != 1 || err != nil {
		t.Errorf("events: %v, %v", list, err)
	}
	if !strings.Contains(out.String(), "level=ERROR") {
		t.Errorf("log: %s", &out)
	}
}
