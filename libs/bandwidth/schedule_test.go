package bandwidth_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

const (
	mon = schedulerv1.Weekday_WEEKDAY_MONDAY
	tue = schedulerv1.Weekday_WEEKDAY_TUESDAY
	fri = schedulerv1.Weekday_WEEKDAY_FRIDAY
	sat = schedulerv1.Weekday_WEEKDAY_SATURDAY
	sun = schedulerv1.Weekday_WEEKDAY_SUNDAY
	mib = 1 << 20
)

func win(start, end time.Duration, rate int64, days ...schedulerv1.Weekday) *schedulerv1.BandwidthWindow {
	return &schedulerv1.BandwidthWindow{Days: days, Start: durationpb.New(start), End: durationpb.New(end), BytesPerSecond: rate}
}

func schedule(t testing.TB, zone string, def int64, w ...*schedulerv1.BandwidthWindow) *bandwidth.Schedule {
	t.Helper()
	s, err := bandwidth.NewSchedule(&schedulerv1.SiteBandwidth{Name: "sites/lab", TimeZone: zone, DefaultBytesPerSecond: def, Windows: w})
	require.NoError(t, err)
	return s
}

const stampLayout = "2006-01-02 15:04:05 -0700"

func at(t testing.TB, text string) time.Time {
	t.Helper()
	out, err := time.Parse(stampLayout, text)
	require.NoError(t, err)
	return out
}

func TestFirstWindowThatHolds(t *testing.T) {
	const h = time.Hour
	office := schedule(t, "Europe/Berlin", 100*mib,
		win(12*h, 13*h, 50*mib, mon, fri), // lunch, before the office hours that it is part of
		win(8*h, 18*h, 10*mib, mon, tue, fri),
		win(22*h, 6*h, 0, fri, sat), // nights of Friday and Saturday: no limit
		win(23*h, 24*h, 7*mib, sun),
	)
	for _, c := range []struct {
		at   string
		rate int64
		next string
	}{
		{"2026-11-23 07:59:59 +0100", 100 * mib, "2026-11-23 08:00:00 +0100"}, // a Monday
		{"2026-11-23 08:00:00 +0100", 10 * mib, "2026-11-23 12:00:00 +0100"},
		{"2026-11-23 11:59:59 +0000", 50 * mib, "2026-11-23 13:00:00 +0100"}, // another zone's instant
		{"2026-11-23 13:00:00 +0100", 10 * mib, "2026-11-23 18:00:00 +0100"},
		{"2026-11-23 18:00:00 +0100", 100 * mib, "2026-11-24 08:00:00 +0100"},
		{"2026-11-24 12:30:00 +0100", 10 * mib, "2026-11-24 18:00:00 +0100"},
		{"2026-11-25 12:30:00 +0100", 100 * mib, "2026-11-27 08:00:00 +0100"},
		{"2026-11-27 22:00:00 +0100", 0, "2026-11-28 06:00:00 +0100"},
		{"2026-11-28 05:59:59 +0100", 0, "2026-11-28 06:00:00 +0100"},
		{"2026-11-28 06:00:00 +0100", 100 * mib, "2026-11-28 22:00:00 +0100"},
		{"2026-11-29 03:00:00 +0100", 0, "2026-11-29 06:00:00 +0100"}, // over the end of the week
		{"2026-11-29 23:30:00 +0100", 7 * mib, "2026-11-30 00:00:00 +0100"},
		{"2026-11-30 00:00:00 +0100", 100 * mib, "2026-11-30 08:00:00 +0100"},
	} {
		now := at(t, c.at)
		require.Equal(t, c.rate, office.Rate(now), c.at)
		next, ok := office.Next(now)
		require.True(t, ok)
		require.Equal(t, c.next, next.Format(stampLayout), c.at)
	}
	_, index := office.At(at(t, "2026-11-23 12:00:00 +0100"))
	require.Zero(t, index)
	_, index = office.At(at(t, "2026-11-23 20:00:00 +0100"))
	require.Equal(t, -1, index)
}

func TestClockChanges(t *testing.T) {
	const h = time.Hour
	// Berlin: 29 March 2026 02:00 -> 03:00, 25 October 2026 03:00 -> 02:00.
	s := schedule(t, "Europe/Berlin", mib, win(2*h+30*time.Minute, 4*h, 2*mib, sun))
	for _, c := range []struct {
		at   string
		rate int64
		next string
	}{
		{"2026-03-29 01:59:59 +0100", mib, "2026-03-29 03:00:00 +0200"}, // half past two does not exist
		{"2026-03-29 03:00:00 +0200", 2 * mib, "2026-03-29 04:00:00 +0200"},
		{"2026-10-25 02:29:59 +0200", mib, "2026-10-25 02:30:00 +0200"},
		{"2026-10-25 02:59:59 +0200", 2 * mib, "2026-10-25 02:00:00 +0100"}, // the hour begins again
		{"2026-10-25 02:00:00 +0100", mib, "2026-10-25 02:30:00 +0100"},
		{"2026-10-25 02:30:00 +0100", 2 * mib, "2026-10-25 04:00:00 +0100"},
	} {
		now := at(t, c.at)
		require.Equal(t, c.rate, s.Rate(now), c.at)
		next, ok := s.Next(now)
		require.True(t, ok, c.at)
		require.Equal(t, c.next, next.Format(stampLayout), c.at)
	}
	// A window inside the hour that is skipped: not that week.
	gap := schedule(t, "Europe/Berlin", mib, win(2*h, 3*h, 2*mib, sun))
	next, ok := gap.Next(at(t, "2026-03-22 03:00:00 +0100"))
	require.True(t, ok)
	require.Equal(t, "2026-04-05 02:00:00 +0200", next.Format(stampLayout))
}

