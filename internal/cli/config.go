package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"mortise/internal/atomicfile"
)

// maxConfig bounds the session file, in bytes.
const maxConfig = 1 << 20

// config is the session file: which centers are known, how each one's
// certificate is known again, and the sessions that are open. Whoever can read
// it can act as its user until the session ends, so it has mode 0600.
type config struct {
	Current string             `json:"current,omitempty"` // URL of the last login
	Centers map[string]*center `json:"centers"`           // by URL, "https://host:port"

	path string
}

// center is what is remembered of one center. The thumbprint outlives the
// session: it tells the next login that the center is still the same one.
type center struct {
	User       string `json:"user,omitempty"`
	Thumbprint string `json:"thumbprint,omitempty"` // SHA-256, upper-case hex with colons; empty: the system's roots decide
	Session    string `json:"session,omitempty"`
}

// configPath is where the session file is: in $MORTISE_CONFIG, or in the user's
// folder for configuration.
func configPath() (string, error) {
	dir := os.Getenv("MORTISE_CONFIG")
	if dir == "" {
		base, err := os.UserConfigDir()
		if err != nil {
			return "", fmt.Errorf("where to keep the session: %w; name a folder in MORTISE_CONFIG", err)
		}
		dir = filepath.Join(base, "mortise")
	}
	return filepath.Join(dir, "session.json"), nil
}

func loadConfig() (*config, error) {
	path, err := configPath()
	if err != nil {
		return nil, err
	}
	c := &config{Centers: map[string]*center{}, path: path}
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %04o) and holds a session: run chmod 600 on it, and log in anew if somebody may have read it", path, st.Mode().Perm())
	}
	text, err := atomicfile.Read(path, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("reading the session: %w", err)
	}
	if err := json.Unmarshal(text, c); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w): remove it and log in anew", path, err)
	}
	for url, known := range c.Centers {
		if known == nil {
			delete(c.Centers, url)
		}
	}
	if c.Centers == nil {
		c.Centers = map[string]*center{}
	}
	return c, nil
}

func (c *config) save() error {
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
		return fmt.Errorf("keeping the session: %w", err)
	}
	if err := atomicfile.Write(c.path, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("keeping the session: %w", err)
	}
	return nil
}

// of returns what is remembered of a center, to be changed.
func (c *config) of(url string) *center {
	known := c.Centers[url]
	if known == nil {
		known = &center{}
		c.Centers[url] = known
	}
	return known
}
