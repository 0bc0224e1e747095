package kms

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"mortise/internal/kms/audit"
	"mortise/internal/store"
)

// How entries come into the log.
//
// A change puts its entry into the store's queue "audit", in the part of the
// member that took it. That member drains its part: the oldest entries, in the
// order of their revisions, are appended to the log and synced; then they are
// removed from the store in a transaction that also says up to which entry of the
// log everything is out of the queue (anchorRecord.Drained). A member that comes
// back looks behind that entry for what it had logged and not removed, so that no
// entry is in the log twice.
//
// A member that was removed from the cluster does not come back. What is left in
// its part any other member moves into its own, in one transaction, and drains it
// from there; entry.Member still says who took the request. So every acknowledged
// change is in one log: of the member that took it, or if that is lost, of
// another. (If it had logged entries and was lost before it removed them, two logs
// have them, with the same Act.)
//
// Every second the log's head is signed and put into the store, from where all
// members have it, and given to the sinks off the machine.
const (
	anchorEvery = time.Second
	// drainBatch is how many entries one transaction removes, about: all of a
	// transaction that added some.
	drainBatch = 1024
	// gather is how long the drain waits for more, so that it does not sync for
	// each change: nobody waits for it, and it shares a disk with the store.
	gather = 30 * time.Millisecond
	// maxBacklog is how many entries may wait in this member's part. The log keeps
	// room for them. From half of it on, changes wait for the drain, but no longer
	// than drainPatience.
	maxBacklog    = 10_000
	drainPatience = 3 * time.Second
	// adoptEvery is how often removed members' parts are looked for.
	adoptEvery = 30 * time.Second
	// resealEvery is how often the signing key is sealed anew, by the instance
	// key of the day.
	resealEvery = time.Hour
)

// AuditOptions say where the audit log is; zero values are the usual ones.
type AuditOptions struct {
	Dir         string                                // "": the folder audit beside the store's files
	SegmentSize int64                                 // bytes; 0: 16 MiB
	Sinks       []audit.Sink                          // where anchors go besides the store
	Synced      func(entries int, took time.Duration) // told of each sync; nil: nobody
	// Step is asked before each step of draining in tests; its error ends the
	// step. nil in production.
	Step func(name string) error
}

// anchorRecord is what the store knows of a log.
type anchorRecord struct {
	Log audit.Hex
	// Head is signed; nil until the member was unlocked for the first time.
	Head *audit.Head `json:",omitempty"`
	// Drained: what came from the queue and is in the log up to this entry is no
	// longer in the queue.
	Drained uint64
}

// auditing is what the KMS keeps of its audit log.
type auditing struct {
	member    string
	journal   *audit.Log
	queue     *store.Queue
	anchors   *store.Collection[anchorRecord] // by member; of logs that are gone "member/log"
	auditKeys *store.Collection[auditKey]     // by member
	sinks     []*audit.Anchorer
	step      func(string) error

	actPrefix string // of this process
	actNumber atomic.Uint64
	strangers strangers

	// The drain's own:
	logged map[string]bool // acts that are in the log and still in the queue
	anchor anchorRecord    // as it was written last
	keyed  time.Time       // when the signing key was sealed last
}

