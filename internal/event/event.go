// Package event keeps what happened: a bounded, persisted list of events that
// an administrator reads, each also a line in the log.
//
// Place in the flow: center posts, the vSphere API and the CLI read. No event
// holds a key or a password. It imports inventory (for ids) and store.
package event

import (
	"time"

	"mortise/internal/inventory"
)

// Severity of an event, by its vSphere name.
type Severity string

// Severities.
const (
	Info    Severity = "info"
	Warning Severity = "warning"
	Error   Severity = "error"
)

// Event is one thing that happened.
type Event struct {
	ID       int64             `json:"id"` // rises by one with each event
	Time     time.Time         `json:"time"`
	Type     string            `json:"type"` // such as VMLocked
	Severity Severity          `json:"severity"`
	Message  string            `json:"message"`
	User     string            `json:"user,omitempty"`
	Entity   inventory.Ref     `json:"entity,omitempty"` // what it is about
	Task     inventory.Ref     `json:"task,omitempty"`
	Keys     []inventory.KeyID `json:"keys,omitempty"`
}

// Type ids: vSphere's where it has one, otherwise our own under com.mortise.
const (
	KeyGenerated      = "com.mortise.crypto.KeyGenerated"
	DatastoreAdded    = "com.mortise.datastore.Added"
	KeyGenerateFail   = "com.vmware.vc.kms.crypto.KeyGenerateFail"
	KMSUnreachable    = "com.vmware.vc.kms.crypto.Unreachable"
	SendKeyError      = "com.vmware.vc.kms.crypto.SendKeyError"
	VMLockedHost      = "com.vmware.vc.vm.Crypto.VMLocked.KeyMissingOnHost"
	VMLockedKMS       = "com.vmware.vc.vm.Crypto.VMLocked.KeyMissingOnKMS"
	VMLockedCluster   = "com.vmware.vc.vm.Crypto.VMLocked.KMSClusterError"
	VMUnlocked        = "com.vmware.vc.vm.Crypto.VMUnlocked"
	RekeyFail         = "com.vmware.vc.vm.crypto.RekeyFail"
	NoDiskSpace       = "com.vmware.vc.vm.crypto.NoDiskSpace"
	HostCryptoEnabled = "com.vmware.vc.host.Crypto.Enabled"
	KeyPushed         = "com.mortise.crypto.KeyPushed"
	KeyRemoved        = "com.mortise.crypto.KeyRemoved"
	KeyOrphaned       = "com.mortise.crypto.KeyOrphaned"
	KeyNotOurs        = "com.mortise.crypto.KeyNotOurs"
	HostJoined        = "com.mortise.host.Joined"
	HostRemoved       = "com.mortise.host.Removed"
	HostConnected     = "com.mortise.host.Connected"
	HostLost          = "com.mortise.host.ConnectionLost"
	HostRestarted     = "com.mortise.host.Restarted"
	HostAlarm         = "com.mortise.host.Alarm"
	LoginSuccess      = "vim.event.UserLoginSessionEvent"
	LoginFailure      = "vim.event.BadUsernameSessionEvent"
	PasswordReset     = "com.mortise.user.PasswordReset"
	JoinTokenCreated  = "com.mortise.host.JoinTokenCreated"
	ProviderChanged   = "com.mortise.kms.ProviderChanged"
	PolicyChanged     = "com.mortise.policy.Changed"
	VMCreated         = "vim.event.VmCreatedEvent"
	VMRegistered      = "vim.event.VmRegisteredEvent"
	VMReconfigured    = "vim.event.VmReconfiguredEvent"
	VMRemoved         = "vim.event.VmRemovedEvent"
	VMPoweredOn       = "vim.event.VmPoweredOnEvent"
	VMPoweredOff      = "vim.event.VmPoweredOffEvent"
	VMReset           = "vim.event.VmResettingEvent"
	VMGuestShutdown   = "vim.event.VmGuestShutdownEvent"
	VMSnapshotCreated = "com.mortise.vm.SnapshotCreated"
	VMSnapshotRenamed = "com.mortise.vm.SnapshotRenamed"
	VMSnapshotRemoved = "com.mortise.vm.SnapshotRemoved"
	VMReverted        = "com.vmware.vc.vm.VmStateRevertedToSnapshot"
	VMConsolidated    = "com.mortise.vm.DisksConsolidated"
	VMUnconsolidated  = "com.mortise.vm.ConsolidationNeeded"
	VMDiskImported    = "com.mortise.vm.DiskImported"
	VMConsole         = "com.mortise.vm.ConsoleOpened"
)
