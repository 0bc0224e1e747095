package admin

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// https serves the API over the network and returns its address and the
// thumbprint of its certificate.
func (b *bed) https() (url, thumbprint string) {
	b.t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		b.t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Server: true, Life: 24 * time.Hour, Hosts: []string{"127.0.0.1"}}, "kms", time.Now())
	if err != nil {
		b.t.Fatal(err)
	}
	creds, err := pki.NewCredentials([]*x509.Certificate{cert}, key)
	if err != nil {
		b.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- b.api.ServeHTTPS(ctx, l, creds) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			b.t.Errorf("ServeHTTPS: %v", err)
		}
	})
	return "https://" + l.Addr().String(), pki.Thumbprint(cert)
}

// remote dials as the holder of an API key or a certificate.
func (b *bed) remote(url, thumbprint, key string, cert *tls.Certificate) *Client {
	b.t.Helper()
	c, err := Dial(Remote{URL: url, Thumbprint: thumbprint, APIKey: key, Certificate: cert})
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *bed) apiKey(instance string, role kms.Role, serverWide bool) string {
	b.t.Helper()
	k, err := b.socket.AddAPIKey(b.t.Context(), instance, AddAPIKey{Name: fmt.Sprintf("%s-%s-%v", instance, role, serverWide), Role: role, ServerWide: serverWide})
	if err != nil {
		b.t.Fatal(err)
	}
	return k.Key
}

func (b *bed) instance(id string) kms.Instance {
	b.t.Helper()
	i, err := b.socket.CreateInstance(b.t.Context(), CreateInstance{ID: id})
	if err != nil {
		b.t.Fatal(err)
	}
	return i
}

func status(err error) int {
	var e *Error
	switch {
	case err == nil:
		return http.StatusOK
	case errors.As(err, &e):
		return e.Status
	}
	return 0
}

// TestRolesAgainstRows calls every row as every kind of caller. A call that
// passes the door may still fail for what it asks, but not with 401, 403 or, for
// somebody else's instance, anything but 404.
func TestRolesAgainstRows(t *testing.T) {
	b := start(t)
	url, thumb := b.https()
	b.instance("tenant-a")
	b.instance("tenant-b")
	roles := []kms.Role{kms.RoleViewer, kms.RoleKeyManager, kms.RoleAdministrator}
	type caller struct {
		name   string
		client *Client
		role   kms.Role
		scope  string // "" nobody, "server", or an instance
	}
	callers := []caller{
		{"nobody", b.remote(url, thumb, "", nil), "", ""},
		{"forged key", b.remote(url, thumb, "mkms_tenant-a_"+strings.Repeat("A", 43), nil), "", ""},
		{"socket", b.socket, kms.RoleAdministrator, "server"},
	}
	for _, role := range roles {
		callers = append(callers,
			caller{"server-wide " + string(role), b.remote(url, thumb, b.apiKey(kms.DefaultInstance, role, true), nil), role, "server"},
			caller{"tenant-a " + string(role), b.remote(url, thumb, b.apiKey("tenant-a", role, false), nil), role, "tenant-a"},
			caller{"tenant-b " + string(role), b.remote(url, thumb, b.apiKey("tenant-b", role, false), nil), role, "tenant-b"},
		)
	}
	for _, r := range b.api.table {
		path := strings.ReplaceAll(r.path, "{instance}", "tenant-a")
		path = regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllString(path, "nonesuch")
		inInstance := strings.Contains(r.path, "{instance}")
		for _, c := range callers {
			// What is sent is not of the row's form, so that no call does anything.
			answer, err := c.client.send(t.Context(), r.method, path, nil, strings.NewReader("{"), "application/json")
			if err == nil {
				answer.Close()
			}
			got := status(err)
			if strings.HasSuffix(path, "/grant") && r.method == http.MethodDelete { // this one needs no body
				if _, err := b.socket.GrantInstance(t.Context(), "tenant-a"); err != nil {
					t.Fatal(err)
				}
			}
			passes := c.role.Covers(r.least) && (c.scope == "server" || inInstance && !r.wholeServer && c.scope == "tenant-a")
			switch {
			case r.public:
				if got != http.StatusOK {
					t.Errorf("%s %s as %s: %d, it is for everybody", r.method, path, c.name, got)
				}
			case c.name == "socket" || passes && !r.socketOnly:
				if got == http.StatusUnauthorized || got == http.StatusForbidden || got == 0 || got == http.StatusMethodNotAllowed {
					t.Errorf("%s %s as %s: %v, it may", r.method, path, c.name, err)
				}
			case r.socketOnly:
				if got != http.StatusNotFound && got != http.StatusMethodNotAllowed {
					t.Errorf("%s %s as %s: %d over the network; it is for the socket", r.method, path, c.name, got)
				}
			case c.scope == "":
				if got != http.StatusUnauthorized {
					t.Errorf("%s %s as %s: %d, want 401", r.method, path, c.name, got)
				}
			case inInstance && c.scope == "tenant-b":
				if got != http.StatusNotFound {
					t.Errorf("%s %s as %s: %d, want 404: it is somebody else's instance", r.method, path, c.name, got)
				}
			default:
				if got != http.StatusForbidden {
					t.Errorf("%s %s as %s: %d, want 403", r.method, path, c.name, got)
				}
			}
		}
	}
	// Nothing was done on the way.
	if list, err := b.socket.Instances(t.Context()); err != nil || len(list) != 3 || list[1].State != kms.InstanceServing {
		t.Errorf("instances afterwards: %+v, %v", list, err)
	}
}

