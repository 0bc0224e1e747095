// Package cluster makes several KMS processes one key server: how a member joins,
// who the members are, how they prove it to each other, and what they ask of each
// other beside raft (S8, design §1 Identity, §5 Unlock and Dates).
//
// Place in the flow: level 2, beside kms and over it and store. cmd/mortise
// starts a [Node] before the store and attaches the open store and KMS to it;
// kms/admin serves its membership calls. It imports kms, pki, store and secret.
//
// # One port, three protocols
//
// A member has one TLS port for its peers ([Port]). The client's ALPN says what
// it wants: raft (none: etcd's own transport), the peers' calls, or to join. Raft
// and calls need a certificate of the peers' CA whose name is in the list of
// members at that moment; a member that was removed is out at once, on open
// connections too. Joining needs a token.
//
// # The peers' CA
//
// It is made at a member's first start and certifies nobody but members of this
// cluster. Its certificate lies beside the member's own in the state folder; its
// key is in the store, sealed by a root key that is the cluster's own and lives
// at the root-key provider like the CRKs. So every unlocked member can certify a
// new one, and renew its own certificate.
//
// # What the state folder holds
//
//	peer/peer.pem    this member's certificate, its CA's, and its key, mode 0600
//	peer/ca.pem      the CA's certificate
//	peer/peer.json   address, name, the members' names as last seen
//	peer/unsealed    the CA's key is not in the store yet: nobody else has a
//	                 certificate of it, and it may be made anew
//
// A member's key is in clear: it must prove who it is before anybody unlocks it.
// Who steals it, and can reach a peer, gets the root keys; doc/threat-model.md
// says what to do about it.
package cluster

import (
	"errors"
	"time"

	"mortise/internal/pki"
)

// Port is the peers' port unless another is configured.
const Port = 5698

// ALPN protocol ids. Raft has none: it is etcd's transport that dials.
const (
	protoCalls = "mortise-kms-peer/1"
	protoJoin  = "mortise-kms-join/1"
)

const (
	// certLife is the life of a member's certificate; it is renewed after two
	// thirds of it.
	certLife = 90 * 24 * time.Hour
	// TokenLife is how long a join token can be used, unless said otherwise.
	TokenLife = time.Hour
	// MaxTokenLife bounds it.
	MaxTokenLife = 24 * time.Hour
	// maxBody bounds a call's body, in bytes. The largest is a share of CRKs.
	maxBody = 1 << 20
)

var (
	// ErrNoAddress: this member has no address for peers yet.
	ErrNoAddress = errors.New("this member has no address where others can reach it")
	// ErrLocked: the call needs root keys, and this member is locked.
	ErrLocked = errors.New("this member is locked; unlock it first")
	// ErrJoin: the other member refuses to let this one join.
	ErrJoin = errors.New("joining was refused")
	// ErrUnknownMember: no member has this name.
	ErrUnknownMember = errors.New("no member has this name")
	// ErrMemberExists: there is a member of this name.
	ErrMemberExists = errors.New("there is a member of this name already")
	// ErrNoPeer: no other member could be asked.
	ErrNoPeer = errors.New("no other member answers")
	// ErrInvalid: a name, address or duration is not one.
	ErrInvalid = errors.New("invalid")
	// ErrTooOld: this program cannot read what the cluster writes.
	ErrTooOld = errors.New("this version of Mortise is too old for the cluster")
)

func identity(name string) pki.Identity { return pki.Identity{Role: pki.RoleKMS, Name: name} }
