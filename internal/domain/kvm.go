package domain

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

//go:embed kvmprobe/probe.bin
var probeCode []byte

const (
	probeROMSize = 1 << 16
	probeExit    = 21 // see probe.asm
	probeTime    = 5 * time.Second
)

// probe starts a tiny guest with the accelerator ("kvm", "tcg") and tells why it
// did not end well, or nil. /dev/kvm may open and QEMU may start under it while
// no ordinary guest ever gets anywhere, as inside some virtual machines: only
// running one shows it.
func probe(ctx context.Context, qemu, accel string) error {
	dir, err := os.MkdirTemp("", "mortise-kvm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	rom := make([]byte, probeROMSize)
	copy(rom, probeCode)
	copy(rom[0xfff0:], []byte{0xe9, 0x0d, 0x00}) // jmp to the first byte, modulo 64 KiB
	file := filepath.Join(dir, "probe.rom")
	if err := os.WriteFile(file, rom, 0o600); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	cmd := exec.CommandContext(limited, qemu, "-accel", accel, "-machine", "q35", "-m", "32",
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
		"-bios", file, "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == probeExit:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case limited.Err() != nil:
		return fmt.Errorf("a guest of a few hundred bytes did not finish within %v", probeTime)
	case err == nil:
		return errors.New("a guest of a few hundred bytes crashed")
	}
	return fmt.Errorf("%w: %.200s", err, out)
}
