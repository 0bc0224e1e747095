package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"golang.org/x/sys/unix"
)

const (
	// DefaultQuota is the size of the database at which etcd refuses writes
	// until space is made, in bytes, unless Config says another.
	DefaultQuota = 8 << 30
	// quotaWarning is the share of the quota that is logged as a warning.
	quotaWarning = 0.7
	// The database file only grows; defragmenting rewrites it. It is worth it
	// for a file of at least defragSize of which less than half is in use.
	defragSize = 256 << 20
	// lowDisk is the free space below which a member warns and gives the lead
	// away: etcd writes its log ahead in pieces of 64 MB.
	lowDisk = 256 << 20
	// diskReserve is the free space below which Commit refuses. etcd ends the
	// process when a write of its own finds no space, and the next piece of its
	// log takes 64 MB: refusing in time keeps reads going.
	diskReserve = 96 << 20
	// databaseAhead is how much of the disk the database file holds beyond its
	// end, in bytes: etcd commits what was admitted up to freeFor ago, and what it
	// keeps for itself, when others have taken the rest. The file grows in steps of
	// no more than 16 MiB.
	databaseAhead = 24 << 20
	// freeFor is how old what Commit knows of the free space may be.
	freeFor = 100 * time.Millisecond
	// tendEvery is how often all this is looked at.
	tendEvery = 30 * time.Second
)

// Space is what a member's database takes.
type Space struct {
	Size  int64 // bytes of the file
	InUse int64
	Quota int64
	Free  uint64 // bytes free on its file system
	Full  bool   // a member of the cluster has reached its quota: writes are refused
}

// Space returns the sizes of this member's database.
func (s *Store) Space(ctx context.Context) (Space, error) {
	b := s.etcd.Server.Backend()
	sp := Space{Size: b.Size(), InUse: b.SizeInUse(), Quota: s.quota}
	var fsys unix.Statfs_t
	if err := unix.Statfs(s.dir, &fsys); err != nil {
		return sp, fmt.Errorf("store: reading the free space of %s: %w", s.dir, err)
	}
	sp.Free = fsys.Bavail * uint64(fsys.Bsize)
	alarms, err := s.client.AlarmList(ctx)
	if err != nil {
		return sp, fmt.Errorf("store: reading alarms: %w", fromEtcd(err))
	}
	sp.Full = slices.ContainsFunc(alarms.Alarms, isNoSpace)
	return sp, nil
}

// room is ErrFull while the disk of the state folder is nearly full.
func (s *Store) room() error {
	now := time.Now().UnixNano()
	free := s.free.Load()
	if last := s.looked.Load(); now-last > int64(freeFor) && s.looked.CompareAndSwap(last, now) {
		var fsys unix.Statfs_t
		if err := unix.Statfs(s.dir, &fsys); err != nil {
			return fmt.Errorf("reading the free space of %s: %w", s.dir, err)
		}
		free = fsys.Bavail * uint64(fsys.Bsize)
		s.free.Store(free)
		if err := s.holdSpace(); err != nil {
			return err
		}
	}
	if free < diskReserve {
		return fmt.Errorf("%w: the disk of %s has %d MB free and needs %d: make room on it", ErrFull, s.dir, free>>20, diskReserve>>20)
	}
	return nil
}

// holdSpace gives the database file disk space for all of its pages, and for
// databaseAhead more. bbolt extends the file without it, so a write into its
// middle could find the disk full, and etcd ends the process then.
func (s *Store) holdSpace() error {
	path := filepath.Join(s.dir, "etcd", "member", "snap", "db")
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("reading the size of %s: %w", path, err)
	}
	is := fileSize{st.Ino, st.Size}
	if was := s.held.Load(); was != nil && *was == is {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("reserving disk space: %w", err)
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, st.Size+databaseAhead)
	if err == unix.ENOSPC {
		return fmt.Errorf("%w: %s cannot have disk space for what it holds: make room on its disk", ErrFull, path)
	}
	if err != nil && err != unix.EOPNOTSUPP {
		return fmt.Errorf("reserving disk space for %s: %w", path, err)
	}
	s.held.Store(&is)
	return nil
}

