package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// A conversion is what encrypt, decrypt and recrypt ask for.
type conversion struct {
	crypto   types.BaseCryptoSpec
	policy   string   // id of the storage policy to apply; empty: as it is
	disks    []string // only these, by device key or place; empty: all
	homeOnly bool     // only the VM's files
}

// parts are the flags that say what of a VM is meant (rule E6).
type parts struct {
	disks    []string
	homeOnly bool
	detach   bool
	estimate bool
}

func (p *parts) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringSliceVar(&p.disks, "disk", nil, "only this disk, as mortise vm info names it, e.g. scsi0:0; once for each")
	f.BoolVar(&p.homeOnly, "vm-files-only", false, "only the VM's files, no disk")
	f.BoolVar(&p.estimate, "estimate", false, "only say what would be rewritten, and how long that takes")
	cmd.MarkFlagsMutuallyExclusive("disk", "vm-files-only")
	detachFlag(cmd, &p.detach)
}

// keyFlags name a key, or the provider that makes a new one.
type keyFlags struct{ provider, key string }

func (k *keyFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&k.provider, "provider", "", "key provider (default: center's)")
	f.StringVar(&k.key, "key", "", "id of an existing key of the provider (default: a new key)")
}

// id checks the flags and makes the key id; an empty key means a new one.
func (k *keyFlags) id(ctx context.Context, c *client) (types.CryptoKeyId, error) {
	id := types.CryptoKeyId{KeyId: k.key}
	if k.provider == "" {
		if k.key != "" {
			return id, fmt.Errorf("--key: name the key's --provider too")
		}
		return id, nil
	}
	if _, err := c.provider(ctx, k.provider); err != nil {
		return id, err
	}
	id.ProviderId = &types.KeyProviderId{Id: k.provider}
	return id, nil
}

// samplePolicy is the name of the bundled policy that encrypts.
const samplePolicy = "VM Encryption Policy"

func vmEncrypt(g *globals) *cobra.Command {
	var p parts
	var k keyFlags
	policy := samplePolicy
	cmd := &cobra.Command{
		Use:   "encrypt VM",
		Short: "Encrypt a VM in place",
		Long: `Encrypts a VM's files and disks in place, by a storage policy. center gets a new key
from the key provider and gives it to the VM's host, which makes a key of its own for
each disk and wraps it with that one. Wrapped keys and the key's id are written beside
the disks; keys in clear are in the host's memory only.

The content is rewritten once: what will be rewritten is told before, and --estimate
tries how long that takes. It survives kills and power cuts of any machine. mortise task
cancel has it run back: the VM is as it was. mortise task pause, resume and limit hold it
back. A VM that runs can be encrypted, unless it has EFI firmware, whose variables are
open then.

What was in clear on the datastore before, and in its snapshots and backups, is not
undone: storage may keep old blocks. Import or create an encrypted VM to avoid that.

JSON: the task as of mortise task watch; with --estimate {"bytes", "seconds",
"secondsBeside" (at most, beside a guest that is never idle), "disks": [{"disk", "kind",
"bytes", "rate", "seconds", "secondsBeside"}]}.`,
		Example: `  mortise vm encrypt web1
  mortise vm encrypt web1 --policy Payroll --provider kms2 --detach
  mortise vm encrypt web1 --estimate
  mortise vm encrypt web1 --disk scsi0:1`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			pol, err := c.encryptionPolicy(ctx, policy)
			if err != nil {
				return err
			}
			id, err := k.id(ctx, c)
			if err != nil {
				return err
			}
			return c.convert(ctx, args[0], "encrypting", "%s is encrypted.", p, conversion{
				crypto: &types.CryptoSpecEncrypt{CryptoKeyId: id}, policy: pol.ID, disks: p.disks, homeOnly: p.homeOnly,
			})
		}),
	}
	cmd.Flags().StringVar(&policy, "policy", samplePolicy, "storage policy that encrypts")
	k.bind(cmd)
	p.bind(cmd)
	return cmd
}

