package inventory

import "time"

// Folder holds records of the kinds that ChildKinds names.
type Folder struct {
	Entity
	ChildKinds []Kind `json:"childKinds"`
}

// Datacenter is the namespace of VM, datastore and network names.
type Datacenter struct {
	Entity
	VMFolder        Ref `json:"vmFolder"`
	HostFolder      Ref `json:"hostFolder"`
	DatastoreFolder Ref `json:"datastoreFolder"`
	NetworkFolder   Ref `json:"networkFolder"`
}

// Cluster crypto modes.
const (
	CryptoOnDemand    = "onDemand"
	CryptoForceEnable = "forceEnable"
)

// Cluster is a group of hosts.
type Cluster struct {
	Entity
	ResourcePool Ref    `json:"resourcePool"`
	CryptoMode   string `json:"cryptoMode"`
}

// ResourcePool is a cluster's root resource pool: where new VMs are placed.
type ResourcePool struct {
	Entity
	Owner Ref `json:"owner"` // the cluster
}

// Connection states of a host.
const (
	Connected     = "connected"
	Disconnected  = "disconnected" // by command
	NotResponding = "notResponding"
)

// Host crypto states (H1).
const (
	HostIncapable = "incapable"
	HostPrepared  = "prepared"
	HostSafe      = "safe"
)

// Host is a hypervisor host. Parent is its cluster.
type Host struct {
	Entity
	UUID           string    `json:"uuid"`
	Address        string    `json:"address"` // host:port of its Host service
	Info           HostInfo  `json:"info"`
	Connection     string    `json:"connection"`
	CryptoState    string    `json:"cryptoState"`
	CryptoReasons  []string  `json:"cryptoReasons,omitempty"` // why it is incapable
	HostKey        *KeyID    `json:"hostKey,omitempty"`
	Datastores     []Ref     `json:"datastores,omitempty"`
	Networks       []Ref     `json:"networks,omitempty"`
	CertThumbprint string    `json:"certThumbprint"`       // SHA-256, hex, of its certificate
	Problem        string    `json:"problem,omitempty"`    // why it does not answer, or why keys could not be pushed
	RemoveKeys     []KeyUse  `json:"removeKeys,omitempty"` // to wipe from its cache when it is back (K9)
	JoinedAt       time.Time `json:"joinedAt"`
}

// KeyUse is one VM's use of a key.
type KeyUse struct {
	Key    KeyID  `json:"key"`
	VMUUID string `json:"vm"`
}

// HostInfo is what a host says of itself.
type HostInfo struct {
	Version     string    `json:"version"`
	Hypervisor  string    `json:"hypervisor"`
	OS          string    `json:"os"`
	CPUModel    string    `json:"cpuModel"`
	CPUCores    int32     `json:"cpuCores"`
	CPUMHz      int64     `json:"cpuMHz"`
	MemoryBytes int64     `json:"memoryBytes"`
	KVM         bool      `json:"kvm"`
	AES         bool      `json:"aes"` // hardware AES (E10)
	XTS         string    `json:"xts"` // the implementation in use
	BootTime    time.Time `json:"bootTime"`
}

// Datastore is a folder that one or more hosts mount.
type Datastore struct {
	Entity
	UUID       string           `json:"uuid"` // of its marker file
	Type       string           `json:"type"` // "ext4", "nfs4", …
	Mounts     []DatastoreMount `json:"mounts,omitempty"`
	Capacity   int64            `json:"capacity"` // bytes
	Free       int64            `json:"free"`     // bytes
	Accessible bool             `json:"accessible"`
}

// DatastoreMount is one host's view of a datastore.
type DatastoreMount struct {
	Host    Ref    `json:"host"`
	Name    string `json:"name"` // on that host
	Path    string `json:"path"`
	Problem string `json:"problem,omitempty"`
}

// Hosts lists the hosts that mount d.
func (d *Datastore) Hosts() []Ref {
	refs := make([]Ref, 0, len(d.Mounts))
	for _, m := range d.Mounts {
		refs = append(refs, m.Host)
	}
	return refs
}

// Network is a libvirt network that one or more hosts have, by name.
type Network struct {
	Entity
	Hosts []Ref `json:"hosts,omitempty"`
}

// PowerState of a VM, by its vSphere name.
type PowerState string

// Power states.
const (
	PoweredOff PowerState = "poweredOff"
	PoweredOn  PowerState = "poweredOn"
	Suspended  PowerState = "suspended"
)

// VM crypto states.
const (
	Unlocked = "unlocked"
	Locked   = "locked" // its configuration key is not on its host (K6)
)

// Settings of MigrateEncryption (V2).
const (
	MigrateDisabled      = "disabled"
	MigrateOpportunistic = "opportunistic"
	MigrateRequired      = "required"
)