// fileSize says which file was how long.
type fileSize struct {
	inode uint64
	size  int64
}

func isNoSpace(a *etcdserverpb.AlarmMember) bool { return a.Alarm == etcdserverpb.AlarmType_NOSPACE }

// tend watches the database's size: it warns in time, defragments what is
// mostly holes, and when the quota was reached makes space and lets writes in
// again.
func (s *Store) tend(ctx context.Context) {
	tick := time.NewTicker(s.tendEvery)
	defer tick.Stop()
	var nearFull, diskLow bool
	for {
		sp, err := s.Space(ctx)
		if err == nil {
			used := float64(sp.InUse) / float64(s.quota)
			if used > quotaWarning && !nearFull {
				s.log.Warn("store is nearly full", "used_percent", int(used*100), "quota_bytes", s.quota)
			}
			nearFull = used > quotaWarning
			if sp.Free < lowDisk && !diskLow {
				s.log.Warn("the disk of the state folder is nearly full", "free_bytes", sp.Free, "dir", s.dir)
				err = s.YieldLead()
			}
			diskLow = sp.Free < lowDisk
			switch {
			case sp.Full:
				err = errors.Join(err, s.recoverSpace(ctx))
			case sp.Size >= s.defragSize && sp.InUse < sp.Size/2 && sp.Free > 2*uint64(sp.InUse)+lowDisk:
				err = errors.Join(err, s.Defragment(ctx))
			}
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("store could not look after its space", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// recoverSpace drops the history, which etcd keeps for an hour, shrinks the
// file, and withdraws this member's alarm if that was enough. Every member does
// it for its own file; writes are back when the last alarm is gone.
func (s *Store) recoverSpace(ctx context.Context) error {
	rev := s.etcd.Server.KV().Rev()
	if _, err := s.client.Compact(ctx, rev, clientv3.WithCompactPhysical()); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return fmt.Errorf("dropping history: %w", fromEtcd(err))
	}
	if err := s.Defragment(ctx); err != nil {
		return err
	}
	if size := s.etcd.Server.Backend().Size(); float64(size) > 0.95*float64(s.quota) {
		return fmt.Errorf("%w: %d of %d bytes are records; delete some, or start the members with a larger quota", ErrFull, size, s.quota)
	}
	self, _ := s.ID()
	_, err := s.client.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: self, Alarm: etcdserverpb.AlarmType_NOSPACE})
	if err != nil {
		return fmt.Errorf("withdrawing the alarm: %w", fromEtcd(err))
	}
	s.log.Info("store has space again", "size_bytes", s.etcd.Server.Backend().Size(), "quota_bytes", s.quota)
	return nil
}

// Defragment rewrites this member's database without its holes. The member
// answers nothing meanwhile; so members do it one after the other, and a leader
// gives the lead away first.
func (s *Store) Defragment(ctx context.Context) error {
	if s.peers != nil {
		// A session's lease is no record: it can be had when the quota is reached.
		session, err := concurrency.NewSession(s.client, concurrency.WithTTL(60), concurrency.WithContext(ctx))
		if err == nil {
			defer session.Close()
			turn := concurrency.NewMutex(session, "office/defragment")
			if err = turn.Lock(ctx); err == nil {
				defer turn.Unlock(context.WithoutCancel(ctx))
			}
		}
		// The lock is a record. Without space for it the members take their
		// turns by chance: writes have stopped anyway.
		if err != nil && !errors.Is(err, rpctypes.ErrNoSpace) {
			return fmt.Errorf("store: waiting for this member's turn to defragment: %w", fromEtcd(err))
		}
		if err := s.YieldLead(); err != nil {
			return err
		}
	}
	before, began := s.etcd.Server.Backend().Size(), time.Now()
	if err := s.etcd.Server.Backend().Defrag(); err != nil {
		return fmt.Errorf("store: defragmenting: %w", err)
	}
	s.log.Info("store defragmented", "before_bytes", before, "after_bytes", s.etcd.Server.Backend().Size(), "took", time.Since(began).Round(time.Millisecond))
	return nil
}
