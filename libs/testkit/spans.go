package testkit

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Spans records ended spans and prints them as a tree. Its methods may be
// called from any goroutine.
type Spans struct {
	mu       sync.Mutex
	ended    []sdktrace.ReadOnlySpan
	provider *sdktrace.TracerProvider
}

// NewSpans returns an empty recorder whose provider samples everything and is
// shut down with the test.
func NewSpans(t testing.TB) *Spans {
	s := &Spans{}
	s.provider = sdktrace.NewTracerProvider(
		sdktrace.WithSampler(sdktrace.AlwaysSample()),
		sdktrace.WithSpanProcessor(s),
	)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = s.provider.Shutdown(ctx)
	})
	return s
}

// Provider returns the provider to hand to the code under test.
func (s *Spans) Provider() trace.TracerProvider { return s.provider }

// Ended returns the spans that have ended, in that order.
func (s *Spans) Ended() []sdktrace.ReadOnlySpan {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ended)
}

// Find returns the ended spans of that name.
func (s *Spans) Find(name string) []sdktrace.ReadOnlySpan {
	return slices.DeleteFunc(s.Ended(), func(sp sdktrace.ReadOnlySpan) bool { return sp.Name() != name })
}

// Trace returns the tree of one trace's ended spans, one name a line, two
// spaces deeper per level, siblings by start time and then by name. A span
// whose parent has not ended, or is unknown, stands at the top.
func (s *Spans) Trace(id trace.TraceID) string {
	return tree(slices.DeleteFunc(s.Ended(), func(sp sdktrace.ReadOnlySpan) bool {
		return sp.SpanContext().TraceID() != id
	}))
}

// Tree returns the trees of all traces, in order of their first span.
func (s *Spans) Tree() string { return tree(s.Ended()) }

func tree(spans []sdktrace.ReadOnlySpan) string {
	slices.SortStableFunc(spans, func(a, b sdktrace.ReadOnlySpan) int {
		if c := a.StartTime().Compare(b.StartTime()); c != 0 {
			return c
		}
		return strings.Compare(a.Name(), b.Name())
	})
	known := map[trace.SpanID]bool{}
	for _, sp := range spans {
		known[sp.SpanContext().SpanID()] = true
	}
	children := map[trace.SpanID][]sdktrace.ReadOnlySpan{}
	for _, sp := range spans {
		parent := sp.Parent().SpanID()
		if !known[parent] {
			parent = trace.SpanID{}
		}
		children[parent] = append(children[parent], sp)
	}
	var b strings.Builder
	var walk func(id trace.SpanID, depth int)
	walk = func(id trace.SpanID, depth int) {
		for _, sp := range children[id] {
			fmt.Fprintf(&b, "%s%s\n", strings.Repeat("  ", depth), sp.Name())
			walk(sp.SpanContext().SpanID(), depth+1)
		}
	}
	walk(trace.SpanID{}, 0)
	return b.String()
}

// OnStart implements sdktrace.SpanProcessor.
func (s *Spans) OnStart(context.Context, sdktrace.ReadWriteSpan) {}

// OnEnd implements sdktrace.SpanProcessor.
func (s *Spans) OnEnd(sp sdktrace.ReadOnlySpan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = append(s.ended, sp)
}

// Shutdown implements sdktrace.SpanProcessor.
func (s *Spans) Shutdown(context.Context) error { return nil }

// ForceFlush implements sdktrace.SpanProcessor.
func (s *Spans) ForceFlush(context.Context) error { return nil }
