package kmscli

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/backup"
	"mortise/internal/secret"
)

func backupCommand() *cobra.Command {
	var g connection
	var out, passphrase string
	var recipients []string
	cmd := group(&g, "backup", "Back the key server up while it works",
		`Writes everything that the key server keeps, as of one moment, to one encrypted file:
keys as they are sealed, settings, client certificates, and the root keys where they
can leave their provider. Keys of a PKCS#11 token stay in the token; the backup says
which ones it needs. Clients notice nothing.

The file is sealed to a passphrase (at least 12 bytes), or to age recipients, so that
the machine that makes backups cannot read them; age -d opens it. Whoever has the file
and what opens it has every key: keep the two apart. What is written is read back and
checked.

The key server remembers each backup, because keys that are shredded open again with
it: mortise kms backup ls.`, `  mortise kms backup --passphrase-file backup.passphrase
  mortise kms backup --recipient age1… -o /mnt/backup/kms.age
  mortise kms backup --recipient age1… -o - | ssh vault 'cat > kms.age'
  mortise kms backup verify kms.age --passphrase-file backup.passphrase`,
		backupList(&g), backupVerify(), backupForget(&g))
	cmd.Args = cobra.NoArgs
	cmd.RunE = g.run(func(ctx context.Context, v *verb, _ []string) error {
		return v.makeBackup(ctx, out, passphrase, recipients)
	})
	f := cmd.Flags()
	f.StringVarP(&out, "output", "o", "", "file to write, - for standard output (default: mortise-kms-TIME.age)")
	f.StringVar(&passphrase, "passphrase-file", "", "file with the passphrase to seal the backup with, mode 0600")
	f.StringArrayVar(&recipients, "recipient", nil, "age recipient to seal the backup to (age1…); may be repeated")
	return cmd
}

func (v *verb) makeBackup(ctx context.Context, out, passphraseFile string, recipients []string) error {
	req := admin.MakeBackup{Recipients: recipients}
	switch {
	case passphraseFile != "" && len(recipients) > 0:
		return errors.New("give --passphrase-file or --recipient, not both")
	case passphraseFile != "":
		text, err := readPassphrase(passphraseFile)
		if err != nil {
			return err
		}
		req.Passphrase = text
	case len(recipients) == 0:
		return errors.New("a backup is always encrypted: give --passphrase-file or --recipient")
	}
	defer clear(req.Passphrase)
	if out == "-" {
		if f, ok := v.out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			return errors.New("standard output is a terminal; a backup is no text: redirect it, or give -o FILE")
		}
		return v.MakeBackup(ctx, req, v.out)
	}
	if out == "" {
		out = "mortise-kms-" + v.now.UTC().Format("20060102T150405Z") + ".age"
	}
	n, err := v.backupTo(ctx, out, req)
	if err != nil {
		return err
	}
	return v.show(struct {
		File  string `json:"file"`
		Bytes int64  `json:"bytes"`
	}{out, n}, func() {
		v.say("Wrote %s, %d bytes. Keep it apart from what opens it.", out, n)
	})
}

// backupTo writes the backup beside its name, makes it durable, reads it back,
// and only then gives it its name.
func (v *verb) backupTo(ctx context.Context, out string, req admin.MakeBackup) (n int64, err error) {
	if _, err := os.Lstat(out); err == nil {
		return 0, fmt.Errorf("%s exists; a backup never overwrites anything", out)
	}
	part, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".*") // mode 0600
	if err != nil {
		return 0, err
	}
	defer os.Remove(part.Name())
	defer part.Close()
	sum := sha256.New()
	if err := v.MakeBackup(ctx, req, io.MultiWriter(part, sum)); err != nil {
		return 0, err
	}
	if err := part.Sync(); err != nil {
		return 0, err
	}
	if n, err = sameAsWritten(part, sum); err != nil {
		return 0, err
	}
	if len(req.Passphrase) > 0 { // and it opens
		if err := opens(part.Name(), req.Passphrase); err != nil {
			return 0, err
		}
	}
	if err := os.Link(part.Name(), out); err != nil {
		return 0, err
	}
	dir, err := os.Open(filepath.Dir(out))
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	return n, dir.Sync()
}

func sameAsWritten(f *os.File, written hash.Hash) (int64, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	read := sha256.New()
	n, err := io.Copy(read, f)
	if err == nil && !slices.Equal(read.Sum(nil), written.Sum(nil)) {
		err = fmt.Errorf("%s does not hold what was written to it: the disk is failing", f.Name())
	}
	return n, err
}

func opens(path string, passphrase []byte) error {
	p, err := secret.Copy(passphrase)
	if err != nil {
		return err
	}
	defer p.Wipe()
	id, err := backup.FromPassphrase(p)
	if err != nil {
		return err
	}
	_, err = backup.Verify(path, []age.Identity{id})
	return err
}

