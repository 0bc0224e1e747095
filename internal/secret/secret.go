// Package secret holds key bytes. It is the only place where Mortise keeps a
// KEK, a DEK, a root key or a password between two uses.
//
// A [Key] lives outside the Go heap, in pages that are locked into memory, left
// out of core dumps and not inherited by a forked child. It prints as
// "[redacted]", refuses every marshaller, cannot be compared with ==, and is
// zeroed by [Key.Wipe]. The garbage collector never copies it.
//
// Place in the flow: level 0; every package that touches key bytes imports it.
// It imports nothing of Mortise.
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
)

// Redacted is what a Key prints as, whatever the verb.
const Redacted = "[redacted]"

// MaxLen is the longest secret, in bytes, that a Key holds.
const MaxLen = 4 * pageSize

// ErrMarshal is returned by every marshalling method of a Key: a key never
// leaves the process inside a record that somebody forgot to look at.
var ErrMarshal = errors.New("secret: a key cannot be marshalled")

// ErrWiped is the panic value of [Key.Use] after [Key.Wipe]: using a wiped key
// as 32 zero bytes would encrypt with a known key.
var ErrWiped = errors.New("secret: key used after wipe")

// A Key is a secret of 1 to MaxLen bytes. The zero Key is not usable; make one
// with [Random], [Take] or [Copy]. Methods may be called concurrently, except
// that Wipe must not run while Use does: the owner of a key wipes it when its
// users are gone.
type Key struct {
	_ [0]func() // not comparable: == on keys is a timing leak
	b []byte    // a slot of locked memory; nil after Wipe
}

// Random makes a key of n bytes from r; nil means crypto/rand.
func Random(r io.Reader, n int) (*Key, error) {
	k, err := alloc(n)
	if err != nil {
		return nil, err
	}
	if r == nil {
		r = rand.Reader
	}
	if _, err := io.ReadFull(r, k.b); err != nil {
		k.Wipe()
		return nil, fmt.Errorf("secret: reading %d random bytes: %w", n, err)
	}
	return k, nil
}

// Copy makes a key of the bytes of b, which stays the caller's to clear.
func Copy(b []byte) (*Key, error) {
	k, err := alloc(len(b))
	if err != nil {
		return nil, err
	}
	copy(k.b, b)
	return k, nil
}

// Take makes a key of the bytes of b and zeroes b, also when it fails.
func Take(b []byte) (*Key, error) {
	defer clear(b)
	return Copy(b)
}

// Len is the length in bytes; 0 after Wipe.
func (k *Key) Len() int { return len(k.b) }

// Use calls f with the key's own memory. f must not keep or append to b.
func (k *Key) Use(f func(b []byte)) {
	if len(k.b) == 0 {
		panic(ErrWiped)
	}
	f(k.b[:len(k.b):len(k.b)])
	runtime.KeepAlive(k)
}

// Clone makes a second, independent key of the same bytes.
func (k *Key) Clone() (c *Key, err error) {
	k.Use(func(b []byte) { c, err = Copy(b) })
	return c, err
}

// Equal compares in constant time. Keys of different lengths are not equal;
// a wiped key equals nothing.
func (k *Key) Equal(o *Key) bool {
	if len(k.b) == 0 || len(o.b) == 0 {
		return false
	}
	return subtle.ConstantTimeCompare(k.b, o.b) == 1
}

// Wipe zeroes the bytes and gives the memory back. A second Wipe, and a Wipe
// of a nil Key, do nothing.
func (k *Key) Wipe() {
	if k == nil || k.b == nil {
		return
	}
	release(k.b)
	k.b = nil
}

// Format prints Redacted for every verb, %x and %#v included.
func (k *Key) Format(f fmt.State, _ rune) { io.WriteString(f, Redacted) }

// String returns Redacted.
func (k *Key) String() string { return Redacted }

// GoString returns Redacted.
func (k *Key) GoString() string { return Redacted }

// LogValue lets slog print Redacted.
func (k *Key) LogValue() slog.Value { return slog.StringValue(Redacted) }

// MarshalJSON fails with ErrMarshal.
func (k *Key) MarshalJSON() ([]byte, error) { return nil, ErrMarshal }

// MarshalText fails with ErrMarshal.
func (k *Key) MarshalText() ([]byte, error) { return nil, ErrMarshal }

// MarshalBinary fails with ErrMarshal; gob uses it too.
func (k *Key) MarshalBinary() ([]byte, error) { return nil, ErrMarshal }
