package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

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

// An Op is one part of a transaction; collections and queues make them.
type Op struct {
	at   string // "/collection/key"
	need condition
	rev  int64         // for mustBeAt
	op   *pb.RequestOp // nil: nothing is written, or what item says
	item *queued
	err  error // from encoding; reported by Commit
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
// none of the typed ones, and ErrUnavailable, leave the outcome unknown.
//
// Commits that are called at the same time may share a revision: see gather.go.
// Those that touch the same record never do.
func (s *Store) Commit(ctx context.Context, ops ...Op) (int64, error) {
	if len(ops) == 0 || len(ops) > maxOps {
		return 0, fmt.Errorf("store: a transaction has 1 to %d operations, not %d", maxOps, len(ops))
	}
	var seen map[string]bool
	if len(ops) > few {
		seen = make(map[string]bool, len(ops))
	}
	for i, o := range ops {
		if o.err != nil {
			return 0, fmt.Errorf("store: %w", o.err)
		}
		if twice(ops[:i], o.at, seen) {
			return 0, fmt.Errorf("store: two operations on %s in one transaction", o.at)
		}
	}
	err := ctx.Err()
	if err == nil {
		err = s.room()
	}
	if err == nil {
		err = s.headed()
	}
	if err != nil {
		return 0, fmt.Errorf("store: writing %s: %w", ops[0].at, fromEtcd(err))
	}
	c := newChange(ops)
	s.gather.join(c)
	select {
	case <-c.done:
		return c.revision, c.err
	case <-ctx.Done():
		s.gather.leave(c) // if it has gone already, the others of its group need it
		return 0, fmt.Errorf("store: writing %s: %w: %w", ops[0].at, ErrUnavailable, context.Cause(ctx))
	}
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

// compare is o's condition as etcd has it.
func (o *Op) compare() *pb.Compare {
	key := []byte(o.at)
	switch o.need {
	case mustNotExist: // etcd takes what a target lacks for 0
		return &pb.Compare{Key: key, Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL}
	case mustExist:
		return &pb.Compare{Key: key, Target: pb.Compare_CREATE, Result: pb.Compare_GREATER}
	case mustBeAt:
		return &pb.Compare{Key: key, Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_ModRevision{ModRevision: o.rev}}
	}
	return nil
}

// broken finds the condition that did not hold at a revision that this member
// has reached, and returns the error that says so; nil if all held. failed is
// why it could not be found out.
func (s *Store) broken(ctx context.Context, ops []Op, revision int64) (broken, failed error) {
	for _, o := range ops {
		if o.need == anything {
			continue
		}
		r, err := s.etcd.Server.KV().Range(ctx, []byte(o.at), nil, mvcc.RangeOptions{Rev: revision})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.at, err)
		}
		there := len(r.KVs) > 0
		switch {
		case o.need == mustNotExist && there:
			return fmt.Errorf("store: %s: %w", o.at, ErrExists), nil
		case o.need == mustBeAt && o.rev == 0 && !there:
		case o.need != mustNotExist && !there:
			return fmt.Errorf("store: %s: %w", o.at, ErrNotFound), nil
		case o.need == mustBeAt && r.KVs[0].ModRevision != o.rev:
			return fmt.Errorf("store: %s: %w", o.at, ErrConflict), nil
		}
	}
	return nil, nil
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
	// raft.ErrProposalDropped, which etcd passes on as text: the leader is changing.
	if err != nil && strings.Contains(err.Error(), "raft proposal dropped") {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}
