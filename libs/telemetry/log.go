package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"go.opentelemetry.io/otel/trace"
)

// Keys of attributes of logs and spans. Use no other spelling for these things.
const (
	KeyService  = "service"
	KeyTraceID  = "trace_id"
	KeySpanID   = "span_id"
	KeySite     = "site"
	KeyHost     = "host"
	KeyVM       = "vm"
	KeyDisk     = "disk"
	KeyLineage  = "lineage"
	KeyPoint    = "point"
	KeyPass     = "pass"
	KeyEpoch    = "epoch"
	KeySequence = "seq"
	KeyTask     = "task"
	KeyJob      = "job"
	KeyFailover = "failover"
	KeyReason   = "reason"
	KeyError    = "error"
	KeyBytes    = "bytes"
	KeyDuration = "duration"
)

type attrsKey struct{}

// With returns a context whose log records carry the given attributes, as the
// arguments of [slog.Logger.With] do. A key given again replaces the earlier one.
func With(ctx context.Context, args ...any) context.Context {
	var r slog.Record
	r.Add(args...)
	attrs := slices.Clone(attrsOf(ctx))
	r.Attrs(func(a slog.Attr) bool {
		if i := slices.IndexFunc(attrs, func(b slog.Attr) bool { return a.Key == b.Key }); i >= 0 {
			attrs[i] = a
		} else {
			attrs = append(attrs, a)
		}
		return true
	})
	return context.WithValue(ctx, attrsKey{}, attrs)
}

func attrsOf(ctx context.Context) []slog.Attr {
	attrs, _ := ctx.Value(attrsKey{}).([]slog.Attr)
	return attrs
}

func newHandler(w io.Writer, format Format, level slog.Leveler) (slog.Handler, error) {
	opts := &slog.HandlerOptions{Level: level}
	switch format {
	case FormatText, "":
		return NewHandler(slog.NewTextHandler(w, opts)), nil
	case FormatJSON:
		return NewHandler(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("unknown log format %q: want text or json", format)
}

// NewHandler returns a handler that adds to each record what its context has:
// trace_id and span_id of the current span, and the attributes of [With]. They
// stand at the top level even of a logger with groups.
func NewHandler(next slog.Handler) slog.Handler { return &contextHandler{root: next, next: next} }

type contextHandler struct {
	root slog.Handler // before any group
	next slog.Handler // with everything
	// later are the steps from root to next, from the first group on. They are
	// done again for a record that has attributes of its context.
	later []func(slog.Handler) slog.Handler
}

func (h *contextHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

func (h *contextHandler) Handle(ctx context.Context, r slog.Record) error {
	attrs := attrsOf(ctx)
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		attrs = append(slices.Clip(attrs), slog.String(KeyTraceID, sc.TraceID().String()), slog.String(KeySpanID, sc.SpanID().String()))
	}
	switch {
	case len(attrs) == 0:
		return h.next.Handle(ctx, r)
	case len(h.later) == 0:
		r = r.Clone()
		r.AddAttrs(attrs...)
		return h.next.Handle(ctx, r)
	}
	next := h.root.WithAttrs(attrs)
	for _, step := range h.later {
		next = step(next)
	}
	return next.Handle(ctx, r)
}

func (h *contextHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	if len(attrs) == 0 {
		return h
	}
	if len(h.later) == 0 {
		next := h.next.WithAttrs(attrs)
		return &contextHandler{root: next, next: next}
	}
	return h.then(func(n slog.Handler) slog.Handler { return n.WithAttrs(attrs) })
}

func (h *contextHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return h.then(func(n slog.Handler) slog.Handler { return n.WithGroup(name) })
}

func (h *contextHandler) then(step func(slog.Handler) slog.Handler) slog.Handler {
	return &contextHandler{root: h.root, next: step(h.next), later: append(slices.Clip(h.later), step)}
}
