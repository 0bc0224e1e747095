package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/vimapi/vimext"
)

func vmCommand() *cobra.Command {
	g := &globals{}
	return group(g, "vm", "Virtual machines: import, create, encrypt, run",
		`Verbs about VMs. A VM is named by its name, or by its reference (vm-13) where several
have the same name.`,
		`  mortise vm import disk.qcow2 --name web1 --policy "VM Encryption Policy"
  mortise vm info web1
  mortise vm power on web1
  mortise vm console web1
  mortise vm recrypt web1`,
		vmLs(g), vmInfo(g), vmCreate(g), vmImport(g), vmEncrypt(g), vmDecrypt(g), vmRecrypt(g), vmUnlock(g), vmSnapshot(g),
		vmPower(g), vmConsole(g), vmRegister(g), vmUnregister(g), vmDelete(g))
}

// vmJSON is a VM in a list, in JSON.
type vmJSON struct {
	VM          string `json:"vm"`
	Name        string `json:"name"`
	UUID        string `json:"uuid"`
	Power       string `json:"power"`
	Host        string `json:"host,omitempty"`
	Encrypted   bool   `json:"encrypted"`
	Locked      bool   `json:"locked"`
	Provider    string `json:"provider,omitempty"`
	MemoryBytes int64  `json:"memoryBytes"`
	CPUs        int32  `json:"cpus"`
	Disks       int32  `json:"disks"`
	UsedBytes   int64  `json:"usedBytes"`
	Path        string `json:"path"`
}

func vmLs(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List VMs",
		Long: `Lists the VMs that you may see. A VM is locked when its configuration key is not on its
host: mortise vm info tells why.

JSON: a list of {"vm" (reference), "name", "uuid", "power" (poweredOn, poweredOff,
suspended), "host", "encrypted", "locked", "provider", "memoryBytes", "cpus", "disks",
"usedBytes", "path"}.`,
		Example: `  mortise vm ls
  mortise vm ls --json | jq -r '.[] | select(.encrypted | not) | .name'`,
		Args: needs(),
		RunE: g.verb(func(ctx context.Context, c *client, _ []string) error { return c.listVMs(ctx) }),
	}
}

func (c *client) listVMs(ctx context.Context) error {
	var vms []mo.VirtualMachine
	err := c.retrieve(ctx, kindVM, []string{"name", "summary", "config.keyId"}, &vms)
	if err != nil {
		return err
	}
	var refs []types.ManagedObjectReference
	for _, v := range vms {
		if h := v.Summary.Runtime.Host; h != nil && !slices.Contains(refs, *h) {
			refs = append(refs, *h)
		}
	}
	hosts := c.names(ctx, refs)
	list := []vmJSON{}
	for _, v := range vms {
		s := &v.Summary
		j := vmJSON{
			VM: v.Self.Value, Name: v.Name, UUID: s.Config.Uuid, Power: string(s.Runtime.PowerState), Path: s.Config.VmPathName,
			MemoryBytes: int64(s.Config.MemorySizeMB) << 20, CPUs: s.Config.NumCpu, Disks: s.Config.NumVirtualDisks,
			Locked: s.Runtime.CryptoState == string(types.VirtualMachineCryptoStateLocked),
		}
		if s.Runtime.Host != nil {
			j.Host = hosts[*s.Runtime.Host]
		}
		if s.Storage != nil {
			j.UsedBytes = s.Storage.Committed
		}
		if v.Config != nil && v.Config.KeyId != nil {
			j.Encrypted, j.Provider = true, newKeyRef(v.Config.KeyId).Provider
		}
		list = append(list, j)
	}
	slices.SortFunc(list, func(a, b vmJSON) int { return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.VM, b.VM)) })
	if c.json {
		return c.printJSON(list)
	}
	t := newTable(c.out, "VM", "POWER", "ENCRYPTED", "HOST", "CPUS", "MEMORY", "DISKS", "USED", "PATH")
	for _, v := range list {
		t.row(v.Name, powerWord(v.Power), encryptedWord(v.Encrypted, v.Locked, v.Provider), v.Host, fmt.Sprint(v.CPUs), size(v.MemoryBytes), fmt.Sprint(v.Disks), size(v.UsedBytes), v.Path)
	}
	return t.flush()
}

func powerWord(s string) string {
	return strings.ToLower(strings.TrimPrefix(s, "powered"))
}

func encryptedWord(encrypted, locked bool, provider string) string {
	switch {
	case !encrypted:
		return "no"
	case locked:
		return "LOCKED (" + provider + ")"
	}
	return "yes (" + provider + ")"
}

