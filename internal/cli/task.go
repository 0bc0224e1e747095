package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func taskCommand() *cobra.Command {
	g := &globals{}
	return group(g, "task", "See, await, hold back and cancel what center is working on",
		`Whatever takes time is a task at center. A task goes on when the verb that began it
ends, when its session ends, and after center or a host was restarted or killed:
it resumes where it was.`,
		`  mortise task ls
  mortise task watch task-14
  mortise task limit task-14 --rate 50M
  mortise task cancel task-14`,
		taskLs(g), taskWatch(g), taskPause(g), taskResume(g), taskLimit(g), taskCancel(g))
}

// taskJSON is a task in JSON.
type taskJSON struct {
	Task       string     `json:"task"`
	Name       string     `json:"name"`
	Entity     string     `json:"entity,omitempty"`
	EntityName string     `json:"entityName,omitempty"`
	State      string     `json:"state"`
	Percent    float64    `json:"percent"`
	Stage      string     `json:"stage,omitempty"`
	DoneBytes  int64      `json:"doneBytes,omitempty"`
	TotalBytes int64      `json:"totalBytes,omitempty"`
	Rate       int64      `json:"rate,omitempty"`        // bytes per second
	Left       int64      `json:"secondsLeft,omitempty"` // at that rate
	Paused     bool       `json:"paused,omitempty"`
	Limit      int64      `json:"limit,omitempty"` // bytes per second
	User       string     `json:"user,omitempty"`
	Queued     time.Time  `json:"queued"`
	Started    *time.Time `json:"started,omitempty"`
	Finished   *time.Time `json:"finished,omitempty"`
	Cancelable bool       `json:"cancelable"`
	Error      string     `json:"error,omitempty"`
	Result     string     `json:"result,omitempty"` // reference of what it made
}

const taskFields = `"task", "name", "entity", "entityName", "state" (queued, running, success,
error), "percent", "stage", "doneBytes", "totalBytes", "rate" and "limit" (bytes a
second), "secondsLeft", "paused", "user", "queued",
"started", "finished", "cancelable", "error", "result" (reference of what it made)`

func newTaskJSON(i *types.TaskInfo) taskJSON {
	st := taskState(i)
	t := taskJSON{
		Task: i.Task.Value, Name: taskName(i), EntityName: i.EntityName, State: string(i.State),
		Percent: 100 * st.fraction(), Stage: st.stage, DoneBytes: st.done, TotalBytes: st.total,
		Rate: int64(st.rate), Left: int64(st.left.Seconds()), Paused: st.paused, Limit: st.limit,
		Queued: i.QueueTime, Started: i.StartTime, Finished: i.CompleteTime, Cancelable: i.Cancelable,
	}
	if i.State == types.TaskInfoStateSuccess {
		t.Percent = 100
	}
	if i.Entity != nil {
		t.Entity = i.Entity.Value
	}
	if r, ok := i.Reason.(*types.TaskReasonUser); ok {
		t.User = r.UserName
	}
	if i.Error != nil {
		t.Error = localized(i.Error)
	}
	if r, ok := i.Result.(types.ManagedObjectReference); ok {
		t.Result = r.Value
	}
	return t
}

// taskState is how far a task is. center tells stage and bytes in the progress
// details, which clients of other makes leave alone.
func taskState(i *types.TaskInfo) state {
	st := state{percent: float64(i.Progress)}
	for _, d := range i.ProgressDetails {
		switch v := d.Value.(type) {
		case string:
			if d.Key == "stage" {
				st.stage = v
			}
		case bool:
			st.paused = st.paused || d.Key == "paused" && v
		case int64:
			switch d.Key {
			case "bytesPerSecond":
				st.rate = float64(v)
			case "secondsLeft":
				st.left = time.Duration(v) * time.Second
			case "limitBytesPerSecond":
				st.limit = v
			case "doneBytes":
				st.done = v
			case "totalBytes":
				st.total = v
			}
		}
	}
	return st
}

// taskName is what a task does: "VirtualMachine.reconfigure".
func taskName(i *types.TaskInfo) string {
	return cmp.Or(i.DescriptionId, i.Name, "task")
}