// readPassphrase reads a file's one line, the caller's to clear.
func readPassphrase(path string) ([]byte, error) {
	text, err := readPrivate(path)
	if err != nil {
		return nil, fmt.Errorf("--passphrase-file: %w", err)
	}
	n := len(text)
	for n > 0 && (text[n-1] == '\n' || text[n-1] == '\r') {
		n--
	}
	if n == 0 {
		return nil, fmt.Errorf("--passphrase-file: %s is empty", path)
	}
	return text[:n], nil
}

// opener is what opens a backup.
type opener struct{ passphrase, identity string }

func (o *opener) bind(f *pflag.FlagSet) {
	f.StringVar(&o.passphrase, "passphrase-file", "", "file with the passphrase that the backup is sealed with, mode 0600")
	f.StringVar(&o.identity, "identity", "", "file with the age identity that it is sealed to, mode 0600")
}

func (o *opener) identities() ([]age.Identity, error) {
	switch {
	case (o.passphrase == "") == (o.identity == ""):
		return nil, errors.New("give --passphrase-file or --identity: what opens the backup")
	case o.identity != "":
		text, err := readPrivate(o.identity)
		if err != nil {
			return nil, fmt.Errorf("--identity: %w", err)
		}
		defer clear(text)
		return backup.FromIdentities(text)
	}
	text, err := readPassphrase(o.passphrase)
	if err != nil {
		return nil, err
	}
	p, err := secret.Take(text)
	if err != nil {
		return nil, err
	}
	defer p.Wipe()
	id, err := backup.FromPassphrase(p)
	return []age.Identity{id}, err
}

func backupList(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the backups that were made",
		Long: `Lists the backups that the key server knows of. A backup that was not finished is
listed too: a part of it may exist.

JSON: a list of {"id", "time", "by", "crks", "complete", "revision", "records"}.`,
		Example: `  mortise kms backup ls`,
		Args:    needs(),
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.Backups(ctx)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				rows := make([][]string, 0, len(list))
				for _, b := range list {
					whole := "no"
					if b.Complete {
						whole = "yes"
					}
					rows = append(rows, []string{b.ID, b.Time.UTC().Format(time.RFC3339), whole, strconv.FormatInt(b.Records, 10), b.By, strings.Join(b.CRKs, " ")})
				}
				v.table("ID TIME COMPLETE RECORDS BY CRKS", rows)
			})
		}),
	}
}

func backupForget(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "forget ID",
		Short: "Take a backup off the list, when all its copies are gone",
		Long: `Takes a backup off the list. Do it when the file and every copy of it are destroyed:
the list is what says which backups would open shredded keys again.`,
		Example: `  mortise kms backup forget 0d1c2b3a`,
		Args:    needs("ID"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			if err := v.ForgetBackup(ctx, args[0]); err != nil {
				return err
			}
			return v.show(struct {
				ID string `json:"id"`
			}{args[0]}, func() { v.say("Backup %s is off the list.", args[0]) })
		}),
	}
}

// backupVerify needs no key server.
func backupVerify() *cobra.Command {
	var o opener
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Check that a backup is whole, and say what is in it",
		Long: `Opens the backup, reads it to its end and says what is in it. No key server is
needed. A file that is damaged or cut off anywhere is refused.

JSON: {"id", "created", "revision", "records", "objects" (by instance), "crks" (by
kind of provider), "outside" (those that the backup cannot hold), "bytes"}.`,
		Example: `  mortise kms backup verify kms.age --passphrase-file backup.passphrase
  mortise kms backup verify kms.age --identity age.key --json`,
		Args: needs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := o.identities()
			if err != nil {
				return err
			}
			s, err := backup.Verify(args[0], ids)
			if err != nil {
				return err
			}
			json, _ := cmd.Flags().GetBool("json")
			v := &verb{out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), json: json}
			return v.show(s, func() { v.summary(args[0], s) })
		},
	}
	o.bind(cmd.Flags())
	return cmd
}

func (v *verb) summary(path string, s backup.Summary) {
	v.say("%s is whole: backup %s of %s, %d records.", path, s.ID, s.Created.UTC().Format(time.RFC3339), s.Records)
	for _, instance := range slices.Sorted(maps.Keys(s.Objects)) {
		v.say("  instance %s: %d keys and other objects", clean(instance), s.Objects[instance])
	}
	for _, kind := range slices.Sorted(maps.Keys(s.Outside)) {
		v.say("  it needs these root keys of a %s provider, which are not in it: %s", clean(kind), clean(strings.Join(s.Outside[kind], ", ")))
	}
	if inside := s.CRKs[kms.KindFile]; len(inside) > 0 {
		v.say("  root keys in it: %s", clean(strings.Join(inside, ", ")))
	}
}
