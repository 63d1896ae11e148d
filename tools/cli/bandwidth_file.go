package cli

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/config"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// readBandwidth reads a schedule: as people write it, or as `bandwidth get -o yaml` prints it. Unknown keys are refused with
// their name; what the schedule as a whole must be is for the scheduler to say.
func (a *app) readBandwidth(file string) (*schedulerv1.SiteBandwidth, error) {
	b := &schedulerv1.SiteBandwidth{}
	err := a.readDocument("bandwidth", file, typesv1.ErrorReason_ERROR_REASON_BANDWIDTH_INVALID, func(v any) error { return bandwidthValues(v, b) })
	return b, err
}

// fields calls the function of each key of a map; all problems are joined.
func fields(v any, path string, known map[string]func(v any) error) error {
	m, ok := v.(map[string]any)
	if !ok {
		return fmt.Errorf("%sit is not a list of keys and values such as %s", path, "limit: 20MiB/s")
	}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(m)) {
		take, ok := known[key]
		if !ok {
			errs = append(errs, fmt.Errorf("%sunknown key %q: want any of %s", path, key, strings.Join(slices.Sorted(maps.Keys(known)), ", ")))
		} else if err := take(m[key]); err != nil {
			errs = append(errs, fmt.Errorf("%s%s: %w", path, key, err))
		}
	}
	return joined(errs)
}

// joined is all errors on one line.
func joined(errs []error) error {
	var texts []string
	for _, err := range errs {
		if err != nil {
			texts = append(texts, err.Error())
		}
	}
	if texts == nil {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}

func bandwidthValues(v any, b *schedulerv1.SiteBandwidth) error {
	if m, ok := v.(map[string]any); ok {
		if inner, ok := m["bandwidth"]; ok { // as get prints it
			v = inner
		}
	}
	rate := func(v any) (err error) {
		b.DefaultBytesPerSecond, err = parseRate(scalar(v))
		return err
	}
	return fields(v, "", map[string]func(any) error{
		"name":      func(v any) error { b.Name = scalar(v); return nil },
		"time_zone": func(v any) error { b.TimeZone = scalar(v); return nil },
		"revision": func(v any) (err error) {
			b.Revision, err = strconv.ParseUint(scalar(v), 10, 64)
			return err
		},
		"default": rate, "default_bytes_per_second": rate,
		"windows": func(v any) error {
			list, ok := v.([]any)
			if !ok {
				return errors.New("it is not a list")
			}
			var errs []error
			for i, one := range list {
				w := &schedulerv1.BandwidthWindow{}
				errs = append(errs, windowValues(one, fmt.Sprintf("[%d].", i), w))
				b.Windows = append(b.Windows, w)
			}
			return joined(errs)
		},
	})
}

func windowValues(v any, path string, w *schedulerv1.BandwidthWindow) error {
	clock := func(into **durationpb.Duration) func(any) error {
		return func(v any) error {
			d, err := parseTime(scalar(v))
			*into = durationpb.New(d)
			return err
		}
	}
	rate := func(v any) (err error) {
		w.BytesPerSecond, err = parseRate(scalar(v))
		return err
	}
	return fields(v, path, map[string]func(any) error{
		"days": func(v any) (err error) {
			w.Days, err = parseDays(v)
			return err
		},
		"start": clock(&w.Start), "end": clock(&w.End), "limit": rate, "bytes_per_second": rate,
	})
}

// scalar is a value as it was written, as good as YAML tells.
func scalar(v any) string {
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

var bitUnits = []struct {
	name  string
	bytes float64
}{{"Gbit", 1e9 / 8}, {"Mbit", 1e6 / 8}, {"kbit", 1e3 / 8}}

// parseRate reads 20MiB/s, 160Mbit/s, a number of bytes a second, or "none".
func parseRate(text string) (int64, error) {
	number, _ := strings.CutSuffix(strings.TrimSpace(text), "/s")
	if number == "none" {
		return 0, nil
	}
	for _, u := range bitUnits {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil || !(n >= 0 && n < 1e9) {
				return 0, fmt.Errorf("%q is no rate such as 20MiB/s or 160Mbit/s", text)
			}
			return int64(n * u.bytes), nil
		}
	}
	n, err := config.ParseByteSize(number)
	if err != nil {
		return 0, fmt.Errorf("%q is no rate such as 20MiB/s or 160Mbit/s", text)
	}
	return int64(n), nil
}

// parseTime reads 08:00, 08:00:30, or a duration since midnight as proto-JSON has it.
func parseTime(text string) (time.Duration, error) {
	bad := fmt.Errorf("%q is no time of day such as 08:00", text)
	parts := strings.Split(text, ":")
	if len(parts) == 1 {
		d, err := time.ParseDuration(text)
		if err != nil {
			return 0, bad
		}
		return d, nil
	}
	var d time.Duration
	for i, unit := range []time.Duration{time.Hour, time.Minute, time.Second} {
		if i >= len(parts) {
			break
		}
		n, err := strconv.ParseUint(parts[i], 10, 8)
		if err != nil || i == 0 && n > 24 || i > 0 && n > 59 || len(parts) > 3 || len(parts[i]) > 2 {
			return 0, bad
		}
		d += time.Duration(n) * unit
	}
	return d, nil
}

// parseDays reads mon, mon-fri, "mon-wed,sun", or a list of such, and the names of the API.
func parseDays(v any) (out []schedulerv1.Weekday, err error) {
	var items []string
	switch v := v.(type) {
	case nil:
	case []any:
		for _, one := range v {
			items = append(items, strings.Split(scalar(one), ",")...)
		}
	default:
		items = strings.Split(scalar(v), ",")
	}
	for _, item := range items {
		item = strings.ToLower(strings.TrimSpace(item))
		if item == "daily" {
			for d := range dayNames {
				out = append(out, schedulerv1.Weekday(d+1))
			}
			continue
		}
		first, end, ranged := strings.Cut(item, "-")
		from, to := day(first), day(first)
		if ranged {
			to = day(end)
		}
		if from < 0 || to < 0 {
			return nil, fmt.Errorf("%q is no day such as mon, and no range such as mon-fri", item)
		}
		for d := from; ; d = (d + 1) % len(dayNames) {
			out = append(out, schedulerv1.Weekday(d+1))
			if d == to {
				break
			}
		}
	}
	return out, nil
}

// day is the index of a day's name, short, long or as the API has it; -1: it is none.
func day(text string) int {
	text = strings.TrimPrefix(strings.TrimSpace(text), "weekday_")
	long := []string{"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}
	return max(slices.Index(dayNames, text), slices.Index(long, text))
}
