package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// watchedKV is etcd, with somebody who looks at each transaction first. An error
// of look's is etcd's answer.
type watchedKV struct {
	pb.KVServer
	look func(ctx context.Context, r *pb.TxnRequest) error

	mu   sync.Mutex
	seen []*pb.TxnRequest
}

func (w *watchedKV) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	w.mu.Lock()
	w.seen = append(w.seen, r)
	w.mu.Unlock()
	if w.look != nil {
		if err := w.look(ctx, r); err != nil {
			return nil, err
		}
	}
	return w.KVServer.Txn(ctx, r)
}

func (w *watchedKV) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.seen)
}

func watched(s *Store, look func(ctx context.Context, r *pb.TxnRequest) error) *watchedKV {
	w := &watchedKV{KVServer: s.kv, look: look}
	s.kv = w
	return w
}

// busy keeps the first transactions on their way, so that what is committed
// meanwhile gathers, until the returned function is called. Its look is for the
// transactions after those.
func busy(t *testing.T, s *Store, c *Collection[vm], look func(ctx context.Context, r *pb.TxnRequest) error) (w *watchedKV, release func()) {
	t.Helper()
	s.gather.patience = time.Minute
	gate := make(chan struct{})
	w = watched(s, func(ctx context.Context, r *pb.TxnRequest) error {
		if strings.HasPrefix(string(r.Success[0].GetRequestPut().GetKey()), "/vm/busy") {
			<-gate
			return nil
		}
		if look != nil {
			return look(ctx, r)
		}
		return nil
	})
	var flying sync.WaitGroup
	for i := range maxFlying {
		flying.Go(func() {
			if _, err := s.Commit(context.Background(), c.Put(fmt.Sprint("busy", i), vm{})); err != nil {
				t.Error(err)
			}
		})
		waitFor(t, func() bool { return w.count() == i+1 })
	}
	return w, sync.OnceFunc(func() { close(gate); flying.Wait() })
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
	}
}

func (s *Store) waiting() int {
	s.gather.mu.Lock()
	defer s.gather.mu.Unlock()
	return len(s.gather.waiting)
}

// gatherAll commits each of list at once, while others are on their way, and
// returns what each was told.
func gatherAll(t *testing.T, s *Store, c *Collection[vm], list [][]Op) (w *watchedKV, revisions []int64, errs []error) {
	t.Helper()
	w, release := busy(t, s, c, nil)
	defer release()
	revisions, errs = make([]int64, len(list)), make([]error, len(list))
	var all sync.WaitGroup
	for i, ops := range list {
		all.Go(func() { revisions[i], errs[i] = s.Commit(t.Context(), ops...) })
		waitFor(t, func() bool { return s.waiting() == i+1 || w.count() > maxFlying })
	}
	release()
	all.Wait()
	return w, revisions, errs
}

func TestCommitsThatAgreeGoTogether(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	guard := commit(t, s, c.Put("guard", vm{}))
	q, err := NewQueue(t.Context(), s, "acts", "m1")
	if err != nil {
		t.Fatal(err)
	}
	const n = 40
	var list [][]Op
	for i := range n {
		list = append(list, []Op{c.Create(fmt.Sprintf("k%02d", i), vm{Rev: i}), c.Unchanged("guard", guard), q.Add(fmt.Sprint("act", i), fmt.Append(nil, i))})
	}
	w, revisions, errs := gatherAll(t, s, c, list)
	if got := w.count() - maxFlying; got > 3 {
		t.Errorf("%d commits took %d transactions", n, got)
	}
	for _, r := range w.seen[maxFlying:] {
		creates, guards, items := 0, 0, 0
		for _, x := range r.Compare {
			if string(x.Key) == "/vm/guard" {
				guards++
			}
		}
		for _, x := range r.Success {
			if strings.HasPrefix(string(x.GetRequestPut().Key), "/acts/m1/") {
				items++
			} else {
				creates++
			}
		}
		if guards != 1 || items != 1 || creates+1 != len(r.Compare) {
			t.Errorf("a transaction of %d creates compares the guard %d times and has %d records of the queue", creates, guards, items)
		}
	}
	for i := range n {
		e, err := c.Get(t.Context(), fmt.Sprintf("k%02d", i))
		if errs[i] != nil || err != nil || e.Revision != revisions[i] || e.Value.Rev != i {
			t.Errorf("commit %d: revision %d, %v; the record: %+v, %v", i, revisions[i], errs[i], e, err)
		}
	}
	// The queue has each item with the revision of its commit, in that order.
	items := q.Oldest(n + 1)
	if len(items) != n || !slices.IsSortedFunc(items, func(a, b Item) int { return int(a.Revision - b.Revision) }) {
		t.Fatalf("%d items: %+v", len(items), items)
	}
	for _, it := range items {
		var i int
		fmt.Sscan(string(it.Value), &i)
		if it.Key != fmt.Sprint("act", i) || it.Revision != revisions[i] {
			t.Errorf("item %+v of commit %d, revision %d", it, i, revisions[i])
		}
	}
	if ops := q.Remove(items); len(ops) > 3 {
		t.Errorf("the items are in %d records", len(ops))
	} else {
		commit(t, s, ops...)
	}
	q.Close()
	if q, err = NewQueue(t.Context(), s, "acts", "m1"); err != nil || q.Len() != 0 {
		t.Errorf("after the removal: %d items, %v", q.Len(), err)
	}
}

