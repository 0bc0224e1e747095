package task

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// progressEvery bounds how often a task's progress is written.
const progressEvery = 500 * time.Millisecond

// Run is a task while it runs: what its handler works with. Its methods may be
// called concurrently.
type Run struct {
	engine  *Engine
	id      Record // as it began: for what never changes
	started bool   // guarded by engine.mu

	mu       sync.Mutex // guards what follows, and the writing of the record
	record   Record
	revision int64
	cancel   context.CancelCauseFunc
	reported time.Time     // when progress was last written
	paced    chan struct{} // closed when the pace is set; nil: nobody waits
}

// Ref is the task's.
func (r *Run) Ref() inventory.Ref { return r.id.Ref }

// Operation is the id under which hosts and key providers know the task's acts:
// the same when it is resumed.
func (r *Run) Operation() string { return r.id.Operation }

// Entity is what the task works on.
func (r *Run) Entity() inventory.Ref { return r.id.Entity }

// What names the task in a sentence: "VirtualMachine.reconfigure of "web"".
func (r *Run) What() string { return fmt.Sprintf("%s of %q", r.id.Name, r.id.EntityName) }

// Engine ends when the engine stops: who goes on after the run's own context has
// ended, to undo something, still stops with it.
func (r *Run) Engine() context.Context {
	r.engine.mu.Lock()
	defer r.engine.mu.Unlock()
	if r.engine.ctx == nil {
		return context.Background()
	}
	return r.engine.ctx
}

// User is who started the task.
func (r *Run) User() string { return r.id.User }

// Load reads the handler's data: what was submitted, or last saved.
func (r *Run) Load(data any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := json.NewDecoder(bytes.NewReader(r.record.Data))
	d.DisallowUnknownFields()
	if err := d.Decode(data); err != nil {
		return fmt.Errorf("task %s: reading its data: %w", r.id.Ref, err)
	}
	return nil
}

// Save makes data durable, after step and before the next, together with ops:
// what the step changed elsewhere and the memory that it was done cannot come
// apart.
func (r *Run) Save(ctx context.Context, step string, data any, ops ...store.Op) error {
	raw, err := json.Marshal(data)
	if err != nil {
		return fmt.Errorf("task %s: encoding its data: %w", r.id.Ref, err)
	}
	if err := r.failpoint(ctx, step+": before"); err != nil {
		return err
	}
	err = r.write(ctx, func(rec *Record) { rec.Data = raw }, ops...)
	if err != nil {
		return err
	}
	return r.failpoint(ctx, step+": after")
}

// Reached is a failpoint of a step that writes nothing here.
func (r *Run) Reached(ctx context.Context, step string) error { return r.failpoint(ctx, step) }

func (r *Run) failpoint(ctx context.Context, step string) error {
	if f := r.engine.cfg.Failpoint; f != nil {
		f(ctx, r, step)
		return ctx.Err()
	}
	return nil
}

// Progress says how far a task is. Zero fields are not known.
type Progress struct {
	Stage       string
	Done, Total int64 // bytes
	Rate        int64 // bytes per second
	Left        int64 // seconds
}

// Progress reports how far the task is, in bytes that may be 0.
func (r *Run) Progress(ctx context.Context, stage string, done, total int64) {
	r.Report(ctx, Progress{Stage: stage, Done: done, Total: total})
}

// Report reports how far the task is. It is written at most twice a second,
// except when the stage changes.
func (r *Run) Report(ctx context.Context, p Progress) {
	r.mu.Lock()
	now := r.engine.cfg.Clock()
	if p.Stage == r.record.Stage && now.Sub(r.reported) < progressEvery {
		r.mu.Unlock()
		return
	}
	r.reported = now
	r.mu.Unlock()
	err := r.write(ctx, func(rec *Record) {
		rec.Stage, rec.DoneBytes, rec.TotalBytes, rec.Rate, rec.Left = p.Stage, p.Done, p.Total, p.Rate, p.Left
		if p.Total > 0 {
			rec.Progress = int32(min(99, max(0, p.Done)*100/p.Total))
		}
	})
	if err != nil && ctx.Err() == nil {
		r.engine.cfg.Logger.Warn("a task's progress could not be written", "task", r.id.Ref, "error", err)
	}
}

// Pace is the task's pace, and a channel that is closed when it is set anew.
func (r *Run) Pace() (Pace, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paced == nil {
		r.paced = make(chan struct{})
	}
	return r.record.Pace, r.paced
}