func taskLs(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the tasks that run and the recent ones",
		Long: `Lists the tasks that run, wait or ended lately, the newest last.

JSON: a list of {` + taskFields + `}.`,
		Example: `  mortise task ls
  mortise task ls --json | jq '.[] | select(.state == "error") | .error'`,
		Args: needs(),
		RunE: g.verb(func(ctx context.Context, c *client, _ []string) error { return c.listTasks(ctx) }),
	}
}

func (c *client) listTasks(ctx context.Context) error {
	tasks, err := c.recentTasks(ctx)
	if err != nil {
		return err
	}
	list := []taskJSON{}
	for _, t := range tasks {
		list = append(list, newTaskJSON(&t))
	}
	if c.json {
		return c.printJSON(list)
	}
	t := newTable(c.out, "TASK", "WHAT", "ON", "STATE", "BY", "BEGUN", "PROGRESS")
	now := time.Now()
	for _, i := range list {
		progress := fmt.Sprintf("%.0f%%", i.Percent)
		switch i.State {
		case string(types.TaskInfoStateRunning):
			if i.TotalBytes > 0 {
				progress += fmt.Sprintf(" (%s of %s)", size(i.DoneBytes), size(i.TotalBytes))
			}
			if i.Rate > 0 && !i.Paused {
				progress += fmt.Sprintf(" %s/s", size(i.Rate))
			}
			if i.Stage != "" {
				progress += " " + i.Stage
			}
			if i.Paused {
				progress += ", paused"
			}
		case string(types.TaskInfoStateError):
			progress = i.Error
		case string(types.TaskInfoStateSuccess):
			progress = ""
		}
		t.row(i.Task, i.Name, cmp.Or(i.EntityName, i.Entity), i.State, i.User, ago(i.Queued, now), progress)
	}
	return t.flush()
}

// recentTasks reads the tasks that center shows, oldest first.
func (c *client) recentTasks(ctx context.Context) ([]types.TaskInfo, error) {
	if c.vim.ServiceContent.TaskManager == nil {
		return nil, errors.New("center has no task manager: is it a Mortise center?")
	}
	var m mo.TaskManager
	if err := c.properties(ctx, *c.vim.ServiceContent.TaskManager, []string{"recentTask"}, &m); err != nil {
		return nil, err
	}
	if len(m.RecentTask) == 0 {
		return nil, nil
	}
	var tasks []mo.Task
	if err := c.collector().Retrieve(ctx, m.RecentTask, []string{"info"}, &tasks); err != nil {
		return nil, fmt.Errorf("reading the tasks: %w", err)
	}
	var all []types.TaskInfo
	for _, t := range tasks {
		all = append(all, t.Info)
	}
	slices.SortFunc(all, func(a, b types.TaskInfo) int { return a.QueueTime.Compare(b.QueueTime) })
	return all, nil
}

// taskRef reads a task's name as it is shown: "task-14".
func taskRef(name string) (types.ManagedObjectReference, error) {
	if !strings.HasPrefix(name, "task-") {
		return types.ManagedObjectReference{}, fmt.Errorf("%q is no task: mortise task ls shows them, e.g. task-14", name)
	}
	return types.ManagedObjectReference{Type: "Task", Value: name}, nil
}

func taskWatch(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "watch TASK",
		Short: "Show a task's progress until it ends",
		Long: `Shows a task's progress until it ends: a bar on a terminal, else a line every few
seconds. It exits with an error when the task failed. Ctrl-C ends the watching,
not the task.

JSON, when it has ended: {` + taskFields + `}.`,
		Example: `  mortise task watch task-14`,
		Args:    needs("TASK"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			ref, err := taskRef(args[0])
			if err != nil {
				return err
			}
			return c.finish(ctx, ref, waiting{title: args[0]})
		}),
	}
}

