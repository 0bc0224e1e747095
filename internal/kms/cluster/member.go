package cluster

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/store"
)

// memberRecord is what the members know of one beside etcd's own list. The list
// of these records is who may connect.
type memberRecord struct {
	ID      uint64 // etcd's
	Address string // host:port
	Added   time.Time
	// Format is the highest record format that the member's program knows.
	Format  int
	Version string // of the program, for people
}

// A Member is one of the cluster as administrators see it.
type Member struct {
	Name    string    `json:"name"`
	ID      string    `json:"id"` // etcd's, hexadecimal
	Address string    `json:"address,omitempty"`
	Status  string    `json:"status"` // "leader", "follower", "learner", "joining"
	Self    bool      `json:"self,omitempty"`
	Added   time.Time `json:"added"`
	Version string    `json:"version,omitempty"`
	Format  int       `json:"format,omitempty"`
}

// state is the cluster's collections, once the store is open. None is sealed:
// a locked member must know its peers.
type state struct {
	members   *store.Collection[memberRecord]
	tokens    *store.Collection[pki.JoinRecord]
	authority *store.Collection[authorityRecord]
	format    *store.Collection[int]
}

func openState(ctx context.Context, s *store.Store) (*state, error) {
	st := &state{}
	var err error
	if st.members, err = store.NewCollection(ctx, s, "member", store.JSON[memberRecord](1)); err != nil {
		return nil, err
	}
	if st.tokens, err = store.NewCollection(ctx, s, "join-token", store.JSON[pki.JoinRecord](1)); err != nil {
		return nil, err
	}
	if st.authority, err = store.NewCollection(ctx, s, "peer-authority", store.JSON[authorityRecord](1)); err != nil {
		return nil, err
	}
	st.format, err = store.NewCollection(ctx, s, "format", store.JSON[int](1))
	return st, err
}

func (s *state) close() {
	s.members.Close()
	s.tokens.Close()
	s.authority.Close()
	s.format.Close()
}

// attached returns the state, or an error while the member starts.
func (n *Node) attached() (*state, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.state == nil {
		return nil, fmt.Errorf("cluster: this member is still starting: %w", store.ErrUnavailable)
	}
	return n.state, nil
}

// Members lists the members, linearizably, by name.
func (n *Node) Members(ctx context.Context) ([]Member, error) {
	st, err := n.attached()
	if err != nil {
		return nil, err
	}
	raft, err := n.store.Members(ctx)
	if err != nil {
		return nil, err
	}
	entries, err := st.members.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	list := []Member{}
	for _, e := range entries {
		r := e.Value
		m := Member{Name: e.Key, ID: store.IDString(r.ID), Address: r.Address, Added: r.Added, Version: r.Version, Format: r.Format, Status: "joining"}
		for _, x := range raft {
			if x.ID != r.ID {
				continue
			}
			m.Self = x.Self
			switch {
			case x.Leader:
				m.Status = "leader"
			case x.Name == "":
			case x.Learner:
				m.Status = "learner"
			default:
				m.Status = "follower"
			}
		}
		list = append(list, m)
	}
	// A joiner that was lost between etcd's list and this one has no name.
	for _, x := range raft {
		if !slices.ContainsFunc(entries, func(e store.Entry[memberRecord]) bool { return e.Value.ID == x.ID }) {
			list = append(list, Member{ID: store.IDString(x.ID), Address: strings.TrimPrefix(x.URL, "https://"), Status: "joining", Self: x.Self})
		}
	}
	return list, nil
}

// Alone tells whether it is certain that there is no other member.
func (n *Node) Alone(ctx context.Context) bool {
	list, err := n.Members(ctx)
	return err == nil && len(list) == 1
}

