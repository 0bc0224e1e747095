// Package vimext is what Mortise's vSphere API has beyond vSphere: the managed
// object MortiseManager and two data paths over HTTP, as SOAP types and as a
// client.
//
// Place in the flow: package vimapi serves it, the CLI calls it. It imports
// govmomi and a WebSocket library, nothing of Mortise, so that a program outside
// can use it as well.
package vimext

import (
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// Namespace of the SOAP methods here, "urn:mortise" on the wire.
const Namespace = "mortise"

// ManagerType is the managed object type, and the id, of the only object.
const ManagerType = "MortiseManager"

// Manager is the reference to MortiseManager.
func Manager() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: ManagerType, Value: ManagerType}
}

// VMDetail is what there is to know of a VM's encryption.
type VMDetail struct {
	VM            types.ManagedObjectReference  `xml:"vm"`
	Name          string                        `xml:"name"`
	Host          *types.ManagedObjectReference `xml:"host,omitempty"`
	HostName      string                        `xml:"hostName,omitempty"`
	Path          string                        `xml:"path"` // "[ds] web1/web1.vmx"
	Power         string                        `xml:"power"`
	PausedOnError bool                          `xml:"pausedOnError"` // the guest waits for its disk
	Problem       string                        `xml:"problem,omitempty"`
	Home          CryptoDetail                  `xml:"home"` // the VM files
	Disks         []DiskDetail                  `xml:"disk,omitempty"`
	CryptoState   string                        `xml:"cryptoState,omitempty"` // "unlocked", "locked"; empty when in clear
	LockedReason  string                        `xml:"lockedReason,omitempty"`

	MigrateEncryption string              `xml:"migrateEncryption"`
	MissingKeys       []types.CryptoKeyId `xml:"missingKey,omitempty"` // on its host
}

// CryptoDetail is how VM files or a disk are encrypted.
type CryptoDetail struct {
	Encrypted  bool               `xml:"encrypted"`
	Provider   string             `xml:"provider,omitempty"`
	KeyID      string             `xml:"keyId,omitempty"`
	KeyState   string             `xml:"keyState,omitempty"` // KMIP's: "Active", …; empty when unknown
	KeyProblem string             `xml:"keyProblem,omitempty"`
	Epoch      int64              `xml:"epoch,omitempty"`
	PolicyID   string             `xml:"policyId,omitempty"`
	PolicyName string             `xml:"policyName,omitempty"`
	Converting *ConversionDetail  `xml:"converting,omitempty"`
	Target     *types.CryptoKeyId `xml:"target,omitempty"` // the KEK that a conversion leads to
}

// ConversionDetail is a conversion under way.
type ConversionDetail struct {
	Kind          string `xml:"kind"` // "encrypt", "decrypt", "deep recrypt", "shallow recrypt"
	BoundaryBytes int64  `xml:"boundaryBytes"`
}

// DiskDetail is one disk.
type DiskDetail struct {
	Key            int32        `xml:"key"` // vSphere device key, 2000…
	UUID           string       `xml:"uuid"`
	Controller     string       `xml:"controller"` // "scsi0:0"
	Path           string       `xml:"path"`       // "[ds] web1/web1.vmdk"
	CapacityBytes  int64        `xml:"capacityBytes"`
	AllocatedBytes int64        `xml:"allocatedBytes"`
	Thick          bool         `xml:"thick,omitempty"` // all of its space is allocated, and stays so
	Cipher         string       `xml:"cipher,omitempty"`
	Crypto         CryptoDetail `xml:"crypto"`
	Problem        string       `xml:"problem,omitempty"`
}

