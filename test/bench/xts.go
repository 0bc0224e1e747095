package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	xcrypto "golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"

	"mortise/internal/secret"
	"mortise/internal/xts"
)

// benchXTS measures XTS-AES-256 on one core, in units of 4 KiB, against OpenSSL
// and golang.org/x/crypto/xts. The three take turns, so that a machine whose
// clock or neighbours change treats them alike; each counts processor time, as
// openssl speed does.
func benchXTS(ctx context.Context) error {
	const turns = 5
	best := xts.Implementation()
	if best == "" {
		return fmt.Errorf("unset %s", xts.Env)
	}
	key, err := secret.Random(nil, xts.KeySize)
	if err != nil {
		return err
	}
	defer key.Wipe()

	for _, direction := range []string{"encrypt", "decrypt"} {
		decrypt := direction == "decrypt"
		samples := map[string][]float64{}
		for range turns {
			rate, err := opensslRate(ctx, decrypt)
			if err != nil {
				return err
			}
			samples["openssl"] = append(samples["openssl"], rate)
			for _, impl := range []string{best, "aesni"} {
				if impl == "aesni" && best == "generic" || impl == best && len(samples[impl]) == len(samples["openssl"]) {
					continue
				}
				rate, err := oursRate(key, impl, decrypt)
				if err != nil {
					return err
				}
				samples[impl] = append(samples[impl], rate)
			}
			rate, err = xcryptoRate(decrypt)
			if err != nil {
				return err
			}
			samples["x/crypto"] = append(samples["x/crypto"], rate)
		}
		f := figure{
			name: "xts/" + direction + "-4k", ours: median(samples[best]), unit: "GB/s",
			peer: median(samples["openssl"]), peerName: "openssl", target: 1.6,
		}
		if best == "aesni" || best == "generic" {
			f.target = 1
		}
		f.print()
		f.name, f.peer, f.peerName, f.target = "xts/"+direction+"-4k-xcrypto", median(samples["x/crypto"]), "x/crypto", 1
		f.print()
		if len(samples["aesni"]) > 0 {
			f.name, f.ours, f.peer, f.peerName = "xts/"+direction+"-4k-aesni", median(samples["aesni"]), median(samples["openssl"]), "openssl"
			f.print()
		}
	}
	return nil
}

// opensslRate asks openssl speed for GB/s. Its machine-readable line is
// "+F:number:cipher:bytes per second".
func opensslRate(ctx context.Context, decrypt bool) (float64, error) {
	args := []string{"speed", "-mr", "-evp", "aes-256-xts", "-bytes", strconv.Itoa(xts.UnitSize), "-seconds", "1"}
	if decrypt {
		args = append(args, "-decrypt")
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "openssl", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("openssl speed: %w: %s", err, stderr.Bytes())
	}
	for line := range strings.Lines(string(out)) {
		if fields := strings.Split(strings.TrimSpace(line), ":"); len(fields) == 4 && fields[0] == "+F" {
			rate, err := strconv.ParseFloat(fields[3], 64)
			return rate / 1e9, err
		}
	}
	return 0, fmt.Errorf("openssl speed printed no figure: %q", out)
}

func oursRate(key *secret.Key, impl string, decrypt bool) (float64, error) {
	// What another group runs later must choose for itself.
	old, had := os.LookupEnv(xts.Env)
	if err := os.Setenv(xts.Env, impl); err != nil {
		return 0, err
	}
	c, err := xts.New(key)
	if had {
		os.Setenv(xts.Env, old)
	} else {
		os.Unsetenv(xts.Env)
	}
	if err != nil {
		return 0, err
	}
	defer c.Wipe()
	if decrypt {
		return unitRate(c.Decrypt)
	}
	return unitRate(c.Encrypt)
}

func xcryptoRate(decrypt bool) (float64, error) {
	c, err := xcrypto.NewCipher(aes.NewCipher, bytes.Repeat([]byte{1, 2, 3, 4}, xts.KeySize/4))
	if err != nil {
		return 0, err
	}
	if decrypt {
		return unitRate(c.Decrypt)
	}
	return unitRate(c.Encrypt)
}

// unitRate runs crypt over one unit, in place, for half a second of this
// thread's processor time and returns GB/s.
func unitRate(crypt func(dst, src []byte, unit uint64)) (float64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, xts.UnitSize)
	start, err := threadTime()
	if err != nil {
		return 0, err
	}
	for n := 0; ; {
		for range 1000 {
			crypt(buf, buf, uint64(n))
			n++
		}
		now, err := threadTime()
		if err != nil {
			return 0, err
		}
		if took := now - start; took > 5e8 {
			return float64(n) * xts.UnitSize / float64(took), nil
		}
	}
}

// threadTime is this thread's processor time in nanoseconds.
func threadTime() (int64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("reading the processor time: %w", err)
	}
	return ts.Nano(), nil
}
