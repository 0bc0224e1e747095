package cli

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/crypto"
	"github.com/vmware/govmomi/vim25/types"
)

// kmipPort is where key servers listen.
const kmipPort = 5696

func providerCommand() *cobra.Command {
	g := &globals{}
	return group(g, "provider", "Key providers: where the keys that encrypt VMs come from",
		`A key provider is one or more key servers (KMS) that share their keys, under a name.
The name is written into every VM that its keys encrypt: choose one to keep. When a
provider is gone, VMs that it encrypted stay locked until it is added again under
the same name. center keeps no key, only key ids.

A provider is set up in three steps: add its server, trust each other, make it the
default.`,
		`  mortise provider add kms1 kms.example.com
  mortise provider trust kms1
  mortise provider default kms1
  mortise provider status`,
		providerAdd(g), providerTrust(g), providerLs(g), providerDefault(g), providerStatus(g), providerCertify(g), providerRm(g))
}

func (c *client) kmip() (*crypto.ManagerKmip, error) {
	m, err := crypto.GetManagerKmip(c.vim)
	if err != nil {
		return nil, fmt.Errorf("center has no key management: %w", err)
	}
	return m, nil
}

// parseAddress reads the address of a key server, with or without port.
func parseAddress(text string) (host string, port int32, err error) {
	bad := func() (string, int32, error) {
		return "", 0, fmt.Errorf("%q is no address of a key server: e.g. kms.example.com or 192.0.2.7:%d", text, kmipPort)
	}
	host, port = strings.Trim(text, "[]"), kmipPort
	if h, p, err := net.SplitHostPort(text); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return bad()
		}
		host, port = h, int32(n)
	} else if strings.Contains(text, ":") && net.ParseIP(host) == nil {
		return bad()
	}
	if host == "" || strings.ContainsAny(host, "/ \t") {
		return bad()
	}
	return host, port, nil
}

func providerAdd(g *globals) *cobra.Command {
	var server string
	var isDefault bool
	cmd := &cobra.Command{
		Use:   "add NAME ADDRESS[:5696]",
		Short: "Add a key provider, or one more server to it",
		Long: `Adds a key server (KMIP over TLS) to the provider NAME, and the provider when there
is none of that name. All servers of a provider must serve the same keys. Nothing is
sent to the server before mortise provider trust was run.

JSON: {"provider", "server", "address", "port"}.`,
		Example: `  mortise provider add kms1 kms.example.com
  mortise provider add kms1 kms2.example.com:5696 --server second`,
		Args: needs("NAME", "ADDRESS"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			host, port, err := parseAddress(args[1])
			if err != nil {
				return err
			}
			name := cmp.Or(server, host)
			m, err := c.kmip()
			if err != nil {
				return err
			}
			spec := types.KmipServerSpec{
				ClusterId: types.KeyProviderId{Id: args[0]},
				Info:      types.KmipServerInfo{Name: name, Address: host, Port: port},
			}
			if err := m.RegisterKmipServer(ctx, spec); err != nil {
				return fmt.Errorf("adding %s to key provider %s: %w", args[1], args[0], err)
			}
			if isDefault {
				if err := m.SetDefaultKmsClusterId(ctx, args[0], nil); err != nil {
					return fmt.Errorf("making %s the default: %w", args[0], err)
				}
			}
			if c.json {
				return c.printJSON(struct {
					Provider string `json:"provider"`
					Server   string `json:"server"`
					Address  string `json:"address"`
					Port     int32  `json:"port"`
				}{args[0], name, host, port})
			}
			c.say("Key server %s (%s) belongs to provider %s. Next: mortise provider trust %[3]s", name, net.JoinHostPort(host, strconv.Itoa(int(port))), args[0])
			return nil
		}),
	}
	cmd.Flags().StringVar(&server, "server", "", "name of the server within the provider (default: its address)")
	cmd.Flags().BoolVar(&isDefault, "default", false, "make it the default provider too")
	return cmd
}

