package authz

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// DeniedError tells which privilege is missing where.
type DeniedError struct {
	User      string
	Privilege string
	Entity    inventory.Ref
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("user %q lacks the privilege %s on %s; an administrator can grant a role that has it", e.User, e.Privilege, e.Entity)
}

// maxDepth bounds the walk to the root; the inventory is far flatter.
const maxDepth = 64

// Check returns a *DeniedError unless p has privilege on entity. The permission
// nearest to entity decides, whether it gives more than those above or less;
// one above counts only if it propagates.
func (a *Authority) Check(p Principal, privilege string, entity inventory.Ref) error {
	if p.system {
		return nil
	}
	if role, ok := a.roleOn(p, entity); ok && slices.Contains(role.Privileges, privilege) {
		return nil
	}
	return &DeniedError{User: p.User, Privilege: privilege, Entity: entity}
}

// roleOn finds the role that p has on entity.
func (a *Authority) roleOn(p Principal, entity inventory.Ref) (Role, bool) {
	if p.User == "" {
		return Role{}, false
	}
	at := entity
	for range maxDepth {
		e, ok := a.permissions.Peek(Permission{Entity: at, Principal: p.User}.key())
		if ok && (at == entity || e.Value.Propagate) {
			return a.Role(e.Value.Role)
		}
		if at, ok = a.tree.Parent(at); !ok {
			return Role{}, false
		}
	}
	return Role{}, false
}

// Privileges lists what p may do on entity.
func (a *Authority) Privileges(p Principal, entity inventory.Ref) []string {
	if p.system {
		return Privileges()
	}
	role, _ := a.roleOn(p, entity)
	return slices.Clone(role.Privileges)
}

// Role finds a role.
func (a *Authority) Role(id int32) (Role, bool) {
	if r, ok := a.builtin[id]; ok {
		return r, true
	}
	e, ok := a.roles.Peek(roleKey(id))
	return e.Value, ok
}

func roleKey(id int32) string { return fmt.Sprintf("%d", id) }

func (p Permission) key() string { return string(p.Entity) + "/" + p.Principal }

// Roles lists all roles, the built-in ones first.
func (a *Authority) Roles(ctx context.Context) ([]Role, error) {
	all := BuiltinRoles()
	entries, err := a.roles.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("authz: %w", err)
	}
	for _, e := range entries {
		all = append(all, e.Value)
	}
	return all, nil
}

// What callers decide on.
var (
	ErrNoRole       = errors.New("no such role")
	ErrNoPrivilege  = errors.New("no such privilege")
	ErrNoPermission = errors.New("no such permission")
)

// CreateRole makes a role of its own (P2: such as "encrypt but not decrypt").
// System.Anonymous, View and Read are part of every role that has a privilege.
func (a *Authority) CreateRole(ctx context.Context, name string, privileges []string) (Role, error) {
	if name == "" || len(name) > 100 {
		return Role{}, fmt.Errorf("authz: a role's name has 1 to 100 bytes, %.110q has %d", name, len(name))
	}
	known := Privileges()
	for _, p := range privileges {
		if !slices.Contains(known, p) {
			return Role{}, fmt.Errorf("authz: %w: %.100q", ErrNoPrivilege, p)
		}
	}
	all := append([]string{Anonymous, Read, View}, privileges...)
	slices.Sort(all)
	all = slices.Compact(all)
	roles, err := a.Roles(ctx)
	if err != nil {
		return Role{}, err
	}
	r := Role{ID: 1, Name: name, Label: name, Privileges: all}
	for _, other := range roles {
		if strings.EqualFold(other.Name, name) {
			return Role{}, fmt.Errorf("authz: a role of the name %q: %w", name, store.ErrExists)
		}
		r.ID = max(r.ID, other.ID+1)
	}
	if _, err := a.store.Commit(ctx, a.roles.Create(roleKey(r.ID), r)); err != nil {
		return Role{}, fmt.Errorf("authz: making role %q: %w", name, err)
	}
	return r, a.store.Sync(ctx)
}

// SetPermission gives a user a role on an entity, in place of the one before.
// It holds when SetPermission has returned.
func (a *Authority) SetPermission(ctx context.Context, p Permission) error {
	p.Principal = canonical(p.Principal)
	if _, ok := a.Role(p.Role); !ok {
		return fmt.Errorf("authz: %w: %d", ErrNoRole, p.Role)
	}
	if _, err := a.users.Get(ctx, p.Principal); err != nil {
		return fmt.Errorf("authz: %w: %.130q", ErrNoUser, p.Principal)
	}
	if _, err := a.store.Commit(ctx, a.permissions.Put(p.key(), p)); err != nil {
		return fmt.Errorf("authz: giving a permission to %s: %w", p.Principal, err)
	}
	return a.store.Sync(ctx)
}

// RemovePermission takes a user's role on an entity away; what is above counts
// again. It holds when RemovePermission has returned.
func (a *Authority) RemovePermission(ctx context.Context, entity inventory.Ref, principal string) error {
	p := Permission{Entity: entity, Principal: canonical(principal)}
	_, err := a.store.Commit(ctx, a.permissions.Delete(p.key(), 0))
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("authz: %w: %s has none on %s", ErrNoPermission, p.Principal, entity)
	}
	if err != nil {
		return fmt.Errorf("authz: taking a permission from %s: %w", p.Principal, err)
	}
	return a.store.Sync(ctx)
}

// Permissions lists all permissions.
func (a *Authority) Permissions(ctx context.Context) ([]Permission, error) {
	entries, err := a.permissions.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("authz: %w", err)
	}
	var all []Permission
	for _, e := range entries {
		all = append(all, e.Value)
	}
	return all, nil
}
