package kms_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
	"mortise/internal/kms/cluster"
	"mortise/internal/pki"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// member is one of three key servers in this process, over real etcd and the real
// peers' port.
type member struct {
	t    *testing.T
	o    cluster.Options
	log  *lockedBuffer
	node *cluster.Node
	s    *store.Store
	k    *kms.KMS
	ring *rootkey.Keyring
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) has(what []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.b.Bytes(), what)
}

// patience is short: a member that is away is away for longer.
const patience = 1500 * time.Millisecond

// start starts a member as cmd/mortise does. The first has the passphrase; the
// others, and every one that comes back, get their root keys from a peer.
func (m *member) start(first bool) {
	m.t.Helper()
	if m.log == nil {
		m.log = &lockedBuffer{}
	}
	log := slog.New(slog.NewTextHandler(io.MultiWriter(m.log, m.t.Output()), &slog.HandlerOptions{Level: slog.LevelWarn})).With("member", filepath.Base(m.o.Dir))
	m.o.Logger, m.o.Format, m.o.Version = log, kms.RecordFormat, "test"
	ctx, cancel := context.WithTimeout(m.t.Context(), 60*time.Second)
	defer cancel()
	fail := func(what string, err error) {
		m.t.Helper()
		if err != nil {
			m.t.Fatalf("%s: %s: %v", filepath.Base(m.o.Dir), what, err)
		}
	}
	var err error
	m.node, err = cluster.New(ctx, m.o)
	fail("cluster", err)
	m.o.Token = ""
	m.s, err = store.Open(ctx, store.Config{Dir: filepath.Join(m.o.Dir, "store"), Name: m.node.Name, Peers: m.node.Peers()})
	fail("store", err)
	node := m.node
	options := kms.Options{Logger: log, Audit: kms.AuditOptions{Dir: filepath.Join(m.o.Dir, "audit")},
		FetchKeys: func(ctx context.Context, to kms.Sharer, ids ...string) error { return node.FetchKeys(ctx, to, ids...) }}
	m.k, err = kms.Open(ctx, m.s, options.WithPatience(patience))
	fail("kms", err)
	fail("attaching", m.node.Attach(ctx, m.s, m.k))
	path := filepath.Join(m.o.Dir, rootkeytest.FileName)
	if _, lost := os.Stat(path); first || lost != nil {
		m.ring, err = rootkeytest.Keyring(m.o.Dir)
	} else {
		m.ring, err = rootkey.LoadKeyring(path) // locked, and nobody types a passphrase
	}
	fail("keyring", err)
	if !first {
		fail("root keys from a peer", m.node.FetchKeys(ctx, m.ring))
	}
	fail("unlocking", m.k.Unlock(ctx, m.ring))
	m.node.Unlocked(m.ring)
}

func (m *member) stop() {
	if m.node == nil {
		return
	}
	m.node.Detach()
	m.k.Close()
	m.s.Close()
	m.node.Close()
	m.ring.Close()
	m.node = nil
}

func within(t *testing.T, what string, f func() error) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Since(begin) > 40*time.Second {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// three starts three members and waits until all vote.
func three(t *testing.T) []*member {
	t.Helper()
	dir := t.TempDir()
	var all []*member
	for i := range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		m := &member{t: t, o: cluster.Options{Dir: filepath.Join(dir, fmt.Sprint("kms-", i+1)), Address: l.Addr().String()}}
		l.Close()
		if i > 0 {
			token, err := all[0].node.Invite(t.Context(), fmt.Sprint("kms-", i+1), 0)
			if err != nil {
				t.Fatal(err)
			}
			m.o.Token = token.Text()
		}
		m.start(i == 0)
		t.Cleanup(m.stop)
		all = append(all, m)
		within(t, "it votes", func() error {
			list, err := all[0].node.Members(t.Context())
			if err != nil || len(list) != i+1 || list[i].Status != "follower" && list[i].Status != "leader" {
				return fmt.Errorf("%+v, %v", list, err)
			}
			return nil
		})
	}
	return all
}

// load is a client that makes keys all the time, on whatever member takes it.
type load struct {
	t       *testing.T
	cert    *x509.Certificate
	end     chan struct{}
	done    sync.WaitGroup
	mu      sync.Mutex
	made    map[string][]byte
	longest time.Duration // between two keys
}

func (l *load) session(m *member) (*kms.Session, error) {
	return m.k.Session(l.t.Context(), kms.DefaultInstance, l.cert, "here")
}

func (l *load) create(m *member) (string, []byte, error) {
	s, err := l.session(m)
	if err != nil {
		return "", nil, err
	}
	id, err := s.Create(l.t.Context(), kmip.ObjectTypeSymmetricKey, []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)}})
	if err != nil {
		return "", nil, err
	}
	b, err := l.get(m, id)
	return id, b, err
}

