package scenario

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// A site's limit is set, shown, checked and taken away in the running product, and replication goes on under it.
func TestBandwidthOfASite(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	require.Contains(t, l.ok("bandwidth", "get").out, "no limit")
	r := l.runIn(testkit.Context(t), "time_zone: Mars/Base\nwindows: [{days: mon, start: 08:00, limit: 1KiB/s}]", "bandwidth", "set", "-f", "-")
	require.Equal(t, 1, r.code)
	for _, part := range []string{"BANDWIDTH_INVALID", "time_zone", "windows[0].end", "windows[0].bytes_per_second"} {
		require.Contains(t, r.err, part)
	}
	r = l.runIn(testkit.Context(t), "windows: [{start: 00:00, end: 24:00, limit: 64MiB/s}]", "bandwidth", "set", "-f", "-")
	require.Zero(t, r.code, r.err)
	for _, part := range []string{"64.0 MiB/s", "for good", "WINDOW", "daily", "now"} {
		require.Contains(t, r.out, part)
	}
	l.policy("quick", "1s")
	l.ok("protect", "web-01", "--policy", "quick", "--wait")
	require.Contains(t, l.ok("bandwidth", "set", "--limit", "8MiB/s").out, "8.0 MiB/s")
	require.Contains(t, l.ok("bandwidth", "set", "--limit", "none", "--check").out, "no limit")
	require.Contains(t, l.ok("bandwidth", "get", "-o", "json").out, `"current_bytes_per_second": "8388608"`)
	require.Contains(t, l.ok("bandwidth", "clear").out, "no limit")
	require.True(t, strings.HasPrefix(l.ok("bandwidth", "get", "elsewhere").out, "SITE"))
}