// TestCertificatesOverHTTPS: a pinned certificate has its role in its instance,
// and what is told to others does not depend on whether an instance exists.
func TestCertificatesOverHTTPS(t *testing.T) {
	b, ctx := start(t), t.Context()
	url, thumb := b.https()
	b.instance("tenant-a")
	b.instance("tenant-b")
	issue, err := b.socket.IssueClient(ctx, "tenant-a", IssueClient{Name: "ops.example.com", Role: kms.RoleAdministrator})
	if err != nil {
		t.Fatal(err)
	}
	chain, key, err := pki.ParseKeyPair([]byte(issue.Certificate), []byte(issue.Key))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := pki.TLSCertificate(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	ops := b.remote(url, thumb, "", &pair)
	if list, err := ops.Clients(ctx, "tenant-a"); err != nil || len(list) != 1 || list[0].Name != "ops.example.com" {
		t.Errorf("own clients: %+v, %v", list, err)
	}
	if _, err := ops.IssueClient(ctx, "tenant-a", IssueClient{Name: "second.example.com"}); err != nil {
		t.Errorf("an administrator's certificate issues another: %v", err)
	}
	_, other := ops.Clients(ctx, "tenant-b")
	_, none := ops.Clients(ctx, "tenant-x")
	if status(other) != http.StatusUnauthorized || strings.ReplaceAll(other.Error(), "tenant-b", "tenant-x") != none.Error() {
		t.Errorf("another's instance: %v; none: %v", other, none)
	}
	if _, err := ops.Instances(ctx); status(err) != http.StatusForbidden {
		t.Errorf("all instances: %v", err)
	}
	if err := ops.DeleteInstance(ctx, "tenant-a", ""); status(err) != http.StatusForbidden {
		t.Errorf("deleting its own instance: %v", err)
	}
	// Revoked: on the same kept connection it is out at once.
	if _, err := b.socket.RemoveClient(ctx, "tenant-a", "ops.example.com"); err != nil {
		t.Fatal(err)
	}
	if _, err := ops.Clients(ctx, "tenant-a"); status(err) != http.StatusUnauthorized {
		t.Errorf("after it was revoked: %v", err)
	}
	// Another server in between is noticed.
	wrong := b.remote(url, strings.Repeat("AB:", 31)+"AB", "", &pair)
	if _, err := wrong.Clients(ctx, "tenant-a"); err == nil || !strings.Contains(err.Error(), "thumbprint") {
		t.Errorf("another thumbprint: %v", err)
	}
}

func TestAPIKeys(t *testing.T) {
	b, ctx := start(t), t.Context()
	url, thumb := b.https()
	b.instance("tenant-a")
	added, err := b.socket.AddAPIKey(ctx, "tenant-a", AddAPIKey{Name: "monitoring", Days: 2})
	if err != nil || added.Role != kms.RoleViewer || !strings.HasPrefix(added.Key, "mkms_tenant-a_") || len(added.ID) != 16 {
		t.Fatalf("%+v, %v", added, err)
	}
	if list, err := b.socket.APIKeys(ctx, "tenant-a"); err != nil || len(list) != 1 || list[0] != added.APIKey {
		t.Errorf("list: %+v, %v", list, err)
	}
	c := b.remote(url, thumb, added.Key, nil)
	if _, err := c.Clients(ctx, "tenant-a"); err != nil {
		t.Errorf("a viewer lists clients: %v", err)
	}
	for _, bad := range []string{"", "x", added.Key[:len(added.Key)-1], added.Key + "A", strings.Replace(added.Key, "tenant-a", "default", 1), strings.Replace(added.Key, "tenant-a", "none", 1)} {
		if _, err := b.remote(url, thumb, bad, nil).Clients(ctx, "tenant-a"); status(err) != http.StatusUnauthorized {
			t.Errorf("key %q: %v", bad, err)
		}
	}
	// An instance's administrator makes no server-wide key, nor one that counts elsewhere.
	admin := b.remote(url, thumb, b.apiKey("tenant-a", kms.RoleAdministrator, false), nil)
	if _, err := admin.AddAPIKey(ctx, "tenant-a", AddAPIKey{Name: "up", ServerWide: true}); status(err) != http.StatusBadRequest {
		t.Errorf("server-wide in an instance: %v", err)
	}
	admin = b.remote(url, thumb, b.apiKey(kms.DefaultInstance, kms.RoleAdministrator, false), nil)
	if _, err := admin.AddAPIKey(ctx, kms.DefaultInstance, AddAPIKey{Name: "up", ServerWide: true}); status(err) != http.StatusForbidden {
		t.Errorf("server-wide by the default instance's administrator: %v", err)
	}
	b.clock.pass(49 * time.Hour)
	if _, err := c.Clients(ctx, "tenant-a"); status(err) != http.StatusUnauthorized || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its end: %v", err)
	}
	if k, err := b.socket.RemoveAPIKey(ctx, "tenant-a", added.ID); err != nil || k.Name != "monitoring" {
		t.Errorf("revoke: %+v, %v", k, err)
	}
	if _, err := b.socket.RemoveAPIKey(ctx, "tenant-a", "monitoring"); status(err) != http.StatusNotFound {
		t.Errorf("revoke again: %v", err)
	}
	for _, bad := range []AddAPIKey{{}, {Name: "x", Role: "root"}, {Name: "x", Days: -1}, {Name: "x", Days: 100_000}, {Name: "a\nb"}} {
		if _, err := b.socket.AddAPIKey(ctx, "tenant-a", bad); status(err) != http.StatusBadRequest {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// TestBadRequests: what does not fit is answered by name, and nothing panics.
func TestBadRequests(t *testing.T) {
	b := start(t)
	for _, c := range []struct {
		method, path, body string
		status             int
		words              string
	}{
		{"POST", "/v1/instances", "", 400, "no body"},
		{"POST", "/v1/instances", "[]", 400, "cannot unmarshal"},
		{"POST", "/v1/instances", `{"id":"a","colour":"red"}`, 400, "colour"},
		{"POST", "/v1/instances", `{"id":"a"} {}`, 400, "follows"},
		{"POST", "/v1/instances", `{"id":"` + strings.Repeat("a", maxBody) + `"}`, 400, "more than"},
		{"POST", "/v1/instances", `{"id":"UPPER"}`, 400, "lower-case"},
		{"POST", "/v1/instances", `{"id":"a","port":70000}`, 400, "no TCP port"},
		{"POST", "/v1/instances", `{"id":"a","serverName":"a b"}`, 400, "no DNS name"},
		{"POST", "/v1/instances", `{"id":"a","strict":true}`, 400, "strict"},
		{"POST", "/v1/instances", `{"id":"a","quota":{"objects":-1}}`, 400, "quota"},
		{"POST", "/v1/instances", `{"id":"a","provider":"cloud"}`, 400, "provider"},
		{"GET", "/v1/nonesuch", "", 404, "no such call"},
		{"PUT", "/v1/instances", "", 405, "does not take PUT"},
		{"DELETE", "/v1/instances/default", "", 400, "cannot be deleted"},
		{"GET", "/v1/instances/..%2f..", "", 404, "no such instance"},
		{"GET", "/v1/instances/default/clients/%00", "", 404, "neither a fingerprint"},
	} {
		_, err := b.socket.send(t.Context(), c.method, c.path, nil, strings.NewReader(c.body), "application/json")
		if status(err) != c.status || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s %s %.40s: %d %v, want %d with %q", c.method, c.path, c.body, status(err), err, c.status, c.words)
		}
	}
}

// TestDescription checks the OpenAPI document against the rows, every reference
// and every schema in it, and real answers against the schemas.
func TestDescription(t *testing.T) {
	b, ctx := start(t), t.Context()
	url, thumb := b.https()
	nobody := b.remote(url, thumb, "", nil)
	var doc map[string]any
	if err := nobody.call(ctx, http.MethodGet, "/v1/openapi.json", nil, nil, &doc); err != nil {
		t.Fatal(err)
	}
	if doc["openapi"] != "3.1.0" {
		t.Errorf("openapi %v", doc["openapi"])
	}
	paths := doc["paths"].(map[string]any)
	var ids []string
	operations := 0
	for path, methods := range paths {
		for method, o := range methods.(map[string]any) {
			operations++
			op := o.(map[string]any)
			ids = append(ids, op["operationId"].(string))
			i := slices.IndexFunc(b.api.table, func(r row) bool { return r.path == path && strings.EqualFold(r.method, method) })
			if i < 0 {
				t.Errorf("%s %s is described and not served", method, path)
				continue
			}
			if r := b.api.table[i]; op["x-min-role"] != string(r.least) || op["summary"] == "" || (op["requestBody"] != nil) != (r.request != nil || r.upload != "") {
				t.Errorf("%s %s is described as %v", method, path, op)
			}
			named := map[string]bool{}
			if list, ok := op["parameters"].([]any); ok {
				for _, p := range list {
					if p := p.(map[string]any); p["in"] == "path" {
						named[p["name"].(string)] = true
					}
				}
			}
			for _, m := range pathParameter.FindAllStringSubmatch(path, -1) {
				if !named[m[1]] {
					t.Errorf("%s %s does not describe {%s}", method, path, m[1])
				}
			}
		}
	}
	if operations != len(b.api.table) {
		t.Errorf("%d operations are described, %d served", operations, len(b.api.table))
	}
	if slices.Sort(ids); len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Errorf("operation ids repeat: %v", ids)
	}
	checkSchemas(t, doc, doc, "")

	// Real answers, of calls that answer something.
	b.instance("tenant-a")
	if err := b.Publish(ctx, "kms", []kms.Address{{Host: "kms1.example.com"}, {Host: "192.0.2.7", Port: 15696}}, &net.TCPAddr{Port: 5696}, thumb); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/v1/instances", `{"id":"tenant-b","port":5999,"quota":{"objects":5}}`},
		{"PATCH", "/v1/instances/{instance}", `{"description":"second"}`},
		{"POST", "/v1/instances/{instance}/clients/issue", `{"name":"a.example.com"}`},
		{"POST", "/v1/instances/{instance}/clients/{client}/renew", `{}`},
		{"POST", "/v1/instances/{instance}/apikeys", `{"name":"one"}`},
		{"GET", "/v1/instances", ""},
		{"GET", "/v1/instances/{instance}", ""},
		{"GET", "/v1/instances/{instance}/clients", ""},
		{"GET", "/v1/instances/{instance}/apikeys", ""},
		{"DELETE", "/v1/instances/{instance}/grant", ""},
		{"PUT", "/v1/instances/{instance}/grant", ""},
	} {
		path := strings.NewReplacer("{instance}", "tenant-b", "{client}", "a.example.com").Replace(c.path)
		var body io.Reader = http.NoBody
		if c.body != "" {
			body = strings.NewReader(c.body)
		}
		answer, err := b.socket.send(ctx, c.method, path, nil, body, "application/json")
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.path, err)
			continue
		}
		text, _ := io.ReadAll(answer)
		answer.Close()
		op := paths[c.path].(map[string]any)[strings.ToLower(c.method)].(map[string]any)
		schema := op["responses"].(map[string]any)["200"].(map[string]any)["content"].(map[string]any)["application/json"].(map[string]any)["schema"]
		var v any
		if err := json.NewDecoder(bytes.NewReader(text)).Decode(&v); err != nil {
			t.Fatal(err)
		}
		if err := fitsSchema(doc, schema.(map[string]any), v, ""); err != nil {
			t.Errorf("%s %s: %v\n%s", c.method, c.path, err, text)
		}
		if c.body != "" {
			request := op["requestBody"].(map[string]any)["content"].(map[string]any)["application/json"].(map[string]any)["schema"]
			var v any
			json.Unmarshal([]byte(c.body), &v)
			if err := fitsSchema(doc, request.(map[string]any), v, ""); err != nil {
				t.Errorf("request of %s %s: %v", c.method, c.path, err)
			}
		}
	}
}