func taskCancel(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel TASK",
		Short: "Cancel a task",
		Long: `Asks center to cancel a task. What the task has changed is taken back: a conversion
of a disk runs back to where it began, under its guest if the VM runs, and its new keys
are dropped. So a cancelled task may take a while to end; it cannot be cancelled once
more. A task that is not cancelable is refused and goes on.

JSON: {"task"}.`,
		Example: `  mortise task cancel task-14`,
		Args:    needs("TASK"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			ref, err := taskRef(args[0])
			if err != nil {
				return err
			}
			if _, err := methods.CancelTask(ctx, c.vim, &types.CancelTask{This: ref}); err != nil {
				return fmt.Errorf("cancelling %s: %w", args[0], err)
			}
			if c.json {
				return c.printJSON(struct {
					Task string `json:"task"`
				}{args[0]})
			}
			c.say("%s is being cancelled; mortise task watch %[1]s shows when it has ended.", args[0])
			return nil
		}),
	}
}

func taskPause(g *globals) *cobra.Command {
	return paceVerb(g, &cobra.Command{
		Use:   "pause TASK",
		Short: "Let a conversion rest",
		Long: `Lets a task that converts disks rest at a durable point. The VM runs on as fast as
ever, and another conversion gets the turn. The task stays paused over restarts of
center and hosts, and keeps other tasks off its VM: resume or cancel it.

JSON: {"task"}.`,
		Example: `  mortise task pause task-14`,
	}, func() (paused *bool, limit *int64, said string, err error) {
		yes := true
		return &yes, nil, "%s is paused; mortise task resume %[1]s lets it go on.", nil
	})
}

func taskResume(g *globals) *cobra.Command {
	return paceVerb(g, &cobra.Command{
		Use:   "resume TASK",
		Short: "Let a paused conversion go on",
		Long: `Lets a paused task go on. If other conversions have the turn on its host or its
datastore, it waits for one.

JSON: {"task"}.`,
		Example: `  mortise task resume task-14`,
	}, func() (paused *bool, limit *int64, said string, err error) {
		no := false
		return &no, nil, "%s goes on; mortise task watch %[1]s shows how.", nil
	})
}

func taskLimit(g *globals) *cobra.Command {
	var rate string
	cmd := paceVerb(g, &cobra.Command{
		Use:   "limit TASK --rate RATE",
		Short: "Limit how fast a conversion goes",
		Long: `Limits how many bytes a second a task rewrites, from now on and until it ends. A
conversion gives way to its guest by itself; a limit spares what shares the storage.

JSON: {"task"}.`,
		Example: `  mortise task limit task-14 --rate 100M
  mortise task limit task-14 --rate none`,
	}, func() (paused *bool, limit *int64, said string, err error) {
		var n int64
		if rate != "none" {
			if n, err = parseSize(rate, 1); err != nil || n <= 0 {
				return nil, nil, "", fmt.Errorf("--rate %q: want bytes a second such as 100M, or none", rate)
			}
		}
		return nil, &n, "%s has a new limit.", nil
	})
	cmd.Flags().StringVar(&rate, "rate", "", "bytes a second, such as 100M; none: no limit")
	_ = cmd.MarkFlagRequired("rate")
	return cmd
}

// paceVerb makes a verb that changes a task's pace.
func paceVerb(g *globals, cmd *cobra.Command, change func() (paused *bool, limit *int64, said string, err error)) *cobra.Command {
	cmd.Args = needs("TASK")
	cmd.RunE = g.verb(func(ctx context.Context, c *client, args []string) error {
		ref, err := taskRef(args[0])
		if err != nil {
			return err
		}
		paused, limit, said, err := change()
		if err != nil {
			return err
		}
		if err := c.ext.SetTaskPace(ctx, ref, paused, limit); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if c.json {
			return c.printJSON(struct {
				Task string `json:"task"`
			}{args[0]})
		}
		c.say(said, args[0])
		return nil
	})
	return cmd
}

// waiting says how a verb waits for its task.
type waiting struct {
	title  string // "encrypting web1"
	detach bool   // do not wait
	done   string // what to say at the end; empty: nothing but the state
}

// detachFlag adds --detach to a verb.
func detachFlag(cmd *cobra.Command, detach *bool) *cobra.Command {
	cmd.Flags().BoolVar(detach, "detach", false, "do not wait for the task; mortise task watch does")
	return cmd
}

