package admin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/cluster"
	"mortise/internal/store"
)

// The members of the cluster and its time: /v1/members, /v1/clock.

func memberRows() []row {
	const list, one = "/v1/members", "/v1/members/{member}"
	return []row{
		get(list, kms.RoleViewer, "List the members of the cluster", func(c *call) ([]cluster.Member, error) {
			n, err := c.node()
			if err != nil {
				return nil, err
			}
			return n.Members(c)
		}),
		send(http.MethodPost, list, kms.RoleAdministrator, "Make a token with which a new member joins", inviteMember).onSocket(),
		act(http.MethodDelete, one, kms.RoleAdministrator, "Remove a member for good", func(c *call) (done, error) {
			n, err := c.node()
			if err != nil {
				return done{}, err
			}
			return done{}, asMembership(n.Remove(c, c.path("member")))
		}).onSocket(),
		act(http.MethodPost, one+"/promote", kms.RoleAdministrator, "Let a member vote that has caught up", func(c *call) (done, error) {
			n, err := c.node()
			if err != nil {
				return done{}, err
			}
			return done{}, asMembership(n.Promote(c, c.path("member")))
		}).onSocket(),
		get("/v1/clock", kms.RoleViewer, "Show the cluster's time and how this member's clock stands", func(c *call) (kms.ClockStatus, error) {
			return c.KMS.Clock().Status(), nil
		}),
		act(http.MethodPost, "/v1/clock/confirm", kms.RoleAdministrator, "Make this machine's clock the cluster's time after a jump", func(c *call) (kms.ClockStatus, error) {
			if _, err := c.KMS.ConfirmClock(c, c.actor); err != nil {
				return kms.ClockStatus{}, err
			}
			return c.KMS.Clock().Status(), nil
		}).onSocket(),
	}
}

// node is the cluster's part, which a KMS in a test may lack.
func (c *call) node() (*cluster.Node, error) {
	if c.Cluster == nil {
		return nil, fmt.Errorf("%w: this server is not set up to have other members", kms.ErrInvalid)
	}
	return c.Cluster, nil
}

// InviteMember asks for a join token.
type InviteMember struct {
	Name    string `json:"name" doc:"the new member's name: letters, digits, '.', '_', '-'"`
	Minutes int    `json:"minutes,omitempty" doc:"how long the token lives; 60 unless given, at most 1440"`
	// Address and Listen are for a member that has begun alone and has no
	// address for others yet.
	Address string `json:"address,omitempty" doc:"where others reach the member that is asked, host:port, if it has no address yet"`
	Listen  string `json:"listen,omitempty" doc:"what it listens on; every interface unless given"`
}

// Invitation is a join token. It is a secret until it is used.
type Invitation struct {
	Name    string    `json:"name"`
	Token   string    `json:"token" doc:"for mortise kms serve --join"`
	Expires time.Time `json:"expires"`
}

func inviteMember(c *call, r InviteMember) (i Invitation, err error) {
	n, err := c.node()
	if err != nil {
		return i, err
	}
	if r.Address != "" {
		if err := n.SetAddress(c, r.Address, r.Listen); err != nil {
			return i, asMembership(err)
		}
	}
	t, err := n.Invite(c, r.Name, time.Duration(r.Minutes)*time.Minute)
	if err != nil {
		return i, asMembership(err)
	}
	return Invitation{r.Name, t.Text(), t.Expires}, nil
}

// asMembership gives the cluster's errors the kinds that classify knows.
func asMembership(err error) error {
	kind := func(k error) error { return fmt.Errorf("%w: %w", k, err) }
	switch {
	case err == nil:
		return nil
	case errors.Is(err, cluster.ErrInvalid), errors.Is(err, cluster.ErrNoAddress), errors.Is(err, store.ErrLastMember):
		return kind(kms.ErrInvalid)
	case errors.Is(err, cluster.ErrUnknownMember), errors.Is(err, store.ErrUnknownMember):
		return kind(store.ErrNotFound)
	case errors.Is(err, cluster.ErrMemberExists), errors.Is(err, store.ErrMemberExists), errors.Is(err, store.ErrOneAtATime), errors.Is(err, store.ErrNotCaughtUp):
		return kind(store.ErrConflict)
	case errors.Is(err, cluster.ErrLocked):
		return kind(kms.ErrLocked)
	case errors.Is(err, store.ErrUnhealthy):
		return kind(store.ErrUnavailable)
	}
	return err
}

// Members lists the members of the cluster.
func (c *Client) Members(ctx context.Context) (list []cluster.Member, err error) {
	err = c.call(ctx, http.MethodGet, at("members"), nil, nil, &list)
	return list, err
}

// InviteMember makes a join token.
func (c *Client) InviteMember(ctx context.Context, r InviteMember) (i Invitation, err error) {
	err = c.call(ctx, http.MethodPost, at("members"), nil, r, &i)
	return i, err
}

// RemoveMember removes a member for good.
func (c *Client) RemoveMember(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("members", name), nil, nil, &done{})
}

// PromoteMember lets a member vote that has caught up.
func (c *Client) PromoteMember(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodPost, at("members", name, "promote"), nil, nil, &done{})
}

// Clock shows the cluster's time.
func (c *Client) Clock(ctx context.Context) (s kms.ClockStatus, err error) {
	err = c.call(ctx, http.MethodGet, at("clock"), nil, nil, &s)
	return s, err
}

// ConfirmClock makes the server's clock the cluster's time.
func (c *Client) ConfirmClock(ctx context.Context) (s kms.ClockStatus, err error) {
	err = c.call(ctx, http.MethodPost, at("clock", "confirm"), nil, nil, &s)
	return s, err
}
