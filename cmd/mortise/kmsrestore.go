package main

import (
	"fmt"
	"os"

	"mortise/internal/cli/kmscli"
	"mortise/internal/kms/backup"
	"mortise/internal/kms/cluster"
	"mortise/internal/rootkey"
)

// kmsRestorer lays out a restored state folder as serve wants to find it.
func kmsRestorer() kmscli.Restorer {
	return kmscli.Restorer{
		StateDir: defaultKMSState, Member: cluster.DefaultName, KeyringName: kmsKeyring,
		NewKeyring: func(path, passphraseFile string) (backup.Adopter, error) {
			p, err := rootkey.FindPassphrase(rootkey.PassphraseSource{File: passphraseFile, Env: "MORTISE_PASSPHRASE_FILE", Credential: "kms-passphrase"}, os.Getenv)
			if err != nil {
				return nil, fmt.Errorf("%w (--root-passphrase-file)", err)
			}
			defer p.Wipe()
			return rootkey.CreateKeyring(path, rootkey.Passphrase(p, 0))
		},
	}
}

const (
	defaultKMSState = "/var/lib/mortise/kms"
	// kmsKeyring is the file of root keys in a state folder.
	kmsKeyring = "crk.sealed"
)
