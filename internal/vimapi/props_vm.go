package vimapi

import (
	"path"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
)

// hardwareVersion is the virtual hardware that VMs are shown to have.
const hardwareVersion = "vmx-19"

func vmProps() map[string]prop {
	return map[string]prop{
		"config":               on((*reader).vmConfig),
		"runtime":              on(func(r *reader, vm *inventory.VM) any { return r.vmRuntime(vm) }),
		"summary":              on((*reader).vmSummary),
		"guest":                on(func(_ *reader, vm *inventory.VM) any { return vmGuest(vm) }),
		"capability":           on(func(*reader, *inventory.VM) any { return vmCapability() }),
		"storage":              on(func(r *reader, vm *inventory.VM) any { return r.vmStorage(vm) }),
		"layoutEx":             on((*reader).vmFiles),
		"resourcePool":         on(func(_ *reader, vm *inventory.VM) any { return reference(vm.Pool) }),
		"datastore":            on(func(r *reader, vm *inventory.VM) any { return r.existing([]inventory.Ref{vm.Datastore}) }),
		"network":              on(func(r *reader, vm *inventory.VM) any { return morefs(r.networksOf(vm)) }),
		"snapshot":             on(func(_ *reader, vm *inventory.VM) any { return vmSnapshots(vm) }),
		"rootSnapshot":         on(func(_ *reader, vm *inventory.VM) any { return snapshotsOn(vm, 0) }),
		"overallStatus":        on(func(r *reader, vm *inventory.VM) any { return r.vmStatus(vm) }),
		"guestHeartbeatStatus": on(func(*reader, *inventory.VM) any { return types.ManagedEntityStatusGray }),
	}
}

// vmCapability says what can be done with VMs: snapshots of disks, without the
// guest's memory and without an agent that brings its file systems to rest.
func vmCapability() types.VirtualMachineCapability {
	return types.VirtualMachineCapability{
		BootOptionsSupported: true, SnapshotOperationsSupported: true, MultipleSnapshotsSupported: true,
		PoweredOffSnapshotsSupported: true, RevertToSnapshotSupported: true,
	}
}

// onDatastore is "[datastore] p", as vSphere writes paths.
func (r *reader) onDatastore(ds inventory.Ref, p string) string {
	name := string(ds)
	if d, ok := inventory.Lookup[inventory.Datastore](r.view, ds); ok {
		name = d.Name
	}
	return "[" + name + "] " + p
}

func (r *reader) vmPath(vm *inventory.VM) string { return r.onDatastore(vm.Datastore, vm.Path) }

func (r *reader) vmStatus(vm *inventory.VM) types.ManagedEntityStatus {
	switch {
	case vm.CryptoState == inventory.Locked, vm.PausedOnError, vm.Orphaned:
		return types.ManagedEntityStatusRed
	case vm.Problem != "":
		return types.ManagedEntityStatusYellow
	}
	for i := range vm.Disks {
		if vm.Disks[i].Problem != "" {
			return types.ManagedEntityStatusYellow
		}
	}
	return types.ManagedEntityStatusGreen
}

func (r *reader) vmConfig(vm *inventory.VM) any {
	folder := r.onDatastore(vm.Datastore, path.Dir(vm.Path)+"/")
	c := &types.VirtualMachineConfigInfo{
		ChangeVersion: vm.CreatedAt.UTC().Format(time.RFC3339), Modified: vm.CreatedAt.UTC(), Name: vm.Name, GuestFullName: guestName(vm),
		Version: hardwareVersion, Uuid: vm.UUID, CreateDate: optionalTime(vm.CreatedAt), InstanceUuid: vm.InstanceUUID, GuestId: guestID(vm),
		AlternateGuestName: "", Annotation: vm.Hardware.Annotation,
		Files: types.VirtualMachineFileInfo{VmPathName: r.vmPath(vm), SnapshotDirectory: folder, SuspendDirectory: folder, LogDirectory: folder},
		Flags: types.VirtualMachineFlagInfo{EnableLogging: ptr(true), DiskUuidEnabled: ptr(true), SnapshotDisabled: ptr(false), SnapshotLocked: ptr(false)},
		DefaultPowerOps: types.VirtualMachineDefaultPowerOpInfo{
			PowerOffType: "soft", SuspendType: "hard", ResetType: "soft", DefaultPowerOffType: "soft", DefaultSuspendType: "hard", DefaultResetType: "soft",
			StandbyAction: "checkpoint",
		},
		Hardware: types.VirtualHardware{
			NumCPU: vm.Hardware.CPUs, NumCoresPerSocket: ptr(int32(1)), MemoryMB: int32(min(vm.Hardware.MemoryMiB, 1<<31-1)), Device: r.devices(vm),
		},
		Firmware: vm.Hardware.Firmware, ExtraConfig: []types.BaseOptionValue{}, KeyId: optionalKeyID(vm.KeyID), MigrateEncryption: vm.MigrateEncryption,
		SwapPlacement: "inherit", MemoryHotAddEnabled: ptr(false), CpuHotAddEnabled: ptr(false), CpuHotRemoveEnabled: ptr(false),
		ChangeTrackingEnabled: ptr(false), BootOptions: &types.VirtualMachineBootOptions{EfiSecureBootEnabled: ptr(false), BootRetryEnabled: ptr(false)},
	}
	if d, ok := inventory.Lookup[inventory.Datastore](r.view, vm.Datastore); ok {
		c.DatastoreUrl = []types.VirtualMachineConfigInfoDatastoreUrlPair{{Name: d.Name, Url: datastoreURL(d)}}
	}
	if c.MigrateEncryption == "" {
		c.MigrateEncryption = inventory.MigrateOpportunistic
	}
	return c
}

