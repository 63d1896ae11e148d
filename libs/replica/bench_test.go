package replica

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/segment"
)

const bigSize = 128 << 20

func openDir(tb testing.TB) blobstore.Store {
	s, err := dir.Open(tb.TempDir(), dir.Options{})
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

// shipBig ships n bytes in extents of step at random places, over segments of 32 MiB, and commits them.
func shipBig(tb testing.TB, r *Replica, kind Kind, o Ordinal, n, step int64, rng *rand.Rand, image []byte, buf []byte) {
	ctx := context.Background()
	h := segment.Header{Lineage: testLineage.Bytes(), DiskID: "disk-a", Gen: 1, DiskSize: bigSize, Kind: segment.KindPoint, Ordinal: uint64(o)}
	d := Disk{ID: "disk-a", Gen: 1, Size: bigSize}
	tx, noise := NewTx(), rand.NewChaCha8([32]byte{byte(rng.Uint32()), byte(o)})
	var w *segment.Writer
	flush := func() {
		if w == nil || w.Empty() {
			return
		}
		body, sha, _, err := w.Finish()
		require.NoError(tb, err)
		s, err := r.PutSegment(ctx, SegmentKey{Kind: kind, Ordinal: o, Tx: tx, DiskID: "disk-a", K: len(d.Segments)}, body, sha)
		require.NoError(tb, err)
		d.Segments = append(d.Segments, s)
		w = nil
	}
	every := bigSize / (n / step)
	for at := int64(0); at < bigSize; at += every {
		if w == nil {
			var err error
			w, err = segment.NewWriter(h, buf, segment.Options{})
			require.NoError(tb, err)
		}
		off := at
		if every > step {
			off += rng.Int64N((every-step)/512) * 512
		}
		p := image[off : off+step]
		_, _ = noise.Read(p)
		require.NoError(tb, w.Data(off, p))
		if w.Full() {
			flush()
		}
	}
	flush()
	_, err := r.Commit(ctx, Proposal{Kind: kind, Epoch: 1, Point: o, Base: o - 1, CutTime: testTime, Consistency: ConsistencyCrash, Disks: []Disk{d}})
	require.NoError(tb, err)
}

// TestBigDisk goes through backend dir with parallel writers and readers: larger segments are read by ranges.
func TestBigDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 200 MiB")
	}
	ctx, store := t.Context(), openDir(t)
	r, err := Create(ctx, store, testLineage)
	require.NoError(t, err)
	rng := rand.New(rand.NewPCG(1, 2))
	image, buf := make([]byte, bigSize), make([]byte, 0, 40<<20)
	shipBig(t, r, KindBase, 1, 64<<20, 1<<20, rng, image, buf)
	shipBig(t, r, KindPoint, 2, 16<<20, 64<<10, rng, image, buf)
	shipBig(t, r, KindPoint, 3, 4<<20, 4<<10, rng, image, buf)
	check := func(want Seq) {
		sink := fileSink{make([]byte, bigSize)}
		m, err := r.Materialise(ctx, 3, sink, MaterialiseOptions{})
		require.NoError(t, err)
		require.Equal(t, want, m.Checkpoint)
		require.True(t, bytes.Equal(image, sink.p))
		src, err := r.SourceAt(ctx, 3, "disk-a")
		require.NoError(t, err)
		got := make([]byte, 3<<20+77)
		for range 10 {
			off := rng.Int64N(bigSize - int64(len(got)))
			require.NoError(t, src.ReadAt(ctx, got, off))
			require.True(t, bytes.Equal(image[off:off+int64(len(got))], got))
		}
	}
	check(0)
	a, err := NewApplier(r, ApplierOptions{Footer: testFooter})
	require.NoError(t, err)
	p, err := a.Advance(ctx, 0)
	require.NoError(t, err)
	require.Equal(t, int64(1), p.Batches)
	_, err = r.Checkpoint(ctx, 3)
	require.NoError(t, err)
	check(3)
}

type fileSink struct{ p []byte }

func (s fileSink) Disk(context.Context, DiskState) (DiskSink, error) { return memDisk(s.p), nil }

// BenchmarkCommit32MiB counts the store's requests for one point of 32 MiB of random data in one segment.
func BenchmarkCommit32MiB(b *testing.B) {
	for _, extentSize := range []int64{16 << 10, 64 << 10} {
		b.Run(map[int64]string{16 << 10: "extents-16K", 64 << 10: "extents-64K"}[extentSize], func(b *testing.B) {
			var requests atomic.Int64
			f := blobstoretest.NewFaulty(openDir(b), func(blobstoretest.Op, string, string) blobstoretest.Fault {
				requests.Add(1)
				return blobstoretest.None
			})
			r, err := Create(b.Context(), f, testLineage)
			require.NoError(b, err)
			rng := rand.New(rand.NewPCG(1, 2))
			image, buf := make([]byte, bigSize), make([]byte, 0, 40<<20)
			shipBig(b, r, KindBase, 1, 1<<20, 1<<20, rng, image, buf)
			requests.Store(0)
			b.SetBytes(32 << 20)
			for i := range b.N {
				shipBig(b, r, KindPoint, Ordinal(i+2), 32<<20, extentSize, rng, image, buf)
			}
			b.ReportMetric(float64(requests.Load())/float64(b.N), "requests/point")
		})
	}
}

// BenchmarkApply applies 64 MiB of 64 KiB extents in two overlapping points.
func BenchmarkApply(b *testing.B) {
	for _, extentSize := range []int64{4 << 10, 64 << 10, 1 << 20} {
		b.Run(map[int64]string{4 << 10: "extents-4K", 64 << 10: "extents-64K", 1 << 20: "extents-1M"}[extentSize], func(b *testing.B) {
			rng := rand.New(rand.NewPCG(1, 2))
			image, buf := make([]byte, bigSize), make([]byte, 0, 40<<20)
			r, err := Create(b.Context(), openDir(b), testLineage)
			require.NoError(b, err)
			a, err := NewApplier(r, ApplierOptions{Footer: testFooter})
			require.NoError(b, err)
			o := Ordinal(1)
			shipBig(b, r, KindBase, o, 1<<20, 1<<20, rng, image, buf)
			var spent time.Duration
			var written int64
			for b.Loop() {
				b.StopTimer()
				for range 2 {
					o++
					shipBig(b, r, KindPoint, o, 32<<20, extentSize, rng, image, buf)
				}
				b.StartTimer()
				start := time.Now()
				p, err := a.Advance(b.Context(), 0)
				require.NoError(b, err)
				spent += time.Since(start)
				written += p.Written
			}
			b.ReportMetric(float64(written)/(1<<20)/spent.Seconds(), "MiB/s")
		})
	}
}
