//go:build cgo && fault

package main

import (
	"bytes"
	"os"

	"mortise/internal/rootkey/pkcs11"
)

// withFaults makes the helper do, on demand, what a vendor's library may do by
// itself: additional data that ends in one of these words asks for it.
func withFaults(d pkcs11.Device) pkcs11.Device { return faulty{d} }

type faulty struct{ pkcs11.Device }

func (f faulty) Encrypt(id, plaintext, additional []byte) ([]byte, error) {
	switch {
	case bytes.HasSuffix(additional, []byte("hang")):
		select {}
	case bytes.HasSuffix(additional, []byte("crash")):
		os.Exit(3)
	case bytes.HasSuffix(additional, []byte("print")): // goes to standard output, as the library sees it
		os.Stdout.WriteString("vendor library v1: debug\n")
	}
	return f.Device.Encrypt(id, plaintext, additional)
}