// guestID is the guest's id as the API spells it; a VMX has "debian12-64" for
// "debian12_64Guest".
func guestID(vm *inventory.VM) string {
	switch id := vm.Hardware.GuestOS; {
	case id == "":
		return "otherGuest64"
	case strings.HasSuffix(id, "Guest"), strings.HasSuffix(id, "Guest64"):
		return id
	case id == "other-64":
		return "otherGuest64"
	case id == "otherlinux-64":
		return "otherLinux64Guest"
	case strings.HasSuffix(id, "-64"):
		return strings.TrimSuffix(id, "-64") + "_64Guest"
	default:
		return id + "Guest"
	}
}

// guestName is the id in words, for the systems that are common.
func guestName(vm *inventory.VM) string {
	names := map[string]string{
		"otherGuest": "Other (32-bit)", "otherGuest64": "Other (64-bit)", "otherLinux64Guest": "Other Linux (64-bit)",
		"debian11_64Guest": "Debian GNU/Linux 11 (64-bit)", "debian12_64Guest": "Debian GNU/Linux 12 (64-bit)",
		"ubuntu64Guest": "Ubuntu Linux (64-bit)", "rhel8_64Guest": "Red Hat Enterprise Linux 8 (64-bit)", "rhel9_64Guest": "Red Hat Enterprise Linux 9 (64-bit)",
		"windows9_64Guest": "Microsoft Windows 10 (64-bit)", "windows2019srv_64Guest": "Microsoft Windows Server 2019 (64-bit)",
	}
	id := guestID(vm)
	if name, ok := names[id]; ok {
		return name
	}
	return id
}

func (r *reader) vmRuntime(vm *inventory.VM) types.VirtualMachineRuntimeInfo {
	info := types.VirtualMachineRuntimeInfo{
		Host: reference(vm.Host), ConnectionState: types.VirtualMachineConnectionStateConnected, PowerState: powerState(vm.Power),
		// Mandatory: pyVmomi fails at an empty one.
		FaultToleranceState: types.VirtualMachineFaultToleranceStateNotConfigured, RecordReplayState: types.VirtualMachineRecordReplayStateInactive,
		CleanPowerOff: ptr(vm.Power == inventory.PoweredOff), Paused: ptr(vm.PausedOnError), SnapshotInBackground: ptr(false),
		ConsolidationNeeded: vm.ConsolidationNeeded,
	}
	switch h, ok := inventory.Lookup[inventory.Host](r.view, vm.Host); {
	case vm.Orphaned || !ok:
		info.ConnectionState = types.VirtualMachineConnectionStateOrphaned
	case h.Connection != inventory.Connected:
		info.ConnectionState = types.VirtualMachineConnectionStateDisconnected
	}
	if vm.Encrypted {
		info.CryptoState = vm.CryptoState
	}
	if vm.Power == inventory.PoweredOn {
		info.BootTime = optionalTime(vm.BootTime)
		info.MaxMemoryUsage = int32(min(vm.Hardware.MemoryMiB, 1<<31-1))
	}
	return info
}

