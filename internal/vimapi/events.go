package vimapi

import (
	"context"
	"reflect"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/event"
	"mortise/internal/inventory"
)

// maxEvents bounds the events that are looked through for one call.
const maxEvents = 10_000

// vimEvents begins the types of events that vSphere has classes for.
const vimEvents = "vim.event."

func eventMethods() []method {
	return []method{
		row("EventManager", "QueryEvents", "", (*call).queryEvents).small(),
		row("EventManager", "CreateCollectorForEvents", "", (*call).createEventCollector).small(),
		row("EventHistoryCollector", "ReadNextEvents", "", (*call).readNextEvents).small(),
		row("EventHistoryCollector", "ReadPreviousEvents", "", (*call).readPreviousEvents).small(),
	}
}

// toEvent gives an event its vSphere form: the class that its type names, an
// EventEx for all others.
func (r *reader) toEvent(e *event.Event) types.BaseEvent {
	var v types.BaseEvent
	if name, ok := strings.CutPrefix(e.Type, vimEvents); ok {
		if t, ok := types.TypeFunc()(name); ok {
			v, _ = reflect.New(t).Interface().(types.BaseEvent)
		}
	}
	if v == nil {
		x := &types.EventEx{EventTypeId: e.Type, Severity: string(e.Severity), Message: e.Message}
		if ref := reference(e.Entity); ref != nil {
			x.ObjectId, x.ObjectType = ref.Value, ref.Type
		}
		v = x
	}
	base := v.GetEvent()
	base.Key, base.ChainId = int32(e.ID), int32(e.ID)
	base.CreatedTime, base.UserName, base.FullFormattedMessage = e.Time.UTC(), e.User, e.Message
	name := string(e.Entity)
	if rec, ok := r.view.Get(e.Entity); ok {
		name = rec.Self().Name
	}
	arg := types.EntityEventArgument{Name: name}
	switch e.Entity.Kind() {
	case inventory.KindVM:
		base.Vm = &types.VmEventArgument{EntityEventArgument: arg, Vm: moref(e.Entity)}
	case inventory.KindHost:
		base.Host = &types.HostEventArgument{EntityEventArgument: arg, Host: moref(e.Entity)}
	case inventory.KindDatastore:
		base.Ds = &types.DatastoreEventArgument{EntityEventArgument: arg, Datastore: moref(e.Entity)}
	case inventory.KindNetwork:
		base.Net = &types.NetworkEventArgument{EntityEventArgument: arg, Network: moref(e.Entity)}
	case inventory.KindCluster:
		base.ComputeResource = &types.ComputeResourceEventArgument{EntityEventArgument: arg, ComputeResource: moref(e.Entity)}
	case inventory.KindDatacenter:
		base.Datacenter = &types.DatacenterEventArgument{EntityEventArgument: arg, Datacenter: moref(e.Entity)}
	}
	return v
}

func (r *reader) eventMatches(f *types.EventFilterSpec, e *event.Event) bool {
	if f.Entity != nil {
		at := e.Entity
		if at == "" {
			at = inventory.RootFolder
		}
		if !r.within(at, f.Entity.Entity, f.Entity.Recursion) {
			return false
		}
	}
	if f.Time != nil {
		if b := f.Time.BeginTime; b != nil && e.Time.Before(*b) {
			return false
		}
		if end := f.Time.EndTime; end != nil && e.Time.After(*end) {
			return false
		}
	}
	if len(f.EventTypeId) > 0 || len(f.Type) > 0 {
		match := false
		for _, id := range append(append([]string{}, f.EventTypeId...), f.Type...) {
			match = match || id == e.Type || vimEvents+id == e.Type
		}
		if !match {
			return false
		}
	}
	if len(f.Category) > 0 {
		match := false
		for _, c := range f.Category {
			match = match || c == string(e.Severity)
		}
		return match
	}
	return true
}

// eventsOf reads the events that a filter lets through, oldest first.
func (r *reader) eventsOf(ctx context.Context, f *types.EventFilterSpec) ([]event.Event, error) {
	all, err := r.s.center.Events(ctx, r.principal(), 0, maxEvents)
	if err != nil {
		return nil, err
	}
	var list []event.Event
	for i := range all {
		if r.eventMatches(f, &all[i]) {
			list = append(list, all[i])
		}
	}
	return list, nil
}

func (r *reader) toEvents(list []event.Event) []types.BaseEvent {
	out := make([]types.BaseEvent, 0, len(list))
	for i := range list {
		out = append(out, r.toEvent(&list[i]))
	}
	return out
}

func (c *call) queryEvents(q *types.QueryEvents) (*types.QueryEventsResponse, error) {
	r := c.reader()
	list, err := r.eventsOf(c.ctx, &q.Filter)
	if err != nil {
		return nil, err
	}
	most := maxPage
	if n := int(q.Filter.MaxCount); n > 0 && n < most {
		most = n
	}
	return &types.QueryEventsResponse{Returnval: r.toEvents(list[max(0, len(list)-most):])}, nil
}

func (c *call) createEventCollector(q *types.CreateCollectorForEvents) (*types.CreateCollectorForEventsResponse, error) {
	if e := q.Filter.Entity; e != nil {
		if _, ok := c.lookup(e.Entity); !ok {
			return nil, objectNotFound(e.Entity)
		}
	}
	o, err := c.client.own("EventHistoryCollector", func(ref types.ManagedObjectReference) any {
		return &history{ref: ref, event: q.Filter, page: defaultPage}
	})
	if err != nil {
		return nil, err
	}
	return &types.CreateCollectorForEventsResponse{Returnval: o.(*history).ref}, nil
}

func (c *call) readNextEvents(q *types.ReadNextEvents) (*types.ReadNextEventsResponse, error) {
	h, err := c.historyOf(q.This, q.MaxCount)
	if err != nil {
		return nil, err
	}
	r := c.reader()
	list, err := r.eventsOf(c.ctx, &h.event)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var page []event.Event
	for _, e := range list {
		if e.ID > h.at && len(page) < int(q.MaxCount) {
			page = append(page, e)
			h.at = e.ID
			if h.before == 0 {
				h.before = e.ID
			}
		}
	}
	return &types.ReadNextEventsResponse{Returnval: r.toEvents(page)}, nil
}

func (c *call) readPreviousEvents(q *types.ReadPreviousEvents) (*types.ReadPreviousEventsResponse, error) {
	h, err := c.historyOf(q.This, q.MaxCount)
	if err != nil {
		return nil, err
	}
	r := c.reader()
	list, err := r.eventsOf(c.ctx, &h.event)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var page []event.Event
	for i := len(list) - 1; i >= 0 && len(page) < int(q.MaxCount); i-- {
		if h.before == 0 || list[i].ID < h.before {
			page = append(page, list[i])
			h.before = list[i].ID
		}
	}
	return &types.ReadPreviousEventsResponse{Returnval: r.toEvents(page)}, nil
}

func eventHistoryProps() map[string]prop {
	return map[string]prop{
		"filter": on(func(_ *reader, h *history) any { return h.event }),
		// Newest first, as vSphere has it.
		"latestPage": on(func(r *reader, h *history) any {
			list, err := r.eventsOf(context.Background(), &h.event)
			if err != nil {
				return err
			}
			out, page := []types.BaseEvent{}, h.pageSize()
			for i := len(list) - 1; i >= 0 && len(out) < page; i-- {
				out = append(out, r.toEvent(&list[i]))
			}
			return out
		}),
	}
}
