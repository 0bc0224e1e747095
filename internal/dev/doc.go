// Package dev runs a whole Mortise on one machine, for trials, demonstrations
// and end-to-end tests: kms, center and several hosts as separate processes with
// their own state folders and real mutual TLS on loopback, each host with a
// libvirtd of its own.
//
// Its state bears a mark that the serve verbs refuse: the passphrases of the root
// keys lie beside what they protect. It starts the same binary's roles and talks
// to them only through what an administrator has: flags, files, admin sockets.
//
// Level 4: it imports the admin clients of kms and center, host for the
// datastore's marker, and domain.
package dev
