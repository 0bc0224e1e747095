package vmdk

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"mortise/internal/keysafe"
	"mortise/internal/vmxfile"
)

// A line is its bytes as they are in the file and what they mean: an entry, an
// extent, or neither (a comment).
type line struct {
	raw    string
	key    string // as spelled
	value  string // without quotes
	style  style  // how the entry is written
	extent *Extent
	end    string // "\n", "\r\n", or "" on an unfinished last line
}

// style is what stands between an entry's key and its value: the separator and,
// when the value has quotes, the opening one.
type style string

const (
	bare  style = `=`    // CID=12345678
	tight style = `="`   // createType="vmfs"
	wide  style = ` = "` // ddb.uuid = "…"
)

const magic = "# Disk DescriptorFile"

// Parse reads a descriptor and checks that it is one whole, consistent link;
// name is what errors call it. Whether an encrypted one is authentic is for
// Verify, which needs the DEK. The error is an *Error.
func Parse(name string, text []byte) (*Descriptor, error) {
	d := &Descriptor{name: name, entries: map[string]int{}}
	// QEMU fills the last 512 bytes of a descriptor that it rewrites with zeros.
	if t := bytes.TrimRight(text, "\x00"); len(text)-len(t) < SectorSize && bytes.HasSuffix(t, []byte("\n")) {
		text = t
	}
	switch {
	case bytes.HasPrefix(text, []byte("KDMV")), bytes.HasPrefix(text, []byte("COWD")):
		return nil, d.errorf(0, ErrUnsupported, "this is a sparse VMDK, data and all, and no text descriptor; import it with \"mortise vm import\"")
	case len(text) > MaxText:
		return nil, d.errorf(0, ErrTooLarge, "%d bytes, a descriptor has at most %d; is this an extent?", len(text), MaxText)
	case len(text) == 0:
		return nil, d.errorf(0, ErrTruncated, "the file is empty; %s", restore)
	case bytes.IndexByte(text, 0) >= 0:
		return nil, d.errorf(0, ErrSyntax, "a zero byte: this is no text file; %s", restore)
	case !utf8.Valid(text):
		return nil, d.errorf(0, ErrSyntax, "the text is not UTF-8; convert it, or %s", restore)
	case !bytes.HasPrefix(text, []byte(magic)):
		return nil, d.errorf(1, ErrSyntax, "it does not begin with %q: this is no disk descriptor; %s", magic, restore)
	}
	rest, known := string(text), 0
	for n := 1; rest != ""; n++ {
		raw := rest
		if i := strings.IndexByte(rest, '\n'); i >= 0 {
			raw = rest[:i+1]
		}
		rest = rest[len(raw):]
		if len(raw) > MaxLine {
			return nil, d.errorf(n, ErrTooLarge, "a line of %d bytes, at most %d", len(raw), MaxLine)
		}
		l, err := d.parseLine(n, raw)
		if err != nil {
			return nil, err
		}
		if l.key != "" || l.extent != nil {
			if known++; known > MaxEntries {
				return nil, d.errorf(n, ErrTooLarge, "more than %d entries", MaxEntries)
			}
		}
		if l.key != "" {
			low := strings.ToLower(l.key)
			if first, dup := d.entries[low]; dup {
				return nil, d.errorf(n, ErrDuplicate, "%s is already on line %d: remove the wrong one, or %s", l.key, first+1, restore)
			}
			d.entries[low] = len(d.lines)
		}
		d.lines = append(d.lines, l)
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Descriptor) parseLine(n int, raw string) (line, error) {
	body := strings.TrimSuffix(strings.TrimSuffix(raw, "\n"), "\r")
	l := line{raw: raw, end: raw[len(body):]}
	text := strings.Trim(body, " \t")
	if text == "" || text[0] == '#' {
		return l, nil
	}
	if i := strings.IndexFunc(body, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }); i >= 0 {
		return l, d.errorf(n, ErrSyntax, "a control character; %s", restore)
	}
	switch access, _, _ := strings.Cut(strings.ReplaceAll(text, "\t", " "), " "); access {
	case "RW", "RDONLY", "NOACCESS":
		e, err := d.parseExtent(n, text, l.end == "")
		l.extent = e
		return l, err
	}
	before, after, ok := strings.Cut(text, "=")
	if !ok {
		return l, d.broken(n, l.end == "", "neither an entry nor an extent")
	}
	l.key = strings.TrimRight(before, " \t")
	value := strings.TrimLeft(after, " \t")
	l.style = style(text[len(l.key) : len(text)-len(value)])
	if l.key == "" || strings.ContainsAny(l.key, " \t\"#") {
		return l, d.errorf(n, ErrSyntax, "%.64q is no key; %s", l.key, restore)
	}
	if inner, quoted := strings.CutPrefix(value, `"`); quoted {
		v, tail, closed := strings.Cut(inner, `"`)
		if !closed {
			return l, d.broken(n, l.end == "", l.key+" has no closing quote")
		}
		if tail = strings.Trim(tail, " \t"); tail != "" && tail[0] != '#' {
			return l, d.errorf(n, ErrSyntax, "text after the value of %s; %s", l.key, restore)
		}
		value, l.style = v, l.style+`"`
	} else if strings.Contains(value, `"`) {
		return l, d.errorf(n, ErrSyntax, "a quote inside the value of %s; %s", l.key, restore)
	}
	l.value = value
	return l, nil
}

