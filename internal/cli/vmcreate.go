package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// newVMFlags are the flags of what makes a VM.
type newVMFlags struct {
	policy, provider, key string
	memory                string
	cpus                  int32
	firmware, guest       string
	networks              []string
	host, datastore       string
	annotation            string
}

func (n *newVMFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&n.policy, "policy", "", "storage policy, by name; one that encrypts, encrypts from the first byte (default: in clear)")
	f.StringVar(&n.provider, "provider", "", "key provider (default: center's)")
	f.StringVar(&n.key, "key", "", "id of an existing key of the provider (default: a new key)")
	f.StringVar(&n.memory, "memory", "", "memory, e.g. 2G; a bare number is MiB (default 1G)")
	f.Int32Var(&n.cpus, "cpus", 0, "virtual CPUs (default 1)")
	f.StringVar(&n.firmware, "firmware", "", "bios or efi (default bios)")
	f.StringVar(&n.guest, "guest", "", "guest system, by vSphere's id, e.g. debian12_64Guest")
	f.StringSliceVar(&n.networks, "network", nil, `network, once for each card; "none" for no card (default: "default", where there is one)`)
	f.StringVar(&n.host, "host", "", "host that runs it (default: center chooses)")
	f.StringVar(&n.datastore, "datastore", "", "datastore (default: the roomiest)")
	f.StringVar(&n.annotation, "annotation", "", "a note about the VM")
}

// A machine is a VM that is to be made.
type machine struct {
	name, guest, firmware, annotation string
	uuid                              uuid.UUID // zero: center makes one
	memoryMiB                         int64     // 0: center's default
	cpus                              int32     // 0: center's default
	nics                              []machineNIC
	disks                             []machineDisk
}

type machineNIC struct {
	network, mac, model string // mac "": center makes one
}

type machineDisk struct {
	place    place
	capacity int64 // bytes
	thick    bool
}

// A place is where a disk is attached: "scsi0:1".
type place struct {
	bus       string // scsi, sata, nvme
	busNumber int32
	unit      int32
}

func (p place) String() string { return fmt.Sprintf("%s%d:%d", p.bus, p.busNumber, p.unit) }

// nextPlace is the place of the n-th disk of a VM that says nothing of places;
// unit 7 of a SCSI bus is the controller's own.
func nextPlace(n int) place {
	bus, unit := n/15, n%15
	if unit >= 7 {
		unit++
	}
	return place{"scsi", int32(bus), int32(unit)}
}

// apply lets flags change what a source says of a machine.
func (n *newVMFlags) apply(m *machine) error {
	if n.memory != "" {
		b, err := parseSize(n.memory, 1<<20)
		if err != nil {
			return fmt.Errorf("--memory: %w", err)
		}
		if b%(1<<20) != 0 {
			return fmt.Errorf("--memory %s: memory comes in whole MiB", n.memory)
		}
		m.memoryMiB = b >> 20
	}
	if n.cpus < 0 {
		return errors.New("--cpus: a VM has at least one")
	}
	if n.cpus > 0 {
		m.cpus = n.cpus
	}
	switch n.firmware {
	case "":
	case "bios", "efi":
		m.firmware = n.firmware
	default:
		return fmt.Errorf("--firmware %q: want bios or efi", n.firmware)
	}
	if n.guest != "" {
		m.guest = n.guest
	}
	if n.annotation != "" {
		m.annotation = n.annotation
	}
	if n.policy == "" && (n.provider != "" || n.key != "") {
		return errors.New("--provider and --key are about encryption: give --policy too, one that encrypts")
	}
	if n.key != "" && n.provider == "" {
		return errors.New("--key: name the key's --provider too")
	}
	return nil
}

