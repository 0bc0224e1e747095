package kmscli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/rootkey"
	"mortise/internal/secret"
)

func crkCommand() *cobra.Command {
	var g connection
	cmd := group(&g, "crk", "Customer root keys: what wraps everything else",
		`A customer root key (CRK) wraps the keys of one instance. It is kept by a root-key
provider: the member's keyring (STATE/crk.sealed, opened by a passphrase or a TPM),
or a PKCS#11 token. Whoever destroys it destroys every key of the instance.

Rotating a CRK re-wraps a few keys and takes no pause. The old CRK is kept, retired,
because backups of its time need it; delete it when they are gone.`,
		`  mortise kms crk ls
  mortise kms crk import root.key              bring your own key
  mortise kms crk rotate --instance prod --to 5f0c…
  mortise kms crk delete 77aa…`,
		crkList(&g), crkImport(&g), crkRotate(&g), crkDelete(&g))
	return cmd
}

func crkList(g *connection) *cobra.Command {
	var instance string
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the CRKs",
		Long: `Lists the CRKs with their states: making and unused (no instance is under it yet),
active, retired (kept for backups of its time), destroying (some member still has it),
destroyed. An orphan is a root key at this member's provider that the key server has
no record of: another key server's, if the two share a token, or left behind by an
interrupted start of an old release. If nobody needs it: mortise kms crk delete ID.`,
		Example: `  mortise kms crk ls`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.CRKs(ctx, instance)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				var rows [][]string
				orphans := 0
				for _, c := range list {
					state := string(c.State)
					if c.State == kms.CRKOrphan {
						orphans++
					}
					use := c.Instance
					if c.Use != "" {
						use = "(" + c.Use + ")"
					}
					if len(c.Waiting) > 0 {
						state += ", waits for " + strings.Join(c.Waiting, " ")
					}
					rows = append(rows, []string{c.ID, use, state, c.Provider, date(c.Created), c.CheckValue})
				}
				v.table("ID INSTANCE STATE PROVIDER CREATED CHECK-VALUE", rows)
				if orphans > 0 {
					v.say("An orphan is in no record of this key server. If no other key server uses this provider, remove it: mortise kms crk delete ID")
				}
			})
		}),
	}
	cmd.Flags().StringVar(&instance, "instance", "", "only those of this instance")
	return cmd
}

func crkImport(g *connection) *cobra.Command {
	var provider, expect string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Bring your own CRK",
		Long: `Imports a CRK that you have made elsewhere: 32 bytes (AES-256), in FILE of mode 0600
or, with -, on standard input, as raw bytes, 64 hexadecimal digits or base64. It is
kept by the key server's root-key provider; FILE is yours to destroy.

The key check value that is shown is what PKCS#11 calls CKA_CHECK_VALUE: the first
three bytes of a block of zeros encrypted under the key. Compare it with the one that
your hardware shows. An imported CRK does nothing until an instance is put under it:
mortise kms crk rotate --to ID. Only on the admin socket.`,
		Example: `  openssl rand -hex 32 | mortise kms crk import -`,
		Args:    needs("FILE"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			var text []byte
			var err error
			if args[0] == "-" {
				text, err = v.input("-")
			} else {
				text, err = readPrivate(args[0])
			}
			if err != nil {
				return err
			}
			defer clear(text)
			key, err := parseCRK(text)
			if err != nil {
				return err
			}
			defer key.Wipe()
			check, err := rootkey.CheckValue(key)
			if err != nil {
				return err
			}
			if expect != "" && !strings.EqualFold(expect, check) {
				return fmt.Errorf("the key in %s has check value %s, not %s: it is another key; nothing was imported", args[0], check, expect)
			}
			c, err := v.ImportCRK(ctx, provider, key)
			if err != nil {
				return err
			}
			return v.show(c, func() {
				v.say("CRK %s, key check value %s.", c.ID, c.CheckValue)
				v.say("Put an instance under it: mortise kms crk rotate --instance NAME --to %s", c.ID)
			})
		}),
	}
	cmd.Flags().StringVar(&provider, "provider", "", "who keeps it: file or pkcs11 (default: the only one)")
	cmd.Flags().StringVar(&expect, "check-value", "", "refuse a key with another check value (6 hexadecimal digits)")
	return cmd
}