// broken tells a line that was cut at the end of the file from a malformed one.
func (d *Descriptor) broken(n int, last bool, why string) *Error {
	if last {
		return d.errorf(n, ErrTruncated, "%s, and the file ends there; %s", why, restore)
	}
	return d.errorf(n, ErrSyntax, "%s; %s", why, restore)
}

// parseExtent reads: access, sectors, type, quoted file name, offset.
func (d *Descriptor) parseExtent(n int, text string, last bool) (*Extent, error) {
	head, tail, ok := strings.Cut(text, `"`)
	fields := strings.Fields(head)
	if len(fields) != 3 {
		return nil, d.broken(n, last, `an extent reads RW <sectors> <type> "<file>" <offset>`)
	}
	e := &Extent{Access: fields[0], Type: fields[2]}
	switch e.Type {
	case ExtentFlat, ExtentVMFS, ExtentXTSFlat, ExtentDelta, ExtentXTSDelta:
	default:
		return nil, d.errorf(n, ErrUnsupported, "extents of type %.32q are not opened in place; import the disk with \"mortise vm import\"", e.Type)
	}
	if !ok {
		return nil, d.broken(n, last, "an extent without a file name")
	}
	file, offset, ok := strings.Cut(tail, `"`)
	if !ok {
		return nil, d.broken(n, last, "the extent's file name has no closing quote")
	}
	e.File = file
	if err := CheckFileName(file); err != nil {
		return nil, d.errorf(n, ErrPath, "extent %v; %s", err, restore)
	}
	var err error
	if e.Sectors, err = strconv.ParseUint(fields[1], 10, 63); err != nil || e.Sectors == 0 || e.Sectors > MaxSize/SectorSize {
		return nil, d.errorf(n, ErrValue, "%.32q is no number of sectors from 1 to %d; %s", fields[1], MaxSize/SectorSize, restore)
	}
	if offset = strings.Trim(offset, " \t"); offset != "" {
		if e.Offset, err = strconv.ParseUint(offset, 10, 63); err != nil || e.Offset > MaxSize/SectorSize {
			return nil, d.errorf(n, ErrValue, "%.32q is no offset in sectors; %s", offset, restore)
		}
	}
	return e, nil
}