// providerJSON is a key provider in JSON.
type providerJSON struct {
	Provider string       `json:"provider"`
	Default  bool         `json:"default"`
	Kind     string       `json:"kind"`
	Servers  []serverJSON `json:"servers"`
}

type serverJSON struct {
	Server  string `json:"server"`
	Address string `json:"address"`
	Port    int32  `json:"port"`
	*statusJSON
}

// statusJSON is what center found when it asked a server.
type statusJSON struct {
	Status             string     `json:"status"`               // green, yellow, red
	Connection         string     `json:"connection,omitempty"` // in words
	ServerTrusted      *bool      `json:"serverTrusted,omitempty"`
	ClientTrusted      *bool      `json:"clientTrusted,omitempty"`
	ServerThumbprint   string     `json:"serverThumbprint,omitempty"`
	ServerCertNotAfter *time.Time `json:"serverCertNotAfter,omitempty"`
	ClientCertNotAfter *time.Time `json:"clientCertNotAfter,omitempty"`
}

// listProviders reads the providers as they are configured.
func (c *client) listProviders(ctx context.Context) ([]types.KmipClusterInfo, error) {
	m, err := c.kmip()
	if err != nil {
		return nil, err
	}
	list, err := m.ListKmipServers(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("listing the key providers: %w", err)
	}
	return list, nil
}

// provider finds one provider by name.
func (c *client) provider(ctx context.Context, name string) (types.KmipClusterInfo, error) {
	list, err := c.listProviders(ctx)
	if err != nil {
		return types.KmipClusterInfo{}, err
	}
	var known []string
	for _, p := range list {
		if p.ClusterId.Id == name {
			return p, nil
		}
		known = append(known, p.ClusterId.Id)
	}
	if len(known) == 0 {
		return types.KmipClusterInfo{}, fmt.Errorf("there is no key provider yet: add one with mortise provider add %s ADDRESS", name)
	}
	return types.KmipClusterInfo{}, fmt.Errorf("there is no key provider %q, but %s", name, strings.Join(known, ", "))
}

func newProviderJSON(p types.KmipClusterInfo) providerJSON {
	j := providerJSON{Provider: p.ClusterId.Id, Default: p.UseAsDefault, Kind: providerKind(p.ManagementType), Servers: []serverJSON{}}
	for _, s := range p.Servers {
		j.Servers = append(j.Servers, serverJSON{Server: s.Name, Address: s.Address, Port: s.Port})
	}
	return j
}

// providerKind words vSphere's managementType.
func providerKind(management string) string {
	switch management {
	case string(types.KmipClusterInfoKmsManagementTypeNativeProvider):
		return "native"
	case string(types.KmipClusterInfoKmsManagementTypeTrustAuthority):
		return "trusted"
	}
	return "standard"
}

func providerLs(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List key providers and their servers",
		Long: `Lists key providers and their servers, without asking them; mortise provider status
does.

JSON: a list of {"provider", "default", "kind" (standard, native, trusted),
"servers": [{"server", "address", "port"}]}.`,
		Example: `  mortise provider ls
  mortise provider ls --json | jq -r '.[] | select(.default) | .provider'`,
		Args: needs(),
		RunE: g.verb(func(ctx context.Context, c *client, _ []string) error {
			list, err := c.listProviders(ctx)
			if err != nil {
				return err
			}
			all := []providerJSON{}
			for _, p := range list {
				all = append(all, newProviderJSON(p))
			}
			if c.json {
				return c.printJSON(all)
			}
			t := newTable(c.out, "PROVIDER", "KIND", "DEFAULT", "SERVER", "ADDRESS")
			for _, p := range all {
				def := ""
				if p.Default {
					def = "yes"
				}
				if len(p.Servers) == 0 {
					t.row(p.Provider, p.Kind, def, "", "")
				}
				for _, s := range p.Servers {
					t.row(p.Provider, p.Kind, def, s.Server, net.JoinHostPort(s.Address, strconv.Itoa(int(s.Port))))
				}
			}
			return t.flush()
		}),
	}
}

