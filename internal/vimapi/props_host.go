package vimapi

import (
	"net"
	"strconv"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
)

func clusterProps() map[string]prop {
	return map[string]prop{
		"host":         on(func(r *reader, c *inventory.Cluster) any { return morefs(r.childrenOf(c.Ref, inventory.KindHost)) }),
		"resourcePool": on(func(_ *reader, c *inventory.Cluster) any { return reference(c.ResourcePool) }),
		"datastore": on(func(r *reader, c *inventory.Cluster) any {
			return r.ofHosts(c, func(h *inventory.Host) []inventory.Ref { return h.Datastores })
		}),
		"network": on(func(r *reader, c *inventory.Cluster) any {
			return r.ofHosts(c, func(h *inventory.Host) []inventory.Ref { return h.Networks })
		}),
		"summary":       on(func(r *reader, c *inventory.Cluster) any { return r.clusterSummary(c) }),
		"configuration": on(func(_ *reader, c *inventory.Cluster) any { return types.ClusterConfigInfo{} }),
		"configurationEx": on(func(_ *reader, c *inventory.Cluster) any {
			return &types.ClusterConfigInfoEx{
				ComputeResourceConfigInfo: types.ComputeResourceConfigInfo{VmSwapPlacement: "vmDirectory"},
				CryptoConfig:              &types.ClusterCryptoConfigInfo{CryptoMode: c.CryptoMode},
			}
		}),
	}
}

func (r *reader) hostsOf(c *inventory.Cluster) []*inventory.Host {
	var all []*inventory.Host
	for _, ref := range r.childrenOf(c.Ref, inventory.KindHost) {
		if h, ok := inventory.Lookup[inventory.Host](r.view, ref); ok {
			all = append(all, h)
		}
	}
	return all
}

// ofHosts lists what a cluster's hosts have, each once.
func (r *reader) ofHosts(c *inventory.Cluster, f func(*inventory.Host) []inventory.Ref) []types.ManagedObjectReference {
	seen := map[inventory.Ref]bool{}
	var refs []inventory.Ref
	for _, h := range r.hostsOf(c) {
		for _, ref := range f(h) {
			if !seen[ref] {
				seen[ref] = true
				refs = append(refs, ref)
			}
		}
	}
	return r.existing(refs)
}

func (r *reader) clusterSummary(c *inventory.Cluster) *types.ClusterComputeResourceSummary {
	s := &types.ClusterComputeResourceSummary{}
	s.OverallStatus = types.ManagedEntityStatusGreen
	for _, h := range r.hostsOf(c) {
		mhz := int32(int64(h.Info.CPUCores) * h.Info.CPUMHz)
		s.TotalCpu += mhz
		s.TotalMemory += h.Info.MemoryBytes
		s.NumCpuCores += int16(h.Info.CPUCores)
		s.NumCpuThreads += int16(h.Info.CPUCores)
		s.NumHosts++
		if h.Connection == inventory.Connected {
			s.NumEffectiveHosts++
			s.EffectiveCpu += mhz
			s.EffectiveMemory += h.Info.MemoryBytes >> 20
		} else {
			s.OverallStatus = types.ManagedEntityStatusYellow
		}
	}
	return s
}

func poolProps() map[string]prop {
	return map[string]prop{
		"owner": on(func(_ *reader, p *inventory.ResourcePool) any { return moref(p.Owner) }),
		"resourcePool": on(func(r *reader, p *inventory.ResourcePool) any {
			return morefs(r.childrenOf(p.Ref, inventory.KindResourcePool))
		}),
		"vm":      on(func(r *reader, p *inventory.ResourcePool) any { return morefs(r.relations().vms[p.Ref]) }),
		"runtime": on(func(r *reader, p *inventory.ResourcePool) any { return r.poolRuntime(p) }),
		"config":  on(func(_ *reader, p *inventory.ResourcePool) any { return poolConfig(p) }),
		"summary": on(func(r *reader, p *inventory.ResourcePool) any {
			return &types.ResourcePoolSummary{Name: p.Name, Config: poolConfig(p), Runtime: r.poolRuntime(p)}
		}),
	}
}

func poolConfig(p *inventory.ResourcePool) types.ResourceConfigSpec {
	unlimited := func() types.ResourceAllocationInfo {
		return types.ResourceAllocationInfo{
			Reservation: ptr(int64(0)), ExpandableReservation: ptr(true), Limit: ptr(int64(-1)),
			Shares: &types.SharesInfo{Shares: 4000, Level: types.SharesLevelNormal},
		}
	}
	return types.ResourceConfigSpec{Entity: reference(p.Ref), CpuAllocation: unlimited(), MemoryAllocation: unlimited()}
}

func (r *reader) poolRuntime(p *inventory.ResourcePool) types.ResourcePoolRuntimeInfo {
	info := types.ResourcePoolRuntimeInfo{OverallStatus: types.ManagedEntityStatusGreen}
	if c, ok := inventory.Lookup[inventory.Cluster](r.view, p.Owner); ok {
		s := r.clusterSummary(c)
		info.Cpu.MaxUsage, info.Cpu.UnreservedForPool, info.Cpu.UnreservedForVm = int64(s.EffectiveCpu), int64(s.EffectiveCpu), int64(s.EffectiveCpu)
		bytes := s.EffectiveMemory << 20
		info.Memory.MaxUsage, info.Memory.UnreservedForPool, info.Memory.UnreservedForVm = bytes, bytes, bytes
	}
	return info
}

