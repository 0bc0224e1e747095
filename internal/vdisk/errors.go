package vdisk

import (
	"errors"
	"fmt"
	"io/fs"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// The kinds of an [Error], for errors.Is.
var (
	ErrInUse        = errors.New("disk is in use")
	ErrExists       = errors.New("disk exists already")
	ErrMissing      = errors.New("file is missing")
	ErrShort        = errors.New("extent is too short")
	ErrUnsupported  = errors.New("unsupported disk")
	ErrNotEncrypted = errors.New("disk must be encrypted and is not")
	ErrStale        = errors.New("files are older than they must be")
	ErrTampered     = errors.New("edited, damaged or foreign")
	ErrParent       = errors.New("link and parent do not fit")
	ErrChildren     = errors.New("other links stand on it")
	ErrSealed       = errors.New("link is sealed")
	ErrState        = errors.New("state file does not fit")
	ErrKeysRequired = errors.New("no key that opens the disk")
	ErrConverting   = errors.New("a conversion is unfinished")
	ErrFailed       = errors.New("storage failed")
	ErrReadOnly     = errors.New("disk is open for reading only")
	ErrUndecided    = errors.New("it is not known what is recorded")
	ErrClosed       = errors.New("disk is closed")
)

// An Error says which file is wrong, why, and what to do about it. It wraps its
// Kind, one of the errors above, and its Cause.
type Error struct {
	Kind  error
	File  string
	Why   string // "" when Kind and Cause say it all
	Fix   string // the way out
	Cause error  // may be nil
}

func (e *Error) Error() string {
	s := e.File + ": " + e.Kind.Error()
	if e.Why != "" {
		s += ": " + e.Why
	}
	if in := (*vmdk.Error)(nil); errors.As(e.Cause, &in) && in.File == e.File {
		s += in.Error()[len(in.File):] // names the file, and the line
	} else if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	if e.Fix != "" {
		s += "; " + e.Fix
	}
	return s
}

func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Cause}
}

// untouched is the way out of damage to the small files.
const untouched = "the data in the extent is untouched"

// descriptorError gives an error of reading a descriptor its kind.
func descriptorError(path string, err error) error {
	e := &Error{Kind: ErrTampered, File: path, Cause: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &Error{Kind: ErrMissing, File: path, Why: "there is no disk descriptor", Fix: "restore it from a backup"}
	case errors.Is(err, vmdk.ErrUnsupported):
		e.Kind = ErrUnsupported
	case errors.As(err, new(*vmdk.Error)):
	default:
		return fmt.Errorf("opening a disk: %w", err)
	}
	return e
}

// unwrapError gives an error of opening a key safe its kind.
func unwrapError(path, entry string, err error) error {
	if errors.As(err, new(*keysafe.KeysRequiredError)) {
		return &Error{Kind: ErrKeysRequired, File: path, Cause: err}
	}
	return &Error{Kind: ErrTampered, File: path, Why: "entry " + entry, Cause: err,
		Fix: "if the file was copied here from another disk or VM, clone that one instead; " + untouched}
}