func (l *load) get(m *member, id string) (b []byte, err error) {
	s, err := l.session(m)
	if err != nil {
		return nil, err
	}
	got, err := s.Get(l.t.Context(), id)
	if err != nil {
		return nil, err
	}
	defer got.Bytes.Wipe()
	got.Bytes.Use(func(k []byte) { b = bytes.Clone(k) })
	return b, nil
}

// run uses the members that are never away.
func (l *load) run(members ...*member) {
	l.end, l.made = make(chan struct{}), map[string][]byte{}
	l.done.Go(func() {
		for last, n := time.Now(), 0; ; n++ {
			select {
			case <-l.end:
				return
			case <-time.After(10 * time.Millisecond):
			}
			id, b, err := l.create(members[n%len(members)])
			if err != nil {
				l.t.Errorf("a client that makes keys meanwhile: %v", err)
				return
			}
			l.mu.Lock()
			l.made[id], l.longest = b, max(l.longest, time.Since(last))
			l.mu.Unlock()
			last = time.Now()
		}
	})
}

func (l *load) check(members ...*member) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range members {
		for id, want := range l.made {
			if b, err := l.get(m, id); err != nil || !bytes.Equal(b, want) {
				l.t.Fatalf("key %s on %s: %v", id, filepath.Base(m.o.Dir), err)
			}
		}
	}
}

var administrator = kms.Actor{Kind: "socket", Name: "root", Role: kms.RoleAdministrator}

