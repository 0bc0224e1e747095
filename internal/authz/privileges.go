package authz

import "slices"

// Privilege ids that center checks, by their vSphere names.
const (
	Anonymous = "System.Anonymous"
	View      = "System.View"
	Read      = "System.Read"

	CryptoAccess                 = "Cryptographer.Access"
	CryptoAddDisk                = "Cryptographer.AddDisk"
	CryptoClone                  = "Cryptographer.Clone"
	CryptoDecrypt                = "Cryptographer.Decrypt"
	CryptoEncrypt                = "Cryptographer.Encrypt"
	CryptoEncryptNew             = "Cryptographer.EncryptNew"
	CryptoManageEncryptionPolicy = "Cryptographer.ManageEncryptionPolicy"
	CryptoManageKeys             = "Cryptographer.ManageKeys"
	CryptoManageKeyServers       = "Cryptographer.ManageKeyServers"
	CryptoMigrate                = "Cryptographer.Migrate"
	CryptoReadKeyServersInfo     = "Cryptographer.ReadKeyServersInfo"
	CryptoRecrypt                = "Cryptographer.Recrypt"
	CryptoRegisterHost           = "Cryptographer.RegisterHost"
	CryptoRegisterVM             = "Cryptographer.RegisterVM"

	VMCreate          = "VirtualMachine.Inventory.Create"
	VMCreateExisting  = "VirtualMachine.Inventory.CreateFromExisting"
	VMRegister        = "VirtualMachine.Inventory.Register"
	VMDelete          = "VirtualMachine.Inventory.Delete"
	VMUnregister      = "VirtualMachine.Inventory.Unregister"
	VMPowerOn         = "VirtualMachine.Interact.PowerOn"
	VMPowerOff        = "VirtualMachine.Interact.PowerOff"
	VMReset           = "VirtualMachine.Interact.Reset"
	VMConsole         = "VirtualMachine.Interact.ConsoleInteract"
	VMGuestControl    = "VirtualMachine.Interact.GuestControl"
	VMRename          = "VirtualMachine.Config.Rename"
	VMAddNewDisk      = "VirtualMachine.Config.AddNewDisk"
	VMAddExistingDisk = "VirtualMachine.Config.AddExistingDisk"
	VMRemoveDisk      = "VirtualMachine.Config.RemoveDisk"
	VMCPUCount        = "VirtualMachine.Config.CPUCount"
	VMMemory          = "VirtualMachine.Config.Memory"
	VMEditDevice      = "VirtualMachine.Config.EditDevice"
	VMSettings        = "VirtualMachine.Config.Settings"
	VMAnnotation      = "VirtualMachine.Config.Annotation"
	VMDiskRandom      = "VirtualMachine.Provisioning.DiskRandomAccess"
	VMSnapshotCreate  = "VirtualMachine.State.CreateSnapshot"
	VMSnapshotRevert  = "VirtualMachine.State.RevertToSnapshot"
	VMSnapshotRemove  = "VirtualMachine.State.RemoveSnapshot"
	VMSnapshotRename  = "VirtualMachine.State.RenameSnapshot"

	DatastoreAllocate = "Datastore.AllocateSpace"
	DatastoreBrowse   = "Datastore.Browse"
	NetworkAssign     = "Network.Assign"
	ResourceAssignVM  = "Resource.AssignVMToPool"

	HostAddToCluster     = "Host.Inventory.AddHostToCluster"
	HostAddStandalone    = "Host.Inventory.AddStandaloneHost"
	HostRemove           = "Host.Inventory.RemoveHostFromCluster"
	HostManageUserGroups = "Host.Local.ManageUserGroups"
	HostTpmRead          = "Host.Tpm.Read"
	HostTpmUnseal        = "Host.Tpm.Unseal"

	GlobalDiagnostics = "Global.Diagnostics"
	GlobalCancelTask  = "Global.CancelTask"
	GlobalLogEvent    = "Global.LogEvent"

	ProfileUpdate = "StorageProfile.Update"
	ProfileView   = "StorageProfile.View"

	AuthModifyPermissions = "Authorization.ModifyPermissions"
	AuthModifyRoles       = "Authorization.ModifyRoles"
	SessionsTerminate     = "Sessions.TerminateSession"
)

// Cryptographer lists the 14 privileges of P1.
func Cryptographer() []string {
	return []string{
		CryptoAccess, CryptoAddDisk, CryptoClone, CryptoDecrypt, CryptoEncrypt, CryptoEncryptNew, CryptoManageEncryptionPolicy,
		CryptoManageKeys, CryptoManageKeyServers, CryptoMigrate, CryptoReadKeyServersInfo, CryptoRecrypt, CryptoRegisterHost, CryptoRegisterVM,
	}
}

// Privileges lists every privilege id, sorted.
func Privileges() []string {
	all := append(Cryptographer(),
		Anonymous, View, Read,
		VMCreate, VMCreateExisting, VMRegister, VMDelete, VMUnregister,
		VMPowerOn, VMPowerOff, VMReset, VMConsole, VMGuestControl,
		VMRename, VMAddNewDisk, VMAddExistingDisk, VMRemoveDisk, VMCPUCount, VMMemory, VMEditDevice, VMSettings, VMAnnotation, VMDiskRandom,
		VMSnapshotCreate, VMSnapshotRevert, VMSnapshotRemove, VMSnapshotRename,
		DatastoreAllocate, DatastoreBrowse, NetworkAssign, ResourceAssignVM,
		HostAddToCluster, HostAddStandalone, HostRemove, HostManageUserGroups, HostTpmRead, HostTpmUnseal,
		GlobalDiagnostics, GlobalCancelTask, GlobalLogEvent,
		ProfileUpdate, ProfileView,
		AuthModifyPermissions, AuthModifyRoles, SessionsTerminate,
	)
	slices.Sort(all)
	return all
}

// Built-in roles, by their vSphere ids.
const (
	RoleAdmin         int32 = -1
	RoleReadOnly      int32 = -2
	RoleView          int32 = -3
	RoleAnonymous     int32 = -4
	RoleNoAccess      int32 = -5
	RoleNoCryptoAdmin int32 = -6
)

// BuiltinRoles returns the roles that every center has and nobody can change
// (P2).
func BuiltinRoles() []Role {
	all := Privileges()
	// No Cryptography Administrator lacks the cryptographic privileges and the
	// few that would go round them.
	without := append(Cryptographer(), GlobalDiagnostics, HostAddToCluster, HostAddStandalone, HostManageUserGroups,
		VMGuestControl, HostTpmRead, HostTpmUnseal)
	noCrypto := slices.DeleteFunc(slices.Clone(all), func(p string) bool { return slices.Contains(without, p) })
	return []Role{
		{ID: RoleAdmin, Name: "Admin", Label: "Administrator", Privileges: all},
		{ID: RoleReadOnly, Name: "ReadOnly", Label: "Read-only", Privileges: []string{Anonymous, Read, View}},
		{ID: RoleView, Name: "View", Label: "View", Privileges: []string{Anonymous, View}},
		{ID: RoleAnonymous, Name: "Anonymous", Label: "Anonymous", Privileges: []string{Anonymous}},
		{ID: RoleNoAccess, Name: "NoAccess", Label: "No access"},
		{ID: RoleNoCryptoAdmin, Name: "NoCryptoAdmin", Label: "No cryptography administrator", Privileges: noCrypto},
	}
}
