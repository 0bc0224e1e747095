package pki

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"mortise/internal/secret"
)

// maxPEM bounds a PEM file, in bytes: a chain and a key have a few thousand.
const maxPEM = 1 << 20

// EncodeCertificates prints certificates as PEM (RFC 7468), leaf first.
func EncodeCertificates(chain ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range chain {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // cannot fail into a Buffer
	}
	return b.Bytes()
}

// EncodeCSR prints a certificate request's DER as PEM.
func EncodeCSR(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// ParseCertificates reads one or more certificates from PEM text, in order.
// Blocks of other kinds are passed over.
func ParseCertificates(text []byte) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("pki: certificate %d of the PEM text is malformed: %w", len(chain)+1, err)
		}
		chain = append(chain, cert)
	}
	if len(chain) == 0 {
		return nil, errors.New("pki: no certificate found; a PEM text with -----BEGIN CERTIFICATE----- is wanted")
	}
	return chain, nil
}

// ParsePrivateKey reads the one private key in PEM text: PKCS#8, PKCS#1 or SEC 1.
// Its errors quote nothing of the text.
func ParsePrivateKey(text []byte) (crypto.Signer, error) {
	var found crypto.Signer
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var key crypto.Signer
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = parsePKCS8(block.Bytes)
		case "RSA PRIVATE KEY", "EC PRIVATE KEY":
			key, err = parseOldKey(block)
		case "ENCRYPTED PRIVATE KEY":
			err = errEncryptedKey
		default:
			continue
		}
		clear(block.Bytes)
		if err != nil {
			return nil, err
		}
		if found != nil {
			return nil, errors.New("pki: more than one private key in the PEM text")
		}
		found = key
	}
	if found == nil {
		return nil, errors.New("pki: no private key found; a PEM text with -----BEGIN PRIVATE KEY----- is wanted")
	}
	return found, nil
}

var errEncryptedKey = errors.New("pki: the private key is encrypted by a password; decrypt it first, such as with openssl pkey")

func parseOldKey(block *pem.Block) (crypto.Signer, error) {
	if block.Headers["DEK-Info"] != "" {
		return nil, errEncryptedKey
	}
	var key crypto.Signer
	var err error
	if block.Type == "EC PRIVATE KEY" {
		key, err = x509.ParseECPrivateKey(block.Bytes)
	} else {
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, fmt.Errorf("pki: malformed %s", block.Type) // the cause may quote key bytes
	}
	if err := checkPublicKey(key.Public()); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return key, nil
}

// ParseKeyPair reads a certificate chain, leaf first, and the leaf's key.
func ParseKeyPair(certPEM, keyPEM []byte) ([]*x509.Certificate, crypto.Signer, error) {
	chain, err := ParseCertificates(certPEM)
	if err != nil {
		return nil, nil, err
	}
	key, err := ParsePrivateKey(keyPEM)
	if err != nil {
		return nil, nil, err
	}
	if err := matches(chain, key); err != nil {
		return nil, nil, err
	}
	return chain, key, nil
}

func matches(chain []*x509.Certificate, key crypto.Signer) error {
	if len(chain) == 0 {
		return errors.New("pki: an empty certificate chain")
	}
	if !samePublicKey(chain[0].PublicKey, key.Public()) {
		return fmt.Errorf("pki: the private key is not that of the certificate of %q; the leaf certificate must come first", chain[0].Subject)
	}
	return nil
}

// LoadCertificates reads the certificates in a PEM file.
func LoadCertificates(path string) ([]*x509.Certificate, error) {
	text, err := readPEM(path, false)
	if err != nil {
		return nil, err
	}
	chain, err := ParseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return chain, nil
}

// LoadKeyPair reads a chain and its key from PEM files, which may be one and
// the same. Nobody but the owner may have access to the key's file.
func LoadKeyPair(certPath, keyPath string) ([]*x509.Certificate, crypto.Signer, error) {
	chain, err := LoadCertificates(certPath)
	if err != nil {
		return nil, nil, err
	}
	text, err := readPEM(keyPath, true)
	if err != nil {
		return nil, nil, err
	}
	defer clear(text)
	key, err := ParsePrivateKey(text)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", keyPath, err)
	}
	if err := matches(chain, key); err != nil {
		return nil, nil, fmt.Errorf("%s, %s: %w", certPath, keyPath, err)
	}
	return chain, key, nil
}

// SaveKeyPair writes a role's own TLS certificate chain and key into one PEM
// file of mode 0600, durably and in one step: after a crash the file is the old
// one or the new one, never a key with another's certificate. Keys that belong
// to more than the machine they are on (a CA's, a key server client's) are
// sealed instead.
func SaveKeyPair(path string, chain []*x509.Certificate, key crypto.Signer) error {
	if err := matches(chain, key); err != nil {
		return err
	}
	k, err := MarshalKey(key)
	if err != nil {
		return err
	}
	defer k.Wipe()
	return write(path, EncodeCertificates(chain...), k)
}

// LoadOrMakeKey reads the private key in a PEM file of mode 0600, or makes one,
// ECDSA P-256, and saves it durably first: whoever asks for a certificate must
// still have the key when the answer was lost and it asks again.
func LoadOrMakeKey(path string) (crypto.Signer, error) {
	text, err := readPEM(path, true)
	if err == nil {
		defer clear(text)
		key, err := ParsePrivateKey(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key, err := GenerateKey()
	if err != nil {
		return nil, err
	}
	k, err := MarshalKey(key)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	return key, write(path, nil, k)
}

// SaveCertificates writes a PEM file that anybody may read, in one step.
func SaveCertificates(path string, chain ...*x509.Certificate) error {
	return write(path, EncodeCertificates(chain...), nil)
}

func readPEM(path string, private bool) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO would wait for ever
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("pki: %s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); private && mode&0o077 != 0 {
		return nil, fmt.Errorf("pki: private key file %s has mode %04o, so others may reach it; chmod 0600 it", path, mode)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, fmt.Errorf("pki: reading %s: %w", path, err)
	}
	if len(text) > maxPEM {
		return nil, fmt.Errorf("pki: %s is longer than %d bytes; that is no PEM file", path, maxPEM)
	}
	return text, nil
}

// write replaces a file by a whole, durable one. With a key, which it appends
// to text, the mode is 0600 from the start.
func write(path string, text []byte, key *secret.Key) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("pki: writing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
			err = fmt.Errorf("pki: writing %s: %w", path, err)
		}
	}()
	_, err = tmp.Write(text)
	if key != nil && err == nil {
		key.Use(func(der []byte) {
			block := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
			_, err = tmp.Write(block)
			clear(block)
		})
	}
	if key == nil && err == nil {
		err = tmp.Chmod(0o644)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
