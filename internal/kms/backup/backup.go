// Package backup is the file that a KMS's backup is, and the restore of a KMS
// from one (S9).
//
// Place in the flow: level 2, over kms, which decides what is in a backup, and
// store, which has it. cmd/mortise restores with it; the administration API
// writes backups with it.
//
// # The file
//
// A backup is an age file (age-encryption.org/v1), sealed to a passphrase
// (scrypt) or to age recipients (X25519); age -d opens it. age authenticates all
// of it and notices when it is cut off. Inside is the line [magic], and then
// frames: a letter, a length (4 bytes, big-endian) and that many bytes:
//
//	H  the header, JSON: id, time, and which root keys the records need
//	K  root keys: a length byte, the kind of their provider, and a share of them
//	   as members give each other. There is none for a token's keys
//	R  a record: five uvarints (length of the collection's name, length of the
//	   key, revisions of creation and last write, version), the name, the key,
//	   and the record as the store has it: sealed by its instance's key
//	E  the end, JSON: the store's revision and how many root keys and records
//	   there were; nothing follows it
//
// H comes first, K before R, E last. Readers refuse what they do not know.
//
// # Whole or not at all
//
// [Verify] reads a file to its end; [Restore] does so before it writes anything,
// and what it writes becomes a state folder by the last of its renames.
package backup

import (
	"errors"
	"time"

	"mortise/internal/kms"
)

var (
	// ErrWrongKey: the passphrase or identity is not the backup's.
	ErrWrongKey = errors.New("wrong passphrase or identity")
	// ErrDamaged: the file is not what was written.
	ErrDamaged = errors.New("damaged backup")
	// ErrNewer: a later version of Mortise wrote the file.
	ErrNewer = errors.New("backup of a newer version")
)

const (
	magicWord = "mortise-kms-backup"
	magic     = magicWord + " v1\n"

	frameHeader = 'H'
	frameKeys   = 'K'
	frameRecord = 'R'
	frameEnd    = 'E'

	// maxFrame bounds a frame: a record is at most one transaction.
	maxFrame = 8 << 20
)

// end is the last frame.
type end struct {
	Revision int64 `json:"revision"`
	RootKeys int64 `json:"rootKeys"` // frames of them
	Records  int64 `json:"records"`
}

// A Summary is what a whole backup holds.
type Summary struct {
	kms.BackupHeader
	Revision int64 `json:"revision"`
	Records  int64 `json:"records"`
	// Objects counts the managed objects by instance, destroyed ones included.
	Objects map[string]int64 `json:"objects"`
	// Outside are root keys that the backup needs and cannot hold, by kind of
	// provider: keys of a PKCS#11 token.
	Outside map[string][]string `json:"outside"`
	Bytes   int64               `json:"bytes"` // of the file
}

// clockSlack is how far a machine's clock may be behind the one that made the
// backup.
const clockSlack = 5 * time.Minute
