// Package interop runs clients that are not ours, unmodified, against center's
// vSphere API: VMware's govc and Debian's pyVmomi.
package interop

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/authz"
	"mortise/internal/vimapi/vimapitest"
)

// buildGovc builds govc once for all tests.
var buildGovc = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "govc-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "govc")
	cmd := exec.Command("go", "build", "-o", bin, ".")
	cmd.Dir = "govc"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", &exec.Error{Name: "go build govc: " + string(out), Err: err}
	}
	return bin, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if bin, err := buildGovc(); err == nil {
		os.RemoveAll(filepath.Dir(bin))
	}
	os.Exit(code)
}

// govc runs commands as one user.
type govc struct {
	t   *testing.T
	bin string
	env []string
}

func newGovc(t *testing.T, w *vimapitest.World, user, password string) *govc {
	t.Helper()
	bin, err := buildGovc()
	if err != nil {
		t.Fatal(err)
	}
	return &govc{t: t, bin: bin, env: append(os.Environ(),
		"GOVC_URL="+w.SDK(user, password).String(), "GOVC_INSECURE=1", "GOVMOMI_HOME="+t.TempDir(), "GOVC_SHOW_UNRELEASED=true")}
}

func (g *govc) run(args ...string) (string, error) {
	cmd := exec.Command(g.bin, args...)
	cmd.Env = g.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// ok runs a command that must succeed and say all of words.
func (g *govc) ok(command string, words ...string) string {
	g.t.Helper()
	return g.okArgs(strings.Fields(command), words...)
}

func (g *govc) okArgs(args []string, words ...string) string {
	g.t.Helper()
	out, err := g.run(args...)
	if err != nil {
		g.t.Fatalf("govc %.300q: %v\n%s", args, err, out)
	}
	for _, word := range words {
		if !strings.Contains(out, word) {
			g.t.Errorf("govc %.300q does not say %q:\n%s", args, word, out)
		}
	}
	return out
}

// fails runs a command that must be refused with all of words.
func (g *govc) fails(command string, words ...string) {
	g.t.Helper()
	out, err := g.run(strings.Fields(command)...)
	if err == nil {
		g.t.Fatalf("govc %s succeeded:\n%s", command, out)
	}
	for _, word := range words {
		if !strings.Contains(out, word) {
			g.t.Errorf("govc %s is refused without %q:\n%s", command, word, out)
		}
	}
}

func TestGovc(t *testing.T) {
	w := vimapitest.Start(t)
	g := newGovc(t, w, authz.Administrator, w.Password)

	g.ok("about", "Mortise", "VirtualCenter", "8.0")
	g.ok("ls", "/Datacenter/vm", "/Datacenter/host")
	g.ok("find", "/Datacenter/host/Cluster/esx1", "/Datacenter/datastore/ds1", "/Datacenter/network/default")
	g.ok("host.info", "esx1", "connected")
	g.ok("datastore.info", "ds1", "Free")

	// A key provider, from nothing to green.
	g.ok("kms.add -n kms-1 -a 127.0.0.1 -p " + strconv.Itoa(int(w.KMS.Port)) + " kms")
	g.ok("kms.ls", "kms", "Standard", "red")
	cert, key := clientCertificate(t)
	g.okArgs([]string{"kms.trust", "-server-cert", w.KMS.Certificate(), "-client-cert", cert, "-client-key", key, "kms"})
	w.KMS.Trust(cert)
	g.ok("kms.ls kms", "kms-1", "green")
	g.ok("kms.default kms")
	g.ok("kms.default -e /Datacenter/host/Cluster kms")
	g.ok("kms.ls -json", `"useAsDefault": true`, `"ClusterComputeResource"`)
	id := strings.TrimSpace(g.ok("kms.key.create kms"))
	g.ok("kms.key.info -p kms "+id, id, "true")

	// Policies.
	g.ok("storage.policy.ls", "4d5f673c-536f-11e6-beb8-9e71128cae77", "VM Encryption Policy", "Datastore Default")
	g.ok("storage.policy.create -e gold")
	g.ok("storage.policy.ls gold", "gold")
	g.ok("storage.policy.rm gold")

	// A VM in clear, one that is encrypted by policy.
	g.ok("vm.create -on=false -disk 16MB -net default -net.adapter vmxnet3 -m 256 plain")
	g.okArgs([]string{"vm.create", "-on=false", "-profile", "VM Encryption Policy", "-disk", "16MB", "-net", "default", "-net.adapter", "e1000e", "-m", "256", "web1"})
	g.ok("vm.info web1", "256MB", "poweredOff", "esx1")
	g.ok("object.collect -s vm/web1 config.keyId.providerId.id", "kms")
	g.ok("object.collect -s vm/plain config.migrateEncryption", "opportunistic")
	g.okArgs([]string{"vm.policy.ls", "-vm", "web1"}, "VM home", "VM Encryption Policy", "compliant")
	g.ok("vm.power -on web1", "OK")
	g.ok("vm.info web1", "poweredOn")
	g.fails("vm.power -on web1", "powered on")
	g.fails("vm.change -vm web1 -migrate-encryption disabled", "encrypted")
	g.ok("vm.power -off web1", "OK")
	g.ok("vm.power -on -M web1", "OK")
	g.ok("object.collect -s -wait 30s vm/web1 -runtime.powerState poweredOn")
	g.ok("object.collect -s vm/web1 runtime.cryptoState", "unlocked")
	w.Eventually("the VM is off again", func() bool { _, err := g.run("vm.power", "-off", "web1"); return err == nil })
	g.okArgs([]string{"vm.disk.create", "-vm", "web1", "-name", "web1/data", "-size", "8MB", "-profile", "VM Encryption Policy"})
	g.ok("device.ls -vm web1", "disk-1000-0", "disk-1000-1", "encrypted", "VirtualE1000e")
	g.ok("device.remove -vm web1 disk-1000-1")
	g.ok("vm.change -vm web1 -c 2 -m 512 -name web2")
	g.ok("vm.info web2", "512MB", "2 vCPU")
	g.ok("vm.unregister web2")
	g.ok("vm.register web1/web1.vmx")
	g.ok("find -type m", "/Datacenter/vm/web2", "/Datacenter/vm/plain")
	g.fails("kms.rm kms", "web2")

	// Snapshots of its disks.
	g.ok("snapshot.tree -vm web2")
	g.okArgs([]string{"snapshot.create", "-vm", "web2", "-d", "as it was", "clean"})
	g.ok("vm.power -on web2", "OK")
	g.fails("snapshot.create -vm web2 later", "-m=false") // with memory unless told otherwise
	g.ok("snapshot.create -vm web2 -m=false later")
	g.ok("snapshot.tree -vm web2 -D -i -d -c=false", "clean", "as it was", "  [snapshot-", "later")
	g.ok("snapshot.tree -vm web2 -C", "later")
	g.ok("vm.info -r web2", "poweredOn")
	g.fails("vm.disk.create -vm web2 -name web1/more -size 8MB", "2 snapshots", "--all")
	g.ok("snapshot.revert -vm web2 clean")
	g.ok("vm.info web2", "poweredOff")
	g.ok("snapshot.revert -vm web2")
	g.ok("object.collect -s vm/web2 runtime.consolidationNeeded", "false")
	g.ok("snapshot.remove -vm web2 clean/later")
	g.ok("snapshot.create -vm web2 other")
	g.ok("snapshot.tree -vm web2", "clean", "other")
	g.okArgs([]string{"snapshot.remove", "-vm", "web2", "*"})
	g.ok("object.collect -s vm/web2 rootSnapshot")
	if out := g.ok("snapshot.tree -vm web2"); strings.TrimSpace(out) != "" {
		t.Errorf("after all are removed: %s", out)
	}
	g.ok("device.ls -vm web2", "disk-1000-0")
	g.ok("vm.destroy web2")
	g.ok("tasks", "PowerOn", "success")
	g.ok("events -n 200", "web1", "powered on", "Storage policy")
}

func TestGovcRefused(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	w.SetUpProvider()
	w.CreateVM("web1")
	w.User("operator@mortise.local", authz.RoleNoCryptoAdmin)
	w.User("auditor@mortise.local", authz.RoleReadOnly)

	newGovc(t, w, authz.Administrator, "wrong").fails("ls", "wrong user name or password")

	operator := newGovc(t, w, "operator@mortise.local", vimapitest.UserPassword)
	operator.ok("vm.power -on web1", "OK")
	operator.ok("vm.power -off web1", "OK")
	operator.fails("kms.ls", "Cryptographer.ReadKeyServersInfo")
	operator.fails("kms.key.create kms", "Cryptographer.ManageKeys")
	out, err := operator.run("vm.create", "-on=false", "-profile", "VM Encryption Policy", "-disk", "16MB", "-net", "default", "-net.adapter", "vmxnet3", "web2")
	if err == nil || !strings.Contains(out, "Cryptographer.EncryptNew") {
		t.Errorf("an operator encrypts: %v\n%s", err, out)
	}

	auditor := newGovc(t, w, "auditor@mortise.local", vimapitest.UserPassword)
	auditor.ok("vm.info web1", "poweredOff")
	auditor.fails("vm.power -on web1", "VirtualMachine.Interact.PowerOn")
	auditor.fails("vm.destroy web1", "VirtualMachine.Inventory.Delete")
}

// python runs a script of ours on Debian's pyVmomi.
func python(t *testing.T, w *vimapitest.World, script string, args ...string) string {
	t.Helper()
	host, port, err := net.SplitHostPort(strings.TrimPrefix(w.URL, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/usr/bin/python3"); err != nil {
		t.Fatal("python3 is missing: install python3 and python3-pyvmomi")
	}
	cmd := exec.Command("/usr/bin/python3", append([]string{filepath.Join("pyvmomi", script)}, args...)...)
	cmd.Env = append(os.Environ(), "VI_HOST="+host, "VI_PORT="+port, "VI_USER="+authz.Administrator, "VI_PASSWORD="+w.Password, "PYTHONDONTWRITEBYTECODE=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func TestPyVmomiReads(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	for _, name := range []string{"web1", "web2", "web3", "web4", "web5"} {
		w.CreateVM(name)
	}
	out := python(t, w, "read.py", "5")
	for _, want := range []string{"wrong password:", "about: Mortise", "vim.VirtualMachine", "vim.HostSystem", "vim.Datastore", "refused:", "logged out"} {
		if !strings.Contains(out, want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
}

func TestPyVmomiEncrypts(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	w.SetUpProvider()
	w.CreateVM("web1")
	w.User("operator@mortise.local", authz.RoleNoCryptoAdmin)
	out := python(t, w, "crypto.py", "web1", "operator@mortise.local", vimapitest.UserPassword)
	for _, want := range []string{"encrypted with", "recrypted", "denied: Cryptographer.", "decrypted"} {
		if !strings.Contains(out, want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
}

// clientCertificate makes what an administrator uploads for center.
func clientCertificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "center"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}
