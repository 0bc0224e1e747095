package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
)

// What callers decide on; always wrapped with the record's name.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	// ErrConflict: the record has changed since the revision that was read.
	ErrConflict = errors.New("changed by somebody else in the meantime")
	// ErrDamaged: a record does not decode, or fails its seal.
	ErrDamaged = errors.New("damaged record")
	// ErrFull: the database has reached its quota, or its disk is nearly full.
	// No writes are taken.
	ErrFull = errors.New("store is full")
	// ErrUnavailable: no answer from etcd in time. A write may or may not have
	// been made.
	ErrUnavailable = errors.New("store is unavailable")
	// ErrLocked: another process has the state folder open.
	ErrLocked = errors.New("state folder is in use")
)

// An Op is one part of a transaction; collections make them.
type Op struct {
	at   string // "/collection/key"
	need condition
	rev  int64         // for mustBeAt
	op   *pb.RequestOp // nil: nothing is written
	err  error         // from encoding; reported by Commit
}

type condition int

const (
	anything condition = iota
	mustNotExist
	mustExist
	mustBeAt
)

// Commit makes all of ops or none, in one revision, and returns that revision
// once it is durable. It fails with ErrNotFound, ErrExists or ErrConflict,
// naming the record, when an Op's condition does not hold. An error that is
// none of the typed ones, a context's included, leaves the outcome unknown.
func (s *Store) Commit(ctx context.Context, ops ...Op) (int64, error) {
	if len(ops) == 0 || len(ops) > maxOps {
		return 0, fmt.Errorf("store: a transaction has 1 to %d operations, not %d", maxOps, len(ops))
	}
	var seen map[string]bool
	if len(ops) > few {
		seen = make(map[string]bool, len(ops))
	}
	r := &pb.TxnRequest{Compare: make([]*pb.Compare, 0, len(ops)), Success: make([]*pb.RequestOp, 0, len(ops))}
	for i, o := range ops {
		if o.err != nil {
			return 0, fmt.Errorf("store: %w", o.err)
		}
		if twice(ops[:i], o.at, seen) {
			return 0, fmt.Errorf("store: two operations on %s in one transaction", o.at)
		}
		key := []byte(o.at)
		switch o.need {
		case mustNotExist:
			r.Compare = append(r.Compare, &pb.Compare{Key: key, Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_CreateRevision{}})
		case mustExist:
			r.Compare = append(r.Compare, &pb.Compare{Key: key, Target: pb.Compare_CREATE, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_CreateRevision{}})
		case mustBeAt:
			r.Compare = append(r.Compare, &pb.Compare{Key: key, Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_ModRevision{ModRevision: o.rev}})
		}
		if o.op != nil {
			r.Success = append(r.Success, o.op)
		}
	}
	if err := s.room(); err != nil {
		return 0, fmt.Errorf("store: writing %s: %w", ops[0].at, err)
	}
	ctx, done, err := s.led(ctx)
	if err != nil {
		return 0, fmt.Errorf("store: writing %s: %w", ops[0].at, err)
	}
	defer done()
	answer, err := s.kv.Txn(ctx, r)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", ErrUnavailable, cause)
		}
		return 0, fmt.Errorf("store: writing %s: %w", ops[0].at, fromEtcd(rpctypes.Error(err)))
	}
	if !answer.Succeeded {
		return 0, s.whyNot(ctx, ops, answer.Header.Revision)
	}
	return answer.Header.Revision, nil
}

// few operations are compared with each other; more go through a map.
const few = 16

func twice(before []Op, at string, seen map[string]bool) bool {
	if seen == nil {
		return slices.ContainsFunc(before, func(o Op) bool { return o.at == at })
	}
	is := seen[at]
	seen[at] = true
	return is
}

// whyNot finds the condition that did not hold in a transaction that was refused
// at revision, which this member has reached: it gave the answer.
func (s *Store) whyNot(ctx context.Context, ops []Op, revision int64) error {
	for _, o := range ops {
		if o.need == anything {
			continue
		}
		r, err := s.etcd.Server.KV().Range(ctx, []byte(o.at), nil, mvcc.RangeOptions{Rev: revision})
		if err != nil {
			return fmt.Errorf("store: %s: %w: its transaction was refused: %w", o.at, ErrConflict, err)
		}
		there := len(r.KVs) > 0
		switch {
		case o.need == mustNotExist && there:
			return fmt.Errorf("store: %s: %w", o.at, ErrExists)
		case o.need != mustNotExist && !there:
			return fmt.Errorf("store: %s: %w", o.at, ErrNotFound)
		case o.need == mustBeAt && r.KVs[0].ModRevision != o.rev:
			return fmt.Errorf("store: %s: %w", o.at, ErrConflict)
		}
	}
	return fmt.Errorf("store: %s: %w", ops[0].at, ErrConflict) // not reached: some compare failed
}

// fromEtcd types the errors that callers decide on.
func fromEtcd(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, rpctypes.ErrTimeout), errors.Is(err, rpctypes.ErrTimeoutDueToLeaderFail),
		errors.Is(err, rpctypes.ErrTimeoutDueToConnectionLost), errors.Is(err, rpctypes.ErrTimeoutWaitAppliedIndex),
		errors.Is(err, rpctypes.ErrNoLeader), errors.Is(err, rpctypes.ErrLeaderChanged),
		errors.Is(err, rpctypes.ErrStopped), errors.Is(err, rpctypes.ErrTooManyRequests):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}
