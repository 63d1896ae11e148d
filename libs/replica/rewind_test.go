package replica

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// fenced is begun with points 4 and 5, one task of an unfinished pass 6 above them, and the close of failover f.
func fenced(t *testing.T) *rig {
	g := begun(t)
	g.commit(g.point(KindPoint, 4, 3, 1, 0, two(content{0: 0, 1: 5, 6: 5}, content{5: 0})))
	g.commit(g.point(KindPoint, 5, 4, 1, 0, two(content{6: 6}, content{7: 6})))
	g.commit(g.partial(6, 1, 2, 5, 1, 0, parcel{"disk-b": {8: 7}})) // only the pass changed it
	g.close("f")
	return g
}

var (
	at4 = two(content{1: 5, 2: 4, 6: 5}, content{0: 2})
	at5 = two(content{1: 5, 2: 4, 6: 6}, content{0: 2, 7: 6})
	all = map[Ordinal]parcel{2: at2, 3: at3, 4: at4, 5: at5}
)

func (g *rig) close(failover string) Result {
	g.t.Helper()
	res, err := g.r.CloseLineage(g.t.Context(), FenceOptions{Failover: failover})
	require.NoError(g.t, err)
	return res
}

func (g *rig) rewind(r *Replica, failover string, target Ordinal) RewindResult {
	g.t.Helper()
	res, err := r.Rewind(g.t.Context(), RewindOptions{Failover: failover, Target: target, Parallel: 1})
	require.NoError(g.t, err)
	return res
}

// wantAt reads the disks as they are at a manifest.
func (g *rig) wantAt(seq Seq, want parcel) {
	g.t.Helper()
	for id, w := range want {
		src, err := g.r.SourceAt(g.t.Context(), seq, id)
		require.NoError(g.t, err)
		b := make([]byte, testSize)
		require.NoError(g.t, src.ReadAt(g.t.Context(), b, 0))
		require.True(g.t, w.equal(contentOf(b)), "manifest %d, disk %s\nwant %v\nhave %v", seq, id, w, contentOf(b))
	}
}

func (g *rig) state() *State {
	g.t.Helper()
	st, err := g.r.Refresh(g.t.Context())
	require.NoError(g.t, err)
	return st
}

// TestRewind is I20: back, further back, forth, and what follows the open; with no checkpoint, with checkpoints below, and
// with disks at rest anywhere.
func TestRewind(t *testing.T) {
	for name, applied := range map[string]bool{"journals alone": false, "applied and checkpointed": true} {
		t.Run(name, func(t *testing.T) {
			g := fenced(t)
			advance := func(want parcel) {
				if applied {
					p, err := g.applier(g.r).Advance(t.Context(), 0)
					require.NoError(t, err)
					_, err = g.r.Checkpoint(t.Context(), p.Applied)
					require.NoError(t, err)
					g.wantDisks(want)
				}
			}
			if applied {
				_, err := g.applier(g.r).Advance(t.Context(), 6)
				require.NoError(t, err)
			}
			head := g.state().Head
			for _, target := range []Ordinal{3, 2, 4, 5, 2} {
				res := g.rewind(g.r, "f", target)
				head++
				require.Equal(t, Committed, res.Outcome)
				require.Equal(t, head, res.Seq)
				require.Equal(t, 1, res.Tries)
				require.Positive(t, res.SetBack)
				g.wantAt(res.Seq, all[target])
				st := g.state()
				require.Equal(t, target, st.StateOrdinal)
				require.Equal(t, Ordinal(6), st.Highest)
				require.Equal(t, st.points[target], st.Newest)
				require.False(t, st.Running)
				p, _ := st.Pass(6)
				require.False(t, p.Complete)
				advance(all[target])
				for o, want := range all {
					g.wantPoint(g.r, o, want)
				}
				calls, f := g.other(nil)
				before := f.Calls()
				again := g.rewind(calls, "f", target)
				require.Equal(t, AlreadyCommitted, again.Outcome)
				require.Equal(t, res.Seq, again.Seq)
				require.Equal(t, res.Segments, again.Segments)
				require.Equal(t, res.Bytes, again.Bytes)
				require.LessOrEqual(t, f.Calls()-before, int64(4))
				require.Equal(t, head, g.state().Head)
			}
			points, err := g.r.Points(t.Context())
			require.NoError(t, err)
			require.Len(t, points, 4)
			// A host whose base is 5 may not go on from 2.
			open, err := g.r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}})
			require.NoError(t, err)
			require.Equal(t, Epoch(2), open.Epoch)
			require.Zero(t, open.Forward)
			_, err = g.r.Commit(t.Context(), g.point(KindPoint, 7, 5, 2, open.Seq, two(nil, nil)))
			require.ErrorIs(t, err, ErrBaseAhead)
			// One whose base is 2 may.
			g.commit(g.point(KindPoint, 7, 2, 2, open.Seq, two(content{9: 9}, content{0: 0})))
			at7 := two(content{0: 1, 1: 3, 9: 9}, content{})
			g.wantPoint(g.r, 7, at7)
			g.wantPoint(g.r, 5, at5)
			advance(at7)
			// The next failover goes back over all of it.
			g.close("f2")
			g.wantAt(g.rewind(g.r, "f2", 5).Seq, at5)
			advance(at5)
			g.wantPoint(g.r, 7, at7)
			open, err = g.r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f2"}, Forward: true,
				Rewind: RewindOptions{Parallel: 1}})
			require.NoError(t, err)
			require.Equal(t, Committed, open.Forward.Outcome)
			require.Equal(t, Epoch(3), open.Epoch)
			g.commit(g.point(KindPoint, 8, 7, 3, open.Seq, two(content{9: 8}, nil)))
			g.wantPoint(g.r, 8, two(content{0: 1, 1: 3, 9: 8}, content{}))
			advance(two(content{0: 1, 1: 3, 9: 8}, content{}))
		})
	}
}

