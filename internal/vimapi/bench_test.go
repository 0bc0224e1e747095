package vimapi

import (
	"context"
	"fmt"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// BenchmarkWatchers is center's design size: 10,000 VMs, ten clients that watch
// them all through a container view, and 100 changes at once. It reports how
// long it takes until every client has seen every change, over TLS and SOAP, and
// how long a client's first answer takes, with all VMs in it.
func BenchmarkWatchers(b *testing.B) {
	const vms, watchers, changes = 10_000, 10, 100
	w := newWorld(b)
	w.fill(b, vms)
	var list []*watcher
	var first time.Duration
	for range watchers {
		c, err := govmomi.NewClient(context.Background(), w.url(authz.Administrator, w.password), true)
		if err != nil {
			b.Fatal(err)
		}
		x := watch(b, c, viewSpec(b, c, "name", "runtime.powerState", "runtime.connectionState", "summary.overallStatus", "config.keyId"))
		start := time.Now()
		set, err := x.wait("", 60, 0)
		if err != nil {
			b.Fatal(err)
		}
		first += time.Since(start)
		n := 0
		for _, f := range set.FilterSet {
			n += len(f.ObjectSet)
		}
		if n != vms {
			b.Fatalf("the first answer has %d VMs", n)
		}
		x.version = set.Version
		list = append(list, x)
	}
	power := inventory.PoweredOff
	var slowest time.Duration
	for b.Loop() {
		if power == inventory.PoweredOff {
			power = inventory.PoweredOn
		} else {
			power = inventory.PoweredOff
		}
		var seen sync.WaitGroup
		start := time.Now()
		for _, x := range list {
			seen.Go(func() { x.until(changes, string(power)) })
		}
		for i := range changes {
			w.edit(b, inventory.NewRef("vm", int64(100+i*97)), func(vm *inventory.VM) { vm.Power = power })
		}
		seen.Wait()
		slowest = max(slowest, time.Since(start))
	}
	b.ReportMetric(slowest.Seconds()*1000, "ms/all-seen-max")
	b.ReportMetric(first.Seconds()*1000/watchers, "ms/first-answer")
}

// until waits until n VMs have changed to a power state.
func (x *watcher) until(n int, power string) {
	seen := map[string]bool{}
	for len(seen) < n {
		set, err := x.wait(x.version, 60, 0)
		if err != nil || set == nil {
			x.t.Errorf("after %d changes: %v", len(seen), err)
			return
		}
		x.version = set.Version
		for _, f := range set.FilterSet {
			for _, u := range f.ObjectSet {
				for _, c := range u.ChangeSet {
					if c.Name == "runtime.powerState" && fmt.Sprint(c.Val) == power {
						seen[u.Obj.Value] = true
					}
				}
			}
		}
	}
}

// viewSpec selects all VMs through a container view.
func viewSpec(t testing.TB, c *govmomi.Client, paths ...string) types.PropertyFilterSpec {
	t.Helper()
	view, err := methods.CreateContainerView(context.Background(), c, &types.CreateContainerView{
		This: *c.ServiceContent.ViewManager, Container: c.ServiceContent.RootFolder, Type: []string{"VirtualMachine"}, Recursive: true})
	if err != nil {
		t.Fatal(err)
	}
	return types.PropertyFilterSpec{
		PropSet: []types.PropertySpec{{Type: "VirtualMachine", PathSet: paths}},
		ObjectSet: []types.ObjectSpec{{Obj: view.Returnval, Skip: types.NewBool(true), SelectSet: []types.BaseSelectionSpec{
			&types.TraversalSpec{Type: "ContainerView", Path: "view"},
		}}},
	}
}

// BenchmarkRetrieve reads four properties of 10,000 VMs in one go.
func BenchmarkRetrieve(b *testing.B) {
	w := newWorld(b)
	w.fill(b, 10_000)
	u, _ := url.Parse(w.web.URL + "/sdk")
	u.User = url.UserPassword(authz.Administrator, w.password)
	c, err := govmomi.NewClient(context.Background(), u, true)
	if err != nil {
		b.Fatal(err)
	}
	spec := viewSpec(b, c, "name", "runtime.powerState", "config.uuid", "summary.overallStatus")
	for b.Loop() {
		res, err := methods.RetrieveProperties(context.Background(), c, &types.RetrieveProperties{This: c.ServiceContent.PropertyCollector, SpecSet: []types.PropertyFilterSpec{spec}})
		if err != nil || len(res.Returnval) != 10_000 {
			b.Fatalf("%d VMs, %v", len(res.Returnval), err)
		}
	}
}
