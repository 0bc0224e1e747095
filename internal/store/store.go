// Package store keeps records in an embedded etcd: typed collections, writes
// that compare revisions and span collections, and linearizable reads from
// memory.
//
// Place in the flow: level 1. kms keeps its managed objects here, center its
// inventory, tasks and sealed secrets; each process opens a store of its own.
// It imports nothing of Mortise.
//
// A write ([Store.Commit]) returns after etcd has written it to its log and
// synced that log. A read comes from a cache in memory that one watch over the
// whole key space feeds, and is still linearizable: it first asks raft for a
// revision that was current after the read began (read-index, raft thesis
// §6.4), then waits until the watch has brought the cache there.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

const (
	// quota is where etcd refuses writes until space is made.
	quota = 8 << 30 // bytes
	// quotaWarning is the share of quota that is logged as a warning.
	quotaWarning = 0.7
	// history is how long etcd keeps old revisions; compaction runs as often.
	history = "1h"
	// maxRecord bounds one transaction's bytes; a record is far smaller.
	maxRecord = 4 << 20
	// maxOps bounds the operations of one transaction.
	maxOps = 1024
)

// Config says where a store is and who it is.
type Config struct {
	// Dir is the state folder. It is created with mode 0700 and locked: one
	// process at a time has it open.
	Dir string
	// Name is this member's name in its cluster, e.g. "kms-1".
	Name string
	// Logger takes etcd's warnings as warnings and its chatter as debug lines;
	// nil discards them.
	Logger *slog.Logger
}

// A Store is an open state folder. Its methods, and those of its collections,
// may be called concurrently.
type Store struct {
	log    *slog.Logger
	lock   *os.File
	etcd   *embed.Etcd
	client *clientv3.Client
	cache  cache

	stop   context.CancelFunc // ends the goroutines counted by done
	done   sync.WaitGroup
	closed func() error // what Close does, once
}

// Open starts etcd in cfg.Dir and returns once it serves and the cache follows
// it. [ErrLocked] tells that another process has the folder open. ctx bounds
// the start only.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Dir == "" || cfg.Name == "" {
		return nil, errors.New("store: a state folder and a member name are needed")
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: making the state folder: %w", err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Store{log: log, lock: lock}
	s.etcd, err = startEtcd(etcdConfig(cfg, log))
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("store: starting etcd in %s: %w", cfg.Dir, err)
	}
	select {
	case <-s.etcd.Server.ReadyNotify():
	case err = <-s.etcd.Err():
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		s.etcd.Close()
		lock.Close()
		return nil, fmt.Errorf("store: waiting for etcd in %s: %w", cfg.Dir, err)
	}
	s.client = v3client.New(s.etcd.Server)
	run, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.closed = sync.OnceValue(s.shutDown)
	s.cache.init(s.etcd.Server.KV().Rev())
	s.done.Go(func() { s.follow(run) })
	s.done.Go(func() { s.watchQuota(run) })
	return s, nil
}

// startEtcd turns etcd's way of giving up on damaged files, a panic, into an
// error. Its database it opens on a goroutine of its own, where nobody can
// recover; so that file is tried first.
func startEtcd(cfg *embed.Config) (e *embed.Etcd, err error) {
	const damaged = "its files are damaged (restore a backup, or move the folder away)"
	defer func() {
		switch p := recover().(type) {
		case nil:
		case runtime.Error: // etcd stumbling over its own giving up
			err = errors.New(damaged + "; etcd's log lines say more")
		default:
			err = fmt.Errorf("%s: %v", damaged, p)
		}
	}()
	path := filepath.Join(cfg.Dir, "member", "snap", "db")
	if _, err := os.Stat(path); err == nil {
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", damaged, path, err)
		}
		if err := db.Close(); err != nil {
			return nil, fmt.Errorf("trying %s: %w", path, err)
		}
	}
	return embed.StartEtcd(cfg)
}

// etcdConfig has no client listener: the only client is in this process. While
// the cluster has one member it has no peer listener either, and its peer URL
// is only a name.
func etcdConfig(cfg Config, log *slog.Logger) *embed.Config {
	e := embed.NewConfig()
	e.Dir = filepath.Join(cfg.Dir, "etcd")
	e.Name = cfg.Name
	e.ListenClientUrls, e.AdvertiseClientUrls = nil, nil
	e.ListenPeerUrls = nil
	e.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "localhost:2380"}}
	e.InitialCluster = e.InitialClusterFromName(cfg.Name)
	e.InitialClusterToken = "mortise"
	e.EnableGRPCGateway = false
	e.AuthToken = "" // nobody logs in to it
	e.AutoCompactionMode = embed.CompactorModePeriodic
	e.AutoCompactionRetention = history
	e.QuotaBackendBytes = quota
	e.MaxRequestBytes = maxRecord
	e.MaxTxnOps = 2 * maxOps // a failed compare reads what it compared
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapTo(log))
	return e
}

// Close stops etcd and releases the folder. Reads and writes under way fail. A
// second Close does nothing.
func (s *Store) Close() error { return s.closed() }

func (s *Store) shutDown() error {
	s.stop()
	s.cache.close()
	err := s.client.Close()
	s.done.Wait()
	s.etcd.Close()
	if errors.Is(err, context.Canceled) { // how an in-process client closes
		err = nil
	}
	return errors.Join(err, s.lock.Close())
}

// watchQuota warns while the database nears the size at which etcd refuses
// writes.
func (s *Store) watchQuota(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for warned := false; ; {
		used := float64(s.etcd.Server.Backend().SizeInUse()) / quota
		if used > quotaWarning && !warned {
			s.log.Warn("store is nearly full", "used_percent", int(used*100), "quota_bytes", int64(quota))
		}
		warned = used > quotaWarning
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