func TestRewindOfNothing(t *testing.T) {
	unfinished := fenced(t)
	require.Equal(t, RewindResult{Outcome: NothingToDo, Seq: 6, TargetSeq: 6, Tries: 1}, unfinished.rewind(unfinished.r, "f", 5), "only a partial is above")
	exact, err := unfinished.r.Rewind(t.Context(), RewindOptions{Failover: "f", Target: 5, Exact: true})
	require.NoError(t, err)
	require.Equal(t, Committed, exact.Outcome)
	require.Equal(t, int64(blockSize), exact.SetBack)
	unfinished.wantAt(exact.Seq, at5)
	g := begun(t)
	g.close("f")
	res := g.rewind(g.r, "f", 3)
	require.Equal(t, RewindResult{Outcome: NothingToDo, Seq: 4, TargetSeq: 4, Tries: 1}, res)
	require.Equal(t, "nothing to do", res.Outcome.String())
	rewound := g.rewind(g.r, "f", 2)
	_, err = g.r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}})
	require.NoError(t, err)
	g.close("f2")
	res = g.rewind(g.r, "f2", 2)
	require.Equal(t, NothingToDo, res.Outcome)
	require.Equal(t, rewound.Seq, res.Seq, "the first failover's rewind leads there")
	require.Equal(t, Seq(8), g.state().Head)
}

func TestRewindRefusals(t *testing.T) {
	g := begun(t)
	try := func(failover string, target Ordinal) error {
		_, err := g.r.Rewind(t.Context(), RewindOptions{Failover: failover, Target: target})
		return err
	}
	require.ErrorIs(t, try("f", 2), ErrNotFenced)
	g.close("f")
	require.ErrorIs(t, try("g", 2), ErrNotFenced)
	require.ErrorIs(t, try("f", 9), ErrNotFound)
	require.ErrorIs(t, try("f", 1), ErrNotFound, "a pass is no point")
	require.ErrorIs(t, try("f", 0), ErrInvalid)
	require.ErrorIs(t, try("no/token", 2), ErrInvalid)
	_, err := g.r.Rewind(t.Context(), RewindOptions{Failover: "f", Target: 2, Parallel: 17})
	require.ErrorIs(t, err, ErrInvalid)
	require.Equal(t, Seq(5), g.state().Head)
}

// TestRewindNames is rule 25: segments are named by the failover, in the journal.
func TestRewindNames(t *testing.T) {
	g := fenced(t)
	m, err := g.r.Manifest(t.Context(), g.rewind(g.r, "f", 2).Seq)
	require.NoError(t, err)
	require.Len(t, m.Disks, 2)
	for _, d := range m.Disks {
		require.Len(t, d.Segments, 1)
		require.Equal(t, Journal, d.Segments[0].Container)
		require.True(t, strings.HasPrefix(d.Segments[0].Name, "seg/rewind-f-"), d.Segments[0].Name)
	}
	require.True(t, validSegmentName(SegmentKey{Kind: KindRewind, Failover: strings.Repeat("f", maxFailover), Tx: NewTx(),
		DiskID: strings.Repeat("d", 64), K: 1 << 20}.name()))
}

