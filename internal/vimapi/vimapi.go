// Package vimapi is the vSphere API over center: SOAP at /sdk (vim25, for
// clients of versions 7.0 to 8.0 and, as far as they go, older ones) and at /pbm
// (storage policies), so that govc, pyVmomi, PowerCLI, Terraform and the mortise
// CLI talk to center unmodified.
//
// Place in the flow: a request becomes a typed value (soap.go), finds its row in
// the table of methods (methods.go), whose handler calls one use case of center
// or reads the inventory's view (props_*.go through the property collector:
// select.go, filter.go, update.go). The package translates; it decides nothing.
// center's faults become vim faults in faults.go. What vSphere has no call for
// is a managed object of our own, described in the subpackage vimext.
//
// It imports center and what is below it, and govmomi's types; never govmomi's
// simulator, and nothing imports it but cmd.
package vimapi

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/inventory"
	"mortise/internal/vimapi/vimext"
)

// Options of a [Server]. The zero value works.
type Options struct {
	Logger       *slog.Logger     // nil: discard
	Clock        func() time.Time // nil: time.Now
	Version      string           // of Mortise, shown to clients; empty: "0"
	InstanceUUID string           // tells this center from others; empty: none is shown
}

// authority is what sessions and property reads need of center. Tests of the
// property collector put an inventory and an authz.Authority in its place.
type authority interface {
	Login(ctx context.Context, user, password, userAgent, address string) (*authz.Session, error)
	Session(token string) (*authz.Session, bool)
	Sessions() []authz.Session
	Logout(token string)
	Check(p authz.Principal, privilege string, entity inventory.Ref) error
	View() *inventory.View
}

// Server is the API. It is an http.Handler, for an http.Server with TLS, bounded
// headers and a header timeout, but without read and write timeouts; HTTP/2 must
// be off for the console's WebSocket. Its methods may be called concurrently.
type Server struct {
	opt     Options
	log     *slog.Logger
	clock   func() time.Time
	auth    authority
	view    *inventory.View
	center  *center.Center // nil in tests of what needs the inventory only
	mux     *http.ServeMux
	methods map[string]*method
	kinds   map[string]*kind
	fields  fieldCache
	clients clients
	hub     *hub
	ctx     context.Context // ends with Close
	stop    context.CancelFunc
	running sync.WaitGroup
}

// New serves c. Close must be called when it is no longer used.
func New(c *center.Center, opt Options) *Server {
	s := newServer(c, opt)
	s.center = c
	return s
}

func newServer(auth authority, opt Options) *Server {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.Clock == nil {
		opt.Clock = time.Now
	}
	if opt.Version == "" {
		opt.Version = "0"
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{opt: opt, log: opt.Logger, clock: opt.Clock, auth: auth, view: auth.View(), ctx: ctx, stop: stop, methods: methodTable(), kinds: kindTable()}
	s.clients.init(s)
	s.hub = newHub(s)
	s.mux = http.NewServeMux()
	s.mux.HandleFunc("POST /sdk", s.serveSOAP)
	s.mux.HandleFunc("POST /sdk/{$}", s.serveSOAP)
	s.mux.HandleFunc("POST /sdk/vimService", s.serveSOAP)
	s.mux.HandleFunc("GET /sdk/vimServiceVersions.xml", s.serveVersions)
	s.mux.HandleFunc("POST /pbm", s.serveSOAP)
	s.mux.HandleFunc("POST /pbm/sdk", s.serveSOAP)
	s.mux.HandleFunc("PUT "+vimext.ImportPath, s.serveImport)
	s.mux.HandleFunc("GET "+vimext.ConsolePath, s.serveConsole)
	s.running.Go(func() { s.hub.run(ctx) })
	s.running.Go(func() { s.clients.sweep(ctx) })
	return s
}

// Close ends waiting calls and what runs in the background.
func (s *Server) Close() {
	s.stop()
	s.clients.closeAll()
	s.running.Wait()
}

// ServeHTTP serves one request. A panic in a handler is answered by a fault or
// an error status and logged; it never ends the process.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Strict-Transport-Security", "max-age=31536000")
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			s.logPanic(r, p)
			http.Error(w, "internal error", http.StatusInternalServerError)
		}
	}()
	s.mux.ServeHTTP(w, r)
}

// Deadlines that handlers set for themselves: calls that wait for updates and
// the data paths have none or other ones, so the listener cannot.
const (
	bodyTimeout   = 30 * time.Second // to read a SOAP body
	answerTimeout = 2 * time.Minute  // to write a SOAP answer
)
