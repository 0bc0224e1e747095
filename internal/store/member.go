package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver"
)

// Peers is what a member of a cluster needs to reach the others. TLS between
// members ends outside the store: what listens for them checks who they are and
// passes raft's connections on to Socket ([Store.DialPeer]). Calls to others are
// etcd's own, by TLS with the certificate below.
type Peers struct {
	// URL is where the other members reach this one: https://host:port.
	URL string
	// Socket is the unix socket that etcd listens on, in a folder of mode 0700:
	// whoever can connect to it is a member.
	Socket string
	// Certificate is a PEM file with this member's certificate and its key, mode
	// 0600; it is read anew for each connection, so that it can be renewed. CA is
	// the file with the certificate of the members' CA.
	Certificate, CA string
	// Join holds the URLs of all members by name, this one's too, when a new
	// member joins them; nil makes a new cluster. It counts at the first start
	// only: afterwards the folder knows its cluster.
	Join map[string]string
	// Removed asks the other members, by name and URL, whether they have removed
	// this one. It is asked while the store waits for a majority: a member that
	// went before its own log had its removal would wait for ever. Nil: not asked.
	Removed func(ctx context.Context, others map[string]string) bool
}

// PeerHost is the DNS name in every peer certificate. Members are found by
// address, which changes; they are known by the CA that is theirs alone.
const PeerHost = "peer.kms.mortise.internal"

var (
	// ErrNotCaughtUp: a learner cannot be promoted yet.
	ErrNotCaughtUp = errors.New("the new member has not caught up yet")
	// ErrUnhealthy: the change of members would endanger the majority.
	ErrUnhealthy = errors.New("too few members are up for this change")
	// ErrMemberExists: another member has this address.
	ErrMemberExists = errors.New("there is a member with this address already")
	// ErrOneAtATime: another new member has not been promoted yet.
	ErrOneAtATime = errors.New("another new member is joining; wait until it is promoted, or remove it")
	// ErrUnknownMember: no member has this id.
	ErrUnknownMember = errors.New("no such member")
	// ErrRemoved: this member was removed from its cluster.
	ErrRemoved = errors.New("this member was removed from its cluster: to come back it must join with an empty state folder and a new token")
	// ErrLastMember: a cluster keeps one voting member.
	ErrLastMember = errors.New("the last voting member cannot be removed")
)

// A Member is one of a cluster, as all members agree on it.
type Member struct {
	ID      uint64
	Name    string // empty until it has started for the first time
	URL     string
	Learner bool // it receives everything and does not vote
	Leader  bool
	Self    bool
}

// IDString prints a member's or cluster's id as etcd does, in hexadecimal.
func IDString(id uint64) string { return types.ID(id).String() }

// ID returns this member's id and its cluster's; they never change.
func (s *Store) ID() (member, cluster uint64) {
	return uint64(s.etcd.Server.MemberID()), uint64(s.etcd.Server.Cluster().ID())
}

// Leader returns the id of the leader, 0 if none is known.
func (s *Store) Leader() uint64 { return uint64(s.etcd.Server.Leader()) }

// Learner tells whether this member does not vote yet. One that was removed is
// no learner.
func (s *Store) Learner() bool {
	m := s.etcd.Server.Cluster().Member(s.etcd.Server.MemberID())
	return m != nil && m.IsLearner
}

// Stopped returns a channel that is closed when etcd has ended without being
// told to, which is what a removed member's does.
func (s *Store) Stopped() <-chan struct{} { return s.etcd.Server.StopNotify() }

// DialPeer connects to etcd's peer socket, for a connection whose other side has
// proven to be a member.
func DialPeer(ctx context.Context, socket string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", socket)
}

// Members lists the members, linearizably, by name.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	answer, err := s.client.MemberList(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: listing members: %w", fromEtcd(err))
	}
	return s.members(answer.Members), nil
}

// LocalMembers lists the members as this one knows them, without asking anybody.
func (s *Store) LocalMembers() []Member {
	var list []*etcdserverpb.Member
	for _, m := range s.etcd.Server.Cluster().Members() {
		list = append(list, &etcdserverpb.Member{ID: uint64(m.ID), Name: m.Name, PeerURLs: m.PeerURLs, IsLearner: m.IsLearner})
	}
	return s.members(list)
}

