package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/google/uuid"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// keep is how many finished tasks stay in the store.
const keep = 1000

// ErrCanceled is the cause of a run's context when somebody cancelled the task.
var ErrCanceled = errors.New("task cancelled")

// errStopped is the cause when the engine stops: the task will be resumed.
var errStopped = errors.New("center stops")

// A Handler does a task's work. It is called anew after a restart of center,
// with what the last [Run.Save] left, and must go on from there.
type Handler func(ctx context.Context, run *Run) error

// Config is what an engine works with.
type Config struct {
	Inventory *inventory.Inventory
	Logger    *slog.Logger
	Clock     func() time.Time
	// Failpoint is called before and after every step is made durable; tests
	// stop center there. nil: not called.
	Failpoint func(ctx context.Context, run *Run, step string)
}

// Engine runs tasks. Its methods may be called concurrently.
type Engine struct {
	cfg      Config
	records  *store.Collection[Record]
	handlers map[string]Handler
	keep     int

	mu      sync.Mutex // guards what follows
	locks   map[string]inventory.Ref
	runs    map[inventory.Ref]*Run
	ctx     context.Context // of Run; nil before
	stopped bool
	working sync.WaitGroup
}

// NewEngine loads the tasks. handlers maps a [Spec.Type] to its handler.
// Nothing runs before [Engine.Run].
func NewEngine(ctx context.Context, cfg Config, handlers map[string]Handler) (*Engine, error) {
	e := &Engine{cfg: cfg, handlers: handlers, keep: keep, locks: map[string]inventory.Ref{}, runs: map[inventory.Ref]*Run{}}
	if err := inventory.Track(ctx, cfg.Inventory, "task", &e.records); err != nil {
		return nil, fmt.Errorf("task: %w", err)
	}
	entries, err := e.records.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("task: %w", err)
	}
	for _, entry := range entries {
		if entry.Value.Done() {
			continue
		}
		run := &Run{engine: e, id: entry.Value, record: entry.Value, revision: entry.Revision}
		if entry.Value.Type == "" {
			fault := &Fault{Kind: Canceled, Message: fmt.Sprintf("%s of %q was cut off by a restart of center; start it again", entry.Value.Name, entry.Value.EntityName)}
			if err := run.finish(ctx, fault); err != nil {
				return nil, err
			}
			continue
		}
		for _, l := range entry.Value.Locks {
			e.locks[l] = entry.Value.Ref
		}
		e.runs[entry.Value.Ref] = run
	}
	return e, nil
}

// Run resumes the tasks that a former process left, lets new ones begin, and
// returns when ctx has ended and every handler has returned.
func (e *Engine) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	e.mu.Lock()
	e.ctx = ctx
	for _, run := range e.runs {
		e.cfg.Logger.Info("task resumes", "task", run.id.Ref, "name", run.id.Name, "entity", run.id.EntityName)
		e.launch(run)
	}
	e.mu.Unlock()
	<-ctx.Done()
	e.mu.Lock()
	e.stopped = true
	e.mu.Unlock()
	stop(errStopped)
	e.working.Wait()
	return nil
}

// Spec describes a task to submit.
type Spec struct {
	Type   string // of the handler
	Name   string // "VirtualMachine.powerOn"
	Entity inventory.Ref
	User   string
	// Locks names what no other task may work on meanwhile. Entity is not
	// locked by itself.
	Locks      []string
	Cancelable bool
	Paceable   bool
	Data       any
	// Ops are committed together with the record.
	Ops []store.Op
}

