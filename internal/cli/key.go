package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

func keyCommand() *cobra.Command {
	g := &globals{}
	return group(g, "key", "Keys: who needs which",
		`Keys stay at their key provider; center knows them by provider and id.`,
		`  mortise key status kms1/6f2c…
  mortise key status --vm web1`, keyStatus(g))
}

// keyJSON is what is known of a key, in JSON.
type keyJSON struct {
	Provider  string   `json:"provider"`
	Key       string   `json:"key"`
	State     string   `json:"state,omitempty"` // KMIP's; empty: not known
	Available bool     `json:"available"`
	Reason    string   `json:"reason,omitempty"`
	Message   string   `json:"message,omitempty"`
	VMs       []string `json:"vms"`
	Hosts     []string `json:"hosts"`
}

func keyStatus(g *globals) *cobra.Command {
	var vm string
	cmd := &cobra.Command{
		Use:   "status PROVIDER/KEY-ID...",
		Short: "Tell whether keys can be had, and what needs them",
		Long: `Asks the key provider whether each key can be had, and tells which VMs and hosts need
it. Do this before a key or a provider goes: what it lists would be locked.

JSON: a list of {"provider", "key", "state" (KMIP's: Active, Deactivated, …), "available",
"reason" (why not, by vSphere's name: KeyStateMissingInKMS, KeyStateNotActiveOrEnabled,
KeyStateClusterUnreachable, …), "message" (in words), "vms", "hosts"}.`,
		Example: `  mortise key status kms1/6f2c7c5e-…
  mortise key status --vm web1`,
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			var keys []types.CryptoKeyId
			for _, a := range args {
				k, err := parseKey(a)
				if err != nil {
					return err
				}
				keys = append(keys, k)
			}
			if vm != "" {
				more, err := c.keysOf(ctx, vm)
				if err != nil {
					return err
				}
				keys = append(keys, more...)
			}
			if len(keys) == 0 {
				if vm != "" {
					return c.sayOrJSON([]keyJSON{}, "%s is not encrypted: it needs no key.", vm)
				}
				return fmt.Errorf("name a key, or a VM with --vm; see mortise key status --help")
			}
			return c.showKeys(ctx, keys)
		}),
	}
	cmd.Flags().StringVar(&vm, "vm", "", "the keys of this VM")
	return cmd
}

// keysOf lists the keys of a VM, each once.
func (c *client) keysOf(ctx context.Context, name string) ([]types.CryptoKeyId, error) {
	ref, err := c.find(ctx, kindVM, name)
	if err != nil {
		return nil, err
	}
	var vm mo.VirtualMachine
	if err := c.properties(ctx, ref, []string{"config"}, &vm); err != nil {
		return nil, err
	}
	if vm.Config == nil {
		return nil, nil
	}
	var keys []types.CryptoKeyId
	add := func(k *types.CryptoKeyId) {
		if k != nil && !slices.ContainsFunc(keys, func(have types.CryptoKeyId) bool { return keyName(&have) == keyName(k) }) {
			keys = append(keys, *k)
		}
	}
	add(vm.Config.KeyId)
	for _, d := range disksOf(vm.Config.Hardware.Device) {
		add(diskKey(d))
	}
	return keys, nil
}

// diskKey is the KEK of a disk; nil when it is in clear.
func diskKey(d *types.VirtualDisk) *types.CryptoKeyId {
	if b, ok := d.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
		return b.KeyId
	}
	return nil
}

func (c *client) showKeys(ctx context.Context, keys []types.CryptoKeyId) error {
	found, err := c.ext.QueryKeys(ctx, keys...)
	if err != nil {
		return fmt.Errorf("asking about keys: %w", err)
	}
	var refs []types.ManagedObjectReference
	for _, k := range found {
		refs = append(append(refs, k.VMs...), k.Hosts...)
	}
	names := c.names(ctx, refs)
	list := []keyJSON{}
	for _, k := range found {
		ref := newKeyRef(&k.Key)
		j := keyJSON{
			Provider: ref.Provider, Key: ref.Key, State: k.State, Available: k.Available, Reason: k.Reason, Message: k.Message,
			VMs: []string{}, Hosts: []string{},
		}
		for _, vm := range k.VMs {
			j.VMs = append(j.VMs, names[vm])
		}
		for _, h := range k.Hosts {
			j.Hosts = append(j.Hosts, names[h])
		}
		list = append(list, j)
	}
	if c.json {
		return c.printJSON(list)
	}
	t := newTable(c.out, "KEY", "STATE", "AVAILABLE", "VMS", "HOSTS", "WHY NOT")
	for _, k := range list {
		t.row(k.Provider+"/"+k.Key, k.State, yesNo(&k.Available), strings.Join(k.VMs, ", "), strings.Join(k.Hosts, ", "), cmp.Or(k.Message, k.Reason))
	}
	return t.flush()
}
