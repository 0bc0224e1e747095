package vimapi

import "net/http"

const importPath = "/mortise/v1/import"

func (s *Server) serveImport(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }
