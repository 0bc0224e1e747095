package center

import (
	"context"
	"errors"
	"fmt"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// Policies lists the storage policies, the bundled ones first.
func (c *Center) Policies(ctx context.Context, p Principal) ([]Policy, error) {
	if err := c.Check(p, authz.ProfileView, inventory.RootFolder); err != nil {
		return nil, err
	}
	all, err := c.policies.All(ctx)
	return all, policyFault(err)
}

// Policy finds a storage policy.
func (c *Center) Policy(ctx context.Context, id policy.ID) (Policy, error) {
	found, err := c.policies.Get(ctx, id)
	return found, policyFault(err)
}

// ClonePolicy makes a policy like another under a new name (E7).
func (c *Center) ClonePolicy(ctx context.Context, p Principal, id policy.ID, name, description string) (Policy, error) {
	from, err := c.Policy(ctx, id)
	if err != nil {
		return Policy{}, err
	}
	if err := c.mayEditPolicies(p, from.Encrypts); err != nil {
		return Policy{}, err
	}
	n, err := c.policies.Clone(ctx, id, name, description)
	return n, c.policyMade(ctx, p, n, err)
}

// CreatePolicy makes a policy.
func (c *Center) CreatePolicy(ctx context.Context, p Principal, name, description string, encrypts, allowIOFilters bool) (Policy, error) {
	if err := c.mayEditPolicies(p, encrypts); err != nil {
		return Policy{}, err
	}
	n, err := c.policies.Create(ctx, name, description, encrypts, allowIOFilters)
	return n, c.policyMade(ctx, p, n, err)
}

func (c *Center) policyMade(ctx context.Context, p Principal, n Policy, err error) error {
	if err != nil {
		return policyFault(err)
	}
	c.events.Post(ctx, Event{Type: event.PolicyChanged, User: p.User, Entity: inventory.RootFolder, Message: fmt.Sprintf("Storage policy %q was made", n.Name)})
	return nil
}

// DeletePolicy removes a policy that nothing uses.
func (c *Center) DeletePolicy(ctx context.Context, p Principal, id policy.ID) error {
	old, err := c.Policy(ctx, id)
	if err != nil {
		return err
	}
	if err := c.mayEditPolicies(p, old.Encrypts); err != nil {
		return err
	}
	var users []Ref
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		uses := vm.Profile == id
		for i := range vm.Disks {
			uses = uses || vm.Disks[i].Profile == id
		}
		if uses {
			users = append(users, vm.Ref)
		}
		return true
	})
	if len(users) > 0 {
		f := fault(task.ResourceInUse, "storage policy %q is applied to %s; apply another one there first", old.Name, c.names(users, 10))
		f.Name = old.Name
		return f
	}
	if err := c.policies.Delete(ctx, id); err != nil {
		return policyFault(err)
	}
	c.events.Post(ctx, Event{Type: event.PolicyChanged, User: p.User, Entity: inventory.RootFolder, Message: fmt.Sprintf("Storage policy %q was deleted", old.Name)})
	return nil
}

func (c *Center) mayEditPolicies(p Principal, encrypts bool) error {
	if err := c.Check(p, authz.ProfileUpdate, inventory.RootFolder); err != nil {
		return err
	}
	if encrypts {
		return c.Check(p, authz.CryptoManageEncryptionPolicy, inventory.RootFolder)
	}
	return nil
}

func policyFault(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, policy.ErrNotFound):
		return fault(task.NotFound, "%v; list them (policy ls)", err).Because(err)
	case errors.Is(err, policy.ErrDuplicate):
		return fault(task.DuplicateName, "%v; choose another name", err).Because(err)
	case errors.Is(err, policy.ErrBundled):
		return fault(task.NotSupported, "%v", err).Because(err)
	case errors.Is(err, policy.ErrName):
		f := invalid("name", "%v", err)
		return f.Because(err)
	}
	return storeFault("reading storage policies", err)
}
