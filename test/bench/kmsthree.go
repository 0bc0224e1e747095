package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/cluster"
	"mortise/internal/rootkey"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// benchThree sets creates at a KMS of three members, all on this machine, against
// bare puts into an etcd of three.
func benchThree(ctx context.Context, dir string) (err error) {
	first, err := beginMember(ctx, filepath.Join(dir, "1"), "")
	if err != nil {
		return err
	}
	members := []*member{first}
	defer func() {
		for _, m := range members {
			err = errors.Join(err, m.stop())
		}
	}()
	for i := 2; i <= 3; i++ {
		token, err := first.node.Invite(ctx, fmt.Sprintf("kms-%d", i), time.Hour)
		if err != nil {
			return err
		}
		m, err := beginMember(ctx, filepath.Join(dir, fmt.Sprint(i)), token.Text())
		if err != nil {
			return err
		}
		members = append(members, m)
		if err := first.voters(ctx, i); err != nil {
			return err
		}
	}
	b, err := serveKMS(ctx, first.dir, first.store, first.kms)
	if err != nil {
		return err
	}
	b.closeStore = func() error { return nil } // the member's
	first.served = b
	client, stop, err := bareEtcd(filepath.Join(dir, "etcd"), 3)
	if err != nil {
		return err
	}
	defer stop()
	return b.compareNamed(ctx, "kms/create-64-clients-three-members", kmsClients, 0.5, b.kept(b.addr, encodeRequest(createRequest())), "etcd-puts", puts(ctx, client))
}

type member struct {
	dir    string
	node   *cluster.Node
	store  *store.Store
	kms    *kms.KMS
	ring   *rootkey.Keyring
	served *kmsBench
}

// beginMember starts a member as cmd/mortise does; with a token it joins.
func beginMember(ctx context.Context, dir, token string) (_ *member, err error) {
	m := &member{dir: dir}
	defer func() {
		if err != nil {
			m.stop()
		}
	}()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := l.Addr().String()
	l.Close()
	if m.node, err = cluster.New(ctx, cluster.Options{Dir: dir, Token: token, Address: address, Version: "bench", Format: 1}); err != nil {
		return nil, err
	}
	if m.store, err = store.Open(ctx, store.Config{Dir: filepath.Join(dir, "store"), Name: m.node.Name, Peers: m.node.Peers()}); err != nil {
		return nil, err
	}
	if m.kms, err = kms.Open(ctx, m.store, kms.Options{}); err != nil {
		return nil, err
	}
	if err = m.node.Attach(ctx, m.store, m.kms); err != nil {
		return nil, err
	}
	pass, err := secret.Copy([]byte("bench"))
	if err != nil {
		return nil, err
	}
	defer pass.Wipe()
	if m.ring, err = rootkey.CreateKeyring(filepath.Join(dir, "crk.sealed"), rootkey.Passphrase(pass, 10)); err != nil {
		return nil, err
	}
	if token != "" {
		if err = m.node.FetchKeys(ctx, m.ring); err != nil {
			return nil, err
		}
	}
	if err = m.kms.Unlock(ctx, m.ring); err != nil {
		return nil, err
	}
	m.node.Unlocked(m.ring)
	return m, nil
}

// voters waits until n members vote.
func (m *member) voters(ctx context.Context, n int) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		all, err := m.node.Members(ctx)
		if err != nil {
			return err
		}
		voters := 0
		for _, o := range all {
			if o.Status == "leader" || o.Status == "follower" {
				voters++
			}
		}
		if voters >= n {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d members vote after a minute", voters, n)
		}
	}
}

func (m *member) stop() (err error) {
	if m.served != nil {
		err = m.served.stop()
	}
	if m.node != nil {
		m.node.Detach()
	}
	if m.kms != nil && m.served == nil {
		m.kms.Close()
	}
	if m.store != nil {
		err = errors.Join(err, m.store.Close())
	}
	if m.node != nil {
		err = errors.Join(err, m.node.Close())
	}
	if m.ring != nil {
		m.ring.Close()
	}
	return err
}
