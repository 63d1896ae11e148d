package uploader

import (
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/replica"
)

// Modes of LazyConfig.
const (
	lazyAuto = "auto"
	lazyOn   = "on"
	lazyOff  = "off"
)

// LazyConfig says when received points wait, so that what a later one overwrites is never written to the disks. They wait
// until one of the bounds is reached. Nothing waits whose manifests end or begin a copy, nor behind a checkpoint that is due,
// nor when a failover wants it.
type LazyConfig struct {
	// Mode is "on", "off", or "auto": on where the store says that page requests cost time (blobstore.RequestCost), off
	// where they are free.
	Mode string `koanf:"mode" help:"auto, on or off"`
	// Delay is how long a point waits, from its cut; a task may name another.
	Delay time.Duration `koanf:"delay" help:"longest wait of a point from its cut"`
	// Bytes that may wait, as stored.
	Bytes int64 `koanf:"bytes" help:"stored bytes that may wait"`
	// Debt is how long applying what waits may take, by the rate measured lately.
	Debt time.Duration `koanf:"debt" help:"how long applying what waits may take"`
}

// BacklogConfig says when an operator is told that a failover would have to wait.
type BacklogConfig struct {
	// Bound of the time that applying what waits takes.
	Bound time.Duration `koanf:"bound" help:"alarm when applying what waits takes longer"`
	// Percent of the disks' size that may wait.
	Percent int `koanf:"percent" help:"alarm when more of the disks' size waits, in percent"`
}

func defaultLazy() LazyConfig {
	return LazyConfig{Mode: lazyAuto, Delay: 5 * time.Minute, Bytes: 256 << 20, Debt: time.Minute}
}

func defaultBacklog() BacklogConfig { return BacklogConfig{Bound: 10 * time.Minute, Percent: 25} }

func (c ApplyConfig) validate(check func(ok bool, key, format string, args ...any)) {
	check(slices.Contains([]string{lazyAuto, lazyOn, lazyOff}, c.Lazy.Mode), "apply.lazy.mode", "%q, want auto, on or off", c.Lazy.Mode)
	check(c.Lazy.Delay >= 0 && c.Lazy.Delay <= time.Hour, "apply.lazy.delay", "%s, want 0 to 1h", c.Lazy.Delay)
	check(c.Lazy.Bytes >= 0 && c.Lazy.Bytes <= 64<<30, "apply.lazy.bytes", "%d, want 0 to 64 GiB", c.Lazy.Bytes)
	check(c.Lazy.Debt >= 0 && c.Lazy.Debt <= c.Backlog.Bound, "apply.lazy.debt", "%s, want 0 to apply.backlog.bound", c.Lazy.Debt)
	check(c.Backlog.Bound > 0, "apply.backlog.bound", "%s, want more than 0", c.Backlog.Bound)
	check(c.Backlog.Percent >= 1 && c.Backlog.Percent <= 100, "apply.backlog.percent", "%d, want 1 to 100", c.Backlog.Percent)
	check(c.Slice > 0, "apply.slice", "%s, want more than 0", c.Slice)
	check(c.UrgentHold >= 0 && c.UrgentHold <= 10*time.Minute, "apply.urgent_hold", "%s, want 0 to 10m", c.UrgentHold)
}

// delay is how long points of this store may wait; 0 is not at all.
func (c LazyConfig) delay(store blobstore.Store) time.Duration {
	switch c.Mode {
	case lazyOn:
		return c.Delay
	case lazyOff:
		return 0
	}
	if s, ok := store.(blobstore.RequestCost); ok && s.BytesPerRequest() > 0 {
		return c.Delay
	}
	return 0
}

// wait says until when what is in the backlog may wait: the zero time when it may not. It never lets the backlog come near
// the bound of its alarm.
func (c ApplyConfig) wait(b replica.Backlog, now time.Time, delay time.Duration) time.Time {
	if delay <= 0 || b.Due || b.Points == 0 || b.Bytes >= c.Lazy.Bytes || b.Drain >= c.Lazy.Debt ||
		b.Drain >= c.Backlog.Bound/2 || b.Share() >= float64(c.Backlog.Percent)/200 {
		return time.Time{}
	}
	if due := b.Oldest.Add(delay); due.After(now) {
		return due
	}
	return time.Time{}
}

// level is where a backlog stands to its alarm.
type level int

const (
	levelLow  level = iota // below half of every bound: the alarm ends
	levelMid               // neither
	levelHigh              // above a bound: the alarm begins
)

// resyncShare is the share of the disks above which a resynchronisation may be cheaper than applying.
const resyncShare = 0.5

func (c BacklogConfig) level(b replica.Backlog) level {
	time, share := float64(b.Drain)/float64(c.Bound), b.Share()*100/float64(c.Percent)
	switch worst := max(time, share); {
	case worst > 1:
		return levelHigh
	case worst < 0.5:
		return levelLow
	}
	return levelMid
}
