// Package audit keeps the log of who did what with the key server, so that
// whoever changes it afterwards is found out (S7).
//
// Place in the flow: level 2, below kms, which decides what is an act and hands
// it over as an [Entry]. It imports atomicfile, and nothing of kms: the same
// code verifies a log on a machine that has no key server.
//
// # How tampering shows
//
// Entries are numbered without a gap and chained: the hash after an entry is
// SHA-256(hash before it ‖ the entry). A [Head] is the hash after some entry,
// signed with the member's Ed25519 key; every second one is made of what is
// durable and leaves the log for other places (etcd, a file elsewhere, syslog),
// where it is an anchor. [Verify] recomputes the chain and compares it with
// every head: an entry that was removed, changed, put in or moved breaks the
// chain; a chain that was computed anew contradicts the signed heads; a log that
// was cut off at its end is shorter than its anchors say. What can be done
// unseen, by somebody who is root on the member, is to change what no anchor
// covers yet: the last second.
//
// # Durability
//
// [Log.Append] orders an entry, [Ticket.Wait] returns once it is on the disk. All
// that wait are served by one write and one fdatasync. Nothing is written before
// the write ahead of it is synced, so that after a crash at most one write is
// torn, and nobody was told that it had been made.
//
// # Files
//
// A log is a folder of segments, 00000000000000000001.audit and so on by the
// number of their first entry, filled with zeros before they are used: a member
// whose disk is full learns that before, and not in the middle of, an act.
// segment.go gives the format.
package audit

import (
	"errors"
	"time"
)

var (
	// ErrNoSpace: the log has no room for ordinary entries; it is tried again
	// every second.
	ErrNoSpace = errors.New("the audit log has no space")
	// ErrFailed: a write or sync failed; what the disk holds is not known until
	// the log is opened again.
	ErrFailed = errors.New("the audit log's disk failed")
	// ErrDamaged: the log is not what was written.
	ErrDamaged = errors.New("the audit log is damaged")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("the audit log is closed")
)

// An Entry is one act. It names things and never holds what is in them: no key
// byte, no attribute's value. Strings are cut to [maxField] bytes of UTF-8.
type Entry struct {
	// Sequence numbers the member's log from 1. The log sets it.
	Sequence uint64 `json:"sequence"`
	// Time is cluster time, to the microsecond.
	Time time.Time `json:"time"`
	// Member is the one that took the request.
	Member string `json:"member"`
	// Instance is empty for what concerns the whole server.
	Instance string `json:"instance,omitempty"`

	Actor       string `json:"actor"`                 // "certificate", "api-key", "socket" or "server"
	Client      string `json:"client,omitempty"`      // the administrator's label for it
	Fingerprint string `json:"fingerprint,omitempty"` // of its certificate, or the id of its API key
	Role        string `json:"role,omitempty"`
	From        string `json:"from,omitempty"` // network address

	Operation string `json:"operation"`
	Object    string `json:"object,omitempty"` // its identifier
	Made      string `json:"made,omitempty"`   // the identifier of a second object, that came of it
	Result    string `json:"result"`           // [Success], or the KMIP result reason
	// Detail is a word of the program's own on what was done, e.g. "compromise"
	// of a Revoke.
	Detail string `json:"detail,omitempty"`

	// Act tells entries of one act apart from all others: a mutation's entry
	// has the same Act wherever it turns up. Empty for reads and refusals.
	Act string `json:"act,omitempty"`
	// Revision is the store's, of a mutation; 0 for reads and refusals.
	Revision int64 `json:"revision,omitempty"`
}

// Success is the result of an act that was done.
const Success = "Success"