// Submit writes the task down and lets it begin. When another task works on
// what it needs, it fails with a TaskInProgress fault.
func (e *Engine) Submit(ctx context.Context, spec Spec) (inventory.Ref, error) {
	if _, known := e.handlers[spec.Type]; !known {
		return "", fmt.Errorf("task: no handler for type %q", spec.Type)
	}
	run, err := e.begin(ctx, spec)
	if err != nil {
		return "", err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.launch(run)
	return run.id.Ref, nil
}

// Do runs f as a task in the caller's goroutine, under the caller's context. It
// is seen and cancelled like any task, but ends with its caller.
func (e *Engine) Do(ctx context.Context, spec Spec, f Handler) error {
	spec.Type = ""
	run, err := e.begin(ctx, spec)
	if err != nil {
		return err
	}
	e.mu.Lock()
	if e.stopped {
		e.mu.Unlock()
		return errStopped
	}
	engine := e.ctx
	e.working.Add(1)
	e.mu.Unlock()
	defer e.working.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if engine != nil {
		defer context.AfterFunc(engine, func() { cancel(errStopped) })()
	}
	return e.execute(ctx, cancel, run, f)
}

// begin takes the locks and makes the record durable.
func (e *Engine) begin(ctx context.Context, spec Spec) (*Run, error) {
	data, err := json.Marshal(spec.Data)
	if err != nil {
		return nil, fmt.Errorf("task: encoding the data of %s: %w", spec.Name, err)
	}
	ref, err := e.cfg.Inventory.NextRef(ctx, "task")
	if err != nil {
		return nil, err
	}
	name := ""
	if r, ok := e.cfg.Inventory.View().Get(spec.Entity); ok {
		name = r.Self().Name
	}
	record := Record{
		Ref: ref, Name: spec.Name, Entity: spec.Entity, EntityName: name, User: spec.User,
		State: Queued, Queued: e.cfg.Clock(), Cancelable: spec.Cancelable, Paceable: spec.Paceable,
		Operation: uuid.NewString(), Type: spec.Type, Locks: spec.Locks, Data: data,
	}
	if err := e.take(record); err != nil {
		return nil, err
	}
	ops := append([]store.Op{e.records.Create(string(ref), record)}, spec.Ops...)
	if err := e.cfg.Inventory.Commit(ctx, ops...); err != nil {
		e.release(record)
		return nil, fmt.Errorf("task: writing down %s: %w", spec.Name, err)
	}
	entry, err := e.records.Get(ctx, string(ref))
	if err != nil {
		e.release(record)
		return nil, fmt.Errorf("task: reading %s back: %w", ref, err)
	}
	run := &Run{engine: e, id: entry.Value, record: entry.Value, revision: entry.Revision}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.runs[ref] = run
	return run, nil
}

func (e *Engine) take(r Record) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopped {
		return &Fault{Kind: InvalidState, Message: "center is stopping; repeat the request when it is back"}
	}
	for _, l := range r.Locks {
		if by, taken := e.holder(l); taken {
			what, name := "another task", r.EntityName
			if run := e.runs[by]; run != nil {
				what, name = run.id.Name, run.id.EntityName
			}
			return &Fault{Kind: TaskInProgress, Task: by, Object: r.Entity, Name: name,
				Message: fmt.Sprintf("%s (%s) is working on %q; wait for it, or cancel it, and repeat the request", what, by, name)}
		}
	}
	for _, l := range r.Locks {
		e.locks[l] = r.Ref
	}
	return nil
}

func (e *Engine) release(r Record) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range r.Locks {
		if e.locks[l] == r.Ref {
			delete(e.locks, l)
		}
	}
	delete(e.runs, r.Ref)
}

// Locked tells which task holds lock, if any.
func (e *Engine) Locked(lock string) (inventory.Ref, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.holder(lock)
}

// holder is who holds lock. A task whose end is written holds nothing, even if
// its goroutine has yet to say so: who has seen the end may begin the next task
// at once. The engine's lock is held.
func (e *Engine) holder(lock string) (inventory.Ref, bool) {
	by, taken := e.locks[lock]
	if !taken {
		return "", false
	}
	r, ok := inventory.Lookup[Record](e.cfg.Inventory.View(), by)
	return by, !ok || !r.Done()
}

// launch starts run's goroutine once the engine runs. The lock is held.
func (e *Engine) launch(run *Run) {
	if e.ctx == nil || e.stopped || run.started || run.id.Type == "" {
		return
	}
	run.started = true
	e.working.Go(func() {
		ctx, cancel := context.WithCancelCause(e.ctx)
		defer cancel(nil)
		h, known := e.handlers[run.id.Type]
		if !known {
			h = func(context.Context, *Run) error {
				return &Fault{Kind: NotSupported, Message: fmt.Sprintf("this version of center knows no task of type %q; finish it with the version that began it", run.id.Type)}
			}
		}
		e.execute(ctx, cancel, run, h)
	})
}

