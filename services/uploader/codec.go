package uploader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// autoCompression follows the measured rate of storage.
const autoCompression = "auto"

// compressions are those that a configuration may fix.
var compressions = map[string]segment.Compression{"fast": segment.Fast, "small": segment.Small, "none": segment.None}

// newCodec is the one of the process, shared by all tasks: they share the link.
func newCodec(compression string, clock func() time.Time) *shipping.Codec {
	if fixed, ok := compressions[compression]; ok {
		return shipping.FixedCodec(fixed)
	}
	return shipping.AutoCodec(0, clock)
}

// observeCodec shows what it measures and chose.
func observeCodec(p metric.MeterProvider, c *shipping.Codec) error {
	if p == nil {
		return nil
	}
	meter := p.Meter("github.com/landfall-dr/landfall/services/uploader")
	_, err := meter.Float64ObservableGauge("landfall_uploader_put_rate", metric.WithUnit("By/s"),
		metric.WithDescription("Rate at which storage took segments lately, while some were being put; 0 before it is known."),
		metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			o.Observe(c.Rate())
			return nil
		}))
	_, cerr := meter.Int64ObservableGauge("landfall_uploader_compression", metric.WithUnit("{state}"),
		metric.WithDescription("1 for the compression of the next segment, 0 for the others."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			now := c.Choose()
			for name, compression := range compressions {
				one := int64(0)
				if compression == now {
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
