// Package center is the control plane: it keeps the inventory, decides who may
// do what, gets KEKs from key providers and hands them to the hosts that need
// them, and drives the hosts' work on VMs. It stores key ids, never keys (K2).
//
// Place in the flow: the vSphere API and the admin socket call its use cases,
// one file each; it calls hosts over hostapi and key servers through a provider.
// It imports the packages of the lower levels and knows nothing of SOAP. The
// concrete key providers and the root key are given to it by cmd/.
//
// Work that takes time is a task (package task): each step's outcome is durable
// before the next begins, and after a restart the task goes on with the same
// operation id. No rollback revokes or destroys a key: what nobody uses in the
// end is named in an event.
package center
