package main

import (
	"context"
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"

	"mortise/internal/cli/kmscli"
	"mortise/internal/kms"
	"mortise/internal/kms/backup"
	"mortise/internal/kms/cluster"
	"mortise/internal/kms/unlocking"
	"mortise/internal/tpm"
)

// kmsRestorer lays out a restored state folder as serve wants to find it.
func kmsRestorer() kmscli.Restorer {
	return kmscli.Restorer{
		StateDir: defaultKMSState, Member: cluster.DefaultName, KeyringName: kmsKeyring,
		NewKeyring: func(path string, o kmscli.Sealing) (backup.Adopter, error) {
			return unlocking.NewKeyring(unlocking.Config{
				Keyring:    path,
				Passphrase: word("--root-passphrase-file", o.PassphraseFile, "MORTISE_PASSPHRASE_FILE", "kms-passphrase"),
				TPM:        tpm.Sealer{Device: o.TPMDevice, PCRs: o.TPMPCRs},
				SealToTPM:  o.TPM,
			})
		},
	}
}

// awaitRelease returns when the KMS is not quarantined. A quarantined one is as
// ready as it gets, and systemd must not give up on it.
func awaitRelease(ctx context.Context, k *kms.KMS, log *slog.Logger) error {
	if q, err := k.Quarantined(ctx); err == nil {
		log.Warn("kms is quarantined after a restore: KMIP stays closed until mortise kms restore release", "backup", q.Backup)
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			log.Warn("systemd could not be told that the server is ready", "error", err)
		}
	}
	return k.AwaitRelease(ctx)
}

const (
	defaultKMSState = "/var/lib/mortise/kms"
	// kmsKeyring is the file of root keys in a state folder.
	kmsKeyring = "crk.sealed"
)