// connectCards gives a machine's cards the networks of the flags: the first card
// the first network and so on. Cards beyond them keep theirs; more networks make
// more cards. A machine without cards gets one in the network "default", if
// center has it.
func (n *newVMFlags) connectCards(ctx context.Context, c *client, m *machine) error {
	if len(n.networks) == 1 && n.networks[0] == "none" {
		m.nics = nil
		return nil
	}
	var known []mo.Network
	if err := c.retrieve(ctx, kindNetwork, []string{"name"}, &known); err != nil {
		return err
	}
	exists := map[string]bool{}
	var names []string
	for _, k := range known {
		exists[k.Name] = true
		names = append(names, k.Name)
	}
	for i, network := range n.networks {
		if !exists[network] {
			return fmt.Errorf("--network %q: there is no such network; there is %s", network, orNone(names))
		}
		if i == len(m.nics) {
			m.nics = append(m.nics, machineNIC{})
		}
		m.nics[i].network = network
	}
	if len(m.nics) == 0 && exists["default"] {
		m.nics = []machineNIC{{network: "default"}}
	}
	for i := range m.nics {
		card := &m.nics[i]
		if exists[card.network] {
			continue
		}
		if !exists["default"] || card.network != "" {
			return fmt.Errorf("network card %d was in network %q, which is not here: give --network for each of its %d cards; there is %s", i+1, card.network, len(m.nics), orNone(names))
		}
		card.network = "default"
	}
	return nil
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// create has center make the VM and returns the task.
func (c *client) create(ctx context.Context, m *machine, n *newVMFlags) (types.ManagedObjectReference, error) {
	var none types.ManagedObjectReference
	if err := n.connectCards(ctx, c, m); err != nil {
		return none, err
	}
	spec := m.spec()
	if n.policy != "" {
		p, err := c.policy(ctx, n.policy)
		if err != nil {
			return none, err
		}
		spec.VmProfile = []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineDefinedProfileSpec{ProfileId: p.ID}}
		if n.provider != "" {
			if !p.Encrypts {
				return none, fmt.Errorf("--provider: storage policy %q does not encrypt", p.Name)
			}
			if _, err := c.provider(ctx, n.provider); err != nil {
				return none, err
			}
			spec.Crypto = &types.CryptoSpecEncrypt{CryptoKeyId: types.CryptoKeyId{KeyId: n.key, ProviderId: &types.KeyProviderId{Id: n.provider}}}
		}
	}
	at, err := c.placement(ctx, n.host)
	if err != nil {
		return none, err
	}
	if n.datastore != "" {
		if _, err := c.find(ctx, kindDatastore, n.datastore); err != nil {
			return none, fmt.Errorf("--datastore: %w", err)
		}
		spec.Files = &types.VirtualMachineFileInfo{VmPathName: "[" + n.datastore + "]"}
	}
	res, err := methods.CreateVM_Task(ctx, c.vim, &types.CreateVM_Task{This: at.folder, Config: spec, Pool: at.pool, Host: at.host})
	if err != nil {
		return none, fmt.Errorf("creating %s: %w", m.name, err)
	}
	return res.Returnval, nil
}

// Keys of new devices: those that vSphere gives them.
const (
	keySCSI = 1000
	keySATA = 15000
	keyNVMe = 31000
)

// spec words a machine as vSphere's ConfigSpec.
func (m *machine) spec() types.VirtualMachineConfigSpec {
	spec := types.VirtualMachineConfigSpec{
		Name: m.name, GuestId: m.guest, Firmware: m.firmware, Annotation: m.annotation, MemoryMB: m.memoryMiB, NumCPUs: m.cpus,
		Files: &types.VirtualMachineFileInfo{},
	}
	if m.uuid != uuid.Nil {
		spec.Uuid = m.uuid.String()
	}
	add := func(d types.BaseVirtualDevice, op types.VirtualDeviceConfigSpecFileOperation) {
		spec.DeviceChange = append(spec.DeviceChange, &types.VirtualDeviceConfigSpec{
			Operation: types.VirtualDeviceConfigSpecOperationAdd, FileOperation: op, Device: d,
		})
	}
	have := map[int32]bool{}
	for i, d := range m.disks {
		key, controller := d.place.controller()
		if !have[key] {
			have[key] = true
			add(controller, "")
		}
		add(&types.VirtualDisk{
			VirtualDevice: types.VirtualDevice{
				Key: -int32(i + 1), ControllerKey: key, UnitNumber: &d.place.unit,
				Backing: &types.VirtualDiskFlatVer2BackingInfo{DiskMode: string(types.VirtualDiskModePersistent), ThinProvisioned: types.NewBool(!d.thick)},
			},
			CapacityInBytes: d.capacity, CapacityInKB: d.capacity >> 10,
		}, types.VirtualDeviceConfigSpecFileOperationCreate)
	}
	for i, n := range m.nics {
		add(n.device(int32(-100-i)), "")
	}
	return spec
}

