package replica

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

func TestApplyAndMaterialise(t *testing.T) {
	g := begun(t)
	g.wantPoint(g.r, 2, at2) // from the chain alone
	a := g.applier(g.r)
	p, err := a.Advance(t.Context(), 0)
	require.NoError(t, err)
	require.Equal(t, Seq(4), p.Applied)
	require.Equal(t, []Ordinal{2, 3}, p.Points)
	require.Equal(t, []Seq{3}, p.Checkpoints, "the manifest that ends the run of partials")
	g.wantDisks(at3)
	g.wantPoint(g.r, 2, at2)
	g.wantPoint(g.r, 3, at3)
	points, err := g.r.Points(t.Context())
	require.NoError(t, err)
	require.Len(t, points, 2)
	require.True(t, points[0].Processed && points[0].Checkpointed && points[1].Processed && !points[1].Checkpointed)
	// The footer is where a fixed VHD has it.
	f := make([]byte, 512)
	require.NoError(t, g.store.Container(testLineage.ReplicaContainer()).ReadPages(t.Context(), DiskBlobName("disk-a", 1), "", 1<<20, f))
	require.Equal(t, testFooter("disk-a", testSize), f)
	// Nothing new: nothing happens.
	p, err = a.Advance(t.Context(), 0)
	require.NoError(t, err)
	require.Zero(t, p.Batches)
}

// TestStops is I13.
func TestStops(t *testing.T) {
	g := begun(t)
	g.commit(g.partial(4, 1, 1, 3, 1, 0, parcel{"disk-a": {9: 9}}))
	g.commit(g.point(KindPoint, 5, 4, 1, 0, two(nil, content{1: 7})))
	g.commit(g.point(KindPoint, 6, 5, 1, 0, two(nil, content{2: 7})))
	g.commit(Proposal{Kind: KindClose, Failover: "f"})
	p, err := g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	require.Equal(t, []Seq{3, 4, 6}, p.Checkpoints, "end of the run, before the next run, its end")
	require.Equal(t, Seq(7), p.Applied, "a fence is not applied")
	_, err = g.r.Checkpoint(t.Context(), 7)
	require.NoError(t, err, "at rest below a close")
	for o := Ordinal(2); o <= 6; o++ {
		if o != 4 {
			s := memSink{}
			m, err := g.r.Materialise(t.Context(), o, s, MaterialiseOptions{})
			require.NoError(t, err)
			require.NotZero(t, m.Checkpoint)
		}
	}
	_, err = g.r.Materialise(t.Context(), 4, memSink{}, MaterialiseOptions{})
	require.ErrorIs(t, err, ErrNotFound, "a pass is no point")
	src, err := g.r.SourceAt(t.Context(), 5, "disk-a")
	require.NoError(t, err, "but any manifest can be compared with")
	b := make([]byte, blockSize)
	require.NoError(t, src.ReadAt(t.Context(), b, 9*blockSize))
	require.Equal(t, content{0: 9}, contentOf(b))
	require.NoError(t, src.ReadAt(t.Context(), b[:100], 9*blockSize+50), "unaligned")
	var n int64
	for r, err := range src.Extents(t.Context(), 0, testSize) {
		require.NoError(t, err)
		n += r.Len
	}
	require.Equal(t, int64(4*blockSize), n)
}

