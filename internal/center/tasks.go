package center

import (
	"context"
	"errors"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// The types of tasks that are resumed after a restart.
const (
	taskCreate      = "vm.create"
	taskRegister    = "vm.register"
	taskReconfigure = "vm.reconfigure"
	taskPower       = "vm.power"
	taskDestroy     = "vm.destroy"
	taskUnlock      = "vm.unlock"
	taskSnapshot    = "vm.snapshot"
)

// CancelTask asks a task to end. Who started it may, and who has the privilege
// on what it works on.
func (c *Center) CancelTask(ctx context.Context, p Principal, ref Ref) error {
	if err := c.mayLead(p, ref); err != nil {
		return err
	}
	return c.tasks.Cancel(ctx, ref)
}

// A PaceChange says what of a task's pace is to change; nil: as it is.
type PaceChange struct {
	Limit  *int64 // bytes per second; 0: none
	Paused *bool
}

// SetTaskPace pauses, holds back or lets go a task that converts disks. Who may
// cancel it may.
func (c *Center) SetTaskPace(ctx context.Context, p Principal, ref Ref, change PaceChange) error {
	if err := c.mayLead(p, ref); err != nil {
		return err
	}
	if n := change.Limit; n != nil && *n < 0 {
		return invalid("limit", "a limit of %d bytes per second: it is more than 0, or 0 for none", *n)
	}
	return c.tasks.SetPace(ctx, ref, func(pace *task.Pace) {
		if change.Limit != nil {
			pace.Limit = *change.Limit
		}
		if change.Paused != nil {
			pace.Paused = *change.Paused
		}
	})
}

func (c *Center) mayLead(p Principal, ref Ref) error {
	r, ok := inventory.Lookup[task.Record](c.view, ref)
	if !ok {
		f := fault(task.NotFound, "there is no task %s", ref)
		f.Object = ref
		return f
	}
	if r.User != p.User {
		if err := c.Check(p, authz.GlobalCancelTask, r.Entity); err != nil {
			return err
		}
	}
	return nil
}

// WaitTask returns when the task has ended, with its fault if it failed. When
// ctx ends earlier it is ctx's error.
func (c *Center) WaitTask(ctx context.Context, ref Ref) error {
	r, err := c.tasks.Wait(ctx, ref)
	if err != nil {
		return err
	}
	if r.Error != nil {
		return r.Error
	}
	return nil
}

// lockVM is the lock that a task on a VM holds.
func lockVM(vm Ref) []string { return []string{string(vm)} }

// principal is who started a task, whose privileges are those of today.
func principal(run *task.Run) Principal { return Principal{User: run.User()} }

// undoing returns a context in which a task can be undone although it was
// cancelled; center's stop still ends it, and the rest is done when center is
// back.
func undoing(ctx context.Context, run *task.Run) (context.Context, context.CancelFunc) {
	free, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(run.Engine(), cancel)
	return free, func() { stop(); cancel() }
}

// canceledFault is the fault that err is; a cancelled task's says so.
func canceledFault(run *task.Run, err error) *Fault {
	if errors.Is(err, context.Canceled) && !errors.As(err, new(*Fault)) {
		f := fault(task.Canceled, "%s was cancelled", run.What())
		f.Object = run.Entity()
		return f
	}
	return task.AsFault(err)
}
