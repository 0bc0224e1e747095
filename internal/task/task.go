// Package task runs center's long work: persisted state machines that survive a
// kill at any instant and go on with the same operation id.
//
// Place in the flow: a use case of center submits a task and returns its id;
// the vSphere API shows the record. A task's handler saves its own data after
// each step and skips, when it is run again, the steps that are done. The
// package imports inventory, event and store.
package task

import (
	"encoding/json"
	"time"

	"mortise/internal/inventory"
)

// State of a task, by its vSphere name.
type State string

// States.
const (
	Queued  State = "queued"
	Running State = "running"
	Success State = "success"
	Failed  State = "error"
)

// Record is one task. Records of it are immutable once handed out.
type Record struct {
	Ref        inventory.Ref `json:"ref"`
	Name       string        `json:"name"` // the method, "VirtualMachine.reconfigure"
	Entity     inventory.Ref `json:"entity"`
	EntityName string        `json:"entityName"`
	User       string        `json:"user"`

	State      State     `json:"state"`
	Progress   int32     `json:"progress"` // percent
	Stage      string    `json:"stage,omitempty"`
	DoneBytes  int64     `json:"doneBytes,omitempty"`
	TotalBytes int64     `json:"totalBytes,omitempty"`
	Rate       int64     `json:"rate,omitempty"` // bytes per second, lately; 0: not known
	Left       int64     `json:"left,omitempty"` // seconds, at that rate; 0: not known
	Queued     time.Time `json:"queued"`
	Started    time.Time `json:"started,omitzero"`
	Finished   time.Time `json:"finished,omitzero"`

	Cancelable bool          `json:"cancelable"`
	Cancelled  bool          `json:"cancelled,omitempty"` // somebody asked for it
	Undoing    bool          `json:"undoing,omitempty"`   // what it did is being taken back
	Paceable   bool          `json:"paceable,omitempty"`  // it rewrites data, at a pace that can be set
	Pace       Pace          `json:"pace,omitzero"`
	Error      *Fault        `json:"error,omitempty"`  // of a failed task
	Result     inventory.Ref `json:"result,omitempty"` // what the task made

	Operation string `json:"operation"` // a UUID: the operation id towards hosts and key providers

	Type  string          `json:"type"`            // of the handler; empty: runs with its caller and is not resumed
	Locks []string        `json:"locks,omitempty"` // what no other task may work on meanwhile
	Data  json.RawMessage `json:"data,omitempty"`  // the handler's
}

// A Pace holds back what a task rewrites; the zero Pace does not.
type Pace struct {
	Limit  int64 `json:"limit,omitempty"` // bytes per second; 0: no limit
	Paused bool  `json:"paused,omitempty"`
}

// Self makes a Record an inventory.Record; tasks have no parent.
func (r Record) Self() inventory.Entity { return inventory.Entity{Ref: r.Ref, Name: r.Name} }

// Done tells whether the task has ended.
func (r *Record) Done() bool { return r.State == Success || r.State == Failed }