// parseCRK reads a key of 32 bytes: raw, in hexadecimal or in base64.
func parseCRK(text []byte) (*secret.Key, error) {
	const size = 32
	if len(text) == size {
		return secret.Copy(text)
	}
	line := bytes.TrimSpace(text)
	b := make([]byte, base64.StdEncoding.DecodedLen(len(line))+size)
	defer clear(b)
	if len(line) == 2*size {
		if n, err := hex.Decode(b, line); err == nil {
			return secret.Copy(b[:n])
		}
	}
	for _, e := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding} {
		if n, err := e.Strict().Decode(b, line); err == nil && n == size {
			return secret.Copy(b[:n])
		}
	}
	return nil, errors.New("a CRK is 32 bytes: raw, or as 64 hexadecimal digits, or in base64; this is none of them")
}

func crkRotate(g *connection) *cobra.Command {
	var instance string
	var r admin.RotateCRK
	var wait bool
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Put an instance under another CRK",
		Long: `Wraps the keys of an instance under a new CRK, or under one that was imported. Clients
notice nothing. The old CRK stays, retired, for backups of its time; delete it with
mortise kms crk delete when they are gone. --provider moves the CRK to another kind of
provider, such as from the keyring into a token.`,
		Example: `  mortise kms crk rotate --instance prod
  mortise kms crk rotate --instance prod --provider pkcs11`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			s, err := v.RotateCRK(ctx, instance, r)
			if err != nil {
				return err
			}
			return v.follow(ctx, s, wait)
		}),
	}
	instanceFlag(cmd, &instance)
	cmd.Flags().StringVar(&r.CRK, "to", "", "id of an imported CRK (default: a new one)")
	cmd.Flags().StringVar(&r.Provider, "provider", "", "who makes the new one: file or pkcs11 (default: as now)")
	waitFlag(cmd, &wait)
	return cmd
}

func crkDelete(g *connection) *cobra.Command {
	var hash string
	cmd := &cobra.Command{
		Use:   "delete CRK",
		Short: "Destroy a CRK, and all that only it opens",
		Long: `Destroys a CRK on every member. If an instance is under it, the instance stops serving
at once and all its keys are lost: VMs that need them do not start again. What is lost
is listed first and must be confirmed. What may still open old copies is listed by
mortise kms key status.`,
		Example: `  mortise kms crk delete 4be2c0ce-8f0e-4a3b-9d7e-0c5b7f6f2a11
  mortise kms crk delete 4be2c0ce-8f0e-4a3b-9d7e-0c5b7f6f2a11 --confirm HASH     from a script`,
		Args: needs("CRK"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			err := v.confirmed(hash, func(h string) error { return v.DeleteCRK(ctx, args[0], h) })
			if err != nil {
				return err
			}
			return v.show(struct{}{}, func() { v.say("CRK %s is being destroyed on every member; see: mortise kms crk ls", args[0]) })
		}),
	}
	confirmFlag(cmd.Flags(), &hash)
	return cmd
}

func keyCommand() *cobra.Command {
	var g connection
	var instance string
	cmd := group(&g, "key", "An instance's key, and what becomes of destroyed keys",
		`The instance key seals every record of an instance; the CRK wraps it. Destroying a key
goes in steps, and mortise says which it has come to:

  destroyed   no client is served it any more; its bytes are kept for 7 days
  purged      its bytes are gone from the record, but not from the store's past
              (old revisions, logs) and not from backups
  shredded    the instance has another key and another CRK, and the old CRK is
              destroyed on every member: nothing in the system opens what is left`,
		`  mortise kms key status --instance prod
  mortise kms key rotate --instance prod
  mortise kms key shred --instance prod --purge`,
		keyStatus(&g, &instance), keyRotate(&g, &instance), keyPurge(&g, &instance), keyShred(&g, &instance))
	instanceFlag(cmd, &instance)
	return cmd
}

func keyStatus(g *connection, instance *string) *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Show how the keys stand, what is being changed, and what still opens destroyed keys",
		Example: `  mortise kms key status --instance tenant-a`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			s, err := v.KeyStatus(ctx, *instance)
			if err != nil {
				return err
			}
			return v.show(s, func() { v.keyStatus(s) })
		}),
	}
}

