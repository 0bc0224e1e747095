package kmscli

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mortise/internal/kms"
)

// What a finding of doctor means for who depends on the key server.
const (
	good    = "ok"
	advice  = "advice"  // works, and should be better
	problem = "problem" // does not work, or will not soon
	unknown = "unknown" // could not be looked at
)

// A Finding is one thing that doctor has looked at.
type Finding struct {
	Check string `json:"check"`
	Level string `json:"level"`          // "ok", "advice", "problem" or "unknown"
	Found string `json:"found"`          // what it saw
	Mend  string `json:"mend,omitempty"` // what to do
}

// staleBackup is when doctor asks for another one.
const staleBackup = 7 * 24 * time.Hour

func doctorCommand() *cobra.Command {
	var g connection
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check a deployment and say what to mend",
		Long: `Looks at a running key server as its clients and its administrator depend on it:
root keys, members, clocks, endpoints, certificates, instances, audit log, backups, and on the
machine itself memory locks and the space that is left. Each finding that is not
well comes with what to do about it. Nothing is changed.

The exit status is 0 when there is no problem; advice is no problem.`,
		Example: `  mortise kms doctor
  mortise kms doctor --server https://kms1.example.com --api-key-file key --json`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			found := v.examine(ctx)
			if g.here() {
				found = append(found, examineMachine()...)
			}
			problems := 0
			for _, f := range found {
				if f.Level == problem {
					problems++
				}
			}
			if err := v.show(found, func() { v.report(found) }); err != nil {
				return err
			}
			if problems > 0 {
				return fmt.Errorf("%d of %d checks found a problem", problems, len(found))
			}
			return nil
		}),
	}
	g.bind(cmd.Flags())
	return cmd
}

func (v *verb) report(found []Finding) {
	for _, f := range found {
		v.say("%-8s %-14s %s", f.Level, f.Check, clean(f.Found))
		if f.Mend != "" {
			v.say("%-8s %-14s → %s", "", "", clean(f.Mend))
		}
	}
}

// examine runs every check. One that cannot be made is a finding too.
func (v *verb) examine(ctx context.Context) (found []Finding) {
	add := func(check, level, mend, format string, args ...any) {
		found = append(found, Finding{check, level, fmt.Sprintf(format, args...), mend})
	}
	roots, err := v.RootKeyStatus(ctx)
	if err != nil {
		add("server", problem, "start it, and run this as root on its machine or with --server", "%v", err)
		return found
	}
	locked := false
	for _, r := range roots {
		if r.Open {
			add("root-keys", good, "", "%s (%s) is open, sealed by %s", r.Provider, r.Where, r.SealedBy)
			continue
		}
		locked = true
		add("root-keys", problem, "mortise kms unlock", "%s (%s) is locked: no client is served", r.Provider, r.Where)
	}
	v.examineMembers(ctx, add)
	if c, err := v.Clock(ctx); err != nil {
		add("clock", unknown, "", "%v", err)
	} else if c.Problem != "" {
		add("clock", problem, "set the machine's clock, e.g. with chrony; after a jump on purpose: mortise kms clock confirm", "%s", c.Problem)
	} else if name, off := furthest(c.Offsets); off.Abs() > 5*time.Second {
		add("clock", advice, "let every member follow the same time servers", "%s is %s away from this member", name, off.Round(time.Millisecond))
	} else {
		add("clock", good, "", "within %s of the other members", max(off.Abs(), time.Millisecond).Round(time.Millisecond))
	}
	if locked {
		return found // the rest is sealed
	}
	v.examineCRKs(ctx, add)
	v.examineInstances(ctx, add)
	if a, err := v.AuditStatus(ctx); err != nil {
		add("audit", unknown, "", "%v", err)
	} else if a.Problem != "" {
		add("audit", problem, "make room for the audit log: nothing is done that cannot be audited", "%s", a.Problem)
	} else {
		failing := slices.DeleteFunc(slices.Clone(a.Sinks), func(s kms.SinkInfo) bool { return s.Failing.IsZero() })
		switch {
		case len(a.Sinks) == 0:
			add("audit", advice, "set audit_anchor: heads that are kept off the machine show it when somebody with root cuts the log", "%d entries, anchored on this machine only", a.Entries)
		case len(failing) > 0:
			add("audit", problem, "mend that place, or remove it from the configuration", "%s takes no anchors since %s", failing[0].Name, failing[0].Failing.Format(time.RFC3339))
		default:
			add("audit", good, "", "%d entries, anchored in %d places more", a.Entries, len(a.Sinks))
		}
	}
	v.examineBackups(ctx, add)
	return found
}

// examineCRKs looks for root keys that nothing accounts for, and for some that should
// be gone.
func (v *verb) examineCRKs(ctx context.Context, add adder) {
	list, err := v.CRKs(ctx, "")
	if err != nil {
		add("crks", unknown, "", "%v", err)
		return
	}
	odd := 0
	for _, c := range list {
		switch {
		case c.State == kms.CRKOrphan:
			odd++
			add("crks", advice, "if no other key server uses it: mortise kms crk delete "+c.ID, "%s has root key %s, of which there is no record", c.Provider, c.ID)
		case len(c.Waiting) > 0:
			odd++
			add("crks", advice, "start those members; if they are gone for good: mortise kms member remove", "CRK %s is to be destroyed, and %s has it still", c.ID, strings.Join(c.Waiting, ", "))
		}
	}
	if odd == 0 {
		add("crks", good, "", "%d, all recorded", len(list))
	}
}

