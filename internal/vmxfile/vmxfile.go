// Package vmxfile reads and edits VMX dictionaries: the text file that
// configures one VM, lines of
//
//	key = "value"
//
// with comments, in the encoding that its .encoding line names. An edit touches
// only the lines it changes: comments, order, spelling and line ends of the rest
// stay, so that a person's file remains a person's file, and what parses prints
// back byte for byte.
//
// The syntax is VMware's, as its products write it: keys are case-insensitive;
// inside a value |22 stands for the byte 0x22 and so on for any two hexadecimal
// digits; a value may stand without quotes; # starts a comment.
//
// Place in the flow: level 0; keysafe seals its bundle into a File, domain makes
// a libvirt domain of one. It imports only atomicfile.
package vmxfile

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/htmlindex"
)

// Limits of what is read. A real VMX has a few hundred short lines; the longest
// is encryption.data.
const (
	MaxSize  = 1 << 20 // bytes of a file
	MaxLine  = 1 << 18 // bytes of a line
	MaxKey   = 256     // bytes of a key
	MaxLines = 1 << 14
)

// The causes that an *Error wraps.
var (
	ErrSyntax    = errors.New("syntax error")
	ErrDuplicate = errors.New("duplicate entry")
	ErrEncoding  = errors.New("encoding error")
	ErrTooLarge  = errors.New("too large")
	ErrValue     = errors.New("bad value")
)

// An Error says which file and line is wrong and why; it wraps one of the causes
// above.
type Error struct {
	File  string // path, or "VMX" when the text came from elsewhere
	Line  int    // from 1; 0 when it is about the whole file
	Key   string // "" when unknown
	Cause error
	Why   string
}

func (e *Error) Error() string {
	at := e.File
	if e.Line > 0 {
		at += ":" + strconv.Itoa(e.Line)
	}
	if e.Key != "" {
		at += ": " + e.Key
	}
	return fmt.Sprintf("%s: %v: %s", at, e.Cause, e.Why)
}

func (e *Error) Unwrap() error { return e.Cause }

// A File is a parsed dictionary. It is not safe for concurrent use.
type File struct {
	name  string
	bom   bool
	enc   encoding.Encoding // nil: UTF-8
	lines []line
	index map[string]int // lower-case key → line
}

// A line is its bytes as they are in the file and what they mean.
type line struct {
	raw   string // encoded, with its line end
	key   string // "" for a comment or an empty line
	value string // without quotes and escapes
	lead  string // decoded text before the value, as it will be printed again
	tail  string // decoded text after the value, without the line end
	end   string // "\n", "\r\n" or "" on an unfinished last line
}

const bom = "\ufeff"

// New makes an empty dictionary in UTF-8.
func New() *File {
	f := &File{name: "VMX", index: map[string]int{}}
	f.append(".encoding", "UTF-8")
	return f
}

// Parse reads a dictionary; name is what errors call it. The error is an *Error.
func Parse(name string, text []byte) (*File, error) {
	f := &File{name: name, index: map[string]int{}}
	if len(text) > MaxSize {
		return nil, f.errorf(0, "", ErrTooLarge, "%d bytes, a VMX has at most %d", len(text), MaxSize)
	}
	rest := string(text)
	if r, ok := strings.CutPrefix(rest, bom); ok {
		f.bom, rest = true, r
	}
	if i := strings.IndexByte(rest, 0); i >= 0 {
		return nil, f.errorf(1+strings.Count(rest[:i], "\n"), "", ErrSyntax, "a zero byte: this is no text file")
	}
	if err := f.findEncoding(rest); err != nil {
		return nil, err
	}
	for n := 1; rest != ""; n++ {
		raw := rest
		if i := strings.IndexByte(rest, '\n'); i >= 0 {
			raw = rest[:i+1]
		}
		rest = rest[len(raw):]
		if n > MaxLines || len(raw) > MaxLine {
			return nil, f.errorf(n, "", ErrTooLarge, "at most %d lines of %d bytes", MaxLines, MaxLine)
		}
		l, err := f.parseLine(n, raw)
		if err != nil {
			return nil, err
		}
		if l.key != "" {
			low := strings.ToLower(l.key)
			if first, dup := f.index[low]; dup {
				return nil, f.errorf(n, l.key, ErrDuplicate, "it is already on line %d: keep one of the two", first+1)
			}
			f.index[low] = len(f.lines)
		}
		f.lines = append(f.lines, l)
	}
	return f, nil
}

