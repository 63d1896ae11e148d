package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// results of Go benchmarks: name without the number of processors, then unit, then the value of each time it ran.
type results map[string]map[string][]float64

// of is the median of a figure.
func (r results) of(name, unit string) float64 { return spread(r[name][unit]).Median }

// worst is the largest of a figure.
func (r results) worst(name, unit string) float64 { return spread(r[name][unit]).Max }

// parse reads the output of a test program that ran benchmarks.
func parse(output string) results {
	got := results{}
	lines := bufio.NewScanner(strings.NewReader(output))
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 4 || !strings.HasPrefix(words[0], "Benchmark") || len(words)%2 != 0 {
			continue
		}
		name := words[0]
		if i := strings.LastIndexByte(name, '-'); i > 0 {
			if _, err := strconv.Atoi(name[i+1:]); err == nil {
				name = name[:i]
			}
		}
		units := got[name]
		if units == nil {
			units = map[string][]float64{}
		}
		for i := 2; i+1 < len(words); i += 2 {
			if v, err := strconv.ParseFloat(words[i], 64); err == nil {
				units[words[i+1]] = append(units[words[i+1]], v)
			}
		}
		got[name] = units
	}
	return got
}

// goBench is a subject that runs benchmarks of a package.
type goBench struct {
	pkg, pattern, benchtime, check string
	// count repeats all in one program; 0 is 1.
	count   int
	figures func(results) []figure
	in      int64
}

// subject builds the test program once and runs it as often as asked: compiling is in no figure.
func (g goBench) subject(ctx context.Context, o *Options) (subject, error) {
	s := subject{name: "go test -bench " + g.pattern + " " + g.pkg, check: g.check}
	if _, err := exec.LookPath("go"); err != nil {
		s.missing = "go is not on PATH"
		return s, nil
	}
	program, err := filepath.Abs(filepath.Join(o.Work, strings.ReplaceAll(strings.Trim(g.pkg, "./"), "/", "-")+".test"))
	if err != nil {
		return s, err
	}
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", program, g.pkg)
	build.Dir = o.Root
	if out, err := build.CombinedOutput(); err != nil {
		return s, fmt.Errorf("build tests of %s: %w: %s", g.pkg, err, out)
	}
	s.run = func(ctx context.Context, folder string) (sample, error) {
		output, err := os.Create(filepath.Join(folder, "output"))
		if err != nil {
			return sample{}, err
		}
		defer output.Close()
		cmd := exec.CommandContext(ctx, program, "-test.run", "^$", "-test.bench", g.pattern, "-test.benchtime", g.benchtime, "-test.count", strconv.Itoa(max(g.count, 1)))
		cmd.Dir = filepath.Join(o.Root, g.pkg)
		cmd.Env = append(os.Environ(), "TMPDIR="+folder)
		cmd.Stdout, cmd.Stderr = output, output
		p, err := start(cmd)
		if err != nil {
			return sample{}, err
		}
		u, err := p.wait()
		raw, readErr := os.ReadFile(output.Name())
		if err := errors.Join(err, readErr); err != nil {
			return sample{}, fmt.Errorf("%w: %s", err, raw)
		}
		got := parse(string(raw))
		if len(got) == 0 {
			return sample{}, fmt.Errorf("no benchmark ran: %s", raw)
		}
		return sample{usage: u, in: g.in, figures: g.figures(got)}, nil
	}
	return s, nil
}

func (g goBench) only(ctx context.Context, o *Options) ([]subject, error) {
	s, err := g.subject(ctx, o)
	return []subject{s}, err
}

// switchPause cuts 480 times under a steady load. Writers that never wait make a cut as slow as the volume, so of those
// there are 30.
func switchPause(ctx context.Context, o *Options) ([]subject, error) {
	var list []subject
	for _, load := range []struct {
		name, benchtime string
		count           int
	}{{"paced", "120x", 4}, {"unpaced", "30x", 1}} {
		name := "BenchmarkSwitchPause/" + load.name
		s, err := goBench{
			pkg: "./services/change-tracker", pattern: "BenchmarkSwitchPause/^" + load.name + "$", benchtime: load.benchtime, count: load.count,
			check: "no write and no cut may fail",
			figures: func(r results) []figure {
				return []figure{
					{name: "pause p50", unit: "ms", value: r.of(name, "p50-µs") / 1e3},
					{name: "pause p99 (worst repetition)", unit: "ms", value: r.worst(name, "p99-µs") / 1e3},
					{name: "pause max", unit: "ms", value: r.worst(name, "max-µs") / 1e3},
					{name: "whole cut and settle", unit: "ms", value: r.of(name, "ns/op") / 1e6},
				}
			},
		}.subject(ctx, o)
		if err != nil {
			return nil, err
		}
		s.once = true
		list = append(list, s)
	}
	return list, nil
}

