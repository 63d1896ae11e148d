package replica

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/segment"
)

// TestBigRewind goes through backend dir with parallel workers: several segments, larger ones read by ranges, a snapshot
// below, small extents.
func TestBigRewind(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 250 MiB")
	}
	ctx, store := t.Context(), openDir(t)
	r, err := Create(ctx, store, testLineage)
	require.NoError(t, err)
	rng := rand.New(rand.NewPCG(3, 4))
	image, buf := make([]byte, bigSize), make([]byte, 0, 40<<20)
	a, err := NewApplier(r, ApplierOptions{Footer: testFooter})
	require.NoError(t, err)
	shipBig(t, r, KindBase, 1, 64<<20, 1<<20, rng, image, buf)
	_, err = a.Advance(ctx, 0)
	require.NoError(t, err)
	_, err = r.Checkpoint(ctx, 1)
	require.NoError(t, err)
	shipBig(t, r, KindPoint, 2, 4<<20, 4<<10, rng, image, buf)
	want := bytes.Clone(image)
	for o := Ordinal(3); o < 6; o++ {
		shipBig(t, r, KindPoint, o, 16<<20, []int64{4 << 10, 64 << 10, 1 << 20}[o-3], rng, image, buf)
	}
	_, err = r.CloseLineage(ctx, FenceOptions{Failover: "f"})
	require.NoError(t, err)
	var told atomic.Int64
	check := func(target Ordinal, want []byte, segments int) {
		res, err := r.Rewind(ctx, RewindOptions{Failover: "f", Target: target, Parallel: 4, Compression: segment.None,
			Progress: func(done, total int64) { told.Store(max(told.Load(), done)) }})
		require.NoError(t, err)
		require.Equal(t, Committed, res.Outcome)
		require.Equal(t, res.SetBack, told.Swap(0))
		require.Equal(t, segments, res.Segments)
		t.Logf("%+v", res)
		src, err := r.SourceAt(ctx, res.Seq, "disk-a")
		require.NoError(t, err)
		got := make([]byte, bigSize)
		require.NoError(t, src.ReadAt(ctx, got, 0))
		require.True(t, bytes.Equal(want, got), "target %d", target)
	}
	check(2, want, 1)
	check(5, image, 2)
	_, err = a.Advance(ctx, 0)
	require.NoError(t, err)
	got := make([]byte, bigSize)
	for off := 0; off < bigSize; off += 4 << 20 {
		require.NoError(t, store.Container(testLineage.ReplicaContainer()).ReadPages(ctx, DiskBlobName("disk-a", 1), "", int64(off), got[off:off+4<<20]))
	}
	require.True(t, bytes.Equal(image, got))
}

// BenchmarkRewind goes back over 100 points of 2 MiB each, and forward again (not measured).
func BenchmarkRewind(b *testing.B) {
	for _, extentSize := range []int64{4 << 10, 64 << 10} {
		for _, checkpoint := range []bool{false, true} {
			b.Run(fmt.Sprintf("extents-%dK/checkpoint-%t", extentSize>>10, checkpoint), func(b *testing.B) {
				ctx := b.Context()
				var requests atomic.Int64
				f := blobstoretest.NewFaulty(openDir(b), func(blobstoretest.Op, string, string) blobstoretest.Fault {
					requests.Add(1)
					return blobstoretest.None
				})
				r, err := Create(ctx, f, testLineage)
				require.NoError(b, err)
				rng := rand.New(rand.NewPCG(1, 2))
				image, buf := make([]byte, bigSize), make([]byte, 0, 40<<20)
				shipBig(b, r, KindBase, 1, 64<<20, 1<<20, rng, image, buf)
				if checkpoint {
					a, err := NewApplier(r, ApplierOptions{Footer: testFooter, Stop: func(Entry) bool { return true }})
					require.NoError(b, err)
					_, err = a.Advance(ctx, 0)
					require.NoError(b, err)
				}
				for o := Ordinal(2); o <= 101; o++ {
					shipBig(b, r, KindPoint, o, 2<<20, extentSize, rng, image, buf)
				}
				_, err = r.CloseLineage(ctx, FenceOptions{Failover: "f"})
				require.NoError(b, err)
				var spent time.Duration
				var back, asked int64
				for b.Loop() {
					requests.Store(0)
					start := time.Now()
					res, err := r.Rewind(ctx, RewindOptions{Failover: "f", Target: 1})
					require.NoError(b, err)
					spent += time.Since(start)
					back += res.SetBack
					asked += requests.Load()
					b.StopTimer()
					_, err = r.Rewind(ctx, RewindOptions{Failover: "f", Target: 101})
					require.NoError(b, err)
					b.StartTimer()
				}
				b.ReportMetric(float64(back)/(1<<20)/spent.Seconds(), "MiB/s")
				b.ReportMetric(float64(back)/(1<<20)/float64(b.N), "MiB-back")
				b.ReportMetric(float64(asked)/float64(b.N), "requests")
			})
		}
	}
}
