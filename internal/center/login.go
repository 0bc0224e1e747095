package center

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// Login opens a session. The fault InvalidLogin says nothing of what was wrong.
func (c *Center) Login(ctx context.Context, user, password, userAgent, address string) (*Session, error) {
	s, err := c.authz.Login(ctx, user, password, userAgent, address)
	if errors.Is(err, authz.ErrBadCredentials) {
		c.loginFailed(ctx, trim(user, 128), address)
		return nil, fault(task.InvalidLogin, "wrong user name or password").Because(err)
	}
	if err != nil {
		return nil, err
	}
	c.events.Post(ctx, Event{Type: event.LoginSuccess, User: s.Principal.User, Entity: inventory.RootFolder,
		Message: "User " + s.Principal.User + " logged in from " + address + " as " + trim(userAgent, 100)})
	return s, nil
}

// failedLogins counts the failed logins since the last event that told of them.
type failedLogins struct {
	mu   sync.Mutex
	n    int
	last time.Time
}

// failedLoginsEvery is how often failed logins make an event: anybody can fail,
// and must not push out of the list what else happened.
const failedLoginsEvery = 10 * time.Second

func (c *Center) loginFailed(ctx context.Context, user, address string) {
	c.log.Warn("login failed", "user", user, "address", address)
	f := &c.failedLogins
	f.mu.Lock()
	f.n++
	n, now := f.n, c.now()
	tell := now.Sub(f.last) >= failedLoginsEvery
	if tell {
		f.n, f.last = 0, now
	}
	f.mu.Unlock()
	if tell {
		c.events.Post(ctx, Event{Type: event.LoginFailure, Severity: event.Warning, User: user, Entity: inventory.RootFolder,
			Message: fmt.Sprintf("Login of %q from %s failed; %d logins failed since the last such event", user, address, n)})
	}
}

// Session finds the session of a token, and counts as a use of it.
func (c *Center) Session(token string) (*Session, bool) { return c.authz.Session(token) }

// Sessions lists the live sessions, without their tokens.
func (c *Center) Sessions() []Session { return c.authz.Sessions() }

// Logout ends the session of a token.
func (c *Center) Logout(token string) { c.authz.Logout(token) }

// Authority knows users, roles and permissions; who changes them through it has
// been checked before.
func (c *Center) Authority() *authz.Authority { return c.authz }

func trim(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}