// resolve follows "#/a/b".
func resolve(doc map[string]any, ref string) map[string]any {
	var at any = doc
	for _, s := range strings.Split(strings.TrimPrefix(ref, "#/"), "/") {
		m, _ := at.(map[string]any)
		at = m[s]
	}
	m, _ := at.(map[string]any)
	return m
}

// checkSchemas goes through the whole document: every reference leads somewhere,
// every type is one of JSON Schema's, every required property is there.
func checkSchemas(t *testing.T, doc map[string]any, at any, path string) {
	switch v := at.(type) {
	case []any:
		for i, x := range v {
			checkSchemas(t, doc, x, fmt.Sprintf("%s/%d", path, i))
		}
	case map[string]any:
		if ref, ok := v["$ref"].(string); ok && resolve(doc, ref) == nil {
			t.Errorf("%s: %s leads nowhere", path, ref)
		}
		if properties, ok := v["properties"].(map[string]any); ok {
			required, _ := v["required"].([]any)
			for _, r := range required {
				if properties[r.(string)] == nil {
					t.Errorf("%s: %v is required and not described", path, r)
				}
			}
		}
		types := v["type"]
		if one, ok := types.(string); ok {
			types = []any{one}
		}
		if list, ok := types.([]any); ok && !strings.HasSuffix(path, "/properties") && !strings.HasPrefix(path, "/components/securitySchemes") {
			for _, x := range list {
				if !slices.Contains([]any{"object", "array", "string", "integer", "number", "boolean", "null"}, x) {
					t.Errorf("%s: type %v", path, x)
				}
				if x == "array" && v["items"] == nil {
					t.Errorf("%s: an array of what?", path)
				}
			}
		}
		for k, x := range v {
			checkSchemas(t, doc, x, path+"/"+k)
		}
	}
}