func TestWhatGoesTogether(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	one := []Op{c.Put("a", vm{}), c.Unchanged("g", 7), c.Update("u", 3, vm{})}
	for _, x := range []struct {
		what     string
		two      []Op
		together bool
	}{
		{"nothing in common", []Op{c.Put("b", vm{}), c.Unchanged("h", 7)}, true},
		{"the same guard", []Op{c.Put("b", vm{}), c.Unchanged("g", 7)}, true},
		{"another revision of a guard", []Op{c.Put("b", vm{}), c.Unchanged("g", 8)}, false},
		{"the guard must not be there", []Op{c.Put("b", vm{}), c.Unchanged("g", 0)}, false},
		{"writes the same record", []Op{c.Put("a", vm{})}, false},
		{"updates it alike", []Op{c.Update("u", 3, vm{})}, false},
		{"compares what the other writes", []Op{c.Put("b", vm{}), c.Unchanged("u", 3)}, false},
		{"writes what the other compares", []Op{c.Update("g", 7, vm{})}, false},
		{"removes what the other compares", []Op{c.Delete("g", 7)}, false},
	} {
		first, second := newChange(one), newChange(x.two)
		g := gathering{waiting: []*change{first, second}}
		group := g.take()
		if (len(group) == 2) != x.together || group[0] != first || len(group)+len(g.waiting) != 2 {
			t.Errorf("%s: %d go together", x.what, len(group))
		}
		// The other way round it is the same.
		g = gathering{waiting: []*change{second, first}}
		if (len(g.take()) == 2) != x.together {
			t.Errorf("%s, the other way round", x.what)
		}
	}

	big := func(key string) *change {
		return newChange([]Op{c.Put(key, vm{Name: strings.Repeat("x", maxGroup/2)})})
	}
	var many []Op
	for i := range maxOps - 1 {
		many = append(many, c.Delete(fmt.Sprint("m", i), 0))
	}
	x, y := newChange([]Op{c.Put("x", vm{})}), newChange([]Op{c.Put("y", vm{})})
	for what, g := range map[string]*gathering{
		"bytes": {waiting: []*change{big("1"), x, big("2"), y}},
		"ops":   {waiting: []*change{newChange(many), x, newChange([]Op{c.Put("p", vm{}), c.Put("q", vm{})})}},
	} {
		if first := g.take(); !slices.Contains(first, x) || len(g.waiting) != 1 {
			t.Errorf("%s: %d go, %d wait", what, len(first), len(g.waiting))
		}
		if second := g.take(); len(second) != 1 || len(g.waiting) != 0 {
			t.Errorf("%s: who waited has not gone", what)
		}
	}
}

// TestRefusedMember: each Commit of a refused group is told what it would have
// been told alone, and no other is hurt.
func TestRefusedMember(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	old := commit(t, s, c.Put("there", vm{}))
	now := commit(t, s, c.Put("there", vm{Rev: 1}))
	list := [][]Op{
		{c.Create("n1", vm{})},
		{c.Create("there", vm{Rev: 9}), c.Put("half1", vm{})},
		{c.Create("n2", vm{})},
		{c.Put("half2", vm{}), c.Delete("nothing", 0)},
		{c.Put("half3", vm{}), c.Unchanged("busy0", old)},
		{c.Create("n3", vm{})},
	}
	want := []error{nil, ErrExists, nil, ErrNotFound, ErrConflict, nil}
	w, revisions, errs := gatherAll(t, s, c, list)
	if got := w.count() - maxFlying; got >= len(list) {
		t.Errorf("%d commits took %d transactions", len(list), got)
	}
	for i := range list {
		if !errors.Is(errs[i], want[i]) || (want[i] == nil) != (errs[i] == nil) || (revisions[i] > 0) != (want[i] == nil) {
			t.Errorf("commit %d: revision %d, %v; want %v", i, revisions[i], errs[i], want[i])
		}
	}
	for key, is := range map[string]bool{"n1": true, "n2": true, "n3": true, "half1": false, "half2": false, "half3": false} {
		if _, err := c.Get(t.Context(), key); errors.Is(err, ErrNotFound) == is {
			t.Errorf("%s: %v", key, err)
		}
	}
	if e, err := c.Get(t.Context(), "there"); err != nil || e.Revision != now {
		t.Errorf("a refused create has written: %+v, %v", e, err)
	}
}

