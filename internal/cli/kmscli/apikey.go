package kmscli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
)

func apiKeyCommand() *cobra.Command {
	var g connection
	var instance string
	cmd := group(&g, "apikey", "Keys with which services use the administration API",
		`An API key lets a program use the key server's administration API over HTTPS, in a
role, until it expires or is revoked: Authorization: Bearer KEY. It is no key for
encryption and does not speak KMIP.

A key belongs to one instance. One made with --server-wide has its role in all of
them, and for what concerns the whole server.`,
		`  mortise kms apikey add --name monitoring --out monitoring.key
  mortise kms apikey add --name terraform --role administrator --server-wide --days 30 --out tf.key
  mortise kms apikey revoke monitoring`,
		apiKeyAdd(&g, &instance), apiKeyList(&g, &instance), apiKeyRevoke(&g, &instance))
	instanceFlag(cmd, &instance)
	return cmd
}

func apiKeyAdd(g *connection, instance *string) *cobra.Command {
	var r admin.AddAPIKey
	var role, out string
	cmd := &cobra.Command{
		Use:   "add",
		Short: "Make an API key",
		Long: `Makes an API key and writes it to --out (mode 0600), or prints it. It is shown this
once: the key server keeps only its hash.

` + roleHelp,
		Example: `  mortise kms apikey add --name monitoring --out monitoring.key`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			if err := mayMake(out); err != nil {
				return err
			}
			r.Role = kms.Role(role)
			k, err := v.AddAPIKey(ctx, *instance, r)
			if err != nil {
				return err
			}
			if out != "" {
				if err := writeNew(out, k.Key+"\n"); err != nil {
					return fmt.Errorf("--out: %w; the key is lost: revoke it with: mortise kms apikey revoke %s", err, k.ID)
				}
				k.Key = ""
			}
			return v.show(k, func() {
				v.say("API key %s (%s), %s, until %s.", clean(k.Name), k.ID, k.Role, date(k.Expires))
				if out != "" {
					v.say("Written to %s.", out)
				} else {
					v.say("%s\nIt is shown this once.", k.Key)
				}
			})
		}),
	}
	f := cmd.Flags()
	f.StringVar(&r.Name, "name", "", "what it is for")
	f.StringVar(&role, "role", string(kms.RoleViewer), "viewer, key-manager or administrator")
	f.IntVar(&r.Days, "days", 365, "how long it lives")
	f.BoolVar(&r.ServerWide, "server-wide", false, "for every instance and the whole server")
	f.StringVar(&out, "out", "", "write the key into this new file, mode 0600, instead of printing it")
	_ = cmd.MarkFlagRequired("name")
	return cmd
}

// mayMake refuses a file that is there, before anything is made that would go
// into it.
func mayMake(path string) error {
	if path == "" {
		return nil
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s is there already; it is not overwritten", path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// writeNew writes a new file of mode 0600, durably.
func writeNew(path, text string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

func apiKeyList(g *connection, instance *string) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Short:   "List the API keys",
		Example: `  mortise kms apikey ls --instance tenant-a`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.APIKeys(ctx, *instance)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				var rows [][]string
				for _, k := range list {
					scope, warning := *instance, ""
					if k.ServerWide {
						scope = "server"
					}
					if k.Expires.Before(v.now) {
						warning = "expired"
					} else if k.Expires.Before(v.now.Add(30 * 24 * time.Hour)) {
						warning = "expires soon"
					}
					rows = append(rows, []string{k.ID, k.Name, string(k.Role), scope, date(k.Expires), warning})
				}
				v.table("ID NAME ROLE SCOPE EXPIRES WARNING", rows)
			})
		}),
	}
}

func apiKeyRevoke(g *connection, instance *string) *cobra.Command {
	return &cobra.Command{
		Use:     "revoke KEY",
		Short:   "Revoke an API key",
		Long:    `Revokes an API key at once. KEY is its id or its name, as mortise kms apikey ls shows them.`,
		Example: `  mortise kms apikey revoke monitoring`,
		Args:    needs("KEY"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			k, err := v.RemoveAPIKey(ctx, *instance, args[0])
			if err != nil {
				return err
			}
			return v.show(k, func() { v.say("API key %s (%s) is revoked.", clean(k.Name), k.ID) })
		}),
	}
}
