package cli

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/vimapi/vimext"
)

// vmInfoJSON is one VM in full, in JSON.
type vmInfoJSON struct {
	VM                string     `json:"vm"`
	Name              string     `json:"name"`
	UUID              string     `json:"uuid,omitempty"`
	Power             string     `json:"power"`
	PausedOnError     bool       `json:"pausedOnError"`
	Problem           string     `json:"problem,omitempty"`
	Host              string     `json:"host,omitempty"`
	Path              string     `json:"path"`
	MemoryBytes       int64      `json:"memoryBytes,omitempty"`
	CPUs              int32      `json:"cpus,omitempty"`
	Firmware          string     `json:"firmware,omitempty"`
	Guest             string     `json:"guest,omitempty"`
	Annotation        string     `json:"annotation,omitempty"`
	Networks          []nicJSON  `json:"networks"`
	CryptoState       string     `json:"cryptoState,omitempty"`
	LockedReason      string     `json:"lockedReason,omitempty"`
	MissingKeys       []keyRef   `json:"missingKeys"`
	MigrateEncryption string     `json:"migrateEncryption"`
	Snapshots         int        `json:"snapshots"`
	CurrentSnapshot   string     `json:"currentSnapshot,omitempty"`
	NeedsMerge        bool       `json:"consolidationNeeded"`
	Files             cryptoJSON `json:"files"`
	Disks             []diskJSON `json:"disks"`
}

type nicJSON struct {
	Network string `json:"network"`
	MAC     string `json:"mac"`
}

// cryptoJSON is how VM files or a disk are encrypted.
type cryptoJSON struct {
	Encrypted  bool            `json:"encrypted"`
	Policy     string          `json:"policy,omitempty"`
	Provider   string          `json:"provider,omitempty"`
	Key        string          `json:"key,omitempty"`
	KeyState   string          `json:"keyState,omitempty"`
	KeyProblem string          `json:"keyProblem,omitempty"`
	Epoch      int64           `json:"epoch,omitempty"`
	Converting *convertingJSON `json:"converting,omitempty"`
}

type convertingJSON struct {
	Kind          string  `json:"kind"`
	BoundaryBytes int64   `json:"boundaryBytes"`
	Target        *keyRef `json:"target,omitempty"`
}

type diskJSON struct {
	Disk           string     `json:"disk"`
	DeviceKey      int32      `json:"deviceKey"`
	UUID           string     `json:"uuid"`
	Path           string     `json:"path"`
	CapacityBytes  int64      `json:"capacityBytes"`
	AllocatedBytes int64      `json:"allocatedBytes"`
	Thick          bool       `json:"thick"`
	Cipher         string     `json:"cipher,omitempty"`
	Problem        string     `json:"problem,omitempty"`
	Crypto         cryptoJSON `json:"crypto"`
}

func vmInfo(g *globals) *cobra.Command {
	var noKeyState bool
	cmd := &cobra.Command{
		Use:   "info VM",
		Short: "Show a VM: its policy, keys and disks",
		Long: `Shows a VM: hardware, storage policy, key provider, key id and key state, and the same
for each disk, with the conversion that is under way. Key states are KMIP's: only an
Active key encrypts. The states are asked of the key provider; --no-key-state does not.

A key id is no secret: without the provider's consent nobody gets the key.

JSON: {"vm" (reference), "name", "uuid", "power", "pausedOnError", "problem", "host",
"path", "memoryBytes", "cpus", "firmware", "guest", "annotation", "networks": [{"network",
"mac"}], "cryptoState" (unlocked, locked; none in clear), "lockedReason", "missingKeys":
[{"provider", "key"}], "migrateEncryption", "snapshots" (how many), "currentSnapshot"
(its name), "consolidationNeeded", "files": CRYPTO, "disks": [{"disk", "deviceKey",
"uuid", "path", "capacityBytes", "allocatedBytes", "thick", "cipher", "problem",
"crypto": CRYPTO}]}, where CRYPTO is {"encrypted", "policy", "provider", "key",
"keyState", "keyProblem", "epoch", "converting": {"kind", "boundaryBytes", "target"}}.`,
		Example: `  mortise vm info web1
  mortise vm info web1 --json | jq -r .files.key`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			info, err := c.vmInfo(ctx, args[0], !noKeyState)
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(info)
			}
			return c.printInfo(info)
		}),
	}
	cmd.Flags().BoolVar(&noKeyState, "no-key-state", false, "do not ask the key provider")
	return cmd
}

