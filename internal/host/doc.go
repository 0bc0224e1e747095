// Package host is the hypervisor agent, ESXi's role: it keeps in locked memory
// the KEKs that its VMs need, starts one vmx process per VM that is open, drives
// the guests through libvirt, and answers center over mutual TLS.
//
// It keeps no database. What exists is in the datastores (a VM's folder) and in
// the running processes: an agent that was killed finds its vmx processes and
// domains again, takes their keys back from them, and goes on (design §4
// Failure). Every request of center names the VM, its folder and what center
// expects of it.
//
// Level 3: it may import hostapi, vmx, and the packages of levels 0 to 2; never
// center.
package host
