package uploader

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"

	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// metrics has all instruments of the service, and the two sums that GetStatus shows.
type metrics struct {
	shippedTotal, appliedTotal, retiredTotal atomic.Int64

	segmentBytes, committedBytes, appliedBytes  metric.Int64Counter
	resumes, checkpoints, tasks                 metric.Int64Counter
	clearedBytes, unchangedBytes, pageRequests  metric.Int64Counter
	retiredPoints, retiredObjects, retiredBytes metric.Int64Counter
	seconds                                     metric.Float64Histogram

	backlog backlogGauges
}

func newMetrics(p metric.MeterProvider, pool *shipping.Pool, clock func() time.Time) (*metrics, error) {
	if p == nil {
		p = metricnoop.NewMeterProvider()
	}
	meter := p.Meter("github.com/landfall-dr/landfall/services/uploader")
	m := metrics{backlog: backlogGauges{clock: clock}}
	var errs []error
	counter := func(into *metric.Int64Counter, name, unit, text string) {
		c, err := meter.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(text))
		*into, errs = c, append(errs, err)
	}
	counter(&m.segmentBytes, "landfall_uploader_segment_bytes", "By", "Bytes of segments put into storage, committed or not.")
	counter(&m.committedBytes, "landfall_uploader_committed_bytes", "By", "Bytes of segments that manifests of this process name.")
	counter(&m.appliedBytes, "landfall_uploader_applied_bytes", "By", "Bytes written to pages of replica disks.")
	counter(&m.clearedBytes, "landfall_uploader_cleared_bytes", "By", "Bytes of pages of replica disks that were cleared.")
	counter(&m.unchangedBytes, "landfall_uploader_unchanged_bytes", "By", "Bytes not written to replica disks because they were there.")
	counter(&m.pageRequests, "landfall_uploader_page_requests", "{request}", "Requests that moved or listed pages of replica disks.")
	counter(&m.resumes, "landfall_uploader_stream_resumes", "{resume}", "Broken streams of hosts that were read on.")
	counter(&m.checkpoints, "landfall_uploader_checkpoints", "{checkpoint}", "Checkpoints made on a task's wish.")
	counter(&m.retiredPoints, "landfall_uploader_retired_points", "{point}", "Points that retention took out of the chain.")
	counter(&m.retiredObjects, "landfall_uploader_retired_objects", "{object}", "Objects and snapshots that retention deleted.")
	counter(&m.retiredBytes, "landfall_uploader_retired_bytes", "By", "Bytes of objects that retention deleted, without the pages of snapshots.")
	counter(&m.tasks, "landfall_uploader_tasks", "{task}", "Tasks ended, by role and outcome.")
	var err error
	m.seconds, err = meter.Float64Histogram("landfall_uploader_task_seconds", metric.WithUnit("s"),
		metric.WithDescription("Time from the start of a task to its end, by role and outcome."),
		metric.WithExplicitBucketBoundaries(0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 1800))
	errs = append(errs, err)
	_, err = meter.Int64ObservableGauge("landfall_uploader_buffers_in_use", metric.WithUnit("{buffer}"),
		metric.WithDescription("Segment buffers that are taken; at the limit, streams wait."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(int64(pool.InUse()))
			return nil
		}))
	errs = append(errs, m.backlog.register(meter))
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, fmt.Errorf("make the instruments: %w", err)
	}
	return &m, nil
}

func (m *metrics) segment(ctx context.Context, n int64) {
	m.shippedTotal.Add(n)
	m.segmentBytes.Add(ctx, n)
}

func (m *metrics) shipped(ctx context.Context, n int64) { m.committedBytes.Add(ctx, n) }

func (m *metrics) applied(ctx context.Context, p replica.Progress) {
	m.appliedTotal.Add(p.Written)
	m.appliedBytes.Add(ctx, p.Written)
	m.clearedBytes.Add(ctx, p.Cleared)
	m.unchangedBytes.Add(ctx, p.Unchanged)
	m.pageRequests.Add(ctx, p.Requests)
}

func (m *metrics) retained(ctx context.Context, r *replica.RetainResult) {
	var objects int64
	for _, n := range r.Deleted {
		objects += int64(n)
	}
	m.retiredTotal.Add(objects)
	m.retiredPoints.Add(ctx, int64(r.RetiredPoints))
	m.retiredObjects.Add(ctx, objects)
	m.retiredBytes.Add(ctx, r.DeletedBytes)
}

func (m *metrics) resumed(ctx context.Context)      { m.resumes.Add(ctx, 1) }
func (m *metrics) checkpointed(ctx context.Context) { m.checkpoints.Add(ctx, 1) }

func (m *metrics) task(ctx context.Context, role Role, outcome string, took time.Duration) {
	set := metric.WithAttributes(attribute.String("role", string(role)), attribute.String("outcome", outcome))
	m.tasks.Add(ctx, 1, set)
	m.seconds.Record(ctx, took.Seconds(), set)
}