// vmTask begins a VM's task and waits for it.
func (c *client) vmTask(ctx context.Context, name, doing, done string, detach bool, begin func(types.ManagedObjectReference) (types.ManagedObjectReference, error)) error {
	vm, err := c.find(ctx, kindVM, name)
	if err != nil {
		return err
	}
	task, err := begin(vm)
	if err != nil {
		return fmt.Errorf("%s %s: %w", doing, name, err)
	}
	return c.finish(ctx, task, waiting{title: doing + " " + name, detach: detach, done: fmt.Sprintf(done, name)})
}

func vmPower(g *globals) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use:   "power on|off|reset|shutdown VM",
		Short: "Power a VM on or off, reset it, or ask its guest to shut down",
		Long: `on        starts the VM. An encrypted VM's keys are fetched from its key provider and
          given to its host, unless the host has them still; keys never reach a disk.
off       stops it at once, as pulling the plug does
reset     restarts the guest at once
shutdown  asks the guest to end (ACPI) and does not wait

JSON: the task as of mortise task watch; of shutdown {"vm"}.`,
		Example: `  mortise vm power on web1
  mortise vm power shutdown web1`,
		Args:      needs("on, off, reset or shutdown", "VM"),
		ValidArgs: []string{"on", "off", "reset", "shutdown"},
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			name := args[1]
			begin := func(f func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error), doing, done string) error {
				return c.vmTask(ctx, name, doing, done, detach, f)
			}
			switch args[0] {
			case "on":
				return begin(func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
					res, err := methods.PowerOnVM_Task(ctx, c.vim, &types.PowerOnVM_Task{This: vm})
					return result(res, err, func(r *types.PowerOnVM_TaskResponse) types.ManagedObjectReference { return r.Returnval })
				}, "powering on", "%s runs.")
			case "off":
				return begin(func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
					res, err := methods.PowerOffVM_Task(ctx, c.vim, &types.PowerOffVM_Task{This: vm})
					return result(res, err, func(r *types.PowerOffVM_TaskResponse) types.ManagedObjectReference { return r.Returnval })
				}, "powering off", "%s is off.")
			case "reset":
				return begin(func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
					res, err := methods.ResetVM_Task(ctx, c.vim, &types.ResetVM_Task{This: vm})
					return result(res, err, func(r *types.ResetVM_TaskResponse) types.ManagedObjectReference { return r.Returnval })
				}, "resetting", "%s was reset.")
			case "shutdown":
				vm, err := c.find(ctx, kindVM, name)
				if err != nil {
					return err
				}
				if _, err := methods.ShutdownGuest(ctx, c.vim, &types.ShutdownGuest{This: vm}); err != nil {
					return fmt.Errorf("shutting down %s: %w", name, err)
				}
				return c.sayOrJSON(vmRef{vm.Value}, "The guest of %s was asked to shut down; mortise vm info shows when it is off.", name)
			}
			return fmt.Errorf("%q is no power operation: on, off, reset or shutdown", args[0])
		}),
	}
	return detachFlag(cmd, &detach)
}

// result takes a value out of a response when there is one.
func result[R, V any](res *R, err error, value func(*R) V) (v V, _ error) {
	if err != nil {
		return v, err
	}
	return value(res), nil
}

type vmRef struct {
	VM string `json:"vm"`
}

// sayOrJSON prints v for programs or the sentence for people.
func (c *client) sayOrJSON(v any, format string, args ...any) error {
	if c.json {
		return c.printJSON(v)
	}
	c.say(format, args...)
	return nil
}

func vmUnlock(g *globals) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use:   "unlock VM",
		Short: "Fetch a locked VM's keys again",
		Long: `Fetches the keys of a locked VM from its key provider and gives them to its host, once
what kept them away is over: the provider is back under its first name, its server
answers, the key is active again.

JSON: the task as of mortise task watch.`,
		Example: `  mortise vm unlock web1`,
		Args:    needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			return c.vmTask(ctx, args[0], "unlocking", "%s is unlocked.", detach, func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
				res, err := methods.CryptoUnlock_Task(ctx, c.vim, &types.CryptoUnlock_Task{This: vm})
				return result(res, err, func(r *types.CryptoUnlock_TaskResponse) types.ManagedObjectReference { return r.Returnval })
			})
		}),
	}
	return detachFlag(cmd, &detach)
}