// execute runs h to its end and writes the end down; a task that center's stop
// interrupts stays as it is, to be resumed.
func (e *Engine) execute(ctx context.Context, cancel context.CancelCauseFunc, run *Run, h Handler) error {
	run.mu.Lock()
	run.cancel = cancel
	if run.record.Cancelled {
		cancel(ErrCanceled)
	}
	run.mu.Unlock()
	err := run.start(context.WithoutCancel(ctx)) // one that was cancelled before center stopped has something to take back
	if err == nil {
		err = guarded(ctx, run, h)
	}
	if e.stopping(ctx) && run.id.Type != "" {
		return err
	}
	if err != nil && errors.Is(context.Cause(ctx), ErrCanceled) && errors.Is(err, context.Canceled) {
		err = (&Fault{Kind: Canceled, Object: run.id.Entity, Message: fmt.Sprintf("%s of %q was cancelled", run.id.Name, run.id.EntityName)}).Because(ErrCanceled)
	}
	fault := AsFault(err)
	if ferr := run.finish(context.WithoutCancel(ctx), fault); ferr != nil {
		e.cfg.Logger.Error("the end of a task could not be written; it will be resumed", "task", run.id.Ref, "error", ferr)
	}
	e.release(run.id)
	if fault == nil {
		e.cfg.Logger.Info("task succeeded", "task", run.id.Ref, "name", run.id.Name, "entity", run.id.EntityName)
		return nil
	}
	e.cfg.Logger.Warn("task failed", "task", run.id.Ref, "name", run.id.Name, "entity", run.id.EntityName, "fault", fault.Kind, "error", fault.Message)
	return fault
}

// guarded turns a handler's panic into its task's error: one broken task must
// not take down the tasks of others.
func guarded(ctx context.Context, run *Run, h Handler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			run.engine.cfg.Logger.Error("a task's handler panicked", "task", run.id.Ref, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = fmt.Errorf("task %s broke off in an unforeseen way; center's log has the details", run.id.Ref)
		}
	}()
	return h(ctx, run)
}

func (e *Engine) stopping(ctx context.Context) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stopped || errors.Is(context.Cause(ctx), errStopped) || e.ctx != nil && e.ctx.Err() != nil
}

// Cancel asks a task to end. A task that cannot be cancelled, or has ended,
// gives a fault.
func (e *Engine) Cancel(ctx context.Context, ref inventory.Ref) error {
	e.mu.Lock()
	run := e.runs[ref]
	e.mu.Unlock()
	if run == nil {
		r, ok := inventory.Lookup[Record](e.cfg.Inventory.View(), ref)
		if !ok {
			return &Fault{Kind: NotFound, Object: ref, Message: fmt.Sprintf("there is no task %s", ref)}
		}
		return &Fault{Kind: InvalidState, Object: ref, Message: fmt.Sprintf("task %s has ended already (%s)", ref, r.State)}
	}
	return run.cancelBy(ctx)
}

// SetPace changes the pace of a task that rewrites data; others, and those that have
// ended, give a fault.
func (e *Engine) SetPace(ctx context.Context, ref inventory.Ref, change func(*Pace)) error {
	e.mu.Lock()
	run := e.runs[ref]
	e.mu.Unlock()
	if run == nil {
		r, ok := inventory.Lookup[Record](e.cfg.Inventory.View(), ref)
		if !ok {
			return &Fault{Kind: NotFound, Object: ref, Message: fmt.Sprintf("there is no task %s", ref)}
		}
		return &Fault{Kind: InvalidState, Object: ref, Message: fmt.Sprintf("task %s has ended already (%s)", ref, r.State)}
	}
	return run.setPace(ctx, change)
}

// Wait returns the task's record when it has ended; only ctx ends it earlier.
func (e *Engine) Wait(ctx context.Context, ref inventory.Ref) (*Record, error) {
	view := e.cfg.Inventory.View()
	for {
		at := view.Revision()
		r, ok := inventory.Lookup[Record](view, ref)
		if !ok {
			return nil, &Fault{Kind: NotFound, Object: ref, Message: fmt.Sprintf("there is no task %s", ref)}
		}
		if r.Done() {
			return r, nil
		}
		if _, _, _, err := view.Changes(ctx, at); err != nil {
			return nil, err
		}
	}
}

// prune deletes the oldest finished tasks beyond those that are kept.
func (e *Engine) prune(ctx context.Context) {
	all := e.cfg.Inventory.View().All(inventory.KindTask)
	if len(all) <= e.keep+e.keep/10 {
		return
	}
	var ops []store.Op
	for _, ref := range all[:len(all)-e.keep] {
		if r, ok := inventory.Lookup[Record](e.cfg.Inventory.View(), ref); ok && r.Done() && len(ops) < keep {
			ops = append(ops, e.records.Delete(string(ref), 0))
		}
	}
	if len(ops) == 0 {
		return
	}
	if err := e.cfg.Inventory.Commit(ctx, ops...); err != nil && !errors.Is(err, store.ErrNotFound) {
		e.cfg.Logger.Warn("old tasks could not be deleted", "error", err)
	}
}
