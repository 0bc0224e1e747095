package vimapi

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// maxLocalTasks bounds the ended local tasks that a session keeps.
const maxLocalTasks = 50

// localTaskTimeout bounds one.
const localTaskTimeout = 5 * time.Minute

// localTask is a Task for a call that the API makes one and center does not: a
// question to key servers, several calls in one. It belongs to its session and
// changes nothing by itself, so nothing is lost when it ends with it.
type localTask struct {
	ref  types.ManagedObjectReference
	mu   sync.Mutex
	info types.TaskInfo
}

func (t *localTask) snapshot() types.TaskInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.info
}

// background runs f as a local task and returns its reference.
func (c *call) background(name string, entity types.ManagedObjectReference, f func(context.Context) (any, error)) (types.ManagedObjectReference, error) {
	c.client.pruneTasks()
	s, now := c.s, c.s.clock().UTC()
	o, err := c.client.own("Task", func(ref types.ManagedObjectReference) any {
		return &localTask{ref: ref, info: types.TaskInfo{
			Key: ref.Value, Task: ref, DescriptionId: name, Name: methodOf(name), Entity: &entity, State: types.TaskInfoStateRunning,
			Reason: &types.TaskReasonUser{UserName: c.principal().User}, QueueTime: now, StartTime: &now,
		}}
	})
	if err != nil {
		return types.ManagedObjectReference{}, err
	}
	t := o.(*localTask)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), localTaskTimeout)
	s.running.Go(func() {
		defer cancel()
		stop := context.AfterFunc(s.ctx, cancel)
		defer stop()
		result, err := guarded(func() (any, error) { return f(ctx) })
		t.mu.Lock()
		t.info.CompleteTime = ptr(s.clock().UTC())
		t.info.State = types.TaskInfoStateSuccess
		if err != nil {
			t.info.State, t.info.Error = types.TaskInfoStateError, ptr(localized(err))
		} else {
			t.info.Result = box(reflect.ValueOf(result))
		}
		t.mu.Unlock()
		s.hub.outside()
	})
	return t.ref, nil
}

// guarded makes a panic an error.
func guarded(f func() (any, error)) (result any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	return f()
}

// pruneTasks forgets the oldest ended tasks when there are many.
func (c *client) pruneTasks() {
	var ended []*localTask
	for _, t := range owned[*localTask](c) {
		if t.snapshot().CompleteTime != nil {
			ended = append(ended, t)
		}
	}
	for len(ended) >= maxLocalTasks {
		oldest := 0
		for i, t := range ended {
			if t.snapshot().CompleteTime.Before(*ended[oldest].snapshot().CompleteTime) {
				oldest = i
			}
		}
		c.disown(ended[oldest].ref)
		ended = append(ended[:oldest], ended[oldest+1:]...)
	}
}
