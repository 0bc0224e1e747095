package authz

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"sync"
	"time"

	"github.com/google/uuid"
)

const (
	// SessionIdle is how long a session lives unused.
	SessionIdle = 30 * time.Minute
	// maxSessions bounds the memory that sessions take; the one longest unused
	// goes.
	maxSessions = 10_000
)

// Session finds the session of a token and counts as a use of it.
func (a *Authority) Session(token string) (*Session, bool) { return a.sessions.use(token) }

// Logout ends the session of a token.
func (a *Authority) Logout(token string) { a.sessions.end(token) }

// Sessions lists the live sessions, without their tokens.
func (a *Authority) Sessions() []Session { return a.sessions.list() }

// sessions are in memory: after a restart of center, users log in again.
type sessions struct {
	clock func() time.Time
	mu    sync.Mutex
	live  map[string]*Session // by token
}

func (s *sessions) init(clock func() time.Time) { s.clock, s.live = clock, map[string]*Session{} }

func (s *sessions) open(p Principal, fullName, userAgent, address string) (*Session, error) {
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	now := s.clock()
	n := &Session{
		Token: base64.RawURLEncoding.EncodeToString(b), Key: uuid.NewString(), Principal: p, FullName: fullName,
		LoginTime: now, LastActive: now, UserAgent: userAgent, Address: address,
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var oldest *Session
	for token, other := range s.live {
		switch {
		case now.Sub(other.LastActive) > SessionIdle:
			delete(s.live, token)
		case oldest == nil || other.LastActive.Before(oldest.LastActive):
			oldest = other
		}
	}
	if len(s.live) >= maxSessions {
		delete(s.live, oldest.Token)
	}
	s.live[n.Token] = n
	c := *n
	return &c, nil
}

func (s *sessions) use(token string) (*Session, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.live[token]
	if !ok {
		return nil, false
	}
	now := s.clock()
	if now.Sub(n.LastActive) > SessionIdle {
		delete(s.live, token)
		return nil, false
	}
	n.LastActive = now
	c := *n
	return &c, true
}

func (s *sessions) end(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, token)
}

func (s *sessions) endAll(user string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for token, n := range s.live {
		if n.Principal.User == user {
			delete(s.live, token)
		}
	}
}

func (s *sessions) list() []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Session
	for _, n := range s.live {
		if s.clock().Sub(n.LastActive) <= SessionIdle {
			c := *n
			c.Token = ""
			all = append(all, c)
		}
	}
	return all
}

const (
	freeGuesses = 3                // failures that cost nothing
	maxPenalty  = 16 * time.Second // before one more guess
	guessMemory = 15 * time.Minute // without a failure, after which all is forgotten
	maxGuessers = 10_000
)

// guesses slows down whoever keeps failing. It goes by user and address, so
// that a stranger who guesses does not lock the owner out.
type guesses struct {
	clock func() time.Time
	mu    sync.Mutex
	bad   map[guesser]failures
}

type guesser struct{ user, address string }

type failures struct {
	n    int
	last time.Time
}

func (g *guesses) init(clock func() time.Time) { g.clock, g.bad = clock, map[guesser]failures{} }

func (f failures) penalty() time.Duration {
	if f.n < freeGuesses {
		return 0
	}
	return min(maxPenalty, time.Second<<min(f.n-freeGuesses, 10))
}

// wait holds a guess back for what earlier failures earned it.
func (g *guesses) wait(ctx context.Context, user, address string) error {
	g.mu.Lock()
	f := g.bad[guesser{user, address}]
	d := f.penalty() - g.clock().Sub(f.last)
	g.mu.Unlock()
	if f.n == 0 || d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *guesses) failed(user, address string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.clock()
	if len(g.bad) >= maxGuessers {
		for who := range g.bad { // any one: an attacker with that many addresses is not slowed down by us
			delete(g.bad, who)
			break
		}
	}
	who := guesser{user, address}
	f := g.bad[who]
	if now.Sub(f.last) > guessMemory {
		f.n = 0
	}
	g.bad[who] = failures{f.n + 1, now}
}

func (g *guesses) succeeded(user, address string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.bad, guesser{user, address})
}

func (g *guesses) forget(user string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for who := range g.bad {
		if who.user == user {
			delete(g.bad, who)
		}
	}
}