func (r *reader) vmSummary(vm *inventory.VM) any {
	s := &types.VirtualMachineSummary{
		Vm: reference(vm.Ref), Runtime: r.vmRuntime(vm), OverallStatus: r.vmStatus(vm),
		Guest: &types.VirtualMachineGuestSummary{
			GuestId: guestID(vm), GuestFullName: guestName(vm), ToolsStatus: types.VirtualMachineToolsStatusToolsNotInstalled,
			ToolsVersionStatus: "guestToolsNotInstalled", ToolsVersionStatus2: "guestToolsNotInstalled", ToolsRunningStatus: "guestToolsNotRunning",
		},
		Config: types.VirtualMachineConfigSummary{
			Name: vm.Name, VmPathName: r.vmPath(vm), MemorySizeMB: int32(min(vm.Hardware.MemoryMiB, 1<<31-1)), NumCpu: vm.Hardware.CPUs,
			NumEthernetCards: int32(len(vm.Hardware.NICs)), NumVirtualDisks: int32(len(vm.Disks)), Uuid: vm.UUID, InstanceUuid: vm.InstanceUUID,
			GuestId: guestID(vm), GuestFullName: guestName(vm), Annotation: vm.Hardware.Annotation, InstallBootRequired: ptr(false), HwVersion: hardwareVersion,
		},
		QuickStats: types.VirtualMachineQuickStats{GuestHeartbeatStatus: types.ManagedEntityStatusGray},
	}
	usage := r.usage(vm)
	s.Storage = &types.VirtualMachineStorageSummary{
		Committed: usage.Committed, Uncommitted: usage.Uncommitted, Unshared: usage.Unshared, Timestamp: vm.CreatedAt.UTC(),
	}
	if vm.Power == inventory.PoweredOn && !vm.BootTime.IsZero() {
		s.QuickStats.UptimeSeconds = int32(max(0, min(r.s.clock().Sub(vm.BootTime).Seconds(), 1<<31-1)))
	}
	return s
}

// usage is what a VM takes on its datastore: committed is written, uncommitted
// what thin disks may still grow by.
func (r *reader) usage(vm *inventory.VM) types.VirtualMachineUsageOnDatastore {
	u := types.VirtualMachineUsageOnDatastore{Datastore: moref(vm.Datastore), Committed: vm.SizeBytes}
	var disks int64
	for i := range vm.Disks {
		disks += vm.Disks[i].AllocatedBytes
		u.Uncommitted += max(0, vm.Disks[i].CapacityBytes-vm.Disks[i].AllocatedBytes)
	}
	u.Committed = max(u.Committed, disks)
	u.Unshared = u.Committed
	return u
}

func (r *reader) vmStorage(vm *inventory.VM) *types.VirtualMachineStorageInfo {
	info := &types.VirtualMachineStorageInfo{Timestamp: vm.CreatedAt.UTC()}
	if vm.Datastore != "" {
		info.PerDatastoreUsage = []types.VirtualMachineUsageOnDatastore{r.usage(vm)}
	}
	return info
}

func (r *reader) vmFiles(vm *inventory.VM) any {
	layout := &types.VirtualMachineFileLayoutEx{Timestamp: vm.CreatedAt.UTC()}
	add := func(p, kind string, size int64) int32 {
		key := int32(len(layout.File))
		layout.File = append(layout.File, types.VirtualMachineFileLayoutExFileInfo{
			Key: key, Name: r.onDatastore(vm.Datastore, p), Type: kind, Size: size, UniqueSize: size, Accessible: ptr(true),
		})
		return key
	}
	add(vm.Path, "config", 0)
	for i := range vm.Disks {
		d := &vm.Disks[i]
		key := add(d.Path, "diskDescriptor", 0)
		layout.Disk = append(layout.Disk, types.VirtualMachineFileLayoutExDiskLayout{
			Key: d.Key, Chain: []types.VirtualMachineFileLayoutExDiskUnit{{FileKey: []int32{key}}},
		})
	}
	return layout
}

func vmGuest(vm *inventory.VM) *types.GuestInfo {
	state := "notRunning"
	if vm.Power == inventory.PoweredOn {
		state = "unknown" // no agent in the guest tells
	}
	return &types.GuestInfo{
		ToolsStatus: types.VirtualMachineToolsStatusToolsNotInstalled, ToolsVersionStatus: "guestToolsNotInstalled",
		ToolsVersionStatus2: "guestToolsNotInstalled", ToolsRunningStatus: "guestToolsNotRunning", GuestState: state,
		GuestOperationsReady: ptr(false), InteractiveGuestOperationsReady: ptr(false), GuestStateChangeSupported: ptr(true), AppState: "none",
	}
}
