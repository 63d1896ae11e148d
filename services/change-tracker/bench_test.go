package changetracker

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// benchTracker makes a machine with n raw disks of size bytes on real files.
func benchTracker(b *testing.B, n int, size int64) (*Tracker, []*disk) {
	b.Helper()
	dir := b.TempDir()
	mt, err := newMetrics(nil)
	require.NoError(b, err)
	t := newTracker(osFiles{now: time.Now}, dir, slog.New(slog.DiscardHandler), time.Now, mt)
	t.limitLogs = false
	t.maxEntries = 1 << 40
	spec := MachineSpec{ID: "vm", Dir: dir}
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("d%d.img", i))
		f, err := os.Create(path)
		require.NoError(b, err)
		require.NoError(b, f.Truncate(size))
		require.NoError(b, f.Close())
		spec.Disks = append(spec.Disks, DiskSpec{ID: fmt.Sprintf("d%d", i), Path: path, Format: Raw})
	}
	_, err = t.Attach(spec)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, t.Close()) })
	var disks []*disk
	for _, d := range spec.Disks {
		k, err := t.disk("vm/" + d.ID)
		require.NoError(b, err)
		disks = append(disks, k)
	}
	return t, disks
}

func benchProtect(b *testing.B, t *Tracker) {
	b.Helper()
	_, err := t.Start("vm", simLineage, 1)
	require.NoError(b, err)
	_, err = t.BeginPass("vm", simLineage, 1, 1, Full)
	require.NoError(b, err)
	_, err = t.SettlePass("vm", simLineage, 1, 1, Committed)
	require.NoError(b, err)
}

// BenchmarkWrite is one guest write of the given size, below NBD, with tracking off and on.
func BenchmarkWrite(b *testing.B) {
	for _, n := range []int{4 << 10, 64 << 10, 1 << 20} {
		for _, on := range []bool{false, true} {
			b.Run(fmt.Sprintf("size=%dKiB/tracking=%t", n>>10, on), func(b *testing.B) {
				const size = 256 << 20
				t, disks := benchTracker(b, 1, size)
				if on {
					benchProtect(b, t)
				}
				p := make([]byte, n)
				testkit.Fill(p, 1)
				rng := testkit.RandOf(1)
				point := uint64(2)
				b.SetBytes(int64(n))
				written := 0
				for b.Loop() {
					if err := disks[0].WriteAt(p, rng.Int64N(size/int64(n))*int64(n), false); err != nil {
						b.Fatal(err)
					}
					if written += n; on && written > 1<<30 { // do not fill the volume
						b.StopTimer()
						_, err := t.Cut("vm", simLineage, point, 1)
						require.NoError(b, err)
						_, err = t.Settle("vm", simLineage, point, 1, Committed)
						require.NoError(b, err)
						point, written = point+1, 0
						b.StartTimer()
					}
				}
			})
		}
	}
}

// BenchmarkSwitchPause is how long writes are held by a cut, with four disks under write load; ns/op is the whole call
// with its fsyncs. Every extent is hot when it begins: a first write waits for an fsync and loads nothing. A paced
// writer makes 1,000 writes of 16 KiB each second (64 MB/s in all); unpaced ones never wait, and the fsyncs of what
// they wrote make a cut as slow as the volume.
func BenchmarkSwitchPause(b *testing.B) {
	b.Run("paced", func(b *testing.B) { benchSwitch(b, time.Millisecond) })
	b.Run("unpaced", func(b *testing.B) { benchSwitch(b, 0) })
}

func benchSwitch(b *testing.B, every time.Duration) {
	const size = 256 << 20
	t, disks := benchTracker(b, 4, size)
	benchProtect(b, t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg, warm sync.WaitGroup
	warm.Add(len(disks))
	for i, d := range disks {
		wg.Go(func() {
			p := make([]byte, 16<<10)
			rng := testkit.RandOf(uint64(i))
			for off := int64(0); off < size; off += 1 << 20 {
				if err := d.WriteAt(p, off, false); err != nil {
					b.Error(err)
					break
				}
			}
			warm.Done()
			var tick <-chan time.Time
			if every > 0 {
				ticker := time.NewTicker(every)
				defer ticker.Stop()
				tick = ticker.C
			}
			for ctx.Err() == nil {
				if tick != nil {
					<-tick
				}
				if err := d.WriteAt(p, rng.Int64N(size/int64(len(p)))*int64(len(p)), false); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	warm.Wait()
	var pauses []time.Duration
	point := uint64(2)
	for b.Loop() {
		p, err := t.Cut("vm", simLineage, point, 1)
		require.NoError(b, err)
		pauses = append(pauses, p.Pause)
		_, err = t.Settle("vm", simLineage, point, 1, Committed)
		require.NoError(b, err)
		point++
	}
	cancel()
	wg.Wait()
	slices.Sort(pauses)
	at := func(q float64) float64 { return float64(pauses[int(q*float64(len(pauses)-1))].Microseconds()) }
	b.ReportMetric(at(.5), "p50-µs")
	b.ReportMetric(at(.99), "p99-µs")
	b.ReportMetric(at(1), "max-µs")
}

// BenchmarkReadChanges is reading a coalesced point: 1,000 blocks of 64 KiB, each rewritten ten times.
func BenchmarkReadChanges(b *testing.B) {
	t, disks := benchTracker(b, 1, 256<<20)
	benchProtect(b, t)
	p := make([]byte, 64<<10)
	testkit.Fill(p, 3)
	for range 10 {
		for i := range 1000 {
			require.NoError(b, disks[0].WriteAt(p, int64(i)*2*int64(len(p)), false))
		}
	}
	_, err := t.Cut("vm", simLineage, 2, 1)
	require.NoError(b, err)
	b.SetBytes(1000 * int64(len(p)))
	for b.Loop() {
		n := int64(0)
		err := t.ReadChanges(context.Background(), "vm", simLineage, 2, "d0", 0, func(c Chunk) error {
			n += int64(len(c.Data))
			return nil
		})
		require.NoError(b, err)
		require.EqualValues(b, 1000*len(p), n)
	}
}
