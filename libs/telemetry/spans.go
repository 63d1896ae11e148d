package telemetry

import (
	"context"
	"encoding/json"
	"io"
	"sync"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// lineExporter writes one JSON object a line for each span, for looking at
// traces without a collector.
type lineExporter struct {
	mu sync.Mutex
	w  io.Writer
}

type spanLine struct {
	Trace      string         `json:"trace_id"`
	Span       string         `json:"span_id"`
	Parent     string         `json:"parent_id,omitempty"`
	Name       string         `json:"name"`
	Kind       string         `json:"kind"`
	Start      time.Time      `json:"start"`
	Duration   string         `json:"duration"`
	Status     string         `json:"status,omitempty"`
	Attributes map[string]any `json:"attributes,omitempty"`
}

// ExportSpans implements sdktrace.SpanExporter.
func (e *lineExporter) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	enc := json.NewEncoder(e.w)
	for _, s := range spans {
		line := spanLine{
			Trace: s.SpanContext().TraceID().String(), Span: s.SpanContext().SpanID().String(), Name: s.Name(),
			Kind: s.SpanKind().String(), Start: s.StartTime(), Duration: s.EndTime().Sub(s.StartTime()).String(),
			Status: s.Status().Description,
		}
		if s.Parent().SpanID().IsValid() {
			line.Parent = s.Parent().SpanID().String()
		}
		if len(s.Attributes()) > 0 {
			line.Attributes = map[string]any{}
			for _, kv := range s.Attributes() {
				line.Attributes[string(kv.Key)] = kv.Value.AsInterface()
			}
		}
		if err := enc.Encode(line); err != nil {
			return err
		}
	}
	return nil
}

// Shutdown implements sdktrace.SpanExporter.
func (e *lineExporter) Shutdown(context.Context) error { return nil }