// TestRewindDisks: disks that came, went or were replaced between the target and now.
func TestRewindDisks(t *testing.T) {
	g := begun(t)
	g.commit(g.point(KindPoint, 4, 3, 1, 0, parcel{"disk-a": {2: 5}, "disk-c": {1: 5}})) // b goes, c comes
	_, err := g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	g.close("f")
	res := g.rewind(g.r, "f", 3)
	back := parcel{"disk-a": at3["disk-a"], "disk-b": at3["disk-b"], "disk-c": {}}
	g.wantAt(res.Seq, back)
	g.wantPoint(g.r, 3, at3)
	_, err = g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	g.wantDisks(back)
	c, err := g.r.Checkpoint(t.Context(), res.Seq)
	require.NoError(t, err)
	require.Len(t, c.Disks, 3)
	// And forward again.
	at4 := parcel{"disk-a": {0: 1, 1: 3, 2: 5}, "disk-c": {1: 5}}
	res = g.rewind(g.r, "f", 4)
	g.wantAt(res.Seq, at4)
	g.wantAt(res.Seq, parcel{"disk-b": {}})
	_, err = g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	g.wantDisks(at4)

	open, err := g.r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}})
	require.NoError(t, err)
	p := g.point(KindPoint, 5, 4, 2, open.Seq, parcel{"disk-a": nil})
	p.Disks[0].Gen = 2
	g.commit(p)
	g.close("f2")
	_, err = g.r.Rewind(t.Context(), RewindOptions{Failover: "f2", Target: 4})
	require.ErrorIs(t, err, ErrDiskReplaced)
	require.True(t, IsRefusal(err))
}

// TestRewindOverRetiredRange: what was changed is not known any more, so every disk is set back whole.
func TestRewindOverRetiredRange(t *testing.T) {
	g := grown(t)
	g.retire(Retention{Retired: []RetiredRange{{From: 6, To: 8, Anchor: *g.anchorAt(8)}}})
	g.r, _ = g.other(nil)
	g.close("f")
	res := g.rewind(g.r, "f", 4)
	want := two(content{0: 1, 1: 3, 2: 4, 6: 4}, content{0: 2, 4: 1, 5: 4})
	require.Equal(t, int64(2*testSize), res.SetBack)
	_, err := g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	g.wantDisks(want)
	g.wantAt(res.Seq, want)
}

// TestRewindFailsAtEveryCall is I21: one fault at any call, before or after its effect, then repeated by another process:
// one rewind, with the right content.
func TestRewindFailsAtEveryCall(t *testing.T) {
	for _, fault := range []blobstoretest.Fault{blobstoretest.Before, blobstoretest.After, blobstoretest.Crash, blobstoretest.CrashAfter} {
		for n := int64(1); ; n++ {
			g := fenced(t)
			_, err := g.applier(g.r).Advance(t.Context(), 0)
			require.NoError(t, err)
			r, f := g.other(blobstoretest.FailNth(n, fault))
			o := RewindOptions{Failover: "f", Target: 2, Parallel: 1}
			_, err = r.Rewind(t.Context(), o)
			quiet := f.Calls() < n
			if err != nil {
				require.False(t, IsRefusal(err), "%v", err)
				if n%2 == 0 { // the same process, or the next
					f.Revive()
				} else {
					r, _ = g.other(nil)
				}
				_, err = r.Rewind(t.Context(), o)
				require.NoError(t, err)
			}
			st := g.state()
			require.Equal(t, Seq(9), st.Head, "fault %d at call %d", fault, n)
			g.wantAt(9, at2)
			_, err = g.applier(g.r).Advance(t.Context(), 0)
			require.NoError(t, err)
			g.wantDisks(at2)
			if quiet {
				require.Greater(t, n, int64(10))
				break
			}
		}
	}
}

// meanwhile runs fn once, just before the n-th put of an object whose name begins with prefix.
func meanwhile(prefix string, fn func()) blobstoretest.Hook {
	var done atomic.Bool // the store is called by several workers at once
	return func(op blobstoretest.Op, _, name string) blobstoretest.Fault {
		if op == blobstoretest.OpPut && strings.HasPrefix(name, prefix) && done.CompareAndSwap(false, true) {
			fn()
		}
		return blobstoretest.None
	}
}

