package shipping

import (
	"runtime"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/segment"
)

// Codec chooses how segments of one process are compressed: by hand, or by the rate at which storage takes them. Small
// (zstd) feeds about 200 MB/s a core, Fast (s2) three times as much: on a slow link each byte saved is time saved, on a
// fast one the encoder is what is waited for. Safe for concurrent use.
type Codec struct {
	auto  bool
	cores float64
	clock func() time.Time

	mu       sync.Mutex
	current  segment.Compression
	inFlight int
	since    time.Time     // of the last look while something is in flight
	busy     time.Duration // of the window: some put was in flight
	bytes    int64         // of the window: bytes of the puts that ended
	rate     float64       // bytes a second, smoothed; 0 before the first window
}

const (
	// Bounds of a core's link rate, in bytes a second, under which an encoder keeps up: 0.5 and 2 Gbit/s.
	smallBelow = 0.5e9 / 8
	fastBelow  = 2e9 / 8
	// slack is how far beyond a bound the rate must be before the choice changes: a quarter.
	slack = 1.25
	// A window of the measurement ends when puts were in flight for so long and so much went through: shorter ones measure
	// the latency of a request, not a link.
	windowBusy  = 500 * time.Millisecond
	windowBytes = 4 << 20
	// weight of a new window in the smoothed rate.
	weight = 0.3
)

// FixedCodec always answers c; it measures all the same.
func FixedCodec(c segment.Compression) *Codec {
	return &Codec{current: c, cores: 1, clock: time.Now}
}

// AutoCodec follows the rate of the link. cores is the CPU that the process was granted, 0 for what the runtime uses; a nil
// clock is the system's. It begins with Fast.
func AutoCodec(cores float64, clock func() time.Time) *Codec {
	if cores <= 0 {
		cores = float64(runtime.GOMAXPROCS(0)) // honours the limit of a control group
	}
	if clock == nil {
		clock = time.Now
	}
	return &Codec{auto: true, current: segment.Fast, cores: cores, clock: clock}
}

// Choose is the compression of the next segment.
func (c *Codec) Choose() segment.Compression {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current
}

// Rate is the measured rate of storage, in bytes a second over all puts in flight at once; 0 before it is known.
func (c *Codec) Rate() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rate
}

// Begin says that a put starts; the function returned, that it ended with n bytes stored, 0 after an error. Time in which
// nothing is put does not count.
func (c *Codec) Begin() (ended func(n int64)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	c.inFlight++
	return func(n int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.look()
		c.inFlight--
		if n > 0 {
			c.bytes += n
			c.window()
		}
	}
}

// look moves the clock of the window.
func (c *Codec) look() {
	now := c.clock()
	if c.inFlight > 0 {
		c.busy += max(now.Sub(c.since), 0)
	}
	c.since = now
}

// window ends the window when it is large enough, and decides.
func (c *Codec) window() {
	if c.bytes < windowBytes || c.busy < windowBusy && c.bytes < 16*windowBytes {
		return
	}
	rate := float64(c.bytes) / max(c.busy, time.Millisecond).Seconds()
	c.busy, c.bytes = 0, 0
	if c.rate > 0 {
		rate = weight*rate + (1-weight)*c.rate
	}
	c.rate = rate
	if c.auto {
		c.current = choose(c.current, rate/c.cores)
	}
}

// choose is the compression for a rate per core, given the one in use: a bound counts only when it is passed clearly.
func choose(now segment.Compression, rate float64) segment.Compression {
	small, fast := smallBelow, fastBelow
	if now == segment.Small {
		small *= slack
	} else {
		small /= slack
	}
	if now == segment.None {
		fast /= slack
	} else {
		fast *= slack
	}
	switch {
	case rate < small:
		return segment.Small
	case rate < fast:
		return segment.Fast
	}
	return segment.None
}
