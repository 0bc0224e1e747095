package store

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"
)

func TestQueue(t *testing.T) {
	s, err := Open(t.Context(), Config{Dir: filepath.Join(t.TempDir(), "s"), Name: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx := t.Context()
	q, err := NewQueue(ctx, s, "acts", "m1")
	if err != nil {
		t.Fatal(err)
	}
	other := &Queue{s: s, name: "acts", part: "m2/"}
	c, err := NewCollection(ctx, s, "thing", JSON[string](1))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		// The keys' order is not that of the commits.
		if _, err := s.Commit(ctx, c.Create(fmt.Sprint(i), "x"), q.Add(fmt.Sprint(9-i), fmt.Append(nil, i))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Commit(ctx, other.Add("a", []byte("other's"))); err != nil {
		t.Fatal(err)
	}
	// A transaction that is refused leaves nothing.
	if _, err := s.Commit(ctx, c.Create("0", "x"), q.Add("never", nil)); !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
	if err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-q.Ready():
	case <-time.After(5 * time.Second):
		t.Fatal("nobody said that there are items")
	}
	check := func(want ...string) {
		t.Helper()
		got := ""
		for _, i := range q.Oldest(3) {
			got += string(i.Value)
		}
		all := ""
		for _, w := range want {
			all += w
		}
		if got != all {
			t.Errorf("the oldest are %q, want %q", got, all)
		}
	}
	check("0", "1", "2")
	three := q.Oldest(3)
	q.Drop(three[1])
	check("2", "3", "4")
	if err := s.rebuild(ctx); err != nil { // the two are not removed yet, and must not come back
		t.Fatal(err)
	}
	check("2", "3", "4")
	if _, err := s.Commit(ctx, q.Remove(three)...); err != nil {
		t.Fatal(err)
	}
	list, err := q.Others(ctx)
	if err != nil || len(list) != 1 || string(list[0][0].Value) != "other's" {
		t.Fatalf("others: %+v, %v", list, err)
	}
	if _, err := s.Commit(ctx, append(q.Take(list[0]), q.Add("moved", list[0][0].Value))...); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(ctx, append(q.Take(list[0]), q.Add("again", list[0][0].Value))...); !errors.Is(err, ErrNotFound) {
		t.Errorf("taking it twice: %v", err)
	}
	q.Close()
	if q, err = NewQueue(ctx, s, "acts", "m1"); err != nil {
		t.Fatal(err)
	}
	check("3", "4", "other's")
	if q.Len() != 3 {
		t.Errorf("Len is %d", q.Len())
	}
}