func (c *client) vmInfo(ctx context.Context, name string, keyState bool) (*vmInfoJSON, error) {
	ref, err := c.find(ctx, kindVM, name)
	if err != nil {
		return nil, err
	}
	details, err := c.ext.VMDetail(ctx, keyState, ref)
	if err == nil && len(details) != 1 {
		err = fmt.Errorf("center answered with %d VMs", len(details))
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	d := details[0]
	info := &vmInfoJSON{
		VM: d.VM.Value, Name: d.Name, Power: d.Power, PausedOnError: d.PausedOnError, Problem: d.Problem, Host: d.HostName, Path: d.Path,
		CryptoState: d.CryptoState, LockedReason: d.LockedReason, MigrateEncryption: d.MigrateEncryption, Files: newCryptoJSON(&d.Home),
		MissingKeys: []keyRef{}, Networks: []nicJSON{}, Disks: []diskJSON{},
	}
	for _, k := range d.MissingKeys {
		info.MissingKeys = append(info.MissingKeys, *newKeyRef(&k))
	}
	for i := range d.Disks {
		disk := &d.Disks[i]
		info.Disks = append(info.Disks, diskJSON{
			Disk: cmp.Or(disk.Controller, fmt.Sprint(disk.Key)), DeviceKey: disk.Key, UUID: disk.UUID, Path: disk.Path, CapacityBytes: disk.CapacityBytes,
			AllocatedBytes: disk.AllocatedBytes, Thick: disk.Thick, Cipher: disk.Cipher, Problem: disk.Problem, Crypto: newCryptoJSON(&disk.Crypto),
		})
	}
	return info, c.addHardware(ctx, ref, info)
}

// addHardware fills in what vSphere's own properties tell.
func (c *client) addHardware(ctx context.Context, ref types.ManagedObjectReference, info *vmInfoJSON) error {
	var vm mo.VirtualMachine
	if err := c.properties(ctx, ref, []string{"config", "snapshot", "runtime.consolidationNeeded"}, &vm); err != nil {
		return err
	}
	info.NeedsMerge = vm.Runtime.ConsolidationNeeded
	if vm.Snapshot != nil {
		var list snapshotsJSON
		list.add(vm.Snapshot, vm.Snapshot.RootSnapshotList, 0, 0)
		info.Snapshots = len(list.Snapshots)
		for _, s := range list.Snapshots {
			if s.Current {
				info.CurrentSnapshot = s.Name
			}
		}
	}
	if vm.Config == nil {
		return nil
	}
	conf := vm.Config
	info.UUID, info.Firmware, info.Guest, info.Annotation = conf.Uuid, conf.Firmware, conf.GuestId, conf.Annotation
	info.MemoryBytes, info.CPUs = int64(conf.Hardware.MemoryMB)<<20, conf.Hardware.NumCPU
	for _, d := range conf.Hardware.Device {
		card, ok := d.(types.BaseVirtualEthernetCard)
		if !ok {
			continue
		}
		n := nicJSON{MAC: card.GetVirtualEthernetCard().MacAddress}
		if b, ok := card.GetVirtualEthernetCard().Backing.(*types.VirtualEthernetCardNetworkBackingInfo); ok {
			n.Network = b.DeviceName
		}
		info.Networks = append(info.Networks, n)
	}
	return nil
}

func newCryptoJSON(d *vimext.CryptoDetail) cryptoJSON {
	j := cryptoJSON{
		Encrypted: d.Encrypted, Policy: cmp.Or(d.PolicyName, d.PolicyID), Provider: d.Provider, Key: d.KeyID,
		KeyState: d.KeyState, KeyProblem: d.KeyProblem, Epoch: d.Epoch,
	}
	if d.Converting != nil {
		j.Converting = &convertingJSON{Kind: d.Converting.Kind, BoundaryBytes: d.Converting.BoundaryBytes, Target: newKeyRef(d.Target)}
	}
	return j
}

func (c *client) printInfo(i *vmInfoJSON) error {
	line := func(label, format string, args ...any) {
		if text := clean(fmt.Sprintf(format, args...)); text != "" {
			fmt.Fprintf(c.out, "%-12s%s\n", label, text)
		}
	}
	line("VM", "%s  (%s)", i.Name, i.VM)
	line("power", "%s", powerWord(i.Power))
	if i.PausedOnError {
		line("PAUSED", "the guest waits, because one of its disks failed")
	}
	line("PROBLEM", "%s", i.Problem)
	line("host", "%s", i.Host)
	line("path", "%s", i.Path)
	line("uuid", "%s", i.UUID)
	line("hardware", "%d CPUs, %s memory, %s, %s", i.CPUs, size(i.MemoryBytes), i.Firmware, i.Guest)
	for _, n := range i.Networks {
		line("network", "%s  %s", n.Network, n.MAC)
	}
	line("note", "%s", i.Annotation)
	if i.CryptoState == string(types.VirtualMachineCryptoStateLocked) {
		line("LOCKED", "%s", cmp.Or(i.LockedReason, "its configuration key is not on its host"))
	}
	for _, k := range i.MissingKeys {
		line("missing key", "%s is not on the VM's host", k.String())
	}
	line("encrypted", "%s", i.Files.text())
	for _, l := range i.Files.lines(0) {
		line(l[0], "%s", l[1])
	}
	line("vMotion", "encryption %s", i.MigrateEncryption)
	if i.Snapshots > 0 {
		line("snapshots", "%d, current %s", i.Snapshots, cmp.Or(i.CurrentSnapshot, "none"))
	}
	if i.NeedsMerge {
		line("CONSOLIDATE", "disks have links that no snapshot needs: mortise vm snapshot consolidate %s", i.Name)
	}
	for _, d := range i.Disks {
		fmt.Fprintln(c.out)
		line("disk", "%s  (key %d)", d.Disk, d.DeviceKey)
		thick := ""
		if d.Thick {
			thick = ", thick"
		}
		line("  size", "%s, %s allocated%s", size(d.CapacityBytes), size(d.AllocatedBytes), thick)
		line("  path", "%s", d.Path)
		line("  PROBLEM", "%s", d.Problem)
		text := d.Crypto.text()
		if d.Cipher != "" {
			text += ", " + d.Cipher
		}
		line("  encrypted", "%s", text)
		for _, l := range d.Crypto.lines(d.CapacityBytes) {
			line("  "+l[0], "%s", l[1])
		}
	}
	return nil
}

func (j *cryptoJSON) text() string {
	if !j.Encrypted {
		return "no"
	}
	return "yes"
}

// lines are the facts of an encryption, label and text.
func (j *cryptoJSON) lines(capacity int64) (lines [][2]string) {
	add := func(label, text string) {
		if text != "" {
			lines = append(lines, [2]string{label, text})
		}
	}
	add("policy", j.Policy)
	add("provider", j.Provider)
	if j.Key != "" {
		add("key id", j.Key)
		add("key state", strings.Join(nonEmpty(cmp.Or(j.KeyState, "unknown"), j.KeyProblem), ": "))
	}
	if j.Epoch > 0 {
		add("epoch", fmt.Sprint(j.Epoch))
	}
	if v := j.Converting; v != nil {
		text := v.Kind
		if capacity > 0 && v.BoundaryBytes > 0 {
			text += fmt.Sprintf(", %.0f%% done", 100*float64(v.BoundaryBytes)/float64(capacity))
		}
		if v.Target != nil {
			text += ", to key " + v.Target.String()
		}
		add("CONVERTING", text)
	}
	return lines
}

func nonEmpty(texts ...string) (list []string) {
	for _, t := range texts {
		if t != "" {
			list = append(list, t)
		}
	}
	return list
}
