// Package ha tests a key server of three members as its administrators meet it:
// three processes of the built program, each in a network namespace of its own
// on one bridge, under load from KMIP clients, while members are killed, cut
// off, paused, starved of disk, set to a wrong time, replaced and upgraded (S8).
//
// What clients saw is checked for linearizability with porcupine, and what was
// acknowledged must hold at the end. Nothing is simulated but the faults: of the
// network by iptables, of the process by signals, of the disk by a FUSE file
// system below the state folder, of the clock by a file that only state of
// 'mortise dev' takes.
package ha

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// wire is a bridge with one namespace for each member. The test's own clients
// are at the bridge's address.
type wire struct {
	t      *testing.T
	prefix string // of names; a device's name has at most 15 characters
	net    string // first three bytes of addresses
	all    []string
}

func newWire(t *testing.T) *wire {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, tool := range []string{"ip", "iptables", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is missing; build/packages.sh test installs it", tool)
		}
	}
	pid := os.Getpid()
	w := &wire{t: t, prefix: fmt.Sprintf("ha%x", pid&0xfffff), net: fmt.Sprintf("10.%d.%d", 128+pid>>8&0x7f, pid&0xff)}
	if out, err := exec.Command("ip", "link", "add", w.prefix+"b", "type", "bridge").CombinedOutput(); err != nil {
		t.Skipf("no network devices can be made here: %s", out)
	}
	t.Cleanup(func() {
		for _, ns := range w.all {
			exec.Command("ip", "netns", "del", ns).Run()
		}
		exec.Command("ip", "link", "del", w.prefix+"b").Run()
	})
	w.run("ip", "addr", "add", w.net+".254/24", "dev", w.prefix+"b")
	w.run("ip", "link", "set", w.prefix+"b", "up")
	return w
}

func (w *wire) run(args ...string) {
	w.t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		w.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// plug makes the namespace of member i, 1 to 9.
func (w *wire) plug(i int) (ns, ip string) {
	w.t.Helper()
	ns, ip = fmt.Sprintf("%sn%d", w.prefix, i), fmt.Sprintf("%s.%d", w.net, i)
	outside := fmt.Sprintf("%sv%d", w.prefix, i)
	w.run("ip", "netns", "add", ns)
	w.all = append(w.all, ns)
	w.run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", ns)
	w.run("ip", "link", "set", outside, "master", w.prefix+"b", "up")
	w.run("ip", "-n", ns, "addr", "add", ip+"/24", "dev", "eth0")
	w.run("ip", "-n", ns, "link", "set", "eth0", "up")
	w.run("ip", "-n", ns, "link", "set", "lo", "up")
	return ns, ip
}

// cut drops what a member gets from the others, what it sends to them, or both.
// Clients still reach it: a member that is cut off and goes on serving them is
// what must not be.
func (w *wire) cut(m *member, in, out bool) {
	w.t.Helper()
	client := w.net + ".254"
	if in {
		w.run("ip", "netns", "exec", m.ns, "iptables", "-w", "-A", "INPUT", "-i", "eth0", "!", "-s", client, "-j", "DROP")
	}
	if out {
		w.run("ip", "netns", "exec", m.ns, "iptables", "-w", "-A", "OUTPUT", "-o", "eth0", "!", "-d", client, "-j", "DROP")
	}
}

func (w *wire) mend(m *member) {
	w.t.Helper()
	w.run("ip", "netns", "exec", m.ns, "iptables", "-w", "-F")
}
