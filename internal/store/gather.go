package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// Group commit.
//
// What a transaction costs etcd is mostly the same whatever is in it: a proposal,
// an entry of the log, a wake-up of everybody who waits. So while transactions are
// on their way, the Commits that are called wait, and then go together as one. A
// Commit that finds nothing on its way goes at once, alone.
//
// What makes this invisible to the callers:
//
//   - Commits share a transaction only if no record that one of them writes is
//     written or compared by another, and no two expect different things of one
//     record. So every order of them, one after the other, has the same outcome,
//     and all of them were under way at the moment of the transaction:
//     linearizable.
//   - If a condition of one does not hold, etcd refuses all. Then each is judged by
//     what the records were at that very revision: whose conditions did not hold is
//     told so, exactly as if it had gone alone; the others go again.
//   - A caller that no longer waits takes nothing from the others: what was not
//     sent yet is withdrawn, what was sent goes on.
//   - What etcd does not answer, nobody's fate is known of, and each is told.
const (
	// maxFlying is how many transactions are on their way before Commits wait: one
	// that etcd applies, and one that it writes to its log meanwhile.
	maxFlying = 2
	// patience is how long Commits wait for those on their way. An answer that
	// takes longer may never come: etcd waits seconds for what was lost between
	// members.
	patience = 100 * time.Millisecond
	// maxGroup bounds the bytes of Commits that go together. One that is larger
	// goes alone.
	maxGroup = 512 << 10
	// opCost is what an operation takes beside its key and value, at most.
	opCost = 32
)

// A change is a Commit under way.
type change struct {
	ops      []Op
	bytes    int           // of all that it sends
	items    int           // of what it adds to queues
	done     chan struct{} // closed when revision and err are set
	revision int64
	err      error
}

// newChange keeps a copy: who has given up may use ops again, while they are
// still on their way.
func newChange(ops []Op) *change {
	c := &change{ops: slices.Clone(ops), done: make(chan struct{})}
	for i := range ops {
		o := &ops[i]
		c.bytes += 2*len(o.at) + len(o.op.GetRequestPut().GetValue()) + 2*opCost
		if o.item != nil {
			c.items += len(o.item.key) + len(o.item.value) + 2*binary.MaxVarintLen32
		}
	}
	c.bytes += c.items
	return c
}

func (c *change) tell(revision int64, err error) {
	c.revision, c.err = revision, err
	close(c.done)
}

// fail tells the caller that etcd gave this error for the transaction.
func (c *change) fail(err error) {
	c.tell(0, fmt.Errorf("store: writing %s: %w", c.ops[0].at, err))
}

// gathering is the Commits that wait for those on their way.
type gathering struct {
	send     func(group []*change) // tells each of them
	patience time.Duration         // 0: the usual; tests wait longer

	mu      sync.Mutex
	waiting []*change // in the order in which they came
	flying  int       // transactions on their way that are waited for
}

func (g *gathering) join(c *change) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = append(g.waiting, c)
	g.launch()
}

// leave withdraws c if it was not sent yet.
func (g *gathering) leave(c *change) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = slices.DeleteFunc(g.waiting, func(w *change) bool { return w == c })
}

// launch sends what waits while it need not. The lock is held.
func (g *gathering) launch() {
	for g.flying < maxFlying && len(g.waiting) > 0 {
		g.flying++
		go g.fly(g.take())
	}
}

func (g *gathering) fly(group []*change) {
	landed := sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.flying--
		g.launch()
	})
	overdue := time.AfterFunc(cmp.Or(g.patience, patience), landed)
	g.send(group)
	overdue.Stop()
	landed()
}

// take takes out those that go together: the one that has waited longest, and
// what agrees with it. The lock is held.
func (g *gathering) take() []*change {
	if len(g.waiting) == 1 {
		group := g.waiting
		g.waiting = nil
		return group
	}
	var group, rest []*change
	claims, ops, bytes := make(claims, 2*len(g.waiting)), 0, 0
	for _, c := range g.waiting {
		fits := len(group) == 0 || ops+len(c.ops) <= maxOps && bytes+c.bytes <= maxGroup
		if !fits || !claims.take(c.ops) {
			rest = append(rest, c)
			continue
		}
		group, ops, bytes = append(group, c), ops+len(c.ops), bytes+c.bytes
	}
	g.waiting = rest
	return group
}

