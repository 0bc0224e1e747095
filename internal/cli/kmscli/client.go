package kmscli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
)

const roleHelp = `Roles, each with what the ones before it may do:

  viewer         finds objects and reads their attributes; no key bytes
  key-manager    makes, fetches and uses keys; what vCenter and center need
  administrator  revokes and destroys keys, and administers the instance`

func clientCommand() *cobra.Command {
	var g connection
	var instance string
	cmd := group(&g, "client", "Say which client certificates may use the key server",
		`A client of the key server is whoever holds the key of a pinned certificate. It may
be self-signed. Adding and revoking takes effect at once, on open connections too.

`+roleHelp, `  mortise kms client add center.pem --name center
  mortise kms client ls`,
		clientAdd(&g, &instance), clientIssue(&g, &instance), clientList(&g, &instance), clientRenew(&g, &instance), clientRevoke(&g, &instance))
	instanceFlag(cmd, &instance)
	return cmd
}

func instanceFlag(cmd *cobra.Command, to *string) {
	cmd.PersistentFlags().StringVar(to, "instance", kms.DefaultInstance, "KMS instance")
}

func clientAdd(g *connection, instance *string) *cobra.Command {
	var name, role string
	cmd := &cobra.Command{
		Use:   "add FILE",
		Short: "Pin a client certificate (PEM)",
		Long: `Lets the holder of a certificate use an instance. FILE is the certificate as PEM
text, such as vCenter or mortise provider trust shows it; - reads standard input,
so that it can be pasted. The file must not hold the private key: that stays with
the client.

` + roleHelp,
		Example: `  mortise kms client add center.pem --name center
  mortise kms client add - --instance tenant-a --role viewer < audit.pem`,
		Args: needs("FILE"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			text, err := v.input(args[0])
			if err != nil {
				return err
			}
			c, err := v.AddClient(ctx, *instance, admin.AddClient{Certificate: string(text), Name: name, Role: kms.Role(role)})
			if err != nil {
				return err
			}
			return v.show(c, func() { v.mayUse(c, *instance) })
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "label (default: the certificate's common name)")
	cmd.Flags().StringVar(&role, "role", string(kms.RoleKeyManager), "viewer, key-manager or administrator")
	return cmd
}

func (v *verb) mayUse(c kms.Client, instance string) {
	v.say("%s may use instance %s until %s, as %s.\nSHA-256 %s", clean(c.Name), instance, date(c.Ends()), c.Role, c.Fingerprint)
}

func clientList(g *connection, instance *string) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Short:   "List the pinned client certificates",
		Example: `  mortise kms client ls --instance tenant-a`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.Clients(ctx, *instance)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				var rows [][]string
				for _, c := range list {
					rows = append(rows, []string{c.Name, string(c.Role), date(c.Ends()), c.Warning(v.now), c.Fingerprint})
				}
				v.table("NAME ROLE EXPIRES WARNING SHA-256", rows)
			})
		}),
	}
}

func clientRevoke(g *connection, instance *string) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke CLIENT",
		Short: "Shut a client certificate out",
		Long: `Shuts a certificate out, from the next message on, on open connections too. CLIENT
is its fingerprint, at least the first 8 digits, or its label. The keys that it
made stay.`,
		Example: `  mortise kms client revoke vc1
  mortise kms client revoke 3ad4e1f09b72 --instance tenant-a`,
		Args: needs("CLIENT"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			c, err := v.RemoveClient(ctx, *instance, args[0])
			if err != nil {
				return err
			}
			return v.show(c, func() {
				fmt.Fprintf(v.out, "%s (SHA-256 %s) is shut out. Its keys stay.\n", clean(c.Name), c.Fingerprint)
			})
		}),
	}
}
