package vimapi

import (
	"reflect"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// A propPath names a property or a part of one: "runtime.powerState",
// `config.hardware.device[2000].backing`, `config.extraConfig["a.b"].value`.
type propPath []segment

type segment struct {
	name  string
	key   string // what stands in brackets
	keyed bool
}

// maxPath bounds a property path, in bytes and in segments.
const (
	maxPath     = 1000
	maxSegments = 32
)

// parsePath reads a path.
func parsePath(text string) (propPath, error) {
	bad := func() (propPath, error) {
		return nil, fault(&types.InvalidProperty{Name: clip(text)}, "%q is no property path", clip(text))
	}
	if len(text) > maxPath {
		return bad()
	}
	var p propPath
	for rest := text; ; {
		if len(p) == maxSegments {
			return bad()
		}
		end := strings.IndexAny(rest, ".[")
		if end < 0 {
			end = len(rest)
		}
		seg := segment{name: rest[:end]}
		if seg.name == "" {
			return bad()
		}
		rest = rest[end:]
		if strings.HasPrefix(rest, "[") {
			key, after, ok := cutKey(rest[1:])
			if !ok {
				return bad()
			}
			seg.key, seg.keyed, rest = key, true, after
		}
		p = append(p, seg)
		if rest == "" {
			return p, nil
		}
		if rest[0] != '.' || len(rest) == 1 {
			return bad()
		}
		rest = rest[1:]
	}
}

// cutKey reads a key up to its closing bracket; a quoted one may hold brackets.
func cutKey(s string) (key, after string, ok bool) {
	if strings.HasPrefix(s, `"`) {
		key, after, ok = strings.Cut(s[1:], `"`)
		if !ok || !strings.HasPrefix(after, "]") {
			return "", "", false
		}
		return key, after[1:], true
	}
	key, after, ok = strings.Cut(s, "]")
	return key, after, ok && key != ""
}

// checkPath tells whether a managed object type has the property. Behind a field
// whose type varies everything is possible.
func (s *Server) checkPath(name string, t reflect.Type, text string, p propPath) error {
	for _, seg := range p {
		for t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t.Kind() == reflect.Interface {
			return nil
		}
		var ok bool
		if t.Kind() == reflect.Struct {
			t, ok = s.fields.findType(t, seg.name)
		}
		if !ok || seg.name == "self" {
			return fault(&types.InvalidProperty{Name: clip(text)}, "%s has no property %q", name, clip(text))
		}
		if seg.keyed {
			if t.Kind() != reflect.Slice {
				return fault(&types.InvalidProperty{Name: clip(text)}, "%s: %q is no array", name, clip(text))
			}
			t = t.Elem()
		}
	}
	return nil
}

// raw computes the property at p as a Go value; the zero Value when it is not
// set.
func (r *reader) raw(o object, p propPath) (reflect.Value, error) {
	compute := o.kind.props[p[0].name]
	if compute == nil {
		return reflect.Value{}, nil
	}
	got, known := o.memo[p[0].name]
	if !known {
		got = compute(r, o)
		if o.memo != nil {
			o.memo[p[0].name] = got
		}
	}
	if err, ok := got.(error); ok {
		return reflect.Value{}, err
	}
	v := reflect.ValueOf(got)
	for i, seg := range p {
		if i > 0 {
			if v = pointee(v); v.Kind() != reflect.Struct {
				return reflect.Value{}, nil
			}
			var ok bool
			if v, ok = r.s.fields.find(v, seg.name); !ok {
				return reflect.Value{}, nil
			}
		}
		if seg.keyed {
			v = r.element(v, seg.key)
		}
	}
	return v, nil
}

// pointee follows pointers and interfaces; the zero Value when one is nil.
func pointee(v reflect.Value) reflect.Value {
	for v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface {
		v = v.Elem()
	}
	return v
}

// element finds the element of an array by its key.
func (r *reader) element(v reflect.Value, key string) reflect.Value {
	if v = pointee(v); v.Kind() != reflect.Slice {
		return reflect.Value{}
	}
	for i := range v.Len() {
		e := pointee(v.Index(i))
		if e.Kind() != reflect.Struct {
			continue
		}
		k, ok := r.s.fields.find(e, "key")
		if !ok {
			continue
		}
		switch k = pointee(k); k.Kind() {
		case reflect.String:
			ok = k.String() == key
		case reflect.Int32, reflect.Int64:
			ok = strconv.FormatInt(k.Int(), 10) == key
		default:
			ok = false
		}
		if ok {
			return v.Index(i)
		}
	}
	return reflect.Value{}
}

// property is raw in the form that it has on the wire; nil when it is not set.
func (r *reader) property(o object, p propPath) (any, error) {
	v, err := r.raw(o, p)
	if err != nil {
		return nil, err
	}
	return box(v), nil
}

// box makes a value an xsd:anyType: arrays become ArrayOf types, structs are
// behind a pointer. Empty strings (and with them empty enumerations, which
// clients refuse) count as not set.
func box(v reflect.Value) any {
	if v = pointee(v); !v.IsValid() {
		return nil
	}
	switch v.Kind() {
	case reflect.String:
		if v.Len() == 0 {
			return nil
		}
	case reflect.Slice:
		return boxSlice(v)
	case reflect.Struct:
		p := reflect.New(v.Type())
		p.Elem().Set(v)
		return p.Interface()
	}
	return v.Interface()
}

func boxSlice(v reflect.Value) any {
	switch list := v.Interface().(type) {
	case []string:
		return &types.ArrayOfString{String: list}
	case []byte:
		return &types.ArrayOfByte{Byte: list}
	case []int16:
		return &types.ArrayOfShort{Short: list}
	case []int32:
		return &types.ArrayOfInt{Int: list}
	case []int64:
		return &types.ArrayOfLong{Long: list}
	}
	name := v.Type().Elem().Name()
	if v.Type().Elem().Kind() == reflect.Interface {
		name = strings.TrimPrefix(name, "Base")
	}
	t, ok := types.TypeFunc()("ArrayOf" + name)
	if !ok {
		return nil
	}
	array := reflect.New(t)
	array.Elem().FieldByName(name).Set(v)
	return array.Interface()
}