func vmDecrypt(g *globals) *cobra.Command {
	var p parts
	cmd := &cobra.Command{
		Use:   "decrypt VM",
		Short: "Decrypt a VM in place",
		Long: `Decrypts a VM's disks and files in place: from then on the datastore holds the guest's
data in clear, as plain VMDK that other tools open. The VM's files cannot be decrypted
while a disk stays encrypted. The key stays at the key provider, for backups.

JSON: the task as of mortise task watch; with --estimate {"bytes", "seconds",
"secondsBeside" (at most, beside a guest that is never idle), "disks": [{"disk", "kind",
"bytes", "rate", "seconds", "secondsBeside"}]}.`,
		Example: `  mortise vm decrypt web1
  mortise vm decrypt web1 --disk scsi0:1`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			pol, err := c.plainPolicy(ctx)
			if err != nil {
				return err
			}
			return c.convert(ctx, args[0], "decrypting", "%s is in clear.", p, conversion{
				crypto: &types.CryptoSpecDecrypt{}, policy: pol.ID, disks: p.disks, homeOnly: p.homeOnly,
			})
		}),
	}
	p.bind(cmd)
	return cmd
}

func vmRecrypt(g *globals) *cobra.Command {
	var p parts
	var k keyFlags
	var deep bool
	cmd := &cobra.Command{
		Use:   "recrypt VM",
		Short: "Give a VM a new key",
		Long: `Without --deep (shallow): a new key from the key provider wraps the disk keys that are
there. Only descriptors are rewritten, in moments, while the VM runs. Do it when the key
may be known to others, to rotate keys, or to move to another provider.

With --deep: each disk gets a new key of its own too, and its content is rewritten. Do it
when a disk's own key may be known, such as after a host was broken into.

If it stops half-way, old and new key together still open the VM, and running it again
finishes. The old key stays at the key provider: backups may need it.

JSON: the task as of mortise task watch; with --estimate {"bytes", "seconds",
"secondsBeside" (at most, beside a guest that is never idle), "disks": [{"disk", "kind",
"bytes", "rate", "seconds", "secondsBeside"}]}.`,
		Example: `  mortise vm recrypt web1
  mortise vm recrypt web1 --provider kms2
  mortise vm recrypt web1 --deep`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			id, err := k.id(ctx, c)
			if err != nil {
				return err
			}
			conv := conversion{crypto: &types.CryptoSpecShallowRecrypt{NewKeyId: id}, disks: p.disks, homeOnly: p.homeOnly}
			if deep {
				conv.crypto = &types.CryptoSpecDeepRecrypt{NewKeyId: id}
			}
			return c.convert(ctx, args[0], "recrypting", "%s has a new key.", p, conv)
		}),
	}
	cmd.Flags().BoolVar(&deep, "deep", false, "new disk keys too; rewrites the content")
	k.bind(cmd)
	p.bind(cmd)
	return cmd
}

// convert asks for a conversion, says what it will rewrite, and waits for it.
func (c *client) convert(ctx context.Context, name, doing, done string, p parts, conv conversion) error {
	ref, err := c.find(ctx, kindVM, name)
	if err != nil {
		return err
	}
	var vm mo.VirtualMachine
	if err := c.properties(ctx, ref, []string{"config"}, &vm); err != nil {
		return err
	}
	if vm.Config == nil {
		return fmt.Errorf("%s: center shows no configuration of it: may you see it?", name)
	}
	if err := conv.onlyPlain(vm.Config); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	spec, chosen, err := conv.spec(vm.Config.Hardware.Device)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if p.estimate {
		return c.estimateOnly(ctx, ref, doing+" "+name, *spec)
	}
	if _, shallow := conv.crypto.(*types.CryptoSpecShallowRecrypt); !shallow && len(chosen) > 0 {
		if err := c.estimate(ctx, ref, doing+" "+name, chosen); err != nil {
			return err
		}
	}
	res, err := methods.ReconfigVM_Task(ctx, c.vim, &types.ReconfigVM_Task{This: ref, Spec: *spec})
	if err != nil {
		return fmt.Errorf("%s %s: %w", doing, name, err)
	}
	return c.finish(ctx, res.Returnval, waiting{title: doing + " " + name, detach: p.detach, done: fmt.Sprintf(done, name)})
}

