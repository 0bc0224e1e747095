package cluster

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"mortise/internal/atomicfile"
	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/store"
)

// Options say who this member is.
type Options struct {
	// Dir is the state folder of the KMS; the store is in Dir/store.
	Dir string
	// Name is the member's own. Empty: what the token or the folder says, or
	// DefaultName.
	Name string
	// Address is where other members reach this one, host:port. Empty: what the
	// folder says; without any, nobody can join yet and nothing listens.
	Address string
	// Listen is the address to listen on. Empty: every interface, Address's port.
	Listen string
	// Token is the text of a join token, for a new member's first start.
	Token string
	// Version of the program, for the list of members.
	Version string
	// Format is the highest record format that this program reads and writes.
	Format int
	Logger *slog.Logger     // nil: none
	Now    func() time.Time // nil: time.Now; the machine's clock

	certLife time.Duration // tests renew sooner
	every    time.Duration // and look more often
}

// DefaultName is the name of a first member that was given none.
const DefaultName = "kms-1"

// A Node is this process's part in the cluster. Its methods may be called
// concurrently.
type Node struct {
	Options
	log    *slog.Logger
	now    func() time.Time
	dir    *os.File // Dir/peer; the socket's path goes through it, for a path's length is limited
	creds  *pki.Credentials
	ca     *x509.Certificate
	front  *front
	joined map[string]string // all members' URLs, between joining and the first start

	sealing sync.Mutex // held while the CA's key is sealed
	mu      sync.Mutex
	fresh   *pki.Authority // made at this start and not in the store yet
	address string
	names   map[string]time.Time // the members, and since when
	keys    []kms.RootKeys       // once unlocked
	state   *state               // once attached
	store   *store.Store
	kms     *kms.KMS

	run  context.Context // ends with Detach
	stop context.CancelFunc
	done sync.WaitGroup
}

// peerFile is what peer.json holds.
type peerFile struct {
	Name    string               `json:"name"`
	Address string               `json:"address,omitempty"`
	Listen  string               `json:"listen,omitempty"`
	Members map[string]time.Time `json:"members"` // names, and when they were let in
	Join    map[string]string    `json:"join,omitempty"`
}

// New reads who this member is from its folder, makes it the first of a new
// cluster, or lets it join one with a token. If it has an address, it listens
// when New returns: raft must be reachable before the store can open.
func New(ctx context.Context, o Options) (_ *Node, err error) {
	n := &Node{Options: o, log: o.Logger, now: o.Now}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if n.now == nil {
		n.now = time.Now
	}
	if n.certLife == 0 {
		n.certLife = certLife
	}
	if n.every == 0 {
		n.every = 5 * time.Second
	}
	if o.Address != "" {
		if err := CheckAddress(o.Address); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, "peer"), 0o700); err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	if n.dir, err = os.Open(filepath.Join(o.Dir, "peer")); err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	n.run, n.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if err := n.load(ctx); err != nil {
		return nil, err
	}
	n.front = newFront(n)
	if n.address != "" {
		if err := n.front.listen(n.listenAddress()); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *Node) path(name string) string { return filepath.Join(n.Dir, "peer", name) }

// socket is where etcd listens. A unix socket's path has at most 107 bytes, and
// a state folder may be anywhere.
func (n *Node) socket() string { return fmt.Sprintf("/proc/self/fd/%d/raft.sock", n.dir.Fd()) }