// VM is a virtual machine. Encrypted, KeyID and Epoch, here and in each disk,
// are center's word on whether the VM is encrypted (E8): a folder that says
// less is refused by the host.
type VM struct {
	Entity
	Host      Ref    `json:"host"`
	Pool      Ref    `json:"pool"`
	Datastore Ref    `json:"datastore"`
	Path      string `json:"path"` // of the VMX in the datastore: "web1/web1.vmx"

	UUID         string    `json:"uuid"` // uuid.bios
	InstanceUUID string    `json:"instanceUuid"`
	Hardware     Hardware  `json:"hardware"`
	Disks        []Disk    `json:"disks,omitempty"`
	SizeBytes    int64     `json:"sizeBytes"`
	CreatedAt    time.Time `json:"createdAt"`

	Power         PowerState `json:"power"`
	BootTime      time.Time  `json:"bootTime,omitzero"`
	PausedOnError bool       `json:"pausedOnError,omitempty"` // the guest waits for its disk
	Problem       string     `json:"problem,omitempty"`
	MissingKeys   []KeyID    `json:"missingKeys,omitempty"` // as its host last said

	Encrypted    bool        `json:"encrypted"` // VM files
	KeyID        *KeyID      `json:"keyId,omitempty"`
	Epoch        uint64      `json:"epoch,omitempty"`
	Converting   *Conversion `json:"converting,omitempty"`  // of the VM files
	CryptoState  string      `json:"cryptoState,omitempty"` // of an encrypted VM: Unlocked or Locked
	LockedReason string      `json:"lockedReason,omitempty"`
	Profile      ProfileID   `json:"profile,omitempty"` // of the VM files

	MigrateEncryption string `json:"migrateEncryption"`
	Orphaned          bool   `json:"orphaned,omitempty"` // its host was removed

	Snapshots           []Snapshot `json:"snapshots,omitempty"`           // parents before their children
	CurrentSnapshot     int32      `json:"currentSnapshot,omitempty"`     // that the disks stand on; 0: none
	ConsolidationNeeded bool       `json:"consolidationNeeded,omitempty"` // disks have links that no snapshot needs
	SnapshotsChanging   bool       `json:"snapshotsChanging,omitempty"`   // a change has perhaps reached the host: the three above may be of before it
}

// Hardware of a VM.
type Hardware struct {
	MemoryMiB  int64  `json:"memoryMiB"`
	CPUs       int32  `json:"cpus"`
	Firmware   string `json:"firmware"` // "bios", "efi"
	GuestOS    string `json:"guestOS"`  // VMware's guest id
	NICs       []NIC  `json:"nics,omitempty"`
	Annotation string `json:"annotation,omitempty"`
}

// NIC is a network card.
type NIC struct {
	Key     int32  `json:"key"`     // vSphere device key, 4000…
	Network string `json:"network"` // name
	MAC     string `json:"mac"`
	Model   string `json:"model"`
}

// Disk is a virtual disk of a VM.
type Disk struct {
	UUID           string      `json:"uuid"`
	Key            int32       `json:"key"`        // vSphere device key, 2000…
	Controller     string      `json:"controller"` // "scsi0:0"
	Path           string      `json:"path"`       // of the descriptor in the datastore
	CapacityBytes  int64       `json:"capacityBytes"`
	AllocatedBytes int64       `json:"allocatedBytes"`
	Thick          bool        `json:"thick,omitempty"` // all of its space is allocated, and stays so
	Encrypted      bool        `json:"encrypted"`
	KeyID          *KeyID      `json:"keyId,omitempty"`
	Epoch          uint64      `json:"epoch,omitempty"`
	Cipher         string      `json:"cipher,omitempty"`
	Converting     *Conversion `json:"converting,omitempty"`
	Profile        ProfileID   `json:"profile,omitempty"`
	Problem        string      `json:"problem,omitempty"`
}

// Conversion kinds.
const (
	ConvertEncrypt = "encrypt"
	ConvertDecrypt = "decrypt"
	ConvertDeep    = "deep recrypt"
	ConvertShallow = "shallow recrypt"
	// A disk that is being added to or removed from its VM: it may be there or not.
	DiskAdding   = "add"
	DiskRemoving = "remove"
)

// Conversion is recorded before a conversion begins and cleared after its
// result is stored: between the two either form is right.
type Conversion struct {
	Kind          string `json:"kind"`
	BoundaryBytes int64  `json:"boundaryBytes,omitempty"` // as last reported
	Target        *KeyID `json:"target,omitempty"`        // the new KEK; nil when decrypting
}

// Keys lists every KEK that vm needs or is being moved to, each once, the VM
// files' first.
func (vm *VM) Keys() []KeyID {
	var all []KeyID
	add := func(k *KeyID) {
		if k == nil {
			return
		}
		for _, have := range all {
			if have == *k {
				return
			}
		}
		all = append(all, *k)
	}
	add(vm.KeyID)
	if vm.Converting != nil {
		add(vm.Converting.Target)
	}
	for i := range vm.Disks {
		add(vm.Disks[i].KeyID)
		if c := vm.Disks[i].Converting; c != nil {
			add(c.Target)
		}
	}
	return all
}

// AnyEncrypted tells whether VM files or a disk are encrypted, or about to be.
func (vm *VM) AnyEncrypted() bool { return vm.Encrypted || len(vm.Keys()) > 0 }

// Disk finds a disk by device key; nil when there is none.
func (vm *VM) Disk(key int32) *Disk {
	for i := range vm.Disks {
		if vm.Disks[i].Key == key {
			return &vm.Disks[i]
		}
	}
	return nil
}
