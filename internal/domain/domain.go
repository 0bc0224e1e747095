// Package domain runs guests: it makes a libvirt domain of a VMX dictionary,
// starts and stops it, tells when its state changes, and holds its serial
// console.
//
// Place in the flow: level 1. The host agent reads a VM's dictionary, adds the
// sockets and files that the VM's vmx process serves (FromVMX, Spec), and hands
// the Spec to a Conn, which speaks libvirt's RPC over a unix socket. Domains are
// transient: the VMX is the record, domain XML is made at each power-on (design
// §1), and libvirt's networks, device models and CPU models are used as they are
// (A1). No key and no guest data passes through here but the console's text,
// which stays in memory (I1). It imports vmxfile.
//
// Disks reach QEMU as NBD over unix sockets, never as files, so what QEMU reads
// in clear exists on no storage (E4). When a disk's server is away, QEMU
// pauses the guest (error_policy=stop), after Spec.ReconnectDelay where libvirt
// knows it; Resume lets it go on (design §4 Failure).
package domain

import "errors"

// Errors that callers decide on. They come wrapped, with the VM's UUID.
var (
	// ErrNotRunning: no guest of that UUID runs under this libvirt.
	ErrNotRunning = errors.New("the guest is not running")
	// ErrAlreadyRunning: a guest of that UUID or name runs already.
	ErrAlreadyRunning = errors.New("the guest is running already")
	// ErrUnavailable: libvirtd did not answer. An operation that had begun may or
	// may not have happened: ask State.
	ErrUnavailable = errors.New("libvirtd is not answering")
	// ErrNoNetwork: a network adapter names a libvirt network that is not active.
	ErrNoNetwork = errors.New("no such libvirt network")
	// ErrClosed: the Conn or Console was closed.
	ErrClosed = errors.New("closed")
)
