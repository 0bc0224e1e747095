//go:build !cgo

package main

import (
	"fmt"
	"os"
)

// main is what remains without cgo.
func main() {
	fmt.Fprintln(os.Stderr, "mortise-pkcs11: this program was built without cgo and cannot load a PKCS#11 library; build it with CGO_ENABLED=1 and a C compiler")
	os.Exit(1)
}
