package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"mortise/internal/vimapi/vimext"
)

func policyCommand() *cobra.Command {
	g := &globals{}
	return group(g, "policy", "Storage policies: what is encrypted",
		`A storage policy says how a VM's files and disks are kept. A VM gets encrypted by a
policy that encrypts, and decrypted by one that does not. The bundled policies cannot
be changed, only cloned.`,
		`  mortise policy ls
  mortise policy clone "VM Encryption Policy" "Payroll"
  mortise vm encrypt web1 --policy Payroll`,
		policyLs(g), policyClone(g))
}

// policyJSON is a storage policy in JSON.
type policyJSON struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Encrypts    bool   `json:"encrypts"`
	Bundled     bool   `json:"bundled"` // cannot be changed, only cloned
	Description string `json:"description,omitempty"`
}

// listPolicies reads the storage policies.
func (c *client) listPolicies(ctx context.Context) ([]policyJSON, error) {
	found, err := c.ext.Policies(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the storage policies: %w", err)
	}
	list := []policyJSON{}
	for _, p := range found {
		list = append(list, newPolicyJSON(p))
	}
	return list, nil
}

func newPolicyJSON(p vimext.PolicyDetail) policyJSON {
	return policyJSON{ID: p.ID, Name: p.Name, Encrypts: p.Encrypts, Bundled: p.Bundled, Description: p.Description}
}

// policy finds a policy by name or id.
func (c *client) policy(ctx context.Context, name string) (policyJSON, error) {
	list, err := c.listPolicies(ctx)
	if err != nil {
		return policyJSON{}, err
	}
	for _, p := range list {
		if p.Name == name || p.ID == name {
			return p, nil
		}
	}
	for _, p := range list {
		if strings.EqualFold(p.Name, name) {
			return p, nil
		}
	}
	return policyJSON{}, fmt.Errorf("there is no storage policy %q: mortise policy ls lists them", name)
}

// encryptionPolicy is the policy to encrypt by: the one that is named, which
// must encrypt, or vSphere's sample.
func (c *client) encryptionPolicy(ctx context.Context, name string) (policyJSON, error) {
	p, err := c.policy(ctx, name)
	if err == nil && !p.Encrypts {
		err = fmt.Errorf("storage policy %q does not encrypt: mortise policy ls shows which do", p.Name)
	}
	return p, err
}

// plainPolicy is the bundled policy that asks for nothing: applying it decrypts.
func (c *client) plainPolicy(ctx context.Context) (policyJSON, error) {
	list, err := c.listPolicies(ctx)
	if err != nil {
		return policyJSON{}, err
	}
	i := slices.IndexFunc(list, func(p policyJSON) bool { return !p.Encrypts && p.Bundled })
	if i < 0 {
		return policyJSON{}, errors.New("center has no storage policy that does not encrypt")
	}
	return list[i], nil
}

func policyLs(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List storage policies",
		Long: `Lists the storage policies and whether they encrypt.

JSON: a list of {"id", "name", "encrypts", "bundled", "description"}.`,
		Example: `  mortise policy ls
  mortise policy ls --json | jq -r '.[] | select(.encrypts) | .name'`,
		Args: needs(),
		RunE: g.verb(func(ctx context.Context, c *client, _ []string) error {
			list, err := c.listPolicies(ctx)
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(list)
			}
			t := newTable(c.out, "POLICY", "ENCRYPTS", "ID", "DESCRIPTION")
			for _, p := range list {
				t.row(p.Name, yesNo(&p.Encrypts), p.ID, p.Description)
			}
			return t.flush()
		}),
	}
}

func policyClone(g *globals) *cobra.Command {
	var description string
	cmd := &cobra.Command{
		Use:   "clone POLICY NAME",
		Short: "Make a storage policy like another",
		Long: `Makes a new storage policy like POLICY (name or id), under another name. The bundled
policies cannot be changed; clones of them can be deleted.

JSON: {"id", "name", "encrypts", "bundled", "description"}.`,
		Example: `  mortise policy clone "VM Encryption Policy" Payroll`,
		Args:    needs("POLICY", "NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			p, err := c.policy(ctx, args[0])
			if err != nil {
				return err
			}
			made, err := c.ext.ClonePolicy(ctx, p.ID, args[1], description)
			if err != nil {
				return fmt.Errorf("cloning storage policy %q: %w", p.Name, err)
			}
			return c.sayOrJSON(newPolicyJSON(made), "Storage policy %q is there, like %q.", made.Name, p.Name)
		}),
	}
	cmd.Flags().StringVar(&description, "description", "", "what it is for (default: as of POLICY)")
	return cmd
}