// TestKeysOfThreeMembers changes and shreds keys while one member of three is away
// and a client works. New keys come to it when it is back; nothing is shredded
// before it has confirmed; and then nothing old opens on any member.
func TestKeysOfThreeMembers(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	ctx := t.Context()
	all := three(t)
	a, b, c := all[0], all[1], all[2]
	own, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	l := &load{t: t}
	if l.cert, err = pki.SelfSigned(own, pki.Grant{Life: time.Hour}, "client", time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.k.AddClient(ctx, administrator, kms.DefaultInstance, kms.NewClient{Certificate: l.cert, Role: kms.RoleAdministrator}); err != nil {
		t.Fatal(err)
	}
	victim, material, err := l.create(c)
	if err != nil {
		t.Fatal(err)
	}
	past, err := a.k.Past(ctx, victim)
	if err != nil {
		t.Fatal(err)
	}
	status := func(m *member) kms.KeyStatus {
		t.Helper()
		s, err := m.k.KeyStatus(ctx, kms.DefaultInstance)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	ended := func(what string, m *member, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		within(t, what+" ends", func() error {
			if s := status(m); s.Change.Stage != "" {
				return fmt.Errorf("%+v", s.Change)
			}
			return nil
		})
	}
	l.run(a, b)
	ended("a rotation with all", b, b.k.RotateKey(ctx, administrator, kms.DefaultInstance))

	// Both keys are rotated while c is away. It gets them when it is back.
	c.stop()
	ended("the instance key's rotation", a, a.k.RotateKey(ctx, administrator, kms.DefaultInstance))
	ended("the CRK's rotation", b, b.k.RotateCRK(ctx, administrator, kms.DefaultInstance, "", ""))
	now := status(a)
	if now.Generation != 3 || now.CRK == past.CRK {
		t.Errorf("%+v", now)
	}
	c.start(false)
	within(t, "the new keys are on the member that was away", func() error {
		s, err := c.k.KeyStatus(ctx, kms.DefaultInstance)
		if err != nil || s.Generation != 3 || s.CRK != now.CRK || !slices.Contains(c.ring.InFile(), now.CRK) {
			return fmt.Errorf("%+v, %v; in its file: %v", s, err, c.ring.InFile())
		}
		return nil
	})
	if _, _, err := l.create(c); err != nil {
		t.Errorf("on the member that was away: %v", err)
	}
	l.check(c)

	// The key is destroyed, and shredded while c is away again.
	s, err := l.session(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Destroy(ctx, victim); err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if !past.Opens(ctx, m.ring, material) {
			t.Errorf("%s does not open the old bytes now; then the rest of this test proves less", filepath.Base(m.o.Dir))
		}
	}
	c.stop()
	copied := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(filepath.Join(copied, "store"), os.DirFS(filepath.Join(c.o.Dir, "store"))); err != nil {
		t.Fatal(err)
	}
	if !inFolder(t, copied, past.Sealed) {
		t.Error("the copy has not the old bytes; then the rest of this test proves less")
	}
	if err := serves(t, copied, a.ring, victim, material); err != nil {
		t.Errorf("before the shred a copy of a data folder does not serve with a member's root keys: %v", err)
	}
	oldCRKs := a.ring.InFile()
	var lost *kms.Confirmation
	if err := b.k.Shred(ctx, administrator, kms.DefaultInstance, true, ""); !errors.As(err, &lost) {
		t.Fatal(err)
	}
	if err := b.k.Shred(ctx, administrator, kms.DefaultInstance, true, lost.Hash); err != nil {
		t.Fatal(err)
	}
	within(t, "the shred waits for the member that is away", func() error {
		if s := status(a); s.Change.Stage != "destroy" || s.Change.Failure == "" {
			return fmt.Errorf("%+v", s.Change)
		}
		return nil
	})
	if s := status(b); s.Destroyed[0].Bytes != kms.BytesPurged || !strings.Contains(s.Change.Failure, "kms-3") ||
		!slices.ContainsFunc(s.StillOpens, func(l string) bool { return strings.Contains(l, "still to be destroyed on: kms-3") }) {
		t.Errorf("with a member away: %+v, %+v", s, s.Change)
	}
	c.start(false)
	within(t, "the shred ends when the member is back", func() error {
		if s := status(c); s.Change.Stage != "" || s.Destroyed[0].Bytes != kms.BytesShredded {
			return fmt.Errorf("%+v, %+v", s.Change, s.Destroyed)
		}
		return nil
	})
	close(l.end)
	l.done.Wait()
	t.Logf("%d keys were made meanwhile, at most %v apart", len(l.made), l.longest.Round(time.Millisecond))
	l.check(all...)

	// Nothing old opens, in memory, in a file or in a copy.
	for _, m := range all {
		name := filepath.Base(m.o.Dir)
		for _, id := range oldCRKs {
			if id != recordedElsewhere(t, a, id) && slices.Contains(m.ring.InFile(), id) {
				t.Errorf("old CRK %s is in the keyring of %s", id, name)
			}
		}
		fromFile, err := rootkeytest.Keyring(m.o.Dir)
		if err != nil {
			t.Fatal(err)
		}
		defer fromFile.Close()
		for what, ring := range map[string]*rootkey.Keyring{"memory": m.ring, "file": fromFile} {
			if past.Opens(ctx, ring, material) {
				t.Errorf("the root keys of %s, from its %s, open the old bytes", name, what)
			}
			if err := serves(t, copied, ring, victim, material); !errors.Is(err, rootkey.ErrUnknownKey) {
				t.Errorf("the root keys of %s, from its %s, open the old copy: %v", name, what, err)
			}
		}
		if _, err := m.k.Material(ctx, victim); err == nil {
			t.Errorf("%s still has the key's bytes", name)
		}
	}
	forms := [][]byte{material, []byte(hex.EncodeToString(material)), []byte(base64.StdEncoding.EncodeToString(material))}
	for _, m := range all {
		m.stop()
		for _, f := range forms {
			if inFolder(t, m.o.Dir, f) || inFolder(t, copied, f) || m.log.has(f) {
				t.Errorf("the key is in clear in the folder or the log of %s", filepath.Base(m.o.Dir))
			}
		}
	}
}

// recordedElsewhere returns id if it is the root key of something that is no
// instance, which a shred leaves alone.
func recordedElsewhere(t *testing.T, m *member, id string) string {
	t.Helper()
	list, err := m.k.CRKs(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		if c.ID == id && c.Use != "" {
			return id
		}
	}
	return ""
}

// serves starts a key server on a copy of a member's store, with root keys that it
// must not touch, and tells whether it gives the key's bytes.
func serves(t *testing.T, dir string, ring *rootkey.Keyring, id string, material []byte) error {
	t.Helper()
	ctx := t.Context()
	once := t.TempDir() // the store is told to go on alone, which it does once
	if err := os.CopyFS(once, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(once)
	s, err := store.Open(ctx, store.Config{Dir: filepath.Join(once, "store"), Name: "kms-3", Single: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	k, err := kms.Open(ctx, s, kms.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Unlock(ctx, untouched{ring}); err != nil {
		return err
	}
	key, err := k.Material(ctx, id)
	if err != nil {
		return err
	}
	defer key.Wipe()
	key.Use(func(b []byte) {
		if !bytes.Equal(b, material) {
			err = errors.New("other bytes")
		}
	})
	return err
}

// untouched is a provider that nothing is made at or taken from.
type untouched struct{ kms.RootKeys }

var errUntouched = errors.New("not here")

func (untouched) Create(context.Context, string) error  { return errUntouched }
func (untouched) Destroy(context.Context, string) error { return errUntouched }

// inFolder looks for bytes in every file under dir.
func inFolder(t *testing.T, dir string, what []byte) (found bool) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		found = found || bytes.Contains(text, what)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
