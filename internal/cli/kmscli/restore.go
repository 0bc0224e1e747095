package kmscli

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/kms/admin"
	"mortise/internal/kms/backup"
)

// A Restorer is how this program lays out a state folder.
type Restorer struct {
	// StateDir, Member and KeyringName are where, as whom and with which file of
	// root keys the key server starts unless it is told otherwise.
	StateDir, Member, KeyringName string
	// NewKeyring makes that file at path.
	NewKeyring func(path string, o Sealing) (backup.Adopter, error)
}

// Sealing is what opens a new keyring: the passphrase in a file, where serve finds
// it if no name is given, a TPM, or both.
type Sealing struct {
	PassphraseFile string
	TPM            bool
	TPMDevice      string
	TPMPCRs        []uint
}

// AddRestore adds the verb restore to the command kms.
func AddRestore(parent *cobra.Command, r Restorer) {
	var g connection
	cmd := group(&g, "restore", "Restore a key server from a backup, into quarantine",
		`Makes the state folder of a key server of one member out of a backup, on a machine
that has none. The file is read to its end first: with a wrong passphrase, or damaged,
or cut off, it is refused before anything is written. A restore that was interrupted
is simply run again.

The restored server starts quarantined: it serves no client until you release it.
What was destroyed, revoked or shut out after the backup must not come back alive, so
give it the audit logs of the lost server, each exported with mortise kms audit
export, and, if there are, lists of the key ids that clients hold. What happened after
the backup is then done again, and what was made after it is listed.

  1. mortise kms restore FILE …       on the new machine, as the key server's user
  2. mortise kms serve …              starts quarantined
  3. mortise kms restore status       look at what is missing
  4. mortise kms restore release      lets clients in

Root keys in the backup go to a new sealed file, under the passphrase in
--root-passphrase-file, this machine's TPM with --tpm, or both. Those of a token are
not in a backup: start the server with the token. Members of a cluster join the restored one anew.`,
		`  mortise kms restore kms.age --passphrase-file backup.passphrase \
      --root-passphrase-file /etc/mortise/kms.passphrase --audit kms-1.jsonl --audit kms-2.jsonl
  mortise kms restore status
  mortise kms restore release`, restoreStatus(&g), restoreRelease(&g))
	var o opener
	var audits, held []string
	var sealing Sealing
	cmd.Use = "restore FILE"
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := needs("FILE")(cmd, args); err != nil {
			return err
		}
		ids, err := o.identities()
		if err != nil {
			return err
		}
		opts := backup.Options{
			File: args[0], Identities: ids, StateDir: r.StateDir, Member: r.Member, KeyringName: r.KeyringName,
			NewKeyring: func(path string) (backup.Adopter, error) { return r.NewKeyring(path, sealing) },
		}
		if opts.Aftermath, err = aftermath(audits, held); err != nil {
			return err
		}
		result, err := backup.Restore(cmd.Context(), opts)
		if err != nil {
			return err
		}
		v := &verb{out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), json: g.json}
		return v.show(result, func() { v.restored(r.StateDir, result) })
	}
	f := cmd.Flags()
	o.bind(f)
	f.StringVar(&r.StateDir, "state-dir", r.StateDir, "the new server's folder for keys and settings")
	f.StringVar(&r.Member, "name", r.Member, "the new server's name among its cluster's members")
	f.StringVar(&sealing.PassphraseFile, "root-passphrase-file", "", "file with the passphrase to seal the new server's root keys with, mode 0600")
	f.BoolVar(&sealing.TPM, "tpm", false, "seal them to this machine's TPM 2.0; with a passphrase too, that is a second way in")
	f.StringVar(&sealing.TPMDevice, "tpm-device", "", "the TPM (default: the machine's)")
	f.UintSliceVar(&sealing.TPMPCRs, "tpm-pcrs", nil, "PCRs that must stay as they are, e.g. 0,2,4,7 (default: none)")
	f.StringArrayVar(&audits, "audit", nil, "exported audit log of the lost server (JSON lines); one for each member")
	f.StringArrayVar(&held, "held", nil, "list of key ids that clients hold: a line each, ID or INSTANCE/ID")
	parent.AddCommand(cmd)
}

