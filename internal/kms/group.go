package kms

import (
	"slices"
	"sync"

	"github.com/ovh/kmip-go"
)

// Object groups, KMIP 1.4 §3.33 and §4.9: Locate may ask for the members of a
// group that are fresh, which are told in the order in which they came, or for
// the default member. Which that is, is the server's to choose: here they take
// turns, at each member of the cluster by itself. Locate never makes an object.

// maxTurns is how many groups of an instance are remembered.
const maxTurns = 4096

// turns is which member of each group was the default last.
type turns struct {
	mu   sync.Mutex
	last map[string]string // by encoded Object Group
}

// next puts ids, the oldest first, in the order in which it is their turn.
func (t *turns) next(group string, ids []string) []string {
	if len(ids) == 0 {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	at := 0
	if last, ok := t.last[group]; ok {
		at = (slices.Index(ids, last) + 1) % len(ids) // one that is gone begins the round anew
	}
	if t.last == nil || len(t.last) >= maxTurns {
		t.last = map[string]string{}
	}
	t.last[group] = ids[at]
	return append(slices.Clone(ids[at:]), ids[:at]...)
}

// members picks those that ask for a group wants out of all that match, which
// come the newest first.
func (s *Session) members(ids []string, q Query, f filter) []string {
	slices.Reverse(ids)
	if q.Member == kmip.ObjectGroupMemberDefault {
		ids = s.inst.turns.next(f.group, ids)
	}
	ids = ids[min(int(q.Offset), len(ids)):]
	if q.Max > 0 {
		ids = ids[:min(int(q.Max), len(ids))]
	}
	return ids
}
