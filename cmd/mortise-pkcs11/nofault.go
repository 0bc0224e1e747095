//go:build cgo && !fault

package main

import "mortise/internal/rootkey/pkcs11"

// withFaults does nothing; a build for tests has another one.
func withFaults(d pkcs11.Device) pkcs11.Device { return d }
