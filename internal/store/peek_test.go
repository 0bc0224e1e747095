package store

import "testing"

// After Sync, Peek sees every commit that returned before it; damaged and
// missing records are not there.
func TestPeekAfterSync(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "things", JSON[int](1))
	for i := range 200 {
		commit(t, s, c.Put("n", i))
		if err := s.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		if e, ok := c.Peek("n"); !ok || e.Value != i {
			t.Fatalf("after writing %d and Sync, Peek says %v, %v", i, e.Value, ok)
		}
	}
	commit(t, s, c.Delete("n", 0))
	if err := s.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.Peek("n"); ok {
		t.Fatal("Peek sees a deleted record")
	}
}
