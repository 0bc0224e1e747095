package vimapi

import (
	"reflect"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
)

const (
	// pageSize bounds the objects of one answer of RetrievePropertiesEx, whose
	// clients know how to continue.
	pageSize = 2000
	// maxPages bounds the results that a session leaves unfetched.
	maxPages = 20
)

// page is the rest of a result: which objects are still to be read, how.
type page struct {
	rest []pending
	size int
}

type pending struct {
	spec *filterSpec
	ref  types.ManagedObjectReference
}

// retrieve selects what a call's specs name.
func (c *call) retrieve(r *reader, specs []types.PropertyFilterSpec) ([]pending, error) {
	if len(specs) > maxSpecs {
		return nil, invalidArgument("specSet", "a call has at most %d filter specs", maxSpecs)
	}
	var all []pending
	taken := map[types.ManagedObjectReference]bool{}
	for i := range specs {
		f, err := c.s.compile(&specs[i])
		if err != nil {
			return nil, err
		}
		chosen, err := r.choose(f)
		if err != nil {
			return nil, err
		}
		for _, o := range chosen.objects {
			if !taken[o.ref] {
				taken[o.ref] = true
				all = append(all, pending{f, o.ref})
			}
		}
	}
	return all, nil
}

// contents reads objects. What has been removed since it was selected is left
// out.
func (r *reader) contents(list []pending) []types.ObjectContent {
	all := make([]types.ObjectContent, 0, len(list))
	for _, p := range list {
		if o, ok := r.lookup(p.ref); ok {
			res := r.read(p.spec, o)
			all = append(all, types.ObjectContent{Obj: p.ref, PropSet: res.values, MissingSet: res.missing})
		}
	}
	return all
}

func (c *call) retrieveProperties(q *types.RetrieveProperties) (*types.RetrievePropertiesResponse, error) {
	r := c.reader()
	list, err := c.retrieve(r, q.SpecSet)
	if err != nil {
		return nil, err
	}
	return &types.RetrievePropertiesResponse{Returnval: r.contents(list)}, nil
}

func (c *call) retrievePropertiesEx(q *types.RetrievePropertiesEx) (*types.RetrievePropertiesExResponse, error) {
	if q.Options.MaxObjects < 0 {
		return nil, invalidArgument("options.maxObjects", "maxObjects is negative: %d", q.Options.MaxObjects)
	}
	r := c.reader()
	list, err := c.retrieve(r, q.SpecSet)
	if err != nil || len(list) == 0 {
		return &types.RetrievePropertiesExResponse{}, err
	}
	p := &page{rest: list, size: pageSize}
	if n := int(q.Options.MaxObjects); n > 0 && n < pageSize {
		p.size = n
	}
	res, err := c.nextPage(r, p)
	if err != nil {
		return nil, err
	}
	return &types.RetrievePropertiesExResponse{Returnval: res}, nil
}

func (c *call) nextPage(r *reader, p *page) (*types.RetrieveResult, error) {
	n := min(p.size, len(p.rest))
	res := &types.RetrieveResult{Objects: r.contents(p.rest[:n])}
	p.rest = p.rest[n:]
	if len(p.rest) == 0 {
		return res, nil
	}
	if c.client == nil {
		return nil, c.notAuthenticated("")
	}
	c.client.mu.Lock()
	defer c.client.mu.Unlock()
	if len(c.client.pages) >= maxPages {
		return nil, fault(&types.LimitExceeded{}, "the session has left %d results half read, the most it may; continue or cancel some", maxPages)
	}
	res.Token = uuid.NewString()
	c.client.pages[res.Token] = p
	return res, nil
}

// takePage finds the rest of a result. Its token is good for once.
func (c *call) takePage(token string) (*page, error) {
	c.client.mu.Lock()
	defer c.client.mu.Unlock()
	p := c.client.pages[token]
	if p == nil {
		return nil, fault(&types.InvalidProperty{Name: "token"}, "the token %q belongs to no result that is left to read", clip(token))
	}
	delete(c.client.pages, token)
	return p, nil
}

func (c *call) continueRetrieveProperties(q *types.ContinueRetrievePropertiesEx) (*types.ContinueRetrievePropertiesExResponse, error) {
	p, err := c.takePage(q.Token)
	if err != nil {
		return nil, err
	}
	res, err := c.nextPage(c.reader(), p)
	if err != nil {
		return nil, err
	}
	return &types.ContinueRetrievePropertiesExResponse{Returnval: *res}, nil
}

func (c *call) cancelRetrieveProperties(q *types.CancelRetrievePropertiesEx) (*types.CancelRetrievePropertiesExResponse, error) {
	_, err := c.takePage(q.Token)
	return &types.CancelRetrievePropertiesExResponse{}, err
}

// fetch reads one property of the object that it is called on.
func (c *call) fetch(q *fetchRequest) (*fetchResponse, error) {
	r := c.reader()
	o, ok := r.lookup(q.This)
	if !ok {
		if c.session == nil {
			return nil, c.notAuthenticated("")
		}
		return nil, objectNotFound(q.This)
	}
	if c.session == nil && !o.kind.open {
		return nil, c.notAuthenticated("")
	}
	p, err := parsePath(q.Prop)
	if err != nil {
		return nil, err
	}
	t := o.kind.typ
	if t == nil {
		t = reflect.TypeFor[struct{}]()
	}
	if err := c.s.checkPath(q.This.Type, t, q.Prop, p); err != nil {
		return nil, err
	}
	if err := r.may(authz.Read, o); err != nil {
		return nil, err
	}
	val, err := r.property(o, p)
	return &fetchResponse{Returnval: val}, err
}
