// Package policy knows the storage policies: which of them encrypt, which are
// bundled and may only be cloned, and what a policy means for a VM or disk that
// is encrypted or not (E7).
//
// Place in the flow: center asks it what a profile in a spec implies. It
// imports inventory (for ids) and store.
package policy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// ID names a policy; a UUID.
type ID = inventory.ProfileID

// The bundled policies.
const (
	// VMEncryption is the sample encryption policy, under the id and the name
	// that vSphere's clients look for.
	VMEncryption ID = "4d5f673c-536f-11e6-beb8-9e71128cae77"
	// DatastoreDefault asks nothing of a datastore; applying it decrypts.
	DatastoreDefault ID = "b2f1c7d6-0a43-4e55-9a0e-6d1f27c5a8e4"
)

// Policy is one storage policy. Records of it are immutable once handed out.
type Policy struct {
	ID          ID     `json:"id"`
	Name        string `json:"name"`
	Description string `json:"description"`
	Encrypts    bool   `json:"encrypts"`
	// AllowIOFilters tells whether filters may see the data before it is
	// encrypted; clones keep it.
	AllowIOFilters bool `json:"allowIOFilters,omitempty"`
	Bundled        bool `json:"bundled,omitempty"` // cannot be changed or deleted, only cloned
}

// Bundled returns the policies that every center has.
func Bundled() []Policy {
	return []Policy{
		{ID: VMEncryption, Name: "VM Encryption Policy", Encrypts: true, Bundled: true,
			Description: "Encrypts VM files and virtual disks with keys from the default key provider. A sample: clone it to change it"},
		{ID: DatastoreDefault, Name: "Datastore Default", Bundled: true,
			Description: "No requirements: VM files and disks are stored in clear"},
	}
}

// What callers decide on.
var (
	ErrNotFound  = errors.New("no such storage policy")
	ErrDuplicate = errors.New("a storage policy of this name exists")
	ErrBundled   = errors.New("a bundled storage policy cannot be changed or deleted; clone it")
	ErrName      = errors.New("a storage policy's name has 1 to 80 printable characters")
)

// Policies is every policy: the bundled ones and those in the store. Its
// methods may be called concurrently.
type Policies struct {
	store   *store.Store
	records *store.Collection[Policy] // by ID; the bundled ones are not there
	names   *store.Collection[ID]     // by name, so that each is taken once
}

// Open loads the policies in s.
func Open(ctx context.Context, s *store.Store) (*Policies, error) {
	p := &Policies{store: s}
	var err error
	if p.records, err = store.NewCollection(ctx, s, "policy", store.JSON[Policy](1)); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if p.names, err = store.NewCollection(ctx, s, "policy-name", store.JSON[ID](1)); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return p, nil
}

// All lists the policies: the bundled ones, then the others by name.
func (p *Policies) All(ctx context.Context) ([]Policy, error) {
	entries, err := p.records.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	var own []Policy
	for _, e := range entries {
		own = append(own, e.Value)
	}
	slices.SortFunc(own, func(a, b Policy) int { return cmp.Compare(a.Name, b.Name) })
	return append(Bundled(), own...), nil
}

// Get finds a policy; ErrNotFound when there is none.
func (p *Policies) Get(ctx context.Context, id ID) (Policy, error) {
	for _, b := range Bundled() {
		if b.ID == id {
			return b, nil
		}
	}
	if id == "" {
		return Policy{}, fmt.Errorf("policy: %w: the id is empty", ErrNotFound)
	}
	e, err := p.records.Get(ctx, string(id))
	if errors.Is(err, store.ErrNotFound) {
		return Policy{}, fmt.Errorf("policy: %w: %s", ErrNotFound, id)
	}
	if err != nil {
		return Policy{}, fmt.Errorf("policy: %w", err)
	}
	return e.Value, nil
}

// Create makes a policy.
func (p *Policies) Create(ctx context.Context, name, description string, encrypts, allowIOFilters bool) (Policy, error) {
	if err := checkName(name); err != nil {
		return Policy{}, err
	}
	for _, b := range Bundled() {
		if b.Name == name {
			return Policy{}, fmt.Errorf("policy: %w: %q", ErrDuplicate, name)
		}
	}
	n := Policy{ID: ID(uuid.NewString()), Name: name, Description: description, Encrypts: encrypts, AllowIOFilters: allowIOFilters}
	_, err := p.store.Commit(ctx, p.records.Create(string(n.ID), n), p.names.Create(name, n.ID))
	if errors.Is(err, store.ErrExists) {
		return Policy{}, fmt.Errorf("policy: %w: %q", ErrDuplicate, name)
	}
	if err != nil {
		return Policy{}, fmt.Errorf("policy: creating %q: %w", name, err)
	}
	return n, nil
}

// Clone makes a policy like id under another name.
func (p *Policies) Clone(ctx context.Context, id ID, name, description string) (Policy, error) {
	from, err := p.Get(ctx, id)
	if err != nil {
		return Policy{}, err
	}
	if description == "" {
		description = from.Description
	}
	return p.Create(ctx, name, description, from.Encrypts, from.AllowIOFilters)
}

// Delete removes a policy that is not bundled.
func (p *Policies) Delete(ctx context.Context, id ID) error {
	old, err := p.Get(ctx, id)
	if err != nil {
		return err
	}
	if old.Bundled {
		return fmt.Errorf("policy: %q: %w", old.Name, ErrBundled)
	}
	_, err = p.store.Commit(ctx, p.records.Delete(string(id), 0), p.names.Delete(old.Name, 0))
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("policy: %w: %s", ErrNotFound, id)
	}
	if err != nil {
		return fmt.Errorf("policy: deleting %q: %w", old.Name, err)
	}
	return nil
}

func checkName(name string) error {
	if name == "" || utf8.RuneCountInString(name) > 80 || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("policy: %w: %.100q", ErrName, name)
	}
	return nil
}

// Implied is what applying a policy means for something that is encrypted or
// not, when no crypto spec says otherwise. Recryption is never implied.
type Implied string

// What a policy implies.
const (
	Nothing Implied = "nothing"
	Encrypt Implied = "encrypt"
	Decrypt Implied = "decrypt"
)

// Implies tells what applying p means (E7).
func (p Policy) Implies(encrypted bool) Implied {
	switch {
	case p.Encrypts && !encrypted:
		return Encrypt
	case !p.Encrypts && encrypted:
		return Decrypt
	}
	return Nothing
}
