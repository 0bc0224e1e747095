package keysafe

import (
	"errors"
	"fmt"
	"strings"
)

// ErrConflict says that a bundle was changed by somebody else since it was
// opened: open it again and repeat the change.
var ErrConflict = errors.New("keysafe: the bundle was changed since it was opened; open it again and repeat the change")

// A KeysRequiredError says that the cache holds no KEK that opens a safe: the VM
// or disk is locked until one of Required is there.
type KeysRequiredError struct{ Required []KeyID }

func (e *KeysRequiredError) Error() string {
	names := make([]string, len(e.Required))
	for i, id := range e.Required {
		names[i] = id.String()
	}
	return fmt.Sprintf("keysafe: locked: none of the keys that open it is on this host: %s; make the key provider reachable and unlock the VM, or restore the key", strings.Join(names, ", "))
}

// A TamperedError says that something authenticated does not match: it was
// edited, damaged, or belongs to another disk or VM (rule E8). Nothing was
// changed; restoring What from a backup heals it.
type TamperedError struct {
	What string // what to restore: a file, or a line of one, by name
	Why  string
}

func (e *TamperedError) Error() string {
	return fmt.Sprintf("keysafe: %s was edited, damaged or moved here from elsewhere: %s; nothing was changed, restore it from a backup", e.What, e.Why)
}

// A MissingError says that a VM that must be encrypted has lost the lines that
// open it.
type MissingError struct {
	File string
	What string // the missing entry
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s: the VM is encrypted but %s is missing; restore that line, or the file, from a backup", e.File, e.What)
}

// A ForeignError says that vSphere, Workstation or another VMware product made a
// safe, which only that product opens (rule I6).
type ForeignError struct{}

func (*ForeignError) Error() string {
	return "keysafe: encrypted by a VMware product (vmware:key/…), which alone can open it; the way in: decrypt the VM there, or export it there as OVF, and import the result"
}

// A SyntaxError says that a text is no key safe.
type SyntaxError struct {
	Offset int // bytes into the text
	Why    string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("keysafe: malformed key safe at byte %d: %s; restore the line from a backup", e.Offset, e.Why)
}
