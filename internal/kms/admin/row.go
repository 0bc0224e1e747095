package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"runtime/debug"
	"strings"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/audit"
)

// rows is the API. Each area has a file with its own.
func rows() []row {
	var all []row
	for _, area := range [][]row{
		descriptionRows(), instanceRows(), clientRows(), apiKeyRows(), backupRows(), importRows(), memberRows(), auditRows(), crkRows(),
	} {
		all = append(all, area...)
	}
	return all
}

// A row is one call of the API.
type row struct {
	method, path string // path as in net/http's patterns: {name} is a segment
	summary      string // one line, for the description
	least        kms.Role
	wholeServer  bool // although its path has {instance}: not for the instance's own administrators
	socketOnly   bool // what happens below the API (design §1): unlock, join, membership, backup
	public       bool // needs no authentication: it tells nothing of this server
	confirmed    bool // may answer 409 with a kms.Confirmation first
	query        []parameter
	// request and response are the types of the JSON bodies; nil for none.
	request, response reflect.Type
	// media is the response's type when it is a stream and not JSON; upload the
	// request's.
	media, upload string
	timeout       time.Duration // 0: the usual
	run           func(*call) (any, error)
}

// callTimeout bounds a call's work.
const callTimeout = 60 * time.Second

// A parameter is a field of a call's query.
type parameter struct{ name, summary string }

// get is a row that changes nothing.
func get[Resp any](path string, least kms.Role, summary string, run func(*call) (Resp, error)) row {
	return row{
		method: http.MethodGet, path: path, least: least, summary: summary, response: reflect.TypeFor[Resp](),
		run: func(c *call) (any, error) { return run(c) },
	}
}

// act is a row without a request body.
func act[Resp any](method, path string, least kms.Role, summary string, run func(*call) (Resp, error)) row {
	r := get(path, least, summary, run)
	r.method = method
	return r
}

// send is a row with a request body.
func send[Req, Resp any](method, path string, least kms.Role, summary string, run func(*call, Req) (Resp, error)) row {
	return row{
		method: method, path: path, least: least, summary: summary,
		request: reflect.TypeFor[Req](), response: reflect.TypeFor[Resp](),
		run: func(c *call) (any, error) {
			var req Req
			if err := c.decode(&req); err != nil {
				return nil, err
			}
			return run(c, req)
		},
	}
}

// stream is a row that writes its answer itself, of that media type, as long as
// it takes. An error before the first byte is answered as any other; one after
// it breaks the connection, so that the caller cannot take a part for the whole.
func stream(method, path string, least kms.Role, summary, media string, run func(*call, io.Writer) error) row {
	return row{
		method: method, path: path, least: least, summary: summary, media: media, timeout: -1,
		run: func(c *call) (any, error) { return nil, run(c, c.w) },
	}
}

func (r row) onSocket() row               { r.socketOnly = true; return r }
func (r row) onWholeServer() row          { r.wholeServer = true; return r }
func (r row) needsConfirmation() row      { r.confirmed = true; return r }
func (r row) lasting(d time.Duration) row { r.timeout = d; return r }

// takes adds a field to the query.
func (r row) takes(name, summary string) row {
	r.query = append(r.query[:len(r.query):len(r.query)], parameter{name, summary})
	return r
}

// uploads makes the request a stream of that media type, which run reads from
// call.body.
func (r row) uploads(media string) row {
	r.upload, r.timeout = media, -1
	return r
}

// done is the answer of a call that has nothing to tell.
type done struct{}

// A call is a request under way. Its context ends with the connection.
type call struct {
	context.Context
	*Server
	actor kms.Actor
	w     *answer
	r     *http.Request
}

// path returns a segment of the path by its name.
func (c *call) path(name string) string { return c.r.PathValue(name) }

// query returns a field of the query, "" if it is missing.
func (c *call) query(name string) string { return c.r.URL.Query().Get(name) }

// confirmation is the hash by which the caller agrees to a loss of keys.
func (c *call) confirmation() string { return c.query("confirm") }

// body is the request as a stream.
func (c *call) body() io.Reader { return c.r.Body }

func (c *call) decode(v any) error {
	d := json.NewDecoder(http.MaxBytesReader(c.w, c.r.Body, maxBody))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, end := d.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the JSON value")
		}
	}
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &long):
		return fmt.Errorf("%w: the request has more than %d bytes", kms.ErrInvalid, long.Limit)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: the request has no body; JSON is wanted", kms.ErrInvalid)
	case err != nil:
		return fmt.Errorf("%w: %w", kms.ErrInvalid, err)
	}
	return nil
}

