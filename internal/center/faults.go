package center

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"mortise/internal/authz"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/store"
	"mortise/internal/task"
)

// fault makes a fault of kind.
func fault(kind task.FaultKind, format string, args ...any) *Fault {
	return &Fault{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// invalid is a fault about an argument.
func invalid(field, format string, args ...any) *Fault {
	f := fault(task.InvalidArgument, format, args...)
	f.Field = field
	return f
}

// Check returns a NoPermission fault unless p has privilege on entity.
func (c *Center) Check(p Principal, privilege string, entity Ref) error {
	err := c.authz.Check(p, privilege, entity)
	if err == nil {
		return nil
	}
	var denied *authz.DeniedError
	if !errors.As(err, &denied) {
		return err
	}
	name := string(entity)
	if r, ok := c.view.Get(entity); ok {
		name = fmt.Sprintf("%s %q", kindWord(entity.Kind()), r.Self().Name)
	}
	f := fault(task.NoPermission, "user %q lacks the privilege %s on %s; an administrator can grant a role that has it", p.User, privilege, name)
	f.Object, f.Privilege, f.Name = entity, privilege, name
	return f.Because(err)
}

// checkAll is Check for several privileges on one entity.
func (c *Center) checkAll(p Principal, entity Ref, privileges ...string) error {
	for _, privilege := range privileges {
		if err := c.Check(p, privilege, entity); err != nil {
			return err
		}
	}
	return nil
}

func kindWord(k inventory.Kind) string {
	switch k {
	case inventory.KindVM:
		return "VM"
	case inventory.KindHost:
		return "host"
	case inventory.KindCluster:
		return "cluster"
	case inventory.KindResourcePool:
		return "resource pool"
	}
	return strings.ToLower(string(k))
}

// lookup finds the record of ref. What p may not even see is not there for p.
func lookup[T any](c *Center, p Principal, ref Ref) (*T, error) {
	t, ok := inventory.Lookup[T](c.view, ref)
	if !ok {
		f := fault(task.NotFound, "there is no object %s, or it is of another kind; it may have been removed", ref)
		f.Object = ref
		return nil, f
	}
	if err := c.Check(p, authz.View, ref); err != nil {
		return nil, err
	}
	return t, nil
}

// storeFault words a store's error.
func storeFault(doing string, err error) error {
	if err == nil || errors.As(err, new(*Fault)) {
		return err
	}
	switch {
	case errors.Is(err, store.ErrFull):
		return fault(task.NoDiskSpace, "%s: center's database is full; delete old events and tasks or raise its quota", doing).Because(err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return fault(task.Internal, "%s: %v", doing, err).Because(err)
}

// hostFault words what a host answered. host names it; vm may be nil.
func hostFault(host *inventory.Host, vm *inventory.VM, doing string, err error) error {
	if err == nil || errors.As(err, new(*Fault)) {
		return err
	}
	if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
		return fmt.Errorf("%s on host %q: %w", doing, host.Name, context.Canceled)
	}
	detail, text := hostapi.AsFault(err)
	f := fault(task.Internal, "%s on host %q: %s", doing, host.Name, text).Because(err)
	f.Object = host.Ref
	if vm != nil {
		f.Object, f.Name = vm.Ref, vm.Name
	}
	switch detail.Kind {
	case hostapi.Fault_MISSING_KEYS:
		f.Kind, f.MessageKey = task.KeyRequired, "msg.vigor.enc.keyNotFound"
		for _, k := range detail.Missing {
			f.Keys = append(f.Keys, KeyID{Provider: k.GetProvider(), Key: k.GetKey()})
		}
	case hostapi.Fault_TAMPERED:
		f.Kind, f.MessageKey = task.GenericVMConfig, "msg.keysafe.locator"
	case hostapi.Fault_IN_USE:
		f.Kind = task.FileLocked
	case hostapi.Fault_NO_SPACE:
		f.Kind = task.NoDiskSpace
	case hostapi.Fault_WRONG_POWER_STATE:
		f.Kind = task.InvalidPowerState
	case hostapi.Fault_NOT_FOUND:
		f.Kind = task.FileNotFound
	case hostapi.Fault_EXISTS:
		f.Kind = task.AlreadyExists
	case hostapi.Fault_NOT_SUPPORTED:
		f.Kind = task.NotSupported
	case hostapi.Fault_INVALID:
		f.Kind = task.InvalidVMConfig
	case hostapi.Fault_BUSY:
		f.Kind = task.ResourceInUse
	case hostapi.Fault_UNKNOWN:
		switch status.Code(err) {
		case codes.Unavailable:
			f.Kind, f.Object = task.HostDown, host.Ref
			f.Message = fmt.Sprintf("%s: host %q does not answer (%s); see whether its agent runs and center reaches it at %s", doing, host.Name, text, host.Address)
		case codes.DeadlineExceeded:
			f.Kind = task.Timedout
		case codes.Unimplemented:
			f.Kind = task.NotSupported
			f.Message = fmt.Sprintf("%s: host %q runs a version of Mortise that cannot do this; upgrade it", doing, host.Name)
		}
	}
	return f
}

// hostDown is the fault of a host that center does not reach.
func hostDown(h *inventory.Host, doing string) *Fault {
	why := h.Problem
	if why == "" {
		why = "it has not answered yet"
	}
	f := fault(task.HostDown, "%s needs host %q, which is not connected (%s); see whether its agent runs and center reaches it at %s", doing, h.Name, why, h.Address)
	f.Object, f.Name = h.Ref, h.Name
	return f
}

// wrongPower is the fault of a VM in another power state than needed.
func wrongPower(vm *inventory.VM, need inventory.PowerState, doing string) *Fault {
	f := fault(task.InvalidPowerState, "%s needs VM %q to be %s; it is %s", doing, vm.Name, powerWord(need), powerWord(vm.Power))
	f.Object, f.Name, f.Have, f.Need = vm.Ref, vm.Name, vm.Power, need
	return f
}

func powerWord(s inventory.PowerState) string {
	switch s {
	case inventory.PoweredOff:
		return "powered off"
	case inventory.PoweredOn:
		return "powered on"
	}
	return string(s)
}
