package xts

import (
	"fmt"
	"os"
	"strings"
)

// An implementation is one way to compute. The zero value is the one that
// every host has.
type implementation uint8

const (
	generic implementation = iota
	aesni
	avx2
	avx512
)

func (i implementation) String() string {
	return [...]string{"generic", "aesni", "avx2", "avx512"}[i]
}

// Env is an environment variable that forces an implementation by name, to
// measure one or to see a host as it is without hardware for AES. New fails
// when the CPU cannot run it.
const Env = "MORTISE_XTS"

// Implementation names what New uses on this host: "avx512", "avx2", "aesni" or
// "generic" (rule E10). Only "generic" works without AES instructions that
// Mortise drives itself. It is empty when Env asks for the impossible.
func Implementation() string {
	impl, err := choose()
	if err != nil {
		return ""
	}
	return impl.String()
}

// choose returns the implementation that Env names, or else the fastest.
func choose() (implementation, error) {
	can := available()
	want := os.Getenv(Env)
	if want == "" {
		return can[len(can)-1], nil
	}
	var names []string
	for _, impl := range can {
		if impl.String() == want {
			return impl, nil
		}
		names = append(names, impl.String())
	}
	return 0, fmt.Errorf("xts: %s=%q cannot run on this CPU; unset it or choose of: %s", Env, want, strings.Join(names, ", "))
}
