package shipping

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/landfall-dr/landfall/libs/segment"
)

// Auto is the name under which configurations ask for an AutoCodec.
const Auto = "auto"

// CodecNames are the names that NewCodec takes.
var CodecNames = []string{Auto, segment.Fast.String(), segment.Small.String(), segment.None.String()}

// NewCodec returns the codec that a configuration names; a nil clock is the system's.
func NewCodec(name string, clock func() time.Time) (*Codec, error) {
	switch i := slices.Index(CodecNames, name); i {
	case -1:
		return nil, fmt.Errorf("compression %q, want %s", name, strings.Join(CodecNames, ", "))
	case 0:
		return AutoCodec(0, clock), nil
	}
	for _, c := range []segment.Compression{segment.Fast, segment.Small} {
		if c.String() == name {
			return FixedCodec(c), nil
		}
	}
	return FixedCodec(segment.None), nil
}

// Observe makes the gauges <prefix>_put_rate and <prefix>_compression of what c measures and chose.
func (c *Codec) Observe(meter metric.Meter, prefix string) error {
	_, err := meter.Float64ObservableGauge(prefix+"_put_rate", metric.WithUnit("By/s"),
		metric.WithDescription("Rate at which storage took segments lately, while some were being put; 0 before it is known."),
		metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			o.Observe(c.Rate())
			return nil
		}))
	_, cerr := meter.Int64ObservableGauge(prefix+"_compression", metric.WithUnit("{state}"),
		metric.WithDescription("1 for the compression of the next segment, 0 for the others."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			now := c.Choose().String()
			for _, name := range CodecNames[1:] {
				one := int64(0)
				if name == now {
					one = 1
				}
				o.Observe(one, metric.WithAttributes(attribute.String("compression", name)))
			}
			return nil
		}))
	if err := errors.Join(err, cerr); err != nil {
		return fmt.Errorf("make the codec's instruments: %w", err)
	}
	return nil
}
