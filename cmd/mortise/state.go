package main

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"github.com/google/uuid"

	"mortise/internal/atomicfile"
	"mortise/internal/dev"
	"mortise/internal/pki"
	"mortise/internal/rootkey"
)

// checkState makes a role's state folder and refuses one that belongs to a
// development machine, or the other way round.
func checkState(dir string, isDev bool) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if marked := dev.Marked(dir); marked && !isDev {
		return fmt.Errorf("%s belongs to 'mortise dev', whose passphrases lie beside what they protect: use another --state-dir", dir)
	} else if !marked && isDev {
		return fmt.Errorf("%s is not of 'mortise dev'", dir)
	}
	return nil
}

// instanceUUID tells a center from every other one; it is made once.
func instanceUUID(dir string) (string, error) {
	path := filepath.Join(dir, "instance.uuid")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		id := uuid.NewString()
		return id, atomicfile.Write(path, []byte(id+"\n"), 0o644)
	}
	if err != nil {
		return "", err
	}
	id, err := uuid.ParseBytes(bytes.TrimSpace(text))
	if err != nil {
		return "", fmt.Errorf("%s: %w; restore it from a backup", path, err)
	}
	return id.String(), nil
}

// rootKey opens the root key of a state folder, or makes it at the first start.
func rootKey(dir string, passphraseFile, credential string) (*rootkey.Key, error) {
	pass, err := rootkey.FindPassphrase(rootkey.PassphraseSource{File: passphraseFile, Env: "MORTISE_PASSPHRASE_FILE", Credential: credential}, os.Getenv)
	if err != nil {
		return nil, fmt.Errorf("%w (--passphrase-file)", err)
	}
	defer pass.Wipe()
	// Opening it takes 256 MiB (scrypt), which the runtime would keep.
	defer debug.FreeOSMemory()
	path := filepath.Join(dir, "root.key")
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return rootkey.Create(path, pass, 0)
	}
	return rootkey.Open(path, pass)
}

// endpoint loads a role's TLS certificate for people and foreign clients, who
// trust it by its thumbprint, or makes a self-signed one at the first start. It is
// for the machine's own names, the address it listens at, and others.
func endpoint(dir, name string, listen string, others ...string) (*pki.Credentials, error) {
	path := filepath.Join(dir, name+".pem")
	if _, err := os.Lstat(path); err == nil {
		return pki.LoadCredentials(path, path)
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if h, err := os.Hostname(); err == nil {
		hosts = append(hosts, h)
	}
	if h, _, err := net.SplitHostPort(listen); err == nil && h != "" && net.ParseIP(h) != nil && !net.ParseIP(h).IsUnspecified() {
		hosts = append(hosts, h)
	}
	for _, h := range others {
		if !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Hosts: hosts, Server: true, Life: 5 * 365 * 24 * time.Hour}, "Mortise "+name, time.Now())
	if err != nil {
		return nil, err
	}
	if err := pki.SaveKeyPair(path, []*x509.Certificate{cert}, key); err != nil {
		return nil, err
	}
	return pki.LoadCredentials(path, path)
}