// estimate says what a conversion will rewrite, before it begins (rule E7).
func (c *client) estimate(ctx context.Context, vm types.ManagedObjectReference, title string, chosen []*types.VirtualDisk) error {
	details, err := c.ext.VMDetail(ctx, false, vm)
	if err != nil {
		return fmt.Errorf("%s: reading its disks: %w", title, err)
	}
	var data, capacity int64
	for _, d := range chosen {
		capacity += d.CapacityInBytes
		for _, v := range details {
			for _, disk := range v.Disks {
				if disk.Key == d.Key {
					data += disk.AllocatedBytes
				}
			}
		}
	}
	disks := "1 disk"
	if len(chosen) > 1 {
		disks = fmt.Sprintf("%d disks", len(chosen))
	}
	fmt.Fprintf(c.err, "%s rewrites %s: %s of data, of %s.\n", clean(title), disks, size(data), size(capacity))
	return nil
}

// estimateJSON is an estimate in JSON.
type estimateJSON struct {
	Bytes         int64              `json:"bytes"`         // to rewrite
	Seconds       float64            `json:"seconds"`       // beside an idle guest, or none
	SecondsBeside float64            `json:"secondsBeside"` // at most, beside a guest that is never idle
	Disks         []diskEstimateJSON `json:"disks"`
}

type diskEstimateJSON struct {
	Disk          string  `json:"disk"`
	Kind          string  `json:"kind"`
	Bytes         int64   `json:"bytes"`
	Rate          int64   `json:"rate"` // bytes a second, by a trial
	Seconds       float64 `json:"seconds"`
	SecondsBeside float64 `json:"secondsBeside"`
}

// estimateOnly has the host try what a conversion takes, and says it (rule E7).
func (c *client) estimateOnly(ctx context.Context, vm types.ManagedObjectReference, title string, spec types.VirtualMachineConfigSpec) error {
	e, err := c.ext.EstimateReconfigVM(ctx, vm, spec)
	if err != nil {
		return fmt.Errorf("%s: %w", title, err)
	}
	out := estimateJSON{Bytes: e.Bytes, Seconds: e.IdleSeconds, SecondsBeside: e.BusySeconds, Disks: []diskEstimateJSON{}}
	for _, d := range e.Disks {
		out.Disks = append(out.Disks, diskEstimateJSON{d.Controller, d.Kind, d.Bytes, d.BytesPerSecond, d.IdleSeconds, d.BusySeconds})
	}
	if c.json {
		return c.printJSON(out)
	}
	if len(out.Disks) == 0 {
		c.say("%s rewrites no disk's content: it takes moments.", title)
		return nil
	}
	within := func(seconds float64) string { return short(time.Duration(seconds * float64(time.Second))) }
	t := newTable(c.out, "DISK", "WHAT", "DATA", "RATE", "TIME, IDLE", "BESIDE A BUSY GUEST")
	for _, d := range out.Disks {
		t.row(d.Disk, d.Kind, size(d.Bytes), size(d.Rate)+"/s", within(d.Seconds), "up to "+within(d.SecondsBeside))
	}
	if err := t.flush(); err != nil {
		return err
	}
	c.say("%s rewrites %s in about %s, or up to %s beside a guest that is never idle. Nothing was changed.", title, size(out.Bytes), within(out.Seconds), within(out.SecondsBeside))
	return nil
}

