package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"mortise/internal/kms/unlocking"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/pkcs11"
	"mortise/internal/secret"
	"mortise/internal/tpm"
)

// rootKeysConfig says where root keys are and what opens them.
type rootKeysConfig struct {
	PassphraseFile string `toml:"passphrase_file"`
	TPM            bool   `toml:"tpm"`
	TPMDevice      string `toml:"tpm_device"`
	TPMPCRs        []uint `toml:"tpm_pcrs"`
	PKCS11Module   string `toml:"pkcs11_module"`
	PKCS11Token    string `toml:"pkcs11_token"`
	PKCS11PINFile  string `toml:"pkcs11_pin_file"`
	PKCS11Helper   string `toml:"pkcs11_helper"`
}

// unlocking is the configuration for a keyring in a file, named with the flags
// where its errors are about them.
func (c rootKeysConfig) unlocking(keyring string, log *slog.Logger) (unlocking.Config, error) {
	u := unlocking.Config{
		Keyring:    keyring,
		Passphrase: word("--passphrase-file", c.PassphraseFile, "MORTISE_PASSPHRASE_FILE", "kms-passphrase"),
		TPM:        tpm.Sealer{Device: c.TPMDevice, PCRs: c.TPMPCRs},
		SealToTPM:  c.TPM,
		Logger:     log,
	}
	if c.PKCS11Module == "" {
		return u, nil
	}
	helper := c.PKCS11Helper
	if helper == "" {
		own, err := os.Executable()
		if err != nil {
			return u, fmt.Errorf("finding mortise-pkcs11: %w", err)
		}
		helper = filepath.Join(filepath.Dir(own), "mortise-pkcs11")
	}
	if _, err := os.Stat(helper); err != nil {
		return u, fmt.Errorf("the helper for PKCS#11 tokens (--pkcs11-helper): %w", err)
	}
	u.Token = pkcs11.New(pkcs11.Config{Helper: helper, Module: c.PKCS11Module, Label: c.PKCS11Token, Logger: log})
	u.TokenName = c.PKCS11Token
	u.PIN = word("--pkcs11-pin-file", c.PKCS11PINFile, "MORTISE_PKCS11_PIN_FILE", "kms-pkcs11-pin")
	return u, nil
}

// word finds a passphrase or PIN in a file that a flag, a variable of the
// environment or a systemd credential names.
func word(flag, file, env, credential string) func() (*secret.Key, error) {
	return func() (*secret.Key, error) {
		k, err := rootkey.FindPassphrase(rootkey.PassphraseSource{File: file, Env: env, Credential: credential}, os.Getenv)
		if err != nil {
			return nil, fmt.Errorf("%w (%s)", err, flag)
		}
		return k, nil
	}
}