func vmRegister(g *globals) *cobra.Command {
	var name, host string
	var older bool
	cmd := &cobra.Command{
		Use:   `register "[DATASTORE] FOLDER/FILE.vmx"`,
		Short: "Bring a VM's folder on a datastore into the inventory",
		Long: `Brings a VM that lies on a datastore into the inventory. An encrypted VM whose key
provider is not there, or whose key cannot be fetched, comes in locked. The descriptors
are checked against each other: a folder that was edited is refused, and its data left
alone. So is one that is older, or less encrypted, than what center last knew of the
VM: if you restored it from a backup, say so with --accept-older.

JSON: the task as of mortise task watch; "result" is the VM.`,
		Example: `  mortise vm register "[ds1] web1/web1.vmx"
  mortise vm register "[ds1] web1/web1.vmx" --name web1-restored --host esx1`,
		Args: needs("PATH"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			if !strings.HasPrefix(args[0], "[") || !strings.HasSuffix(args[0], ".vmx") {
				return fmt.Errorf(`%q is no path of a VM: write "[DATASTORE] FOLDER/FILE.vmx"`, args[0])
			}
			at, err := c.placement(ctx, host)
			if err != nil {
				return err
			}
			task, err := c.ext.RegisterVM(ctx, vimext.RegisterVMFolder_Task{
				Path: args[0], Name: name, Folder: at.folder, Pool: &at.pool, Host: at.host, AcceptOlderEpoch: older,
			})
			if err != nil {
				return fmt.Errorf("registering %s: %w", args[0], err)
			}
			return c.finish(ctx, task, waiting{title: "registering " + args[0], done: args[0] + " is in the inventory."})
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "name in the inventory (default: the VM's own)")
	cmd.Flags().StringVar(&host, "host", "", "host that runs it (default: center chooses)")
	cmd.Flags().BoolVar(&older, "accept-older", false, "the folder was restored from a backup: take it, although center knew a newer one")
	return cmd
}

func vmUnregister(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "unregister VM",
		Short: "Take a VM out of the inventory; its files stay",
		Long: `Takes a VM that is off out of the inventory. Its files stay where they are, encrypted as
they are; its keys leave its host's memory and stay at the key provider. mortise vm
register brings it back.

JSON: {"vm"}.`,
		Example: `  mortise vm unregister web1`,
		Args:    needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			vm, err := c.find(ctx, kindVM, args[0])
			if err != nil {
				return err
			}
			if _, err := methods.UnregisterVM(ctx, c.vim, &types.UnregisterVM{This: vm}); err != nil {
				return fmt.Errorf("unregistering %s: %w", args[0], err)
			}
			return c.sayOrJSON(vmRef{vm.Value}, "%s is out of the inventory. Its files and its keys at the key provider stay.", args[0])
		}),
	}
}

func vmDelete(g *globals) *cobra.Command {
	var detach, yes bool
	cmd := &cobra.Command{
		Use:   "delete VM",
		Short: "Delete a VM with its files",
		Long: `Deletes a VM that is off, with its disks. This cannot be undone. Its keys leave its
host's memory but stay at the key provider, so that a backup of it can still be opened.

JSON: the task as of mortise task watch.`,
		Example: `  mortise vm delete web1
  mortise vm delete web1 --yes`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			if !yes {
				if err := c.confirm(fmt.Sprintf("Delete %s and its disks for good?", args[0]), "--yes"); err != nil {
					return err
				}
			}
			return c.vmTask(ctx, args[0], "deleting", "%s is deleted. Its keys stay at the key provider.", detach, func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
				res, err := methods.Destroy_Task(ctx, c.vim, &types.Destroy_Task{This: vm})
				return result(res, err, func(r *types.Destroy_TaskResponse) types.ManagedObjectReference { return r.Returnval })
			})
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return detachFlag(cmd, &detach)
}

// A placement is where something new goes.
type placement struct {
	folder, pool types.ManagedObjectReference
	host         *types.ManagedObjectReference // nil: center chooses
}

// placement finds the VM folder and the pool; host may be empty.
func (c *client) placement(ctx context.Context, host string) (p placement, err error) {
	dcRef, err := c.first(ctx, kindDatacenter)
	if err != nil {
		return p, err
	}
	var dc mo.Datacenter
	if err := c.properties(ctx, dcRef, []string{"vmFolder"}, &dc); err != nil {
		return p, err
	}
	p.folder = dc.VmFolder
	clusterRef, err := c.first(ctx, kindCluster)
	if err != nil {
		return p, err
	}
	var cluster mo.ClusterComputeResource
	if err := c.properties(ctx, clusterRef, []string{"resourcePool"}, &cluster); err != nil {
		return p, err
	}
	if cluster.ResourcePool == nil {
		return p, fmt.Errorf("center shows no resource pool of %s: may you see it?", clusterRef.Value)
	}
	p.pool = *cluster.ResourcePool
	if host != "" {
		ref, err := c.find(ctx, kindHost, host)
		if err != nil {
			return p, err
		}
		p.host = &ref
	}
	return p, nil
}
