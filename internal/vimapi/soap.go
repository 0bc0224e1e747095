package vimapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"runtime/debug"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// Body limits in bytes.
const (
	anonymousLimit = 64 << 10
	bodyLimit      = 4 << 20
)

const soapNamespace = "http://schemas.xmlsoap.org/soap/envelope/"

// call is one request on its way.
type call struct {
	ctx     context.Context
	s       *Server
	w       http.ResponseWriter
	r       *http.Request
	method  *method
	this    types.ManagedObjectReference
	version apiVersion     // the client's
	session *authz.Session // nil before log-in
	client  *client        // what the session holds; nil before log-in
	token   string
}

// principal is who calls; the zero Principal before log-in.
func (c *call) principal() authz.Principal {
	if c.session == nil {
		return authz.Principal{}
	}
	return c.session.Principal
}

// serveSOAP answers one request, with a fault where it must.
func (s *Server) serveSOAP(w http.ResponseWriter, r *http.Request) {
	c := &call{ctx: r.Context(), s: s, w: w, r: r, version: parseVersion(r.Header.Get("SOAPAction"))}
	name, answer, err := c.serve()
	if err == nil {
		c.version.prune(&s.fields, reflect.ValueOf(answer))
	}
	rc := http.NewResponseController(w)
	rc.SetWriteDeadline(time.Now().Add(answerTimeout)) // where the server has none, so be it
	if err != nil {
		c.writeFault(err)
		return
	}
	var out bytes.Buffer
	if err := encodeAnswer(&out, name, answer); err != nil {
		s.log.Error("vimapi: encoding an answer", "method", name.Local, "err", err)
		c.writeFault(fmt.Errorf("the answer of %s cannot be encoded; this is a bug, the log has the details", name.Local))
		return
	}
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	w.Write(out.Bytes())
}

// serve runs the request and returns what its answer is called and is. Panics
// become errors here: nothing that is sent may end the process.
func (c *call) serve() (name xml.Name, answer any, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.s.logPanic(c.r, p)
			err = errors.New("internal error; center's log has the details")
		}
	}()
	c.findSession(sessionCookie(c.r))
	body, err := c.readBody()
	if err != nil {
		return name, nil, err
	}
	if err := checkXML(body); err != nil {
		return name, nil, badRequest("%v", err)
	}
	q, err := c.decode(body)
	if err != nil {
		return name, nil, err
	}
	if err := c.admit(int64(len(body))); err != nil {
		return name, nil, err
	}
	answer, err = c.method.serve(c, q)
	return xml.Name{Space: "urn:" + c.method.namespace, Local: c.method.name + "Response"}, answer, err
}

// readBody reads as much as the caller may send: little before log-in.
func (c *call) readBody() ([]byte, error) {
	limit := int64(anonymousLimit)
	if c.session != nil {
		limit = bodyLimit
	}
	http.NewResponseController(c.w).SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, limit))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, badRequest("the request is larger than %d bytes", limit)
	}
	if err != nil {
		return nil, badRequest("the request cannot be read: %v", err)
	}
	http.NewResponseController(c.w).SetReadDeadline(time.Time{})
	return body, nil
}

// decode finds the method that the envelope calls and decodes its arguments.
func (c *call) decode(body []byte) (any, error) {
	d := xml.NewDecoder(bytes.NewReader(body))
	d.TypeFunc = typeByName
	in := []string{"Envelope", "Body"} // still to be found
	for {
		tok, err := d.Token()
		if err != nil {
			return nil, badRequest("the request is no SOAP envelope with a method in its body")
		}
		start, ok := tok.(xml.StartElement)
		switch {
		case !ok:
		case len(in) > 0 && start.Name.Space == soapNamespace && start.Name.Local == in[0]:
			in = in[1:]
		case len(in) == 1 && start.Name.Space == soapNamespace && start.Name.Local == "Header":
			var h struct {
				Cookie string `xml:"vcSessionCookie"`
			}
			if err := d.DecodeElement(&h, &start); err != nil {
				return nil, badRequest("the SOAP header cannot be read: %v", err)
			}
			if c.session == nil && h.Cookie != "" {
				c.findSession(h.Cookie) // how govmomi and PowerCLI authenticate at /pbm
			}
		case len(in) > 0:
			return nil, badRequest("the request has an element %.60q where a SOAP %s was expected", start.Name.Local, in[0])
		default:
			return c.decodeMethod(d, &start)
		}
	}
}

