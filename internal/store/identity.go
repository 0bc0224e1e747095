package store

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/client/pkg/v3/types"

	"mortise/internal/atomicfile"
)

// ErrIdentity: what is in the folder does not belong together.
var ErrIdentity = errors.New("state folder belongs to another member or cluster")

// identity says which member of which cluster a state folder is. A member that
// came back without its raft log could vote twice in one term, and a database of
// another cluster would be served as this one's; so the folder remembers, beside
// etcd's own files, whose they must be.
type identity struct {
	// Token makes the ids of a new cluster unlike those of every other.
	Token string `json:"token"`
	Name  string `json:"name"`
	// Cluster and Member are etcd's ids, in hexadecimal; empty until the first
	// start has succeeded.
	Cluster string `json:"cluster,omitempty"`
	Member  string `json:"member,omitempty"`
	// Alone: the last start made this member the only one of its cluster.
	Alone bool `json:"alone,omitempty"`
}

func identityPath(dir string) string { return filepath.Join(dir, "identity.json") }

// Started tells whether the store in dir has been part of a cluster already.
func Started(dir string) (bool, error) {
	id, err := readIdentity(dir)
	return id.Member != "", err
}

func readIdentity(dir string) (id identity, err error) {
	text, err := os.ReadFile(identityPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return id, nil
	}
	if err != nil {
		return id, err
	}
	if err := strictJSON(text, &id); err != nil || id.Token == "" {
		return id, fmt.Errorf("%w: %s cannot be read (%v)", ErrIdentity, identityPath(dir), err)
	}
	return id, nil
}

func (id identity) write(dir string) error {
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return atomicfile.Write(identityPath(dir), append(text, '\n'), 0o600)
}

// prepareIdentity reads the folder's identity before etcd starts, or begins one.
func prepareIdentity(dir, name string) (identity, error) {
	id, err := readIdentity(dir)
	if err != nil {
		return id, err
	}
	hasLog := false
	if list, err := os.ReadDir(filepath.Join(dir, "etcd", "member", "wal")); err == nil {
		hasLog = len(list) > 0
	}
	switch {
	case id.Member != "" && !hasLog:
		return id, fmt.Errorf("%w: %s says that this is member %s of cluster %s, but its log is gone; a member without its log must not vote: remove it from the cluster and join with an empty folder, or restore a backup",
			ErrIdentity, identityPath(dir), id.Member, id.Cluster)
	case id.Name != "" && id.Name != name:
		return id, fmt.Errorf("%w: it is the folder of %q, and this member is called %q", ErrIdentity, id.Name, name)
	case id.Token != "":
		return id, nil
	}
	id = identity{Token: "mortise-" + rand.Text(), Name: name}
	return id, id.write(dir)
}

// alone notes whether this start makes the member the only one, and refuses two
// such starts in a row: left in a service's settings, the order would throw out
// the members that joined since.
func (id *identity) alone(dir string, single bool) error {
	switch {
	case single && id.Member == "":
		return errors.New("there is no cluster in this folder to go on alone with")
	case single && id.Alone:
		return errors.New("this member goes on alone since its last start; start it without that order now")
	case single == id.Alone:
		return nil
	}
	id.Alone = single
	return id.write(dir)
}

// confirm compares the folder's identity with what etcd says, or completes it
// after the first start.
func (id identity) confirm(dir string, member, cluster types.ID) error {
	switch {
	case id.Member == "":
		id.Member, id.Cluster = member.String(), cluster.String()
		return id.write(dir)
	case id.Member != member.String() || id.Cluster != cluster.String():
		return fmt.Errorf("%w: %s says member %s of cluster %s, its database says member %s of cluster %s",
			ErrIdentity, identityPath(dir), id.Member, id.Cluster, member, cluster)
	}
	return nil
}
