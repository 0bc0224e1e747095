package rootkey

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"

	"mortise/internal/atomicfile"
	"mortise/internal/secret"
)

// A Keyring keeps the CRKs of one KMS member in one sealed file (S4). It is the
// KMS's provider of root keys of kind "file".
//
// The file holds a ring key pair. The private half is sealed to what an
// administrator has, a passphrase or this machine's TPM; each CRK is sealed to
// the public half. So a member that got its CRKs from a peer, and has no
// passphrase, still adds to its own file and removes from it, and never loses
// an entry that it cannot read.
//
// Its methods may be called concurrently.
type Keyring struct {
	path string

	mu   sync.RWMutex // held for reading while a CRK is in use
	ring ring         // what the file says
	open map[string]*Key
}

// A Sealing keeps the private ring key between two starts. Passphrase makes
// one; a TPM is another.
type Sealing interface {
	// Method is a word of lower-case letters that names the kind in the file.
	Method() string
	Seal(*secret.Key) ([]byte, error)
	Unseal([]byte) (*secret.Key, error)
}

var (
	// ErrUnknownKey: the provider holds no open CRK of that id.
	ErrUnknownKey = errors.New("no such root key is open here")
	// ErrKeyExists: the provider has a CRK of that id.
	ErrKeyExists = errors.New("is there already")
	// ErrSealedOtherwise: the keyring is sealed to something else than what was
	// given to open it.
	ErrSealedOtherwise = errors.New("the keyring is sealed in another way")
	// ErrShare: bytes that are not what Share makes.
	ErrShare = errors.New("not a share of root keys")
)

// KindFile is the Kind of a Keyring.
const KindFile = "file"

// CreateKeyring makes an empty keyring in a new file at path (mode 0600), sealed
// in one way or several, of which each opens it: a TPM for every day, a
// passphrase for the day when the TPM is gone. It never overwrites a file: the
// error then matches fs.ErrExist.
func CreateKeyring(path string, ways ...Sealing) (*Keyring, error) {
	if _, err := os.Lstat(path); err == nil { // a friendlier, earlier answer, before the cost of scrypt
		return nil, existsError(path)
	}
	r, err := newRing(ways)
	if err != nil {
		return nil, err
	}
	if err := writeNew(path, r.text()); err != nil {
		return nil, err
	}
	return &Keyring{path: path, ring: r, open: map[string]*Key{}}, nil
}

// LoadKeyring reads the keyring in the file at path, locked: it holds no open
// CRK until Unlock or Adopt. Its errors match ErrDamaged, ErrNewer or those of
// the file system.
func LoadKeyring(path string) (*Keyring, error) {
	text, err := atomicfile.Read(path, maxRing)
	if err != nil {
		return nil, fmt.Errorf("rootkey: reading the keyring: %w", err)
	}
	r, err := parseRing(text)
	if errors.Is(err, ErrDamaged) {
		return nil, fmt.Errorf("rootkey: %s: %w; restore the file from a backup, or move it away on a member whose peers are unlocked", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("rootkey: %s: %w", path, err)
	}
	return &Keyring{path: path, ring: r, open: map[string]*Key{}}, nil
}

// Kind is "file".
func (k *Keyring) Kind() string { return KindFile }

// SealedBy names what opens the file: "passphrase", "tpm" or both.
func (k *Keyring) SealedBy() []string {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.ring.methods()
}

// InFile returns the ids of all CRKs in the file, open or not, in order.
func (k *Keyring) InFile() []string {
	k.mu.RLock()
	defer k.mu.RUnlock()
	var ids []string
	for _, e := range k.ring.entries {
		ids = append(ids, hexID(e.id))
	}
	slices.Sort(ids)
	return ids
}

// Unlock opens every CRK in the file. The error matches ErrSealedOtherwise,
// ErrWrongPassphrase, ErrDamaged, or is the Sealing's own.
func (k *Keyring) Unlock(s Sealing) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	private, err := k.ring.private(s)
	if err != nil {
		return fmt.Errorf("rootkey: opening the keyring %s: %w", k.path, err)
	}
	fresh := map[string]*Key{}
	for _, e := range k.ring.entries {
		key, err := e.open(private)
		if err != nil {
			wipeAll(fresh)
			return fmt.Errorf("rootkey: %s: root key %x: %w; restore the file from a backup", k.path, e.id, err)
		}
		fresh[key.ID()] = key
	}
	for id, key := range fresh {
		if k.open[id] != nil { // came from a peer before
			key.Wipe()
			continue
		}
		k.open[id] = key
	}
	return nil
}