func (s *Store) members(all []*etcdserverpb.Member) []Member {
	self, _ := s.ID()
	leader := s.Leader()
	list := make([]Member, 0, len(all))
	for _, m := range all {
		list = append(list, Member{
			ID: m.ID, Name: m.Name, URL: strings.Join(m.PeerURLs, ","),
			Learner: m.IsLearner, Leader: m.ID == leader, Self: m.ID == self,
		})
	}
	slices.SortFunc(list, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// AddLearner makes room for a new member that will be reached at url, and
// returns it with all members. If it is there already and has not started,
// it is returned again.
func (s *Store) AddLearner(ctx context.Context, url string) (Member, []Member, error) {
	now, err := s.Members(ctx)
	if err != nil {
		return Member{}, nil, err
	}
	for _, m := range now {
		switch {
		case m.URL == url && m.Name == "" && m.Learner:
			return m, now, nil
		case m.URL == url:
			return Member{}, nil, fmt.Errorf("store: adding a member at %s: %w", url, ErrMemberExists)
		}
	}
	answer, err := s.client.MemberAddAsLearner(ctx, []string{url})
	if err != nil {
		return Member{}, nil, fmt.Errorf("store: adding a member at %s: %w", url, fromMembership(err))
	}
	return s.members([]*etcdserverpb.Member{answer.Member})[0], s.members(answer.Members), nil
}

// Promote lets a learner vote. ErrNotCaughtUp says to try again later.
func (s *Store) Promote(ctx context.Context, id uint64) error {
	_, err := s.client.MemberPromote(ctx, id)
	if err != nil && !errors.Is(err, rpctypes.ErrMemberNotLearner) {
		return fmt.Errorf("store: promoting member %s: %w", IDString(id), fromMembership(err))
	}
	return nil
}

// RemoveMember ends a member's part in the cluster for good. A leader gives the
// lead away first, so that removing it stops nobody.
func (s *Store) RemoveMember(ctx context.Context, id uint64) error {
	list, err := s.Members(ctx)
	if err != nil {
		return err
	}
	voters := 0
	for _, m := range list {
		if !m.Learner {
			voters++
		}
	}
	at := slices.IndexFunc(list, func(m Member) bool { return m.ID == id })
	switch {
	case at < 0:
		return fmt.Errorf("store: removing member %s: %w", IDString(id), ErrUnknownMember)
	case voters == 1 && !list[at].Learner:
		return fmt.Errorf("store: removing member %s: %w", IDString(id), ErrLastMember)
	}
	if list[at].Self {
		if err := s.YieldLead(); err != nil {
			return err
		}
	}
	if _, err := s.client.MemberRemove(ctx, id); err != nil {
		return fmt.Errorf("store: removing member %s: %w", IDString(id), fromMembership(err))
	}
	return nil
}

// SetURL changes where a member is reached.
func (s *Store) SetURL(ctx context.Context, id uint64, url string) error {
	if _, err := s.client.MemberUpdate(ctx, id, []string{url}); err != nil {
		return fmt.Errorf("store: changing the address of member %s: %w", IDString(id), fromMembership(err))
	}
	return nil
}

// YieldLead gives the lead to another member if this one has it and there is
// another. Without it, what comes after would stop writes for an election.
func (s *Store) YieldLead() error {
	if err := s.etcd.Server.TryTransferLeadershipOnShutdown(); err != nil {
		return fmt.Errorf("store: moving the lead to another member: %w", err)
	}
	return nil
}

// publishURL brings the membership up to date with cfg: a member that began
// alone had no address, and addresses change.
func (s *Store) publishURL(ctx context.Context, url string) {
	for self := uint64(s.etcd.Server.MemberID()); ctx.Err() == nil; {
		m := s.etcd.Server.Cluster().Member(types.ID(self))
		if m == nil || len(m.PeerURLs) == 1 && m.PeerURLs[0] == url {
			return
		}
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := s.SetURL(try, self, url)
		cancel()
		if err == nil {
			return
		}
		s.log.Warn("store could not publish this member's address; trying again", "url", url, "error", err)
		select {
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
		}
	}
}

func fromMembership(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrMemberLearnerNotReady), errors.Is(err, rpctypes.ErrGRPCLearnerNotReady):
		return fmt.Errorf("%w: %w", ErrNotCaughtUp, err)
	case errors.Is(err, rpctypes.ErrUnhealthy), errors.Is(err, rpctypes.ErrGRPCUnhealthy),
		errors.Is(err, rpctypes.ErrMemberNotEnoughStarted), errors.Is(err, rpctypes.ErrGRPCMemberNotEnoughStarted):
		return fmt.Errorf("%w: %w", ErrUnhealthy, err)
	case errors.Is(err, rpctypes.ErrTooManyLearners), errors.Is(err, rpctypes.ErrGRPCTooManyLearners):
		return fmt.Errorf("%w: %w", ErrOneAtATime, err)
	case errors.Is(err, rpctypes.ErrPeerURLExist), errors.Is(err, rpctypes.ErrGRPCPeerURLExist):
		return fmt.Errorf("%w: %w", ErrMemberExists, err)
	case errors.Is(err, rpctypes.ErrMemberNotFound), errors.Is(err, rpctypes.ErrGRPCMemberNotFound):
		return fmt.Errorf("%w: %w", ErrUnknownMember, err)
	}
	return fromEtcd(err)
}

// settleTime is how long a new member must have been connected before the
// members may change again.
const settleTime = etcdserver.HealthInterval

// RetryMembership tells whether a refused change of members may work by itself
// a little later, and how long to wait.
func RetryMembership(err error) (time.Duration, bool) {
	if errors.Is(err, ErrUnhealthy) || errors.Is(err, ErrNotCaughtUp) || errors.Is(err, ErrUnavailable) {
		return settleTime / 10, true
	}
	return 0, false
}
