package vimapi

import (
	"math"
	"slices"
	"sync"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
	"mortise/internal/task"
)

func taskMethods() []method {
	return []method{
		row("Task", "CancelTask", "", (*call).cancelTask).small(),
		row("TaskManager", "CreateCollectorForTasks", "", (*call).createTaskCollector).small(),
		row("TaskHistoryCollector", "ReadNextTasks", "", (*call).readNextTasks).small(),
		row("TaskHistoryCollector", "ReadPreviousTasks", "", (*call).readPreviousTasks).small(),
		row("HistoryCollector", "RewindCollector", "", (*call).rewindCollector).small(),
		row("HistoryCollector", "ResetCollector", "", (*call).resetCollector).small(),
		row("HistoryCollector", "SetCollectorPageSize", "", (*call).setCollectorPageSize).small(),
		row("HistoryCollector", "DestroyCollector", "", (*call).destroyCollector).small(),
	}
}

func (c *call) cancelTask(q *types.CancelTask) (*types.CancelTaskResponse, error) {
	if o, ok := c.lookup(q.This); ok {
		if _, local := o.of.(*localTask); local {
			return nil, notSupported("this task cannot be cancelled")
		}
	}
	return &types.CancelTaskResponse{}, c.s.center.CancelTask(c.ctx, c.principal(), ref(q.This))
}

// history is a TaskHistoryCollector or an EventHistoryCollector: a place in a
// list that grows at its end.
type history struct {
	ref   types.ManagedObjectReference
	tasks types.TaskFilterSpec
	event types.EventFilterSpec

	mu   sync.Mutex
	page int
	// at is the id after which reading forward goes on; reading backward goes
	// on before it.
	at, before int64
}

// seek makes reading forward go on after an id, and backward from the newest.
func (h *history) seek(after int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.at, h.before = after, 0
}

func (h *history) pageSize() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.page
}

const (
	defaultPage = 10
	maxPage     = 1000
)

func (c *call) createTaskCollector(q *types.CreateCollectorForTasks) (*types.CreateCollectorForTasksResponse, error) {
	if e := q.Filter.Entity; e != nil {
		if _, ok := c.lookup(e.Entity); !ok {
			return nil, objectNotFound(e.Entity)
		}
	}
	o, err := c.client.own("TaskHistoryCollector", func(ref types.ManagedObjectReference) any {
		return &history{ref: ref, tasks: q.Filter, page: defaultPage}
	})
	if err != nil {
		return nil, err
	}
	return &types.CreateCollectorForTasksResponse{Returnval: o.(*history).ref}, nil
}

// matching lists the tasks that a collector collects, oldest first.
func (r *reader) matching(h *history) []*task.Record {
	var list []*task.Record
	for _, id := range r.view.All(inventory.KindTask) {
		t, ok := inventory.Lookup[task.Record](r.view, id)
		if !ok || r.visible(id) == nil || !taskMatches(r, &h.tasks, t) {
			continue
		}
		list = append(list, t)
	}
	return list
}

func taskMatches(r *reader, f *types.TaskFilterSpec, t *task.Record) bool {
	if len(f.State) > 0 && !slices.Contains(f.State, types.TaskInfoState(t.State)) {
		return false
	}
	if f.UserName != nil && len(f.UserName.UserList) > 0 && !slices.Contains(f.UserName.UserList, t.User) {
		return false
	}
	if f.Entity != nil && !r.within(t.Entity, f.Entity.Entity, f.Entity.Recursion) {
		return false
	}
	if f.Time != nil {
		at := t.Queued
		switch f.Time.TimeType {
		case types.TaskFilterSpecTimeOptionStartedTime:
			at = t.Started
		case types.TaskFilterSpecTimeOptionCompletedTime:
			at = t.Finished
		}
		if b := f.Time.BeginTime; b != nil && at.Before(*b) {
			return false
		}
		if e := f.Time.EndTime; e != nil && at.After(*e) {
			return false
		}
	}
	return true
}

