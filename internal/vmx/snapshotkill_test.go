package vmx

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
	"mortise/internal/vmsd"
)

// decisive are vdisk's steps at which the links stand differently.
var decisive = regexp.MustCompile(`^disk/(merge\.(begun|moved|repointed|committed|deleted)|snapshot|create\.d|descriptor\.d)`)

// Every act on snapshots, killed at each of its steps and repeated, comes to its end
// with every sector of the disks and of every snapshot that stays (R3).
func TestSnapshotsKilledAtEveryStep(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	k1 := "k1"
	line := newSnapLab(t, &k1)
	line.write("base", 0, 4)
	line.take("one")
	line.write("after one", 2, 1)
	line.take("two")
	line.write("after two", 3, 2)
	line.take("three")
	line.write("after three", 6, 1)
	tree := newSnapLab(t, &k1)
	tree.write("base", 0, 4)
	tree.take("one")
	tree.write("after one", 2, 1)
	tree.take("two")
	tree.write("after two", 3, 2)
	tree.revert("one")
	tree.write("another way", 0, 1)
	tree.take("three")
	tree.write("after three", 6, 1)
	for name, c := range map[string]struct {
		made *snapLab
		act  hostapi.SnapshotRequest_Act
		of   string
		then func(*snapLab)
	}{
		"bottom": {line, hostapi.SnapshotRequest_REMOVE, "one", func(l *snapLab) { delete(l.froze, "one") }},
		"middle": {line, hostapi.SnapshotRequest_REMOVE, "two", func(l *snapLab) { delete(l.froze, "two") }},
		"create": {tree, hostapi.SnapshotRequest_CREATE, "", func(l *snapLab) { l.froze["four"] = bytes.Clone(l.now) }},
		"revert": {tree, hostapi.SnapshotRequest_REVERT, "two", func(l *snapLab) { l.now = bytes.Clone(l.froze["two"]) }},
		"remove": {tree, hostapi.SnapshotRequest_REMOVE, "three", func(l *snapLab) { delete(l.froze, "three") }},
		"prune":  {tree, hostapi.SnapshotRequest_REMOVE, "two", func(l *snapLab) { delete(l.froze, "two") }},
		"all":    {tree, hostapi.SnapshotRequest_REMOVE_ALL, "", func(l *snapLab) { clear(l.froze) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			made := c.made
			dir := filepath.Join(t.TempDir(), "web1")
			restore := func() *snapLab {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
				if err := os.CopyFS(dir, os.DirFS(filepath.Dir(made.path))); err != nil {
					t.Fatal(err)
				}
				inner := *made.lab
				inner.T, inner.path, inner.inDisks = t, filepath.Join(dir, "web1.vmx"), true
				return &snapLab{lab: &inner, disks: made.disks, now: bytes.Clone(made.now), froze: maps.Clone(made.froze)}
			}
			l := restore()
			request := func() *hostapi.SnapshotRequest {
				r := &hostapi.SnapshotRequest{Act: c.act, Name: "four", Header: &hostapi.Header{OperationId: "make four"}}
				if c.of != "" {
					for i, n := range []string{"one", "two", "three"} {
						if n == c.of {
							r.Id = int32(i + 1)
						}
					}
				}
				return r
			}
			l.kill = "never"
			p := l.start()
			if _, err := l.act(p, request()); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(p.run, "steps"))
			if err != nil {
				t.Fatal(err)
			}
			l.stop(p)
			all := strings.Fields(string(text))
			if len(all) < 3 {
				t.Fatalf("steps: %v", all)
			}
			for _, step := range all {
				if strings.HasPrefix(step, "disk/") && (!strings.HasSuffix(step, ":1") || !decisive.MatchString(step)) {
					continue // vdisk's own tests kill at all of them
				}
				l := restore()
				l.kill = step
				p := l.start()
				if _, err := l.act(p, request()); err == nil {
					t.Fatalf("%s: not killed\n%s", step, p.log)
				}
				<-p.done
				l.kill = ""
				l.mustAct(request())
				c.then(l)
				l.checkAll("killed at " + step)
				info, err := Inspect(l.path)
				if err != nil || len(info.Snapshots) != len(l.froze) || info.ConsolidationNeeded && name != "remove" || len(info.Problems) > 0 {
					t.Errorf("killed at %s: %v, %v", step, info, err)
				}
				if len(l.froze) == 0 {
					if links := l.links(); len(links) != 2 {
						t.Errorf("killed at %s: links %v", step, links)
					}
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			t.Logf("killed at %v", all)
		})
	}
}

// What a merge has come to is seen by its links: also between the end of the merge
// and the removal of the link, when both are there.
func TestSettleMerge(t *testing.T) {
	l := newSnapLab(t, nil)
	l.take("one")
	l.take("two")
	v := &vm{path: l.path, at: func(string) {}}
	for _, c := range []struct {
		name     string
		merge    vmsd.Merge
		top      string
		released []string
		two      string // what the second snapshot has
	}{
		{"not at its end", vmsd.Merge{Link: "web1-000001.vmdk", Parent: "web1.vmdk"}, "", []string{"web1.vmdk"}, "web1-000001.vmdk"},
		{"something else stands on the parent", vmsd.Merge{Link: "web1_1-000001.vmdk", Parent: "web1.vmdk"}, "", []string{"web1_1-000001.vmdk"}, "web1-000001.vmdk"},
		{"the parent is the disk", vmsd.Merge{Link: "web1-000001.vmdk", Parent: "web1.vmdk"}, "web1.vmdk", []string{"web1-000001.vmdk"}, "web1.vmdk"},
		{"the link is gone", vmsd.Merge{Link: "none.vmdk", Parent: "web1.vmdk"}, "", nil, "web1-000001.vmdk"},
		{"the parent is gone", vmsd.Merge{Link: "web1-000001.vmdk", Parent: "none.vmdk"}, "", []string{"web1.vmdk"}, "web1-000001.vmdk"},
	} {
		tree, err := vmsd.Load(vmsdPath(l.path))
		if err != nil {
			t.Fatal(err)
		}
		tree.Merge, tree.Released = c.merge, []string{"web1.vmdk"}
		changed, err := v.settleMerge(tree, func(file string) bool { return file == c.top })
		if err != nil || !changed || tree.Merge != (vmsd.Merge{}) {
			t.Fatalf("%s: %v, %v", c.name, changed, err)
		}
		if !slices.Equal(tree.Released, c.released) || tree.Find(2).Disks[0].File != c.two {
			t.Errorf("%s: released %v, the second has %v", c.name, tree.Released, tree.Find(2).Disks)
		}
	}
}

// Linked clones on a snapshot's link: what is removed does not touch them, and is at
// its end; the VM is not deleted, not even in part.
func TestSnapshotsWithClones(t *testing.T) {
	k1 := "k1"
	l := newSnapLab(t, &k1)
	l.write("base", 0, 4)
	l.take("one")
	l.write("after one", 2, 1)
	l.take("two")
	l.write("after two", 3, 1)
	dir := filepath.Dir(l.path)
	other := filepath.Join(filepath.Dir(dir), "clone")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	kek, err := secret.Take(bytes.Clone(l.keks["k1"]))
	if err != nil {
		t.Fatal(err)
	}
	o := vdisk.Options{VM: l.vm, KEKs: keysafe.KEKSet{{Provider: "kms", Key: "k1"}: kek}, Live: t.TempDir()}
	clone := filepath.Join(other, "clone.vmdk")
	if err := vdisk.LinkedClone(t.Context(), filepath.Join(dir, "web1-000001.vmdk"), clone, o, vdisk.CloneSpec{VM: uuid.New()}); err != nil {
		t.Fatal(err)
	}
	info := l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REMOVE_ALL})
	clear(l.froze)
	if len(info.Snapshots) > 0 || info.ConsolidationNeeded {
		t.Errorf("%v", info)
	}
	l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_CONSOLIDATE})
	l.check("without snapshots")
	before := l.tree()
	if _, err := Delete(l.path, l.vm.String()); kindOf(err) != hostapi.Fault_IN_USE {
		t.Errorf("deleting it: %v", err)
	}
	if l.tree() != before {
		t.Error("something was deleted")
	}
}
