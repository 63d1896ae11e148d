package bandwidth

import (
	"fmt"
	"slices"
	"time"
	_ "time/tzdata" // a site's zone must be known on every machine, also on Windows and in images without one

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

const (
	// MinLimit is the smallest limit, in bytes a second: below it nobody's part would be of use.
	MinLimit = 64 << 10
	// MaxLimit is the largest limit, in bytes a second.
	MaxLimit = 1 << 50
	// MaxWindows bounds the windows of a schedule.
	MaxWindows = 64

	daySeconds  = 24 * 60 * 60
	weekSeconds = 7 * daySeconds
	// horizon bounds the search for the next change, in days: a window of one weekday can miss one week, when the clock
	// skips it.
	horizon = 16
)

// Schedule says how many bytes a second a site may send at which time. It goes by the clock on the wall of its time
// zone: a window that ends at 18:00 ends when the clock shows 18:00, however long the day was. An hour that is there twice
// is in its windows twice. The zero value is unlimited. Immutable.
type Schedule struct {
	zone    *time.Location
	windows []window
	rate    int64 // outside of windows
}

// window is in seconds since midnight; end above a day's is on the next day.
type window struct {
	days       [7]bool // by time.Weekday, on which it begins
	start, end int64
	rate       int64
}

// span is the part of the week, from Sunday's midnight, that the window covers when it begins on a day; it may leave the week.
func (w window) span(day int) extent.Range {
	return extent.Span(int64(day)*daySeconds+w.start, int64(day)*daySeconds+w.end)
}

// NewSchedule reads a schedule; the error names every problem that [Check] finds. Nil is unlimited.
func NewSchedule(b *schedulerv1.SiteBandwidth) (*Schedule, error) {
	if fields := Check(b); len(fields) > 0 {
		return nil, fmt.Errorf("schedule of %s: %w", b.GetName(), problems(fields))
	}
	zone, err := time.LoadLocation(b.GetTimeZone())
	if err != nil {
		return nil, fmt.Errorf("schedule of %s: %w", b.GetName(), err)
	}
	s := &Schedule{zone: zone, rate: b.GetDefaultBytesPerSecond()}
	for _, w := range b.GetWindows() {
		s.windows = append(s.windows, newWindow(w))
	}
	return s, nil
}

func newWindow(w *schedulerv1.BandwidthWindow) window {
	out := window{
		start: int64(w.GetStart().AsDuration() / time.Second), end: int64(w.GetEnd().AsDuration() / time.Second),
		rate: w.GetBytesPerSecond(),
	}
	if out.end <= out.start {
		out.end += daySeconds
	}
	for _, d := range w.GetDays() {
		out.days[int(d)%7] = true // Sunday is 7 there and 0 here
	}
	if len(w.GetDays()) == 0 {
		out.days = [7]bool{true, true, true, true, true, true, true}
	}
	return out
}

type problems []errcat.Field

func (p problems) Error() string {
	out := ""
	for i, f := range p {
		if i > 0 {
			out += "; "
		}
		out += f.Path + ": " + f.Message
	}
	return out
}

// Check returns everything that is wrong with a schedule, by field. The name is the caller's to check.
func Check(b *schedulerv1.SiteBandwidth) (fields []errcat.Field) {
	bad := func(path, format string, args ...any) {
		fields = append(fields, errcat.Field{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	limit := func(path string, n int64) {
		if n != 0 && (n < MinLimit || n > MaxLimit) {
			bad(path, "%d is not 0 (no limit) or from %d to %d", n, int64(MinLimit), int64(MaxLimit))
		}
	}
	if z := b.GetTimeZone(); z == "Local" {
		bad("time_zone", "%q differs from machine to machine: name one such as Europe/Berlin", z)
	} else if _, err := time.LoadLocation(z); err != nil {
		bad("time_zone", "%q is no IANA time zone such as Europe/Berlin", z)
	}
	limit("default_bytes_per_second", b.GetDefaultBytesPerSecond())
	if n := len(b.GetWindows()); n > MaxWindows {
		bad("windows", "%d of them, at most %d are possible", n, MaxWindows)
		return fields
	}
	var taken extent.Set
	for i, w := range b.GetWindows() {
		path := fmt.Sprintf("windows[%d].", i)
		before := len(fields)
		for _, d := range w.GetDays() {
			if d < schedulerv1.Weekday_WEEKDAY_MONDAY || d > schedulerv1.Weekday_WEEKDAY_SUNDAY {
				bad(path+"days", "%s is no day", d)
			}
		}
		if days := slices.Clone(w.GetDays()); len(days) > 0 {
			slices.Sort(days)
			if len(slices.Compact(days)) < len(w.GetDays()) {
				bad(path+"days", "a day is named twice")
			}
		}
		clock := func(name string, have bool, d time.Duration, last time.Duration) {
			switch {
			case !have:
				bad(path+name, "is missing")
			case d < 0 || d > last:
				bad(path+name, "%s is not a time of day", d)
			case d%time.Second != 0:
				bad(path+name, "%s is not in whole seconds", d)
			}
		}
		clock("start", w.GetStart() != nil, w.GetStart().AsDuration(), 24*time.Hour-time.Second)
		clock("end", w.GetEnd() != nil, w.GetEnd().AsDuration(), 24*time.Hour)
		limit(path+"bytes_per_second", w.GetBytesPerSecond())
		if len(fields) == before && !take(&taken, newWindow(w)) {
			bad(fmt.Sprintf("windows[%d]", i), "it never holds: windows before it cover all of it, and the first one decides")
		}
	}
	return fields
}

// take adds a window's part of the week to what is taken; false: all of it was.
func take(taken *extent.Set, w window) bool {
	fresh := false
	for day, on := range w.days {
		if !on {
			continue
		}
		r := w.span(day)
		for _, part := range []extent.Range{r.Intersect(extent.Range{Len: weekSeconds}), {Len: max(r.End()-weekSeconds, 0)}} {
			if part.Len > 0 {
				fresh = fresh || !taken.Covers(part)
				taken.Add(part)
			}
		}
	}
	return fresh
}

// At is the rate at an instant, in bytes a second, 0 for no limit, and the window that decides: its index, -1 outside
// of all.
func (s *Schedule) At(t time.Time) (rate int64, index int) {
	if s == nil {
		return 0, -1
	}
	if s.zone != nil {
		t = t.In(s.zone)
	}
	day := int(t.Weekday())
	h, m, sec := t.Clock()
	at := int64(day)*daySeconds + int64(h*3600+m*60+sec)
	for i, w := range s.windows {
		if r := w.span(day); w.days[day] && at >= r.Off && at < r.End() {
			return w.rate, i
		}
		late := at // as the day before counts on
		if day == 0 {
			late += weekSeconds
		}
		if r := w.span((day + 6) % 7); w.days[(day+6)%7] && late >= r.Off && late < r.End() {
			return w.rate, i
		}
	}
	return s.rate, -1
}

// Rate is the rate at an instant, in bytes a second; 0 is no limit.
func (s *Schedule) Rate(t time.Time) int64 {
	rate, _ := s.At(t)
	return rate
}

// Next is the first instant after t at which the rate is another; false: never.
func (s *Schedule) Next(t time.Time) (time.Time, bool) {
	if s == nil || len(s.windows) == 0 {
		return time.Time{}, false
	}
	zone := s.zone
	if zone == nil {
		zone = time.UTC
	}
	t = t.In(zone)
	now := s.Rate(t)
	end := t.AddDate(0, 0, horizon)
	// The rate can only change where the wall clock shows a bound of a window, under any offset of these days, or
	// where the offset changes.
	offsets := map[int]struct{}{}
	var at []time.Time
	for z := t; ; {
		_, o := z.Zone()
		offsets[o] = struct{}{}
		_, to := z.ZoneBounds()
		if to.IsZero() || to.After(end) {
			break
		}
		at, z = append(at, to), to
	}
	year, month, date := t.Date()
	for day := -1; day <= horizon; day++ {
		midnight := time.Date(year, month, date+day, 0, 0, 0, 0, time.UTC)
		for _, w := range s.windows {
			for _, sec := range []int64{w.start, w.end} {
				for o := range offsets {
					at = append(at, midnight.Add(time.Duration(sec-int64(o))*time.Second))
				}
			}
		}
	}
	slices.SortFunc(at, time.Time.Compare)
	for _, c := range at {
		if c.After(t) && s.Rate(c) != now {
			return c.In(zone), true
		}
	}
	return time.Time{}, false
}

// Zone is the time zone of the windows.
func (s *Schedule) Zone() *time.Location {
	if s == nil || s.zone == nil {
		return time.UTC
	}
	return s.zone
}

// smallest is the lowest limit that a schedule names, valid or not; 0 when it names none.
func smallest(b *schedulerv1.SiteBandwidth) (n int64) {
	take := func(rate int64) {
		if rate > 0 && (n == 0 || rate < n) {
			n = rate
		}
	}
	take(b.GetDefaultBytesPerSecond())
	for _, w := range b.GetWindows() {
		take(w.GetBytesPerSecond())
	}
	return n
}
