package store

import (
	"context"
	"fmt"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"
)

// officeTTL is how long an office stays with a member that has gone silent.
const officeTTL = 5 * time.Second

// A Term is the time for which this member holds an office. Revision grows with
// each term of the office, whoever holds it: what a holder commands carries it,
// and who obeys refuses a lower one.
type Term struct {
	Revision int64
	key      string
}

// Guard makes a transaction fail with ErrNotFound or ErrConflict once the term
// is over, even if the holder has not noticed yet.
func (t Term) Guard() Op { return Op{at: t.key, need: mustBeAt, rev: t.Revision} }

// Lead lets work run on one member of the cluster at a time: this one campaigns
// for the office and runs work whenever it is elected. work's context ends with
// the term; a work that returns resigns, and the campaign begins again. Lead
// returns when ctx ends.
func (s *Store) Lead(ctx context.Context, office string, work func(context.Context, Term) error) {
	for ctx.Err() == nil {
		err := s.leadOnce(ctx, office, work)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.log.Warn("store: term of office ended", "office", office, "error", err)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

func (s *Store) leadOnce(ctx context.Context, office string, work func(context.Context, Term) error) error {
	session, err := concurrency.NewSession(s.client, concurrency.WithTTL(int(officeTTL/time.Second)), concurrency.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	defer session.Close()
	term, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-session.Done(): // the lease ran out, or its renewal failed
			cancel()
		case <-term.Done():
		}
	}()
	e := concurrency.NewElection(session, "office/"+office)
	if err := e.Campaign(term, s.name); err != nil {
		return fmt.Errorf("campaigning: %w", err)
	}
	s.log.Debug("store: elected", "office", office, "term", e.Rev())
	err = work(term, Term{Revision: e.Rev(), key: e.Key()})
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer stop()
	if ctx.Err() == nil || s.closing.Err() == nil {
		_ = e.Resign(last) // or the lease runs out
	}
	return err
}
