package bandwidth

import (
	"context"
	"errors"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Observe makes the instruments <prefix>_link_bytes, <prefix>_link_wait_seconds and <prefix>_link_share of what l let through, how
// long its reads waited, and what it may send now, each by class.
func (l *Limiter) Observe(meter metric.Meter, prefix string) error {
	var by [Classes]metric.MeasurementOption
	for c, name := range classNames {
		by[c] = metric.WithAttributes(attribute.String("class", name))
	}
	_, sent := meter.Int64ObservableCounter(prefix+"_link_bytes", metric.WithUnit("By"),
		metric.WithDescription("Bytes of segments sent to storage, repeated ones too."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for c := range by {
				o.Observe(l.Sent(Class(c)), by[c])
			}
			return nil
		}))
	_, waited := meter.Float64ObservableCounter(prefix+"_link_wait_seconds", metric.WithUnit("s"),
		metric.WithDescription("Time in which segments waited for the site's bandwidth limit, over all streams."),
		metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			for c := range by {
				o.Observe(l.Waited(Class(c)).Seconds(), by[c])
			}
			return nil
		}))
	_, share := meter.Int64ObservableGauge(prefix+"_link_share", metric.WithUnit("By/s"),
		metric.WithDescription("This process's share of the site's bandwidth; nothing without a limit."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			part, limited := l.Part()
			for c := range by {
				if limited {
					o.Observe(part[c], by[c])
				}
			}
			return nil
		}))
	if err := errors.Join(sent, waited, share); err != nil {
		return fmt.Errorf("make the limiter's instruments: %w", err)
	}
	return nil
}
