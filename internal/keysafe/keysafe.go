// Package keysafe keeps data encryption keys as text: wrapped under key
// encryption keys, in a line of a VMX or of a disk descriptor (rules E3, E8, R1).
//
// A [Safe] is a list of pairs. Each pair names a KEK by key provider and key id
// and holds the same DEK, wrapped under that KEK. A [Binding] says what the DEK
// is for; it is authenticated with the wrapped bytes, so that a safe copied to
// another disk or VM, or one whose cipher was edited, does not open. A shallow
// recrypt adds a pair under the new KEK, proves that both pairs hold one DEK,
// and drops the old pair ([Safe.Rewrap], [Safe.Prove], [Safe.Only]).
//
// A [MAC] is keyed from a DEK and authenticates the clear lines that stand
// beside a safe. A [Bundle] is what a VMX holds: the VM's configuration key in a
// safe, and under that key the DEKs of the VM's files, what must be encrypted,
// and other secrets.
//
// # Text form
//
//	mortise:key/v1/list/(pair/(fqid/<provider>/<key>,AES-256-GCM,<blob>),pair/(…))
//
// after vSphere's key locators, whose scheme is vmware:key/. Provider and key id
// are percent-encoded: every byte but A–Z a–z 0–9 - . _ ~ as % and two upper-case
// hexadecimal digits. The blob is base64url without padding of a 12-byte random
// nonce, the AES-256-GCM ciphertext of the DEK and the 16-byte tag (NIST SP
// 800-38D). There is exactly one text for a safe, and anything else is refused.
//
// The additional data is a sequence of fields, each a 4-byte big-endian length
// and its bytes: "mortise:key/v1", role, VM UUID (16 bytes), disk UUID (16 bytes,
// zero when there is none), name, cipher, unit size (4 bytes, big-endian),
// provider, key id.
//
// # Limits of protection in memory
//
// Keys live in package secret's locked memory. The key schedules that the
// standard library makes from them live on the Go heap for the length of one
// call and are overwritten when the collector reuses the memory, not before.
//
// Place in the flow: level 1; vdisk, vmfiles, vmx and host open and rewrite safes
// with it. It imports secret and vmxfile, and reaches no network: the KEKs come
// from the caller's cache ([KEKs]).
package keysafe

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"

	"mortise/internal/secret"
)

// A KeyID names a KEK: the key provider's name and the key's id there.
type KeyID struct{ Provider, Key string }

func (id KeyID) String() string { return id.Provider + "/" + id.Key }

// Compare orders key ids by provider, then key.
func (id KeyID) Compare(o KeyID) int {
	return cmp.Or(strings.Compare(id.Provider, o.Provider), strings.Compare(id.Key, o.Key))
}

const maxName = 255 // bytes of a provider's name or a key id

func (id KeyID) check() error {
	for _, n := range [...]struct{ what, name string }{{"provider", id.Provider}, {"key id", id.Key}} {
		if n.name == "" || len(n.name) > maxName || !utf8.ValidString(n.name) || strings.IndexFunc(n.name, func(r rune) bool { return r < ' ' || r == 0x7f }) >= 0 {
			return fmt.Errorf("keysafe: %.64q is no %s: it has 1 to %d bytes of printable UTF-8", n.name, n.what, maxName)
		}
	}
	return nil
}

// A Role is what a wrapped key is for.
type Role string

const (
	RoleVMConfig Role = "vm-config" // opens a VMX's bundle
	RoleDisk     Role = "disk"      // XTS key of one link of a disk
	RoleFile     Role = "file"      // XTS key of one other file of a VM
)

// Ciphers that a Binding may name.
const (
	CipherXTS = "XTS-AES-256" // IEEE 1619; a 64-byte DEK
	CipherGCM = "AES-256-GCM" // NIST SP 800-38D; a 32-byte DEK
)

// KEKSize is the length of a KEK in bytes (rule K1).
const KEKSize = 32

// DEKSize is the length in bytes of a DEK for cipher, 0 for an unknown cipher.
func DEKSize(cipher string) int {
	switch cipher {
	case CipherXTS:
		return 64
	case CipherGCM:
		return 32
	}
	return 0
}

// A Binding says what a DEK is for. A pair made for one Binding opens for no
// other.
type Binding struct {
	VM       uuid.UUID
	Disk     uuid.UUID // of the disk's descriptor (ddb.uuid); zero unless RoleDisk
	Role     Role
	Name     string // which key of that disk or VM, where there may be several; else ""
	Cipher   string
	UnitSize uint32 // bytes; 0 for CipherGCM
}

func (b Binding) check() error {
	size := DEKSize(b.Cipher)
	switch {
	case b.Role != RoleVMConfig && b.Role != RoleDisk && b.Role != RoleFile:
		return fmt.Errorf("keysafe: unknown role %.64q", b.Role)
	case size == 0:
		return fmt.Errorf("keysafe: cipher %.64q is not supported here: this version reads %s; a newer Mortise may have written it", b.Cipher, CipherXTS)
	case b.VM == uuid.Nil:
		return fmt.Errorf("keysafe: a %s key needs the VM's UUID", b.Role)
	case (b.Role == RoleDisk) != (b.Disk != uuid.Nil):
		return fmt.Errorf("keysafe: a %s key and disk UUID %s do not go together", b.Role, b.Disk)
	}
	return nil
}

// additionalData is the unambiguous form of b and id that a wrap authenticates.
func (b Binding) additionalData(id KeyID) []byte {
	var out []byte
	field := func(v []byte) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(v)))
		out = append(out, v...)
	}
	field([]byte(scheme + version))
	field([]byte(b.Role))
	field(b.VM[:])
	field(b.Disk[:])
	field([]byte(b.Name))
	field([]byte(b.Cipher))
	field(binary.BigEndian.AppendUint32(nil, b.UnitSize))
	field([]byte(id.Provider))
	field([]byte(id.Key))
	return out
}

// String describes b for an error.
func (b Binding) String() string {
	switch b.Role {
	case RoleDisk:
		return fmt.Sprintf("disk %s of VM %s", b.Disk, b.VM)
	case RoleVMConfig:
		return fmt.Sprintf("the configuration of VM %s", b.VM)
	}
	return fmt.Sprintf("file %q of VM %s", b.Name, b.VM)
}

// KEKs is the key cache that Unwrap asks.
type KEKs interface {
	// KEK returns a copy of the KEK, which the asker wipes, and whether the
	// cache has it.
	KEK(id KeyID) (kek *secret.Key, ok bool)
}

// KEKSet is a KEKs of the keys in a map. It is not safe for concurrent changes.
type KEKSet map[KeyID]*secret.Key

// KEK returns a copy of the key of id.
func (s KEKSet) KEK(id KeyID) (*secret.Key, bool) {
	k := s[id]
	if k == nil {
		return nil, false
	}
	c, err := k.Clone()
	return c, err == nil
}
