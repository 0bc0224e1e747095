package kmipc

import (
	"errors"
	"fmt"
	"strings"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// What an [Error] is about; errors.Is tells.
var (
	// ErrUnreachable: no connection, no handshake or no answer in time, and
	// the operation did not happen, or changes nothing.
	ErrUnreachable = errors.New("key server unreachable")
	// ErrOutcomeUnknown: the connection broke after an operation that changes
	// something was sent. It may have happened.
	ErrOutcomeUnknown = errors.New("key server did not answer; the operation may have happened")
	// ErrRefused: the server does not accept our client certificate.
	ErrRefused = errors.New("key server refuses the client certificate; register it there")
	// ErrCertificateChanged: the server's certificate is not one that the
	// administrator confirmed; the wrapped [*CertificateError] has its thumbprint.
	ErrCertificateChanged = errors.New("key server shows a certificate that was not confirmed")
	// ErrProtocol: what the server sent is not KMIP as we know it.
	ErrProtocol = errors.New("key server sent a malformed or unexpected answer")
	// ErrNotFound: the server has no object of that id.
	ErrNotFound = errors.New("key not found")
	// ErrDenied: the server forbids the operation to this client, or to a key
	// in its state.
	ErrDenied = errors.New("key server denies it")
	// ErrUnsupported: the server does not know the operation.
	ErrUnsupported = errors.New("key server does not support it")
	// ErrFailed: any other failure that the server reports.
	ErrFailed = errors.New("key server reports a failure")
)

// An Error says which server failed at what, and why. No key material is ever
// in one.
type Error struct {
	Server    string // the endpoint's name
	Address   string
	Operation string // KMIP's name of it, or "connect"
	Kind      error  // one of the Err… above
	Err       error  // the cause; may be nil
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s on key server %s (%s): %v", e.Operation, e.Server, e.Address, e.Kind)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *Error) Unwrap() []error { return []error{e.Kind, e.Err} }

// A ResultError is a failure that a server reports by KMIP's means.
type ResultError struct {
	Reason  kmip.ResultReason
	Message string // the server's words, cut short
}

func (e *ResultError) Error() string {
	return fmt.Sprintf("%s (%q)", ttlv.EnumStr(e.Reason), e.Message)
}

func resultError(item *kmip.ResponseBatchItem) *ResultError {
	msg := item.ResultMessage
	if len(msg) > 200 {
		msg = msg[:200] + "…"
	}
	return &ResultError{item.ResultReason, msg}
}

// kind sorts KMIP's result reasons (KMIP 1.4 §9.1.3.2.28) by what a caller may do.
func (e *ResultError) kind() error {
	switch e.Reason {
	case kmip.ResultReasonItemNotFound:
		return ErrNotFound
	case kmip.ResultReasonAuthenticationNotSuccessful:
		return ErrRefused
	case kmip.ResultReasonPermissionDenied, kmip.ResultReasonIllegalOperation, kmip.ResultReasonSensitive, kmip.ResultReasonNotExtractable:
		return ErrDenied
	case kmip.ResultReasonOperationNotSupported, kmip.ResultReasonFeatureNotSupported:
		return ErrUnsupported
	}
	return ErrFailed
}

func isReason(err error, reason kmip.ResultReason) bool {
	var r *ResultError
	return errors.As(err, &r) && r.Reason == reason
}

// failures is what each of several servers answered.
type failures []error

func (f failures) Error() string {
	text := make([]string, len(f))
	for i, err := range f {
		text[i] = err.Error()
	}
	return strings.Join(text, "; ")
}

func (f failures) Unwrap() []error { return f }
