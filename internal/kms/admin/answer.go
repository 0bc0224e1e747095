package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"mortise/internal/kms"
	"mortise/internal/store"
)

// An Error is how the API says that a call was not done. It is the body of every
// answer with a status of 400 and above, and what [Client]'s methods return.
type Error struct {
	Status  int    `json:"-"`
	Code    string `json:"code" doc:"what went wrong, for programs: bad_request, unauthenticated, forbidden, not_found, no_such_call, exists, conflict, confirm, quota, locked, unavailable, quarantined, internal"`
	Message string `json:"error" doc:"what went wrong, for people"`
	// Confirm is set when the call would lose keys: it goes through when it is
	// repeated with the hash.
	Confirm *kms.Confirmation `json:"confirm,omitempty" doc:"what would be lost; repeat the call with ?confirm=hash to agree"`
}

func (e *Error) Error() string { return e.Message }

// errUnauthenticated: nobody known, or with nothing that proves it.
var errUnauthenticated = errors.New("not authenticated")

// classify says what kind of failure an error is.
func classify(err error) (status int, code string) {
	var confirm *kms.Confirmation
	switch {
	case errors.As(err, &confirm):
		return http.StatusConflict, "confirm"
	case errors.Is(err, errUnauthenticated):
		return http.StatusUnauthorized, "unauthenticated"
	case errors.Is(err, kms.ErrForbidden):
		return http.StatusForbidden, "forbidden"
	case errors.Is(err, kms.ErrUnknownInstance), errors.Is(err, kms.ErrUnknownClient), errors.Is(err, kms.ErrUnknownAPIKey), errors.Is(err, kms.ErrUnknownCRK):
		return http.StatusNotFound, "not_found"
	case errors.Is(err, kms.ErrInstanceExists), errors.Is(err, kms.ErrInstanceExists), errors.Is(err, kms.ErrClientExists):
		return http.StatusConflict, "exists"
	case errors.Is(err, kms.ErrQuota):
		return http.StatusConflict, "quota"
	case errors.Is(err, kms.ErrInvalid), errors.Is(err, kms.ErrExpired):
		return http.StatusBadRequest, "bad_request"
	case errors.Is(err, kms.ErrQuarantined):
		return http.StatusServiceUnavailable, "quarantined"
	case errors.Is(err, kms.ErrLocked), errors.Is(err, kms.ErrInstanceLocked):
		return http.StatusServiceUnavailable, "locked"
	case errors.Is(err, store.ErrNotFound):
		return http.StatusNotFound, "not_found"
	case errors.Is(err, store.ErrConflict), errors.Is(err, kms.ErrJobRunning), errors.Is(err, kms.ErrCRKInUse), errors.Is(err, kms.ErrCRKDeleted):
		return http.StatusConflict, "conflict"
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, store.ErrFull), errors.Is(err, kms.ErrAudit):
		return http.StatusServiceUnavailable, "unavailable"
	}
	return http.StatusInternalServerError, "internal"
}

// answer is a response that knows whether it has begun.
type answer struct {
	http.ResponseWriter
	media string // of a stream
	begun bool
}

func (a *answer) Write(b []byte) (int, error) {
	a.begin()
	return a.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// begin sends the headers of a stream.
func (a *answer) begin() {
	if !a.begun {
		a.begun = true
		a.Header().Set("Content-Type", a.media)
		a.Header().Set("Cache-Control", "no-store")
		a.WriteHeader(http.StatusOK)
	}
}

func (a *answer) json(status int, v any) {
	a.begun = true
	a.Header().Set("Content-Type", "application/json")
	a.Header().Set("Cache-Control", "no-store") // an issued key may be in it
	a.WriteHeader(status)
	e := json.NewEncoder(a.ResponseWriter)
	e.SetEscapeHTML(false)
	e.Encode(v) // a caller that went away needs no answer
}

func (a *answer) failWith(err error) {
	status, code := classify(err)
	e := Error{Code: code, Message: err.Error()}
	if status == http.StatusInternalServerError {
		e.Message = fmt.Sprintf("internal error: %v; the server's log says more", err)
	}
	errors.As(err, &e.Confirm)
	a.fail(status, e)
}

func (a *answer) fail(status int, e Error) {
	if a.begun {
		panic(http.ErrAbortHandler) // a part must not look like the whole
	}
	if status == http.StatusUnauthorized {
		a.Header().Set("WWW-Authenticate", `Bearer realm="mortise kms"`)
	}
	a.json(status, e)
}
