package resyncengine

import (
	"errors"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// Config of a resync-engine. Sizes are in bytes.
type Config struct {
	// Site whose resync queue is served.
	Site string `koanf:"site" help:"site whose resync queue is served"`
	// Concurrency is how many machines are compared at once.
	Concurrency int `koanf:"concurrency" help:"machines compared at once"`
	// WindowBytes is the part of a disk that one partial covers; a multiple of 1 MiB. It must not change during a pass.
	WindowBytes int64 `koanf:"window_bytes" help:"part of a disk that one partial covers, a multiple of 1 MiB"`
	// Windows is how many windows of one machine are compared at once.
	Windows int `koanf:"windows" help:"windows of one machine compared at once"`
	// HashWorkers is how many goroutines read and hash the replica's side of one window.
	HashWorkers int `koanf:"hash_workers" help:"goroutines that hash the replica per window"`
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
	// StorageTimeout bounds one call to storage.
	StorageTimeout time.Duration `koanf:"storage_timeout" help:"bound of one call to storage"`
	// DrainTimeout bounds the bringing up of the replica disks before the comparison; what is left then is read from
	// the journal.
	DrainTimeout time.Duration `koanf:"drain_timeout" help:"bound of bringing up the replica disks before a comparison"`
	// RetryDelay is the pause before a task of a lost worker comes again; it doubles up to ten times as much.
	RetryDelay time.Duration `koanf:"retry_delay" help:"pause before the task of a lost worker comes again"`
	// MemoryLimitBytes is the soft limit that the program gives the Go runtime; 0 sets none.
	MemoryLimitBytes int64 `koanf:"memory_limit_bytes" help:"soft limit of the Go runtime, 0 for none"`
}

// Default returns the defaults; Site has none.
func Default() Config {
	return Config{
		Concurrency: 2, WindowBytes: 512 << 20, Windows: 2, HashWorkers: 2,
		SegmentBytes: segment.DefaultTarget, Buffers: 2, Compression: shipping.Auto,
		StreamResumes: 5, ResumeWait: 200 * time.Millisecond, ResumeWaitMax: 5 * time.Second, StreamIdle: time.Minute,
		HostTimeout: 15 * time.Second, StorageTimeout: 2 * time.Minute, DrainTimeout: 30 * time.Minute, RetryDelay: time.Second,
		MemoryLimitBytes: 200 << 20,
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
	check(c.Site != "", "site", "the site whose queue is served is needed")
	positive("concurrency", int64(c.Concurrency))
	check(c.WindowBytes > 0 && c.WindowBytes%(1<<20) == 0, "window_bytes", "%d, want a multiple of 1 MiB", c.WindowBytes)
	check(c.Windows >= 1 && c.Windows <= 16, "windows", "%d, want 1 to 16", c.Windows)
	check(c.HashWorkers >= 1 && c.HashWorkers <= 16, "hash_workers", "%d, want 1 to 16", c.HashWorkers)
	check(c.SegmentBytes >= 64<<10 && c.SegmentBytes <= segment.MaxTarget, "segment_bytes", "%d, want 64 KiB to %d", c.SegmentBytes, segment.MaxTarget)
	check(c.Buffers >= 1 && c.Buffers <= 64, "buffers", "%d, want 1 to 64", c.Buffers)
	check(slices.Contains(shipping.CodecNames, c.Compression), "compression", "%q, want auto, fast, small or none", c.Compression)
	check(c.StreamResumes >= 0, "stream_resumes", "%d, want 0 or more", c.StreamResumes)
	positive("resume_wait", int64(c.ResumeWait))
	check(c.ResumeWaitMax >= c.ResumeWait, "resume_wait_max", "%s, want at least resume_wait", c.ResumeWaitMax)
	positive("stream_idle", int64(c.StreamIdle))
	positive("host_timeout", int64(c.HostTimeout))
	positive("storage_timeout", int64(c.StorageTimeout))
	positive("drain_timeout", int64(c.DrainTimeout))
	positive("retry_delay", int64(c.RetryDelay))
	check(c.MemoryLimitBytes >= 0, "memory_limit_bytes", "%d, want 0 or more", c.MemoryLimitBytes)
	return errors.Join(errs...)
}
