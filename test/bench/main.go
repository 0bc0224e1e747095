// Command bench measures Mortise beside its peers, both in one run on one
// machine, and prints a line a figure:
//
//	BENCH xts/encrypt-4k ours=9.60GB/s peer=openssl:5.90GB/s ratio=1.63 target=1.60
//
// Its arguments are names of groups; "all", or none, stands for every group but
// kms-million, which takes minutes. A figure below
// its target is printed like any other. The exit status tells whether
// everything was measured, not how fast it was.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

// A group measures figures that belong together and prints each when it has it.
type group struct {
	name string
	run  func(ctx context.Context) error
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if dir := os.Getenv(childEnv); dir != "" {
		if err := openOnly(ctx, dir); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	groups := []group{
		{"xts", benchXTS},
		{"nbd", benchNBD},
		{"convert", benchConvert},
		{"kms", benchKMS},
		{"kms-million", benchMillion},
	}
	if err := run(ctx, groups, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, groups []group, names []string) error {
	known := []string{"all"}
	for _, g := range groups {
		known = append(known, g.name)
	}
	all := len(names) == 0 || slices.Contains(names, "all")
	for _, name := range names {
		if !slices.Contains(known, name) {
			return fmt.Errorf("no group %q; there is: %s", name, strings.Join(known, ", "))
		}
	}
	for _, g := range groups {
		if !slices.Contains(names, g.name) && (!all || g.name == "kms-million") {
			continue
		}
		if err := g.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
	}
	return nil
}

// A figure compares two rates of one unit. Where there is a limit and no peer,
// the ratio is 1 when the limit is just reached, and more is better.
type figure struct {
	name       string // group/what
	ours, peer float64
	unit       string // "GB/s" is 1e9 bytes a second
	peerName   string
	target     float64 // the ratio to reach; design.md §8
}

func (f figure) print() {
	fmt.Printf("BENCH %s ours=%.2f%s peer=%s:%.2f%s ratio=%.2f target=%.2f\n",
		f.name, f.ours, f.unit, f.peerName, f.peer, f.unit, f.ours/f.peer, f.target)
}

// median of at least one value.
func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	return (v[len(v)/2] + v[(len(v)-1)/2]) / 2
}
