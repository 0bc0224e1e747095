package vimapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"

	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// vimFault is an error that has its vSphere form already.
type vimFault struct {
	fault   types.BaseMethodFault
	message string
}

func (f *vimFault) Error() string { return f.message }

func fault(f types.BaseMethodFault, format string, args ...any) error {
	return &vimFault{f, fmt.Sprintf(format, args...)}
}

func badRequest(format string, args ...any) error {
	return fault(&types.InvalidRequest{}, format, args...)
}

func invalidArgument(property, format string, args ...any) error {
	return fault(&types.InvalidArgument{InvalidProperty: property}, format, args...)
}

func notSupported(format string, args ...any) error {
	return fault(&types.NotSupported{}, format, args...)
}

func objectNotFound(ref types.ManagedObjectReference) error {
	return fault(&types.ManagedObjectNotFound{Obj: ref}, "the object %s has already been deleted or has never been there", describe(ref))
}

func (c *call) notAuthenticated(privilege string) error {
	if privilege == "" {
		privilege = authz.View
	}
	this := c.this
	return fault(&types.NotAuthenticated{NoPermission: types.NoPermission{Object: &this, PrivilegeId: privilege}},
		"the session is not authenticated: log in first")
}

func describe(ref types.ManagedObjectReference) string {
	return clip(ref.Type) + ":" + clip(ref.Value)
}

// asVim gives an error its vSphere form. Messages go to the user's screen: those
// of center's faults are written for it.
func asVim(err error) (types.BaseMethodFault, string) {
	var v *vimFault
	var denied *authz.DeniedError
	switch {
	case errors.As(err, &v):
		return v.fault, v.message
	case errors.As(err, &denied):
		return &types.NoPermission{Object: reference(denied.Entity), PrivilegeId: denied.Privilege}, err.Error()
	case errors.Is(err, authz.ErrBadCredentials):
		return &types.InvalidLogin{}, "wrong user name or password"
	case errors.Is(err, context.Canceled):
		return &types.RequestCanceled{}, "the call was cancelled"
	case errors.Is(err, context.DeadlineExceeded):
		return &types.Timedout{}, "the call took too long"
	}
	return fromFault(task.AsFault(err))
}

// fromFault translates a fault of center's.
func fromFault(f *task.Fault) (types.BaseMethodFault, string) {
	v := vimKind(f)
	if f.MessageKey != "" {
		v.GetMethodFault().FaultMessage = []types.LocalizableMessage{{Key: f.MessageKey, Message: f.Message}}
	}
	return v, f.Message
}

func vimKind(f *task.Fault) types.BaseMethodFault {
	name := f.Name
	if name == "" {
		name = string(f.Object)
	}
	switch f.Kind {
	case task.NotAuthenticated:
		return &types.NotAuthenticated{}
	case task.InvalidLogin:
		return &types.InvalidLogin{}
	case task.NoPermission:
		return &types.NoPermission{Object: reference(f.Object), PrivilegeId: f.Privilege}
	case task.NotFound:
		if ref := reference(f.Object); ref != nil {
			return &types.ManagedObjectNotFound{Obj: *ref}
		}
		return &types.NotFound{}
	case task.DuplicateName:
		d := &types.DuplicateName{Name: name}
		if ref := reference(f.Object); ref != nil {
			d.Object = *ref
		}
		return d
	case task.AlreadyExists:
		return &types.AlreadyExists{Name: name}
	case task.InvalidArgument, task.InvalidCertificate:
		return &types.InvalidArgument{InvalidProperty: f.Field}
	case task.InvalidState, task.KeyState:
		return &types.InvalidState{}
	case task.InvalidPowerState:
		return &types.InvalidPowerState{RequestedState: powerState(f.Need), ExistingState: powerState(f.Have)}
	case task.TaskInProgress:
		t := &types.TaskInProgress{}
		if ref := reference(f.Task); ref != nil {
			t.Task = *ref
		}
		return t
	case task.ResourceInUse:
		return &types.ResourceInUse{Type: string(f.Object.Kind()), Name: name}
	case task.NotSupported:
		return &types.NotSupported{}
	case task.KeyRequired:
		return &types.EncryptionKeyRequired{RequiredKey: keyIDs(f.Keys)}
	case task.InvalidDeviceSpec:
		return &types.InvalidDeviceSpec{InvalidVmConfig: types.InvalidVmConfig{Property: f.Field}}
	case task.InvalidDeviceOp:
		return &types.InvalidDeviceOperation{InvalidDeviceSpec: types.InvalidDeviceSpec{InvalidVmConfig: types.InvalidVmConfig{Property: f.Field}}}
	case task.InvalidVMConfig:
		return &types.InvalidVmConfig{Property: f.Field}
	case task.GenericVMConfig:
		return &types.GenericVmConfigFault{Reason: f.Message}
	case task.HostDown:
		return &types.HostNotConnected{}
	case task.NoDiskSpace:
		return &types.NoDiskSpace{Datastore: name}
	case task.FileNotFound:
		return &types.FileNotFound{FileFault: types.FileFault{File: name}}
	case task.FileLocked:
		return &types.FileLocked{FileFault: types.FileFault{File: name}}
	case task.Canceled:
		return &types.RequestCanceled{}
	case task.Timedout:
		return &types.Timedout{}
	}
	return &types.SystemError{Reason: f.Message}
}

func powerState(p inventory.PowerState) types.VirtualMachinePowerState {
	if p == "" {
		p = inventory.PoweredOff
	}
	return types.VirtualMachinePowerState(p)
}

func localized(err error) types.LocalizedMethodFault {
	f, message := asVim(err)
	return types.LocalizedMethodFault{Fault: f, LocalizedMessage: message}
}

// writeFault answers with a SOAP fault; HTTP's status of those is 500.
func (c *call) writeFault(err error) {
	f, message := asVim(err)
	if system, ok := f.(*types.SystemError); ok {
		c.s.log.Warn("vimapi: call failed", "method", c.name(), "err", err, "reason", system.Reason)
	} else {
		c.s.log.Debug("vimapi: call refused", "method", c.name(), "err", err)
	}
	c.version.prune(&c.s.fields, reflect.ValueOf(f))
	kind := reflect.TypeOf(f).Elem().Name()
	var out bytes.Buffer
	out.WriteString(envelopeStart + "<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>")
	xml.EscapeText(&out, []byte(message))
	out.WriteString("</faultstring><detail>")
	encodeErr := encodeElement(&out, xml.Name{Space: "urn:vim25", Local: kind + "Fault"}, f,
		xml.Attr{Name: xml.Name{Space: "http://www.w3.org/2001/XMLSchema-instance", Local: "type"}, Value: kind})
	if encodeErr != nil {
		c.s.log.Error("vimapi: encoding a fault", "kind", kind, "err", encodeErr)
		http.Error(c.w, "internal error", http.StatusInternalServerError)
		return
	}
	out.WriteString("</detail></soapenv:Fault>" + envelopeEnd)
	c.w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	c.w.WriteHeader(http.StatusInternalServerError)
	c.w.Write(out.Bytes())
}

func (c *call) name() string {
	if c.method == nil {
		return ""
	}
	return c.method.name
}