// findEncoding looks for .encoding before anything else is decoded. The line
// itself is plain ASCII in every encoding VMware uses.
func (f *File) findEncoding(text string) error {
	for n, raw := range strings.Split(text, "\n") {
		s := strings.TrimLeft(raw, " \t")
		const key = ".encoding"
		if len(s) < len(key) || !strings.EqualFold(s[:len(key)], key) {
			continue
		}
		l, err := f.parseLine(n+1, strings.ToValidUTF8(raw, "?"))
		if err != nil {
			return err
		}
		if !strings.EqualFold(l.key, key) {
			continue
		}
		name := strings.ToLower(l.value)
		if name == "utf-8" || name == "utf8" || name == "us-ascii" || name == "ascii" {
			return nil
		}
		enc, err := htmlindex.Get(name)
		if err != nil || !asciiCompatible(enc) {
			return f.errorf(n+1, key, ErrEncoding, "%q is unknown here: convert the file to UTF-8 and say so in its .encoding line", l.value)
		}
		f.enc = enc
		return nil
	}
	return nil
}

// asciiCompatible excludes encodings, such as UTF-16, in which a line of ASCII
// is not a line of ASCII.
func asciiCompatible(enc encoding.Encoding) bool {
	const probe = `.encoding = "x|22" # 09azAZ:_-`
	s, err := enc.NewDecoder().String(probe)
	return err == nil && s == probe
}

func (f *File) parseLine(n int, raw string) (line, error) {
	l := line{raw: raw}
	body := strings.TrimSuffix(raw, "\n")
	body = strings.TrimSuffix(body, "\r")
	l.end = raw[len(body):]
	text, err := f.decode(body)
	if err != nil {
		return l, f.errorf(n, "", ErrEncoding, "%v", err)
	}
	if i := strings.IndexFunc(text, isControl); i >= 0 {
		return l, f.errorf(n, "", ErrSyntax, "a control character (0x%02x): write it as |%02X", text[i], text[i])
	}
	trimmed := strings.Trim(text, " \t")
	if trimmed == "" || trimmed[0] == '#' {
		return l, nil
	}
	before, after, ok := strings.Cut(text, "=")
	if !ok {
		return l, f.errorf(n, "", ErrSyntax, `no "=": a line reads key = "value"`)
	}
	key := strings.Trim(before, " \t")
	if err := checkKey(key); err != nil {
		return l, f.errorf(n, "", ErrSyntax, "%v", err)
	}
	value := strings.TrimLeft(after, " \t")
	l.lead = text[:len(text)-len(value)]
	if inner, quoted := strings.CutPrefix(value, `"`); quoted {
		v, tail, closed := strings.Cut(inner, `"`)
		if !closed {
			return l, f.errorf(n, key, ErrSyntax, "its value has no closing quote: the file may be cut, restore it")
		}
		if t := strings.Trim(tail, " \t"); t != "" && t[0] != '#' {
			return l, f.errorf(n, key, ErrSyntax, "text after the closing quote; a quote inside a value is written |22")
		}
		value, l.tail = v, tail
	} else {
		v, _, _ := strings.Cut(value, "#")
		v = strings.TrimRight(v, " \t")
		if strings.Contains(v, `"`) {
			return l, f.errorf(n, key, ErrSyntax, "a quote in the middle of an unquoted value: write it as |22")
		}
		l.tail, value = value[len(v):], v
	}
	l.key = key
	if l.value, err = unescape(value); err != nil {
		return l, f.errorf(n, key, ErrValue, "%v", err)
	}
	return l, nil
}

func isControl(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }

func checkKey(key string) error {
	switch {
	case key == "":
		return errors.New(`nothing before the "="`)
	case len(key) > MaxKey:
		return fmt.Errorf("a key of %d bytes, at most %d are allowed", len(key), MaxKey)
	case strings.ContainsAny(key, " \t\"#=|") || strings.IndexFunc(key, isControl) >= 0 || !utf8.ValidString(key):
		return fmt.Errorf("%.64q is no key: keys have no space, quote, #, = or |", key)
	}
	return nil
}

// Name is what errors call the file: its path when it was loaded.
func (f *File) Name() string { return f.name }

// Get returns a value; keys are case-insensitive.
func (f *File) Get(key string) (value string, ok bool) {
	i, ok := f.index[strings.ToLower(key)]
	if !ok {
		return "", false
	}
	return f.lines[i].value, true
}

// String returns a value, or def when the key is absent.
func (f *File) String(key, def string) string {
	if v, ok := f.Get(key); ok {
		return v
	}
	return def
}