// TaskDetail is what TaskInfo has no place for before API 8.0.1.
type TaskDetail struct {
	Task       types.ManagedObjectReference `xml:"task"`
	Name       string                       `xml:"name"` // "VirtualMachine.reconfigure"
	State      string                       `xml:"state"`
	Stage      string                       `xml:"stage,omitempty"`
	Progress   int32                        `xml:"progress"` // percent
	DoneBytes  int64                        `xml:"doneBytes"`
	TotalBytes int64                        `xml:"totalBytes"`
	Rate       int64                        `xml:"bytesPerSecond,omitempty"` // lately; 0: not known
	Left       int64                        `xml:"secondsLeft,omitempty"`    // at that rate
	Paceable   bool                         `xml:"paceable"`                 // it can be paused and held back
	Paused     bool                         `xml:"paused"`
	Limit      int64                        `xml:"limitBytesPerSecond,omitempty"` // 0: none
	Undoing    bool                         `xml:"undoing"`                       // cancelled: what it did is taken back
	Started    *time.Time                   `xml:"started,omitempty"`
	Finished   *time.Time                   `xml:"finished,omitempty"`
	Cancelable bool                         `xml:"cancelable"`
	Cancelled  bool                         `xml:"cancelled"`
	Error      string                       `xml:"error,omitempty"`
}

// Estimate is what a change of a VM would rewrite.
type Estimate struct {
	Bytes       int64          `xml:"bytes"`       // of data, on all disks
	IdleSeconds float64        `xml:"idleSeconds"` // beside an idle guest, or none
	BusySeconds float64        `xml:"busySeconds"` // at most, beside a guest that is never idle
	Disks       []DiskEstimate `xml:"disk,omitempty"`
}

// DiskEstimate is one disk's part of an Estimate.
type DiskEstimate struct {
	Key            int32   `xml:"key"`
	Controller     string  `xml:"controller"`
	Kind           string  `xml:"kind"` // "encrypt", "decrypt", "deep recrypt"
	Bytes          int64   `xml:"bytes"`
	BytesPerSecond int64   `xml:"bytesPerSecond"` // by a trial; 0 without data
	IdleSeconds    float64 `xml:"idleSeconds"`
	BusySeconds    float64 `xml:"busySeconds"`
}

// HostDetail is what there is to know of a host.
type HostDetail struct {
	Host           types.ManagedObjectReference `xml:"host"`
	Name           string                       `xml:"name"`
	Address        string                       `xml:"address"`
	Connection     string                       `xml:"connection"` // "connected", "disconnected", "notResponding"
	CryptoState    string                       `xml:"cryptoState"`
	CryptoReasons  []string                     `xml:"cryptoReason,omitempty"` // why it is incapable
	Version        string                       `xml:"version"`
	Hypervisor     string                       `xml:"hypervisor"`
	KVM            bool                         `xml:"kvm"`
	AES            bool                         `xml:"aes"`
	XTS            string                       `xml:"xts"`
	CertThumbprint string                       `xml:"certThumbprint"`
	HostKey        *types.CryptoKeyId           `xml:"hostKey,omitempty"`
	VMs            int32                        `xml:"vms"`
	Datastores     []string                     `xml:"datastore,omitempty"`
	Networks       []string                     `xml:"network,omitempty"`
	Problem        string                       `xml:"problem,omitempty"`
}

// PolicyDetail is a storage policy.
type PolicyDetail struct {
	ID          string `xml:"id"`
	Name        string `xml:"name"`
	Description string `xml:"description,omitempty"`
	Encrypts    bool   `xml:"encrypts"`
	Bundled     bool   `xml:"bundled"` // can only be cloned
}

// KeyDetail answers who needs a key.
type KeyDetail struct {
	Key       types.CryptoKeyId              `xml:"key"`
	State     string                         `xml:"state,omitempty"` // KMIP's; empty when unknown
	Available bool                           `xml:"available"`
	Reason    string                         `xml:"reason,omitempty"` // vSphere's word
	Message   string                         `xml:"message,omitempty"`
	VMs       []types.ManagedObjectReference `xml:"vm,omitempty"`
	Hosts     []types.ManagedObjectReference `xml:"host,omitempty"`
}