func providerDefault(g *globals) *cobra.Command {
	var vm, host string
	var unset bool
	cmd := &cobra.Command{
		Use:   "default [NAME]",
		Short: "Show or set the key provider that is used when none is named",
		Long: `Sets the default provider: for everything, or for a host or a VM alone. A VM's
default is looked up at the VM, then at what holds it, then globally. Setting it
changes no VM: keys in use stay those of their own provider. Without NAME it is
shown.

JSON: {"provider"} (empty: there is none).`,
		Example: `  mortise provider default kms1
  mortise provider default kms2 --host esx1
  mortise provider default --host esx1 --unset`,
		Args: cobra.MaximumNArgs(1),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			m, err := c.kmip()
			if err != nil {
				return err
			}
			entity, err := c.entityFlag(ctx, vm, host)
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				name = args[0]
			}
			if name != "" && unset {
				return fmt.Errorf("give NAME or --unset, not both")
			}
			if name == "" && !unset {
				if name, err = m.GetDefaultKmsClusterID(ctx, entity, true); err != nil {
					return fmt.Errorf("reading the default key provider: %w", err)
				}
			} else {
				if name != "" {
					if _, err := c.provider(ctx, name); err != nil {
						return err
					}
				}
				if err := m.SetDefaultKmsClusterId(ctx, name, entity); err != nil {
					return fmt.Errorf("setting the default key provider: %w", err)
				}
			}
			if c.json {
				return c.printJSON(struct {
					Provider string `json:"provider"`
				}{name})
			}
			if name == "" {
				c.say("There is no default key provider: encryption must name one.")
				return nil
			}
			c.say("The default key provider is %s.", name)
			return nil
		}),
	}
	cmd.Flags().StringVar(&vm, "vm", "", "of this VM")
	cmd.Flags().StringVar(&host, "host", "", "of this host")
	cmd.Flags().BoolVar(&unset, "unset", false, "take the default away")
	cmd.MarkFlagsMutuallyExclusive("vm", "host")
	return cmd
}

// entityFlag finds what --vm or --host names; nil when neither is given.
func (c *client) entityFlag(ctx context.Context, vm, host string) (*types.ManagedObjectReference, error) {
	kind, name := kindVM, vm
	if host != "" {
		kind, name = kindHost, host
	}
	if name == "" {
		return nil, nil
	}
	ref, err := c.find(ctx, kind, name)
	return &ref, err
}