// handler serves the rows; those for the socket only if it is the socket's.
func (s *Server) handler(socket bool) http.Handler {
	mux := http.NewServeMux()
	for _, r := range s.table {
		if !r.socketOnly || socket {
			mux.Handle(r.method+" "+r.path, s.serveRow(r, socket))
		}
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		// The mux answers a wrong method itself only where no other pattern fits.
		status, text := http.StatusNotFound, "no such call; GET /v1/openapi.json lists them"
		if allowed := s.methods(r.URL.Path, socket); len(allowed) > 0 {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			status, text = http.StatusMethodNotAllowed, "this path does not take "+r.Method
		}
		(&answer{ResponseWriter: w}).fail(status, Error{Code: "no_such_call", Message: text})
	})
	return mux
}

// methods lists what a path takes.
func (s *Server) methods(path string, socket bool) (list []string) {
	for _, r := range s.table {
		if (!r.socketOnly || socket) && fits(r.path, path) {
			list = append(list, r.method)
		}
	}
	return list
}

func fits(pattern, path string) bool {
	want, have := strings.Split(pattern, "/"), strings.Split(path, "/")
	if len(want) != len(have) {
		return false
	}
	for i := range want {
		if want[i] != have[i] && !(strings.HasPrefix(want[i], "{") && have[i] != "") {
			return false
		}
	}
	return true
}

func (s *Server) serveRow(r row, socket bool) http.Handler {
	timeout := r.timeout
	if timeout == 0 {
		timeout = callTimeout
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		a := &answer{ResponseWriter: w, media: r.media}
		defer func() {
			p := recover()
			if p == http.ErrAbortHandler {
				panic(p)
			}
			if p != nil {
				s.Logger.Error("admin: call caused a panic", "call", r.method+" "+r.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
				a.failWith(errors.New("internal error; the server's log says more"))
			}
		}()
		c := &call{Context: req.Context(), Server: s, w: a, r: req}
		if timeout > 0 {
			var cancel context.CancelFunc
			c.Context, cancel = context.WithTimeout(c.Context, timeout)
			defer cancel()
			limit := time.Now().Add(timeout)
			control := http.NewResponseController(w)
			control.SetReadDeadline(limit)                       // of the body
			control.SetWriteDeadline(limit.Add(5 * time.Second)) // the error about the work's own limit gets out
		}
		if !r.public {
			actor, err := s.authenticate(c, r, socket)
			c.actor = actor
			if err != nil {
				if actor.Kind != "" { // known, and not allowed
					err = s.audited(c, r, err)
				}
				s.Logger.Warn("admin: caller refused", "call", r.method+" "+r.path, "from", req.RemoteAddr, "error", err)
				a.failWith(err)
				return
			}
			c.Context = kms.WithActs(c.Context, c.actor)
		}
		var v any
		var err error
		if r.media != "" { // its first byte may leave at once
			err = s.audited(c, r, nil)
		}
		if err == nil {
			v, err = r.run(c)
		}
		if r.media == "" || err != nil {
			err = s.audited(c, r, err)
		}
		switch {
		case err != nil:
			s.logFailure(r, c, err)
			a.failWith(err)
		case r.media == "":
			a.json(http.StatusOK, v)
		default:
			a.begin()
		}
	})
}

// audited returns err, or why the audit log does not have that the call ended
// with it: no answer leaves before.
func (s *Server) audited(c *call, r row, err error) error {
	if r.public {
		return err
	}
	result := audit.Success
	if err != nil {
		_, result = classify(err)
	}
	instance := c.path("instance")
	if instance == "" {
		instance = c.actor.Instance
	}
	// The call's own time may be up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), auditTimeout)
	defer cancel()
	if failed := s.KMS.EndCall(ctx, c.actor, instance, r.method+" "+r.path, c.r.URL.Path, result); failed != nil {
		return failed
	}
	return err
}

// auditTimeout bounds the wait for the audit log's disk.
const auditTimeout = 10 * time.Second

func (s *Server) logFailure(r row, c *call, err error) {
	log := s.Logger.Info
	if status, _ := classify(err); status >= http.StatusInternalServerError {
		log = s.Logger.Error
	}
	log("admin: call failed", "call", r.method+" "+c.r.URL.Path, "caller", c.actor.Name, "from", c.actor.From, "error", err)
}