// check refuses what is not one whole and consistent link.
func (d *Descriptor) check() error {
	if err := d.checkForeign(); err != nil {
		return err
	}
	for _, key := range [...]string{"version", "CID", "createType"} {
		if _, ok := d.Get(key); !ok {
			return d.errorf(0, ErrTruncated, "entry %s is missing; %s", key, restore)
		}
	}
	if v, _ := d.Get("version"); v != "1" && v != "2" && v != "3" {
		return d.errorf(d.lineOf("version"), ErrUnsupported, "descriptor version %.16q is unknown: 1, 2 and 3 are", v)
	}
	if v, ok := d.Get("encoding"); ok && !strings.EqualFold(v, "UTF-8") && !isASCII(d.lines) {
		return d.errorf(d.lineOf("encoding"), ErrUnsupported, "encoding %.32q: convert the descriptor to UTF-8 and say so", v)
	}
	for _, key := range [...]string{"CID", "parentCID"} {
		if v, ok := d.Get(key); ok {
			if _, err := strconv.ParseUint(v, 16, 32); err != nil {
				return d.errorf(d.lineOf(key), ErrValue, "%s %.32q is no 32-bit hexadecimal number; %s", key, v, restore)
			}
		}
	}
	if v, ok := d.Get("ddb.uuid"); ok {
		if _, err := vmxfile.ParseUUID(v); err != nil {
			return d.errorf(d.lineOf("ddb.uuid"), ErrValue, "%v; %s", err, restore)
		}
	}
	if err := d.checkKind(); err != nil {
		return err
	}
	return d.checkParent()
}

// checkKind compares createType, extents and encryption entries: together they
// say whether the link is encrypted, and must agree.
func (d *Descriptor) checkKind() error {
	var want []string // the extent types that fit
	switch ct := d.CreateType(); ct {
	case MonolithicFlat, TwoGbMaxExtentFlat:
		want = []string{ExtentFlat}
	case VMFS:
		want = []string{ExtentVMFS, ExtentFlat}
	case MortiseFlat:
		want = []string{ExtentXTSFlat}
	case MortiseDelta:
		want = []string{ExtentDelta, ExtentXTSDelta}
	default:
		return d.errorf(d.lineOf("createType"), ErrUnsupported, "disks of createType %.32q are not opened in place; import this one with \"mortise vm import\"", ct)
	}
	es := d.Extents()
	if len(es) == 0 {
		return d.errorf(0, ErrTruncated, "no extent line; %s", restore)
	}
	var total uint64
	for _, e := range es {
		if !contains(want, e.Type) {
			return d.errorf(0, ErrEdited, "an extent of type %s in a disk of createType %s; %s", e.Type, d.CreateType(), restore)
		}
		if total += e.Sectors; total > MaxSize/SectorSize {
			return d.errorf(0, ErrTooLarge, "a disk has at most %d bytes", MaxSize)
		}
	}
	if ours := d.CreateType() == MortiseFlat || d.IsDelta(); ours && (len(es) > 1 || es[0].Offset != 0 || es[0].Access != "RW") {
		return d.errorf(0, ErrEdited, "a disk of createType %s has one extent, RW, at offset 0; %s", d.CreateType(), restore)
	}
	encrypted := es[0].Type == ExtentXTSFlat || es[0].Type == ExtentXTSDelta
	if encrypted {
		_, err := d.encryption()
		return err
	}
	for low, i := range d.entries {
		if strings.HasPrefix(low, "encryption.") {
			return d.errorf(i+1, ErrEdited, "entry %s in the descriptor of a disk in clear; %s", d.lines[i].key, restore)
		}
	}
	return nil
}

func (d *Descriptor) checkParent() error {
	hint, hinted := d.Get("parentFileNameHint")
	linked := hinted || d.ParentCID() != NoParent && d.has("parentCID")
	switch {
	case d.IsDelta() && (!hinted || !d.has("parentCID") || d.ParentCID() == NoParent):
		return d.errorf(0, ErrTruncated, "a snapshot link without parentFileNameHint and parentCID; %s", restore)
	case !d.IsDelta() && linked:
		return d.errorf(0, ErrUnsupported, "a disk of createType %s with a parent is a foreign snapshot: consolidate it where it was made, then import it", d.CreateType())
	case hinted:
		if err := CheckParentName(hint); err != nil {
			return d.errorf(d.lineOf("parentFileNameHint"), ErrPath, "parent %v; %s", err, restore)
		}
	}
	return nil
}