// Bool returns a truth value, or def when the key is absent or empty. VMware
// writes TRUE and FALSE; 1, 0, yes, no, on, off, t, f, y and n are read too.
func (f *File) Bool(key string, def bool) (bool, error) {
	v, _ := f.Get(key)
	switch strings.ToLower(v) {
	case "":
		return def, nil
	case "true", "1", "yes", "on", "t", "y":
		return true, nil
	case "false", "0", "no", "off", "f", "n":
		return false, nil
	}
	return def, f.errorf(f.lineOf(key), key, ErrValue, "%.64q is neither TRUE nor FALSE", v)
}

// Int returns a decimal number, or def when the key is absent or empty.
func (f *File) Int(key string, def int64) (int64, error) {
	v, _ := f.Get(key)
	if v == "" {
		return def, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return def, f.errorf(f.lineOf(key), key, ErrValue, "%.64q is no whole number of 64 bits", v)
	}
	return n, nil
}

// All yields keys, as spelled, and values in the order of the file.
func (f *File) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for _, l := range f.lines {
			if l.key != "" && !yield(l.key, l.value) {
				return
			}
		}
	}
}

// Set changes a value in place, or appends the key. It fails with an *Error when
// the key is malformed, the value does not fit a line or the file's encoding
// cannot write it.
func (f *File) Set(key, value string) error {
	if err := checkKey(key); err != nil {
		return f.errorf(0, "", ErrSyntax, "%v", err)
	}
	if !utf8.ValidString(value) || strings.IndexByte(value, 0) >= 0 {
		return f.errorf(0, key, ErrValue, "the value is not UTF-8 text")
	}
	low := strings.ToLower(key)
	if low == ".encoding" && !strings.EqualFold(value, f.String(".encoding", "UTF-8")) {
		return f.errorf(0, key, ErrEncoding, "the encoding of a file cannot be changed")
	}
	if i, ok := f.index[low]; ok {
		l, err := f.render(f.lines[i], value)
		if err != nil {
			return err
		}
		f.lines[i] = l
		return nil
	}
	return f.append(key, value)
}

func (f *File) append(key, value string) error {
	if len(f.lines) >= MaxLines {
		return f.errorf(0, key, ErrTooLarge, "the file has %d lines already", MaxLines)
	}
	end := "\n"
	if len(f.lines) > 0 && f.lines[0].end == "\r\n" {
		end = "\r\n"
	}
	l, err := f.render(line{key: key, lead: key + " = ", end: end}, value)
	if err != nil {
		return err
	}
	if n := len(f.lines); n > 0 && f.lines[n-1].end == "" {
		f.lines[n-1].raw += end
		f.lines[n-1].end = end
	}
	f.index[strings.ToLower(key)] = len(f.lines)
	f.lines = append(f.lines, l)
	return nil
}

// render gives l a new value and prints it.
func (f *File) render(l line, value string) (line, error) {
	tail := l.tail
	if tail != "" && tail[0] == '#' {
		tail = " " + tail
	}
	raw, err := f.encode(l.lead + `"` + escape(value) + `"` + tail)
	if err != nil {
		return l, f.errorf(0, l.key, ErrEncoding, "%v", err)
	}
	if len(raw)+len(l.end) > MaxLine {
		return l, f.errorf(0, l.key, ErrTooLarge, "a value of %d bytes does not fit a line of %d", len(value), MaxLine)
	}
	l.raw, l.value, l.tail = raw+l.end, value, tail
	return l, nil
}

// Delete removes an entry with its line, and says whether it was there.
func (f *File) Delete(key string) bool {
	low := strings.ToLower(key)
	i, ok := f.index[low]
	if !ok {
		return false
	}
	f.lines = append(f.lines[:i], f.lines[i+1:]...)
	delete(f.index, low)
	for k, at := range f.index {
		if at > i {
			f.index[k] = at - 1
		}
	}
	return true
}

// Bytes prints the file: what was parsed, but for the lines that were edited.
func (f *File) Bytes() []byte {
	var b bytes.Buffer
	if f.bom {
		b.WriteString(bom)
	}
	for _, l := range f.lines {
		b.WriteString(l.raw)
	}
	return b.Bytes()
}

func (f *File) lineOf(key string) int {
	if i, ok := f.index[strings.ToLower(key)]; ok {
		return i + 1
	}
	return 0
}

func (f *File) errorf(line int, key string, cause error, format string, args ...any) *Error {
	return &Error{File: f.name, Line: line, Key: key, Cause: cause, Why: fmt.Sprintf(format, args...)}
}
