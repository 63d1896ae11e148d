package bench

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
)

func TestDiskFollowsFromItsSeed(t *testing.T) {
	const size = 64 * mib
	dir := t.TempDir()
	a, err := makeDisk(filepath.Join(dir, "a"), size, 7)
	require.NoError(t, err)
	_, err = makeDisk(filepath.Join(dir, "b"), size, 7)
	require.NoError(t, err)
	_, err = makeDisk(filepath.Join(dir, "c"), size, 8)
	require.NoError(t, err)
	read := func(name string) []byte {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		return raw
	}
	require.True(t, bytes.Equal(read("a"), read("b")))
	require.False(t, bytes.Equal(read("a"), read("c")))
	var data int64
	zero := make([]byte, page)
	for p := read("a"); len(p) > 0; p = p[page:] {
		if !bytes.Equal(p[:page], zero) {
			data += page
		}
	}
	require.Equal(t, data, a.data)
	_, err = makeDisk(filepath.Join(dir, "a"), size, 7)
	require.ErrorIs(t, err, os.ErrExist)
}

func TestMixtureHasItsShares(t *testing.T) {
	const extents = 500
	m, p := newMixture(1), make([]byte, mib)
	var holes, random, text int
	for k := range int64(extents) {
		switch {
		case !m.extent(k, p):
			holes++
		case packed(t, p[:64*kib]) > 60*kib:
			random++
		default:
			text++
		}
	}
	require.InDelta(t, 0.4, float64(holes)/extents, 0.07)
	require.InDelta(t, 0.3, float64(random)/extents, 0.07)
	require.InDelta(t, 0.3, float64(text)/extents, 0.07)
}

// packed is the length of p after compression.
func packed(t *testing.T, p []byte) int {
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.BestSpeed)
	require.NoError(t, err)
	_, err = w.Write(p)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return out.Len()
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want Spread
	}{
		{nil, Spread{}}, {[]float64{3}, Spread{3, 3, 3}}, {[]float64{9, 1, 2}, Spread{2, 1, 9}}, {[]float64{4, 1, 2, 3}, Spread{2.5, 1, 4}},
	} {
		require.Equal(t, c.want, spread(c.in))
	}
}

func TestParseBenchmarks(t *testing.T) {
	got := parse("goos: linux\nBenchmarkA/tls=true/64K-2  \t 100\t 60429 ns/op\t1084.52 MB/s\t 7 MB/cpu-s\nBenchmarkB  3  5 ns/op\nBenchmarkBroken\nBenchmarkB  3  7 ns/op\nPASS\n")
	require.Empty(t, cmp.Diff(results{
		"BenchmarkA/tls=true/64K": {"ns/op": {60429}, "MB/s": {1084.52}, "MB/cpu-s": {7}},
		"BenchmarkB":              {"ns/op": {5, 7}},
	}, got))
	require.InDelta(t, 6, got.of("BenchmarkB", "ns/op"), 0)
	require.InDelta(t, 7, got.worst("BenchmarkB", "ns/op"), 0)
}

func TestSubjectsAlternateAndFailuresShow(t *testing.T) {
	o := &Options{Work: t.TempDir(), Runs: 3, Progress: io.Discard}
	var order []string
	runs := func(name string, fail error) subject {
		return subject{name: name, check: "none", run: func(_ context.Context, folder string) (sample, error) {
			order = append(order, name)
			left, err := os.ReadDir(folder)
			require.NoError(t, err)
			require.Empty(t, left, "each run finds an empty folder")
			require.NoError(t, os.WriteFile(filepath.Join(folder, "x"), nil, 0o600))
			n := float64(len(order))
			return sample{usage: usage{wall: time.Second, cpu: time.Duration(n) * time.Second}, figures: []figure{{name: "n", value: n, most: 3}}}, fail
		}}
	}
	once := runs("c", nil)
	once.once = true
	rows := alternate(t.Context(), o, "row", []subject{runs("a", nil), {name: "gone", missing: "not here"}, runs("b", errors.New("wrong copy")), once})
	require.Equal(t, []string{"a", "b", "c", "a", "a"}, order)
	require.Len(t, rows, 4)
	require.Equal(t, 3, rows[0].Runs)
	require.Equal(t, Spread{Median: 4, Min: 1, Max: 5}, rows[0].CPU)
	require.False(t, *rows[0].Figures[0].Met)
	require.Equal(t, "not here", rows[1].Missing)
	require.Zero(t, rows[2].Runs)
	require.Equal(t, "wrong copy", rows[2].Failed)

	r := &Report{Rows: rows}
	require.Equal(t, []string{"row, b: wrong copy"}, r.Failed())
	var table, doc bytes.Buffer
	require.NoError(t, r.Table(&table))
	require.NoError(t, r.JSON(&doc))
	for _, want := range []string{"MISSING: not here", "FAILED: wrong copy", "<= 3  NOT MET"} {
		require.Contains(t, table.String(), want)
	}
	require.Contains(t, doc.String(), `"missing": "not here"`)
}

func TestRunRefuses(t *testing.T) {
	full := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(full, "precious"), nil, 0o600))
	for what, o := range map[string]Options{
		"odd size":    {Size: 1000, Runs: 1, Work: t.TempDir()},
		"no runs":     {Size: mib, Work: t.TempDir()},
		"unknown row": {Size: mib, Runs: 1, Rows: []string{"warp"}, Work: t.TempDir()},
		"not empty":   {Size: mib, Runs: 1, Work: full},
	} {
		_, err := Run(t.Context(), o)
		require.Error(t, err, what)
	}
	_, err := os.Stat(filepath.Join(full, "precious"))
	require.NoError(t, err)
}

func TestMeasureAProgram(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is measured on Linux only")
	}
	u, err := run(t.Context(), "dd", "if=/dev/zero", "of=/dev/null", "bs=32M", "count=20")
	require.NoError(t, err)
	require.Positive(t, u.wall)
	require.Positive(t, u.cpu)
	require.Greater(t, u.peak, int64(mib))
	_, err = run(t.Context(), "dd", "if=/nowhere")
	require.ErrorContains(t, err, "/nowhere", "what the program said is in the error")
	all, system, err := cpuOf(os.Getpid())
	require.NoError(t, err)
	require.GreaterOrEqual(t, all, system)
}

// TestSuiteOnASmallDisk runs the rows that copy, with the real programs.
func TestSuiteOnASmallDisk(t *testing.T) {
	bin := os.Getenv("LANDFALL_BIN")
	if bin == "" || testing.Short() {
		t.Skip("needs the built programs: LANDFALL_BIN, as make test sets it")
	}
	report, err := Run(t.Context(), Options{
		Bin: bin, Work: filepath.Join(t.TempDir(), "work"), Size: 32 * mib, Set: "test", Runs: 1, Seed: 1, Rows: []string{"ir-mixed", "dl-coal"}, Progress: io.Discard,
	})
	require.NoError(t, err)
	require.Empty(t, report.Failed())
	require.Equal(t, "ir-mixed", report.Rows[0].Name)
	for _, f := range report.Rows[0].Figures[:2] {
		require.True(t, *f.Met, f.Name)
	}
}
