package kmscli

import (
	"archive/tar"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/audit"
)

func auditCommand() *cobra.Command {
	var g connection
	return group(&g, "audit", "The log of who did what, and the proof that nobody changed it",
		`Every operation of every client and every act of an administrator is in the audit
log, reads and refusals included, before its answer leaves. Entries are chained and
signed; every second the newest signature is kept in the other members too, and off
the machine if --audit-anchor of mortise kms serve says where.

Each member of a cluster has a log of its own. With --all-members an export has the
entries of all of them.`,
		`  mortise kms audit export --since 24h --all-members > today.jsonl
  mortise kms audit export --all-members > all.jsonl && mortise kms audit verify --export all.jsonl
  mortise kms audit export --folder /srv/audit/kms-1
  mortise kms audit verify --folder /srv/audit/kms-1 --anchors /mnt/logs/anchors.jsonl`,
		auditExport(&g), auditVerify(&g), auditStatus(&g), auditKeys(&g), auditRemove(&g), auditForget(&g))
}

func auditExport(g *connection) *cobra.Command {
	var f kms.AuditFilter
	var since, until, folder string
	var all bool
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Print entries as JSON, one a line, or copy the whole log",
		Long: `Prints the entries that the flags choose to standard output, one JSON object a
line, oldest first. With --instance it needs the role administrator in that instance
only.

Of a cluster, it is the log of the member that is asked. With --all-members that member
asks the others, and all entries come by time; if nothing else chooses entries, lines
among them ("begin", "end") say where each log begins and how it is signed, so that
mortise kms audit verify --export can check them. Every member must be up: where one is
not, ask the others one by one.

With --folder it copies the whole log of the member instead, with its signatures, into
a new folder. mortise kms audit verify --folder checks that on any machine.`,
		Example: `  mortise kms audit export --since 2026-11-01 --object 4be2c0ce-… | jq .
  mortise kms audit export --instance tenant-a --client center --since 7d
  mortise kms audit export --folder /srv/audit/kms-1`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) (err error) {
			if folder != "" {
				if since+until+f.Instance+f.Object+f.Client+f.Operation != "" || f.After > 0 || all {
					return errors.New("--folder copies the whole log of one member: it takes no other choice")
				}
				return v.copyAudit(ctx, folder)
			}
			if f.Since, err = past(since, v.now); err != nil {
				return fmt.Errorf("--since: %w", err)
			}
			if f.Until, err = past(until, v.now); err != nil {
				return fmt.Errorf("--until: %w", err)
			}
			if all {
				if f.After > 0 {
					return errors.New("--after is a number of one member's log: it does not go with --all-members; --since does")
				}
				return v.ExportAuditOfAll(ctx, f, v.out)
			}
			return v.ExportAudit(ctx, f, func(r audit.Record) error { return r.WriteJSON(v.out) })
		}),
	}
	fl := cmd.Flags()
	fl.StringVar(&since, "since", "", "from then on: 2026-11-01, 2026-11-01T12:00:00Z, or 24h or 7d ago")
	fl.StringVar(&until, "until", "", "before then")
	fl.StringVar(&f.Instance, "instance", "", "of this instance")
	fl.StringVar(&f.Object, "object", "", "about this object")
	fl.StringVar(&f.Client, "client", "", "of this client: its name or fingerprint")
	fl.StringVar(&f.Operation, "operation", "", "of this operation: Get, Destroy, …")
	fl.Uint64Var(&f.After, "after", 0, "with a higher number: to go on where an earlier export ended")
	fl.StringVar(&folder, "folder", "", "copy the whole log into this new folder")
	fl.BoolVar(&all, "all-members", false, "of every member's log, by time")
	return cmd
}

// past reads a time that is over: a date, or so long ago. Empty is the zero time.
func past(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	t, err := moment(text, now)
	if err != nil {
		return t, err
	}
	if c := text[len(text)-1]; c != 'Z' && (c < '0' || c > '9') { // a duration
		return now.Add(-t.Sub(now)), nil
	}
	return t, nil
}

// maxArchived bounds a file of an archive, in bytes: a segment has at most 4 GiB.
const maxArchived = 5 << 30

