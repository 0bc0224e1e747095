package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"golang.org/x/sys/unix"

	"mortise/internal/kms"
)

const (
	fewKeys  = 1000
	manyKeys = 1_000_000 // MORTISE_BENCH_KEYS sets another number
)

// benchMillion measures how the KMS bears a million keys with a name and tags
// such as vCenter's: whether a request costs what it costs among a thousand, how
// long Locate takes, how long a start, and how much memory they need. Making them
// takes minutes.
func benchMillion(ctx context.Context) (err error) {
	many := manyKeys
	if text := os.Getenv("MORTISE_BENCH_KEYS"); text != "" {
		if many, err = strconv.Atoi(text); err != nil || many <= fewKeys {
			return fmt.Errorf("MORTISE_BENCH_KEYS=%s is no number over %d", text, fewKeys)
		}
	}
	dir, err := os.MkdirTemp(".", "kms-bench-")
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := startKMS(ctx, dir)
	if err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, b.stop())
		}
	}()
	if err := b.fill(ctx, 0, fewKeys); err != nil {
		return err
	}
	few, err := b.costs(ctx, fewKeys)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := b.fill(ctx, fewKeys, many); err != nil {
		return err
	}
	fmt.Printf("BENCH kms-million/fill made=%d took=%.0fs\n", many-fewKeys, time.Since(begin).Seconds())
	lots, err := b.costs(ctx, many)
	if err != nil {
		return err
	}
	for i, c := range lots {
		if c.p99 {
			limit("kms-million/"+c.name+"-p99", c.value, 5, "ms")
		} else {
			figure{name: "kms-million/" + c.name, ours: c.value, peer: few[i].value, unit: "/s", peerName: "among-1000", target: 0.9}.print()
		}
	}
	stopped = true
	if err := b.stop(); err != nil {
		return err
	}
	return startUp(ctx, dir, many)
}

func keyName(i int) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: fmt.Sprintf("vm-key-%07d", i), NameType: kmip.NameTypeUninterpretedTextString}}
}

func custom(name kmip.AttributeName, value string) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: value}
}

// fill makes keys from number from up to number to.
func (b *kmsBench) fill(ctx context.Context, from, to int) error {
	cert := b.tls.Certificates[0].Leaf
	var (
		wg     sync.WaitGroup
		next   atomic.Int64
		failed atomic.Pointer[error]
	)
	next.Store(int64(from))
	for range 512 {
		wg.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1) - 1)
				if i >= to {
					return
				}
				s, err := b.kms.Session(ctx, kms.DefaultInstance, cert, "bench")
				if err == nil {
					err = s.Begin(kmip.OperationCreate)
				}
				if err == nil {
					_, err = s.Create(ctx, kmip.ObjectTypeSymmetricKey, append(slices.Clone(createRequest().TemplateAttribute.Attribute), keyName(i),
						custom("x-Product_Version", "8.0.3 build-24022515"), custom("x-Vendor", "VMware, Inc."), custom("x-Product", "VMware vSphere"),
						custom("x-Identifier", fmt.Sprintf("host-%07d", i))))
					err = s.End(kmip.OperationCreate, "", err) // the entry is in the transaction
				}
				if err != nil {
					err = fmt.Errorf("making key %d: %w", i, err)
					failed.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

type cost struct {
	name  string
	value float64
	p99   bool // the value is the 99th percentile in ms, else a rate
}

// costs measures requests while there are n keys.
func (b *kmsBench) costs(ctx context.Context, n int) (list []cost, err error) {
	for _, c := range []struct {
		name    string
		clients int
		w       worker
	}{
		{"get-kept", 16, b.kept(b.addr, b.get)},
		{"get-fresh", 8, b.fresh(b.addr, tls.VersionTLS13)},
		{"create-64-clients", kmsClients, b.kept(b.addr, encodeRequest(createRequest()))},
	} {
		r, err := median3(ctx, c.clients, c.w)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		list = append(list, cost{name: c.name, value: r})
	}
	name := func() *payloads.LocateRequestPayload {
		return &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{keyName(rand.IntN(n))}}
	}
	unique := func() *payloads.LocateRequestPayload {
		return &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{custom("x-Identifier", fmt.Sprintf("host-%07d", rand.IntN(n)))}}
	}
	common := func() *payloads.LocateRequestPayload {
		return &payloads.LocateRequestPayload{MaximumItems: 10, Attribute: []kmip.Attribute{custom("x-Vendor", "VMware, Inc.")}}
	}
	for _, l := range []struct {
		name string
		ask  func() *payloads.LocateRequestPayload
	}{{"locate-name", name}, {"locate-x", unique}, {"locate-x-of-all-newest-10", common}} {
		p, err := b.p99(ctx, l.ask)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		list = append(list, cost{l.name, p, true})
	}
	return list, nil
}

// p99 is the time that 99 of 100 Locates do not exceed, in ms.
func (b *kmsBench) p99(ctx context.Context, ask func() *payloads.LocateRequestPayload) (float64, error) {
	c, err := tls.Dial("tcp", b.addr, b.tls)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var took []float64
	for range 2000 {
		request := encodeRequest(ask())
		begin := time.Now()
		answer, err := exchange(c, request)
		if err != nil {
			return 0, err
		}
		took = append(took, float64(time.Since(begin).Microseconds())/1000)
		if err := succeeded(answer); err != nil {
			return 0, err
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
	slices.Sort(took)
	return took[len(took)*99/100], nil
}

// childEnv holds the folder that a process of its own is to open.
const childEnv = "MORTISE_BENCH_OPEN"

// startUp opens the state in a process of its own, for the sake of its memory.
func startUp(ctx context.Context, dir string, keys int) error {
	var seconds, processor, memory, anonymous []float64
	for range kmsRounds {
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("starting with %d keys: %w", keys, err)
		}
		var s, p, m, a float64
		if _, err := fmt.Sscan(string(out), &s, &p, &m, &a); err != nil {
			return fmt.Errorf("starting with %d keys: %q: %w", keys, out, err)
		}
		seconds, processor, memory, anonymous = append(seconds, s), append(processor, p), append(memory, m), append(anonymous, a)
	}
	limit("kms-million/start-up", median(seconds), 30, "s")
	// On a machine with other work this tells more than the wall clock.
	fmt.Printf("BENCH kms-million/start-up-processor-time ours=%.2fs load=%s\n", median(processor), loadAverage())
	limit("kms-million/memory-a-key", median(memory)/float64(keys), 3072, "B")
	fmt.Printf("BENCH kms-million/memory-a-key-without-page-cache ours=%.0fB\n", median(anonymous)/float64(keys))
	return nil
}

// loadAverage is how many processes have wanted to run lately, in the last 1, 5
// and 15 minutes.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], ",")
}

// openOnly is the child: it starts the KMS, prints how long that took, on the
// wall and on the processors, and what memory it has, and ends.
func openOnly(ctx context.Context, dir string) error {
	begin := time.Now()
	s, k, err := openKMS(ctx, dir)
	if err != nil {
		return err
	}
	took := time.Since(begin).Seconds()
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		return err
	}
	processor := time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
	all, anonymous, err := resident()
	if err != nil {
		return err
	}
	fmt.Println(took, processor, all, anonymous)
	k.Close()
	return s.Close()
}

// resident is the memory that this process has, in bytes: all of it, and what is
// not the machine's cache of files.
func resident() (all, anonymous float64, err error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		kib, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		switch name {
		case "VmRSS":
			all = kib * 1024
		case "RssAnon":
			anonymous = kib * 1024
		}
	}
	return all, anonymous, nil
}
