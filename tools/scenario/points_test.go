package scenario

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// pointList is `landfall points VM -o json`.
type pointList struct {
	Points []struct {
		Ordinal string `json:"ordinal"`
		Tier    string `json:"tier"`
		Pins    []struct {
			Owner  string  `json:"owner"`
			Until  *string `json:"until"`
			Reason string  `json:"reason"`
		} `json:"pins"`
		Suspected bool `json:"suspected"`
	} `json:"points"`
}

// What a person can do about points in the running product: hold and release, count and price, clear a suspicion that is not
// there; and what is refused.
func TestPoints(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("calm", "15m")
	l.ok("protect", "web-01", "--policy", "calm", "--wait")
	l.awaitPoint("web-01", 3)

	l.ok("points", "hold", "web-01", "--point", "2", "--hold", "case-17", "--reason", "the auditors")
	require.Contains(t, l.ok("points", "hold", "web-01", "--point", "2", "--hold", "case-17", "--reason", "the auditors").out, "hold/case-17")
	var list pointList
	l.get(&list, "points", "web-01")
	require.Len(t, list.Points, 2)
	require.Equal(t, "2", list.Points[1].Ordinal)
	require.Len(t, list.Points[1].Pins, 1)
	require.Nil(t, list.Points[1].Pins[0].Until)
	require.Equal(t, "by user cli (admin): the auditors", list.Points[1].Pins[0].Reason)
	require.Empty(t, list.Points[0].Pins)
	require.NotEmpty(t, list.Points[0].Tier)

	usage := l.ok("points", "web-01", "--usage").out
	for _, part := range []string{"journal", "staging", "replica", "snapshots", "orphans", "requests", "total", "USD", "assumed", "2026-11"} {
		require.Contains(t, usage, part)
	}
	require.Contains(t, l.refused("", "points", "hold", "web-01", "--point", "99", "--hold", "x"), "POINT_NOT_FOUND")
	require.Contains(t, l.refused("", "points", "hold", "nobody", "--point", "2", "--hold", "x"), "VM_NOT_FOUND")
	require.Contains(t, l.refused("", "points", "hold", "web-01", "--point", "2", "--hold", "Not A Name"), "INVALID_ARGUMENT")
	require.Contains(t, l.refused("name: bad\ncopy_interval: 30s\nkeep_all: 72h\nsuspicion_factor: 1.5\napply_delay: 2h\n", "policy", "apply", "-f", "-"), "apply_delay")

	require.Contains(t, l.ok("points", "release", "web-01", "--hold", "case-17").out, "point 2 is no longer held by case-17")
	require.Contains(t, l.ok("points", "release", "web-01", "--hold", "case-17").out, "no point was held by case-17")
	require.Contains(t, l.ok("points", "clear-suspicion", "web-01").out, "protected")
	events := l.ok("events").out
	require.Contains(t, events, "recovery-point.held")
	require.Contains(t, events, "recovery-point.released")
	require.Equal(t, l.ok("points", "web-01").out, l.ok("points", "list", "web-01").out)
}
