package vimapi

import "net/http"

const consolePath = "/mortise/v1/console"

func (s *Server) serveConsole(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }
