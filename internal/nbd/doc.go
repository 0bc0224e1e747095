// Package nbd serves virtual disks to QEMU, libvirt and other NBD clients over
// unix sockets.
//
// Protocol: the fixed newstyle negotiation and the transmission phase of
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, with
// structured replies and the metadata context base:allocation.
//
// Place in the flow: level 1, between QEMU and a disk. It declares the
// [Device] that it serves (vdisk implements it) and imports nothing of
// Mortise.
package nbd