// within tells whether entity is top, or below it, as a recursion option asks.
func (r *reader) within(entity inventory.Ref, top types.ManagedObjectReference, option any) bool {
	root := ref(top)
	var self, below bool
	switch option {
	case types.TaskFilterSpecRecursionOptionSelf, types.EventFilterSpecRecursionOptionSelf:
		self = true
	case types.TaskFilterSpecRecursionOptionChildren, types.EventFilterSpecRecursionOptionChildren:
		below = true
	default:
		self, below = true, true
	}
	if entity == root {
		return self
	}
	if below && root == inventory.RootFolder {
		return true // also what is not there any more
	}
	for at, depth := entity, 0; below && depth < maxDepth; depth++ {
		parent, ok := r.view.Parent(at)
		if !ok {
			return false
		}
		if parent == root {
			return true
		}
		at = parent
	}
	return false
}

func taskNumber(t *task.Record) int64 {
	var n int64
	for _, c := range string(t.Ref) {
		if c >= '0' && c <= '9' {
			n = n*10 + int64(c-'0')
		}
	}
	return n
}

func (c *call) readNextTasks(q *types.ReadNextTasks) (*types.ReadNextTasksResponse, error) {
	h, err := c.historyOf(q.This, q.MaxCount)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	res := &types.ReadNextTasksResponse{}
	for _, t := range c.reader().matching(h) {
		if n := taskNumber(t); n > h.at && len(res.Returnval) < int(q.MaxCount) {
			res.Returnval = append(res.Returnval, taskInfo(t))
			h.at = n
			if h.before == 0 {
				h.before = n
			}
		}
	}
	return res, nil
}

func (c *call) readPreviousTasks(q *types.ReadPreviousTasks) (*types.ReadPreviousTasksResponse, error) {
	h, err := c.historyOf(q.This, q.MaxCount)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	res := &types.ReadPreviousTasksResponse{}
	list := c.reader().matching(h)
	for i := len(list) - 1; i >= 0 && len(res.Returnval) < int(q.MaxCount); i-- {
		if n := taskNumber(list[i]); h.before == 0 || n < h.before {
			res.Returnval = append(res.Returnval, taskInfo(list[i]))
			h.before = n
		}
	}
	return res, nil
}

func (c *call) historyOf(ref types.ManagedObjectReference, most int32) (*history, error) {
	h, err := ownedBy[*history](c, ref)
	if err == nil && (most <= 0 || most > maxPage) {
		err = invalidArgument("maxCount", "maxCount is %d; it can be 1 to %d", most, maxPage)
	}
	return h, err
}

func (c *call) rewindCollector(q *types.RewindCollector) (*types.RewindCollectorResponse, error) {
	h, err := ownedBy[*history](c, q.This)
	if err == nil {
		h.seek(0)
	}
	return &types.RewindCollectorResponse{}, err
}

// resetCollector goes to the newest page.
func (c *call) resetCollector(q *types.ResetCollector) (*types.ResetCollectorResponse, error) {
	h, err := ownedBy[*history](c, q.This)
	if err == nil {
		h.seek(math.MaxInt64)
	}
	return &types.ResetCollectorResponse{}, err
}

func (c *call) setCollectorPageSize(q *types.SetCollectorPageSize) (*types.SetCollectorPageSizeResponse, error) {
	h, err := c.historyOf(q.This, q.MaxCount)
	if err == nil {
		h.mu.Lock()
		h.page = int(q.MaxCount)
		h.mu.Unlock()
	}
	return &types.SetCollectorPageSizeResponse{}, err
}

func (c *call) destroyCollector(q *types.DestroyCollector) (*types.DestroyCollectorResponse, error) {
	h, err := ownedBy[*history](c, q.This)
	if err == nil {
		c.client.disown(h.ref)
	}
	return &types.DestroyCollectorResponse{}, err
}

func taskHistoryProps() map[string]prop {
	return map[string]prop{
		"filter": on(func(_ *reader, h *history) any { return h.tasks }),
		"latestPage": on(func(r *reader, h *history) any {
			list := r.matching(h)
			infos := []types.TaskInfo{}
			for _, t := range list[max(0, len(list)-h.pageSize()):] {
				infos = append(infos, taskInfo(t))
			}
			return infos
		}),
	}
}
