package bus

import (
	"context"
	"strings"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/propagation"
)

// headerCarrier writes trace headers in lower case. The carrier for HTTP would
// write "Traceparent", which a look-up of "traceparent" in NATS headers, where
// case matters, does not find.
type headerCarrier nats.Header

func (c headerCarrier) Get(key string) string { return nats.Header(c).Get(strings.ToLower(key)) }
func (c headerCarrier) Set(key, value string) { nats.Header(c).Set(strings.ToLower(key), value) }
func (c headerCarrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, k)
	}
	return keys
}

var propagator = propagation.TraceContext{}

func inject(ctx context.Context, h nats.Header) { propagator.Inject(ctx, headerCarrier(h)) }

func extract(ctx context.Context, h nats.Header) context.Context {
	return propagator.Extract(ctx, headerCarrier(h))
}
