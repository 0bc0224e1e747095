package kmscli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/cluster"
)

func memberCommand() *cobra.Command {
	var g connection
	return group(&g, "member", "The machines that are one key server together",
		`Three members keep serving, and keep every acknowledged key, while any one of them is
down or cut off. A key server begins as one member; others join with a token while it
works. Each has its own passphrase file or TPM, and gets the root keys from the others.

To replace a machine: remove its member, then add a new one, of the same name if you
like. A member that is gone counts as down until it is removed.`,
		`  kms-1# mortise kms member add kms-2 --address 10.0.0.1:5698
  kms-2# mortise kms serve --join TOKEN --peer-address 10.0.0.2:5698 --passphrase-file …
  kms-1# mortise kms member ls
  kms-1# mortise kms member remove kms-3`,
		memberAdd(&g), memberList(&g), memberRemove(&g), memberPromote(&g))
}

func memberAdd(g *connection) *cobra.Command {
	var r admin.InviteMember
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a token with which a new member joins",
		Long: `Makes a token for one new member of that name and prints it. It works once, for an
hour unless --minutes says otherwise, and is a secret until then. It proves the two
machines to each other; nothing else is to be copied or typed.

On the new machine, with an empty state folder:

  mortise kms serve --join TOKEN --peer-address HOST:5698 --passphrase-file FILE

A first member that was started without --peer-address is given one here with
--address; it need not be restarted.`,
		Example: `  mortise kms member add kms-2 --address 10.0.0.1:5698
  mortise kms member add kms-3`,
		Args: needs("NAME"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			r.Name = args[0]
			i, err := v.InviteMember(ctx, r)
			if err != nil {
				return err
			}
			return v.show(i, func() {
				v.say("%s", i.Token)
				fmt.Fprintf(v.err, "For %s, once, until %s. On the new machine:\n  mortise kms serve --join TOKEN --peer-address HOST:%d --passphrase-file FILE\n",
					clean(i.Name), i.Expires.Local().Format(time.DateTime), cluster.Port)
			})
		}),
	}
	f := cmd.Flags()
	f.StringVar(&r.Address, "address", "", "where others reach this machine, host:port, if it has no --peer-address yet")
	f.StringVar(&r.Listen, "listen", "", "what it listens on then (default: every interface, the same port)")
	f.IntVar(&r.Minutes, "minutes", 60, "how long the token can be used")
	return cmd
}

func memberList(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the members",
		Long: `Lists the members. A leader orders the writes, followers vote; a learner is catching
up and does not vote yet; one that is joining has a certificate and has not started.`,
		Example: `  mortise kms member ls`,
		Args:    cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			list, err := v.Members(ctx)
			if err != nil {
				return err
			}
			return v.show(list, func() {
				var rows [][]string
				for _, m := range list {
					name := m.Name
					if m.Self {
						name += " *"
					}
					rows = append(rows, []string{name, m.Status, m.Address, m.Version, date(m.Added), m.ID})
				}
				v.table("NAME STATUS ADDRESS VERSION SINCE ID", rows)
			})
		}),
	}
}

func memberRemove(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME|ID",
		Short: "Remove a member for good",
		Long: `Removes a member: it votes no more, its certificate is refused from this moment on,
and its process ends. Nothing is lost: every member has everything. To come back, the
machine joins with an empty state folder and a new token.

If the machine was stolen, its state folder may still give up its root keys to who
knows its passphrase or has its TPM: rotate the root keys then.`,
		Example: `  mortise kms member remove kms-3`,
		Args:    needs("NAME"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			if err := v.RemoveMember(ctx, args[0]); err != nil {
				return err
			}
			return v.show(struct{}{}, func() { v.say("%s is no member any more.", clean(args[0])) })
		}),
	}
}

func memberPromote(g *connection) *cobra.Command {
	return &cobra.Command{
		Use:     "promote NAME",
		Short:   "Let a learner vote",
		Long:    `Lets a learner vote that has caught up. New members do this by themselves.`,
		Example: `  mortise kms member promote kms-3`,
		Args:    needs("NAME"),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			if err := v.PromoteMember(ctx, args[0]); err != nil {
				return err
			}
			return v.show(struct{}{}, func() { v.say("%s votes.", clean(args[0])) })
		}),
	}
}

func clockCommand() *cobra.Command {
	var g connection
	show := func(v *verb, s kms.ClockStatus) error {
		return v.show(s, func() {
			v.say("Cluster time   %s", s.Time.Format(time.RFC3339))
			v.say("This machine   %s", s.Machine.Format(time.RFC3339))
			for _, name := range slices.Sorted(maps.Keys(s.Offsets)) {
				v.say("%-14s %+v", clean(name), s.Offsets[name].Round(time.Millisecond))
			}
			if s.Jump {
				v.say("\nThe clock jumped from %s to %s.\nDates in between wait. If this machine's clock is right: mortise kms clock confirm", s.Earliest.Format(time.RFC3339), s.Time.Format(time.RFC3339))
			}
			if s.Problem != "" {
				v.say("\nThis member serves nobody: %s", clean(s.Problem))
			}
		})
	}
	confirm := &cobra.Command{
		Use:   "confirm",
		Short: "Say that this machine's clock is right after a jump",
		Long: `Makes this machine's clock the cluster's time. Look at the clock first: what dates in
between have brought about happens now, and it cannot be taken back. Keys whose grace
time is over are purged.`,
		Example: `  mortise kms clock
  mortise kms clock confirm`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			s, err := v.ConfirmClock(ctx)
			if err != nil {
				return err
			}
			return show(v, s)
		}),
	}
	cmd := group(&g, "clock", "The time by which keys change their states",
		`Shows the cluster's time and how far the members' clocks are apart. A member whose
clock is off by more than a minute serves nobody. After a jump of more than an hour,
which is what a machine sees that was off for so long, dates in between are not acted
upon until an administrator confirms the clock: a wrong clock must not end or purge
keys.`,
		`  mortise kms clock
  mortise kms clock confirm`, confirm)
	cmd.RunE = g.run(func(ctx context.Context, v *verb, _ []string) error {
		s, err := v.Clock(ctx)
		if err != nil {
			return err
		}
		return show(v, s)
	})
	return cmd
}