type adder func(check, level, mend, format string, args ...any)

func (v *verb) examineMembers(ctx context.Context, add adder) {
	members, err := v.Members(ctx)
	if err != nil {
		add("members", unknown, "", "%v", err)
		return
	}
	var voting, versions []string
	for _, m := range members {
		switch m.Status {
		case "leader", "follower":
			voting = append(voting, m.Name)
		default:
			add("members", advice, "it is promoted by itself once it has caught up; if not: mortise kms member ls", "%s is %s", m.Name, m.Status)
		}
		if m.Version != "" && !slices.Contains(versions, m.Version) {
			versions = append(versions, m.Version)
		}
	}
	switch n := len(voting); {
	case n == 1:
		add("members", advice, "mortise kms member add NAME, twice: with three members any one may fail", "one member: while it is down no VM can be powered on")
	case n%2 == 0:
		add("members", advice, "add or remove one: an even number bears no more failures than one less", "%d voting members", n)
	default:
		add("members", good, "", "%d voting members: %s", n, strings.Join(voting, ", "))
	}
	if len(versions) > 1 {
		add("versions", advice, "upgrade the others: new formats wait until every member knows them", "members run %s", strings.Join(versions, " and "))
	}
}

// furthest returns the member whose clock is furthest from ours.
func furthest(offsets map[string]time.Duration) (name string, off time.Duration) {
	for n, o := range offsets {
		if o.Abs() > off.Abs() || name == "" {
			name, off = n, o
		}
	}
	return name, off
}

func (v *verb) examineInstances(ctx context.Context, add adder) {
	instances, err := v.Instances(ctx)
	if err != nil {
		add("instances", unknown, "", "%v", err)
		return
	}
	examineEndpoints(ctx, instances, v.now, add)
	for _, i := range instances {
		check := "instance " + i.ID
		if i.State != kms.InstanceServing {
			level, mend := problem, "mortise kms crk ls: is its root key there, and open?"
			if !i.Ungranted.IsZero() {
				level, mend = advice, "mortise kms instance grant "+i.ID+", if its clients are to be served"
			}
			add(check, level, mend, "its clients are refused: %s", i.Reason)
			continue
		}
		clients, err := v.Clients(ctx, i.ID)
		if err != nil {
			add(check, unknown, "", "%v", err)
			continue
		}
		ending := 0
		for _, c := range clients {
			if w := c.Warning(v.now); w != "" {
				ending++
				level := advice
				if c.Ends().Before(v.now) {
					level = problem
				}
				add(check, level, "mortise kms client renew, or have the client make a new one and add it beside the old", "certificate of %s: %s", c.Name, w)
			}
		}
		switch {
		case len(clients) == 0:
			add(check, advice, "mortise kms client add FILE --instance "+i.ID, "no client certificate may use it")
		case ending == 0:
			add(check, good, "", "%d client certificates, none ending soon", len(clients))
		}
	}
}

func (v *verb) examineBackups(ctx context.Context, add adder) {
	if r, err := v.RestoreStatus(ctx); err == nil && r.Quarantined {
		add("quarantine", problem, "mortise kms restore status, then mortise kms restore release", "the server was restored and serves nobody yet")
	}
	list, err := v.Backups(ctx)
	if err != nil {
		add("backup", unknown, "", "%v", err)
		return
	}
	list = slices.DeleteFunc(list, func(b kms.Backup) bool { return !b.Complete })
	if len(list) == 0 {
		add("backup", problem, "mortise kms backup -o FILE, and keep it where this machine cannot reach it", "there is none: a lost state folder is every key lost")
		return
	}
	last := slices.MaxFunc(list, func(a, b kms.Backup) int { return a.Time.Compare(b.Time) })
	age := v.now.Sub(last.Time)
	if age > staleBackup {
		add("backup", advice, "mortise kms backup, from a timer", "the last one is %d days old; keys made since are in no backup", int(age.Hours()/24))
		return
	}
	add("backup", good, "", "the last one is of %s", last.Time.UTC().Format(time.RFC3339))
}

// here tells whether the key server is on this machine.
func (g *connection) here() bool { return g.server == "" && os.Getenv("MORTISE_KMS_SERVER") == "" }

// examineMachine looks at the machine that the key server runs on.
func examineMachine() (found []Finding) {
	add := func(check, level, mend, format string, args ...any) {
		found = append(found, Finding{check, level, fmt.Sprintf(format, args...), mend})
	}
	swaps, err := os.ReadFile("/proc/swaps")
	switch lines := strings.Split(strings.TrimSpace(string(swaps)), "\n"); {
	case err != nil:
		add("swap", unknown, "", "%v", err)
	case len(lines) > 1:
		add("swap", advice, "turn it off or encrypt it: keys are locked in memory, the rest of the process is not", "this machine swaps to %s", strings.Fields(lines[1])[0])
	default:
		add("swap", good, "", "none")
	}
	var lock unix.Rlimit
	switch err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lock); {
	case err != nil:
		add("memory-lock", unknown, "", "%v", err)
	case lock.Max < 8<<20:
		add("memory-lock", advice, "LimitMEMLOCK=infinity in the service, as in build/package/mortise-kms.service", "a process here may lock %d KiB", lock.Max>>10)
	default:
		add("memory-lock", good, "", "enough for keys")
	}
	return found
}
