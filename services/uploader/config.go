package uploader

import (
	"errors"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// Role is one part of the service.
type Role string

// The roles.
const (
	RoleShip   Role = "ship"   // in the site: host to journal
	RoleApply  Role = "apply"  // near storage: journal to replica disks
	RoleRetain Role = "retain" // near storage: points that are no longer kept are given up
)

// Config of an uploader. Sizes are in bytes.
type Config struct {
	// Roles that this process runs.
	Roles []Role `koanf:"roles" help:"what this process does: ship, apply, retain"`
	// Site whose ship queue is served; needed for role ship.
	Site string `koanf:"site" help:"site whose ship queue is served"`
	// Ship configures role ship.
	Ship ShipConfig `koanf:"ship"`
	// Apply configures role apply.
	Apply ApplyConfig `koanf:"apply"`
	// Retain configures role retain.
	Retain RetainConfig `koanf:"retain"`
	// MemoryLimitBytes is the soft limit that the program gives the Go runtime; 0 sets none. In `landfall up` the
	// composition root decides.
	MemoryLimitBytes int64 `koanf:"memory_limit_bytes" help:"soft limit of the Go runtime, 0 for none"`
	// StorageTimeout bounds one call to storage: a segment, a commit, a checkpoint.
	StorageTimeout time.Duration `koanf:"storage_timeout" help:"bound of one call to storage"`
}

// ShipConfig configures role ship.
type ShipConfig struct {
	// Concurrency is how many points, and how many tasks of passes, are in work at once.
	Concurrency int `koanf:"concurrency" help:"points, and tasks of passes, in work at once"`
	// DiskStreams is how many disks of one point are streamed at once.
	DiskStreams int `koanf:"disk_streams" help:"disks of one point streamed at once"`
	// SegmentBytes is the stored size at which a segment is closed.
	SegmentBytes int `koanf:"segment_bytes" help:"stored size at which a segment is closed"`
	// Buffers is how many segments may be in memory at once, over all tasks.
	Buffers int `koanf:"buffers" help:"segments in memory at once"`
	// Compression of segments: "auto" (by the measured rate of storage), "fast", "small" or "none".
	Compression string `koanf:"compression" help:"auto, fast, small or none"`
	// StreamResumes is how many broken streams in a row, without progress, are tried again.
	StreamResumes int `koanf:"stream_resumes" help:"broken streams in a row that are tried again"`
	// ResumeWait is the pause before the first resume; it doubles up to ResumeWaitMax.
	ResumeWait    time.Duration `koanf:"resume_wait" help:"pause before the first resume"`
	ResumeWaitMax time.Duration `koanf:"resume_wait_max" help:"longest pause before a resume"`
	// StreamIdle is how long a host may send nothing before its stream counts as broken.
	StreamIdle time.Duration `koanf:"stream_idle" help:"silence after which a stream counts as broken"`
	// HostTimeout bounds the search for a host.
	HostTimeout time.Duration `koanf:"host_timeout" help:"bound of the search for a host"`
	// RetryDelay is the pause before a task of a lost worker comes again; it doubles up to ten times as much.
	RetryDelay time.Duration `koanf:"retry_delay" help:"pause before the task of a lost worker comes again"`
}

// ApplyConfig configures role apply.
type ApplyConfig struct {
	// Concurrency is how many VMs are worked on at once.
	Concurrency int `koanf:"concurrency" help:"tasks in work at once"`
	// Parallel is how many page writes are in flight per disk.
	Parallel int `koanf:"parallel" help:"page writes in flight per disk"`
	// BatchBytes bounds the stored bytes that are merged before they are applied.
	BatchBytes int64 `koanf:"batch_bytes" help:"stored bytes merged before they are applied"`
	// Lease is the duration of the leases on replica disks, 15 s to 60 s: after a crash, another applier waits so long.
	Lease time.Duration `koanf:"lease" help:"duration of leases on replica disks, 15s to 60s"`
	// SoleApplier says that no other process applies in this store, as in `landfall up`: leases of a process that
	// died are broken at once.
	SoleApplier bool `koanf:"sole_applier" help:"no other process applies in this store: break leases at once"`
	// BusyDelay is the pause before a task comes again whose disks another applier holds; it doubles up to four
	// times as much.
	BusyDelay time.Duration `koanf:"busy_delay" help:"pause while another applier holds the disks"`
	// BusyDeliveries is how often such a task comes again before it is parked.
	BusyDeliveries int `koanf:"busy_deliveries" help:"tries while another applier holds the disks"`
	// Lazy says when received points wait to be merged.
	Lazy LazyConfig `koanf:"lazy"`
	// Backlog says when what waits is too much.
	Backlog BacklogConfig `koanf:"backlog"`
	// Slice is how long one task goes on before others have their turn; a batch is never cut short. Urgent ones go on.
	Slice time.Duration `koanf:"slice" help:"how long one task goes on before others have their turn"`
	// UrgentHold is how long other tasks stand back while an urgent one is in work here.
	UrgentHold time.Duration `koanf:"urgent_hold" help:"how long other tasks stand back for an urgent one"`
}

// Default returns the defaults; Site has none.
func Default() Config {
	return Config{
		Roles: []Role{RoleShip, RoleApply, RoleRetain},
		Ship: ShipConfig{
			// Segments of 8 MiB keep a sender near 100 MiB of memory; those of 32 MiB take 180 and save half of few requests.
			Concurrency: 4, DiskStreams: 3, SegmentBytes: 8 << 20, Buffers: 3, Compression: shipping.Auto,
			StreamResumes: 5, ResumeWait: 200 * time.Millisecond, ResumeWaitMax: 5 * time.Second,
			StreamIdle: time.Minute, HostTimeout: 15 * time.Second, RetryDelay: time.Second,
		},
		Apply: ApplyConfig{
			Concurrency: 2, Parallel: 16, BatchBytes: 256 << 20, Lease: 30 * time.Second,
			BusyDelay: 5 * time.Second, BusyDeliveries: 20,
			Lazy: defaultLazy(), Backlog: defaultBacklog(), Slice: 30 * time.Second, UrgentHold: 2 * time.Minute,
		},
		Retain:           defaultRetain(),
		MemoryLimitBytes: 200 << 20,
		StorageTimeout:   2 * time.Minute,
	}
}

// Validate reports every problem at once, with the key.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, key, format string, args ...any) {
		if !ok {
			errs = append(errs, config.Bad(key, format, args...))
		}
	}
	positive := func(key string, v int64) { check(v > 0, key, "%d, want more than 0", v) }
	check(len(c.Roles) > 0, "roles", "none, want any of ship, apply, retain")
	for _, r := range c.Roles {
		check(r == RoleShip || r == RoleApply || r == RoleRetain, "roles", "%q, want ship, apply or retain", r)
	}
	check(c.Site != "" || !slices.Contains(c.Roles, RoleShip), "site", "role ship needs the site whose queue it serves")
	positive("ship.concurrency", int64(c.Ship.Concurrency))
	check(c.Ship.DiskStreams >= 1 && c.Ship.DiskStreams <= 16, "ship.disk_streams", "%d, want 1 to 16", c.Ship.DiskStreams)
	check(c.Ship.SegmentBytes >= 64<<10 && c.Ship.SegmentBytes <= segment.MaxTarget,
		"ship.segment_bytes", "%d, want 64 KiB to %d", c.Ship.SegmentBytes, segment.MaxTarget)
	check(c.Ship.Buffers >= 1 && c.Ship.Buffers <= 64, "ship.buffers", "%d, want 1 to 64", c.Ship.Buffers)
	check(slices.Contains(shipping.CodecNames, c.Ship.Compression), "ship.compression", "%q, want auto, fast, small or none", c.Ship.Compression)
	check(c.Ship.StreamResumes >= 0, "ship.stream_resumes", "%d, want 0 or more", c.Ship.StreamResumes)
	positive("ship.resume_wait", int64(c.Ship.ResumeWait))
	check(c.Ship.ResumeWaitMax >= c.Ship.ResumeWait, "ship.resume_wait_max", "%s, want at least ship.resume_wait", c.Ship.ResumeWaitMax)
	positive("ship.stream_idle", int64(c.Ship.StreamIdle))
	positive("ship.host_timeout", int64(c.Ship.HostTimeout))
	positive("ship.retry_delay", int64(c.Ship.RetryDelay))
	positive("apply.concurrency", int64(c.Apply.Concurrency))
	positive("apply.parallel", int64(c.Apply.Parallel))
	positive("apply.batch_bytes", c.Apply.BatchBytes)
	check(c.Apply.Lease >= 15*time.Second && c.Apply.Lease <= time.Minute, "apply.lease", "%s, want 15s to 60s", c.Apply.Lease)
	positive("apply.busy_delay", int64(c.Apply.BusyDelay))
	positive("apply.busy_deliveries", int64(c.Apply.BusyDeliveries))
	c.Apply.validate(check)
	c.Retain.validate(check)
	check(c.MemoryLimitBytes >= 0, "memory_limit_bytes", "%d, want 0 or more", c.MemoryLimitBytes)
	positive("storage_timeout", int64(c.StorageTimeout))
	return errors.Join(errs...)
}
