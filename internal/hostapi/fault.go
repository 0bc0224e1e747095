package hostapi

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// codeOf is the gRPC code that carries each kind, for peers that only look at codes.
var codeOf = map[Fault_Kind]codes.Code{
	Fault_UNKNOWN:           codes.Unknown,
	Fault_MISSING_KEYS:      codes.FailedPrecondition,
	Fault_TAMPERED:          codes.DataLoss,
	Fault_IN_USE:            codes.Aborted,
	Fault_NO_SPACE:          codes.ResourceExhausted,
	Fault_WRONG_POWER_STATE: codes.FailedPrecondition,
	Fault_NOT_FOUND:         codes.NotFound,
	Fault_EXISTS:            codes.AlreadyExists,
	Fault_NOT_SUPPORTED:     codes.Unimplemented,
	Fault_INVALID:           codes.InvalidArgument,
	Fault_STALE_TERM:        codes.PermissionDenied,
	Fault_BUSY:              codes.Aborted,
}

// A FaultError is an error with a kind that a caller can decide on. A gRPC
// server that returns one sends it whole; [AsFault] takes it out again.
type FaultError struct {
	Fault *Fault
	Err   error
}

// Faultf makes a FaultError with a message of its own; %w wraps.
func Faultf(kind Fault_Kind, format string, args ...any) error {
	return &FaultError{&Fault{Kind: kind}, fmt.Errorf(format, args...)}
}

func (e *FaultError) Error() string { return e.Err.Error() }
func (e *FaultError) Unwrap() error { return e.Err }

// GRPCStatus is how grpc asks an error for its wire form.
func (e *FaultError) GRPCStatus() *status.Status {
	st := status.New(codeOf[e.Fault.Kind], e.Err.Error())
	if with, err := st.WithDetails(e.Fault); err == nil {
		return with
	}
	return st
}

// AsFault finds the fault in an error of this process or of a call. It answers a
// Fault of kind UNKNOWN, never nil, when there is none, and the message.
func AsFault(err error) (*Fault, string) {
	var f *FaultError
	if errors.As(err, &f) {
		return f.Fault, err.Error()
	}
	st, _ := status.FromError(err)
	for _, d := range st.Details() {
		if f, ok := d.(*Fault); ok {
			return f, st.Message()
		}
	}
	return &Fault{}, st.Message()
}
