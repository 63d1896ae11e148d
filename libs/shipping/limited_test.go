package shipping_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// Under a site's bandwidth limit the rate that is measured is the limited one: the smaller codec, which then saves time. A
// share that comes and goes with other workers does not make the choice flap.
func TestCodecUnderALimit(t *testing.T) {
	var l link
	c := shipping.AutoCodec(2, l.clock)
	for range 20 {
		l.put(c, 32<<20, 800e6)
	}
	require.NotEqual(t, segment.Small, c.Choose(), "a fast link")
	const limit = 40 << 20
	changes, now := 0, c.Choose()
	for i := range 200 {
		share := float64(limit)
		switch i % 7 {
		case 2, 3:
			share /= 9 // a delta beside it
		case 5:
			share /= 2
		}
		l.put(c, 32<<20, share)
		l.pass(time.Second)
		if c.Choose() != now {
			now = c.Choose()
			changes++
		}
	}
	require.Equal(t, segment.Small, now)
	require.LessOrEqual(t, changes, 2, "on the way there: none, fast, small")
}
