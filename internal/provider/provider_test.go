package provider

import (
	"strings"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// TestStatesAreKMIPs compares numbers and names with a KMIP library's.
func TestStatesAreKMIPs(t *testing.T) {
	for s := PreActive; s <= DestroyedCompromised; s++ {
		ours := strings.NewReplacer(" ", "", "-", "").Replace(s.String())
		if theirs := ttlv.EnumStr(kmip.State(s)); ours != theirs {
			t.Errorf("state %d is %s to us and %s to KMIP", s, ours, theirs)
		}
		if want := s == PreActive || s == Active; s.Usable() != want {
			t.Errorf("%s usable: %v (K7)", s, s.Usable())
		}
	}
	if s := State(7); !strings.Contains(s.String(), "unknown") || s.Usable() {
		t.Errorf("state 7 is %s", s)
	}
}

func TestStatusUsable(t *testing.T) {
	up, down := ServerStatus{Reachable: true}, ServerStatus{}
	for _, c := range []struct {
		servers []ServerStatus
		want    bool
	}{
		{nil, true}, // a native provider has no servers that could be away
		{[]ServerStatus{down}, false},
		{[]ServerStatus{down, up}, true},
	} {
		if got := (Status{c.servers}).Usable(); got != c.want {
			t.Errorf("%+v: %v", c.servers, got)
		}
	}
}