func aftermath(audits, held []string) (a backup.Aftermath, err error) {
	for _, path := range audits {
		if err := withFile(path, func(f *os.File) error { return a.AddAudit(path, f) }); err != nil {
			return a, err
		}
	}
	for _, path := range held {
		if err := withFile(path, func(f *os.File) error { return a.AddHeld(path, f) }); err != nil {
			return a, err
		}
	}
	return a, nil
}

func withFile(path string, use func(*os.File) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return use(f)
}

func (v *verb) restored(dir string, r *backup.Result) {
	v.summary(dir, r.Summary)
	if r.Quarantine.AuditUntil.IsZero() {
		v.say("No audit log was given: what was destroyed, revoked or shut out after the backup will be as it was before.")
	} else {
		v.say("%d acts after the backup are done again when the server is unlocked; the audit log ends at %s.", len(r.Acts), r.Quarantine.AuditUntil.UTC().Format(time.RFC3339))
	}
	if n := len(r.Quarantine.Missing); n > 0 {
		v.say("%d objects were made after the backup and are not in it:", n)
		for _, m := range r.Quarantine.Missing {
			v.say("  %s %s", clean(m.Instance), clean(m.ID))
		}
	}
	v.say("The server is quarantined. Start it, then: mortise kms restore status")
}

func restoreStatus(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show what the quarantine after a restore waits for",
		Long: `Shows from which backup the key server was restored, what of the time after it was
done again, and what is missing.

JSON: {"quarantined", "restore": {"backup", "created", "revision", "restored",
"auditUntil", "missing": [{"instance", "id", "from"}], "acts"}, "acts": [{"instance",
"operation", "subject", "detail", "time", "by", "revision", "outcome"}]}.`,
		Example: `  mortise kms restore status`,
		Args:    needs(),
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			s, err := v.RestoreStatus(ctx)
			if err != nil {
				return err
			}
			return v.show(s, func() { v.quarantine(s) })
		}),
	}
}

func (v *verb) quarantine(s admin.RestoreStatus) {
	if !s.Quarantined {
		v.say("The key server is not quarantined.")
		return
	}
	q := s.Restore
	v.say("Quarantined: restored %s from backup %s of %s. No client is served.", q.Restored.UTC().Format(time.RFC3339), clean(q.Backup), q.Created.UTC().Format(time.RFC3339))
	rows := make([][]string, 0, len(s.Acts))
	for _, a := range s.Acts {
		outcome := a.Outcome
		if outcome == "" {
			outcome = "not done again yet"
		}
		rows = append(rows, []string{a.Time.UTC().Format(time.RFC3339), a.Instance, a.Operation, a.Subject, outcome})
	}
	if len(rows) > 0 {
		v.say("After the backup:")
		v.table("TIME INSTANCE ACT OBJECT OUTCOME", rows)
	}
	if len(q.Missing) > 0 {
		v.say("Made after the backup, and not in it:")
		for _, m := range q.Missing {
			v.say("  %s %s", clean(m.Instance), clean(m.ID))
		}
	}
	if q.AuditUntil.IsZero() {
		v.say("No audit log was given: what was destroyed, revoked or shut out after the backup is as it was before.")
	}
	v.say("To let clients in: mortise kms restore release")
}

func restoreRelease(g *connection) *cobra.Command {
	var confirm string
	cmd := &cobra.Command{
		Use:   "release",
		Short: "End the quarantine after a restore: clients are served",
		Long: `Ends the quarantine. It shows what is missing or in doubt, and asks; a program gives
the hash of that list with --confirm.`,
		Example: `  mortise kms restore release`,
		Args:    needs(),
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			if err := v.confirmed(confirm, func(hash string) error { return v.Release(ctx, hash) }); err != nil {
				return err
			}
			return v.show(struct {
				Quarantined bool `json:"quarantined"`
			}{}, func() { v.say("The key server serves its clients.") })
		}),
	}
	confirmFlag(cmd.Flags(), &confirm)
	return cmd
}