// Invite makes a token with which a new member of that name can join, for the
// given life.
func (n *Node) Invite(ctx context.Context, name string, life time.Duration) (Token, error) {
	if err := identity(name).Check(); err != nil {
		return Token{}, fmt.Errorf("cluster: %w: %w", ErrInvalid, err)
	}
	if life == 0 {
		life = TokenLife
	}
	if life < time.Minute || life > MaxTokenLife {
		return Token{}, fmt.Errorf("cluster: %w: a join token lives a minute to %v, not %v", ErrInvalid, MaxTokenLife, life)
	}
	st, err := n.attached()
	if err != nil {
		return Token{}, err
	}
	list, err := n.Members(ctx)
	if err != nil {
		return Token{}, err
	}
	t := Token{}
	for _, m := range list {
		if m.Name == name {
			return Token{}, fmt.Errorf("cluster: %w: %s; remove it first, or choose another name", ErrMemberExists, name)
		}
		if m.Address != "" && m.Status != "joining" && len(t.Addresses) < maxAddresses {
			t.Addresses = append(t.Addresses, m.Address)
		}
	}
	n.mu.Lock()
	self := n.address
	n.mu.Unlock()
	if self == "" {
		return Token{}, fmt.Errorf("cluster: %w; give it one: mortise kms member add %s --address HOST:%d", ErrNoAddress, name, Port)
	}
	// The one that was asked comes first: it is up.
	t.Addresses = append([]string{self}, slices.DeleteFunc(t.Addresses, func(a string) bool { return a == self })...)
	ca, err := n.authority(ctx) // also seals it, if this is the first member to come
	if err != nil {
		return Token{}, err
	}
	if t.JoinToken, err = pki.NewJoinToken(identity(name), ca.Certificate(), life, n.now()); err != nil {
		return Token{}, err
	}
	r := t.Record()
	if err := n.kms.CommitAct(ctx, "member invite", name, st.tokens.Create(hex.EncodeToString(r.SecretHash), r)); err != nil {
		return Token{}, fmt.Errorf("cluster: keeping the join token: %w", err)
	}
	n.log.Info("join token made", "member", name, "until", t.Expires)
	return t, nil
}

// Remove ends a member's part in the cluster: it votes no more, its certificate
// is refused, tokens for its name are void. One without a name is removed by its
// id.
func (n *Node) Remove(ctx context.Context, name string) error {
	st, err := n.attached()
	if err != nil {
		return err
	}
	e, err := st.members.Get(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		if id, nameless := n.nameless(ctx, name); nameless {
			return retry(ctx, func() error { return n.store.RemoveMember(ctx, id) })
		}
		return fmt.Errorf("cluster: %w: %q; see: mortise kms member ls", ErrUnknownMember, short(name))
	}
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	// The record goes last: as long as it is there, a removal that was interrupted
	// can be repeated by name.
	err = retry(ctx, func() error {
		err := n.store.RemoveMember(ctx, e.Value.ID)
		if errors.Is(err, store.ErrUnknownMember) {
			return nil // a removal that was interrupted here
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("cluster: removing member %s: %w", name, err)
	}
	ops := []store.Op{st.members.Delete(name, 0)}
	tokens, err := st.tokens.List(ctx, "")
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	for _, t := range tokens {
		if t.Value.ID.Name == name {
			ops = append(ops, st.tokens.Delete(t.Key, 0))
		}
	}
	if err := n.kms.CommitAct(ctx, "member remove", name, ops...); err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("cluster: removing member %s: %w", name, err)
	}
	n.log.Info("member removed", "member", name, "id", store.IDString(e.Value.ID))
	return nil
}

// nameless finds a member that only etcd's list has, by its id in hexadecimal.
func (n *Node) nameless(ctx context.Context, id string) (uint64, bool) {
	list, err := n.Members(ctx)
	if err != nil {
		return 0, false
	}
	for _, m := range list {
		if m.Name == "" && m.ID == id {
			number, err := strconv.ParseUint(id, 16, 64)
			return number, err == nil
		}
	}
	return 0, false
}

// Promote lets a learner vote as soon as it has caught up. New members do it by
// themselves; this is for who will not wait.
func (n *Node) Promote(ctx context.Context, name string) error {
	st, err := n.attached()
	if err != nil {
		return err
	}
	e, err := st.members.Get(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("cluster: %w: %q; see: mortise kms member ls", ErrUnknownMember, short(name))
	}
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	return n.store.Promote(ctx, e.Value.ID)
}

// retry repeats a change of members that etcd refuses for the moment.
func retry(ctx context.Context, f func() error) error {
	for {
		err := f()
		wait, again := store.RetryMembership(err)
		if err == nil || !again {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return err
		}
	}
}

// Attach begins this member's part once the store is open: it makes itself known,
// follows who the members are, and becomes a voting member when it has caught up.
func (n *Node) Attach(ctx context.Context, s *store.Store, k *kms.KMS) error {
	st, err := openState(ctx, s)
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	n.mu.Lock()
	n.state, n.store, n.kms = st, s, k
	n.mu.Unlock()
	if err := n.checkFormat(ctx, st); err != nil {
		return err
	}
	if err := n.recordRootKey(ctx, st); err != nil {
		return err
	}
	w := s.Watch("member", "format") // from here, so that no change is missed
	if err := n.register(ctx); err != nil {
		w.Close()
		return err
	}
	if err := n.look(ctx, st); err != nil {
		w.Close()
		return err
	}
	n.done.Go(func() { n.follow(st, w) })
	n.done.Go(func() { n.compareClocks() })
	n.done.Go(func() { n.tend() })
	n.done.Go(func() { s.Lead(n.run, "format", n.raiseFormat) })
	return nil
}

// checkFormat refuses to take part with a program that cannot read what the
// others write.
func (n *Node) checkFormat(ctx context.Context, st *state) error {
	e, err := st.format.Get(ctx, formatKey)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("cluster: %w", err)
	}
	if e.Value > n.Format {
		return fmt.Errorf("cluster: %w: records are written in format %d, this program knows %d; install the version that the other members run", ErrTooOld, e.Value, n.Format)
	}
	return nil
}

