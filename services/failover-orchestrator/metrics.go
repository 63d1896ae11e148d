package failoverorchestrator

import (
	"fmt"

	"go.opentelemetry.io/otel/metric"
)

// metrics are all instruments of the service.
type metrics struct {
	// tests counts test failovers by outcome.
	tests metric.Int64Counter
	// failovers counts planned and unplanned failovers by kind and the phase they came to rest in.
	failovers metric.Int64Counter
	// seconds is the time from the request until the copy is up.
	seconds metric.Float64Histogram
	// bytes written to targets.
	bytes metric.Int64Counter
}

func newMetrics(p metric.MeterProvider) (m metrics, err error) {
	meter := p.Meter("failover-orchestrator")
	if m.tests, err = meter.Int64Counter("landfall_failover_tests_total", metric.WithDescription("Test failovers by outcome.")); err != nil {
		return m, fmt.Errorf("make instrument: %w", err)
	}
	if m.failovers, err = meter.Int64Counter("landfall_failover_failovers_total", metric.WithDescription("Planned and unplanned failovers by kind and the phase they came to rest in.")); err != nil {
		return m, fmt.Errorf("make instrument: %w", err)
	}
	if m.seconds, err = meter.Float64Histogram("landfall_failover_ready_seconds", metric.WithUnit("s"), metric.WithDescription("Time from the request until the copy is up.")); err != nil {
		return m, fmt.Errorf("make instrument: %w", err)
	}
	if m.bytes, err = meter.Int64Counter("landfall_failover_written_bytes_total", metric.WithUnit("By"), metric.WithDescription("Bytes written to recovery targets.")); err != nil {
		return m, fmt.Errorf("make instrument: %w", err)
	}
	return m, nil
}
