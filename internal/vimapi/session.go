package vimapi

import (
	"net/http"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
)

const cookieName = "vmware_soap_session"

// sessionCookie is the token that a request carries; empty when there is none.
func sessionCookie(r *http.Request) string {
	k, err := r.Cookie(cookieName)
	if err != nil {
		return ""
	}
	return k.Value
}

// findSession makes the call that of the session with the token, if it lives.
func (c *call) findSession(token string) {
	token = strings.Trim(token, `"`)
	if token == "" {
		return
	}
	session, ok := c.s.auth.Session(token)
	if !ok {
		return
	}
	c.session, c.token, c.client = session, token, c.s.clients.of(session)
}

// login opens a session and hands its token out as a cookie.
func (c *call) login(q *types.Login) (*types.LoginResponse, error) {
	session, err := c.s.auth.Login(c.ctx, q.UserName, q.Password, c.r.UserAgent(), c.address())
	if err != nil {
		return nil, err
	}
	if c.session != nil { // a second log-in replaces the first
		c.endSession()
	}
	c.session, c.token, c.client = session, session.Token, c.s.clients.of(session)
	http.SetCookie(c.w, &http.Cookie{Name: cookieName, Value: session.Token, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	return &types.LoginResponse{Returnval: userSession(*session)}, nil
}

func (c *call) endSession() {
	c.s.auth.Logout(c.token)
	c.s.clients.end(c.session.Key)
}

func (c *call) logout(*types.Logout) (*types.LogoutResponse, error) {
	c.endSession()
	http.SetCookie(c.w, &http.Cookie{Name: cookieName, Path: "/", MaxAge: -1, Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	return &types.LogoutResponse{}, nil
}

func (c *call) sessionIsActive(q *types.SessionIsActive) (*types.SessionIsActiveResponse, error) {
	res := &types.SessionIsActiveResponse{}
	for _, s := range c.s.auth.Sessions() {
		if s.Key == q.SessionID && s.Principal.User == strings.ToLower(q.UserName) {
			res.Returnval = true
		}
	}
	return res, nil
}

func (c *call) setLocale(q *types.SetLocale) (*types.SetLocaleResponse, error) {
	if !strings.HasPrefix(q.Locale, "en") {
		return nil, fault(&types.InvalidLocale{}, "the locale %q is not there; messages are in English (en)", clip(q.Locale))
	}
	return &types.SetLocaleResponse{}, nil
}

func (c *call) currentTime(*types.CurrentTime) (*types.CurrentTimeResponse, error) {
	return &types.CurrentTimeResponse{Returnval: c.s.clock().UTC()}, nil
}

func userSession(s authz.Session) types.UserSession {
	return types.UserSession{
		Key: s.Key, UserName: s.Principal.User, FullName: s.FullName, LoginTime: s.LoginTime.UTC(), LastActiveTime: s.LastActive.UTC(),
		Locale: "en", MessageLocale: "en", IpAddress: s.Address, UserAgent: s.UserAgent,
	}
}
