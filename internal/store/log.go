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

// usual are the warnings and errors of etcd that go with how a store uses it: it
// has no client listener, a new member learns the storage version a little later,
// a learner's promotion is tried until it has caught up, and Close closes.
var usual = map[string]bool{
	"Running http and grpc server on single port. This is not recommended for production.": true,
	"failed to update storage version":                true,
	"rejecting promote learner: learner is not ready": true,
	"setting up serving from embedded etcd failed.":   true,
	"rejecting member add request; local member has not been connected to majority peers, reconfigure breaks active quorum": true,
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slogLevel(e.Level)
	if usual[e.Message] {
		level = slog.LevelDebug
	}
	c.log.Log(context.Background(), level, e.Message, attrs(fields)...)
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
