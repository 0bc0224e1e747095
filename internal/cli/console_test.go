package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/vimapi/vimapitest"
)

// guest is the other end of a console: it answers what it hears in capitals.
func guest(t *testing.T) net.Conn {
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		buf := make([]byte, 1024)
		for {
			n, err := theirs.Read(buf)
			if err != nil {
				return
			}
			if _, err := theirs.Write(bytes.ToUpper(buf[:n])); err != nil || strings.Contains(string(buf[:n]), "poweroff") {
				return
			}
		}
	}()
	t.Cleanup(func() { ours.Close() })
	return ours
}

func TestBridge(t *testing.T) {
	t.Run("a pipe that ends", func(t *testing.T) {
		var out bytes.Buffer
		begun := time.Now()
		if err := bridge(t.Context(), guest(t), strings.NewReader("uname"), &out, 300*time.Millisecond); err != nil || out.String() != "UNAME" {
			t.Errorf("%q, %v", out.String(), err)
		}
		if d := time.Since(begun); d < 300*time.Millisecond {
			t.Errorf("it did not wait for answers: %v", d)
		}
	})
	t.Run("the guest ends", func(t *testing.T) {
		in, _ := io.Pipe() // never says a word more
		var out bytes.Buffer
		if err := bridge(t.Context(), guest(t), io.MultiReader(strings.NewReader("poweroff"), in), &out, -1); err != nil || out.String() != "POWEROFF" {
			t.Errorf("%q, %v", out.String(), err)
		}
	})
	t.Run("Ctrl-C", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		in, _ := io.Pipe()
		if err := bridge(ctx, guest(t), in, io.Discard, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	t.Run("nobody reads", func(t *testing.T) {
		in, _ := io.Pipe()
		r, w := io.Pipe()
		r.CloseWithError(errors.New("broken pipe"))
		if err := bridge(t.Context(), guest(t), io.MultiReader(strings.NewReader("x"), in), w, 0); err == nil {
			t.Error("no error")
		}
	})
}

func TestQuitReader(t *testing.T) {
	got, err := io.ReadAll(&quitReader{strings.NewReader("ab\x1dcd")})
	if string(got) != "ab" || !errors.Is(err, errQuit) {
		t.Errorf("%q, %v", got, err)
	}
}

// pty opens a terminal: keys are typed into keyboard, the verb has tty.
func pty(t *testing.T) (keyboard, tty *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	// Not blocking, so that Close ends a read.
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	keyboard = os.NewFile(uintptr(fd), "ptmx")
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { keyboard.Close(); tty.Close() })
	return keyboard, tty
}

// TestConsoleAtTerminal: keys go to the guest one by one, Ctrl-] ends it, and the
// terminal is as it was.
func TestConsoleAtTerminal(t *testing.T) {
	keyboard, tty := pty(t)
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	screen := make(chan string, 1)
	go func() {
		var all []byte
		buf := make([]byte, 1024)
		for {
			n, err := keyboard.Read(buf)
			all = append(all, buf[:n]...)
			if strings.Contains(string(all), "LS\x03") {
				keyboard.Write([]byte{quitKey})
			}
			if err != nil || strings.Contains(string(all), "LS\x03\r\n") {
				screen <- string(all)
				return
			}
		}
	}()
	c := &client{streams: &streams{in: tty, out: tty, err: tty}}
	done := make(chan error, 1)
	go func() { done <- c.useConsole(t.Context(), guest(t), "web1", 0) }()
	time.Sleep(200 * time.Millisecond)
	if _, err := keyboard.WriteString("ls\x03"); err != nil { // Ctrl-C is for the guest
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Ctrl-] does not end it")
	}
	after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal is not as it was: %+v, %v", after, err)
	}
	keyboard.SetReadDeadline(time.Now().Add(2 * time.Second))
	if got := <-screen; !strings.HasPrefix(got, "Console of web1; Ctrl-] ends it.\r\n") || !strings.Contains(got, "LS\x03") {
		t.Errorf("the screen shows %q", got)
	}
}

func TestConfirm(t *testing.T) {
	for answer, ok := range map[string]bool{"yes": true, "y": false, "no": false, "": false, "YES": false} {
		keyboard, tty := pty(t)
		var asked bytes.Buffer
		s := &streams{in: tty, err: &asked}
		if _, err := keyboard.WriteString(answer + "\n"); err != nil {
			t.Fatal(err)
		}
		if err := s.confirm("Delete it?", "--yes"); (err == nil) != ok {
			t.Errorf("%q: %v", answer, err)
		}
		if asked.String() != "Delete it? Type yes: " {
			t.Errorf("asked %q", asked.String())
		}
	}
}

// TestBar: on a terminal there is a bar that ends full.
func TestBar(t *testing.T) {
	keyboard, tty := pty(t)
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 120}); err != nil {
		t.Fatal(err)
	}
	s := &streams{err: tty}
	p := s.progress("importing a")
	for i := range 5 {
		p.update(state{done: int64(i), total: 4})
		time.Sleep(50 * time.Millisecond)
	}
	p.end(true)
	keyboard.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	screen, _ := io.ReadAll(keyboard)
	if text := string(screen); !strings.Contains(text, "importing a [=") || !strings.Contains(text, "100%  4 B of 4 B  done") {
		t.Errorf("the screen shows %q", text)
	}
}

// TestLoginAtTerminal: who logs in is shown the certificate, answers, and types a
// password that does not show.
func TestLoginAtTerminal(t *testing.T) {
	w := vimapitest.Start(t)
	t.Setenv("MORTISE_CONFIG", t.TempDir())
	t.Setenv("MORTISE_PASSWORD", "")
	for _, c := range []struct {
		typed []string
		want  string
	}{
		{[]string{"no"}, "not confirmed"},
		{[]string{"yes", "wrong"}, "wrong user name or password"},
		{[]string{"yes", ""}, "no password was given"},
		{[]string{"yes", w.Password}, ""},
		{[]string{w.Password}, ""}, // known by now
	} {
		keyboard, tty := pty(t)
		asked, screen := make(chan string, 8), &bytes.Buffer{}
		l := login{streams: &streams{in: tty, out: screen, err: &questions{to: screen, asked: asked}}, user: defaultUser}
		go func() {
			for _, line := range c.typed {
				<-asked
				time.Sleep(100 * time.Millisecond) // until the echo is off
				keyboard.WriteString(line + "\n")
			}
		}()
		err := explain(l.run(t.Context(), w.URL))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%d lines: %v, want %q", len(c.typed), err, c.want)
		}
		if c.typed[0] == "yes" && !strings.Contains(screen.String(), w.Thumbprint()) {
			t.Errorf("the thumbprint was not shown: %s", screen)
		}
		keyboard.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if echo, _ := io.ReadAll(keyboard); strings.Contains(string(echo), w.Password) {
			t.Error("the password shows")
		}
	}
}

// questions tells when a verb has asked something.
type questions struct {
	to    io.Writer
	asked chan string
}

func (q *questions) Write(b []byte) (int, error) {
	if bytes.HasSuffix(b, []byte(": ")) {
		q.asked <- string(b)
	}
	return q.to.Write(b)
}
