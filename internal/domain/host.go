package domain

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/cpu"
)

// HostInfo is what libvirt says of its machine.
type HostInfo struct {
	Hypervisor  string // "QEMU 7.2.22, libvirt 9.0.0"
	Hostname    string
	CPUModel    string
	Cores       int // that guests can use, threads counted
	MHz         int64
	MemoryBytes int64
	KVM         bool   // a tiny guest really ran under it
	WhyNoKVM    string // empty with KVM
	AES         bool   // the processor has AES instructions (E10)
}

// HostInfo describes the machine. The first call waits a few seconds for the KVM
// probe.
func (c *Conn) HostInfo(ctx context.Context) (HostInfo, error) {
	kvm, err := c.usesKVM(ctx)
	if err != nil {
		return HostInfo{}, err
	}
	return call(ctx, c, func(v *libvirt.Libvirt) (HostInfo, error) {
		info := HostInfo{KVM: kvm, AES: cpu.X86.HasAES}
		if !kvm {
			info.WhyNoKVM = c.kvmErr.Error()
		}
		qemu, err := v.ConnectGetVersion()
		if err != nil {
			return HostInfo{}, fmt.Errorf("QEMU's version: %w", err)
		}
		lib, err := v.ConnectGetLibVersion()
		if err != nil {
			return HostInfo{}, fmt.Errorf("libvirt's version: %w", err)
		}
		info.Hypervisor = fmt.Sprintf("QEMU %s, libvirt %s", version(qemu), version(lib))
		if info.Hostname, err = v.ConnectGetHostname(); err != nil {
			return HostInfo{}, fmt.Errorf("host name: %w", err)
		}
		model, kib, cpus, mhz, _, _, _, _, err := v.NodeGetInfo()
		if err != nil {
			return HostInfo{}, fmt.Errorf("node: %w", err)
		}
		info.Cores, info.MHz, info.MemoryBytes = int(cpus), int64(mhz), int64(kib)<<10
		if info.CPUModel = cpuName(); info.CPUModel == "" {
			for _, b := range model {
				if b == 0 {
					break
				}
				info.CPUModel += string(rune(b))
			}
		}
		return info, nil
	})
}

// version undoes libvirt's 1000000·major + 1000·minor + release.
func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

func cpuName() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// A Network is an active libvirt network.
type Network struct {
	Name   string
	Bridge string // of the host; empty for networks without one
}

// Networks lists the active networks; there may be none.
func (c *Conn) Networks(ctx context.Context) ([]Network, error) {
	return call(ctx, c, func(v *libvirt.Libvirt) ([]Network, error) {
		list, _, err := v.ConnectListAllNetworks(1, libvirt.ConnectListNetworksActive)
		if lacksNetworks(err) {
			return nil, nil
		} else if err != nil {
			return nil, fmt.Errorf("networks: %w", err)
		}
		var nets []Network
		for _, n := range list {
			bridge, err := v.NetworkGetBridgeName(n)
			if err != nil {
				bridge = ""
			}
			nets = append(nets, Network{Name: n.Name, Bridge: bridge})
		}
		return nets, nil
	})
}

// lacksNetworks: a libvirtd without the network driver has no networks.
func lacksNetworks(err error) bool {
	e, ok := err.(libvirt.Error)
	return ok && (e.Code == uint32(libvirt.ErrNoSupport) || e.Code == uint32(libvirt.ErrNoConnect))
}
