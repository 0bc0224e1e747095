package task

import (
	"errors"

	"mortise/internal/inventory"
)

// FaultKind says what callers decide on.
type FaultKind string

// The kinds of faults.
const (
	NotAuthenticated   FaultKind = "NotAuthenticated"
	InvalidLogin       FaultKind = "InvalidLogin"
	NoPermission       FaultKind = "NoPermission" // Privilege, Object
	NotFound           FaultKind = "NotFound"
	DuplicateName      FaultKind = "DuplicateName" // Object: who has the name
	AlreadyExists      FaultKind = "AlreadyExists"
	InvalidArgument    FaultKind = "InvalidArgument" // Field
	InvalidState       FaultKind = "InvalidState"
	InvalidPowerState  FaultKind = "InvalidPowerState" // Have
	TaskInProgress     FaultKind = "TaskInProgress"    // Task
	ResourceInUse      FaultKind = "ResourceInUse"
	NotSupported       FaultKind = "NotSupported"
	KeyRequired        FaultKind = "KeyRequired" // Keys: missing on the host
	KeyState           FaultKind = "KeyState"    // Keys: in a state that forbids the use
	ProviderError      FaultKind = "ProviderError"
	ProviderDown       FaultKind = "ProviderUnreachable"
	InvalidDeviceSpec  FaultKind = "InvalidDeviceSpec"
	InvalidDeviceOp    FaultKind = "InvalidDeviceOperation"
	InvalidVMConfig    FaultKind = "InvalidVmConfig"
	GenericVMConfig    FaultKind = "GenericVmConfigFault" // a file of the VM is damaged or was tampered with
	HostDown           FaultKind = "HostNotConnected"     // Object: the host
	NoDiskSpace        FaultKind = "NoDiskSpace"
	FileNotFound       FaultKind = "FileNotFound"
	FileLocked         FaultKind = "FileLocked"
	Canceled           FaultKind = "RequestCanceled"
	InvalidCertificate FaultKind = "InvalidCertificate"
	Timedout           FaultKind = "Timedout"
	Internal           FaultKind = "SystemError"
)

// Fault is an error with a kind. Message names the thing, the reason and the
// way out; it holds no secret.
type Fault struct {
	Kind       FaultKind            `json:"kind"`
	Message    string               `json:"message"`
	MessageKey string               `json:"messageKey,omitempty"` // vSphere's, "msg.hostd.configSpec.enc.encrypted"
	Object     inventory.Ref        `json:"object,omitempty"`
	Name       string               `json:"name,omitempty"` // of the object, or the name that is taken
	Privilege  string               `json:"privilege,omitempty"`
	Field      string               `json:"field,omitempty"` // of the argument, "spec.crypto"
	Have       inventory.PowerState `json:"have,omitempty"`
	Need       inventory.PowerState `json:"need,omitempty"`
	Keys       []inventory.KeyID    `json:"keys,omitempty"`
	Task       inventory.Ref        `json:"task,omitempty"`

	cause error
}

// Error is the message.
func (f *Fault) Error() string { return f.Message }

// Unwrap is the cause, when one was given by [Fault.Because]. It is not stored.
func (f *Fault) Unwrap() error { return f.cause }

// Because sets the cause and returns f.
func (f *Fault) Because(err error) *Fault { f.cause = err; return f }

// AsFault finds the Fault in err; any other error becomes one of kind Internal.
// A nil err gives nil.
func AsFault(err error) *Fault {
	if err == nil {
		return nil
	}
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	return &Fault{Kind: Internal, Message: err.Error(), cause: err}
}

// Is tells whether err is a fault of kind.
func Is(err error, kind FaultKind) bool {
	var f *Fault
	return errors.As(err, &f) && f.Kind == kind
}
