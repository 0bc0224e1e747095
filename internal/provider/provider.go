// Package provider is the contract of a key provider: what center needs to have
// KEKs made, to fetch them again, and to know how the provider does. A standard
// provider is KMIP servers; native and trusted ones keep the same contract.
// [mortise/internal/provider/providertest] is the suite that each must pass.
//
// Place in the flow: level 2, between center and the providers' own means. It
// imports secret only.
package provider

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mortise/internal/secret"
)

// A Provider makes and keeps KEKs. Its methods may be called concurrently.
// Keys that they return are the caller's to wipe. No error holds key bytes.
type Provider interface {
	// ID is the provider's name, which every VM's keys carry (K6).
	ID() string

	Kind() Kind

	// NewKEK makes a KEK, Active and tagged, and returns its id and bytes.
	// operation is an id of the task's step, unique for ever: calling again
	// with the same one, after a lost answer or a crash, returns the same key
	// instead of making a second; if that key may no longer be used, the error
	// is a *StateError. A tag that the provider cannot keep does not fail it. A
	// failure may leave a key behind that nothing uses.
	NewKEK(ctx context.Context, operation string, tags ...Tag) (keyID string, kek *secret.Key, err error)

	// KEK fetches a KEK by id, to encrypt with it or to open what it wraps. A
	// Pre-Active key is activated first; a key in any other state than Active
	// is not fetched, and the error is a *StateError (K7). The state is that
	// of the key, also with an error; zero when it is not known.
	KEK(ctx context.Context, keyID string) (*secret.Key, State, error)

	// KeyState looks up a key's state without fetching or changing the key.
	KeyState(ctx context.Context, keyID string) (State, error)

	// ReadBack fetches a key from every server of the provider and compares
	// it with kek: only then may something old be thrown away that kek
	// replaces (design: shallow recrypt). The error matches ErrNotShared where
	// a server has no such key, or another one.
	ReadBack(ctx context.Context, keyID string, kek *secret.Key) error

	// TestSharing proves that the provider's servers share keys: a key made on
	// each is read back from each (K5). It leaves keys behind on servers that
	// do not let this client destroy them.
	TestSharing(ctx context.Context) error

	// Status asks every server how it does (K13).
	Status(ctx context.Context) Status

	// Close ends connections. Methods fail afterwards.
	Close()
}

// Kind of a provider, as vSphere's managementType says it.
type Kind string

// The kinds.
const (
	Standard Kind = "vCenter"
	Native   Kind = "nativeProvider"
	Trusted  Kind = "trustAuthority"
)

// A Tag is a custom attribute of a key, kept beside it: a name such as
// x-Vendor (KMIP 1.4 §3.39 wants x-) and a text.
type Tag struct {
	Name, Value string
}

// A State is where a key is in its life (KMIP 1.4 §3.22, after NIST SP 800-57).
type State int

// The states; their values are KMIP's.
const (
	PreActive State = iota + 1
	Active
	Deactivated
	Compromised
	Destroyed
	DestroyedCompromised
)

func (s State) String() string {
	switch s {
	case PreActive:
		return "Pre-Active"
	case Active:
		return "Active"
	case Deactivated:
		return "Deactivated"
	case Compromised:
		return "Compromised"
	case Destroyed:
		return "Destroyed"
	case DestroyedCompromised:
		return "Destroyed Compromised"
	}
	return fmt.Sprintf("unknown state %d", int(s))
}

// Usable says whether a key of this state may be fetched and used (K7): an
// Active one, and a Pre-Active one, which is activated first.
func (s State) Usable() bool { return s == PreActive || s == Active }

// What an error of a Provider is about; errors.Is tells.
var (
	// ErrNotFound: the provider has no key of that id.
	ErrNotFound = errors.New("key not found at the key provider")
	// ErrUnreachable: no server of the provider answers (K8).
	ErrUnreachable = errors.New("key provider unreachable")
	// ErrRefused: the provider does not take center for a client, or forbids
	// it the operation.
	ErrRefused = errors.New("key provider refuses center")
	// ErrUntrusted: a server shows a certificate that was not confirmed.
	ErrUntrusted = errors.New("key provider's certificate is not trusted")
	// ErrNotShared: servers of the provider do not hold the same keys.
	ErrNotShared = errors.New("key servers do not share keys")
	// ErrFailed: anything else that the provider did not do.
	ErrFailed = errors.New("key provider failed")
)

// A StateError says that a key's state forbids its use (K7).
type StateError struct {
	Provider, KeyID string
	State           State
}

func (e *StateError) Error() string {
	return fmt.Sprintf("key %s of provider %s is %s: only an Active key may be used; recrypt what it protects from a host that still holds it, or have the key server's administrator restore it", e.KeyID, e.Provider, e.State)
}

// Status is how a provider does.
type Status struct {
	Servers []ServerStatus // in order of preference; none for a native provider
}

// Usable says whether at least one server can be reached.
func (s Status) Usable() bool {
	for _, server := range s.Servers {
		if server.Reachable {
			return true
		}
	}
	return len(s.Servers) == 0
}

// A ServerStatus is how one server does. Times are zero where not known.
type ServerStatus struct {
	Name, Address string

	Reachable bool  // false after two failures in a row: one slow handshake is no alarm (K2)
	Err       error // of the latest try; may be set while Reachable

	// The two halves of trust. ServerTrusted: it shows a certificate that the
	// administrator confirmed. ClientTrusted: it takes center's. Both are false
	// while it cannot be asked.
	ServerTrusted, ClientTrusted bool

	Latency time.Duration // of a fresh connection
	Version string        // of the protocol, as in "KMIP 1.4"
	Vendor  string        // in the server's own words

	Thumbprint        string    // SHA-256 of the certificate that it shows
	Expires           time.Time // that certificate
	ClientCertExpires time.Time // center's own certificate there
}