// finish waits for a task, or not, and prints how it ended.
func (c *client) finish(ctx context.Context, ref types.ManagedObjectReference, w waiting) error {
	if w.detach {
		if c.json {
			var t mo.Task
			if err := c.properties(ctx, ref, []string{"info"}, &t); err != nil {
				return err
			}
			return c.printJSON(newTaskJSON(&t.Info))
		}
		c.say("%s: %s runs; mortise task watch %[2]s shows how it goes.", w.title, ref.Value)
		return nil
	}
	info, err := c.await(ctx, ref, w.title)
	if err != nil {
		return err
	}
	if c.json {
		return c.printJSON(newTaskJSON(info))
	}
	c.say("%s", cmp.Or(w.done, w.title+": done."))
	return nil
}

// await shows a task's progress until it ends. A task that failed is an error.
// When ctx ends, it says that the task goes on.
func (c *client) await(ctx context.Context, ref types.ManagedObjectReference, title string) (*types.TaskInfo, error) {
	p := c.progress(title)
	info, err := c.follow(ctx, ref, p.update)
	p.end(err == nil && info.State == types.TaskInfoStateSuccess)
	if err != nil && ctx.Err() != nil {
		fmt.Fprintf(c.err, "\n%s goes on at center. mortise task watch %[1]s shows how it goes; mortise task cancel %[1]s cancels it.\n", ref.Value)
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: waiting for %s: %w", title, ref.Value, err)
	}
	if info.State == types.TaskInfoStateError {
		return nil, taskFailed(title, info)
	}
	return info, nil
}

// taskFailed is the error of a task that failed.
func taskFailed(title string, info *types.TaskInfo) error {
	fault := info.Error
	if fault == nil {
		fault = &types.LocalizedMethodFault{Fault: &types.SystemError{}, LocalizedMessage: "the task failed without saying why"}
	}
	return fmt.Errorf("%s: %w", title, task.Error{LocalizedMethodFault: fault, Description: info.Description})
}

// maxWait is how long a call waits for news of a task, in seconds: shorter than
// what ends silent connections on the way.
const maxWait = 60

// follow calls tell with a task's progress until the task ends.
func (c *client) follow(ctx context.Context, ref types.ManagedObjectReference, tell func(state)) (*types.TaskInfo, error) {
	pc, err := c.collector().Create(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), dialTimeout)
		defer cancel()
		_ = pc.Destroy(end)
	}()
	var filter property.WaitFilter
	filter.Add(ref, ref.Type, []string{"info"})
	if _, err := pc.CreateFilter(ctx, filter.CreateFilter); err != nil {
		return nil, err
	}
	req := types.WaitForUpdatesEx{This: pc.Reference(), Options: &types.WaitOptions{MaxWaitSeconds: types.NewInt32(maxWait)}}
	var info *types.TaskInfo
	for {
		res, err := methods.WaitForUpdatesEx(ctx, c.vim, &req)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		if set := res.Returnval; set != nil {
			req.Version = set.Version
			if i, err := latestInfo(set, ref); err != nil {
				return nil, err
			} else if i != nil {
				info = i
			}
		}
		if info == nil {
			continue
		}
		tell(taskState(info))
		if info.State == types.TaskInfoStateSuccess || info.State == types.TaskInfoStateError {
			return info, nil
		}
	}
}

// latestInfo is the task's newest record among updates; nil when there is none.
func latestInfo(set *types.UpdateSet, ref types.ManagedObjectReference) (info *types.TaskInfo, err error) {
	for _, f := range set.FilterSet {
		if len(f.MissingSet) > 0 {
			return nil, soap.WrapVimFault(f.MissingSet[0].Fault.Fault)
		}
		for _, u := range f.ObjectSet {
			if len(u.MissingSet) > 0 {
				return nil, soap.WrapVimFault(u.MissingSet[0].Fault.Fault)
			}
			for _, change := range u.ChangeSet {
				if i, ok := change.Val.(types.TaskInfo); ok && u.Obj == ref {
					info = &i
				}
			}
		}
	}
	return info, nil
}