func hostProps() map[string]prop {
	return map[string]prop{
		"runtime":       on(func(_ *reader, h *inventory.Host) any { return hostRuntime(h) }),
		"summary":       on((*reader).hostSummary),
		"hardware":      on(func(_ *reader, h *inventory.Host) any { return hostHardware(h) }),
		"capability":    on(func(_ *reader, h *inventory.Host) any { return hostCapability(h) }),
		"config":        on((*reader).hostConfig),
		"configManager": on(func(*reader, *inventory.Host) any { return types.HostConfigManager{} }),
		"datastore":     on(func(r *reader, h *inventory.Host) any { return r.existing(h.Datastores) }),
		"network":       on(func(r *reader, h *inventory.Host) any { return r.existing(h.Networks) }),
		"vm":            on(func(r *reader, h *inventory.Host) any { return morefs(r.relations().vms[h.Ref]) }),
		"overallStatus": on(func(_ *reader, h *inventory.Host) any { return hostStatus(h) }),
	}
}

func hostStatus(h *inventory.Host) types.ManagedEntityStatus {
	switch {
	case h.Connection == inventory.NotResponding:
		return types.ManagedEntityStatusRed
	case h.Connection != inventory.Connected:
		return types.ManagedEntityStatusGray
	case h.Problem != "":
		return types.ManagedEntityStatusYellow
	}
	return types.ManagedEntityStatusGreen
}

func hostRuntime(h *inventory.Host) types.HostRuntimeInfo {
	info := types.HostRuntimeInfo{
		ConnectionState: types.HostSystemConnectionState(h.Connection), PowerState: types.HostSystemPowerStatePoweredOn,
		StandbyMode: "none", CryptoState: h.CryptoState, CryptoKeyId: optionalKeyID(h.HostKey),
	}
	if info.ConnectionState == "" {
		info.ConnectionState = types.HostSystemConnectionStateDisconnected
	}
	if h.Connection != inventory.Connected {
		info.PowerState = types.HostSystemPowerStateUnknown
	}
	if !h.Info.BootTime.IsZero() {
		info.BootTime = ptr(h.Info.BootTime.UTC())
	}
	return info
}

func hostProduct(h *inventory.Host) types.AboutInfo {
	return types.AboutInfo{
		Name: "Mortise host", FullName: "Mortise host " + h.Info.Version + " on " + h.Info.Hypervisor, Vendor: "Mortise", Version: h.Info.Version,
		Build: "0", OsType: "linux-x64", ProductLineId: "embeddedEsx", ApiType: "HostAgent", ApiVersion: newestVersion,
	}
}

func cpuModel(h *inventory.Host) string {
	if h.Info.CPUModel == "" {
		return "unknown"
	}
	return h.Info.CPUModel
}

func (r *reader) hostSummary(h *inventory.Host) any {
	about := hostProduct(h)
	runtime := hostRuntime(h)
	s := types.HostListSummary{
		Host: reference(h.Ref), Runtime: &runtime, OverallStatus: hostStatus(h),
		Hardware: &types.HostHardwareSummary{
			Vendor: "KVM", Model: h.Info.OS, Uuid: h.UUID, MemorySize: h.Info.MemoryBytes, CpuModel: cpuModel(h), CpuMhz: int32(h.Info.CPUMHz),
			NumCpuPkgs: 1, NumCpuCores: int16(h.Info.CPUCores), NumCpuThreads: int16(h.Info.CPUCores),
		},
		Config: types.HostConfigSummary{Name: h.Name, Product: &about, SslThumbprint: h.CertThumbprint, Port: hostPort(h.Address)},
	}
	if !h.Info.BootTime.IsZero() && h.Connection == inventory.Connected {
		s.QuickStats.Uptime = int32(min(r.s.clock().Sub(h.Info.BootTime).Seconds(), 1<<31-1))
	}
	return s
}

func hostPort(address string) int32 {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(port, 10, 16)
	return int32(n)
}

func hostHardware(h *inventory.Host) *types.HostHardwareInfo {
	hz := h.Info.CPUMHz * 1_000_000
	return &types.HostHardwareInfo{
		SystemInfo: types.HostSystemInfo{Vendor: "KVM", Model: h.Info.OS, Uuid: h.UUID},
		CpuInfo:    types.HostCpuInfo{NumCpuPackages: 1, NumCpuCores: int16(h.Info.CPUCores), NumCpuThreads: int16(h.Info.CPUCores), Hz: hz},
		CpuPkg:     []types.HostCpuPackage{{Vendor: "unknown", Hz: hz, Description: cpuModel(h), ThreadId: []int16{0}}},
		MemorySize: h.Info.MemoryBytes,
	}
}

// hostCapability advertises what vSphere forbids and Mortise does: encryption
// with snapshots and on running VMs as far as it is built.
func hostCapability(h *inventory.Host) *types.HostCapability {
	able := h.CryptoState != inventory.HostIncapable
	return &types.HostCapability{
		CryptoSupported: ptr(able), EncryptionChangeOnAddRemoveSupported: ptr(able), EncryptionHotOperationSupported: ptr(false),
		EncryptionWithSnapshotsSupported: ptr(false), EncryptionHBRSupported: ptr(false), EncryptionMemorySaveSupported: ptr(false),
		EncryptionRDMSupported: ptr(false), EncryptionVFlashSupported: ptr(false), EncryptionCBRCSupported: ptr(false),
		MaxSupportedVMs: 1024, MaxRunningVMs: 1024, MaxHostRunningVms: 1024,
	}
}

func (r *reader) hostConfig(h *inventory.Host) any {
	bit := func(b bool) string {
		if b {
			return "1"
		}
		return "0"
	}
	return &types.HostConfigInfo{
		Host: moref(h.Ref), Product: hostProduct(h),
		// PowerCLI's VMEncryption module reads cpuid.AES here (E10).
		FeatureCapability: []types.HostFeatureCapability{{Key: "cpuid.AES", FeatureName: "cpuid.AES", Value: bit(h.Info.AES)}},
	}
}
