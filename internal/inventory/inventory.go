// Package inventory holds the records of everything that center manages:
// folders, the datacenter, clusters, hosts, datastores, networks and virtual
// machines, and a live [View] of them all.
//
// Place in the flow: center changes records through its use cases, the view
// follows the store's watch, and the vSphere API reads the view. A record that
// a view hands out is never changed; a change makes a new one. Records hold key
// ids, never keys (K2). The package imports store only.
package inventory

import (
	"fmt"
	"strconv"
	"strings"
)

// Ref is the managed object id of a record: "vm-13", "host-10", "group-v3".
// It is given once, never reused, and tells the object's kind.
type Ref string

// Kind is the managed object type of a record, by its vSphere name.
type Kind string

// The kinds of managed objects.
const (
	KindFolder       Kind = "Folder"
	KindDatacenter   Kind = "Datacenter"
	KindCluster      Kind = "ClusterComputeResource"
	KindResourcePool Kind = "ResourcePool"
	KindHost         Kind = "HostSystem"
	KindDatastore    Kind = "Datastore"
	KindNetwork      Kind = "Network"
	KindVM           Kind = "VirtualMachine"
	KindTask         Kind = "Task"
)

// prefixes maps what stands before the number of a Ref to the kind. Folders
// have one prefix for each thing they hold, as in vSphere.
var prefixes = map[string]Kind{
	"group-d":    KindFolder, // datacenters: the root folder
	"group-v":    KindFolder, // virtual machines
	"group-h":    KindFolder, // hosts and clusters
	"group-s":    KindFolder, // datastores
	"group-n":    KindFolder, // networks
	"datacenter": KindDatacenter,
	"domain-c":   KindCluster,
	"resgroup":   KindResourcePool,
	"host":       KindHost,
	"datastore":  KindDatastore,
	"network":    KindNetwork,
	"vm":         KindVM,
	"task":       KindTask,
}

// RootFolder is the Ref of the folder that holds everything else.
const RootFolder Ref = "group-d1"

// Kind tells what r refers to; the empty kind when r is no valid Ref.
func (r Ref) Kind() Kind {
	prefix, n := r.split()
	if n <= 0 {
		return ""
	}
	return prefixes[prefix]
}

// split separates "group-v3" into "group-v" and 3, "vm-13" into "vm" and 13.
func (r Ref) split() (prefix string, n int64) {
	s := string(r)
	i := len(s)
	for i > 0 && s[i-1] >= '0' && s[i-1] <= '9' {
		i--
	}
	if i == len(s) || len(s)-i > 18 {
		return "", 0
	}
	n, _ = strconv.ParseInt(s[i:], 10, 64)
	return strings.TrimSuffix(s[:i], "-"), n
}

// NewRef makes the Ref number n with one of the prefixes of the package, such
// as "vm" or "group-v".
func NewRef(prefix string, n int64) Ref {
	if len(prefix) > 2 && prefix[len(prefix)-2] == '-' {
		return Ref(fmt.Sprintf("%s%d", prefix, n))
	}
	return Ref(fmt.Sprintf("%s-%d", prefix, n))
}

// KeyID names a KEK: the provider it comes from and its id there.
type KeyID struct {
	Provider string `json:"provider"`
	Key      string `json:"key"`
}

// String is "provider/key", for messages.
func (k KeyID) String() string { return k.Provider + "/" + k.Key }

// ProfileID is the id of a storage policy; see package policy.
type ProfileID string

// Entity is what every record begins with.
type Entity struct {
	Ref    Ref    `json:"ref"`
	Name   string `json:"name"`
	Parent Ref    `json:"parent,omitempty"` // empty for the root folder and for tasks
}

// Self returns the entity itself; through it every record is a [Record].
func (e Entity) Self() Entity { return e }

// Record is any record of the view.
type Record interface {
	Self() Entity
}