// Reseal opens the file by old and seals it in other ways. The ring key pair is made anew, so
// that an old copy of the file together with the old passphrase does not open
// what the file holds from now on.
func (k *Keyring) Reseal(old Sealing, fresh ...Sealing) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	private, err := k.ring.private(old)
	if err != nil {
		return fmt.Errorf("rootkey: opening the keyring %s: %w", k.path, err)
	}
	next, err := newRing(fresh)
	if err != nil {
		return err
	}
	for _, e := range k.ring.entries {
		key, err := e.open(private)
		if err != nil {
			return fmt.Errorf("rootkey: %s: root key %x: %w; restore the file from a backup", k.path, e.id, err)
		}
		err = next.add(key)
		key.Wipe()
		if err != nil {
			return err
		}
	}
	return k.write(next)
}

// Create makes a random CRK of that id: 32 lower-case hexadecimal digits, that no
// other root key has or had. It is in the durable file when Create returns.
func (k *Keyring) Create(_ context.Context, id string) error {
	key, err := secret.Random(nil, keyLen)
	if err != nil {
		return err
	}
	return k.insert(id, key)
}

// Import keeps a copy of a CRK that somebody else made: 32 bytes.
func (k *Keyring) Import(_ context.Context, id string, key *secret.Key) error {
	if key.Len() != keyLen {
		return fmt.Errorf("rootkey: a root key has %d bytes (AES-256), this one has %d", keyLen, key.Len())
	}
	c, err := key.Clone()
	if err != nil {
		return err
	}
	return k.insert(id, c)
}

// insert takes over key.
func (k *Keyring) insert(id string, key *secret.Key) error {
	raw, err := parseID(id)
	if err != nil {
		key.Wipe()
		return err
	}
	crk := &Key{id: raw, key: key}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ring.find(raw) >= 0 || k.open[id] != nil {
		crk.Wipe()
		return fmt.Errorf("rootkey: root key %s %w", id, ErrKeyExists)
	}
	if err := k.insertAll([]*Key{crk}); err != nil {
		crk.Wipe()
		return err
	}
	return nil
}

// insertAll makes keys durable and then usable. Those that the file has already
// are only made usable.
func (k *Keyring) insertAll(keys []*Key) error {
	next := k.ring.clone()
	for _, key := range keys {
		if next.find(key.id) < 0 {
			if err := next.add(key); err != nil {
				return err
			}
		}
	}
	if len(next.entries) != len(k.ring.entries) {
		if err := k.write(next); err != nil {
			return err
		}
	}
	for _, key := range keys {
		k.open[key.ID()] = key
	}
	return nil
}

// Seal encrypts a key under the CRK called id, bound to additional data; see
// [Key.Wrap] for the form.
func (k *Keyring) Seal(_ context.Context, id string, key *secret.Key, additional []byte) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	crk, err := k.find(id)
	if err != nil {
		return nil, err
	}
	return crk.Seal(key, additional)
}

// Open decrypts what Seal made. Its errors match ErrUnknownKey, ErrOtherKey or
// ErrBlob.
func (k *Keyring) Open(_ context.Context, id string, wrapped, additional []byte) (*secret.Key, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	crk, err := k.find(id)
	if err != nil {
		return nil, err
	}
	return crk.Open(wrapped, additional)
}

func (k *Keyring) find(id string) (*Key, error) {
	if crk := k.open[id]; crk != nil {
		return crk, nil
	}
	return nil, fmt.Errorf("rootkey: root key %q: %w", id, ErrUnknownKey)
}

// Destroy removes the CRK called id from the file and from memory, for ever. It
// works on a locked keyring. An id that is not there is destroyed already.
// Copies of the file that somebody made are beyond its reach.
func (k *Keyring) Destroy(_ context.Context, id string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	raw, err := parseID(id)
	if err != nil {
		return nil // no such id can be here
	}
	if at := k.ring.find(raw); at >= 0 {
		next := k.ring.clone()
		next.entries = slices.Delete(next.entries, at, at+1)
		if err := k.write(next); err != nil {
			return fmt.Errorf("rootkey: destroying root key %s: %w", id, err)
		}
	}
	if crk := k.open[id]; crk != nil {
		delete(k.open, id)
		crk.Wipe()
	}
	return nil
}