func (v *verb) keyStatus(s kms.KeyStatus) {
	v.say("Instance %s: key of generation %d, under CRK %s (%s).", s.Instance, s.Generation, s.CRK, s.Provider)
	if c := s.Change; c != nil {
		v.say("%s", changeLine(c))
	}
	if len(s.Destroyed) == 0 {
		v.say("No key is destroyed.")
		return
	}
	var rows [][]string
	for _, d := range s.Destroyed {
		rows = append(rows, []string{d.ID, date(d.Destroyed), d.Bytes, date(d.PurgeAfter)})
	}
	v.table("KEY DESTROYED BYTES KEPT-UNTIL", rows)
	v.say("What could still bring back their bytes:")
	for _, l := range s.StillOpens {
		v.say("  %s", clean(l))
	}
}

func changeLine(c *kms.KeyChange) string {
	line := fmt.Sprintf("%s, begun by %s at %s", c.Kind, clean(c.By), c.Begun.UTC().Format(time.RFC3339))
	if c.Stage == "" {
		return line + ": done at " + c.Ended.UTC().Format(time.RFC3339) + "."
	}
	line += ": at " + c.Stage
	if c.Total > 0 {
		line += fmt.Sprintf(", %d of %d records", c.Done, c.Total)
	}
	if c.Failure != "" {
		line += "; held up: " + clean(c.Failure)
	}
	return line + "."
}

// follow shows a change of keys, to its end if it is to be waited for.
func (v *verb) follow(ctx context.Context, s kms.KeyStatus, wait bool) error {
	last := ""
	for wait && s.Change != nil && s.Change.Stage != "" {
		if line := changeLine(s.Change); line != last && !v.json {
			fmt.Fprintln(v.err, line)
			last = line
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w; the change goes on: see mortise kms key status", ctx.Err())
		}
		var err error
		if s, err = v.KeyStatus(ctx, s.Instance); err != nil {
			return err
		}
	}
	return v.show(s, func() {
		if s.Change != nil {
			v.say("%s", changeLine(s.Change))
		}
	})
}

func waitFlag(cmd *cobra.Command, wait *bool) {
	cmd.Flags().BoolVar(wait, "wait", true, "wait until it is done; it goes on without")
}

func keyRotate(g *connection, instance *string) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace an instance's key and re-seal its records",
		Long: `Makes a new instance key. New records are sealed with it at once, the others in the
background while clients work. Interrupted, it goes on by itself.`,
		Example: `  mortise kms key rotate --instance tenant-a`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			s, err := v.RotateKey(ctx, *instance)
			if err != nil {
				return err
			}
			return v.follow(ctx, s, wait)
		}),
	}
	waitFlag(cmd, &wait)
	return cmd
}

func keyPurge(g *connection, instance *string) *cobra.Command {
	var hash string
	var all bool
	cmd := &cobra.Command{
		Use:   "purge [KEY]...",
		Short: "Drop the bytes of destroyed keys before their 7 days are over",
		Long: `Drops the bytes of destroyed keys from their records now. The store's past and backups
still have them; see mortise kms key shred.`,
		Example: `  mortise kms key purge 6f1e… 0b2a…
  mortise kms key purge --all`,
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name the keys to purge, or give --all")
			}
			var p admin.Purged
			err := v.confirmed(hash, func(h string) (err error) {
				p, err = v.PurgeKeys(ctx, *instance, args, h)
				return err
			})
			if err != nil {
				return err
			}
			return v.show(p, func() { v.say("%d keys are purged.", p.Count) })
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "all destroyed keys of the instance")
	confirmFlag(cmd.Flags(), &hash)
	return cmd
}

func keyShred(g *connection, instance *string) *cobra.Command {
	var hash string
	var purge, wait bool
	cmd := &cobra.Command{
		Use:   "shred",
		Short: "Make destroyed keys unreadable wherever old copies of them are",
		Long: `Shreds the purged keys of an instance: a new instance key, everything that survives
sealed by it, a new CRK, and the old CRKs destroyed on every member. Then nothing in
the system opens old bytes, in the store's past or in copies of its folder. It goes on
by itself when it is interrupted, and waits for members that are away.

Copies of the store from before open afterwards only with what is outside the system:
backups have their CRKs inside; an imported CRK may have been kept by who made it; a
copy of crk.sealed opens with the passphrase of its time. mortise kms key status lists
them.`,
		Example: `  mortise kms key purge --all && mortise kms key shred`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			var s kms.KeyStatus
			err := v.confirmed(hash, func(h string) (err error) {
				s, err = v.ShredKeys(ctx, *instance, purge, h)
				return err
			})
			if err != nil {
				return err
			}
			return v.follow(ctx, s, wait)
		}),
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "purge first what is destroyed and still within its 7 days")
	waitFlag(cmd, &wait)
	confirmFlag(cmd.Flags(), &hash)
	return cmd
}

