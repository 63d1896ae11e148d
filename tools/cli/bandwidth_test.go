package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

const office = `
time_zone: Europe/Berlin
default: 100MiB/s
windows:
  - {days: mon-fri, start: 12:00, end: 13:00, limit: 50MiB/s}
  - {days: [mon-wed, friday, "thu"], start: 08:00, end: "18:00", limit: 160Mbit/s}
  - {days: "fri,sat", start: 22:00, end: 06:00:30, limit: none}
  - {start: 3h, end: 24:00, limit: 65536}
`

func read(t *testing.T, text string) (*schedulerv1.SiteBandwidth, error) {
	t.Helper()
	a := &app{in: strings.NewReader(text)}
	return a.readBandwidth("-")
}

func TestBandwidthFile(t *testing.T) {
	got, err := read(t, office)
	require.NoError(t, err)
	at := func(d time.Duration) *durationpb.Duration { return durationpb.New(d) }
	const h = time.Hour
	require.Empty(t, cmp.Diff(&schedulerv1.SiteBandwidth{
		TimeZone: "Europe/Berlin", DefaultBytesPerSecond: 100 << 20,
		Windows: []*schedulerv1.BandwidthWindow{
			{Days: []schedulerv1.Weekday{1, 2, 3, 4, 5}, Start: at(12 * h), End: at(13 * h), BytesPerSecond: 50 << 20},
			{Days: []schedulerv1.Weekday{1, 2, 3, 5, 4}, Start: at(8 * h), End: at(18 * h), BytesPerSecond: 20_000_000},
			{Days: []schedulerv1.Weekday{5, 6}, Start: at(22 * h), End: at(6*h + 30*time.Second)},
			{Start: at(3 * h), End: at(24 * h), BytesPerSecond: 65536},
		},
	}, got, protocmp.Transform()))

	// What get prints goes into set again.
	var out bytes.Buffer
	a := &app{out: &out, format: "yaml"}
	got.Name, got.Revision = "sites/berlin", 7
	require.NoError(t, a.print(&schedulerv1.GetBandwidthResponse{Bandwidth: got, CurrentBytesPerSecond: 5}, nil))
	again, err := read(t, out.String())
	require.NoError(t, err, out.String())
	require.Empty(t, cmp.Diff(got, again, protocmp.Transform()))

	_, err = read(t, "zone: x\ndefault: fast\nwindows: [{days: mon-foo, start: 25:00, end: noon, limit: -1, rate: 5}, 7]")
	require.Error(t, err)
	for _, part := range []string{`unknown key "zone"`, `default: "fast"`, `windows: [0].days: "mon-foo"`, `[0].start: "25:00"`, `[0].end: "noon"`, `[0].limit: "-1"`, `[0].unknown key "rate"`, "[1].it is not"} {
		require.ErrorContains(t, err, part)
	}
	for _, text := range []string{"", "7", "windows: 5", "a: [", "revision: -1"} {
		_, err = read(t, text)
		require.Error(t, err, text)
	}
	_, err = (&app{}).readBandwidth(filepath.Join(t.TempDir(), "none"))
	require.Error(t, err)
}

func TestBandwidthTable(t *testing.T) {
	b, err := read(t, office)
	require.NoError(t, err)
	b.Name = "sites/berlin"
	var out strings.Builder
	for _, now := range []time.Time{
		time.Date(2026, 11, 23, 8, 30, 0, 0, time.UTC), time.Date(2026, 11, 27, 22, 0, 0, 0, time.UTC), time.Date(2026, 11, 24, 1, 0, 0, 0, time.UTC),
	} {
		out.WriteString(now.String() + "\n")
		w := tabwriter.NewWriter(&out, 0, 4, 2, ' ', 0)
		bandwidthRows(w, b, now)
		require.NoError(t, w.Flush())
	}
	w := tabwriter.NewWriter(&out, 0, 4, 2, ' ', 0)
	out.WriteString("always\n")
	bandwidthRows(w, &schedulerv1.SiteBandwidth{Name: "sites/lab", DefaultBytesPerSecond: 20 << 20}, time.Now())
	bandwidthRows(w, &schedulerv1.SiteBandwidth{Name: "sites/lab"}, time.Now())
	require.NoError(t, w.Flush())
	path := filepath.Join("testdata", "bandwidth.golden")
	if os.Getenv("LANDFALL_UPDATE") != "" {
		require.NoError(t, os.WriteFile(path, []byte(out.String()), 0o600))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(string(want), out.String()))
	require.Equal(t, "mon-wed,sat,sun", showDays([]schedulerv1.Weekday{7, 3, 1, 2, 6}))
	require.Equal(t, "daily", showDays(nil))
}
