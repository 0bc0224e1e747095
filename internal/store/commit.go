package store

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// What callers decide on; always wrapped with the record's name.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	// ErrConflict: the record has changed since the revision that was read.
	ErrConflict = errors.New("changed by somebody else in the meantime")
	// ErrDamaged: a record does not decode, or fails its seal.
	ErrDamaged = errors.New("damaged record")
	// ErrFull: the database has reached its quota and takes no writes.
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
	rev  int64 // for mustBeAt
	op   *clientv3.Op
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
// none of the typed ones, a context's included, leaves the outcome unknown.
func (s *Store) Commit(ctx context.Context, ops ...Op) (int64, error) {
	if len(ops) == 0 || len(ops) > maxOps {
		return 0, fmt.Errorf("store: a transaction has 1 to %d operations, not %d", maxOps, len(ops))
	}
	var (
		compares     []clientv3.Cmp
		writes, asks []clientv3.Op
		checked      []Op
		seen         = make(map[string]bool, len(ops))
	)
	for _, o := range ops {
		if o.err != nil {
			return 0, fmt.Errorf("store: %w", o.err)
		}
		if seen[o.at] {
			return 0, fmt.Errorf("store: two operations on %s in one transaction", o.at)
		}
		seen[o.at] = true
		switch o.need {
		case mustNotExist:
			compares = append(compares, clientv3.Compare(clientv3.CreateRevision(o.at), "=", 0))
		case mustExist:
			compares = append(compares, clientv3.Compare(clientv3.CreateRevision(o.at), ">", 0))
		case mustBeAt:
			compares = append(compares, clientv3.Compare(clientv3.ModRevision(o.at), "=", o.rev))
		}
		if o.need != anything {
			checked = append(checked, o)
			asks = append(asks, clientv3.OpGet(o.at, clientv3.WithKeysOnly()))
		}
		if o.op != nil {
			writes = append(writes, *o.op)
		}
	}
	ctx, done, err := s.led(ctx)
	if err != nil {
		return 0, fmt.Errorf("store: writing %s: %w", ops[0].at, err)
	}
	defer done()
	answer, err := s.client.Txn(ctx).If(compares...).Then(writes...).Else(asks...).Commit()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", ErrUnavailable, cause)
		}
		return 0, fmt.Errorf("store: writing %s: %w", ops[0].at, fromEtcd(err))
	}
	if answer.Succeeded {
		return answer.Header.Revision, nil
	}
	for i, o := range checked {
		kvs := answer.Responses[i].GetResponseRange().Kvs
		switch {
		case o.need == mustNotExist && len(kvs) > 0:
			return 0, fmt.Errorf("store: %s: %w", o.at, ErrExists)
		case o.need != mustNotExist && len(kvs) == 0:
			return 0, fmt.Errorf("store: %s: %w", o.at, ErrNotFound)
		case o.need == mustBeAt && kvs[0].ModRevision != o.rev:
			return 0, fmt.Errorf("store: %s: %w", o.at, ErrConflict)
		}
	}
	return 0, fmt.Errorf("store: %s: %w", ops[0].at, ErrConflict) // not reached: some compare failed
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