func (n *Node) load(ctx context.Context) error {
	var f peerFile
	text, err := os.ReadFile(n.path("peer.json"))
	switch {
	case err == nil:
		if err := json.Unmarshal(text, &f); err != nil || f.Name == "" {
			return fmt.Errorf("cluster: %s cannot be read (%v): restore it, or let this member join anew", n.path("peer.json"), err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cluster: %w", err)
	}
	if f.Name != "" && n.Name != "" && f.Name != n.Name {
		return fmt.Errorf("cluster: %s is the folder of member %s, not of %s", n.Dir, f.Name, n.Name)
	}
	started, err := store.Started(filepath.Join(n.Dir, "store"))
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	n.address, n.names, n.joined = f.Address, f.Members, f.Join
	if n.Address != "" {
		n.address = n.Address
	}
	if n.Listen == "" && n.Address == "" {
		n.Listen = f.Listen
	}
	if f.Name != "" {
		n.Name = f.Name
	}
	switch _, err := os.Lstat(n.path("unsealed")); {
	case n.Token != "" && !started && len(n.joined) == 0:
		return n.join(ctx)
	case n.Token != "":
		n.log.Info("the join token is not needed: this member has joined already", "member", n.Name)
	case err == nil || f.Name == "":
		return n.begin()
	}
	chain, key, err := pki.LoadKeyPair(n.path("peer.pem"), n.path("peer.pem"))
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	cas, err := pki.LoadCertificates(n.path("ca.pem"))
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	n.ca = cas[0]
	if n.creds, err = pki.NewCredentials(chain, key); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	return n.save()
}

// begin makes the CA of a new cluster, with this member as its first. It is done
// again at each start until the CA's key is in the store.
func (n *Node) begin() error {
	if n.Name == "" {
		n.Name = DefaultName
	}
	if err := identity(n.Name).Check(); err != nil {
		return fmt.Errorf("cluster: %w: %w", ErrInvalid, err)
	}
	if err := atomicfile.Write(n.path("unsealed"), nil, 0o600); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	now := n.now()
	ca, err := pki.NewAuthority("Mortise KMS peers", now)
	if err != nil {
		return err
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	csr, err := request(key)
	if err != nil {
		return err
	}
	cert, err := issue(ca, csr, n.Name, n.certLife, now)
	if err != nil {
		return err
	}
	n.fresh, n.ca = ca, ca.Certificate()
	n.names = map[string]time.Time{n.Name: now.UTC().Truncate(time.Second)}
	chain := []*x509.Certificate{cert, n.ca}
	if n.creds, err = pki.NewCredentials(chain, key); err != nil {
		return err
	}
	err = errors.Join(pki.SaveCertificates(n.path("ca.pem"), n.ca), pki.SaveKeyPair(n.path("peer.pem"), chain, key))
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	return n.save()
}

// sealedNow: the CA's key is in the store, so the CA stays.
func (n *Node) sealedNow() error {
	if err := os.Remove(n.path("unsealed")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cluster: %w", err)
	}
	return n.dir.Sync()
}

// save writes peer.json. The lock is held, or nobody else has n yet.
func (n *Node) save() error {
	text, err := json.Marshal(peerFile{n.Name, n.address, n.Listen, n.names, n.joined})
	if err != nil {
		return err
	}
	if err := atomicfile.Write(n.path("peer.json"), append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	return nil
}

func (n *Node) listenAddress() string {
	if n.Listen != "" {
		return n.Listen
	}
	_, port, _ := net.SplitHostPort(n.address)
	return ":" + port
}

func peerURL(address string) string { return "https://" + address }

// Peers is what the store needs of this.
func (n *Node) Peers() *store.Peers {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := &store.Peers{URL: peerURL(n.Name + ".invalid:5698"), Socket: n.socket(), Certificate: n.path("peer.pem"), CA: n.path("ca.pem"), Join: n.joined, Removed: n.removed}
	if n.address != "" {
		p.URL = peerURL(n.address)
	}
	return p
}

// Addresses returns where the other members are reached, by name.
func (n *Node) peers(ctx context.Context) (map[string]string, error) {
	list, err := n.Members(ctx)
	if err != nil {
		return nil, err
	}
	at := map[string]string{}
	for _, m := range list {
		if !m.Self && m.Address != "" {
			at[m.Name] = m.Address
		}
	}
	return at, nil
}

// SetAddress gives a member that has begun alone, and runs, an address at which
// others can reach it.
func (n *Node) SetAddress(ctx context.Context, address, listen string) error {
	if err := CheckAddress(address); err != nil {
		return err
	}
	n.mu.Lock()
	if n.store == nil {
		n.mu.Unlock()
		return errors.New("cluster: it is still starting")
	}
	if n.address != "" {
		defer n.mu.Unlock()
		if n.address == address {
			return nil
		}
		return fmt.Errorf("cluster: this member is reached at %s; to change that, restart it with --peer-address", n.address)
	}
	n.address, n.Listen = address, listen
	at := n.listenAddress()
	n.mu.Unlock()
	undo := func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.address, n.Listen = "", ""
	}
	if err := n.front.listen(at); err != nil {
		undo()
		return err
	}
	self, _ := n.store.ID()
	err := n.store.SetURL(ctx, self, peerURL(address))
	if err == nil {
		err = n.register(ctx)
	}
	if err != nil {
		n.front.deafen()
		undo()
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log.Info("this member can be joined", "address", address, "listen", at)
	return n.save()
}

// Detach ends what Attach began; before the KMS and the store are closed.
func (n *Node) Detach() {
	n.stop()
	n.done.Wait()
	n.mu.Lock()
	state := n.state
	n.state, n.keys = nil, nil
	n.mu.Unlock()
	if state != nil {
		state.close()
	}
}

// Close stops listening; after the store is closed, which gives the lead away
// through this and has its socket in the folder.
func (n *Node) Close() error {
	n.Detach()
	if n.front != nil {
		n.front.close()
	}
	return n.dir.Close()
}

// admit tells whether a verified peer is a member at this moment. A certificate
// that is older than its name's place in the list belongs to a machine that was
// replaced.
func (n *Node) admit(id pki.Identity, cert *x509.Certificate) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	since, is := n.names[id.Name]
	switch {
	case id.Role != pki.RoleKMS || !is:
		return fmt.Errorf("cluster: %s is no member", id)
	case cert.NotBefore.Before(since.Add(-backdate)):
		return fmt.Errorf("cluster: the certificate of %s is older than its membership: the machine was replaced", id)
	}
	return nil
}

// backdate is how far pki backdates a certificate, and a second for rounding.
const backdate = 10*time.Minute + time.Second

// setNames takes the list of members, ends the connections of those who left,
// and keeps the list for the next start.
func (n *Node) setNames(names map[string]time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if maps.EqualFunc(n.names, names, time.Time.Equal) && len(n.joined) == 0 {
		return
	}
	for name, since := range n.names {
		if now, still := names[name]; !still || now.After(since) {
			n.front.end(name)
		}
	}
	n.names, n.joined = names, nil
	if err := n.save(); err != nil {
		n.log.Error("the list of members could not be kept", "error", err)
	}
	n.log.Info("members", "names", slices.Sorted(maps.Keys(names)))
}