// TestRefusedForReasonsUnknown: when nobody can be found who broke the group,
// each goes alone.
func TestRefusedForReasonsUnknown(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	rev := commit(t, s, c.Put("guard", vm{}))
	commit(t, s, c.Put("guard", vm{Rev: 1}))
	group := []*change{newChange([]Op{c.Create("a", vm{})}), newChange([]Op{c.Create("b", vm{}), c.Unchanged("guard", rev)}), newChange([]Op{c.Create("d", vm{})})}
	last := commit(t, s, c.Put("later", vm{}))
	if _, err := s.client.Compact(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	if again := s.sift(group, rev); again != nil {
		t.Errorf("%d are to go again together", len(again))
	}
	for i, want := range []error{nil, ErrConflict, nil} {
		<-group[i].done
		if !errors.Is(group[i].err, want) || (want == nil) != (group[i].err == nil) {
			t.Errorf("commit %d: %v, want %v", i, group[i].err, want)
		}
	}
}

func TestNoAnswerIsToldToEach(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	_, release := busy(t, s, c, func(context.Context, *pb.TxnRequest) error { return rpctypes.ErrGRPCTimeoutDueToLeaderFail })
	defer release()
	errs := make(chan error)
	const n = 10
	for i := range n {
		go func() {
			_, err := s.Commit(context.Background(), c.Create(fmt.Sprint("n", i), vm{}))
			if err == nil || !strings.Contains(err.Error(), fmt.Sprint("/vm/n", i)) {
				err = fmt.Errorf("commit %d was told: %v", i, err)
			}
			errs <- err
		}()
	}
	waitFor(t, func() bool { return s.waiting() == n })
	release()
	for range n {
		if err := <-errs; !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	}
}

// TestWhoGoesAwayHurtsNobody: a Commit whose caller gives up is not made if it was
// not sent, and the others of its group are.
func TestWhoGoesAwayHurtsNobody(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	_, release := busy(t, s, c, nil)
	defer release()
	going, leave := context.WithCancel(context.Background())
	errs := make(chan error, 3)
	for _, x := range []struct {
		ctx context.Context
		key string
	}{{context.Background(), "stays1"}, {going, "leaves"}, {context.Background(), "stays2"}} {
		before := s.waiting()
		go func() {
			_, err := s.Commit(x.ctx, c.Create(x.key, vm{}))
			errs <- err
		}()
		waitFor(t, func() bool { return s.waiting() == before+1 })
	}
	leave()
	if err := <-errs; !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("who left was told: %v", err)
	}
	release()
	for range 2 {
		if err := <-errs; err != nil {
			t.Errorf("who stayed was told: %v", err)
		}
	}
	for key, is := range map[string]bool{"stays1": true, "stays2": true, "leaves": false} {
		if _, err := c.Get(t.Context(), key); errors.Is(err, ErrNotFound) == is {
			t.Errorf("%s: %v", key, err)
		}
	}
	if _, err := s.Commit(going, c.Create("late", vm{})); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a commit of who has left already: %v", err)
	}
}

// TestWhoGoesAwayOnTheWay: the transaction that has a Commit of a caller that
// gave up in it is made.
func TestWhoGoesAwayOnTheWay(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	sent, gate := make(chan struct{}), make(chan struct{})
	_, release := busy(t, s, c, func(ctx context.Context, _ *pb.TxnRequest) error {
		close(sent)
		<-gate
		return ctx.Err()
	})
	going, leave := context.WithCancel(context.Background())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { _, err := s.Commit(going, c.Create("leaves", vm{})); first <- err }()
	waitFor(t, func() bool { return s.waiting() == 1 })
	go func() { _, err := s.Commit(context.Background(), c.Create("stays", vm{})); second <- err }()
	waitFor(t, func() bool { return s.waiting() == 2 })
	release()
	<-sent
	leave()
	if err := <-first; !errors.Is(err, ErrUnavailable) {
		t.Errorf("who left was told: %v", err)
	}
	close(gate)
	if err := <-second; err != nil {
		t.Errorf("who stayed was told: %v", err)
	}
	if _, err := c.Get(t.Context(), "leaves"); err != nil { // its outcome was not known
		t.Error(err)
	}
}