// TestInterruptedBatchResumesLarger is I10, I17 and proof 3: crash at every call of a batch, more points arrive,
// another applier goes on: byte-exact, whatever the crash left.
func TestInterruptedBatchResumesLarger(t *testing.T) {
	for _, fault := range []blobstoretest.Fault{blobstoretest.Crash, blobstoretest.CrashAfter, blobstoretest.Before, blobstoretest.After} {
		for n := int64(1); ; n++ {
			g := begun(t)
			_, err := g.applier(g.r).Advance(t.Context(), 0)
			require.NoError(t, err)
			g.commit(g.point(KindPoint, 4, 3, 1, 0, two(content{3: 30, 4: 40}, content{3: 30})))
			g.commit(g.point(KindPoint, 5, 4, 1, 0, two(content{4: 41, 8: 80}, content{4: 41})))
			dying, f := g.other(blobstoretest.FailNth(n, fault))
			p, err := g.applier(dying).Advance(t.Context(), 0)
			if f.Calls() < n {
				require.NoError(t, err)
				require.Equal(t, int64(1), p.Batches)
				break
			}
			g.commit(g.point(KindPoint, 6, 5, 1, 0, two(content{8: 81}, content{0: 0, 9: 90})))
			if err != nil {
				r, _ := g.other(nil)
				g.r = r
			}
			_, err = g.applier(g.r).Advance(t.Context(), 0)
			require.NoError(t, err)
			g.wantDisks(two(content{0: 1, 1: 3, 2: 4, 3: 30, 4: 41, 8: 81}, content{0: 0, 3: 30, 4: 41, 5: 4, 9: 90}))
			a, tt := g.number("disk-b")
			require.Equal(t, [2]Seq{7, 7}, [2]Seq{a, tt})
		}
	}
}

// TestStaleApplier is I11: an applier that was overtaken changes nothing.
func TestStaleApplier(t *testing.T) {
	g := begun(t)
	var stolen bool
	var slow *Replica
	slow, _ = g.other(func(op blobstoretest.Op, _, _ string) blobstoretest.Fault {
		if op == blobstoretest.OpWritePages && !stolen {
			stolen = true // while its write is on the way, another applier takes over and finishes
			g.commit(g.point(KindPoint, 4, 3, 1, 0, two(content{0: 99}, nil)))
			_, err := g.applier(g.r).Advance(t.Context(), 0)
			require.NoError(t, err)
		}
		return blobstoretest.None
	})
	_, err := g.applier(slow).Advance(t.Context(), 0)
	require.ErrorIs(t, err, ErrLeaseLost)
	g.wantDisks(two(content{0: 99, 1: 3, 2: 4}, content{0: 2, 5: 4}))

	polite, err := NewApplier(slow, ApplierOptions{Footer: testFooter})
	require.NoError(t, err)
	c := g.store.Container(testLineage.ReplicaContainer())
	require.NoError(t, c.AcquireLease(t.Context(), DiskBlobName("disk-a", 1), "11111111-1111-1111-1111-111111111111", blobstore.MinLease))
	_, err = polite.Advance(t.Context(), 0)
	require.ErrorIs(t, err, ErrBusy)
}

// TestVoidCheckpoint is I15: a checkpointer that slept loses to a void record, and drops its own snapshots.
func TestVoidCheckpoint(t *testing.T) {
	g := begun(t)
	_, err := g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	_, err = g.r.Checkpoint(t.Context(), 2)
	require.ErrorIs(t, err, ErrInvalid, "a partial is never a checkpoint")
	slow, _ := g.other(func(op blobstoretest.Op, _, name string) blobstoretest.Fault {
		if op == blobstoretest.OpPut && name == checkpointName(4) {
			_, err := g.r.VoidCheckpoint(t.Context(), 4)
			require.NoError(t, err)
		}
		return blobstoretest.None
	})
	_, err = slow.Checkpoint(t.Context(), 4)
	require.ErrorIs(t, err, ErrVoid)
	n := 0
	for _, err := range g.store.Container(testLineage.ReplicaContainer()).ListSnapshots(t.Context(), DiskBlobName("disk-a", 1)) {
		require.NoError(t, err)
		n++
	}
	require.Equal(t, 1, n, "only the one of checkpoint 3")
	_, err = g.r.Checkpoint(t.Context(), 4)
	require.ErrorIs(t, err, ErrVoid)
	kept, err := g.r.VoidCheckpoint(t.Context(), 3)
	require.NoError(t, err)
	require.False(t, kept.Void, "a checkpoint that exists stays")
}