func (k *KMS) openAuditing(ctx context.Context, s *store.Store, o AuditOptions) (err error) {
	k.member, k.step, k.logged = s.Name(), o.Step, map[string]bool{}
	if k.step == nil {
		k.step = func(string) error { return nil }
	}
	id := make([]byte, 9)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	k.actPrefix = hex.EncodeToString(id) + "-"
	if k.anchors, err = store.NewCollection(ctx, s, "audit-anchor", store.JSON[anchorRecord](1)); err != nil {
		return err
	}
	if k.auditKeys, err = store.NewCollection(ctx, s, "audit-key", store.JSON[auditKey](1)); err != nil {
		return err
	}
	last, err := k.anchors.Get(ctx, k.member)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if o.Dir == "" {
		o.Dir = filepath.Join(s.Dir(), "audit")
	}
	k.journal, err = audit.Open(audit.Options{Dir: o.Dir, Member: k.member, SegmentSize: o.SegmentSize, Anchor: last.Value.Head,
		Logger: k.log, Now: k.now, Synced: o.Synced, Step: o.Step})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			k.journal.Close()
		}
	}()
	k.anchor = anchorRecord{Log: k.journal.ID()}
	if string(last.Value.Log) == string(k.journal.ID()) {
		k.anchor = last.Value
	} else if last.Value.Head != nil {
		// The log that this anchor is of is gone. The anchor stays, as evidence.
		gone := k.member + "/" + last.Value.Log.String()
		if _, err := s.Commit(ctx, k.anchors.Put(gone, last.Value), k.anchors.Put(k.member, k.anchor)); err != nil {
			return err
		}
	}
	if k.queue, err = store.NewQueue(ctx, s, "audit", k.member); err != nil {
		return err
	}
	if err = k.relearn(); err != nil {
		return err
	}
	for _, sink := range o.Sinks {
		k.sinks = append(k.sinks, audit.NewAnchorer(sink, k.log))
	}
	return nil
}

// drainForever is the one goroutine that drains, anchors and adopts.
func (k *KMS) drainForever(ctx context.Context) {
	tick := time.NewTicker(anchorEvery)
	defer tick.Stop()
	var adopted time.Time
	failing := false
	unlocked := k.unlocked
	for {
		if k.queue.Len() == 0 || failing {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				k.anchorNow(ctx)
				if time.Since(adopted) > adoptEvery {
					adopted = time.Now()
					k.adopt(ctx)
				}
			case <-unlocked:
				unlocked = nil
				k.anchorNow(ctx)
			case <-k.queue.Ready():
				if failing {
					continue
				}
			}
		} else {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				k.anchorNow(ctx)
			default:
			}
		}
		if n := k.queue.Len(); n > 0 && n < drainBatch {
			select {
			case <-ctx.Done():
				return
			case <-time.After(gather):
			}
		}
		err := k.drain(ctx)
		if err != nil && ctx.Err() == nil && !failing {
			k.log.Error("kms: audit entries of changes cannot be brought into the log; they wait in the store, and it is tried again", "error", err)
		}
		failing = err != nil
	}
}

// drain brings a batch of entries from the queue into the log.
func (k *KMS) drain(ctx context.Context) error {
	items := k.queue.Oldest(drainBatch)
	if len(items) == 0 {
		return nil
	}
	if err := k.step("drain append"); err != nil {
		return err
	}
	// Whoever stops waiting for the log does not know what it has, and would log
	// the same again: the wait ends with the write, and not with ctx.
	var last audit.Ticket
	written := context.WithoutCancel(ctx)
	for _, i := range items {
		if k.logged[i.Key] {
			continue
		}
		e, err := audit.Decode(i.Value)
		if err != nil {
			// Somebody has written into the store. That is an entry of its own.
			k.log.Error("kms: an audit entry in the store is damaged", "key", i.Key, "revision", i.Revision, "error", err)
			e = audit.Entry{Time: k.now(), Member: k.member, Actor: "server", Operation: "Damaged Entry", Object: i.Key, Result: audit.Success}
		}
		if e.Revision == 0 {
			e.Revision = i.Revision
		}
		e.Act = i.Key
		ticket, err := k.journal.Append(&e, true)
		if err != nil {
			_ = last.Wait(written) // what is durable of it, relearn finds
			return errors.Join(err, k.relearn())
		}
		last, k.logged[i.Key] = ticket, true
	}
	if err := last.Wait(written); err != nil {
		return errors.Join(err, k.relearn())
	}
	if err := k.step("drain logged"); err != nil {
		return err
	}
	next := k.anchor
	next.Drained = k.journal.Durable()
	ops := append(k.queue.Remove(items), k.anchors.Put(k.member, next))
	if _, err := k.store.Commit(ctx, ops...); err != nil {
		return err // they are logged, and removed the next time
	}
	k.anchor = next
	if err := k.step("drain removed"); err != nil {
		return err
	}
	k.queue.Drop(items[len(items)-1])
	for _, i := range items {
		delete(k.logged, i.Key)
	}
	return nil
}