// fitsSchema checks a value against a schema of the kind that the description
// has.
func fitsSchema(doc, s map[string]any, v any, path string) error {
	if ref, ok := s["$ref"].(string); ok {
		return fitsSchema(doc, resolve(doc, ref), v, path)
	}
	types := s["type"]
	if one, ok := types.(string); ok {
		types = []any{one}
	}
	list, ok := types.([]any)
	if !ok {
		return nil
	}
	kind := map[bool]string{true: "null"}[v == nil]
	switch v := v.(type) {
	case string:
		kind = "string"
		if s["format"] == "date-time" {
			if _, err := time.Parse(time.RFC3339, v); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		if enum, ok := s["enum"].([]any); ok && !slices.Contains(enum, any(v)) {
			return fmt.Errorf("%s: %q is none of %v", path, v, enum)
		}
	case bool:
		kind = "boolean"
	case float64:
		kind = "number"
		if v == float64(int64(v)) {
			kind = "integer"
		}
	case []any:
		kind = "array"
		for i, x := range v {
			if err := fitsSchema(doc, s["items"].(map[string]any), x, fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return err
			}
		}
	case map[string]any:
		kind = "object"
		properties, _ := s["properties"].(map[string]any)
		for k, x := range v {
			p, ok := properties[k].(map[string]any)
			if !ok {
				if s["additionalProperties"] == false {
					return fmt.Errorf("%s.%s is not described", path, k)
				}
				continue
			}
			if err := fitsSchema(doc, p, x, path+"."+k); err != nil {
				return err
			}
		}
		required, _ := s["required"].([]any)
		for _, r := range required {
			if _, ok := v[r.(string)]; !ok {
				return fmt.Errorf("%s.%v is missing", path, r)
			}
		}
	}
	if !slices.Contains(list, any(kind)) {
		return fmt.Errorf("%s is %s, described as %v", path, kind, types)
	}
	return nil
}

func FuzzCalls(f *testing.F) {
	b := start(f)
	h := b.api.handler(true)
	for _, r := range b.api.table {
		f.Add(r.method, r.path, "{}")
		f.Add(r.method, strings.ReplaceAll(r.path, "{instance}", "default"), `{"name":"a","id":"b","certificate":"-----BEGIN CERTIFICATE-----"}`)
	}
	f.Fuzz(func(t *testing.T, method, path, body string) {
		req, err := http.NewRequest(method, "http://kms/", strings.NewReader(body))
		if err != nil || method == http.MethodDelete && strings.HasSuffix(path, "/grant") {
			return // a locked instance has little to find
		}
		req.URL.Path = path
		w := &recorder{header: http.Header{}}
		h.ServeHTTP(w, req)
		if w.status >= 500 && !strings.Contains(w.String(), "unavailable") {
			t.Fatalf("%s %q %q: %d %s", method, path, body, w.status, w.String())
		}
	})
}

type recorder struct {
	bytes.Buffer
	header http.Header
	status int
}

func (r *recorder) Header() http.Header    { return r.header }
func (r *recorder) WriteHeader(status int) { r.status = status }
