package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// maxConfig bounds a configuration file, in bytes.
const maxConfig = 1 << 20

// loadConfig fills cfg from the file that --config names; flags that were given
// win over the file, the file over the defaults that the flags show. cfg's
// fields are the variables that the flags are bound to.
func loadConfig(cmd *cobra.Command, path string, cfg any) error {
	if path == "" {
		return nil
	}
	given := map[*pflag.Flag]string{}
	cmd.Flags().Visit(func(f *pflag.Flag) { given[f] = f.Value.String() })

	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(cfg); err != nil {
		var strict *toml.StrictMissingError
		var bad *toml.DecodeError
		switch {
		case errors.As(err, &strict):
			return fmt.Errorf("configuration %s has entries that this version does not know:\n%s", path, strict.String())
		case errors.As(err, &bad):
			return fmt.Errorf("configuration %s:\n%s", path, bad.String())
		}
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	for f, v := range given {
		if s, ok := f.Value.(pflag.SliceValue); ok {
			if err := s.Replace(nil); err != nil {
				return err
			}
			v = v[1 : len(v)-1] // pflag prints a slice as [a,b]
		}
		if err := f.Value.Set(v); err != nil {
			return fmt.Errorf("--%s: %w", f.Name, err)
		}
	}
	return nil
}

// logFlags are the same for every role.
type logFlags struct {
	Level  string `toml:"log_level"`
	Format string `toml:"log_format"`
}

func (l *logFlags) bind(f *pflag.FlagSet) {
	f.StringVar(&l.Level, "log-level", "info", "least level to log: debug, info, warn, error")
	f.StringVar(&l.Format, "log-format", "text", "text or json, one line per event")
}

func (l *logFlags) logger(w io.Writer, role string) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: want debug, info, warn or error", l.Level)
	}
	opt := &slog.HandlerOptions{Level: level}
	switch l.Format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opt)).With("role", role), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opt)).With("role", role), nil
	}
	return nil, fmt.Errorf("--log-format %q: want text or json", l.Format)
}
