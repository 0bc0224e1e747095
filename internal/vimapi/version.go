package vimapi

import (
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// newestVersion is the vim25 version that the server speaks.
const newestVersion = "8.0.3.0"

// priorVersions are the older ones. Those before 7.0 are there for Debian's
// pyVmomi, which knows nothing newer than 6.7.1; the server sends them nothing
// that they do not know.
func priorVersions() []string {
	return []string{
		"8.0.2.0", "8.0.1.0", "8.0.0.2", "8.0.0.1", "8.0.0.0",
		"7.0.3.2", "7.0.3.1", "7.0.3.0", "7.0.2.1", "7.0.2.0", "7.0.1.1", "7.0.1.0", "7.0.0.2", "7.0.0.0", "7.0",
		"6.9.1", "6.8.7", "6.7.3", "6.7.2", "6.7.1", "6.7", "6.5", "6.0", "5.5",
	}
}

// apiVersion is a dotted version; empty parts are zero.
type apiVersion [4]int

// parseVersion reads the version out of a SOAPAction header,
// "urn:vim25/8.0.1.0". What has none is a client of the newest version.
func parseVersion(action string) apiVersion {
	_, text, ok := strings.Cut(strings.Trim(action, `"`), "/")
	v, valid := dotted(text)
	if !ok || !valid || newestAPI().before(v) {
		return newestAPI()
	}
	return v
}

func dotted(text string) (v apiVersion, ok bool) {
	parts := strings.Split(text, ".")
	if len(parts) > len(v) {
		return v, false
	}
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			return v, false
		}
		v[i] = int(n)
	}
	return v, true
}

func (v apiVersion) before(o apiVersion) bool {
	for i := range v {
		if v[i] != o[i] {
			return v[i] < o[i]
		}
	}
	return false
}

// prune empties the fields of an answer that came into the API after v: old
// clients fail at a property that their types do not have. govmomi's struct
// tags tell the version of each field.
func (v apiVersion) prune(fields *fieldCache, value reflect.Value) {
	if !v.before(newestAPI()) {
		return
	}
	switch value.Kind() {
	case reflect.Pointer, reflect.Interface:
		if !value.IsNil() {
			v.prune(fields, value.Elem())
		}
	case reflect.Slice:
		switch value.Type().Elem().Kind() {
		case reflect.Struct, reflect.Pointer, reflect.Interface:
			for i := range value.Len() {
				v.prune(fields, value.Index(i))
			}
		}
	case reflect.Struct:
		for _, f := range fields.of(value.Type()) {
			at := value.Field(f.index)
			if v.before(f.since) && at.CanSet() {
				at.SetZero()
			} else if f.deep {
				v.prune(fields, at)
			}
		}
	}
}

// addedIn70 lists fields, among those that this server fills in, which came with
// version 7.0, where govmomi's tags begin.
func addedIn70(typeName string) []string {
	switch typeName {
	case "KmipClusterInfo":
		return []string{"managementType", "useAsEntityDefault"}
	case "CryptoManagerKmipClusterStatus":
		return []string{"managementType", "overallStatus"}
	case "ClusterConfigInfoEx":
		return []string{"cryptoConfig"}
	case "VirtualMachineConfigSummary", "VirtualMachineGuestSummary":
		return []string{"hwVersion"}
	}
	return nil
}

// fieldCache knows the fields of struct types.
type fieldCache struct {
	types sync.Map // reflect.Type → []field
}

type field struct {
	name  string // on the wire; empty for an embedded struct
	index int
	since apiVersion
	deep  bool // may hold fields itself
}

func (c *fieldCache) of(t reflect.Type) []field {
	if known, ok := c.types.Load(t); ok {
		return known.([]field)
	}
	var all []field
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		n := field{index: i}
		if !f.Anonymous {
			n.name, _, _ = strings.Cut(f.Tag.Get("xml"), ",")
			if n.name == "" {
				n.name, _, _ = strings.Cut(f.Tag.Get("json"), ",")
			}
		}
		n.since, _ = dotted(f.Tag.Get("vim"))
		if slices.Contains(addedIn70(t.Name()), n.name) {
			n.since = apiVersion{7}
		}
		switch f.Type.Kind() {
		case reflect.Pointer, reflect.Interface, reflect.Struct, reflect.Slice:
			n.deep = true
		}
		all = append(all, n)
	}
	c.types.Store(t, all)
	return all
}

// find returns the field of struct v with a name, embedded structs' too.
func (c *fieldCache) find(v reflect.Value, name string) (reflect.Value, bool) {
	fields := c.of(v.Type())
	for _, f := range fields {
		if f.name == name {
			return v.Field(f.index), true
		}
	}
	for _, f := range fields {
		if f.name == "" && v.Type().Field(f.index).Anonymous && v.Field(f.index).Kind() == reflect.Struct {
			if found, ok := c.find(v.Field(f.index), name); ok {
				return found, true
			}
		}
	}
	return reflect.Value{}, false
}

// findType is find on types.
func (c *fieldCache) findType(t reflect.Type, name string) (reflect.Type, bool) {
	fields := c.of(t)
	for _, f := range fields {
		if f.name == name {
			return t.Field(f.index).Type, true
		}
	}
	for _, f := range fields {
		if sub := t.Field(f.index); f.name == "" && sub.Anonymous && sub.Type.Kind() == reflect.Struct {
			if found, ok := c.findType(sub.Type, name); ok {
				return found, true
			}
		}
	}
	return nil, false
}

func newestAPI() apiVersion { v, _ := dotted(newestVersion); return v }
