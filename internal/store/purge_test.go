package store

import (
	"fmt"
	"testing"
)

func TestPurge(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	ctx := t.Context()
	one, err := NewCollection(ctx, s, "one", JSON[int](1))
	if err != nil {
		t.Fatal(err)
	}
	// "one-more" begins with the name of the other; it must stay.
	more, err := NewCollection(ctx, s, "one-more", JSON[int](1))
	if err != nil {
		t.Fatal(err)
	}
	const n = 2*purgePage + 7
	for from := 0; from < n; from += maxOps {
		var ops []Op
		for i := from; i < min(n, from+maxOps); i++ {
			ops = append(ops, one.Create(fmt.Sprintf("key-%05d", i), i))
		}
		if _, err := s.Commit(ctx, ops...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Commit(ctx, more.Create("stays", 1)); err != nil {
		t.Fatal(err)
	}
	if keys, err := s.Keys(ctx, "one"); err != nil || len(keys) != n || keys[7] != "key-00007" {
		t.Errorf("keys: %d, %v", len(keys), err)
	}
	if one.Count() != n {
		t.Errorf("count: %d", one.Count())
	}
	if gone, err := s.Purge(ctx, "one"); err != nil || gone != n {
		t.Errorf("purge: %d, %v", gone, err)
	}
	if gone, err := s.Purge(ctx, "one"); err != nil || gone != 0 {
		t.Errorf("again: %d, %v", gone, err)
	}
	if list, err := one.List(ctx, ""); err != nil || len(list) != 0 {
		t.Errorf("after it: %v, %v", list, err)
	}
	if list, err := more.List(ctx, ""); err != nil || len(list) != 1 {
		t.Errorf("the other collection: %v, %v", list, err)
	}
}