func shipOnly(ctx context.Context, o *Options) ([]subject, error) {
	return goBench{
		pkg: "./services/uploader", pattern: "BenchmarkInitialReplication", benchtime: "3x", check: "events of both roles",
		figures: func(r results) []figure {
			const name = "BenchmarkInitialReplication"
			return []figure{
				{name: "stored / data", unit: "x", value: r.of(name, "stored/data"), most: 1.02},
				{name: "IR-CPU (ship and host, no apply)", unit: "s/GiB", value: r.of(name, "ship-cpu-s/GiB"), most: 1.2},
				{name: "apply CPU, 256 MiB disk", unit: "s", value: r.of(name, "apply-cpu-s")},
			}
		},
	}.only(ctx, o)
}

func bulkStream(ctx context.Context, o *Options) ([]subject, error) {
	const unit, message = "MB/cpu-s", "/1024K"
	return goBench{
		pkg: "./libs/rpc", pattern: "BenchmarkBulk", benchtime: "300ms", check: "none here: throughput only",
		figures: func(r results) []figure {
			secure, secureRaw := r.of("BenchmarkBulkGRPC/tcp-tls/bulk"+message, unit), r.of("BenchmarkBulkTCP/tls=true"+message, unit)
			plain, plainRaw := r.of("BenchmarkBulkGRPC/tcp-plain/bulk"+message, unit), r.of("BenchmarkBulkTCP/tls=false"+message, unit)
			return []figure{
				{name: "GRPC share, TLS against TLS, 1 MiB", unit: "x", value: secure / secureRaw, least: 0.75},
				{name: "GRPC share, plain against plain, 1 MiB", unit: "x", value: plain / plainRaw, least: 0.55},
				{name: "bulk over TLS", unit: unit, value: secure},
				{name: "raw TLS", unit: unit, value: secureRaw},
				{name: "bulk plain", unit: unit, value: plain},
				{name: "raw TCP", unit: unit, value: plainRaw},
				{name: "bulk in memory", unit: unit, value: r.of("BenchmarkBulkGRPC/mem/bulk"+message, unit)},
				{name: "generated type over TLS", unit: unit, value: r.of("BenchmarkBulkGRPC/tcp-tls/proto"+message, unit)},
			}
		},
	}.only(ctx, o)
}

func commitRequests(ctx context.Context, o *Options) ([]subject, error) {
	return goBench{
		pkg: "./libs/replica", pattern: "BenchmarkCommit32MiB", benchtime: "5x", check: "no commit may fail", in: 32 * mib,
		figures: func(r results) []figure {
			return []figure{
				{name: "requests to commit 32 MiB, extents of 64 KiB", unit: "requests", value: r.of("BenchmarkCommit32MiB/extents-64K", "requests/point")},
				{name: "requests to commit 32 MiB, extents of 16 KiB", unit: "requests", value: r.of("BenchmarkCommit32MiB/extents-16K", "requests/point")},
			}
		},
	}.only(ctx, o)
}

// demoGoal is the longest that the demonstration may take.
const demoGoal = 2 * time.Minute

func demonstration(_ context.Context, o *Options) ([]subject, error) {
	return []subject{{
		name: "landfall-demo", check: "its own: both disks against the guest's record, twice",
		run: func(ctx context.Context, folder string) (sample, error) {
			u, err := run(ctx, filepath.Join(o.Bin, "landfall-demo"), "--dir", filepath.Join(folder, "demo"))
			if err != nil {
				return sample{}, err
			}
			return sample{usage: u, figures: []figure{
				{name: "wall", unit: "s", value: u.wall.Seconds(), most: demoGoal.Seconds()},
				{name: "peak memory of a process", unit: "MiB", value: float64(u.peak) / mib, most: 256},
			}}, nil
		},
	}}, nil
}