func TestNeverChanges(t *testing.T) {
	var none *bandwidth.Schedule
	require.Zero(t, none.Rate(time.Now()))
	_, ok := none.Next(time.Now())
	require.False(t, ok)
	_, ok = schedule(t, "", mib).Next(time.Now())
	require.False(t, ok)
	all := schedule(t, "", mib, win(0, 24*time.Hour, 2*mib))
	_, ok = all.Next(time.Now())
	require.False(t, ok)
	require.EqualValues(t, 2*mib, all.Rate(time.Now()))
	round := schedule(t, "", mib, win(9*time.Hour, 9*time.Hour, 2*mib)) // at or before start: the next day
	require.EqualValues(t, 2*mib, round.Rate(time.Now()))
}

func TestEveryProblemAtOnce(t *testing.T) {
	fields := bandwidth.Check(&schedulerv1.SiteBandwidth{
		TimeZone: "Europe/Atlantis", DefaultBytesPerSecond: 5,
		Windows: []*schedulerv1.BandwidthWindow{
			win(24*time.Hour, 25*time.Hour, -1, mon, mon),
			win(time.Millisecond, time.Hour, mib, 0, 8),
			{BytesPerSecond: mib},
			win(8*time.Hour, 18*time.Hour, mib),
			win(9*time.Hour, 10*time.Hour, 2*mib, tue), // covered
			win(20*time.Hour, 9*time.Hour, 2*mib, sat), // not all of it
		},
	})
	var got []string
	for _, f := range fields {
		got = append(got, f.Path+": "+f.Message)
	}
	require.Equal(t, []string{
		`time_zone: "Europe/Atlantis" is no IANA time zone such as Europe/Berlin`,
		"default_bytes_per_second: 5 is not 0 (no limit) or from 65536 to 1125899906842624",
		"windows[0].days: a day is named twice",
		"windows[0].start: 24h0m0s is not a time of day",
		"windows[0].end: 25h0m0s is not a time of day",
		"windows[0].bytes_per_second: -1 is not 0 (no limit) or from 65536 to 1125899906842624",
		"windows[1].days: WEEKDAY_UNSPECIFIED is no day",
		"windows[1].days: 8 is no day",
		"windows[1].start: 1ms is not in whole seconds",
		"windows[2].start: is missing",
		"windows[2].end: is missing",
		"windows[4]: it never holds: windows before it cover all of it, and the first one decides",
	}, got)
	_, err := bandwidth.NewSchedule(&schedulerv1.SiteBandwidth{Name: "sites/lab", TimeZone: "Local", DefaultBytesPerSecond: 1})
	require.ErrorContains(t, err, "sites/lab")
	require.ErrorContains(t, err, "time_zone")
	require.ErrorContains(t, err, "default_bytes_per_second")
	require.NotEmpty(t, bandwidth.Check(&schedulerv1.SiteBandwidth{Windows: make([]*schedulerv1.BandwidthWindow, 65)}))
}

// Next is what looking at every minute finds, in zones that change their clocks by an hour, by half an hour, and not.
func TestNextIsTheNextChange(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		b := &schedulerv1.SiteBandwidth{Name: "sites/x", TimeZone: rapid.SampledFrom([]string{
			"", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"}).Draw(r, "zone"), DefaultBytesPerSecond: mib}
		for i := range rapid.IntRange(1, 4).Draw(r, "windows") {
			minute := rapid.IntRange(0, 24*4-1)
			w := win(time.Duration(minute.Draw(r, "start"))*15*time.Minute, time.Duration(minute.Draw(r, "end"))*15*time.Minute, int64(i+2)*mib)
			w.Days = rapid.SliceOfNDistinct(rapid.SampledFrom([]schedulerv1.Weekday{1, 2, 3, 4, 5, 6, 7}), 0, 3, rapid.ID).Draw(r, "days")
			b.Windows = append(b.Windows, w)
		}
		s, err := bandwidth.NewSchedule(b)
		if err != nil { // one window hides another
			return
		}
		start := time.Unix(rapid.Int64Range(1767225600/900, 1798761600/900).Draw(r, "at")*900, 0)
		next, ok := s.Next(start)
		for d := time.Duration(0); d < 8*24*time.Hour; d += 15 * time.Minute {
			now := start.Add(d)
			if ok && !now.Before(next) {
				if s.Rate(next) == s.Rate(start) || s.Rate(next.Add(-time.Second)) != s.Rate(start) {
					r.Fatalf("no change at %s", next)
				}
				return
			}
			if s.Rate(now) != s.Rate(start) {
				r.Fatalf("%v changed at %s, next is %s %v", b, now.In(s.Zone()), next, ok)
			}
		}
	})
}

func ExampleSchedule() {
	s, _ := bandwidth.NewSchedule(&schedulerv1.SiteBandwidth{Name: "sites/berlin", TimeZone: "Europe/Berlin",
		Windows: []*schedulerv1.BandwidthWindow{win(8*time.Hour, 18*time.Hour, 20*mib, mon, tue)}})
	now := time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)
	next, _ := s.Next(now)
	fmt.Println(s.Rate(now), next)
	// Output: 20971520 2026-11-23 18:00:00 +0100 CET
}
