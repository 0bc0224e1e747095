package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// hostVerbs are the client's verbs about hosts.
func hostVerbs() []*cobra.Command {
	g := &globals{}
	verbs := []*cobra.Command{hostLs(g), hostToken(g)}
	for _, v := range verbs {
		g.bind(v.Flags())
	}
	return verbs
}

// hostJSON is a host in JSON.
type hostJSON struct {
	Host           string   `json:"host"`
	Name           string   `json:"name"`
	Address        string   `json:"address"`
	Connection     string   `json:"connection"`
	Problem        string   `json:"problem,omitempty"`
	CryptoState    string   `json:"cryptoState"`
	CryptoReasons  []string `json:"cryptoReasons"`
	HostKey        *keyRef  `json:"hostKey,omitempty"`
	Version        string   `json:"version"`
	Hypervisor     string   `json:"hypervisor"`
	KVM            bool     `json:"kvm"`
	AES            bool     `json:"aes"`
	XTS            string   `json:"xts"`
	CertThumbprint string   `json:"certThumbprint"`
	VMs            int32    `json:"vms"`
	Datastores     []string `json:"datastores"`
	Networks       []string `json:"networks"`
}

func (c *client) listHosts(ctx context.Context) ([]hostJSON, error) {
	hosts, err := c.ext.HostDetail(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the hosts: %w", err)
	}
	list := []hostJSON{}
	for _, h := range hosts {
		list = append(list, hostJSON{
			Host: h.Host.Value, Name: h.Name, Address: h.Address, Connection: h.Connection, Problem: h.Problem, CryptoState: h.CryptoState,
			CryptoReasons: append([]string{}, h.CryptoReasons...), HostKey: newKeyRef(h.HostKey), Version: h.Version, Hypervisor: h.Hypervisor,
			KVM: h.KVM, AES: h.AES, XTS: h.XTS, CertThumbprint: h.CertThumbprint, VMs: h.VMs,
			Datastores: append([]string{}, h.Datastores...), Networks: append([]string{}, h.Networks...),
		})
	}
	slices.SortFunc(list, func(a, b hostJSON) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func hostLs(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List hosts",
		Long: `Lists the hosts that have joined center. Crypto states: incapable (cannot keep guest
data off unencrypted storage, e.g. for its swap), prepared, safe (has a host key; every
host with an encrypted VM).

JSON: a list of {"host" (reference), "name", "address", "connection" (connected,
disconnected, notResponding), "problem", "cryptoState", "cryptoReasons" (why it is
incapable), "hostKey": {"provider", "key"}, "version", "hypervisor", "kvm", "aes"
(hardware AES), "xts" (the implementation in use), "certThumbprint", "vms", "datastores",
"networks"}.`,
		Example: `  mortise host ls`,
		Args:    needs(),
		RunE: g.verb(func(ctx context.Context, c *client, _ []string) error {
			list, err := c.listHosts(ctx)
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(list)
			}
			t := newTable(c.out, "HOST", "ADDRESS", "CONNECTION", "CRYPTO", "KVM", "AES", "VMS", "DATASTORES", "NETWORKS", "PROBLEM")
			for _, h := range list {
				problem := cmp.Or(h.Problem, strings.Join(h.CryptoReasons, "; "))
				t.row(h.Name, h.Address, h.Connection, h.CryptoState, yesNo(&h.KVM), yesNo(&h.AES), fmt.Sprint(h.VMs), strings.Join(h.Datastores, ", "), strings.Join(h.Networks, ", "), problem)
			}
			return t.flush()
		}),
	}
}

func hostToken(g *globals) *cobra.Command {
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "token NAME",
		Short: "Make the token that a new host joins center with",
		Long: `Makes a token with which one new host of that name can join center, once and before
it expires. The token is a secret: whoever has it can become that host. On the host:
mortise host join.

JSON: {"host", "token"}.`,
		Example: `  mortise host token esx1
  mortise host token esx1 --ttl 15m`,
		Args: needs("NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			token, err := c.ext.CreateJoinToken(ctx, args[0], ttl)
			if err != nil {
				return fmt.Errorf("making a token for host %s: %w", args[0], err)
			}
			if !c.json {
				fmt.Fprintln(c.out, token)
				return nil
			}
			return c.printJSON(struct {
				Host  string `json:"host"`
				Token string `json:"token"`
			}{args[0], token})
		}),
	}
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "how long it is valid (default: center's)")
	return cmd
}
