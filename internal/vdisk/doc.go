// Package vdisk is a virtual disk: a VMDK descriptor and the extent that it
// names, as one range of sectors that many goroutines read and write at once,
// in clear or encrypted (rules E1–E5, E8), and that can change from one to the
// other, or from one key to another, in place (rules R1, R2, R4).
//
//	vm.vmdk                     descriptor: size, extent, key safe, MAC
//	vm-flat.vmdk                extent: a sparse file, XTS-AES-256 in units of 4096 bytes
//	vm-flat.vmdk.state          which keys the extent has, how far a conversion is
//	vm-000001.vmdk              descriptor of a snapshot link, which stands on vm.vmdk
//	vm-000001-delta.vmdk        its extent: the units that were written since
//	vm-000001-delta.vmdk.state  the same, and a bitmap of the units that it has
//
// A [Disk] is one link, with the conversions of it. A [Chain] is a base and the
// snapshot links that stand on it, and what servers and tools open: a disk without
// snapshots is a chain of one. An [index] says which link has a unit; a [bitmap] in
// three copies makes sure that neither a kill nor a power cut makes it lie.
// Snapshot puts a link on the top, Revert and LinkedClone make another branch,
// Consolidate merges a link with its parent, all of it under a guest.
//
// A thick disk's extent keeps all of its space allocated ([Spec]); extents can be read
// and written round the page cache ([Options]).
//
// A disk in clear is a plain flat VMDK without a state file, and takes the same
// way through the code without a cipher. doc/disk-format.md specifies the files,
// the order in which they are written, and why.
//
// # What is promised
//
// What a Flush has acknowledged survives a power cut; a sector written since is
// old or new. A failed fsync is final: the disk refuses everything after it. A
// conversion can be stopped at any instant, by Ctrl-C, kill or power cut; nothing
// is lost and running it again finishes it. The one assumption about storage is
// that a 512-byte sector is written whole or not at all.
//
// An extent is open for writing in one place: its lock ([ErrInUse]) is taken
// before anything read from the files is believed. Opening then checks that
// descriptor, state file and extent belong together, that nobody edited them,
// and that they are what the caller expects ([Expect]): no edit of files turns
// encryption off. Each refusal is an [*Error] and changes nothing.
//
// Place in the flow: level 1. vmx serves disks to QEMU through nbd with it, and
// runs conversions. It imports secret, xts, keysafe, vmdk and atomicfile, and
// reaches no network: KEKs come from the caller ([keysafe.KEKs]).
package vdisk
