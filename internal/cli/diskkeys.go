package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"
	"github.com/spf13/pflag"

	"mortise/internal/keysafe"
	"mortise/internal/kmipc"
	"mortise/internal/pki"
	"mortise/internal/provider/standard"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

// diskKeys says where the verbs of disk find KEKs: files, and a KMIP key server.
// Its JSON is what goes to a running serve, which reads the files itself: no key is
// in it.
type diskKeys struct {
	Files      []string `json:"files,omitempty"` // absolute once resolved
	KMIP       []string `json:"kmip,omitempty"`
	Cert       string   `json:"cert,omitempty"`
	Key        string   `json:"key,omitempty"`
	CA         string   `json:"ca,omitempty"`
	Thumbprint string   `json:"thumbprint,omitempty"`
	Provider   string   `json:"provider,omitempty"`

	// What is to wrap a new DEK.
	NewFile string `json:"newFile,omitempty"`
	KeyID   string `json:"keyId,omitempty"` // at the key server; newKeyWord: to be made
}

// newKeyWord is the --key that has one made.
const newKeyWord = "new"

// fileProvider is the key provider's name in the ids of keys that come from files.
const fileProvider = "file"

const keysHelp = `
Keys. The KEK that opens the disk comes from a file (mortise disk keygen makes
one) or from a key server of any make over KMIP; both may be given, and each more
than once. The disk names its KEK, so a wrong file or server is told apart.`

func (k *diskKeys) bind(f *pflag.FlagSet) {
	f.StringArrayVar(&k.Files, "key-file", nil, "file of a key, mode 0600 (may be repeated)")
	f.StringArrayVar(&k.KMIP, "kmip", nil, "key server, kmip://HOST[:5696]; repeated: others that share its keys")
	f.StringVar(&k.Cert, "client-cert", "", "client certificate that the key server knows (PEM)")
	f.StringVar(&k.Key, "client-key", "", "its key (PEM, mode 0600; default: in the same file)")
	f.StringVar(&k.CA, "ca", "", "trust a key server's certificate issued by this CA (PEM)")
	f.StringVar(&k.Thumbprint, "thumbprint", "", "trust the key server's certificate with this SHA-256 thumbprint")
}

// bindNew adds the flags that name the KEK of a new DEK.
func (k *diskKeys) bindNew(f *pflag.FlagSet, file bool) {
	f.StringVar(&k.KeyID, "key", "", `id of the KEK at the key server, or "new" to have one made there`)
	f.StringVar(&k.Provider, "provider", "kmip", "name of the key server that a new key is recorded under")
	if file {
		f.StringVar(&k.NewFile, "new-key-file", "", "file of the KEK that is to open the disk from now on")
	}
}

// A keyring is the KEKs of one process, fetched before they are asked for. It is
// safe for concurrent use.
type keyring struct {
	mu  sync.Mutex
	set keysafe.KEKSet
}

func newKeyring() *keyring { return &keyring{set: keysafe.KEKSet{}} }

// KEK makes it a keysafe.KEKs.
func (r *keyring) KEK(id keysafe.KeyID) (*secret.Key, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.set.KEK(id)
}

// put takes over kek.
func (r *keyring) put(id keysafe.KeyID, kek *secret.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.set[id].Wipe()
	r.set[id] = kek
}

func (r *keyring) wipe() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.set {
		k.Wipe()
	}
	clear(r.set)
}

// loadFiles reads the key files into r, and gives the ids of their keys, in order.
func (k *diskKeys) loadFiles(r *keyring) (ids []keysafe.KeyID, err error) {
	for _, f := range k.Files {
		id, kek, err := readKeyFile(f)
		if err != nil {
			return nil, err
		}
		r.put(id, kek)
		ids = append(ids, id)
	}
	return ids, nil
}

// server connects to the key server, nil if none was named. Its name is what keys
// made there are recorded under; a key that a disk names is fetched by its id,
// whatever the provider's name was when it was made.
func (k *diskKeys) server(ctx context.Context) (*standard.Provider, error) {
	if len(k.KMIP) == 0 {
		return nil, nil
	}
	if k.Provider == fileProvider {
		return nil, fmt.Errorf("--provider %s is the name of key files; choose another", fileProvider)
	}
	cfg := kmipc.Config{}
	for i, text := range k.KMIP {
		c, err := certifyConfig(text, k.Cert, k.Key, k.CA, k.Thumbprint)
		if err != nil {
			return nil, err
		}
		cfg.Certificate = c.Certificate
		chain, thumb, err := kmipc.FetchServerCertificate(ctx, c.Address)
		if err != nil {
			if i > 0 || len(k.KMIP) > 1 { // another one may answer
				continue
			}
			return nil, err
		}
		if c.Trust == nil {
			return nil, fmt.Errorf("key server %s shows a certificate with this SHA-256 thumbprint:\n  %s\ncompare it with the server's own, then give --thumbprint with it, or --ca with the CA's certificate", c.Address, thumb)
		}
		if err := c.Trust(chain); err != nil {
			return nil, fmt.Errorf("key server %s: its certificate (thumbprint %s) is not trusted: %w", c.Address, thumb, err)
		}
		cfg.Endpoints = append(cfg.Endpoints, kmipc.Endpoint{Name: c.Address, Address: c.Address, Pins: [][32]byte{pki.Fingerprint(chain[0])}})
	}
	if len(cfg.Endpoints) == 0 {
		return nil, fmt.Errorf("no key server answers: %s; look at their addresses, and at what lies between", strings.Join(k.KMIP, ", "))
	}
	name := k.Provider
	if name == "" {
		name = "kmip"
	}
	return standard.New(standard.Config{ID: name, KMIP: cfg})
}

