package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// How the store behaves around a change of leader. A write that was on its way
// to a leader that died gets no answer from etcd for seven seconds; a member that
// is cut off from the majority gets none at all. Both should tell their caller
// soon, so that it can go to another member.
const (
	// lateAnswers is how long answers of writes that a former leader took are
	// waited for under its successor: what it had spread is still committed.
	lateAnswers = 150 * time.Millisecond
	// headlessAfter is how long a member is without a leader before it refuses
	// at once. An election is over sooner.
	headlessAfter = 1500 * time.Millisecond
	lookEvery     = 50 * time.Millisecond
)

// reign is the time of one leader, as far as requests care.
type reign struct {
	mu       sync.Mutex
	ctx      context.Context // ends, lateAnswers late, with the leader's time
	end      context.CancelCauseFunc
	headless bool
	alone    atomic.Bool // one member: no other leader can come
}

var (
	errLeaderChanged = errors.New("the leader changed while it was waiting for an answer; it may have happened")
	errHeadless      = errors.New("this member is cut off from the majority")
)

func (s *Store) initReign() {
	s.reign.ctx, s.reign.end = context.WithCancelCause(s.closing)
}

// led returns a context for one request, which ends early when its leader is
// lost. The cancel function must be called. A cluster of one has one leader, and
// pays nothing.
func (s *Store) led(ctx context.Context) (context.Context, context.CancelFunc, error) {
	if s.peers == nil || s.reign.alone.Load() {
		return ctx, func() {}, nil
	}
	if err := s.headed(); err != nil {
		return ctx, func() {}, err
	}
	s.reign.mu.Lock()
	reign := s.reign.ctx
	s.reign.mu.Unlock()
	merged, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(reign, func() { cancel(context.Cause(reign)) })
	return merged, func() { stop(); cancel(nil) }, nil
}

// headed is ErrUnavailable while no leader is in reach.
func (s *Store) headed() error {
	s.reign.mu.Lock()
	defer s.reign.mu.Unlock()
	if s.reign.headless {
		return fmt.Errorf("%w: %w", ErrUnavailable, errHeadless)
	}
	return nil
}

// watchLeader ends reigns. It looks at two things: etcd says when another leader
// is known, and only looking shows that there is none.
func (s *Store) watchLeader(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	changed := s.etcd.Server.LeaderChangedNotify()
	leader := s.Leader()
	var since time.Time // there is no leader
	for {
		select {
		case <-changed:
			changed = s.etcd.Server.LeaderChangedNotify()
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := s.Leader()
		s.reign.alone.Store(len(s.etcd.Server.Cluster().Members()) == 1)
		if now != 0 {
			since = time.Time{}
			s.setHeadless(false)
			if leader != 0 && now != leader {
				s.newReign(errLeaderChanged)
			}
			leader = now
			continue
		}
		if since.IsZero() {
			since = time.Now()
		}
		if time.Since(since) > headlessAfter && s.setHeadless(true) {
			s.log.Warn("store: no leader is in reach; requests are refused until one is", "for", time.Since(since).Round(time.Millisecond))
			s.newReign(errHeadless)
		}
	}
}

func (s *Store) setHeadless(is bool) (changed bool) {
	s.reign.mu.Lock()
	defer s.reign.mu.Unlock()
	changed = s.reign.headless != is
	s.reign.headless = is
	return changed
}

func (s *Store) newReign(why error) {
	s.reign.mu.Lock()
	defer s.reign.mu.Unlock()
	end := s.reign.end
	time.AfterFunc(lateAnswers, func() { end(why) })
	s.reign.ctx, s.reign.end = context.WithCancelCause(s.closing)
}

// Led tells whether a leader is in reach.
func (s *Store) Led() bool {
	s.reign.mu.Lock()
	defer s.reign.mu.Unlock()
	return !s.reign.headless && s.Leader() != 0
}