// List returns the ids of the CRKs that are open, in order.
func (k *Keyring) List(context.Context) ([]string, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	ids := make([]string, 0, len(k.open))
	for id := range k.open {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

// CheckValue is the key check value of the CRK called id; see [CheckValue].
func (k *Keyring) CheckValue(_ context.Context, id string) (string, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	crk, err := k.find(id)
	if err != nil {
		return "", err
	}
	return CheckValue(crk.key)
}

// MaxShare is how many CRKs one share holds.
const MaxShare = 256

// A share is a version byte and, for each CRK, its id (16 bytes) and key (32).
const shareVersion = 1

// Share returns the CRKs among ids that are open here, at most MaxShare, for
// another member's Adopt. It is for an authenticated, encrypted channel only.
func (k *Keyring) Share(_ context.Context, ids []string) (*secret.Key, error) {
	if len(ids) > MaxShare {
		return nil, fmt.Errorf("rootkey: a share has at most %d root keys, not %d", MaxShare, len(ids))
	}
	plain := make([]byte, 1, 1+MaxShare*(idLen+keyLen)) // never grows: no copy stays behind
	plain[0] = shareVersion
	k.mu.RLock()
	defer k.mu.RUnlock()
	for _, id := range ids {
		if crk := k.open[id]; crk != nil {
			plain = append(plain, crk.id[:]...)
			crk.key.Use(func(b []byte) { plain = append(plain, b...) })
		}
	}
	return secret.Take(plain)
}

// Adopt keeps the CRKs of a share, durably, and opens them. It works on a locked
// keyring.
func (k *Keyring) Adopt(_ context.Context, share *secret.Key) error {
	keys, err := parseShare(share)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var fresh []*Key
	for _, key := range keys {
		have := k.open[key.ID()]
		if have == nil {
			fresh = append(fresh, key)
			continue
		}
		if !have.key.Equal(key.key) && err == nil {
			err = fmt.Errorf("rootkey: a share has other bytes for root key %s than this member", key.ID())
		}
		key.Wipe()
	}
	if err == nil {
		err = k.insertAll(fresh)
	}
	if err != nil {
		for _, key := range fresh {
			key.Wipe()
		}
	}
	return err
}

func parseShare(share *secret.Key) (keys []*Key, err error) {
	share.Use(func(b []byte) {
		if b[0] != shareVersion || (len(b)-1)%(idLen+keyLen) != 0 {
			err = fmt.Errorf("rootkey: %w", ErrShare)
			return
		}
		for b = b[1:]; len(b) > 0 && err == nil; b = b[idLen+keyLen:] {
			k := &Key{id: [idLen]byte(b)}
			for _, other := range keys {
				if other.id == k.id {
					err = fmt.Errorf("rootkey: %w: root key %x is in it twice", ErrShare, k.id)
					return
				}
			}
			if k.key, err = secret.Copy(b[idLen : idLen+keyLen]); err == nil {
				keys = append(keys, k)
			}
		}
	})
	if err != nil {
		for _, k := range keys {
			k.Wipe()
		}
		return nil, err
	}
	return keys, nil
}

// Close wipes the open CRKs. The file stays.
func (k *Keyring) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	wipeAll(k.open)
	return nil
}

func wipeAll(keys map[string]*Key) {
	for id, key := range keys {
		key.Wipe()
		delete(keys, id)
	}
}

// write makes next the content of the file and zeroes the blocks that the old
// content was in. That is an extra: a journal, a snapshot or flash may keep
// them, and they are sealed anyway. A file that a backup has linked is left
// alone.
func (k *Keyring) write(next ring) error {
	old, err := os.OpenFile(k.path, os.O_WRONLY, 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("rootkey: rewriting the keyring: %w", err)
	}
	if old != nil {
		defer old.Close()
	}
	if err := atomicfile.Write(k.path, next.text(), 0o600); err != nil {
		return fmt.Errorf("rootkey: rewriting the keyring: %w", err)
	}
	k.ring = next
	if old != nil {
		overwrite(old)
	}
	return nil
}
