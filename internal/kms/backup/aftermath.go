package backup

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/audit"
)

// An Aftermath is what is known of the time after a backup, from the exported
// audit logs of the lost server's members, and from who holds ids of its keys.
type Aftermath struct {
	entries []audit.Entry // that changed something, with a store's revision
	used    map[object]bool
	held    []object
	until   time.Time
}

// object names an object; the instance is empty if it is not known.
type object struct{ instance, id string }

// maxLine bounds a line of an audit log or list, in bytes.
const maxLine = 64 << 10

// AddAudit reads an exported audit log: JSON lines. Lines that are no entries
// (signed heads, marks of an export of all members) are passed over. name is the file's, for errors.
func (a *Aftermath) AddAudit(name string, r io.Reader) error {
	entries := 0
	err := eachLine(name, r, func(line []byte) error {
		var probe struct {
			Operation *string `json:"operation"`
			Hash      *string `json:"hash"`
			audit.Marks
		}
		if err := json.Unmarshal(line, &probe); err != nil {
			return err
		}
		if probe.Operation == nil && (probe.Hash != nil || probe.Begin != nil || probe.End != nil) {
			return nil
		}
		var r audit.Record
		if err := strictJSON(line, &r); err != nil {
			return err
		}
		e := r.Entry
		if e.Operation == "" || e.Time.IsZero() {
			return errors.New("it is no entry of an audit log")
		}
		entries++
		if e.Time.After(a.until) {
			a.until = e.Time
		}
		a.note(e)
		return nil
	})
	if err == nil && entries == 0 {
		err = fmt.Errorf("backup: %s has no entry of an audit log; export one with: mortise kms audit export", name)
	}
	return err
}

func (a *Aftermath) note(e audit.Entry) {
	if e.Result != audit.Success {
		return
	}
	if e.Revision > 0 {
		a.entries = append(a.entries, e)
	}
	// A client that was given a key has it, or its id.
	if a.used == nil {
		a.used = map[object]bool{}
	}
	for _, id := range []string{e.Object, e.Made} {
		if id != "" && isObjectOperation(e.Operation) {
			a.used[object{e.Instance, id}] = true
		}
	}
}

// isObjectOperation tells KMIP's operations from administrators' acts: those
// have a space in their name or begin with a small letter.
func isObjectOperation(name string) bool {
	return name != "" && name[0] >= 'A' && name[0] <= 'Z' && !strings.Contains(name, " ")
}

// takesAway tells an administrator's act that ended something from one that made
// or changed it.
func takesAway(operation string) bool {
	for _, word := range []string{"revoke", "delete", "destroy", "shred", "purge"} {
		if strings.Contains(operation, word) {
			return true
		}
	}
	return false
}

// AddHeld reads a list of key ids that clients hold, a line each: ID or
// INSTANCE/ID. Empty lines and lines that begin with # are passed over.
func (a *Aftermath) AddHeld(name string, r io.Reader) error {
	return eachLine(name, r, func(line []byte) error {
		if line[0] == '#' {
			return nil
		}
		o := object{id: string(line)}
		if instance, id, ok := strings.Cut(o.id, "/"); ok {
			o = object{instance, id}
		}
		a.held = append(a.held, o)
		return nil
	})
}

func eachLine(name string, r io.Reader, f func([]byte) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	n := 0
	for s.Scan() {
		n++
		line := bytes.TrimSpace(s.Bytes())
		if len(line) == 0 {
			continue
		}
		if err := f(line); err != nil {
			return fmt.Errorf("backup: line %d of %s: %w", n, name, err)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("backup: reading %s after line %d: %w", name, n, err)
	}
	return nil
}

// quarantine says what a restored server is put into quarantine with: the acts
// after the backup's revision, in their order, and what is missing. has tells
// whether the backup has an object; with an empty instance, whether any has.
func (a *Aftermath) quarantine(s Summary, has func(object) bool) (kms.Quarantine, []kms.Act) {
	q := kms.Quarantine{Backup: s.ID, Created: s.Created, Revision: s.Revision, AuditUntil: a.until, Missing: []kms.MissingObject{}}
	slices.SortStableFunc(a.entries, func(x, y audit.Entry) int { return int(min(1, max(-1, x.Revision-y.Revision))) })
	var acts []kms.Act
	gone := map[object]bool{}
	seen := map[string]bool{}
	for _, e := range a.entries {
		if e.Revision <= s.Revision || e.Act != "" && seen[e.Act] { // two members' exports may overlap
			continue
		}
		seen[e.Act] = true
		o := object{e.Instance, e.Object}
		if e.Operation == "Destroy" {
			gone[o] = true
		}
		if !kms.Repeatable(e.Operation) && !takesAway(e.Operation) {
			continue // it made or changed something: nothing that must be done again
		}
		acts = append(acts, kms.Act{
			Instance: e.Instance, Operation: e.Operation, Subject: e.Object, Detail: e.Detail, Time: e.Time, By: e.Client, Revision: e.Revision,
		})
	}
	for o := range a.used {
		if !gone[o] && !has(o) {
			q.Missing = append(q.Missing, kms.MissingObject{Instance: o.instance, ID: o.id, From: "audit"})
		}
	}
	for _, o := range a.held {
		if !gone[o] && !has(o) && !slices.ContainsFunc(q.Missing, func(m kms.MissingObject) bool {
			return m.ID == o.id && (o.instance == "" || m.Instance == o.instance)
		}) {
			q.Missing = append(q.Missing, kms.MissingObject{Instance: o.instance, ID: o.id, From: "list"})
		}
	}
	slices.SortFunc(q.Missing, func(x, y kms.MissingObject) int {
		return strings.Compare(x.Instance+"/"+x.ID, y.Instance+"/"+y.ID)
	})
	return q, acts
}