// copyAudit brings the log's archive into a new folder.
func (v *verb) copyAudit(ctx context.Context, folder string) error {
	if err := os.Mkdir(folder, 0o700); err != nil {
		return fmt.Errorf("--folder: %w", err)
	}
	r, w := io.Pipe()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := v.ArchiveAudit(ctx, w)
		w.CloseWithError(err)
		return err
	})
	files := 0
	g.Go(func() (err error) {
		defer func() { r.CloseWithError(errors.Join(err, io.ErrClosedPipe)) }()
		t := tar.NewReader(r)
		for {
			h, err := t.Next()
			if errors.Is(err, io.EOF) {
				_, err := io.Copy(io.Discard, r) // what pads the archive
				return err
			}
			if err != nil {
				return err
			}
			if h.Typeflag != tar.TypeReg || h.Name != filepath.Base(h.Name) || h.Name == ".." || h.Size > maxArchived {
				return fmt.Errorf("the archive has something in it that does not belong there: %q", h.Name)
			}
			f, err := os.OpenFile(filepath.Join(folder, h.Name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			_, err = io.Copy(f, t)
			if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
				return err
			}
			files++
		}
	})
	if err := g.Wait(); err != nil {
		return fmt.Errorf("copying the audit log to %s: %w", folder, err)
	}
	v.say("%d files of the audit log are in %s. Check them with: mortise kms audit verify --folder %[2]s", files, folder)
	return nil
}

// errTampered makes the verb fail when something was found; what, was printed.
var errTampered = errors.New("the audit log is not what the key server wrote")

