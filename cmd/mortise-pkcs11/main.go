//go:build cgo

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"mortise/internal/rootkey/pkcs11"
	"mortise/internal/secret"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mortise-pkcs11:", err)
		os.Exit(1)
	}
}

func run() error {
	module := flag.String("module", "", "the token's PKCS#11 library")
	label := flag.String("token", "", "label of the token (default: the only one)")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "mortise-pkcs11 is started by 'mortise kms serve --pkcs11-module FILE'.")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *module == "" || flag.NArg() > 0 {
		flag.Usage()
		return errors.New("--module is needed, and nothing else but --token")
	}
	if err := secret.LockDown(); err != nil {
		return err
	}
	// A library that prints to standard output must not speak for us.
	out, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	if err := unix.Dup2(2, 1); err != nil {
		return err
	}
	d, err := open(*module, *label)
	if err != nil {
		return err
	}
	defer d.close()
	return pkcs11.Serve(endOfInput(os.Stdin), os.NewFile(uintptr(out), "answers"), withFaults(d))
}

// endOfInput copies r and ends the process when r ends, even while the library
// hangs: nobody is there to be answered then.
func endOfInput(r io.Reader) io.Reader {
	pr, pw := io.Pipe()
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				b := bytes.Clone(buf[:n])
				clear(buf[:n])
				_, _ = pw.Write(b)
				clear(b)
			}
			if err != nil {
				os.Exit(0)
			}
		}
	}()
	return pr
}
