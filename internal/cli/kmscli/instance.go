package kmscli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
)

func instanceCommand() *cobra.Command {
	var g connection
	return group(&g, "instance", "Instances: key servers within the key server, each with its own keys and clients",
		`One key server holds many instances. Each has a root key (CRK) and keys of its own,
client certificates of its own, and an endpoint: a TCP port of its own, or a name
on the shared port by which clients reach it (TLS server name, SNI). A client of
one sees nothing of another.

An instance is made first, shows its endpoint, and then lets its clients in:

  mortise kms instance create tenant-a --server-name tenant-a.kms.example.com
  mortise kms client issue --instance tenant-a --name vc1.example.com --out vc1.pem

Clients that send no server name, such as ESXi hosts of a vSAN cluster, need a
port of their own (--port), or they reach instance default.`,
		`  mortise kms instance create tenant-a --port 5701 --max-objects 100000
  mortise kms instance ungrant tenant-a     stops serving at once, nothing is lost
  mortise kms instance grant tenant-a`,
		instanceCreate(&g), instanceList(&g), instanceShow(&g), instanceSet(&g), instanceGrant(&g), instanceUngrant(&g), instanceDelete(&g))
}

// settingFlags are those of create and set.
type settingFlags struct {
	description, serverName string
	port                    int
	strict                  bool
	quota                   kms.Quota
}

func (s *settingFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.description, "description", "", "what it is for")
	f.StringVar(&s.serverName, "server-name", "", "TLS server name of the instance; without a dot it matches the first label of any name (default: its id)")
	f.IntVar(&s.port, "port", 0, "TCP port of its own, at every member; 0: none")
	f.BoolVar(&s.strict, "strict", false, "of instance default: refuse connections on the shared port that name no instance")
	f.IntVar(&s.quota.Objects, "max-objects", 0, "objects at the most, without destroyed ones; 0: no bound")
	f.IntVar(&s.quota.Clients, "max-clients", 0, "client certificates at the most; 0: no bound")
	f.IntVar(&s.quota.RequestsPerSecond, "max-requests", 0, "KMIP operations a second at the most, at each member; 0: no bound")
}

func instanceCreate(g *connection) *cobra.Command {
	var s settingFlags
	var provider string
	cmd := &cobra.Command{
		Use:   "create ID",
		Short: "Make an instance",
		Long: `Makes an instance with a root key and keys of its own. It serves at once, on every
member, and lets nobody in until a client is added. ID has up to 40 lower-case
letters, digits and hyphens.`,
		Example: `  mortise kms instance create tenant-a --server-name tenant-a.kms.example.com
  mortise kms instance create vsan1 --port 5701`,
		Args: needs("ID"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			i, err := v.CreateInstance(ctx, admin.CreateInstance{ID: args[0], Provider: provider, Settings: kms.Settings{
				Description: s.description, ServerName: s.serverName, Port: s.port, Strict: s.strict, Quota: s.quota,
			}})
			if err != nil {
				return err
			}
			return v.show(i, func() {
				v.describe(i)
				v.say("\nLet a client in with: mortise kms client issue --instance %s --name NAME --out FILE", i.ID)
			})
		}),
	}
	s.bind(cmd)
	cmd.Flags().StringVar(&provider, "provider", "", "root-key provider for its root key: file or pkcs11 (default: the first that the key server was unlocked with)")
	return cmd
}

// describe prints an instance.
func (v *verb) describe(i kms.Instance) {
	line := func(name, format string, args ...any) { v.say("%-13s %s", name, clean(fmt.Sprintf(format, args...))) }
	line("Instance", "%s", i.ID)
	if i.Description != "" {
		line("Description", "%s", i.Description)
	}
	line("State", "%s", strings.TrimSuffix(i.State+": "+i.Reason, ": "))
	for _, e := range i.Endpoints {
		name := ""
		if e.ServerName != "" {
			name = ", TLS server name " + e.ServerName
		}
		line("Endpoint", "%s:%d%s (member %s)", e.Host, e.Port, name, e.Member)
		line("  thumbprint", "%s", e.Thumbprint)
	}
	if i.Port != 0 {
		line("Own port", "%d", i.Port)
	}
	line("Server name", "%s", i.ServerName)
	line("Root key", "%s (%s), instance key of generation %d", i.CRK, i.Provider, i.Generation)
	line("Objects", "%s", ofQuota(i.Objects, i.Quota.Objects))
	line("Clients", "%s", ofQuota(i.Clients, i.Quota.Clients))
	if i.Quota.RequestsPerSecond > 0 {
		line("Requests", "at most %d a second", i.Quota.RequestsPerSecond)
	}
	if i.Strict {
		line("Strict", "connections that name no instance are refused")
	}
	line("Created", "%s", date(i.Created))
}

