package uploader

import (
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/landfall-dr/landfall/libs/shipping"
)

// newCodec is the one of the process, shared by all tasks: they share the link. Its gauges are made when there is a provider.
func newCodec(compression string, clock func() time.Time, p metric.MeterProvider) (*shipping.Codec, error) {
	c, err := shipping.NewCodec(compression, clock)
	if err != nil || p == nil {
		return c, err
	}
	return c, c.Observe(p.Meter("github.com/landfall-dr/landfall/services/uploader"), "landfall_uploader")
}
