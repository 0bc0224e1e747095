package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// quitKey ends a console at a terminal: Ctrl-].
const quitKey = 0x1d

// lingerDefault is how long a console whose input has ended still shows output.
const lingerDefault = 2 * time.Second

func vmConsole(g *globals) *cobra.Command {
	var linger time.Duration
	cmd := &cobra.Command{
		Use:   "console VM",
		Short: "Use a VM's serial console",
		Long: `Connects to a VM's serial console, over the same TLS as everything else. Nothing of it
is written to a file at center or the host. At a terminal keys go to the guest as they
are typed; Ctrl-] ends the console, not the guest.

In a pipe, standard input goes to the guest and what the guest prints to standard
output. When the input ends, the console stays open until the guest has been silent for
--linger, so that answers are seen; with --linger -1s until it is killed.`,
		Example: `  mortise vm console web1
  printf 'root\nuname -a\n' | mortise vm console web1 --linger 5s`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			if c.json {
				return errors.New("a console has no JSON form: leave --json out")
			}
			vm, err := c.find(ctx, kindVM, args[0])
			if err != nil {
				return err
			}
			conn, err := c.ext.Console(ctx, vm)
			if err != nil {
				return fmt.Errorf("opening the console of %s: %w", args[0], err)
			}
			defer conn.Close()
			if err := c.useConsole(ctx, conn, args[0], linger); err != nil {
				return fmt.Errorf("console of %s: %w", args[0], err)
			}
			return nil
		}),
	}
	cmd.Flags().DurationVar(&linger, "linger", lingerDefault, "in a pipe: how long the guest must be silent after the input has ended")
	return cmd
}

// useConsole connects the console with the terminal or the pipe that the verb
// has.
func (c *client) useConsole(ctx context.Context, conn io.ReadWriteCloser, name string, linger time.Duration) error {
	in, tty := terminal(c.in)
	if !tty {
		return bridge(ctx, conn, c.in, c.out, linger)
	}
	fmt.Fprintf(c.err, "Console of %s; Ctrl-] ends it.\n", clean(name))
	before, err := term.MakeRaw(in)
	if err != nil {
		return err
	}
	defer func() {
		_ = term.Restore(in, before)
		fmt.Fprintln(c.err)
	}()
	keys, stop, err := interruptible(c.in.(*os.File))
	if err != nil {
		return err
	}
	defer stop()
	return bridge(ctx, conn, &quitReader{keys}, c.out, 0)
}

// errQuit ends a console without an error.
var errQuit = errors.New("quit")

// A quitReader passes keys on until Ctrl-] comes.
type quitReader struct{ r io.Reader }

func (q *quitReader) Read(b []byte) (int, error) {
	n, err := q.r.Read(b)
	if i := bytes.IndexByte(b[:n], quitKey); i >= 0 {
		return i, errQuit
	}
	return n, err
}

// interruptible makes reading f end when stop is called. A terminal's read
// blocks until a key comes, so it is waited for with poll.
func interruptible(f *os.File) (r io.Reader, stop func(), err error) {
	wakeR, wakeW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	return &pollReader{fd: int(f.Fd()), wake: wakeR}, func() { wakeW.Close() }, nil
}

type pollReader struct {
	fd   int
	wake *os.File
}

func (p *pollReader) Read(b []byte) (int, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}, {Fd: int32(p.wake.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
		if fds[1].Revents != 0 {
			p.wake.Close()
			return 0, errQuit
		}
		if fds[0].Revents != 0 {
			n, err := unix.Read(p.fd, b)
			switch {
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
				continue
			case err != nil:
				return 0, err
			case n == 0:
				return 0, io.EOF
			}
			return n, nil
		}
	}
}

// bridge copies in to conn and conn to out, until conn or ctx ends, in quits, or
// in has ended and conn was silent for linger (negative: for ever).
func bridge(ctx context.Context, conn io.ReadWriteCloser, in io.Reader, out io.Writer, linger time.Duration) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	typed := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, in)
		typed <- err
	}()
	heard := make(chan struct{}, 1)
	shown := make(chan error, 1)
	go func() {
		buf := make([]byte, 32<<10)
		for {
			n, err := conn.Read(buf)
			if n > 0 {
				if _, werr := out.Write(buf[:n]); werr != nil {
					shown <- werr
					return
				}
				select {
				case heard <- struct{}{}:
				default:
				}
			}
			if err != nil {
				shown <- err
				return
			}
		}
	}()
	var silence <-chan time.Time
	ended := false
	for {
		select {
		case err := <-shown:
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case err == io.EOF:
				return nil
			}
			return err
		case err := <-typed:
			if errors.Is(err, errQuit) {
				return nil
			}
			if err != nil {
				return err
			}
			ended, typed = true, nil
			if linger >= 0 {
				silence = time.After(linger)
			}
		case <-heard:
			if ended && linger >= 0 {
				silence = time.After(linger)
			}
		case <-silence:
			return nil
		}
	}
}
