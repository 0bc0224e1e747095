package dev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"mortise/internal/atomicfile"
)

// A role is one process of the machine.
type role struct {
	name       string
	executable string
	args       []string
	firstArgs  []string // only at the first start
	log        string   // file that takes what it prints
	ready      func(context.Context) bool
}

// roles keeps processes running: one that dies is started again, after a pause
// that grows while it dies at once.
type roles struct {
	logger *slog.Logger
	forks  chan func() // run on one thread, which lives as long as the roles

	mu      sync.Mutex
	running []*child
	ending  bool
}

type child struct {
	role
	pid  int
	up   atomic.Bool   // it has been ready
	stop chan struct{} // closed when it shall not be started again
	done chan struct{} // closed when it is gone for good
}

// held tells whether somebody wants the role to stay down for now: the file
// NAME.hold beside its log. It is how one tries what happens without the KMS.
func (c *child) held() bool {
	_, err := os.Lstat(strings.TrimSuffix(c.log, ".log") + ".hold")
	return err == nil
}

func newRoles(log *slog.Logger) *roles {
	r := &roles{logger: log, forks: make(chan func())}
	// The kernel ends a child (Pdeathsig) when the thread that made it ends, so one
	// thread makes them all and stays.
	go func() {
		runtime.LockOSThread()
		for f := range r.forks {
			f()
		}
	}()
	return r
}

// start starts a role and waits until it is ready.
func (r *roles) start(ctx context.Context, ro role) error {
	// The role of a machine that was killed just now may still be ending.
	for wait := time.Now().Add(10 * time.Second); ro.ready(ctx) && time.Now().Before(wait) && ctx.Err() == nil; {
		time.Sleep(100 * time.Millisecond)
	}
	if ro.ready(ctx) {
		return fmt.Errorf("%s: its address is in use by another program: stop that, or choose other ports (see mortise dev --help)", ro.name)
	}
	c := &child{role: ro, stop: make(chan struct{}), done: make(chan struct{})}
	first := make(chan error, 1)
	r.mu.Lock()
	r.running = append(r.running, c)
	r.mu.Unlock()
	go r.keep(c, first)
	for {
		select {
		case err := <-first:
			return fmt.Errorf("%s ended at once: %w: %s (more in %s)", ro.name, err, lastLine(ro.log), ro.log)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
			if ro.ready(ctx) {
				c.up.Store(true)
				return nil
			}
		}
	}
}

// keep runs a role again and again until it is told to stop. One that ends before
// it was ever ready is not: its end is told.
func (r *roles) keep(c *child, first chan<- error) {
	defer close(c.done)
	args := append(append([]string(nil), c.args...), c.firstArgs...)
	wait := 200 * time.Millisecond
	for {
		began := time.Now()
		err := r.runOnce(c, args)
		if err == nil {
			err = errors.New("it exited")
		}
		args = c.args
		select {
		case <-c.stop:
			return
		default:
		}
		if !c.up.Load() {
			first <- err
			return
		}
		if time.Since(began) > 10*time.Second {
			wait = 200 * time.Millisecond
		}
		r.logger.Warn("a process died and is started again", "process", c.name, "reason", err)
		for first := true; first || c.held(); first = false {
			select {
			case <-c.stop:
				return
			case <-time.After(wait):
			}
		}
		wait = min(2*wait, 10*time.Second)
	}
}

func (r *roles) runOnce(c *child, args []string) error {
	out, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(c.executable, args...)
	cmd.Stdout, cmd.Stderr = out, out
	// Not in our process group: Ctrl-C is for us, and we stop them in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	r.forks <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return err
	}
	r.mu.Lock()
	c.pid = cmd.Process.Pid
	ending := r.ending
	r.mu.Unlock()
	// The process ids are for people and tests that kill one.
	_ = atomicfile.Write(filepath.Join(filepath.Dir(c.log), c.name+".pid"), fmt.Appendln(nil, cmd.Process.Pid), 0o644)
	if ending {
		_ = cmd.Process.Signal(syscall.SIGTERM)
	}
	return cmd.Wait()
}

// stop ends the roles, the last started first.
func (r *roles) stop(ctx context.Context) error {
	r.mu.Lock()
	r.ending = true
	running := r.running
	r.running = nil
	r.mu.Unlock()
	var errs []error
	for i := len(running) - 1; i >= 0; i-- {
		c := running[i]
		close(c.stop)
		r.mu.Lock()
		pid := c.pid
		r.mu.Unlock()
		if pid != 0 {
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
		select {
		case <-c.done:
		case <-time.After(20 * time.Second):
			errs = append(errs, fmt.Errorf("%s did not end in 20 s and was killed", c.name))
			if pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			<-c.done
		case <-ctx.Done():
			return errors.Join(append(errs, ctx.Err())...)
		}
	}
	close(r.forks)
	return errors.Join(errs...)
}

// lastLine is the last line of a log, for an error.
func lastLine(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > 4096 {
		_, _ = f.Seek(-4096, io.SeekEnd)
	}
	text, _ := io.ReadAll(f)
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return string(lines[len(lines)-1])
}
