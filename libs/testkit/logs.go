package testkit

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Record is one captured log record.
type Record struct {
	Level   slog.Level
	Message string
	Attrs   map[string]string // groups joined to keys by dots
}

// String returns the record as one line, attributes in order of their keys.
func (r Record) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", r.Level, r.Message)
	keys := make([]string, 0, len(r.Attrs))
	for k := range r.Attrs {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		fmt.Fprintf(&b, " %s=%s", k, r.Attrs[k])
	}
	return b.String()
}

// Logs captures what is logged through [Logs.Logger] or [Logs.Handler]. Its
// methods may be called from any goroutine.
type Logs struct {
	mu      sync.Mutex
	records []Record
	t       testing.TB
	done    bool
}

// NewLogs returns an empty recorder. If the test fails, everything captured is
// printed at its end.
func NewLogs(t testing.TB) *Logs {
	l := &Logs{t: t}
	t.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.done = true
		if t.Failed() {
			for _, r := range l.records {
				t.Log(r.String())
			}
		}
	})
	return l
}

// Logger returns a logger whose records of every level are captured and, if
// the test fails, printed.
func Logger(t testing.TB) *slog.Logger { return NewLogs(t).Logger() }

// Logger returns a logger that is captured.
func (l *Logs) Logger() *slog.Logger { return slog.New(l.Handler()) }

// Handler returns the capturing handler.
func (l *Logs) Handler() slog.Handler { return &logHandler{logs: l} }

// Records returns what was captured so far.
func (l *Logs) Records() []Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.records)
}

// Find returns the captured records whose message contains text.
func (l *Logs) Find(text string) []Record {
	return slices.DeleteFunc(l.Records(), func(r Record) bool { return !strings.Contains(r.Message, text) })
}

func (l *Logs) add(r Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.done {
		l.records = append(l.records, r)
	}
}

type logHandler struct {
	logs   *Logs
	attrs  []slog.Attr // keys already carry their group
	prefix string
}

func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	out := Record{Level: r.Level, Message: r.Message, Attrs: map[string]string{}}
	for _, a := range h.attrs {
		out.Attrs[a.Key] = a.Value.String()
	}
	r.Attrs(func(a slog.Attr) bool {
		flatten(out.Attrs, h.prefix, a)
		return true
	})
	h.logs.add(out)
	return nil
}

func flatten(into map[string]string, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() != slog.KindGroup {
		if a.Key != "" {
			into[prefix+a.Key] = v.String()
		}
		return
	}
	if a.Key != "" {
		prefix += a.Key + "."
	}
	for _, b := range v.Group() {
		flatten(into, prefix, b)
	}
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	flat := map[string]string{}
	for _, a := range attrs {
		flatten(flat, h.prefix, a)
	}
	next := &logHandler{logs: h.logs, prefix: h.prefix, attrs: slices.Clone(h.attrs)}
	for k, v := range flat {
		next.attrs = append(next.attrs, slog.String(k, v))
	}
	return next
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return &logHandler{logs: h.logs, prefix: h.prefix + name + ".", attrs: h.attrs}
}
