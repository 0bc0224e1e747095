package vmsd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"mortise/internal/vmxfile"
)

func full() *Tree {
	t := &Tree{}
	add := func(parent int, name string, files ...string) {
		t.Current = parent
		s := Snapshot{Name: name, Description: "line one\nline \"two\" | # é", Created: time.Date(2026, 11, 22, 4, 5, 6, 789000, time.UTC), PoweredOn: parent == 0, Operation: "task-7"}
		for i, f := range files {
			s.Disks = append(s.Disks, Disk{fmt.Sprintf("scsi0:%d", i), f})
		}
		if _, err := t.Add(s); err != nil {
			panic(err)
		}
	}
	add(0, "one", "vm.vmdk", "vm_1.vmdk")
	add(1, "two", "vm-000001.vmdk", "vm_1-000001.vmdk")
	add(1, "three", "vm-000002.vmdk", "vm_1-000002.vmdk")
	add(3, "four", "vm-000004.vmdk", "vm_1-000004.vmdk")
	t.Current, t.Making, t.Reverting = 3, 4, 2
	t.Released, t.New = []string{"vm-000009.vmdk"}, []string{"vm-000010.vmdk", "vm_1-000010.vmdk"}
	t.Merge = Merge{"vm-000004.vmdk", "vm-000002.vmdk"}
	return t
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.vmsd")
	if got, err := Load(path); err != nil || !reflect.DeepEqual(got, &Tree{}) {
		t.Fatalf("no file: %+v, %v", got, err)
	}
	for _, created := range []time.Time{time.UnixMicro(0).UTC(), time.UnixMicro(1<<31 - 1).UTC(), time.UnixMicro(1 << 31).UTC(), time.UnixMicro(-1).UTC()} {
		want := full()
		want.Snapshots[0].Created = created
		if err := want.Save(path); err != nil {
			t.Fatal(err)
		}
		if got, err := Load(path); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%v\n got %+v\nwant %+v", err, got, want)
		}
	}
}

// A file as vSphere 8 writes one, in the names and forms of its documentation.
const theirs = `.encoding = "UTF-8"
snapshot.lastUID = "2"
snapshot.current = "2"
snapshot0.uid = "1"
snapshot0.filename = "vm-Snapshot1.vmsn"
snapshot0.displayName = "clean install"
snapshot0.description = ""
snapshot0.createTimeHigh = "404432"
snapshot0.createTimeLow = "-1137541120"
snapshot0.numDisks = "1"
snapshot0.disk0.fileName = "vm.vmdk"
snapshot0.disk0.node = "scsi0:0"
snapshot1.uid = "2"
snapshot1.parent = "1"
snapshot1.displayName = "patched"
snapshot1.createTimeHigh = "404432"
snapshot1.createTimeLow = "120000"
snapshot1.numDisks = "1"
snapshot1.disk0.fileName = "vm-000001.vmdk"
snapshot1.disk0.node = "scsi0:0"
snapshot.numSnapshots = "2"
`

func TestTheirs(t *testing.T) {
	tree, err := Parse("vm.vmsd", []byte(theirs))
	if err != nil {
		t.Fatal(err)
	}
	// 404432 × 2³² + (2³² − 1137541120) microseconds.
	if at := tree.Find(1).Created; at.UnixMicro() != 404432<<32+(1<<32-1137541120) {
		t.Errorf("created %v", at)
	}
	if s := tree.Find(2); s.Name != "patched" || s.Parent != 1 || s.Disks[0] != (Disk{"scsi0:0", "vm-000001.vmdk"}) || tree.Current != 2 {
		t.Errorf("%+v", tree)
	}
}

func TestBad(t *testing.T) {
	for name, edit := range map[string][2]string{
		"a parent that is not there": {`snapshot1.parent = "1"`, `snapshot1.parent = "7"`},
		"its own parent":             {`snapshot1.parent = "1"`, `snapshot1.parent = "2"`},
		"twice the same":             {`snapshot1.uid = "2"`, `snapshot1.uid = "1"`},
		"no uid":                     {`snapshot1.uid = "2"`, ``},
		"a negative uid":             {`snapshot1.uid = "2"`, `snapshot1.uid = "-2"`},
		"a current one of none":      {`snapshot.current = "2"`, `snapshot.current = "3"`},
		"too many":                   {`numSnapshots = "2"`, `numSnapshots = "99999999"`},
		"fewer than said":            {`numSnapshots = "2"`, `numSnapshots = "3"`},
		"too many disks":             {`snapshot0.numDisks = "1"`, `snapshot0.numDisks = "99999999"`},
		"another folder's disk":      {`"vm-000001.vmdk"`, `"../other/vm.vmdk"`},
		"no disk":                    {`"vm-000001.vmdk"`, `"vm.vmx"`},
		"no number":                  {`lastUID = "2"`, `lastUID = "two"`},
		"time beyond all":            {`"404432"`, `"4294967296"`},
	} {
		text := strings.Replace(theirs, edit[0], edit[1], 1)
		if text == theirs {
			t.Fatal(name)
		}
		_, err := Parse("vm.vmsd", []byte(text))
		var e *vmxfile.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), "vm.vmsd") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A tree that is too much for a file is refused, and the file stays.
func TestFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.vmsd")
	tree := &Tree{}
	s := Snapshot{Name: "n"}
	for i := range 20 {
		s.Disks = append(s.Disks, Disk{fmt.Sprintf("scsi0:%d", i), fmt.Sprintf("vm_%d.vmdk", i)})
	}
	for n := 0; ; n++ {
		if _, err := tree.Add(s); err != nil {
			t.Fatalf("after %d: %v", n, err)
		}
		if n%100 != 0 {
			continue
		}
		err := tree.Save(path)
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got, err := Load(path); err != nil || len(got.Snapshots) == 0 {
		t.Errorf("%v, %v", got, err)
	}
	tree = &Tree{}
	for {
		if _, err := tree.Add(Snapshot{Name: "n"}); errors.Is(err, ErrFull) {
			break
		}
	}
	if err := tree.Save(path); err != nil {
		t.Errorf("%d snapshots: %v", len(tree.Snapshots), err)
	}
}

func TestRemove(t *testing.T) {
	names := func(tree *Tree) (s string) {
		for _, n := range tree.Snapshots {
			s += fmt.Sprintf("%d<%d ", n.UID, n.Parent)
		}
		return fmt.Sprintf("%s@%d %v", s, tree.Current, tree.Released)
	}
	for _, c := range []struct {
		uid      int
		children bool
		want     string
	}{
		{1, false, "2<0 3<0 4<3 @3 [vm-000009.vmdk vm.vmdk vm_1.vmdk]"},
		{2, false, "1<0 3<1 4<3 @3 [vm-000009.vmdk vm-000001.vmdk vm_1-000001.vmdk]"},
		{3, false, "1<0 2<1 4<1 @1 [vm-000009.vmdk vm-000002.vmdk vm_1-000002.vmdk]"},
		{3, true, "1<0 2<1 @1 [vm-000009.vmdk vm-000002.vmdk vm_1-000002.vmdk vm-000004.vmdk vm_1-000004.vmdk]"},
		{1, true, "@0 [vm-000009.vmdk vm.vmdk vm_1.vmdk vm-000001.vmdk vm_1-000001.vmdk vm-000002.vmdk vm_1-000002.vmdk vm-000004.vmdk vm_1-000004.vmdk]"},
		{0, true, "1<0 2<1 3<1 4<3 @3 [vm-000009.vmdk]"},
		{9, true, "1<0 2<1 3<1 4<3 @3 [vm-000009.vmdk]"},
	} {
		tree := full()
		tree.Remove(c.uid, c.children)
		if got := names(tree); got != c.want {
			t.Errorf("without %d, children %v: %s\nwant %s", c.uid, c.children, got, c.want)
		}
		path := filepath.Join(t.TempDir(), "vm.vmsd")
		if err := tree.Save(path); err != nil {
			t.Error(err)
		} else if _, err := Load(path); err != nil {
			t.Errorf("without %d: %v", c.uid, err)
		}
	}
	tree := full()
	tree.Replace("vm-000002.vmdk", "vm.vmdk")
	if f := tree.Find(3).Disks[0].File; f != "vm.vmdk" {
		t.Error(f)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(theirs))
	path := filepath.Join(f.TempDir(), "vm.vmsd")
	if err := full().Save(path); err != nil {
		f.Fatal(err)
	}
	ours, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ours)
	f.Fuzz(func(t *testing.T, text []byte) {
		tree, err := Parse("vm.vmsd", text)
		if err != nil {
			return
		}
		f, err := tree.file()
		if err != nil {
			t.Skip() // what no dictionary can say, such as a line too long
		}
		again, err := Parse("vm.vmsd", f.Bytes())
		if err != nil || !reflect.DeepEqual(tree, again) {
			t.Errorf("%v\n%+v\n%+v", err, tree, again)
		}
	})
}