// TestAnswerThatDoesNotCome: Commits do not wait for ever behind transactions
// that etcd does not answer.
func TestAnswerThatDoesNotCome(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	gate := make(chan struct{})
	w := watched(s, func(_ context.Context, r *pb.TxnRequest) error {
		if strings.HasPrefix(string(r.Success[0].GetRequestPut().GetKey()), "/vm/stuck") {
			<-gate
		}
		return nil
	})
	var stuck sync.WaitGroup
	for i := range maxFlying {
		stuck.Go(func() {
			if _, err := s.Commit(context.Background(), c.Put(fmt.Sprint("stuck", i), vm{})); err != nil {
				t.Error(err)
			}
		})
		waitFor(t, func() bool { return w.count() == i+1 })
	}
	for i := range 3 {
		commit(t, s, c.Put(fmt.Sprint("k", i), vm{}))
	}
	close(gate)
	stuck.Wait()
	waitFor(t, func() bool { s.gather.mu.Lock(); defer s.gather.mu.Unlock(); return s.gather.flying == 0 })
}

// TestRemovalsWithoutSpace: what only removes is not held up by those that
// etcd's quota refuses.
func TestRemovalsWithoutSpace(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	commit(t, s, c.Put("gone", vm{}))
	_, release := busy(t, s, c, func(_ context.Context, r *pb.TxnRequest) error {
		for _, o := range r.Success {
			if o.GetRequestPut() != nil {
				return rpctypes.ErrGRPCNoSpace
			}
		}
		return nil
	})
	defer release()
	put, removal := make(chan error, 1), make(chan error, 1)
	go func() { _, err := s.Commit(context.Background(), c.Put("more", vm{})); put <- err }()
	waitFor(t, func() bool { return s.waiting() == 1 })
	go func() { _, err := s.Commit(context.Background(), c.Delete("gone", 0)); removal <- err }()
	waitFor(t, func() bool { return s.waiting() == 2 })
	release()
	if err := <-put; !errors.Is(err, ErrFull) {
		t.Errorf("the write was told: %v", err)
	}
	if err := <-removal; err != nil {
		t.Errorf("the removal was told: %v", err)
	}
	if _, err := c.Get(t.Context(), "gone"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

// TestGroupsAreTransactions: many writers move amounts between few records, with
// conditions that often do not hold. No amount is lost or made, and a writer that
// was told of a revision finds it.
func TestGroupsAreTransactions(t *testing.T) {
	s := open(t, t.TempDir())
	c := collection(t, s, "vm", JSON[vm](1))
	const accounts, writers, moves = 12, 24, 25
	name := func(i int) string { return fmt.Sprintf("a%02d", i) }
	for i := range accounts {
		commit(t, s, c.Put(name(i), vm{Rev: 1000}))
	}
	w := watched(s, nil)
	var all sync.WaitGroup
	for n := range writers {
		all.Go(func() {
			ctx := t.Context()
			for m := range moves {
				for {
					i := rand.IntN(accounts)
					j := (i + 1 + rand.IntN(accounts-1)) % accounts
					from, err1 := c.Get(ctx, name(i))
					to, err2 := c.Get(ctx, name(j))
					if err1 != nil || err2 != nil {
						t.Error(err1, err2)
						return
					}
					amount := rand.IntN(10)
					from.Value.Rev, to.Value.Rev = from.Value.Rev-amount, to.Value.Rev+amount
					note := fmt.Sprintf("note-%d-%d", n, m)
					rev, err := s.Commit(ctx, c.Update(from.Key, from.Revision, from.Value), c.Update(to.Key, to.Revision, to.Value), c.Create(note, vm{Rev: amount}))
					if errors.Is(err, ErrConflict) {
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					if e, err := c.Get(ctx, note); err != nil || e.Created != rev {
						t.Errorf("%s, made at revision %d: %+v, %v", note, rev, e, err)
					}
					break
				}
			}
		})
	}
	all.Wait()
	sum, notes := 0, 0
	list, err := c.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if strings.HasPrefix(e.Key, "note") {
			notes++
		} else {
			sum += e.Value.Rev
		}
	}
	if sum != accounts*1000 || notes != writers*moves {
		t.Errorf("the sum is %d, want %d; %d notes, want %d", sum, accounts*1000, notes, writers*moves)
	}
	t.Logf("%d moves took %d transactions", writers*moves, w.count())
}

func FuzzQueueRecord(f *testing.F) {
	f.Add(appendItem(appendItem([]byte{itemsFormat}, "a", []byte("one")), "b", nil))
	f.Add([]byte{itemsFormat})
	f.Add([]byte{itemsFormat, 200, 200, 200, 200, 200, 200, 200, 200, 200, 1})
	f.Add([]byte("\x01 an entry of before"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, ok := parseItems(b, Item{Part: "m/", record: "r"})
		if !ok {
			if list != nil {
				t.Error("items of a record that is not one")
			}
			return
		}
		again := []byte{itemsFormat}
		for _, i := range list {
			again = appendItem(again, i.Key, i.Value)
		}
		if second, ok := parseItems(again, Item{Part: "m/", record: "r"}); !ok || len(second) != len(list) {
			t.Errorf("%x is read as %d items, and what they encode to is not", b, len(list))
		}
	})
}