// TestRewindRaces is I18 for a rewind: on any other head it is computed again, and not at all when its fence is gone.
func TestRewindRaces(t *testing.T) {
	for _, prefix := range []string{"seg/", "log/"} {
		t.Run("change of point before "+prefix, func(t *testing.T) {
			g := fenced(t)
			r, _ := g.other(meanwhile(prefix, func() { g.rewind(g.r, "f", 2) }))
			res := g.rewind(r, "f", 4)
			require.Equal(t, Seq(10), res.Seq)
			require.Equal(t, 2, res.Tries)
			g.wantAt(9, at2)
			g.wantAt(10, at4)
		})
		t.Run("the same rewind before "+prefix, func(t *testing.T) {
			g := fenced(t)
			r, _ := g.other(meanwhile(prefix, func() { g.rewind(g.r, "f", 4) }))
			res := g.rewind(r, "f", 4)
			require.Equal(t, AlreadyCommitted, res.Outcome)
			require.Equal(t, Seq(9), res.Seq)
			require.Equal(t, Seq(9), g.state().Head)
		})
		t.Run("open before "+prefix, func(t *testing.T) {
			g := fenced(t)
			r, _ := g.other(meanwhile(prefix, func() {
				open, err := g.r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}})
				require.NoError(t, err)
				g.commit(g.point(KindPoint, 7, 5, 2, open.Seq, two(nil, content{8: 0})))
				g.close("f2")
			}))
			_, err := r.Rewind(t.Context(), RewindOptions{Failover: "f", Target: 4, Parallel: 1})
			require.ErrorIs(t, err, ErrNotFenced)
			require.Equal(t, Seq(11), g.state().Head)
			g.wantPoint(g.r, 7, at5)
		})
	}
}

// TestLateRewindBeforeOpen: the put of a rewind whose sender gave up lands while the lineage is reopened. The open stands on
// the head it was decided for, so the rewind is rewound forward, not left under it unseen.
func TestLateRewindBeforeOpen(t *testing.T) {
	reopen := func(b bugs) (*rig, Reopened) {
		g := fenced(t)
		r, _ := g.other(meanwhile("log/", func() { g.rewind(g.r, "f", 2) }))
		r.bugs = b
		open, err := r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f", Reason: "cancelled"}, Forward: true,
			Rewind: RewindOptions{Parallel: 1}})
		require.NoError(t, err)
		return g, open
	}
	g, open := reopen(bugs{})
	require.Equal(t, Committed, open.Forward.Outcome)
	require.Equal(t, Seq(11), open.Seq)
	g.wantAt(11, at5)
	g.commit(g.point(KindPoint, 7, 5, 2, open.Seq, two(nil, nil)))

	g, open = reopen(bugs{ReopenAnywhere: true})
	require.Equal(t, Seq(10), open.Seq)
	_, err := g.r.Commit(t.Context(), g.point(KindPoint, 7, 5, 2, open.Seq, two(nil, nil)))
	require.ErrorIs(t, err, ErrBaseAhead)
}

func TestCloseAndReopen(t *testing.T) {
	g := begun(t)
	ctx := t.Context()
	_, err := g.r.ReopenLineage(ctx, ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}})
	require.ErrorIs(t, err, ErrNotFenced)
	require.Equal(t, Result{Outcome: Committed, Seq: 5, Epoch: 1}, g.close("f"))
	require.Equal(t, Result{Outcome: AlreadyCommitted, Seq: 5, Epoch: 1}, g.close("f"))
	_, err = g.r.CloseLineage(ctx, FenceOptions{Failover: "f2"})
	require.ErrorIs(t, err, ErrClosed)
	_, err = g.r.ReopenLineage(ctx, ReopenOptions{FenceOptions: FenceOptions{Failover: "f2"}, Forward: true})
	require.ErrorIs(t, err, ErrNotFenced)
	for i, want := range []Outcome{Committed, AlreadyCommitted} {
		open, err := g.r.ReopenLineage(ctx, ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}, Forward: i == 0})
		require.NoError(t, err)
		require.Equal(t, Reopened{Result: Result{Outcome: want, Seq: 6, Epoch: 2}}, open)
	}
	_, err = g.r.CloseLineage(ctx, FenceOptions{Failover: "f"})
	require.ErrorIs(t, err, ErrReopened)
	require.True(t, IsRefusal(err))
	require.Equal(t, Result{Outcome: Committed, Seq: 7, Epoch: 2}, g.close("f2"))
}

// TestRewindBounds: a segment that is damaged, and a context that ends, leave no rewind.
func TestRewindBounds(t *testing.T) {
	g := fenced(t)
	ctx, cancel := context.WithCancel(t.Context())
	r, _ := g.other(meanwhile("seg/", cancel))
	_, err := r.Rewind(ctx, RewindOptions{Failover: "f", Target: 2})
	require.ErrorIs(t, err, context.Canceled)
	m, err := g.r.Find(t.Context(), 4)
	require.NoError(t, err)
	journal := g.store.Container(testLineage.JournalContainer())
	require.NoError(t, journal.Delete(t.Context(), m.Disks[0].Segments[0].Name, blobstore.Conditions{}))
	_, err = g.r.Rewind(t.Context(), RewindOptions{Failover: "f", Target: 2})
	require.ErrorIs(t, err, blobstore.ErrNotFound)
	require.Equal(t, Seq(8), g.state().Head)
}