// controller makes the disk controller at p.
func (p place) controller() (int32, types.BaseVirtualDevice) {
	base := types.VirtualController{BusNumber: p.busNumber}
	switch p.bus {
	case "sata":
		base.Key = keySATA + p.busNumber
		return base.Key, &types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: base}}
	case "nvme":
		base.Key = keyNVMe + p.busNumber
		return base.Key, &types.VirtualNVMEController{VirtualController: base}
	}
	base.Key = keySCSI + p.busNumber
	return base.Key, &types.ParaVirtualSCSIController{VirtualSCSIController: types.VirtualSCSIController{
		VirtualController: base, SharedBus: types.VirtualSCSISharingNoSharing,
	}}
}

func (n machineNIC) device(key int32) types.BaseVirtualDevice {
	card := types.VirtualEthernetCard{
		VirtualDevice: types.VirtualDevice{Key: key, Backing: &types.VirtualEthernetCardNetworkBackingInfo{
			VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: n.network},
		}},
		AddressType: string(types.VirtualEthernetCardMacTypeGenerated),
	}
	if n.mac != "" {
		card.AddressType, card.MacAddress = string(types.VirtualEthernetCardMacTypeManual), n.mac
	}
	switch n.model {
	case "e1000":
		return &types.VirtualE1000{VirtualEthernetCard: card}
	case "e1000e":
		return &types.VirtualE1000e{VirtualEthernetCard: card}
	case "vlance":
		return &types.VirtualPCNet32{VirtualEthernetCard: card}
	}
	return &types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: card}}
}

func vmCreate(g *globals) *cobra.Command {
	var n newVMFlags
	var disks []string
	var thick, detach bool
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a new VM with empty disks",
		Long: `Makes a VM with empty disks. With a storage policy that encrypts, center gets a new key
from its key provider, the VM's host makes the disk keys and wraps them with it, and
whatever the guest writes is encrypted from the first byte.

JSON: the task as of mortise task watch; "result" is the VM.`,
		Example: `  mortise vm create web1 --disk 20G --memory 2G --cpus 2
  mortise vm create web2 --disk 20G --disk 100G --policy "VM Encryption Policy"`,
		Args: needs("NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			m := machine{name: args[0]}
			for i, d := range disks {
				capacity, err := parseSize(d, 1<<30)
				if err != nil {
					return fmt.Errorf("--disk: %w", err)
				}
				m.disks = append(m.disks, machineDisk{nextPlace(i), capacity, thick})
			}
			if err := n.apply(&m); err != nil {
				return err
			}
			task, err := c.create(ctx, &m, &n)
			if err != nil {
				return err
			}
			return c.finish(ctx, task, waiting{title: "creating " + m.name, detach: detach, done: fmt.Sprintf("%s is there. Next: mortise vm power on %[1]s", m.name)})
		}),
	}
	n.bind(cmd)
	cmd.Flags().StringSliceVar(&disks, "disk", nil, "size of a disk, e.g. 20G; once for each")
	cmd.Flags().BoolVar(&thick, "thick", false, "allocate all of the disks' space now, and keep it allocated (default: thin)")
	return detachFlag(cmd, &detach)
}