// claims is what the Commits of a group do with records: by name.
type claims map[string]claim

type claim struct {
	need   condition
	rev    int64
	writes bool
}

// take adds ops, or nothing and returns false if they do not agree with what is
// there.
func (c claims) take(ops []Op) bool {
	for i := range ops {
		if o := &ops[i]; o.item == nil { // an item of a queue is new
			if there, ok := c[o.at]; ok && (there.writes || there != o.claim()) {
				return false
			}
		}
	}
	for i := range ops {
		if o := &ops[i]; o.item == nil {
			c[o.at] = o.claim()
		}
	}
	return true
}

func (o *Op) claim() claim { return claim{o.need, o.rev, o.op != nil} }

// request is the transaction of a group: what several of them compare is
// compared once, and what several of them add to a queue is one record.
func request(group []*change) *pb.TxnRequest {
	n := 0
	for _, c := range group {
		n += len(c.ops)
	}
	r := &pb.TxnRequest{Compare: make([]*pb.Compare, 0, n), Success: make([]*pb.RequestOp, 0, n)}
	var compared map[string]bool
	if len(group) > 1 {
		compared = make(map[string]bool, n)
	}
	var added []itemRecord
	items := 0 // bytes
	for _, c := range group {
		items += c.items
	}
	for _, c := range group {
		for i := range c.ops {
			o := &c.ops[i]
			if o.item != nil {
				added = o.item.addTo(added, o.at, items)
				continue
			}
			if o.need != anything && !compared[o.at] {
				r.Compare = append(r.Compare, o.compare())
				if compared != nil {
					compared[o.at] = true
				}
			}
			if o.op != nil {
				r.Success = append(r.Success, o.op)
			}
		}
	}
	for _, a := range added {
		r.Success = append(r.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: a.put}})
	}
	return r
}

// send makes the transaction of a group, and tells each what came of it.
func (s *Store) send(group []*change) {
	for len(group) > 0 {
		answer, err := s.txn(request(group))
		switch {
		case err != nil:
			group = s.told(group, err)
		case answer.Succeeded:
			for _, c := range group {
				c.tell(answer.Header.Revision, nil)
			}
			return
		default:
			group = s.sift(group, answer.Header.Revision)
		}
	}
}

func (s *Store) txn(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	ctx, done, err := s.led(s.closing)
	if err != nil {
		return nil, err
	}
	defer done()
	if len(r.Success) == 0 { // etcd does not ask the others for what only compares
		if err := s.readIndex(ctx); err != nil {
			return nil, err
		}
	}
	answer, err := s.kv.Txn(ctx, r)
	if err == nil {
		return answer, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = fmt.Errorf("%w: %w", ErrUnavailable, cause)
	}
	return nil, fromEtcd(rpctypes.Error(err))
}

// told tells a group that etcd would not take its transaction. When there is no
// space, what only removes can still be done: that is returned.
func (s *Store) told(group []*change, err error) (again []*change) {
	for _, c := range group {
		if len(group) > 1 && errors.Is(err, ErrFull) && c.removes() {
			again = append(again, c)
		} else {
			c.fail(err)
		}
	}
	if len(again) == len(group) { // all of them did, and still
		for _, c := range again {
			c.fail(err)
		}
		return nil
	}
	return again
}

// removes tells whether c writes nothing but removals.
func (c *change) removes() bool {
	return !slices.ContainsFunc(c.ops, func(o Op) bool { return o.item != nil || o.op.GetRequestPut() != nil })
}

// sift tells those of a refused group whose conditions did not hold, and returns
// the others, to be sent again.
func (s *Store) sift(group []*change, revision int64) (again []*change) {
	for _, c := range group {
		broken, failed := s.broken(s.closing, c.ops, revision)
		switch {
		case broken != nil:
			c.tell(0, broken)
		case len(group) == 1: // some compare failed; which, is past finding out
			c.tell(0, fmt.Errorf("store: %s: %w: its transaction was refused: %w", c.ops[0].at, ErrConflict, cmp.Or(failed, errCompare)))
		default:
			again = append(again, c)
		}
	}
	if len(again) < len(group) {
		return again
	}
	for _, c := range again { // nobody is known to be the one: let each go alone
		s.send([]*change{c})
	}
	return nil
}

var errCompare = errors.New("a condition did not hold")