// open fills r with what opens a disk: of each group one key at least.
func (k *diskKeys) open(ctx context.Context, r *keyring, disk string, groups ...[]keysafe.KeyID) error {
	have, err := k.loadFiles(r)
	if err != nil {
		return err
	}
	var server *standard.Provider
	for _, ids := range groups {
		if len(ids) == 0 {
			continue
		}
		var failed error
		found := false
		for _, id := range ids {
			if kek, ok := r.KEK(id); ok {
				kek.Wipe()
				found = true
				continue
			}
			if id.Provider == fileProvider || len(k.KMIP) == 0 {
				continue
			}
			if server == nil {
				if server, err = k.server(ctx); err != nil {
					return err
				}
				defer server.Close()
			}
			kek, _, err := server.KEK(ctx, id.Key)
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			r.put(id, kek)
			found = true
		}
		if !found {
			return &missingKey{disk, ids, have, failed}
		}
	}
	return nil
}

// A missingKey says that nothing of what was given opens a disk.
type missingKey struct {
	disk   string
	want   []keysafe.KeyID
	have   []keysafe.KeyID // from files
	failed error           // of the key server
}

func (e *missingKey) Error() string {
	list := func(ids []keysafe.KeyID) string {
		var s []string
		for _, id := range ids {
			s = append(s, clean(id.String()))
		}
		return strings.Join(s, " or ")
	}
	s := fmt.Sprintf("%s: opens with key %s", e.disk, list(e.want))
	switch {
	case e.failed != nil:
		return s + ": " + e.failed.Error()
	case len(e.have) > 0:
		s += ", and the given files hold " + list(e.have)
	default:
		s += ", which was not given"
	}
	file := slices.ContainsFunc(e.want, func(id keysafe.KeyID) bool { return id.Provider == fileProvider })
	if file {
		return s + "; give --key-file with the file of that key"
	}
	return s + "; give --kmip with the key server that has it, and --client-cert"
}

func (e *missingKey) Unwrap() error {
	return errors.Join(vdisk.ErrKeysRequired, e.failed)
}

// target fills r with the KEK for a new DEK and gives its id.
func (k *diskKeys) target(ctx context.Context, r *keyring) (keysafe.KeyID, error) {
	switch {
	case k.NewFile != "" && k.KeyID != "":
		return keysafe.KeyID{}, errors.New("--key and --new-key-file both name the new key: give one of them")
	case k.NewFile != "":
		id, kek, err := readKeyFile(k.NewFile)
		if err == nil {
			r.put(id, kek)
		}
		return id, err
	case k.KeyID != "" && len(k.KMIP) == 0:
		return keysafe.KeyID{}, errors.New("--key names a key of a key server: give --kmip kmip://HOST and --client-cert too")
	case k.KeyID != "":
		return k.serverKey(ctx, r)
	case len(k.KMIP) > 0:
		return keysafe.KeyID{}, errors.New(`which key of the key server? give --key with its id, or "--key new" to have one made`)
	case len(k.Files) > 1:
		return keysafe.KeyID{}, errors.New("several --key-file were given: give only the one that is to open the disk")
	case len(k.Files) == 0:
		return keysafe.KeyID{}, errors.New("no key was given: give --key-file (mortise disk keygen makes one), or --kmip with --key")
	}
	ids, err := k.loadFiles(r)
	if err != nil {
		return keysafe.KeyID{}, err
	}
	return ids[0], nil
}

func (k *diskKeys) serverKey(ctx context.Context, r *keyring) (id keysafe.KeyID, err error) {
	server, err := k.server(ctx)
	if err != nil {
		return id, err
	}
	defer server.Close()
	id = keysafe.KeyID{Provider: server.ID(), Key: k.KeyID}
	var kek *secret.Key
	if k.KeyID == newKeyWord {
		id.Key, kek, err = server.NewKEK(ctx, "mortise-disk-"+uuid.NewString())
	} else {
		kek, _, err = server.KEK(ctx, k.KeyID)
	}
	if err != nil {
		return id, err
	}
	if k.KeyID == newKeyWord {
		// What the key wraps must not hang on one server's memory.
		if err := server.ReadBack(ctx, id.Key, kek); err != nil {
			kek.Wipe()
			return id, err
		}
	}
	r.put(id, kek)
	return id, nil
}
