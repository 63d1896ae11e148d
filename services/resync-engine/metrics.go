package resyncengine

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
)

// metrics has all instruments of the service, and the two sums that GetStatus shows.
type metrics struct {
	comparedTotal, differingTotal atomic.Int64

	comparedBytes, differingBytes, resumes, tasks metric.Int64Counter
	seconds                                       metric.Float64Histogram
}

func newMetrics(p metric.MeterProvider) (*metrics, error) {
	if p == nil {
		p = metricnoop.NewMeterProvider()
	}
	meter := p.Meter("github.com/landfall-dr/landfall/services/resync-engine")
	var m metrics
	var errs []error
	counter := func(into *metric.Int64Counter, name, unit, text string) {
		c, err := meter.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(text))
		*into, errs = c, append(errs, err)
	}
	counter(&m.comparedBytes, "landfall_resync_engine_compared_bytes", "By", "Bytes of source disks that were compared.")
	counter(&m.differingBytes, "landfall_resync_engine_differing_bytes", "By", "Bytes of chunks that differed and were sent.")
	counter(&m.resumes, "landfall_resync_engine_stream_resumes", "{resume}", "Broken streams of hosts that were read on.")
	counter(&m.tasks, "landfall_resync_engine_tasks", "{task}", "Tasks ended, by outcome.")
	var err error
	m.seconds, err = meter.Float64Histogram("landfall_resync_engine_task_seconds", metric.WithUnit("s"),
		metric.WithDescription("Time from the start of a task to its end, by outcome."),
		metric.WithExplicitBucketBoundaries(1, 5, 15, 60, 300, 1800, 7200, 28800))
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, fmt.Errorf("make the instruments: %w", err)
	}
	return &m, nil
}

func (m *metrics) compared(ctx context.Context, n, differing int64) {
	m.comparedTotal.Add(n)
	m.differingTotal.Add(differing)
	m.comparedBytes.Add(ctx, n)
	m.differingBytes.Add(ctx, differing)
}

func (m *metrics) resumed(ctx context.Context) { m.resumes.Add(ctx, 1) }

func (m *metrics) task(ctx context.Context, outcome string, took time.Duration) {
	set := metric.WithAttributes(attribute.String("outcome", outcome))
	m.tasks.Add(ctx, 1, set)
	m.seconds.Record(ctx, took.Seconds(), set)
}