// onlyPlain narrows the encryption of a whole VM to what is still in clear, when
// its files are encrypted already.
func (conv *conversion) onlyPlain(vm *types.VirtualMachineConfigInfo) error {
	_, encrypt := conv.crypto.(*types.CryptoSpecEncrypt)
	if !encrypt || vm.KeyId == nil || len(conv.disks) > 0 {
		return nil
	}
	if !conv.homeOnly {
		for _, d := range disksOf(vm.Hardware.Device) {
			if diskKey(d) == nil {
				conv.disks = append(conv.disks, diskName(d))
			}
		}
	}
	if len(conv.disks) == 0 {
		return errors.New("it is encrypted already; mortise vm recrypt gives it a new key")
	}
	return nil
}

// spec words a conversion as vSphere's ConfigSpec, and lists the disks that are
// meant. A crypto spec of the VM is inherited by its disks unless they have one
// of their own.
func (conv *conversion) spec(devices []types.BaseVirtualDevice) (*types.VirtualMachineConfigSpec, []*types.VirtualDisk, error) {
	spec := &types.VirtualMachineConfigSpec{}
	profile := func() []types.BaseVirtualMachineProfileSpec {
		if conv.policy == "" {
			return nil
		}
		return []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineDefinedProfileSpec{ProfileId: conv.policy}}
	}
	edit := func(d *types.VirtualDisk, crypto types.BaseCryptoSpec, profile []types.BaseVirtualMachineProfileSpec) {
		spec.DeviceChange = append(spec.DeviceChange, &types.VirtualDeviceConfigSpec{
			Operation: types.VirtualDeviceConfigSpecOperationEdit, Device: d, Profile: profile,
			Backing: &types.VirtualDeviceConfigSpecBackingSpec{Crypto: crypto},
		})
	}
	disks := disksOf(devices)
	if len(conv.disks) == 0 {
		spec.Crypto, spec.VmProfile = conv.crypto, profile()
		if !conv.homeOnly {
			return spec, disks, nil
		}
		for _, d := range disks {
			edit(d, &types.CryptoSpecNoOp{}, nil)
		}
		return spec, nil, nil
	}
	var chosen []*types.VirtualDisk
	for _, want := range conv.disks {
		i := slices.IndexFunc(disks, func(d *types.VirtualDisk) bool { return diskIs(d, want) })
		if i < 0 {
			return nil, nil, fmt.Errorf("it has no disk %q, but %s", want, orNone(diskNames(disks)))
		}
		if slices.Contains(chosen, disks[i]) {
			return nil, nil, fmt.Errorf("--disk %s: the disk is named twice", want)
		}
		chosen = append(chosen, disks[i])
		edit(disks[i], conv.crypto, profile())
	}
	return spec, chosen, nil
}

func disksOf(devices []types.BaseVirtualDevice) []*types.VirtualDisk {
	var disks []*types.VirtualDisk
	for _, d := range devices {
		if disk, ok := d.(*types.VirtualDisk); ok {
			disks = append(disks, disk)
		}
	}
	return disks
}

// diskPlace is where a disk is attached.
func diskPlace(d *types.VirtualDisk) (place, bool) {
	if d.UnitNumber == nil {
		return place{}, false
	}
	for bus, first := range map[string]int32{"scsi": keySCSI, "sata": keySATA, "nvme": keyNVMe} {
		if n := d.ControllerKey - first; n >= 0 && n < 4 {
			return place{bus, n, *d.UnitNumber}, true
		}
	}
	return place{}, false
}

// diskName is how verbs call a disk: by its place, or its device key.
func diskName(d *types.VirtualDisk) string {
	if p, ok := diskPlace(d); ok {
		return p.String()
	}
	return fmt.Sprint(d.Key)
}

func diskNames(disks []*types.VirtualDisk) []string {
	var names []string
	for _, d := range disks {
		names = append(names, diskName(d))
	}
	return names
}

func diskIs(d *types.VirtualDisk, name string) bool {
	return strings.EqualFold(diskName(d), name) || fmt.Sprint(d.Key) == name
}