// relearn finds out which of the entries in the queue the log has, after a start
// or after a write whose outcome is not known.
func (k *KMS) relearn() error {
	clear(k.logged)
	waits := map[string]bool{}
	for _, i := range k.queue.Oldest(math.MaxInt) {
		waits[i.Key] = true
	}
	for r, err := range k.journal.Records(k.anchor.Drained + 1) {
		if err != nil {
			return err
		}
		if waits[r.Act] {
			k.logged[r.Act] = true
		}
	}
	return nil
}

// anchorNow signs the log's head and puts it where the log is held against it.
func (k *KMS) anchorNow(ctx context.Context) {
	k.keepAuditKey(ctx)
	if !k.journal.HasKey() {
		return
	}
	if k.anchor.Head != nil && k.anchor.Head.Sequence == k.journal.Durable() {
		return
	}
	if err := k.putAnchor(ctx); err != nil && ctx.Err() == nil {
		k.log.Warn("kms: the audit log's head is not anchored; it is tried again", "error", err)
	}
}

func (k *KMS) putAnchor(ctx context.Context) error {
	head, err := k.journal.Sign(ctx)
	if err != nil {
		return err
	}
	for _, s := range k.sinks {
		s.Anchor(head)
	}
	next := k.anchor
	next.Head = &head
	if len(k.logged) == 0 { // nothing is in both places
		next.Drained = max(next.Drained, head.Sequence)
	}
	if _, err := k.store.Commit(ctx, k.anchors.Put(k.member, next)); err != nil {
		return err
	}
	k.anchor = next
	return nil
}

// adopt moves what removed members have left in the queue into this member's
// part.
func (k *KMS) adopt(ctx context.Context) {
	others, err := k.queue.Others(ctx)
	if err != nil || len(others) == 0 {
		return
	}
	members, err := k.store.Members(ctx)
	if err != nil {
		return
	}
	moved := 0
	for _, record := range others {
		name := strings.TrimSuffix(record[0].Part, "/")
		if slices.ContainsFunc(members, func(m store.Member) bool { return m.Name == name }) {
			continue
		}
		ops := k.queue.Take(record)
		for _, i := range record {
			value := i.Value
			if e, err := audit.Decode(i.Value); err == nil && e.Revision == 0 {
				e.Revision = i.Revision // of the act, not of the move
				value = e.Append(nil)
			}
			ops = append(ops, k.queue.Add(i.Key, value))
		}
		_, err := k.store.Commit(ctx, ops...)
		switch {
		case errors.Is(err, store.ErrNotFound): // another member did
		case err != nil:
			if ctx.Err() == nil {
				k.log.Warn("kms: audit entries of a removed member cannot be taken over; it is tried again", "member", name, "error", err)
			}
			return
		default:
			moved += len(record)
		}
	}
	if moved > 0 {
		k.log.Info("kms: audit entries of a removed member taken over", "entries", moved)
	}
}

// closeAuditing drains what can be drained, and closes the log. The store is
// still open.
func (k *KMS) closeAuditing() {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	k.keepAuditKey(ctx)
	if k.store.Sync(ctx) == nil {
		for k.queue.Len() > 0 && k.drain(ctx) == nil {
		}
	}
	if k.journal.HasKey() && (k.anchor.Head == nil || k.anchor.Head.Sequence != k.journal.Durable()) {
		if err := k.putAnchor(ctx); err != nil {
			k.log.Warn("kms: the audit log's last head is not anchored", "error", err)
		}
	}
	for _, s := range k.sinks {
		s.Close()
	}
	if err := k.journal.Close(); err != nil {
		k.log.Error("kms: closing the audit log", "error", fmt.Sprint(err))
	}
	k.queue.Close()
	k.anchors.Close()
	k.auditKeys.Close()
}
