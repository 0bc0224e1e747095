package pkcs11

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"time"
)

// helper is a running mortise-pkcs11.
type helper struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	exited chan struct{} // closed once err is set
	err    error
	once   sync.Once
	said   *lines
}

// startHelper starts the helper. What it and the vendor's library write to
// standard error becomes log lines.
func startHelper(cfg Config, log *slog.Logger) (*helper, error) {
	args := []string{"--module", cfg.Module}
	if cfg.Label != "" {
		args = append(args, "--token", cfg.Label)
	}
	h := &helper{cmd: exec.Command(cfg.Helper, args...), exited: make(chan struct{})}
	// Pipes of our own: Wait must not close what a reader still reads.
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, inR.Close(), inW.Close())
	}
	h.said = &lines{log: log}
	h.cmd.Stdin, h.cmd.Stdout, h.cmd.Stderr = inR, outW, h.said
	h.cmd.WaitDelay = time.Second
	err = h.cmd.Start()
	inR.Close()
	outW.Close()
	if err != nil {
		return nil, errors.Join(err, inW.Close(), outR.Close())
	}
	h.stdin, h.stdout = inW, bufio.NewReader(outR)
	go func() {
		h.err = h.cmd.Wait()
		close(h.exited)
		outR.Close()
	}()
	return h, nil
}

func (h *helper) ended() bool {
	select {
	case <-h.exited:
		return true
	default:
		return false
	}
}

// why it ended, with the last that it said.
func (h *helper) why() error {
	err := h.err
	if err == nil {
		err = errors.New("it ended by itself")
	}
	if h.said.last != "" {
		err = fmt.Errorf("%w; it said: %s", err, h.said.last)
	}
	return err
}

// exchange makes one request. After an error the helper is of no use: an answer
// may still come, to a question that nobody asks any more.
func (h *helper) exchange(limit time.Duration, m message) (message, error) {
	type result struct {
		message
		err error
	}
	frame, err := m.encode()
	if err != nil {
		return message{}, err
	}
	done := make(chan result, 1)
	go func() {
		defer clear(frame)
		if _, err := h.stdin.Write(frame); err != nil {
			done <- result{err: err}
			return
		}
		got, _, err := readMessage(h.stdout)
		done <- result{got, err}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case r := <-done:
		if r.err == nil {
			return r.message, nil
		}
		select {
		case <-h.exited:
			return message{}, fmt.Errorf("it died: %w", h.why())
		case <-time.After(100 * time.Millisecond):
			return message{}, fmt.Errorf("it answers wrongly: %w", r.err)
		}
	case <-timer.C:
		return message{}, fmt.Errorf("no answer within %s", limit)
	}
}

// stop ends the process, whatever it is doing.
func (h *helper) stop() {
	h.once.Do(func() {
		h.stdin.Close()
		_ = h.cmd.Process.Kill()
		<-h.exited
	})
}

// lines logs what is written to it, line by line, long ones cut.
type lines struct {
	log  *slog.Logger
	line []byte
	last string // whole line; to be read once the process has ended
}

func (l *lines) Write(b []byte) (int, error) {
	for _, c := range b {
		switch {
		case c == '\n':
			l.last = string(l.line)
			l.log.Warn("pkcs11: the helper says", "text", l.last)
			l.line = l.line[:0]
		case len(l.line) < 1024:
			l.line = append(l.line, c)
		}
	}
	return len(b), nil
}
