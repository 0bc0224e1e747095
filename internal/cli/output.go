package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/vmware/govmomi/vim25/types"
)

// printJSON prints v as the verb's one JSON value.
func (s *streams) printJSON(v any) error {
	e := json.NewEncoder(s.out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// A table is rows under a header, in columns as wide as they need be.
type table struct {
	w    *tabwriter.Writer
	rows int
}

func newTable(w io.Writer, header ...string) *table {
	t := &table{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	fmt.Fprintln(t.w, strings.Join(header, "\t"))
	return t
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		if cells[i] = clean(c); cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows++
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() error { return t.w.Flush() }

// clean takes out of a text what would move a terminal's cursor or break a
// table: names come from elsewhere.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		if unicode.IsSpace(r) {
			return ' '
		}
		return -1
	}, s)
}

// size prints bytes with a binary unit, "12.3 GiB".
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1023.95 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

// parseSize reads bytes: a number with an optional unit, binary: "20G", "512M",
// "20GiB". A bare number has the unit that is given.
func parseSize(text string, unit int64) (int64, error) {
	s := strings.ToUpper(strings.TrimSpace(text))
	s = strings.TrimSuffix(strings.TrimSuffix(s, "B"), "I")
	if s != "" {
		if i := strings.IndexByte("KMGT", s[len(s)-1]); i >= 0 {
			s = strings.TrimSpace(s[:len(s)-1])
			unit = 1 << (10 * (i + 1))
		}
	}
	var n int64
	if s == "" || len(s) > 15 {
		return 0, fmt.Errorf("%q is no size: e.g. 512M, 20G, 1T", text)
	}
	for _, r := range s {
		if r < '0' || r > '9' {
			return 0, fmt.Errorf("%q is no size: e.g. 512M, 20G, 1T", text)
		}
		n = 10*n + int64(r-'0')
	}
	if n == 0 || n > (1<<62)/unit {
		return 0, fmt.Errorf("%q is too small or too large a size", text)
	}
	return n * unit, nil
}

// ago prints how long a moment is past.
func ago(t, now time.Time) string {
	d := now.Sub(t).Round(time.Second)
	switch {
	case t.IsZero():
		return ""
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return t.UTC().Format(time.DateOnly)
}

// keyRef is a key in JSON.
type keyRef struct {
	Provider string `json:"provider"`
	Key      string `json:"key"`
}

func newKeyRef(k *types.CryptoKeyId) *keyRef {
	if k == nil {
		return nil
	}
	r := &keyRef{Key: k.KeyId}
	if k.ProviderId != nil {
		r.Provider = k.ProviderId.Id
	}
	return r
}

func (k *keyRef) String() string {
	if k == nil {
		return ""
	}
	return k.Provider + "/" + k.Key
}

// keyName is how verbs print a key and take it: provider/key id.
func keyName(k *types.CryptoKeyId) string { return newKeyRef(k).String() }

// parseKey reads provider/key id.
func parseKey(text string) (types.CryptoKeyId, error) {
	provider, key, ok := strings.Cut(text, "/")
	if !ok || provider == "" || key == "" {
		return types.CryptoKeyId{}, fmt.Errorf("%q names no key: write PROVIDER/KEY-ID as mortise vm info shows it", text)
	}
	return types.CryptoKeyId{KeyId: key, ProviderId: &types.KeyProviderId{Id: provider}}, nil
}
