package center

import (
	"io"
	"time"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// Shorter names for what every signature of this package mentions.
type (
	Ref       = inventory.Ref
	KeyID     = inventory.KeyID
	Principal = authz.Principal
	Session   = authz.Session
	Fault     = task.Fault
	Policy    = policy.Policy
	Event     = event.Event
)

// CryptoKind is what a CryptoSpec asks for.
type CryptoKind string

// The kinds of CryptoSpec. CryptoNone is an absent spec: what a profile implies
// holds. CryptoNoOp is an explicit "leave it", which also stops inheritance by a
// disk from its VM. CryptoRegister sends keys and changes nothing.
const (
	CryptoNone     CryptoKind = ""
	CryptoNoOp     CryptoKind = "noop"
	CryptoEncrypt  CryptoKind = "encrypt"
	CryptoDecrypt  CryptoKind = "decrypt"
	CryptoShallow  CryptoKind = "shallow"
	CryptoDeep     CryptoKind = "deep"
	CryptoRegister CryptoKind = "register"
)

// CryptoSpec asks for encryption, decryption or recryption. An empty Key.Key
// means a new KEK; an empty Key.Provider the default provider of the VM (K5).
type CryptoSpec struct {
	Kind CryptoKind `json:"kind,omitempty"`
	Key  KeyID      `json:"key,omitzero"`
	Keys []KeyID    `json:"keys,omitempty"` // of CryptoRegister
}

// HardwareSpec changes hardware; zero fields leave what there is. NICs that is
// nil leaves the cards alone, an empty list removes them all.
type HardwareSpec struct {
	MemoryMiB  int64           `json:"memoryMiB,omitempty"`
	CPUs       int32           `json:"cpus,omitempty"`
	Firmware   string          `json:"firmware,omitempty"`
	GuestOS    string          `json:"guestOS,omitempty"`
	NICs       []inventory.NIC `json:"nics,omitempty"`
	Annotation string          `json:"annotation,omitempty"`
}

// NewDiskSpec is a disk of a VM that is being created. With neither Crypto nor
// Profile it follows the VM (E6).
type NewDiskSpec struct {
	CapacityBytes int64      `json:"capacityBytes"`
	Controller    string     `json:"controller,omitempty"` // "scsi0:0"; empty: the next free place
	Thick         bool       `json:"thick,omitempty"`      // all of its space is allocated, and stays so
	Profile       policy.ID  `json:"profile,omitempty"`
	Crypto        CryptoSpec `json:"crypto,omitzero"`
}

// CreateVMSpec describes a new VM.
type CreateVMSpec struct {
	Name       string        `json:"name"`
	Folder     Ref           `json:"folder"`              // empty: the datacenter's VM folder
	Host       Ref           `json:"host,omitempty"`      // empty: center chooses
	Pool       Ref           `json:"pool,omitempty"`      // empty: the host's
	Datastore  string        `json:"datastore,omitempty"` // name; empty: the roomiest
	Path       string        `json:"path,omitempty"`      // "[ds] web1/web1.vmx", "[ds]" or empty: made from the name
	UUID       string        `json:"uuid,omitempty"`
	Hardware   HardwareSpec  `json:"hardware"`
	Disks      []NewDiskSpec `json:"disks,omitempty"`
	Profile    policy.ID     `json:"profile,omitempty"`
	Crypto     CryptoSpec    `json:"crypto,omitzero"`
	Annotation string        `json:"annotation,omitempty"`

	MigrateEncryption string `json:"migrateEncryption,omitempty"`
}

// RegisterVMSpec brings a VM's folder into the inventory.
type RegisterVMSpec struct {
	Path   string `json:"path"`           // "[ds] a/a.vmx"
	Name   string `json:"name,omitempty"` // empty: the VMX's displayName
	Folder Ref    `json:"folder"`
	Host   Ref    `json:"host,omitempty"`
	Pool   Ref    `json:"pool,omitempty"`
	// AcceptOlderEpoch admits a folder that was restored from a backup older
	// than what the inventory last knew of it.
	AcceptOlderEpoch bool `json:"acceptOlderEpoch,omitempty"`
}

// DiskOp is what a DiskChange does.
type DiskOp string

// The disk operations.
const (
	DiskEdit   DiskOp = "edit"
	DiskAdd    DiskOp = "add"    // a new disk, or with Path an existing one
	DiskRemove DiskOp = "remove" // with Destroy its files too
)

// DiskChange changes one disk. Key names the disk of an edit or a removal.
type DiskChange struct {
	Op            DiskOp     `json:"op"`
	Key           int32      `json:"key,omitempty"`
	CapacityBytes int64      `json:"capacityBytes,omitempty"`
	Controller    string     `json:"controller,omitempty"`
	Thick         bool       `json:"thick,omitempty"` // of a new disk
	Path          string     `json:"path,omitempty"`  // "[ds] a/a.vmdk", of an existing disk to attach
	Destroy       bool       `json:"destroy,omitempty"`
	Profile       *policy.ID `json:"profile,omitempty"`
	Crypto        CryptoSpec `json:"crypto,omitzero"`
}

// ReconfigureSpec changes a VM; zero fields leave what there is.
type ReconfigureSpec struct {
	Name              string       `json:"name,omitempty"`
	Hardware          HardwareSpec `json:"hardware,omitzero"`
	Crypto            CryptoSpec   `json:"crypto,omitzero"`
	Profile           *policy.ID   `json:"profile,omitempty"` // of the VM files; disks without a change of their own follow
	Disks             []DiskChange `json:"disks,omitempty"`
	MigrateEncryption string       `json:"migrateEncryption,omitempty"`
}

// KmipServer is one KMS server of a provider.
type KmipServer struct {
	Name     string `json:"name"`
	Address  string `json:"address"`
	Port     int32  `json:"port"` // 0: 5696
	Protocol string `json:"protocol,omitempty"`
	User     string `json:"user,omitempty"`

	ProxyAddress string `json:"proxyAddress,omitempty"`
	ProxyPort    int32  `json:"proxyPort,omitempty"`
	Timeout      int32  `json:"timeout,omitempty"` // seconds
	NBIO         int32  `json:"nbio,omitempty"`
}

// ProviderInfo is a key provider as it is configured.
type ProviderInfo struct {
	ID                   string
	Kind                 string // "vCenter": a standard provider, by vSphere's managementType
	Default              bool   // globally
	DefaultFor           []Ref
	Servers              []KmipServer
	ClientCertThumbprint string // SHA-256, upper-case hex with colons; empty: none yet
	ClientCertNotAfter   time.Time
	TrustedThumbprints   []string
}

// ServerStatus is how one KMS server does.
type ServerStatus struct {
	Provider    string
	Server      string
	State       string // "green", "yellow", "red"
	Connected   bool
	Description string
	// ServerTrusted and ClientTrusted tell which half of the trust is there.
	ServerTrusted, ClientTrusted bool
	ServerThumbprint             string
	ServerCertNotAfter           time.Time
	ClientCertNotAfter           time.Time
}

// KeyInfo answers who needs a key (K12).
type KeyInfo struct {
	ID        KeyID
	State     string // KMIP's: "Active", "Deactivated", …; empty: unknown
	Available bool   // center can fetch it
	Reason    string // when not Available: vSphere's, "KeyStateMissingInKMS", …
	Message   string // the reason in words
	VMs       []Ref
	Hosts     []Ref // that hold it in memory, as far as they answer; and those whose host key it is
}

// DiskStream is the content of a disk that is being imported, in rising order
// of offset. What it skips reads as zeros. Next ends with io.EOF.
type DiskStream interface {
	Next() (offset int64, data []byte, err error)
}

// Console is a VM's serial console.
type Console = io.ReadWriteCloser
