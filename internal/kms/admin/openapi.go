package admin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"regexp"
	"strings"
	"time"

	"mortise/internal/kms"
)

func descriptionRows() []row {
	r := get("/v1/openapi.json", kms.RoleViewer, "This description (OpenAPI 3.1)", func(c *call) (json.RawMessage, error) {
		return json.MarshalIndent(describe(c.table), "", "  ")
	})
	r.public = true
	return []row{r}
}

// object is a JSON object of the description; encoding/json sorts its fields.
type object = map[string]any

// describe makes the OpenAPI 3.1 description of the rows
// (https://spec.openapis.org/oas/v3.1.0). Types are JSON Schema 2020-12, from Go
// types: the tag `doc` is a field's description, a field without omitempty or
// omitzero is always there.
func describe(table []row) object {
	d := description{schemas: object{}, types: map[string]reflect.Type{}}
	paths := map[string]object{}
	failure := object{"description": "refused", "content": object{"application/json": object{"schema": d.schema(reflect.TypeFor[Error]())}}}
	for _, r := range table {
		ok := object{"description": "done"}
		switch {
		case r.media != "":
			ok["content"] = object{r.media: object{"schema": object{"type": "string", "format": "binary"}}}
		case r.response == reflect.TypeFor[json.RawMessage]():
			ok["content"] = object{"application/json": object{"schema": object{"type": "object"}}}
		default:
			ok["content"] = object{"application/json": object{"schema": d.schema(r.response)}}
		}
		op := object{
			"operationId": operationID(r), "summary": r.summary,
			"responses":  object{"200": ok, "default": failure},
			"x-min-role": string(r.least),
		}
		if r.public {
			op["security"] = []any{}
		}
		if r.socketOnly {
			op["x-socket-only"] = true
			op["description"] = "On the admin socket only, which is root's."
		}
		op["x-scope"] = scope(r)
		if list := parameters(r); len(list) > 0 {
			op["parameters"] = list
		}
		switch {
		case r.upload != "":
			op["requestBody"] = object{"required": true, "content": object{r.upload: object{"schema": object{"type": "string", "format": "binary"}}}}
		case r.request != nil:
			op["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": d.schema(r.request)}}}
		}
		if paths[r.path] == nil {
			paths[r.path] = object{}
		}
		paths[r.path][strings.ToLower(r.method)] = op
	}
	return object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Mortise KMS administration", "version": "1",
			"description": "Administration of a Mortise key server. A caller shows a client certificate, which has a role in its instance, or an API key. x-min-role is the least role that a call takes, in the instance or in the whole server as x-scope says.",
		},
		"paths":    paths,
		"security": []any{object{"apiKey": []any{}}, object{"certificate": []any{}}},
		"components": object{
			"schemas": d.schemas,
			"securitySchemes": object{
				"apiKey":      object{"type": "http", "scheme": "bearer", "description": "an API key of mortise kms apikey add"},
				"certificate": object{"type": "mutualTLS", "description": "a client certificate that is pinned for the instance in the path"},
			},
		},
	}
}

// scope says where a caller needs the role.
func scope(r row) string {
	if strings.Contains(r.path, "{instance}") && !r.wholeServer {
		return "instance"
	}
	return "server"
}

var pathParameter = regexp.MustCompile(`\{([a-z]+)\}`)

func parameters(r row) (list []any) {
	for _, m := range pathParameter.FindAllStringSubmatch(r.path, -1) {
		list = append(list, object{"name": m[1], "in": "path", "required": true, "schema": object{"type": "string"}})
	}
	query := r.query
	if r.confirmed {
		query = append(query[:len(query):len(query)], parameter{"confirm", "hash of what is lost, from the answer 409 to the same call without it"})
	}
	for _, q := range query {
		list = append(list, object{"name": q.name, "in": "query", "description": q.summary, "schema": object{"type": "string"}})
	}
	return list
}

// operationID is the path and the method in words: instancesClientsDelete.
func operationID(r row) string {
	var b strings.Builder
	for _, s := range strings.Split(strings.TrimPrefix(r.path, "/v1/"), "/") {
		if strings.HasPrefix(s, "{") {
			continue
		}
		for i, word := range strings.FieldsFunc(s, func(r rune) bool { return r == '-' || r == '.' }) {
			if b.Len() > 0 || i > 0 {
				word = strings.ToUpper(word[:1]) + word[1:]
			}
			b.WriteString(word)
		}
	}
	method := r.method
	if method == http.MethodGet && strings.HasSuffix(r.path, "}") {
		method = "GETOne"
	}
	return b.String() + method[:1] + strings.ToLower(method[1:])
}

// description collects the named types.
type description struct {
	schemas object
	types   map[string]reflect.Type // of the schemas
}

func (d description) schema(t reflect.Type) object {
	switch t {
	case reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case reflect.TypeFor[kms.Role]():
		return object{"type": "string", "enum": []any{string(kms.RoleViewer), string(kms.RoleKeyManager), string(kms.RoleAdministrator)}}
	case reflect.TypeFor[json.RawMessage]():
		return object{}
	case reflect.TypeFor[time.Duration]():
		return object{"type": "integer", "format": "int64", "description": "nanoseconds"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.schema(t.Elem())
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return object{"type": "integer"}
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	case reflect.Interface:
		return object{}
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": "array", "items": d.schema(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": d.schema(t.Elem())}
	case reflect.Struct:
		if t.Name() == "" {
			return d.fields(t)
		}
		name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
		if have := d.types[name]; have != nil && have != t {
			panic(fmt.Sprintf("admin: both %s and %s would be described as %s", have, t, name)) // as below
		}
		if d.schemas[name] == nil {
			d.types[name] = t
			d.schemas[name] = object{} // ends recursion
			d.schemas[name] = d.fields(t)
		}
		return object{"$ref": "#/components/schemas/" + name}
	}
	panic(fmt.Sprintf("admin: a field of type %s cannot be described", t)) // a row's mistake, found by every test
}

func (d description) fields(t reflect.Type) object {
	properties, required := object{}, []any{}
	for _, f := range reflect.VisibleFields(t) {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "-" || f.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		s := d.schema(f.Type)
		if doc := f.Tag.Get("doc"); doc != "" {
			s["description"] = doc // beside $ref too: JSON Schema 2020-12 allows it
		}
		if strings.Contains(options, "omit") {
			properties[name] = s
			continue
		}
		if k := f.Type.Kind(); k == reflect.Slice || k == reflect.Map || k == reflect.Pointer { // encoded as null when nil
			if list, ok := s["type"].(string); ok {
				s["type"] = []any{list, "null"}
			}
		}
		properties[name] = s
		required = append(required, name)
	}
	return object{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
}
