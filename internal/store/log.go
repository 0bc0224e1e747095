package store

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapTo returns a zap logger that writes to log. etcd is talkative: its
// informational lines become debug lines. What it calls fatal, a failed fsync
// for one, panics instead of ending the process without a trace.
func zapTo(log *slog.Logger) *zap.Logger {
	return zap.New(&slogCore{log.With("part", "etcd")}, zap.WithFatalHook(zapcore.WriteThenPanic))
}

type slogCore struct{ log *slog.Logger }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), slogLevel(l))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{c.log.With(attrs(fields)...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// noClients is a warning about the client listener that a store does not have.
const noClients = "Running http and grpc server on single port. This is not recommended for production."

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if e.Message == noClients {
		return nil
	}
	c.log.Log(context.Background(), slogLevel(e.Level), e.Message, attrs(fields)...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	list := make([]any, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		list = append(list, slog.Any(k, v))
	}
	return list
}
