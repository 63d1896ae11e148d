package scheduler

import (
	"errors"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/pricing"
)

// AutoResync says whether a lost baseline is compared without being asked.
type AutoResync string

// The ways. A window in office-free hours comes with a later release.
const (
	AutoResyncOff       AutoResync = "off"
	AutoResyncImmediate AutoResync = "immediate"
)

// Config is the scheduler's configuration.
type Config struct {
	// Instance names this process among schedulers; empty makes one up.
	Instance string `koanf:"instance"`
	// LeaseTTL is how long a dead active scheduler keeps a standby waiting.
	LeaseTTL time.Duration `koanf:"lease_ttl"`
	// Workers is how many VMs are reconciled at once.
	Workers int `koanf:"workers"`
	// CallTimeout bounds each call to a host.
	CallTimeout time.Duration `koanf:"call_timeout"`
	// StorageTimeout bounds each read of a chain.
	StorageTimeout time.Duration `koanf:"storage_timeout"`
	// Poll is how often storage is asked for a point or pass that no event announced.
	Poll time.Duration `koanf:"poll"`
	// Republish is how long a task may stay unconfirmed before it is put into its queue once more. Above the queue's
	// window of deduplication (two minutes).
	Republish time.Duration `koanf:"republish"`
	// ShipTimeout is how long a cut point may wait for its commit before it is given up.
	ShipTimeout time.Duration `koanf:"ship_timeout"`
	// RetryUnit is the unit of the ladder 1, 2, 4, 8, 10, 30: a minute.
	RetryUnit time.Duration `koanf:"retry_unit"`
	// StopTimeout is how long a planned failover waits for the guest to power down before it says that it does not. It
	// goes on waiting.
	StopTimeout time.Duration `koanf:"stop_timeout"`
	// StopPoll is how often the host is asked meanwhile whether the guest is off.
	StopPoll time.Duration `koanf:"stop_poll"`
	// FenceTimeout bounds each call that stops, releases or starts a machine.
	FenceTimeout time.Duration `koanf:"fence_timeout"`
	// FenceRetry is how often the host of a machine that was failed over is asked to fence it, the first six times, and
	// the longest gap of the ladder while a planned failover waits for it; FenceRetryMax is how often it is asked after that.
	FenceRetry    time.Duration `koanf:"fence_retry"`
	FenceRetryMax time.Duration `koanf:"fence_retry_max"`
	// WindowBytes is how much of a disk one task of a full pass covers.
	WindowBytes int64 `koanf:"window_bytes"`
	// ChunkBytes is the chunk of a comparing pass.
	ChunkBytes int64 `koanf:"chunk_bytes"`
	// Resync is about lost baselines.
	Resync ResyncConfig `koanf:"resync"`
	// Retention is about retiring points.
	Retention RetentionConfig `koanf:"retention"`
	// Prices are what usage is priced by: an assumption until they are set.
	Prices pricing.Table `koanf:"prices"`
	// UsageTimeout bounds the count of what a VM takes in storage, which lists its containers.
	UsageTimeout time.Duration `koanf:"usage_timeout"`
	// MetricVMs is how many VMs have gauges of their own; beyond it only the worst is reported.
	MetricVMs int `koanf:"metric_vms"`
}

// ResyncConfig is about lost baselines.
type ResyncConfig struct {
	// Auto starts a resynchronisation by itself: "off" or "immediate".
	Auto AutoResync `koanf:"auto"`
}

// RetentionConfig says when a step of retention is asked for. How long points are kept is the policy's.
type RetentionConfig struct {
	// Every is how often, per VM.
	Every time.Duration `koanf:"every"`
	// Points is after how many received points it is asked for earlier, and Gap how early at most; the same after a checkpoint.
	Points int64         `koanf:"points"`
	Gap    time.Duration `koanf:"gap"`
}

// Default is the configuration without any setting.
func Default() Config {
	return Config{
		LeaseTTL: 10 * time.Second, Workers: 8, CallTimeout: 30 * time.Second, StorageTimeout: time.Minute,
		Poll: 5 * time.Second, Republish: 5 * time.Minute, ShipTimeout: 4 * time.Hour, RetryUnit: time.Minute,
		StopTimeout: 10 * time.Minute, StopPoll: time.Second, FenceTimeout: 15 * time.Second,
		FenceRetry: 10 * time.Second, FenceRetryMax: time.Minute,
		WindowBytes: 512 << 20, ChunkBytes: 64 << 10, Resync: ResyncConfig{Auto: AutoResyncOff}, MetricVMs: 200,
		Retention: RetentionConfig{Every: 10 * time.Minute, Points: 200, Gap: time.Minute},
		Prices:    pricing.Default(), UsageTimeout: 2 * time.Minute,
	}
}

// Validate reports every problem, with the key.
func (c Config) Validate() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(c.LeaseTTL >= time.Second, "lease_ttl: %s is below 1s", c.LeaseTTL)
	bad(c.Workers >= 1 && c.Workers <= 1024, "workers: %d is not in 1..1024", c.Workers)
	bad(c.CallTimeout > 0, "call_timeout: must be positive")
	bad(c.StorageTimeout > 0, "storage_timeout: must be positive")
	bad(c.Poll > 0, "poll: must be positive")
	bad(c.Republish > 0, "republish: must be positive")
	bad(c.ShipTimeout > c.Republish, "ship_timeout: %s is not above republish (%s)", c.ShipTimeout, c.Republish)
	bad(c.RetryUnit > 0, "retry_unit: must be positive")
	bad(c.StopTimeout > 0, "stop_timeout: must be positive")
	bad(c.StopPoll > 0, "stop_poll: must be positive")
	bad(c.FenceTimeout > 0, "fence_timeout: must be positive")
	bad(c.FenceRetry > 0, "fence_retry: must be positive")
	bad(c.FenceRetryMax >= c.FenceRetry, "fence_retry_max: %s is below fence_retry (%s)", c.FenceRetryMax, c.FenceRetry)
	bad(c.WindowBytes >= windowAlign, "window_bytes: %d is below 1 MiB", c.WindowBytes)
	bad(c.ChunkBytes >= 4096 && c.ChunkBytes <= 1<<20 && c.ChunkBytes&(c.ChunkBytes-1) == 0,
		"chunk_bytes: %d is not a power of two from 4096 to 1 MiB", c.ChunkBytes)
	bad(c.Resync.Auto == AutoResyncOff || c.Resync.Auto == AutoResyncImmediate, "resync.auto: %q is not off or immediate", c.Resync.Auto)
	bad(c.Retention.Gap > 0, "retention.gap: must be positive")
	bad(c.Retention.Every >= c.Retention.Gap, "retention.every: %s is below retention.gap (%s)", c.Retention.Every, c.Retention.Gap)
	bad(c.Retention.Points > 0, "retention.points: must be positive")
	bad(c.UsageTimeout > 0, "usage_timeout: must be positive")
	if err := c.Prices.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("prices: %w", err))
	}
	bad(c.MetricVMs >= 0, "metric_vms: must not be negative")
	return errors.Join(errs...)
}
