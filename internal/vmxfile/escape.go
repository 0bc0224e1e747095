package vmxfile

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// escape writes a value for a quoted place: the quote, the escape character
// itself, # and control characters as | and two hexadecimal digits.
func escape(v string) string {
	var b strings.Builder
	for i := range len(v) {
		switch c := v[i]; {
		case c == '"' || c == '|' || c == '#' || c < ' ' || c == 0x7f:
			fmt.Fprintf(&b, "|%02X", c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// unescape undoes escape. A | without two hexadecimal digits stands for itself,
// as older products wrote it.
func unescape(v string) (string, error) {
	if !strings.Contains(v, "|") {
		return v, nil
	}
	var b strings.Builder
	for i := 0; i < len(v); i++ {
		if v[i] == '|' && i+2 < len(v) {
			hi, ok1 := hexDigit(v[i+1])
			lo, ok2 := hexDigit(v[i+2])
			if ok1 && ok2 {
				b.WriteByte(hi<<4 | lo)
				i += 2
				continue
			}
		}
		b.WriteByte(v[i])
	}
	s := b.String()
	if strings.IndexByte(s, 0) >= 0 {
		return "", errors.New("an escaped zero byte")
	}
	if !utf8.ValidString(s) {
		return "", errors.New("its escapes are no UTF-8")
	}
	return s, nil
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// decode turns bytes of the file into UTF-8.
func (f *File) decode(raw string) (string, error) {
	if f.enc == nil {
		if !utf8.ValidString(raw) {
			return "", errors.New("not UTF-8; when the file was written in another encoding, its first line must say so, as in .encoding = \"windows-1252\"")
		}
		return raw, nil
	}
	s, err := f.enc.NewDecoder().String(raw)
	if err != nil {
		return "", err
	}
	if strings.ContainsRune(s, utf8.RuneError) {
		return "", errors.New("bytes that its .encoding does not define")
	}
	return s, nil
}

func (f *File) encode(text string) (string, error) {
	if f.enc == nil {
		return text, nil
	}
	s, err := f.enc.NewEncoder().String(text)
	if err != nil {
		return "", fmt.Errorf("its .encoding cannot write the value: %w", err)
	}
	return s, nil
}
