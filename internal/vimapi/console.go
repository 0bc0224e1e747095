package vimapi

import (
	"context"
	"io"
	"net/http"
	"time"

	"github.com/coder/websocket"

	"mortise/internal/inventory"
)

// pingEvery keeps a silent console's connection known to what is between.
const pingEvery = 30 * time.Second

// serveConsole joins a VM's serial console to a WebSocket of binary messages:
// GET ?vm=vm-12.
func (s *Server) serveConsole(w http.ResponseWriter, r *http.Request) {
	c := s.authenticated(w, r)
	if c == nil {
		return
	}
	vm := inventory.Ref(r.URL.Query().Get("vm"))
	if vm.Kind() != inventory.KindVM {
		refuse(w, invalidArgument("vm", "a console is that of a VM: ?vm=vm-12"))
		return
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	console, err := s.center.Console(ctx, c.principal(), vm)
	if err != nil {
		refuse(w, err)
		return
	}
	defer console.Close()
	conn, err := websocket.Accept(w, r, nil) // refuses other origins
	if err != nil {
		s.log.Debug("vimapi: console", "vm", vm, "err", err)
		return
	}
	defer conn.CloseNow()
	stop := context.AfterFunc(s.ctx, cancel)
	defer stop()
	stream := websocket.NetConn(ctx, conn, websocket.MessageBinary)
	done := make(chan struct{}, 2)
	relay := func(to io.Writer, from io.Reader) {
		io.Copy(to, from)
		done <- struct{}{}
	}
	go relay(console, stream)
	go relay(stream, console)
	ping := time.NewTicker(pingEvery)
	defer ping.Stop()
	for {
		select {
		case <-done:
			conn.Close(websocket.StatusNormalClosure, "the console has ended")
			return
		case <-c.client.ended: // logged out
			conn.Close(websocket.StatusPolicyViolation, "the session has ended")
			return
		case <-ctx.Done():
			return
		case <-ping.C:
			if _, ok := s.auth.Session(c.token); !ok || conn.Ping(ctx) != nil {
				return
			}
		}
	}
}
