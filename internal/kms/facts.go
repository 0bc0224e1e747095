package kms

import (
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// Facts are what can be measured of a KMS at one instant, as this member has it.
// They cost little however many keys there are.
type Facts struct {
	Locked      bool
	Quarantined bool // restored from a backup, and not released yet
	Instances   []InstanceFacts
	Audit       AuditStatus
	Store       store.Health
}

// InstanceFacts are those of an open instance.
type InstanceFacts struct {
	ID      string
	Keys    map[string]int // by state
	Clients []ClientFacts
}

// ClientFacts are those of a client certificate.
type ClientFacts struct {
	Name, Fingerprint string
	Ends              time.Time
}

// Facts returns what can be measured now.
func (k *KMS) Facts() (Facts, error) {
	f := Facts{Store: k.store.Health()}
	var err error
	if f.Audit, err = k.AuditStatus(); err != nil {
		return f, err
	}
	select {
	case <-k.unlocked:
	default:
		f.Locked = true
	}
	f.Quarantined = k.admitted() != nil
	for _, i := range k.open() {
		x := InstanceFacts{ID: i.id, Keys: map[string]int{}}
		for s := kmip.StatePreActive; s <= kmip.StateDestroyedCompromised; s++ {
			x.Keys[stateName(s)] = i.objects.Count(store.IndexTerm{Kind: termState, Value: []byte{byte(s)}})
		}
		for _, c := range i.clients.Cached() {
			x.Clients = append(x.Clients, ClientFacts{c.Value.Name, c.Value.Fingerprint, c.Value.Ends()})
		}
		f.Instances = append(f.Instances, x)
	}
	return f, nil
}

// A Reason is why a member should not be given requests.
type Reason struct {
	Check  string `json:"check"`
	Reason string `json:"reason"`
}

// Unready lists all that keeps this member from serving: nothing, if it serves.
func (k *KMS) Unready() []Reason {
	list := []Reason{}
	add := func(check string, err error) {
		if err != nil {
			list = append(list, Reason{check, err.Error()})
		}
	}
	select {
	case <-k.unlocked:
	default:
		add("lock", ErrLocked)
	}
	if !k.store.Health().HasLeader {
		add("cluster", fmt.Errorf("kms: %w: no majority of the cluster is in reach", store.ErrUnavailable))
	}
	add("clock", k.clock.Err())
	add("audit", k.AuditReady())
	if err := k.admitted(); errors.Is(err, ErrQuarantined) {
		add("quarantine", err)
	}
	return list
}
