// Package vmfiles shows a VM's files in clear to its QEMU only: a FUSE view over
// files that are encrypted on the datastore (rule E1). Firmware variables
// (.nvram), snapshot and suspend state (.vmsn, .vmss), memory (.vmem, .vswp) and
// vTPM state (.vtpm) are such files; a disk is not, see package vdisk.
//
// # The format of an encrypted file
//
// An encrypted file is two header blocks of 4096 bytes and then the data: unit u,
// 4096 bytes of the clear file from 4096·u on, stands at 8192 + 4096·u. It is
// encrypted with XTS-AES-256 (IEEE Std 1619) under the file's own 64-byte DEK,
// with the unit number as tweak, like a disk. The last unit is padded with zeros
// and stored whole. A 512-byte sector whose ciphertext is all zero reads as
// zeros: it was never written. Nothing but the two headers' fields below is in
// clear; the DEK is in the VMX's bundle, by file name.
//
// A header block, numbers little-endian:
//
//	offset  bytes  field
//	     0     16  "mortise-file-v1\n"
//	    16     16  cipher, "XTS-AES-256", padded with zeros
//	    32      4  unit size, 4096
//	    36      4  state: 1 settled, 2 provisional
//	    40      8  sequence, from 1
//	    48      8  length of the clear file in bytes
//	    56      8  zero
//	    64     32  MAC
//	    96   4000  zero
//
// The MAC is keysafe.MAC with MACInfo, keyed from the file's DEK, over the one
// Line{"header", bytes 0 to 63}. Of the two blocks the one with a right MAC and
// the greater sequence counts; a file with none is refused. In a settled file
// every unit up to the length is there: a shorter file was cut, and is refused. A
// provisional header says that the length changed and nobody has synced since;
// after a power cut the end of such a file may be missing, and reads as zeros, as
// on any file system.
//
// # Order of writes
//
// A write inside the length changes only its own 512-byte sectors, in place: what
// a power cut tears is what it would tear in a clear file. To grow, the rest of
// the last unit is zeroed, the file is made longer, the data is written, and then
// a provisional header. To shrink, a provisional header is written and made
// durable first and the file cut after it; opening cuts what a crash left. A
// provisional header goes over the block that is not durable, so the last durable
// one survives until the next is; a sync writes out data and provisional header,
// then the settled header into the other block, and syncs again. So killing the
// process loses nothing that was acknowledged, and a power cut nothing that was
// synced. A failed sync is final: the file answers errors until it is opened
// again.
//
// # What the view is
//
// One folder, without sub-folders, that shows exactly the encrypted files. A name
// that is not to be encrypted cannot be made in it, a clear file put into the VM's
// folder under an encrypted file's name is an I/O error and not data (rule E8),
// and nothing in clear reaches the datastore, not even temporarily. A rename onto
// another name copies the content under that name's DEK and then replaces the
// file, since DEKs go by name; it is meant for the small files that programs
// replace in one step.
//
// When the process that serves a view is killed, the files that QEMU has open
// answer "transport endpoint is not connected" for ever, also after the view is
// mounted again: only opening them again helps. What the guest wrote before is on
// disk. A program that must outlive this process uses [File] behind a protocol
// that reconnects.
//
// Place in the flow: level 1; vmx mounts a view for the VM that it serves, and
// converts files. It imports atomicfile, keysafe, secret and xts.
package vmfiles

import (
	"errors"
	"path/filepath"
	"strings"
)

// MACInfo names the MAC of a file's header for keysafe.NewMAC.
const MACInfo = "mortise file header v1"

// MaxLength bounds the length of a file's content in bytes.
const MaxLength = 16 << 40

var (
	// ErrNotEncrypted says that a file is not one of this format.
	ErrNotEncrypted = errors.New("not an encrypted file")
	// ErrInUse says that another process has the file open.
	ErrInUse = errors.New("in use by another process")
)

// Encrypted says whether a file of an encrypted VM's folder is, by its name, one
// that holds guest data beside the disks and is therefore encrypted (rule E1).
// The temporary names that libvirt makes of them, with .new behind, are too.
func Encrypted(name string) bool {
	switch strings.ToLower(filepath.Ext(strings.TrimSuffix(name, ".new"))) {
	case ".nvram", ".vmsn", ".vmss", ".vmem", ".vswp", ".vtpm":
		return true
	}
	return false
}