func (r *Run) setPace(ctx context.Context, change func(*Pace)) error {
	var ended bool
	err := r.write(ctx, func(rec *Record) {
		if ended = rec.Done(); !ended && rec.Paceable {
			change(&rec.Pace)
		}
	})
	switch {
	case err != nil:
		return err
	case ended:
		return &Fault{Kind: InvalidState, Object: r.id.Ref, Message: fmt.Sprintf("task %s has ended already", r.id.Ref)}
	case !r.id.Paceable:
		return &Fault{Kind: NotSupported, Object: r.id.Ref, Message: fmt.Sprintf("%s (%s) converts no disk: there is nothing to pause or to hold back", r.id.Name, r.id.Ref)}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paced != nil {
		close(r.paced)
		r.paced = nil
	}
	return nil
}

// Undo makes durable, with data, that the task takes back what it did. From now on
// it is too late to cancel it.
func (r *Run) Undo(ctx context.Context, data any) error {
	raw, err := json.Marshal(data)
	if err != nil {
		return fmt.Errorf("task %s: encoding its data: %w", r.id.Ref, err)
	}
	if err := r.failpoint(ctx, "undo: before"); err != nil {
		return err
	}
	if err := r.write(ctx, func(rec *Record) { rec.Data, rec.Undoing, rec.Cancelable = raw, true, false }); err != nil {
		return err
	}
	return r.failpoint(ctx, "undo: after")
}

// SetResult names what the task made.
func (r *Run) SetResult(ctx context.Context, ref inventory.Ref) error {
	return r.write(ctx, func(rec *Record) { rec.Result = ref })
}

// SetCancelable says whether the task can be cancelled from now on. It fails
// with ErrCanceled when somebody was faster.
func (r *Run) SetCancelable(ctx context.Context, can bool) error {
	var was bool
	err := r.write(ctx, func(rec *Record) {
		if was = rec.Cancelled; !was {
			rec.Cancelable = can
		}
	})
	if err == nil && was && !can {
		return &Fault{Kind: Canceled, Object: r.id.Entity, Message: fmt.Sprintf("%s of %q was cancelled", r.id.Name, r.id.EntityName)}
	}
	return err
}

// Stopping tells whether the task is interrupted by center's stop, and will be
// resumed: nothing is to be undone then.
func (r *Run) Stopping(ctx context.Context) bool { return r.engine.stopping(ctx) }

func (r *Run) start(ctx context.Context) error {
	return r.write(ctx, func(rec *Record) {
		rec.State = Running
		if rec.Started.IsZero() {
			rec.Started = r.engine.cfg.Clock()
		}
	})
}

// finish writes the task's end.
func (r *Run) finish(ctx context.Context, fault *Fault) error {
	err := r.write(ctx, func(rec *Record) {
		rec.State, rec.Progress, rec.Error, rec.Finished, rec.Cancelable = Success, 100, nil, r.engine.cfg.Clock(), false
		if fault != nil {
			rec.State, rec.Progress, rec.Error = Failed, 0, fault
		}
	})
	if err == nil {
		r.engine.prune(ctx)
	}
	return err
}

func (r *Run) cancelBy(ctx context.Context) error {
	var refused, ended, undoing bool
	err := r.write(ctx, func(rec *Record) {
		ended, undoing = rec.Done(), rec.Undoing
		if refused = !rec.Cancelable || ended; !refused {
			rec.Cancelled = true
		}
	})
	if err != nil {
		return err
	}
	if ended {
		return &Fault{Kind: InvalidState, Object: r.id.Ref, Message: fmt.Sprintf("task %s has ended already", r.id.Ref)}
	}
	if undoing {
		return &Fault{Kind: InvalidState, Object: r.id.Ref,
			Message: fmt.Sprintf("%s (%s) is cancelled already, and it is too late to stop it: what it did is being taken back; wait for its end", r.id.Name, r.id.Ref)}
	}
	if refused {
		return &Fault{Kind: NotSupported, Object: r.id.Ref,
			Message: fmt.Sprintf("%s (%s) cannot be cancelled any more; it only goes forward", r.id.Name, r.id.Ref)}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cancel != nil {
		r.cancel(ErrCanceled)
	}
	return nil
}

// write changes the record, together with ops. The run is the record's only
// writer, so a conflict is an op's.
func (r *Run) write(ctx context.Context, change func(*Record), ops ...store.Op) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.record
	change(&next)
	all := append([]store.Op{r.engine.records.Update(string(next.Ref), r.revision, next)}, ops...)
	rev, err := r.engine.cfg.Inventory.CommitAt(ctx, all...)
	if err == nil {
		r.record, r.revision = next, rev
		return nil
	}
	err = fmt.Errorf("task %s: %w", r.id.Ref, err)
	if !errors.Is(err, store.ErrUnavailable) {
		return err
	}
	// The outcome is unknown: read what holds before anything builds on it.
	entry, gerr := r.engine.records.Get(context.WithoutCancel(ctx), string(next.Ref))
	if gerr != nil {
		return errors.Join(err, gerr)
	}
	r.record, r.revision = entry.Value, entry.Revision
	return err
}
