package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// Managed object types that verbs look up.
const (
	kindVM           = "VirtualMachine"
	kindHost         = "HostSystem"
	kindDatastore    = "Datastore"
	kindNetwork      = "Network"
	kindCluster      = "ClusterComputeResource"
	kindDatacenter   = "Datacenter"
	kindFolder       = "Folder"
	kindResourcePool = "ResourcePool"
)

// listing says with which verb things of a kind are listed, and their word.
func listing(kind string) (word, verb string) {
	switch kind {
	case kindVM:
		return "VM", "mortise vm ls lists them"
	case kindHost:
		return "host", "mortise host ls lists them"
	}
	return strings.ToLower(kind), "see its name at center"
}

// refPrefix begins the references of a kind: "vm-13".
func refPrefix(kind string) string {
	switch kind {
	case kindVM:
		return "vm-"
	case kindHost:
		return "host-"
	case kindDatastore:
		return "datastore-"
	case kindNetwork:
		return "network-"
	}
	return ""
}

// container opens a view of everything of a kind; close it.
func (c *client) container(ctx context.Context, kind string) (v *view.ContainerView, done func(), err error) {
	v, err = view.NewManager(c.vim).CreateContainerView(ctx, c.vim.ServiceContent.RootFolder, []string{kind}, true)
	if err != nil {
		return nil, nil, fmt.Errorf("listing: %w", err)
	}
	return v, func() { _ = v.Destroy(context.WithoutCancel(ctx)) }, nil
}

// retrieve reads properties of everything of a kind into dst, a pointer to a
// slice of govmomi's mo type.
func (c *client) retrieve(ctx context.Context, kind string, props []string, dst any) error {
	v, done, err := c.container(ctx, kind)
	if err != nil {
		return err
	}
	defer done()
	if err := v.Retrieve(ctx, []string{kind}, props, dst); err != nil {
		return fmt.Errorf("listing: %w", err)
	}
	return nil
}

// find looks something up by its name, or by its reference ("vm-13").
func (c *client) find(ctx context.Context, kind, name string) (types.ManagedObjectReference, error) {
	var none types.ManagedObjectReference
	word, verb := listing(kind)
	if name == "" {
		return none, fmt.Errorf("the name of the %s is empty", word)
	}
	v, done, err := c.container(ctx, kind)
	if err != nil {
		return none, err
	}
	defer done()
	var all []mo.ManagedEntity
	if err := v.Retrieve(ctx, []string{kind}, []string{"name"}, &all); err != nil {
		return none, fmt.Errorf("looking for %s %q: %w", word, name, err)
	}
	var found, byRef []types.ManagedObjectReference
	for _, e := range all {
		switch {
		case e.Name == name:
			found = append(found, e.Self)
		case e.Self.Value == name && strings.HasPrefix(name, refPrefix(kind)):
			byRef = append(byRef, e.Self)
		}
	}
	if len(found) == 0 {
		found = byRef
	}
	switch len(found) {
	case 0:
		return none, fmt.Errorf("there is no %s %q, or you may not see it: %s", word, name, verb)
	case 1:
		return found[0], nil
	}
	var refs []string
	for _, r := range found {
		refs = append(refs, r.Value)
	}
	slices.Sort(refs)
	return none, fmt.Errorf("%d of the %ss are called %q: name one by its reference, %s", len(found), word, name, strings.Join(refs, " or "))
}

// first is the only thing of a kind, or the first.
func (c *client) first(ctx context.Context, kind string) (types.ManagedObjectReference, error) {
	v, done, err := c.container(ctx, kind)
	if err != nil {
		return types.ManagedObjectReference{}, err
	}
	defer done()
	all, err := v.Find(ctx, []string{kind}, property.Match{"name": func(any) bool { return true }})
	if err == nil && len(all) == 0 {
		err = fmt.Errorf("center shows no %s: may you see it?", strings.ToLower(kind))
	}
	if err != nil {
		return types.ManagedObjectReference{}, err
	}
	return all[0], nil
}

// properties reads properties of one object into dst, a pointer to govmomi's mo
// type.
func (c *client) properties(ctx context.Context, ref types.ManagedObjectReference, props []string, dst any) error {
	if err := c.collector().RetrieveOne(ctx, ref, props, dst); err != nil {
		return fmt.Errorf("reading %s: %w", ref.Value, err)
	}
	return nil
}

// names reads the names of objects.
func (c *client) names(ctx context.Context, refs []types.ManagedObjectReference) map[types.ManagedObjectReference]string {
	out := map[types.ManagedObjectReference]string{}
	if len(refs) == 0 {
		return out
	}
	var all []mo.ManagedEntity
	// What may not be read, or is gone meanwhile, keeps its reference.
	_ = c.collector().Retrieve(ctx, refs, []string{"name"}, &all)
	for _, r := range refs {
		out[r] = r.Value
	}
	for _, e := range all {
		if e.Name != "" {
			out[e.Self] = e.Name
		}
	}
	return out
}
