// Package vmx is the per-VM process: it opens one VM's key safes with the KEKs
// that the host agent hands it, holds that VM's DEKs, serves its disks over NBD
// on unix sockets and its other files through a private FUSE mount, creates and
// converts them, makes snapshots of them and merges these away. It sees one VM's folder and its run folder, and no network.
//
// The order in which a VM's files change keeps two promises at every instant.
// The VMX bundle never asks less than what is true of a disk: before an
// encryption begins the bundle says that the disk is converting, and says that it
// must be encrypted only when it is (E8). And a key that anything on disk still
// needs is in a key safe on disk: new pairs and new files are durable before old
// ones go (R3, R4).
//
// Level 3: it imports hostapi and the packages of levels 0 and 1. The host agent
// imports it for what needs no key: [Inspect], [RequiredKeys], [Delete].
package vmx
