package rootkey

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"mortise/internal/secret"
)

// maxPassphrase bounds a passphrase, in bytes.
const maxPassphrase = 1024

// ErrNoPassphrase means that FindPassphrase was told of no place to look.
var ErrNoPassphrase = errors.New("no passphrase for the root key")

// A PassphraseSource says where an unattended start finds the passphrase. The
// first field that leads somewhere decides; a file that is named and cannot be
// used is an error, never a reason to look further.
type PassphraseSource struct {
	File       string // path of a file, from a flag or the configuration
	Env        string // name of an environment variable that holds a path
	Credential string // name of a systemd credential (systemd.exec(5), LoadCredential=)
}

// FindPassphrase reads the passphrase from its source. getenv is os.Getenv.
// The error matches ErrNoPassphrase when no place was named.
func FindPassphrase(from PassphraseSource, getenv func(string) string) (*secret.Key, error) {
	if from.File != "" {
		return ReadPassphrase(from.File)
	}
	if from.Env != "" {
		if path := getenv(from.Env); path != "" {
			return ReadPassphrase(path)
		}
	}
	if dir := getenv("CREDENTIALS_DIRECTORY"); dir != "" && from.Credential != "" {
		path := filepath.Join(dir, from.Credential)
		if _, err := os.Lstat(path); err == nil {
			return ReadPassphrase(path)
		}
	}
	hint := "name a file that holds it"
	if from.Env != "" {
		hint += ", or set " + from.Env + " to its path"
	}
	if from.Credential != "" {
		hint += ", or pass the systemd credential " + from.Credential
	}
	return nil, fmt.Errorf("rootkey: %w: %s", ErrNoPassphrase, hint)
}

// ReadPassphrase reads a passphrase of 1 to 1024 bytes from a regular file
// that nobody but its owner can read or write. One newline at the end is not
// part of it.
func ReadPassphrase(path string) (*secret.Key, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO would wait for ever
	if err != nil {
		return nil, fmt.Errorf("rootkey: opening the passphrase file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("rootkey: passphrase file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("rootkey: passphrase file %s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("rootkey: passphrase file %s has mode %04o, so others may reach it; chmod 0600 it", path, mode)
	}
	buf := make([]byte, maxPassphrase+2)
	defer clear(buf)
	n, err := io.ReadFull(f, buf)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("rootkey: reading passphrase file %s: %w", path, err)
	}
	p := bytes.TrimSuffix(bytes.TrimSuffix(buf[:n], []byte("\n")), []byte("\r"))
	if len(p) == 0 || len(p) > maxPassphrase {
		return nil, fmt.Errorf("rootkey: passphrase file %s must hold 1 to %d bytes", path, maxPassphrase)
	}
	return secret.Copy(p)
}
