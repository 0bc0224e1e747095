package vimext

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/coder/websocket"
	"github.com/vmware/govmomi/vim25/types"
)

// Where the data paths are.
const (
	ImportPath  = "/mortise/v1/import"  // PUT, ?vm=vm-12&disk=2000
	ConsolePath = "/mortise/v1/console" // GET, ?vm=vm-12; a WebSocket of binary messages
)

// ImportResult is the answer to an import.
type ImportResult struct {
	Written int64 `json:"written"` // bytes
}

// DataError is a refusal of a data path. Message is for the user.
type DataError struct {
	Status  int    `json:"-"`
	Kind    string `json:"kind"` // the vSphere fault's name
	Message string `json:"message"`
}

func (e *DataError) Error() string { return e.Message }

// Source is a disk's content, in rising order of offset; what it skips reads as
// zeros. Next ends with io.EOF.
type Source interface {
	Next() (offset int64, data []byte, err error)
}

// ImportDisk writes the content of a disk of a powered-off VM and returns how
// many bytes center wrote.
func (c *Client) ImportDisk(ctx context.Context, vm types.ManagedObjectReference, disk int32, source Source) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pr, pw := io.Pipe()
	failed := &remembering{Source: source}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		pw.CloseWithError(send(pw, failed))
	}()
	target := c.url(ImportPath, "vm", vm.Value, "disk", strconv.Itoa(int(disk)))
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, target, pr)
	if err != nil {
		pr.Close()
		return 0, err
	}
	req.Header.Set("Content-Type", "application/vnd.mortise.disk")
	req.Header.Set("Expect", "100-continue") // a refusal comes before the data goes
	res, err := c.soap.Client.Do(req)
	pr.Close()
	<-sent
	if failed.err != nil { // it is why the request failed
		if res != nil {
			res.Body.Close()
		}
		return 0, failed.err
	}
	if err != nil {
		return 0, fmt.Errorf("sending the disk to %s: %w", c.soap.URL().Host, err)
	}
	defer res.Body.Close()
	var result ImportResult
	err = decode(res, &result)
	return result.Written, err
}

// decode reads an answer; one that is no success is a *DataError.
func decode(res *http.Response, v any) error {
	text, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if res.StatusCode == http.StatusOK {
		return json.Unmarshal(text, v)
	}
	e := &DataError{Status: res.StatusCode}
	if json.Unmarshal(text, e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("the server answered %s", res.Status)
	}
	return e
}

// remembering is a Source that keeps its error, to tell it from those of the
// connection.
type remembering struct {
	Source
	err error
}

func (r *remembering) Next() (int64, []byte, error) {
	offset, data, err := r.Source.Next()
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return offset, data, err
}

func send(w io.Writer, source Source) error {
	b := bufio.NewWriterSize(w, 256<<10)
	for {
		offset, data, err := source.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		for len(data) > 0 {
			n := min(len(data), MaxRecord)
			if err := WriteRecord(b, offset, data[:n]); err != nil {
				return err
			}
			offset, data = offset+int64(n), data[n:]
		}
	}
	if err := WriteEnd(b); err != nil {
		return err
	}
	return b.Flush()
}

// Console opens a VM's serial console. Closing it ends the session, not the
// guest.
func (c *Client) Console(ctx context.Context, vm types.ManagedObjectReference) (io.ReadWriteCloser, error) {
	web := c.soap.Client
	web.Timeout = 0
	conn, res, err := websocket.Dial(ctx, c.url(ConsolePath, "vm", vm.Value), &websocket.DialOptions{HTTPClient: &web})
	if err != nil {
		if res != nil && res.StatusCode != http.StatusSwitchingProtocols {
			return nil, decode(res, nil)
		}
		return nil, fmt.Errorf("opening the console at %s: %w", c.soap.URL().Host, err)
	}
	conn.SetReadLimit(1 << 20)
	return websocket.NetConn(context.WithoutCancel(ctx), conn, websocket.MessageBinary), nil
}

func (c *Client) url(path string, query ...string) string {
	u := *c.soap.URL()
	u.User, u.Path, u.RawQuery = nil, path, ""
	q := url.Values{}
	for i := 0; i+1 < len(query); i += 2 {
		q.Set(query[i], query[i+1])
	}
	u.RawQuery = q.Encode()
	return u.String()
}
