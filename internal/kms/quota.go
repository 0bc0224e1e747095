package kms

import (
	"fmt"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
)

// A Quota bounds what the clients of one instance may take; 0 is no bound.
type Quota struct {
	// Objects that are not destroyed. Creates that run at the same moment may
	// exceed it by their number.
	Objects int `json:"objects,omitempty" doc:"objects that are not destroyed; 0: no bound"`
	Clients int `json:"clients,omitempty" doc:"client certificates; 0: no bound"`
	// RequestsPerSecond are KMIP operations, on each member; for a second they
	// may come all at once.
	RequestsPerSecond int `json:"requestsPerSecond,omitempty" doc:"KMIP operations a second, on each member; 0: no bound"`
}

func (q Quota) check() error {
	if q.Objects < 0 || q.Clients < 0 || q.RequestsPerSecond < 0 {
		return fmt.Errorf("kms: %w: a quota is a positive number, or 0 for none", ErrInvalid)
	}
	return nil
}

// roomForObject refuses an operation that makes an object when there are as many
// as the quota has.
func (s *Session) roomForObject(op kmip.Operation) error {
	switch op {
	case kmip.OperationCreate, kmip.OperationRegister, kmip.OperationReKey, kmip.OperationDeriveKey, kmip.OperationImport:
	default:
		return nil
	}
	if s.quota.Objects == 0 || s.inst.live() < s.quota.Objects {
		return nil
	}
	return &Error{kmip.ResultReasonPermissionDenied, fmt.Sprintf("instance %s has reached its quota of %d objects; its administrator can raise it, or destroy what is no longer needed", s.Instance, s.quota.Objects), ErrQuota}
}

// roomForClient is the same for client certificates.
func (i *instance) roomForClient(q Quota) error {
	if q.Clients == 0 || i.clients.Count() < q.Clients {
		return nil
	}
	return fmt.Errorf("kms: %w: instance %s may have %d client certificates; revoke one that is no longer needed", ErrQuota, i.id, q.Clients)
}

// pace refuses an operation when the instance's clients send more than their
// quota has.
func (s *Session) pace() error {
	if s.quota.RequestsPerSecond == 0 || s.inst.pace.take(s.quota.RequestsPerSecond, time.Now()) {
		return nil
	}
	return &Error{kmip.ResultReasonGeneralFailure, fmt.Sprintf("instance %s has reached its quota of %d requests a second; try again", s.Instance, s.quota.RequestsPerSecond), ErrQuota}
}

// bucket is a token bucket that holds a second's worth.
type bucket struct {
	mu     sync.Mutex
	tokens float64
	filled time.Time
}

func (b *bucket) take(perSecond int, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	rate := float64(perSecond)
	if b.filled.IsZero() {
		b.tokens = rate
	} else if gone := now.Sub(b.filled); gone > 0 {
		b.tokens = min(rate, b.tokens+gone.Seconds()*rate)
	}
	b.filled = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
