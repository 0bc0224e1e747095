package vimapi

import (
	"bytes"
	stdxml "encoding/xml"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// Bounds of a request's structure. Real ones stay far below: the deepest are
// device specs with backings that name their parents.
const (
	maxDepth    = 64
	maxElements = 200_000
	maxAttrs    = 32
)

// checkXML refuses, before anything is decoded, what no SOAP client sends:
// document types (and with them entity bombs), processing instructions, deep
// nesting, text that is not UTF-8. It keeps nothing of the document.
func checkXML(body []byte) error {
	if !utf8.Valid(body) {
		return errors.New("the request is not UTF-8 text")
	}
	d := stdxml.NewDecoder(bytes.NewReader(body))
	depth, elements := 0, 0
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			if elements == 0 {
				return errors.New("the request holds no XML element")
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("the request is not well-formed XML: %w", err)
		}
		switch t := tok.(type) {
		case stdxml.StartElement:
			depth++
			elements++
			switch {
			case depth > maxDepth:
				return fmt.Errorf("the request nests elements deeper than %d", maxDepth)
			case elements > maxElements:
				return fmt.Errorf("the request has more than %d elements", maxElements)
			case len(t.Attr) > maxAttrs:
				return fmt.Errorf("element %.60q has more than %d attributes", t.Name.Local, maxAttrs)
			}
		case stdxml.EndElement:
			depth--
		case stdxml.Directive:
			return errors.New("the request has a document type declaration; these are refused")
		case stdxml.ProcInst:
			if t.Target != "xml" {
				return fmt.Errorf("the request has a processing instruction %.60q; these are refused", t.Target)
			}
		}
	}
}
