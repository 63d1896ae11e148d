package bench

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Options of a suite.
type Options struct {
	// Root is the checkout, for the Go benchmarks.
	Root string
	// Bin is the folder with the product's programs.
	Bin string
	// Work is the folder for disks and stores, which must not exist or be empty; it is removed at the end.
	Work string
	// Size of the reference disk in bytes, a multiple of 1 MiB.
	Size int64
	// Set names the size of the suite in the report.
	Set string
	// Runs of each subject, whose medians are reported.
	Runs int
	// Seed of every input.
	Seed uint64
	// Rows to run, all when empty.
	Rows []string
	// Progress hears what is being measured.
	Progress io.Writer
}

// sample is one run of one subject.
type sample struct {
	usage
	in, out int64
	figures []figure
}

// figure is one figure of one run.
type figure struct {
	name, unit string
	value      float64
	// most is the goal: at most this; least: at least this; 0 is none.
	most, least float64
}

// subject is the product or a peer in a row.
type subject struct {
	name string
	// missing says why it cannot run here.
	missing string
	check   string
	// once says that one run is enough: it repeats by itself.
	once bool
	run  func(ctx context.Context, folder string) (sample, error)
}

// rows in the order in which they run.
var rows = []struct {
	name     string
	subjects func(ctx context.Context, o *Options) ([]subject, error)
}{
	{"ir-mixed", initialReplication},
	{"dl-coal", coalescing},
	{"switch-pause", switchPause},
	{"ir-ship", shipOnly},
	{"grpc", bulkStream},
	{"commit-requests", commitRequests},
	{"demo", demonstration},
	{"st-ir-capped", storageRow(cappedSink)},
	{"st-ir-open", storageRow(openSink)},
	{"st-ir-azurite", storageRow(emulator)},
	{"st-churn", scatteredPoint},
	{"st-dl-iops", sustainedChurn},
	{"st-rst", restoreRow},
	{"st-conc", togetherRow},
	{"guest-rto", guestRow(guestRTO)},
	{"guest-delta", guestRow(guestDelta)},
	{"guest-bytes", guestRow(guestBytes)},
	{"guest-cut", guestRow(guestCut)},
	{"guest-latency", guestRow(guestLatency)},
	{"guest-source", guestRow(guestSource)},
}

// Names of the rows, in order.
func Names() []string {
	var list []string
	for _, r := range rows {
		list = append(list, r.name)
	}
	return list
}

// Run runs the suite. Rows whose result is wrong are in the report; the error says that there is none.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.Size <= 0 || o.Size%mib != 0 || o.Runs <= 0 {
		return nil, fmt.Errorf("size %d, %d runs: want a multiple of 1 MiB, and a run", o.Size, o.Runs)
	}
	for _, want := range o.Rows {
		if !slices.Contains(Names(), want) {
			return nil, fmt.Errorf("no row is called %q: there are %s", want, strings.Join(Names(), ", "))
		}
	}
	if left, err := os.ReadDir(o.Work); err == nil && len(left) > 0 {
		return nil, fmt.Errorf("work folder %s is not empty", o.Work)
	}
	if err := os.MkdirAll(o.Work, 0o750); err != nil {
		return nil, fmt.Errorf("work folder: %w", err)
	}
	defer os.RemoveAll(o.Work)
	report := newReport(ctx, &o)
	for _, row := range rows {
		if len(o.Rows) > 0 && !slices.Contains(o.Rows, row.name) {
			continue
		}
		subjects, err := row.subjects(ctx, &o)
		if err != nil {
			return nil, fmt.Errorf("row %s: %w", row.name, err)
		}
		report.Rows = append(report.Rows, alternate(ctx, &o, row.name, subjects)...)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	report.LoadAfter = loadAverage()
	return report, nil
}

