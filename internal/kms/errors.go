package kms

import (
	"errors"
	"fmt"

	"github.com/ovh/kmip-go"

	"mortise/internal/store"
)

// An Error is a refusal in KMIP's terms. Reason and Message are for the client
// to see; what an Error wraps is for the log only.
type Error struct {
	Reason  kmip.ResultReason
	Message string
	cause   error
}

func (e *Error) Error() string {
	if e.cause != nil {
		return e.Message + ": " + e.cause.Error()
	}
	return e.Message
}

func (e *Error) Unwrap() error { return e.cause }

// Refuse makes an Error whose words are for the client.
func Refuse(reason kmip.ResultReason, format string, args ...any) error {
	return &Error{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// AsError says in KMIP's terms what any error of this package means.
func AsError(err error) *Error {
	var known *Error
	switch {
	case errors.As(err, &known):
		return known
	case errors.Is(err, ErrUnknownClient), errors.Is(err, ErrExpired), errors.Is(err, ErrUnknownInstance):
		return &Error{kmip.ResultReasonPermissionDenied, "the client certificate is no longer accepted", err}
	case errors.Is(err, ErrQuarantined):
		return &Error{kmip.ResultReasonPermissionDenied, "the server was restored from a backup and is not released yet", err}
	case errors.Is(err, ErrInstanceLocked):
		return &Error{kmip.ResultReasonPermissionDenied, "the instance is locked: it has no use of its root key; its keys are not lost", err}
	case errors.Is(err, store.ErrNotFound):
		return &Error{kmip.ResultReasonItemNotFound, "no such object", err}
	case errors.Is(err, store.ErrDamaged):
		return &Error{kmip.ResultReasonGeneralFailure, "the stored object is damaged; the server's log says more", err}
	case errors.Is(err, ErrClock):
		return &Error{kmip.ResultReasonGeneralFailure, "this server's clock is not fit; ask another", err}
	case errors.Is(err, ErrAudit):
		return &Error{kmip.ResultReasonGeneralFailure, "the server cannot write its audit log now, and does nothing until it can", err}
	case errors.Is(err, store.ErrFull):
		return &Error{kmip.ResultReasonGeneralFailure, "the server's storage is full", err}
	case errors.Is(err, store.ErrUnavailable):
		return &Error{kmip.ResultReasonGeneralFailure, "the server's storage does not answer now; what was to be changed may or may not have been", err}
	}
	return &Error{kmip.ResultReasonGeneralFailure, "internal error; the server's log says more", err}
}