func providerStatus(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status [NAME]",
		Short: "Ask the key servers how they are",
		Long: `Has center ask each key server, and shows whether it answers, whether each side
trusts the other's certificate, and when the certificates expire. It exits with an
error when a server does not answer.

Running VMs do not need their key server. A power-on does, unless the host still
holds the keys.

JSON: as of mortise provider ls, and in each server "status" (green, yellow, red),
"connection" (in words), "serverTrusted", "clientTrusted", "serverThumbprint",
"serverCertNotAfter", "clientCertNotAfter".`,
		Example: `  mortise provider status
  mortise provider status kms1 --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			list, err := c.listProviders(ctx)
			if err == nil && len(args) == 1 {
				var p types.KmipClusterInfo
				p, err = c.provider(ctx, args[0])
				list = []types.KmipClusterInfo{p}
			}
			if err != nil {
				return err
			}
			return c.showStatus(ctx, list)
		}),
	}
}

func (c *client) showStatus(ctx context.Context, list []types.KmipClusterInfo) error {
	all := []providerJSON{}
	var down []string
	for _, p := range list {
		j := newProviderJSON(p)
		status, err := c.serverStatus(ctx, p)
		if err != nil {
			return err
		}
		for i := range j.Servers {
			s := &j.Servers[i]
			s.statusJSON = status[s.Server]
			if s.statusJSON == nil {
				s.statusJSON = &statusJSON{Status: "gray", Connection: "center said nothing about it"}
			}
			if s.Status != string(types.ManagedEntityStatusGreen) && s.Status != string(types.ManagedEntityStatusYellow) {
				down = append(down, p.ClusterId.Id+"/"+s.Server)
			}
		}
		all = append(all, j)
	}
	var err error
	if c.json {
		err = c.printJSON(all)
	} else {
		t := newTable(c.out, "PROVIDER", "SERVER", "STATUS", "SERVER TRUSTED", "CLIENT TRUSTED", "SERVER CERT UNTIL", "CLIENT CERT UNTIL", "CONNECTION")
		for _, p := range all {
			for _, s := range p.Servers {
				t.row(p.Provider, s.Server, s.Status, yesNo(s.ServerTrusted), yesNo(s.ClientTrusted), day(s.ServerCertNotAfter), day(s.ClientCertNotAfter), s.Connection)
			}
		}
		err = t.flush()
	}
	if err == nil && len(down) > 0 {
		return fmt.Errorf("%s cannot be used", strings.Join(down, ", "))
	}
	return err
}

// serverStatus asks the servers of one provider, by name.
func (c *client) serverStatus(ctx context.Context, p types.KmipClusterInfo) (map[string]*statusJSON, error) {
	m, err := c.kmip()
	if err != nil {
		return nil, err
	}
	status, err := m.GetStatus(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("asking the servers of key provider %s: %w", p.ClusterId.Id, err)
	}
	all := map[string]*statusJSON{}
	for _, cluster := range status {
		var client *time.Time
		if cluster.ClientCertInfo != nil {
			client = &cluster.ClientCertInfo.NotAfter
		}
		for _, s := range cluster.Servers {
			j := &statusJSON{
				Status: string(s.Status), Connection: s.ConnectionStatus,
				ServerTrusted: s.ClientTrustServer, ClientTrusted: s.ServerTrustClient, ClientCertNotAfter: client,
			}
			if s.CertInfo != nil {
				j.ServerThumbprint, j.ServerCertNotAfter = s.CertInfo.Fingerprint, &s.CertInfo.NotAfter
			}
			all[s.Name] = j
		}
	}
	return all, nil
}

func yesNo(b *bool) string {
	switch {
	case b == nil:
		return ""
	case *b:
		return "yes"
	}
	return "no"
}

func day(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format(time.DateOnly)
}

func providerRm(g *globals) *cobra.Command {
	var server string
	cmd := &cobra.Command{
		Use:   "rm NAME",
		Short: "Remove a key provider, or one of its servers",
		Long: `Removes a key provider from center, or with --server one of its servers. A provider
whose keys something needs is refused, with what would be locked. The key server
keeps its keys: adding it again under the same name opens what they encrypted.

JSON: {"provider", "server"}.`,
		Example: `  mortise provider rm kms1 --server second
  mortise provider rm kms1`,
		Args: needs("NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			m, err := c.kmip()
			if err != nil {
				return err
			}
			what := "key provider " + args[0]
			if server != "" {
				what = "key server " + server + " of " + args[0]
				err = m.RemoveKmipServer(ctx, args[0], server)
			} else {
				err = m.UnregisterKmsCluster(ctx, args[0])
			}
			if err != nil {
				return fmt.Errorf("removing %s: %w", what, err)
			}
			if c.json {
				return c.printJSON(struct {
					Provider string `json:"provider"`
					Server   string `json:"server,omitempty"`
				}{args[0], server})
			}
			c.say("Removed %s. Its keys stay at the key server.", what)
			return nil
		}),
	}
	cmd.Flags().StringVar(&server, "server", "", "remove only this server")
	return cmd
}