// alternate runs the subjects in turn, as often as asked, and makes their rows.
func alternate(ctx context.Context, o *Options, name string, subjects []subject) []Row {
	samples := make([][]sample, len(subjects))
	failed := make([]error, len(subjects))
	for n := range o.Runs {
		for i, s := range subjects {
			if s.missing != "" || failed[i] != nil || ctx.Err() != nil || s.once && n > 0 {
				continue
			}
			fmt.Fprintf(o.Progress, "%s  %s: %s, run %d of %d\n", time.Now().Format("15:04:05"), name, s.name, n+1, o.Runs)
			folder := filepath.Join(o.Work, "run")
			err := os.MkdirAll(folder, 0o750)
			if err == nil {
				var got sample
				if got, err = s.run(ctx, folder); err == nil {
					samples[i] = append(samples[i], got)
				}
			}
			if failed[i] = errors.Join(err, os.RemoveAll(folder)); failed[i] != nil {
				fmt.Fprintf(o.Progress, "%s  %s: %s: FAILED: %v\n", time.Now().Format("15:04:05"), name, s.name, failed[i])
			}
		}
	}
	var list []Row
	for i, s := range subjects {
		row := Row{Name: name, Subject: s.name, Missing: s.missing, Check: s.check, Runs: len(samples[i])}
		if failed[i] != nil {
			row.Failed = failed[i].Error()
		}
		if row.Runs > 0 {
			row.fill(samples[i])
		}
		list = append(list, row)
	}
	return list
}

// fill takes the medians.
func (r *Row) fill(list []sample) {
	over := func(f func(s sample) float64) Spread {
		var v []float64
		for _, s := range list {
			v = append(v, f(s))
		}
		return spread(v)
	}
	r.Wall = over(func(s sample) float64 { return s.wall.Seconds() })
	r.CPU = over(func(s sample) float64 { return s.cpu.Seconds() })
	r.System = over(func(s sample) float64 { return s.system.Seconds() })
	r.Peak = over(func(s sample) float64 { return float64(s.peak) })
	r.In = int64(over(func(s sample) float64 { return float64(s.in) }).Median)
	r.Out = int64(over(func(s sample) float64 { return float64(s.out) }).Median)
	for k, f := range list[0].figures {
		out := Figure{Name: f.name, Unit: f.unit, Value: over(func(s sample) float64 {
			if k < len(s.figures) {
				return s.figures[k].value
			}
			return 0
		})}
		met := true
		switch {
		case f.most > 0:
			out.Goal, met = fmt.Sprintf("<= %g", f.most), out.Value.Median <= f.most
			out.Met = &met
		case f.least > 0:
			out.Goal, met = fmt.Sprintf(">= %g", f.least), out.Value.Median >= f.least
			out.Met = &met
		}
		r.Figures = append(r.Figures, out)
	}
}

// scale measures what one core of this machine does, for readers with another one.
func scale(ctx context.Context, o *Options) map[string]float64 {
	const each = 64 * mib
	p := make([]byte, 64*kib)
	for i := range p {
		p[i] = byte(i * 7)
	}
	q := make([]byte, len(p))
	table := crc32.MakeTable(crc32.Castagnoli)
	measure := func(f func()) float64 {
		best := 0.0
		for range 3 {
			begin := time.Now()
			for range each / len(p) {
				f()
			}
			best = max(best, each/1e6/time.Since(begin).Seconds())
		}
		return best
	}
	list := map[string]float64{
		"sha256 64K": measure(func() { sha256.Sum256(p) }),
		"crc32c 64K": measure(func() { crc32.Checksum(p, table) }),
		"copy 64K":   measure(func() { copy(q, p) }),
	}
	// Where a hypervisor takes unused memory back, most of a copy's kernel time is the first touch of new pages of the
	// page cache: this figure shows it.
	file, n := filepath.Join(o.Work, "scale"), min(o.Size, gib)/mib
	defer os.Remove(file)
	if u, err := run(ctx, "dd", "if=/dev/zero", "of="+file, "bs=1M", fmt.Sprintf("count=%d", n), "status=none"); err == nil && u.cpu > 0 {
		list["new file 1M"] = float64(n) * mib / 1e6 / u.cpu.Seconds()
	}
	return list
}