// register writes this member's own record.
func (n *Node) register(ctx context.Context) error {
	n.mu.Lock()
	st, address := n.state, n.address
	n.mu.Unlock()
	id, _ := n.store.ID()
	var first time.Time
	_, err := st.members.Edit(ctx, n.Name, func(r *memberRecord) error {
		if r.ID != id {
			return fmt.Errorf("cluster: the list of members has another machine as %s: %w", n.Name, store.ErrRemoved)
		}
		r.Address, r.Format, r.Version = address, n.Format, n.Version
		return nil
	})
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	list, err := st.members.List(ctx, "")
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if len(list) > 0 { // it was in the list when it joined
		return fmt.Errorf("cluster: %s is not in the list of members: %w", n.Name, store.ErrRemoved)
	}
	n.mu.Lock()
	first = n.names[n.Name]
	n.mu.Unlock()
	_, err = n.store.Commit(ctx, st.members.Create(n.Name, memberRecord{ID: id, Address: address, Added: first, Format: n.Format, Version: n.Version}))
	if err != nil {
		return fmt.Errorf("cluster: making itself known: %w", err)
	}
	return nil
}

// look takes over the list of members and the format as they are now.
func (n *Node) look(ctx context.Context, st *state) error {
	entries, err := st.members.List(ctx, "")
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	names := map[string]time.Time{}
	for _, e := range entries {
		names[e.Key] = e.Value.Added
	}
	n.setNames(names)
	if f, ok := st.format.Peek(formatKey); ok {
		n.kms.SetFormat(f.Value)
	}
	return nil
}

func (n *Node) follow(st *state, w *store.Watcher) {
	defer w.Close()
	for n.run.Err() == nil {
		if _, err := w.Next(n.run); err != nil {
			return
		}
		for n.run.Err() == nil {
			ctx, cancel := context.WithTimeout(n.run, 10*time.Second)
			err := n.look(ctx, st)
			cancel()
			if err == nil {
				break
			}
			n.pause(time.Second)
		}
	}
}

// tend does what is to be done now and then.
func (n *Node) tend() {
	for n.run.Err() == nil {
		ctx, cancel := context.WithTimeout(n.run, 30*time.Second)
		if n.store.Learner() {
			self, _ := n.store.ID()
			if err := n.store.Promote(ctx, self); err == nil {
				n.log.Info("this member has caught up and votes", "member", n.Name)
			} else if !errors.Is(err, store.ErrNotCaughtUp) {
				n.log.Warn("this member does not vote yet", "error", err)
			}
		}
		if err := n.renew(ctx); err != nil {
			n.log.Warn("peer certificate", "error", err)
		}
		if err := n.keepAuthority(ctx); err != nil && ctx.Err() == nil {
			n.log.Warn("the peers' CA is not kept yet; trying again", "error", err)
		}
		n.dropTokens(ctx)
		cancel()
		n.pause(n.every)
	}
}

func (n *Node) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-n.run.Done():
	}
}

// dropTokens deletes the records of tokens whose time is long over.
func (n *Node) dropTokens(ctx context.Context) {
	n.mu.Lock()
	st := n.state
	n.mu.Unlock()
	if st == nil {
		return
	}
	entries, err := st.tokens.List(ctx, "")
	if err != nil {
		return
	}
	for _, e := range entries {
		if n.now().After(e.Value.Expires.Add(MaxTokenLife)) {
			_, _ = n.store.Commit(ctx, st.tokens.Delete(e.Key, e.Revision)) // or another member did, or the next round does
		}
	}
}
