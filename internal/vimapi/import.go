package vimapi

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
	"mortise/internal/vimapi/vimext"
)

// The data paths of Mortise's own. They need the same session as SOAP calls;
// package vimext has their client and says what travels.

// recordTimeout is how long an importing client may take for one record.
const recordTimeout = 2 * time.Minute

// deadlined reads an import's records, each within recordTimeout.
type deadlined struct {
	records *vimext.Records
	rc      *http.ResponseController
}

func (d *deadlined) Next() (int64, []byte, error) {
	d.rc.SetReadDeadline(time.Now().Add(recordTimeout))
	return d.records.Next()
}

// authenticated is a call of the request's session; without one the request is
// answered and the call is nil.
func (s *Server) authenticated(w http.ResponseWriter, r *http.Request) *call {
	c := &call{ctx: r.Context(), s: s, w: w, r: r, version: newestAPI()}
	c.findSession(sessionCookie(r))
	if c.session == nil {
		refuse(w, c.notAuthenticated(""))
		return nil
	}
	return c
}

// serveImport writes a disk's content: PUT ?vm=vm-12&disk=2000.
func (s *Server) serveImport(w http.ResponseWriter, r *http.Request) {
	c := s.authenticated(w, r)
	if c == nil {
		return
	}
	vm := inventory.Ref(r.URL.Query().Get("vm"))
	disk, err := strconv.ParseInt(r.URL.Query().Get("disk"), 10, 32)
	if err != nil || vm.Kind() != inventory.KindVM {
		refuse(w, invalidArgument("disk", "an import names a VM and the key of its disk: ?vm=vm-12&disk=2000"))
		return
	}
	rc := http.NewResponseController(w)
	source := &deadlined{vimext.NewRecords(bufio.NewReaderSize(r.Body, 256<<10)), rc}
	written, err := s.center.ImportDisk(c.ctx, c.principal(), vm, int32(disk), source)
	if err != nil {
		s.log.Info("vimapi: import failed", "vm", vm, "disk", disk, "err", err)
		// What the client is still sending is read, or it would not read the
		// answer; not for long.
		rc.SetReadDeadline(time.Now().Add(5 * time.Second))
		defer io.Copy(io.Discard, io.LimitReader(r.Body, 64<<20))
		refuse(w, err)
		return
	}
	rc.SetWriteDeadline(time.Now().Add(answerTimeout))
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(vimext.ImportResult{Written: written})
}

// refuse answers with an error that vimext reads.
func refuse(w http.ResponseWriter, err error) {
	f, message := asVim(err)
	e := vimext.DataError{Status: http.StatusBadRequest, Kind: reflect.TypeOf(f).Elem().Name(), Message: message}
	switch f.(type) {
	case *types.NotAuthenticated:
		e.Status = http.StatusUnauthorized
	case *types.NoPermission:
		e.Status = http.StatusForbidden
	case *types.NotFound, *types.ManagedObjectNotFound:
		e.Status = http.StatusNotFound
	case *types.InvalidPowerState, *types.InvalidState, *types.TaskInProgress, *types.ResourceInUse:
		e.Status = http.StatusConflict
	case *types.SystemError, *types.HostNotConnected:
		e.Status = http.StatusBadGateway
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.Status)
	json.NewEncoder(w).Encode(e)
	if flush := http.NewResponseController(w).Flush(); flush != nil && !errors.Is(flush, http.ErrNotSupported) {
		return // the client is gone
	}
}
