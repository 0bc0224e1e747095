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
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
)

const (
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
	// Quota is the size of the database at which writes are refused, in bytes;
	// 0 means DefaultQuota.
	Quota int64
	// Peers lets other members join, or this one join others. Nil is a cluster
	// of one, for ever, that nothing can connect to.
	Peers *Peers
	// Single makes this member the only one of its cluster: for when the others
	// are lost and never come back. What only they had is lost.
	Single bool

	snapshotEvery uint64        // raft entries; a restore cuts its log at once
	tendEvery     time.Duration // tests look more often
	defragSize    int64         // and at smaller files
}

// A Store is an open state folder. Its methods, and those of its collections,
// may be called concurrently.
type Store struct {
	name   string
	dir    string
	quota  int64
	peers  *Peers
	log    *slog.Logger
	lock   *os.File
	etcd   *embed.Etcd
	client *clientv3.Client
	kv     pb.KVServer // etcd's, with its check of the quota, without a client between
	gather gathering
	cache  cache
	reign  reign

	tendEvery  time.Duration
	defragSize int64

	looked atomic.Int64             // when free was read, in nanoseconds; 0 at first
	free   atomic.Uint64            // bytes on the disk
	held   atomic.Pointer[fileSize] // the database file that has its disk space

	closing context.Context    // ends when Close begins
	stop    context.CancelFunc // ends closing and the goroutines counted by done
	done    sync.WaitGroup
	closed  func() error // what Close does, once
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
	cfg.Quota = cmp.Or(cfg.Quota, DefaultQuota)
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Store{name: cfg.Name, dir: cfg.Dir, quota: cfg.Quota, peers: cfg.Peers, log: log, lock: lock,
		tendEvery: cmp.Or(cfg.tendEvery, tendEvery), defragSize: cmp.Or(cfg.defragSize, defragSize)}
	if err := s.start(ctx, cfg); err != nil {
		lock.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) start(ctx context.Context, cfg Config) error {
	id, err := prepareIdentity(cfg.Dir, cfg.Name)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := id.alone(cfg.Dir, cfg.Single); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer startRoom(cfg.Dir)()
	s.etcd, err = startEtcd(etcdConfig(cfg, id, s.log))
	if err != nil {
		return fmt.Errorf("store: starting etcd in %s: %w", cfg.Dir, err)
	}
	err = s.awaitReady(ctx)
	if err == nil {
		err = id.confirm(cfg.Dir, s.etcd.Server.MemberID(), s.etcd.Server.Cluster().ID())
	}
	if err != nil {
		s.etcd.Close()
		return fmt.Errorf("store: waiting for etcd in %s: %w", cfg.Dir, err)
	}
	s.client = v3client.New(s.etcd.Server)
	s.kv = v3rpc.NewQuotaKVServer(s.etcd.Server)
	s.gather.send = s.send
	s.free.Store(math.MaxUint64) // until Commit looks
	s.closing, s.stop = context.WithCancel(context.Background())
	s.closed = sync.OnceValue(s.shutDown)
	s.initReign()
	s.cache.init(s.etcd.Server.KV().Rev())
	s.done.Go(func() { s.follow(s.closing) })
	s.done.Go(func() { s.tend(s.closing) })
	if cfg.Peers != nil {
		s.done.Go(func() { s.watchLeader(s.closing) })
		s.done.Go(func() { s.publishURL(s.closing, cfg.Peers.URL) })
	}
	return nil
}

// awaitReady returns when this member is part of a cluster that has a leader. A
// cold start of several waits here until a majority is up.
func (s *Store) awaitReady(ctx context.Context) error {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for n := 1; ; {
		select {
		case <-s.etcd.Server.ReadyNotify():
			return nil
		case err := <-s.etcd.Err():
			return err
		case <-s.etcd.Server.StopNotify():
			return ErrRemoved
		case <-tick.C:
			if s.peers != nil && s.peers.Removed != nil && s.peers.Removed(ctx, s.others()) {
				return ErrRemoved
			}
			if n++; n%5 == 0 {
				s.log.Warn("store is waiting for a majority of its cluster's members")
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// others returns the URLs of the other members that this one's log knows.
func (s *Store) others() map[string]string {
	at := map[string]string{}
	for _, m := range s.etcd.Server.Cluster().Members() {
		if m.ID != s.etcd.Server.MemberID() && m.Name != "" && len(m.PeerURLs) > 0 {
			at[m.Name] = m.PeerURLs[0]
		}
	}
	return at
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

// etcdConfig has no client listener: the only client is in this process. Its
// peer listener is a unix socket behind what checks the peers ([Peers]).
func etcdConfig(cfg Config, id identity, log *slog.Logger) *embed.Config {
	e := embed.NewConfig()
	e.Dir = filepath.Join(cfg.Dir, "etcd")
	e.Name = cfg.Name
	e.ListenClientUrls, e.AdvertiseClientUrls = nil, nil
	e.ListenPeerUrls = nil
	e.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "localhost:2380"}}
	if p := cfg.Peers; p != nil {
		e.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: p.Socket}}
		if u, err := url.Parse(p.URL); err == nil { // etcd checks it, and says what is wrong
			e.AdvertisePeerUrls = []url.URL{*u}
		}
		e.PeerTLSInfo = transport.TLSInfo{
			CertFile: p.Certificate, KeyFile: p.Certificate, TrustedCAFile: p.CA,
			ServerName: PeerHost, MinVersion: tls.VersionTLS13,
		}
	}
	e.InitialCluster = e.InitialClusterFromName(cfg.Name)
	e.InitialClusterToken = id.Token
	if p := cfg.Peers; p != nil && p.Join != nil {
		var all []string
		for name, u := range p.Join {
			all = append(all, name+"="+u)
		}
		e.InitialCluster = strings.Join(all, ",")
		e.ClusterState = embed.ClusterStateFlagExisting
	}
	e.ForceNewCluster = cfg.Single
	// A follower stands for election after 600 to 1200 ms of silence: writes are
	// back well within 3 s of losing a leader, even one that is only heard no more
	// and takes 600 ms to notice. A busy machine's or disk's pauses are shorter.
	e.TickMs, e.ElectionMs = 50, 600
	e.EnableGRPCGateway = false
	e.AuthToken = "" // nobody logs in to it
	e.AutoCompactionMode = embed.CompactorModePeriodic
	e.AutoCompactionRetention = history
	e.QuotaBackendBytes = cfg.Quota
	if cfg.snapshotEvery > 0 {
		e.SnapshotCount, e.SnapshotCatchUpEntries = cfg.snapshotEvery, 1
	}
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
