// Package nbd serves virtual disks to QEMU, libvirt, backup programs and other NBD
// clients over unix sockets, and over a network in TLS.
//
// Protocol: the fixed newstyle negotiation and the transmission phase of
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, with
// structured replies, several connections to one disk (a flush on one covers all),
// and the metadata contexts base:allocation and qemu:dirty-bitmap:NAME ([Bitmap]).
// A unix socket is served in clear, a network never: a client begins with STARTTLS
// and shows a certificate ([Server.ServeTLS]). There is no resizing in the protocol:
// who grows a disk ends its connections ([Export.Disconnect]), and clients that
// connect again see the new size.
//
// Place in the flow: level 1, between QEMU and a disk. It declares the [Device] that
// it serves (vdisk implements it) and imports atomicfile only.
package nbd
