package shipping_test

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// link is a clock that a put of n bytes moves on.
type link struct {
	mu  sync.Mutex
	now time.Time
}

func (l *link) clock() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

func (l *link) pass(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = l.now.Add(d)
}

// put carries n bytes at a rate in bytes a second.
func (l *link) put(c *shipping.Codec, n int64, rate float64) {
	end := c.Begin()
	l.pass(time.Duration(float64(n) / rate * float64(time.Second)))
	end(n)
}

func TestCodecFollowsTheLink(t *testing.T) {
	const segmentBytes = 32 << 20
	var l link
	c := shipping.AutoCodec(2, l.clock)
	require.Equal(t, segment.Fast, c.Choose(), "before anything is known")
	settle := func(rate float64) segment.Compression {
		for range 40 {
			l.put(c, segmentBytes, rate)
			l.pass(time.Minute) // idle time is not the link's
		}
		require.InEpsilon(t, rate, c.Rate(), 0.01)
		return c.Choose()
	}
	const gbit = 1e9 / 8
	for _, step := range []struct {
		rate float64
		want segment.Compression
		why  string
	}{
		{0.5 * gbit, segment.Small, "0.25 Gbit/s a core"},
		{1.1 * gbit, segment.Small, "just above the bound: not yet"},
		{1.5 * gbit, segment.Fast, "clearly above it"},
		{0.9 * gbit, segment.Fast, "just below: not yet"},
		{4.4 * gbit, segment.Fast, "just above the upper bound"},
		{6 * gbit, segment.None, "3 Gbit/s a core"},
		{3.8 * gbit, segment.None, "just below it"},
		{0.1 * gbit, segment.Small, "the link is throttled"},
		{6 * gbit, segment.None, "and free again"},
		{3 * gbit, segment.Fast, "in the middle"},
	} {
		require.Equal(t, step.want, settle(step.rate), step.why)
	}
}

func TestCodecMeasuresPutsTogether(t *testing.T) {
	var l link
	c := shipping.AutoCodec(1, l.clock)
	for range 40 { // four puts at once, one second: the link carries all of them
		var ends []func(int64)
		for range 4 {
			ends = append(ends, c.Begin())
		}
		l.pass(time.Second)
		for _, end := range ends {
			end(8 << 20)
		}
		failed := c.Begin()
		failed(0)
	}
	require.InEpsilon(t, 32<<20, c.Rate(), 0.01)

	c = shipping.AutoCodec(1, l.clock)
	for range 100 {
		l.put(c, 1000, 1e6) // latency of small requests says nothing
	}
	require.Zero(t, c.Rate())

	fixed := shipping.FixedCodec(segment.None)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				_ = fixed.Choose()
				fixed.Begin()(32 << 20)
			}
		})
	}
	wg.Wait()
	require.Equal(t, segment.None, fixed.Choose())
	require.Positive(t, fixed.Rate())
}

// A bit that flips in memory after the run was received and checked is found before the segment is stored.
func TestDamageAfterReceiveIsFound(t *testing.T) {
	for _, skip := range []bool{false, true} {
		for _, at := range []int{0, 70_000, 100_000, 199_999} {
			var s shelf
			p := s.packer(shipping.NewPool(2, 64<<10), skip)
			data := make([]byte, 200<<10)
			for i := 64 << 10; i < 96<<10; i++ { // zeros elsewhere
				data[i] = byte(i * 7)
			}
			run := shipping.Run{Range: extent.Range{Off: 4096, Len: int64(len(data))}, Data: data, Sum: segment.Sum(data), Summed: true}
			data[at] ^= 0x10
			err := p.Add(t.Context(), run)
			if err == nil {
				_, err = p.Finish(t.Context())
			}
			require.ErrorIs(t, err, shipping.ErrDamaged)
			require.ErrorIs(t, err, segment.ErrDamaged)
			p.Abort()
			require.Empty(t, s.bodies)
		}
	}
}

func TestCodecsByName(t *testing.T) {
	for name, want := range map[string]segment.Compression{"auto": segment.Fast, "fast": segment.Fast, "small": segment.Small, "none": segment.None} {
		require.Contains(t, shipping.CodecNames, name)
		c, err := shipping.NewCodec(name, nil)
		require.NoError(t, err)
		require.Equal(t, want, c.Choose())
	}
	_, err := shipping.NewCodec("zip", nil)
	require.ErrorContains(t, err, "auto, fast, small, none")
	c, err := shipping.NewCodec("auto", nil)
	require.NoError(t, err)
	reader := sdkmetric.NewManualReader()
	require.NoError(t, c.Observe(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test"), "landfall_test"))
	var got metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &got))
	sum := int64(0)
	names := map[string]bool{}
	for _, m := range got.ScopeMetrics[0].Metrics {
		names[m.Name] = true
		if g, ok := m.Data.(metricdata.Gauge[int64]); ok {
			require.Len(t, g.DataPoints, 3)
			for _, p := range g.DataPoints {
				sum += p.Value
			}
		}
	}
	require.Equal(t, map[string]bool{"landfall_test_put_rate": true, "landfall_test_compression": true}, names)
	require.EqualValues(t, 1, sum)
}
