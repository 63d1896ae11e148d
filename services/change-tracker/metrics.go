package changetracker

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// metrics are all instruments of this service. No label names a machine: the log does.
type metrics struct {
	pauses    metric.Float64Histogram
	degrades  metric.Int64Counter
	readBytes metric.Int64Counter
}

func newMetrics(p metric.MeterProvider) (*metrics, error) {
	if p == nil {
		p = noop.NewMeterProvider()
	}
	meter := p.Meter("github.com/landfall-dr/landfall/services/change-tracker")
	var m metrics
	var err error
	if m.pauses, err = meter.Float64Histogram("landfall_change_tracker_switch_pause_seconds", metric.WithUnit("s"),
		metric.WithDescription("How long guest writes were held by a switch of logs."),
		metric.WithExplicitBucketBoundaries(.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .7)); err != nil {
		return nil, fmt.Errorf("make instrument: %w", err)
	}
	if m.degrades, err = meter.Int64Counter("landfall_change_tracker_degraded_disks_total",
		metric.WithDescription("How often log data was given up in favour of dirty extents.")); err != nil {
		return nil, fmt.Errorf("make instrument: %w", err)
	}
	if m.readBytes, err = meter.Int64Counter("landfall_change_tracker_read_bytes_total", metric.WithUnit("By"),
		metric.WithDescription("Bytes streamed to uploaders and resync engines.")); err != nil {
		return nil, fmt.Errorf("make instrument: %w", err)
	}
	return &m, nil
}

func (m *metrics) pause(d time.Duration) { m.pauses.Record(context.Background(), d.Seconds()) }

func (m *metrics) degraded() { m.degrades.Add(context.Background(), 1) }

func (m *metrics) read(n int) { m.readBytes.Add(context.Background(), int64(n)) }