func (c *call) decodeMethod(d *xml.Decoder, start *xml.StartElement) (any, error) {
	namespace := strings.TrimPrefix(start.Name.Space, "urn:")
	m := c.s.methods[namespace+" "+start.Name.Local]
	if m == nil {
		var q struct {
			This types.ManagedObjectReference `xml:"_this"`
		}
		d.DecodeElement(&q, start) // to name the receiver; without it the fault names the method
		return nil, fault(&types.MethodNotFound{Receiver: q.This, Method: clip(start.Name.Local)},
			"the method %s.%s is not part of this server's API", clip(q.This.Type), clip(start.Name.Local))
	}
	c.method = m
	q := m.request()
	if err := d.DecodeElement(q, start); err != nil {
		return nil, badRequest("the arguments of %s cannot be read: %v", m.name, err)
	}
	c.this, _ = reflect.ValueOf(q).Elem().FieldByName("This").Interface().(types.ManagedObjectReference)
	return q, nil
}

// admit checks what the method's row asks for: a session, the object's type and
// existence, the privilege, the size.
func (c *call) admit(size int64) error {
	m := c.method
	if c.session == nil && !m.anonymous {
		return c.notAuthenticated(m.privilege)
	}
	if m.limit != 0 && size > m.limit {
		return badRequest("the request is larger than the %d bytes that %s takes", m.limit, m.name)
	}
	if m.object != "" && !c.s.isA(c.this.Type, m.object) {
		return fault(&types.MethodNotFound{Receiver: c.this, Method: m.name}, "%s has no method %s", describe(c.this), m.name)
	}
	entity := inventory.RootFolder
	if kind := inventory.Ref(c.this.Value).Kind(); kind != "" && string(kind) == c.this.Type {
		if _, ok := c.s.view.Get(inventory.Ref(c.this.Value)); !ok && c.session != nil {
			return objectNotFound(c.this)
		}
		if kind != inventory.KindTask {
			entity = inventory.Ref(c.this.Value)
		}
	} else if c.session != nil && m.object != "" {
		if _, ok := c.lookup(c.this); !ok {
			return objectNotFound(c.this)
		}
	}
	if m.privilege != "" {
		return c.s.auth.Check(c.principal(), m.privilege, entity)
	}
	return nil
}

// typeByName finds what an xsi:type names, in vim25 and in pbm.
func typeByName(name string) (reflect.Type, bool) {
	_, local, prefixed := strings.Cut(name, ":")
	if !prefixed {
		local = name
	}
	f := types.TypeFunc()
	if t, ok := f(local); ok {
		return t, true
	}
	return f("pbm:" + local)
}

const envelopeStart = xml.Header +
	`<soapenv:Envelope xmlns:soapenv="` + soapNamespace + `" xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">` +
	"\n<soapenv:Body>\n"

const envelopeEnd = "\n</soapenv:Body>\n</soapenv:Envelope>\n"

func encodeAnswer(out *bytes.Buffer, name xml.Name, answer any) error {
	out.WriteString(envelopeStart)
	if err := encodeElement(out, name, answer); err != nil {
		return err
	}
	out.WriteString(envelopeEnd)
	return nil
}

func encodeElement(out *bytes.Buffer, name xml.Name, v any, attrs ...xml.Attr) error {
	e := xml.NewEncoder(out)
	return e.EncodeElement(v, xml.StartElement{Name: name, Attr: attrs})
}

func (s *Server) logPanic(r *http.Request, p any) {
	s.log.Error("vimapi: panic", "path", r.URL.Path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
}

// address is the client's, without the port.
func (c *call) address() string {
	host, _, err := net.SplitHostPort(c.r.RemoteAddr)
	if err != nil {
		return c.r.RemoteAddr
	}
	return host
}

// clip bounds what a client sent before it is repeated to it.
func clip(s string) string {
	const most = 100
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// serveVersions tells which versions of the API clients may speak.
func (s *Server) serveVersions(w http.ResponseWriter, r *http.Request) {
	var b strings.Builder
	b.WriteString(xml.Header + "<namespaces version=\"1.0\">\n <namespace>\n  <name>urn:vim25</name>\n  <version>" + newestVersion + "</version>\n  <priorVersions>\n")
	for _, v := range priorVersions() {
		b.WriteString("   <version>" + v + "</version>\n")
	}
	b.WriteString("  </priorVersions>\n </namespace>\n</namespaces>\n")
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	io.WriteString(w, b.String())
}