// checkForeign recognises disks that VMware's products encrypted (rule I6):
// Workstation writes encryptionKeys, vSphere an IO filter.
func (d *Descriptor) checkForeign() error {
	for low, i := range d.entries {
		v := strings.ToLower(d.lines[i].value)
		if strings.HasPrefix(v, "vmware:key/") || strings.Contains(low, "iofilters") && strings.Contains(v, "vmwarevmcrypt") {
			return d.errorf(i+1, &keysafe.ForeignError{}, "entry %s says so", d.lines[i].key)
		}
	}
	return nil
}

func (d *Descriptor) has(key string) bool { _, ok := d.Get(key); return ok }

func (d *Descriptor) lineOf(key string) int {
	if i, ok := d.entries[strings.ToLower(key)]; ok {
		return i + 1
	}
	return 0
}

// put changes an entry, keeping its style, or adds one at the end in the style
// given.
func (d *Descriptor) put(key, value string, s style) {
	low := strings.ToLower(key)
	i, ok := d.entries[low]
	if !ok {
		d.finishLastLine()
		i = len(d.lines)
		d.entries[low] = i
		d.lines = append(d.lines, line{key: key, style: s, end: "\n"})
	} else if d.lines[i].value == value {
		return
	}
	l := &d.lines[i]
	l.value = value
	l.raw = l.key + string(l.style) + value
	if strings.HasSuffix(string(l.style), `"`) {
		l.raw += `"`
	}
	l.raw += l.end
	if covered(low) {
		d.stale = true
	}
}

func (d *Descriptor) comment(text string) {
	d.lines = append(d.lines, line{raw: text + "\n", end: "\n"})
}

func (d *Descriptor) finishLastLine() {
	if n := len(d.lines); n > 0 && d.lines[n-1].end == "" {
		d.lines[n-1].raw += "\n"
		d.lines[n-1].end = "\n"
	}
}

// remove deletes the entries for which drop says so, with their lines.
func (d *Descriptor) remove(drop func(low string) bool) {
	var kept []line
	d.entries = map[string]int{}
	for _, l := range d.lines {
		low := strings.ToLower(l.key)
		if l.key != "" && drop(low) {
			continue
		}
		if l.key != "" {
			d.entries[low] = len(kept)
		}
		kept = append(kept, l)
	}
	d.lines = kept
}

// Bytes prints the descriptor: what was parsed, but for the lines edited since.
func (d *Descriptor) Bytes() []byte {
	var b bytes.Buffer
	for _, l := range d.lines {
		b.WriteString(l.raw)
	}
	return b.Bytes()
}

// CheckFileName refuses names that are not those of a file in the same folder.
func CheckFileName(name string) error {
	switch {
	case name == "" || name == "." || name == ".." || len(name) > 255:
		return fmt.Errorf("%.64q is no file name", name)
	case strings.ContainsAny(name, `/\"`):
		return fmt.Errorf("%.64q is not in the descriptor's own folder: names with a slash, a backslash or a quote are refused", name)
	case !utf8.ValidString(name) || strings.IndexFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) >= 0:
		return fmt.Errorf("%.64q has unprintable characters", name)
	}
	return nil
}

// CheckParentName refuses what cannot name a parent's descriptor: it is a file in
// the same folder, or for a linked clone in one beside it, "../folder/file".
func CheckParentName(name string) error {
	if rest, out := strings.CutPrefix(name, "../"); out {
		folder, file, _ := strings.Cut(rest, "/")
		if err := CheckFileName(folder); err != nil {
			return err
		}
		name = file
	}
	return CheckFileName(name)
}

func isASCII(lines []line) bool {
	for _, l := range lines {
		for i := range len(l.raw) {
			if l.raw[i] >= utf8.RuneSelf {
				return false
			}
		}
	}
	return true
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}