func ofQuota(n, quota int) string {
	if quota == 0 {
		return strconv.Itoa(n)
	}
	return fmt.Sprintf("%d of at most %d", n, quota)
}

func instanceList(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Short:   "List the instances",
		Example: `  mortise kms instance ls --json`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.Instances(ctx)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				var rows [][]string
				for _, i := range list {
					port := "shared"
					if i.Port != 0 {
						port = strconv.Itoa(i.Port)
					}
					rows = append(rows, []string{i.ID, i.State, port, i.ServerName, strconv.Itoa(i.Objects), strconv.Itoa(i.Clients), i.Description})
				}
				v.table("INSTANCE STATE PORT SERVER-NAME OBJECTS CLIENTS DESCRIPTION", rows)
			})
		}),
	}
}

func instanceShow(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:     "show ID",
		Short:   "Show an instance and where clients reach it",
		Example: `  mortise kms instance show default`,
		Args:    needs("ID"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			i, err := v.Instance(ctx, args[0])
			if err != nil {
				return err
			}
			return v.show(i, func() { v.describe(i) })
		}),
	}
}

func instanceSet(g *connection) *cobra.Command {
	var s settingFlags
	cmd := &cobra.Command{
		Use:     "set ID",
		Short:   "Change an instance's endpoint, quotas or description",
		Long:    `Changes what the given flags say and leaves the rest. Open connections stay open.`,
		Example: `  mortise kms instance set tenant-a --max-objects 200000`,
		Args:    needs("ID"),
	}
	s.bind(cmd)
	cmd.RunE = g.run(func(ctx context.Context, v *verb, args []string) error {
		var c kms.InstanceChange
		given := cmd.Flags().Changed
		if given("description") {
			c.Description = &s.description
		}
		if given("server-name") {
			c.ServerName = &s.serverName
		}
		if given("port") {
			c.Port = &s.port
		}
		if given("strict") {
			c.Strict = &s.strict
		}
		if given("max-objects") || given("max-clients") || given("max-requests") {
			now, err := v.Instance(ctx, args[0])
			if err != nil {
				return err
			}
			q := now.Quota
			if given("max-objects") {
				q.Objects = s.quota.Objects
			}
			if given("max-clients") {
				q.Clients = s.quota.Clients
			}
			if given("max-requests") {
				q.RequestsPerSecond = s.quota.RequestsPerSecond
			}
			c.Quota = &q
		}
		i, err := v.ChangeInstance(ctx, args[0], c)
		if err != nil {
			return err
		}
		return v.show(i, func() { v.describe(i) })
	})
	return cmd
}

func instanceGrant(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:     "grant ID",
		Short:   "Give an instance the use of its root key again",
		Example: `  mortise kms instance grant tenant-a`,
		Args:    needs("ID"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			i, err := v.GrantInstance(ctx, args[0])
			if err != nil {
				return err
			}
			return v.show(i, func() { v.say("Instance %s may use its root key. It is %s.", i.ID, i.State) })
		}),
	}
}

func instanceUngrant(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "ungrant ID",
		Short: "Take the use of its root key away from an instance: it stops serving at once",
		Long: `The instance stops serving at once, on every member, and its keys leave their
memory; its clients are told that it is locked. Nothing is lost: mortise kms
instance grant lets it serve again. VMs that run go on; none whose key is fetched
from this instance can be powered on meanwhile.`,
		Example: `  mortise kms instance ungrant tenant-a`,
		Args:    needs("ID"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			i, err := v.UngrantInstance(ctx, args[0])
			if err != nil {
				return err
			}
			return v.show(i, func() { v.say("Instance %s is locked. Nothing is lost: mortise kms instance grant %[1]s", i.ID) })
		}),
	}
}

func instanceDelete(g *connection) *cobra.Command {
	var confirm string
	cmd := &cobra.Command{
		Use:   "delete ID",
		Short: "Delete an instance with all its keys, for ever",
		Long: `Deletes an instance, its clients and all its keys, and destroys its root key, so
that no backup brings them back. What was encrypted with its keys is lost.

The key server first lists what would be lost; the deletion goes through when it
is repeated with the hash of that list (--confirm), which a terminal asks for. If
the list has changed meanwhile it is shown again.`,
		Example: `  mortise kms instance delete tenant-a
  mortise kms instance delete tenant-a --confirm HASH     from a script`,
		Args: needs("ID"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			err := v.confirmed(confirm, func(hash string) error { return v.DeleteInstance(ctx, args[0], hash) })
			if err != nil {
				return err
			}
			return v.show(struct{}{}, func() { v.say("Instance %s is deleted.", args[0]) })
		}),
	}
	confirmFlag(cmd.Flags(), &confirm)
	return cmd
}