func unlockCommand() *cobra.Command {
	var g connection
	var provider, file string
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Give a locked key server its passphrase or PIN",
		Long: `Opens the root keys of a key server that was started without its passphrase, TPM or
PIN and has no unlocked peer. Until then it serves nobody on the KMIP port. The secret
is read from the terminal without echo, or from --secret-file (mode 0600).`,
		Example: `  mortise kms unlock
  mortise kms unlock --secret-file /run/secrets/kms.passphrase`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.RootKeyStatus(ctx)
			if err != nil {
				return err
			}
			var target *admin.RootKeyStatus
			for _, s := range list {
				if !s.Open && (provider == "" || provider == s.Provider) {
					target = &s
					break
				}
			}
			if target == nil {
				return v.show(list, func() { v.say("Its root keys are open already.") })
			}
			p, err := v.secret(file, fmt.Sprintf("%s of %s: ", strings.ToUpper(target.SealedBy[:1])+target.SealedBy[1:], target.Where))
			if err != nil {
				return err
			}
			defer p.Wipe()
			if err := v.Unlock(ctx, target.Provider, p); err != nil {
				return err
			}
			if list, err = v.RootKeyStatus(ctx); err != nil {
				return err
			}
			return v.show(list, func() { v.say("The %s root keys are open.", target.Provider) })
		}),
	}
	g.bind(cmd.Flags())
	cmd.Flags().StringVar(&provider, "provider", "", "what to open: file or pkcs11 (default: what is locked)")
	cmd.Flags().StringVar(&file, "secret-file", "", "file with the passphrase or PIN, mode 0600")
	return cmd
}

func passphraseCommand() *cobra.Command {
	var g connection
	var oldFile, newFile string
	change := &cobra.Command{
		Use:   "change",
		Short: "Seal this member's keyring by another passphrase",
		Long: `Seals STATE/crk.sealed of this member by another passphrase. The ring's own key changes
too, so that an old copy of the file with the old passphrase does not open what comes
later. Change what the service reads its passphrase from as well. Each member has a
keyring of its own.`,
		Example: `  mortise kms passphrase change
  mortise kms passphrase change --old-file old --new-file new`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			old, err := v.secret(oldFile, "Present passphrase: ")
			if err != nil {
				return err
			}
			defer old.Wipe()
			fresh, err := v.secret(newFile, "New passphrase: ")
			if err != nil {
				return err
			}
			defer fresh.Wipe()
			if newFile == "" {
				again, err := v.secret("", "New passphrase again: ")
				if err != nil {
					return err
				}
				defer again.Wipe()
				if !again.Equal(fresh) {
					return errors.New("the two new passphrases differ; nothing was changed")
				}
			}
			if err := v.ChangePassphrase(ctx, old, fresh); err != nil {
				return err
			}
			return v.show(struct{}{}, func() {
				v.say("The keyring is sealed by the new passphrase. Put it where the service reads it, too.")
			})
		}),
	}
	change.Flags().StringVar(&oldFile, "old-file", "", "file with the present passphrase, mode 0600")
	change.Flags().StringVar(&newFile, "new-file", "", "file with the new passphrase, mode 0600")
	return group(&g, "passphrase", "The passphrase of a member's keyring", "The passphrase that seals the root keys of a member.", "  mortise kms passphrase change", change)
}

// secret reads a passphrase or PIN from a file or, without echo, from the
// terminal.
func (v *verb) secret(file, prompt string) (*secret.Key, error) {
	if file != "" {
		return rootkey.ReadPassphrase(file)
	}
	f, ok := v.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil, errors.New("standard input is not a terminal, and no file with the secret was given")
	}
	fmt.Fprint(v.err, clean(prompt)+" ")
	b, err := term.ReadPassword(int(f.Fd()))
	fmt.Fprintln(v.err)
	if err != nil {
		return nil, fmt.Errorf("reading without echo: %w", err)
	}
	if len(b) == 0 {
		return nil, errors.New("nothing was typed")
	}
	return secret.Take(b)
}
