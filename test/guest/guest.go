// Package guest makes the small Linux guest that tests and the demo run, and
// talks to the agent inside it over the serial console. See build.sh for what is
// on the disk and rootfs/agent for the commands.
//
// It is used by tests only and imports nothing of Mortise.
package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// Plaintext is in a file on the disk, tens of thousands of times: a test that
// finds it on a datastore has found a leak.
const Plaintext = "MORTISE-KNOWN-PLAINTEXT-"

// Image is a bootable disk; see build.sh.
type Image struct {
	Raw  string // path; read only: copy it
	VMDK string // the same disk, monolithicSparse
}

// Tools makes the disk of tools that a guest can have beside its own, or finds it
// made; see tools.sh. It returns its path: read only, copy it.
func Tools(ctx context.Context) (string, error) { return build(ctx, "tools.sh", "tools.raw") }

// Build makes the image, or finds it made. It needs root's tools and a few
// Debian packages; the error names those that are missing.
func Build(ctx context.Context) (Image, error) {
	raw, err := build(ctx, "build.sh", "guest.raw")
	return Image{Raw: raw, VMDK: strings.TrimSuffix(raw, ".raw") + ".vmdk"}, err
}

// build runs a script of this folder, and returns the path of what it makes.
func build(ctx context.Context, script, made string) (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, serr := os.Stat(filepath.Join(dir, "go.mod")); serr == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("guest image: no go.mod above the working folder")
		}
		dir = filepath.Dir(dir)
	}
	if err != nil {
		return "", fmt.Errorf("guest image: %w", err)
	}
	out := filepath.Join(dir, "test", "guest", "out")
	said, err := exec.CommandContext(ctx, filepath.Join(dir, "test", "guest", script), out).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("guest image: %w\n%s", err, said)
	}
	return filepath.Join(out, made), nil
}

// An Agent is the program on the guest's console. One command runs at a time.
type Agent struct {
	line io.ReadWriter

	mu      sync.Mutex // held by a command
	number  int
	answers chan string // lines that begin with "MORTISE "; closed at the end

	past struct {
		sync.Mutex
		text []byte // the last few KiB of the console, for errors
	}
}

// An Answer is what a command gave, e.g. "io run=… written=12": its words, and
// those of the form key=value.
type Answer struct {
	Text   string
	Words  []string
	Values map[string]string
}

// NewAgent reads a console until it ends. Of several agents on one console each
// sees its own answers.
func NewAgent(line io.ReadWriter) *Agent {
	a := &Agent{line: line, number: os.Getpid() * 1000, answers: make(chan string, 1000)}
	go a.read()
	return a
}

func (a *Agent) read() {
	defer close(a.answers)
	r := bufio.NewReader(a.line)
	for {
		text, err := r.ReadString('\n')
		a.past.Lock()
		a.past.text = append(a.past.text, text...)
		a.past.text = a.past.text[max(0, len(a.past.text)-8192):]
		a.past.Unlock()
		if err != nil {
			return
		}
		// The agent's prompt may stand before what the shell prints.
		text = strings.TrimSpace(text)
		if i := strings.Index(text, "MORTISE "); i >= 0 && (i == 0 || strings.HasPrefix(text, "mortise> ")) {
			select {
			case a.answers <- text[i:]:
			default: // nobody waits for old answers
			}
		}
	}
}

// Console is the last of what the guest printed.
func (a *Agent) Console() string {
	a.past.Lock()
	defer a.past.Unlock()
	return string(a.past.text)
}

// Boot waits until the agent says that it is ready, after power-on or reboot.
func (a *Agent) Boot(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err := a.next(ctx, func(text string) bool { return strings.Contains(text, " ready") })
	return err
}

// Do runs a command, e.g. "marker write", and gives its answer. A failure that
// the guest reports is an error.
func (a *Agent) Do(ctx context.Context, command string) (Answer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.number++
	if _, err := fmt.Fprintf(a.line, "@%d %s\n", a.number, command); err != nil {
		return Answer{}, fmt.Errorf("guest: %s: %w", command, err)
	}
	end := fmt.Sprintf(" id=%d", a.number)
	answer, err := a.next(ctx, func(text string) bool { return strings.HasSuffix(text, end) })
	if err != nil {
		return Answer{}, fmt.Errorf("guest: %s: %w", command, err)
	}
	return answer, nil
}

func (a *Agent) next(ctx context.Context, want func(string) bool) (Answer, error) {
	for {
		select {
		case text, ok := <-a.answers:
			if !ok {
				return Answer{}, fmt.Errorf("the console ended; the last of it:\n%s", a.Console())
			}
			if !want(text) {
				continue
			}
			if reason, failed := strings.CutPrefix(text, "MORTISE fail "); failed {
				return Answer{}, errors.New(reason)
			}
			return parse(strings.TrimPrefix(text, "MORTISE ok ")), nil
		case <-ctx.Done():
			return Answer{}, fmt.Errorf("%w; the last of its console:\n%s", ctx.Err(), a.Console())
		}
	}
}

func parse(text string) Answer {
	ans := Answer{Text: text, Words: strings.Fields(text), Values: map[string]string{}}
	for _, w := range ans.Words {
		if k, v, ok := strings.Cut(w, "="); ok {
			ans.Values[k] = v
		}
	}
	return ans
}