func auditVerify(g *connection) *cobra.Command {
	var folder, export string
	var anchors, keys []string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Find what was removed, changed, moved, repeated or cut off",
		Long: `Recomputes the chain of the log and holds it against every signature, and against
the anchors that were kept elsewhere.

Without --folder the key server checks its own log, against the anchors in its store.
Whoever has taken over the key server can make that lie: to be sure, check a copy on
another machine, with --folder, with anchors from a place that the key server cannot
change (--anchors, a file that --audit-anchor of mortise kms serve wrote or what syslog
received), and with the public key that you noted when the key server was set up
(--key, see mortise kms audit keys).

--export checks a file that mortise kms audit export --all-members wrote, each member's
log by itself. It finds the same, and with --anchors also a log that is missing whole.

What no anchor covers, usually the last second, cannot be vouched for. The exit code is
1 if anything was found.`,
		Example: `  mortise kms audit verify
  mortise kms audit verify --folder /srv/audit/kms-1 --anchors /mnt/logs/anchors.jsonl --key 3b6a27bc…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if folder != "" && export != "" {
				return errors.New("either --folder or --export")
			}
			if folder+export == "" {
				if len(anchors)+len(keys) > 0 {
					return errors.New("--anchors and --key go with --folder or --export")
				}
				return g.run(func(ctx context.Context, v *verb, _ []string) error {
					r, err := v.VerifyAudit(ctx)
					if err != nil {
						return err
					}
					return v.showReport(r)
				})(cmd, args)
			}
			v := &verb{out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), json: g.json}
			var o audit.VerifyOptions
			for _, path := range anchors {
				list, err := audit.ReadAnchors(path)
				if err != nil {
					return fmt.Errorf("--anchors: %w", err)
				}
				o.Anchors = append(o.Anchors, list...)
			}
			for _, text := range keys {
				key, err := hex.DecodeString(text)
				if err != nil || len(key) != ed25519.PublicKeySize {
					return fmt.Errorf("--key: %q is no public key: 64 hexadecimal digits", text)
				}
				o.Keys = append(o.Keys, key)
			}
			if export != "" {
				list, err := audit.VerifyExportFile(export, o)
				if err != nil {
					return fmt.Errorf("--export: %w", err)
				}
				for _, r := range list {
					err = errors.Join(err, v.showReport(r))
				}
				if err != nil {
					return errTampered
				}
				return nil
			}
			r, err := audit.Verify(folder, o)
			if err != nil {
				return err
			}
			return v.showReport(r)
		},
	}
	f := cmd.Flags()
	f.StringVar(&folder, "folder", "", "check the copy in this folder, without a key server")
	f.StringVar(&export, "export", "", "check this export of all members, without a key server")
	f.StringArrayVar(&anchors, "anchors", nil, "file with anchors, one JSON object a line (may be repeated)")
	f.StringArrayVar(&keys, "key", nil, "public key that may have signed, hexadecimal (may be repeated)")
	return cmd
}

func (v *verb) showReport(r audit.Report) error {
	err := v.show(r, func() {
		in := ""
		if r.Segments > 0 {
			in = fmt.Sprintf(" in %d segments", r.Segments)
		}
		v.say("Log %s of member %s: entries %d to %d%s.", r.Log, clean(r.Member), r.First, r.Last, in)
		v.say("%d signed heads and %d anchors agree with it; they vouch for it up to entry %d.", r.Heads, r.Anchors, r.Signed)
		if r.Last > r.Signed {
			v.say("Entries %d to %d are newer than that: nothing vouches for them yet.", r.Signed+1, r.Last)
		}
		for _, k := range r.Keys {
			if r.Trusted {
				v.say("Signed by %s.", k)
			} else {
				v.say("Signed by %s: compare it with the key that you noted.", k)
			}
		}
		for _, t := range r.Tombstones {
			v.say("Entries %d to %d were removed by %s at %s: %s.", t.First, t.Last, clean(t.By), t.Time.Format(time.RFC3339), clean(t.Reason))
		}
		for _, p := range r.Problems {
			where := ""
			if p.File != "" {
				where = fmt.Sprintf(" (%s, offset %d)", p.File, p.Offset)
			}
			v.say("%s: %s%s", p.Kind, clean(p.Text), where)
		}
		if r.OK() {
			v.say("Nothing was changed.")
		}
	})
	if err == nil && !r.OK() {
		err = errTampered
	}
	return err
}

func auditStatus(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Show how the log stands",
		Example: `  mortise kms audit status --json`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			s, err := v.AuditStatus(ctx)
			if err != nil {
				return err
			}
			return v.show(s, func() {
				v.say("Log %s of member %s: %d entries, %d segments, %d bytes.", s.Log, clean(s.Member), s.Entries, s.Segments, s.Bytes)
				v.say("Anchored up to entry %d; %d entries of changes wait in the store.", s.Anchored, s.Waiting)
				for _, k := range s.Sinks {
					if k.Failing.IsZero() {
						v.say("Anchors in %s up to entry %d.", clean(k.Name), k.Anchored)
					} else {
						v.say("Anchors in %s fail since %s.", clean(k.Name), k.Failing.UTC().Format(time.RFC3339))
					}
				}
				if s.Problem != "" {
					v.say("Nothing is served: %s.", clean(s.Problem))
				}
			})
		}),
	}
}

func auditKeys(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "keys",
		Short: "List the public keys that members sign with",
		Long: `Lists the Ed25519 public keys with which the members sign their logs. Note them
somewhere else when the key server is set up: mortise kms audit verify --key then trusts
nothing that the key server says later.`,
		Example: `  mortise kms audit keys > audit-keys-of-the-cluster`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.AuditKeys(ctx)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				var rows [][]string
				for _, k := range list {
					rows = append(rows, []string{k.Member, k.Key.String()})
				}
				v.table("MEMBER KEY", rows)
			})
		}),
	}
}

func auditRemove(g *connection) *cobra.Command {
	var before, reason string
	cmd := &cobra.Command{
		Use:   "remove",
		Short: "Remove old parts of the log, leaving a signed tombstone",
		Long: `Removes the closed segments that were written before a time. A signed tombstone
with your name and reason takes their place, and carries the chain over them: that
entries are gone is seen for ever, and nobody can remove others in its name. Keep a
copy first: mortise kms audit export --folder.

Only on the key server's own machine, through its admin socket.`,
		Example: `  mortise kms audit remove --before 400d --reason "kept for a year, see ARCHIVE-7"`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			t, err := past(before, v.now)
			if err != nil {
				return fmt.Errorf("--before: %w", err)
			}
			stone, err := v.RemoveAudit(ctx, admin.RemoveAudit{Before: t, Reason: reason})
			if err != nil {
				return err
			}
			return v.show(stone, func() {
				v.say("Entries %d to %d are removed; a tombstone says so.", stone.First, stone.Last)
			})
		}),
	}
	f := cmd.Flags()
	f.StringVar(&before, "before", "", "what was written before then: 2026-01-01, or 400d ago")
	f.StringVar(&reason, "reason", "", "for those who find the tombstone")
	_ = cmd.MarkFlagRequired("before")
	_ = cmd.MarkFlagRequired("reason")
	return cmd
}

func auditForget(g *connection) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "forget LOG",
		Short: "Take note that a log is gone for good",
		Long: `A log of this member that the store has a signed head of, and that is not there any
more, makes mortise kms audit verify fail: somebody may have removed it. If you know
why it is gone, say so; that you did is in the log that is there now.

Only on the key server's own machine, through its admin socket.`,
		Example: `  mortise kms audit forget 310e6601d78f602fbf7c476237494c34 --reason "disk died, ticket 4711"`,
		Args:    needs("LOG"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			if err := v.ForgetAudit(ctx, args[0], reason); err != nil {
				return err
			}
			return v.show(struct {
				Log    string `json:"log"`
				Reason string `json:"reason"`
			}{args[0], reason}, func() { v.say("Log %s is forgotten.", clean(args[0])) })
		}),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why it is gone")
	_ = cmd.MarkFlagRequired("reason")
	return cmd
}
