package host

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"mortise/internal/hostapi"
	"mortise/internal/xts"
)

// describe says what this host is and can do.
func (a *Agent) describe(ctx context.Context) (*hostapi.HostInfo, error) {
	hv, err := a.cfg.Guests.HostInfo(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking libvirt about this host: %w", err)
	}
	nets, err := a.cfg.Guests.Networks(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking libvirt for its networks: %w", err)
	}
	info := &hostapi.HostInfo{
		Name: a.cfg.Name, Uuid: a.cfg.UUID, Version: a.cfg.Version,
		Hypervisor: hv.Hypervisor, CpuModel: hv.CPUModel, CpuCores: int32(hv.Cores), CpuMhz: hv.MHz,
		MemoryBytes: hv.MemoryBytes, Kvm: hv.KVM,
		Aes: cpu.X86.HasAES || cpu.ARM64.HasAES, Xts: xts.Implementation(),
		Os: osName(), IncapableReasons: incapable(),
	}
	for _, d := range a.cfg.Datastores {
		info.Datastores = append(info.Datastores, d.info())
	}
	for _, n := range nets {
		info.Networks = append(info.Networks, &hostapi.NetworkInfo{Name: n.Name, Bridge: n.Bridge})
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		info.BootTimeUnix = a.cfg.Now().Add(-time.Duration(si.Uptime) * time.Second).Unix()
	}
	return info, nil
}

func osName() string {
	text, _ := os.ReadFile("/etc/os-release")
	for _, line := range strings.Split(string(text), "\n") {
		if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(name, `"`)
		}
	}
	return "Linux"
}

// incapable lists why guest memory could reach a disk in clear (E1): swap that
// is not on dm-crypt, and hibernation into it.
func incapable() (reasons []string) {
	text, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return nil // no swap support in this kernel
	}
	for _, line := range strings.Split(string(text), "\n")[1:] {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "/dev/zram") || onCrypt(f[0]) {
			continue
		}
		reasons = append(reasons, fmt.Sprintf("swap on %s is not encrypted: guest memory would reach it in clear; put it on dm-crypt or run 'swapoff %s'", f[0], f[0]))
	}
	return reasons
}

// onCrypt tells whether a swap device is a dm-crypt target.
func onCrypt(dev string) bool {
	var st unix.Stat_t
	if unix.Stat(dev, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return false
	}
	uuid, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/dm/uuid", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	return err == nil && strings.HasPrefix(string(uuid), "CRYPT-")
}
