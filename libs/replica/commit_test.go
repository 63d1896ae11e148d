package replica

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// begun is a rig with pass 1 (two tasks), base 2 and point 3 in the chain: manifests 1 to 4.
func begun(t *testing.T) *rig {
	g := newRig(t)
	g.commit(g.partial(1, 1, 2, 0, 1, 0, parcel{"disk-a": {0: 1, 1: 1}}))
	g.commit(g.partial(1, 2, 2, 0, 1, 0, parcel{"disk-b": {0: 2}}))
	g.commit(g.point(KindBase, 2, 1, 1, 0, two(content{1: 3}, nil)))
	g.commit(g.point(KindPoint, 3, 2, 1, 0, two(content{2: 4}, content{5: 4})))
	return g
}

var (
	at2 = two(content{0: 1, 1: 3}, content{0: 2})
	at3 = two(content{0: 1, 1: 3, 2: 4}, content{0: 2, 5: 4})
)

// TestAdmission is I3, I4, I5, I6, I9: who may follow, and with which refusal.
func TestAdmission(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(g *rig) Proposal
		want error
		dup  Seq
	}{
		"next point":              {do: func(g *rig) Proposal { return g.point(KindPoint, 4, 3, 1, 0, two(nil, nil)) }},
		"a gap in ordinals":       {do: func(g *rig) Proposal { return g.point(KindPoint, 9, 3, 1, 0, two(nil, nil)) }},
		"an older base":           {do: func(g *rig) Proposal { return g.point(KindPoint, 4, 2, 1, 0, two(nil, nil)) }},
		"a higher epoch":          {do: func(g *rig) Proposal { return g.point(KindPoint, 4, 3, 7, 0, two(nil, nil)) }},
		"the same point":          {do: func(g *rig) Proposal { return g.point(KindPoint, 3, 2, 1, 0, two(nil, nil)) }, dup: 4},
		"the base again":          {do: func(g *rig) Proposal { return g.point(KindBase, 2, 1, 1, 0, two(nil, nil)) }, dup: 3},
		"a task of the pass":      {do: func(g *rig) Proposal { return g.partial(1, 2, 2, 0, 1, 0, nil) }, dup: 2},
		"another k for the pass":  {do: func(g *rig) Proposal { return g.partial(1, 3, 3, 0, 1, 0, nil) }, want: ErrOrdinalUsed},
		"a point named as a pass": {do: func(g *rig) Proposal { return g.point(KindPoint, 1, 0, 1, 0, two(nil, nil)) }, want: ErrOrdinalUsed},
		"a pass named as a point": {do: func(g *rig) Proposal { return g.partial(3, 1, 1, 0, 1, 0, nil) }, want: ErrOrdinalUsed},
		"base above the state":    {do: func(g *rig) Proposal { return g.point(KindPoint, 5, 4, 1, 0, two(nil, nil)) }, want: ErrBaseAhead},
		"a pass on that":          {do: func(g *rig) Proposal { return g.partial(5, 1, 1, 4, 1, 0, nil) }, want: ErrBaseAhead},
		"an open never made":      {do: func(g *rig) Proposal { return g.point(KindPoint, 4, 3, 1, 2, two(nil, nil)) }, want: ErrStaleOpen},
		"an older ordinal": {do: func(g *rig) Proposal {
			g.commit(g.point(KindPoint, 5, 3, 1, 0, two(nil, nil)))
			return g.point(KindPoint, 4, 3, 1, 0, two(nil, nil))
		}, want: ErrOrdinalUsed},
		"an older epoch": {do: func(g *rig) Proposal {
			g.commit(g.point(KindPoint, 4, 3, 2, 0, two(nil, nil)))
			return g.point(KindPoint, 5, 4, 1, 0, two(nil, nil))
		}, want: ErrStaleEpoch},
		"half a pass as base": {do: func(g *rig) Proposal {
			g.commit(g.partial(4, 1, 2, 3, 1, 0, nil))
			return g.point(KindPoint, 5, 4, 1, 0, two(nil, nil))
		}, want: ErrBaseAhead},
		"a whole pass as base": {do: func(g *rig) Proposal {
			g.commit(g.partial(4, 1, 2, 3, 1, 0, nil))
			g.commit(g.partial(4, 2, 2, 3, 1, 0, nil))
			return g.point(KindPoint, 5, 4, 1, 0, two(nil, nil))
		}},
		"a late task of an older pass": {do: func(g *rig) Proposal {
			g.commit(g.partial(4, 1, 2, 3, 1, 0, nil))
			g.commit(g.point(KindPoint, 5, 3, 1, 0, two(nil, nil)))
			return g.partial(4, 2, 2, 3, 1, 0, nil)
		}, want: ErrOrdinalUsed},
		"a pass that disagrees with itself": {do: func(g *rig) Proposal {
			g.commit(g.partial(4, 1, 2, 3, 1, 0, nil))
			return g.partial(4, 2, 2, 2, 1, 0, nil)
		}, want: ErrPassOrder},
		"above a close": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			return g.point(KindPoint, 4, 3, 1, 0, two(nil, nil))
		}, want: ErrClosed},
		"a task from before an open": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			g.commit(Proposal{Kind: KindOpen, Failover: "f1"})
			return g.point(KindPoint, 4, 3, 5, 0, two(nil, nil))
		}, want: ErrStaleOpen},
		"a task of the open with its old epoch": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			res := g.commit(Proposal{Kind: KindOpen, Failover: "f1"})
			return g.point(KindPoint, 4, 3, res.Epoch-1, res.Seq, two(nil, nil))
		}, want: ErrStaleEpoch},
		"a task of the open": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			res := g.commit(Proposal{Kind: KindOpen, Failover: "f1"})
			return g.point(KindPoint, 4, 3, res.Epoch, res.Seq, two(nil, nil))
		}},
		"close twice": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			return Proposal{Kind: KindClose, Failover: "f1"}
		}, dup: 5},
		"close again after its open": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			g.commit(Proposal{Kind: KindOpen, Failover: "f1"})
			return Proposal{Kind: KindClose, Failover: "f1"}
		}, dup: 5},
		"close over another's": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			return Proposal{Kind: KindClose, Failover: "f2"}
		}, want: ErrClosed},
		"open of another": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			return Proposal{Kind: KindOpen, Failover: "f2"}
		}, want: ErrNotFenced},
		"open without a close": {do: func(g *rig) Proposal { return Proposal{Kind: KindOpen, Failover: "f1"} }, want: ErrNotFenced},
		"rewind without a close": {do: func(g *rig) Proposal {
			return Proposal{Kind: KindRewind, Failover: "f1", Base: 2}
		}, want: ErrNotFenced},
		"rewind on another head": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			return Proposal{Kind: KindRewind, Failover: "f1", Base: 2, At: 5}
		}, want: ErrHeadMoved},
		"base after a rewind": {do: func(g *rig) Proposal {
			g.commit(Proposal{Kind: KindClose, Failover: "f1"})
			g.commit(Proposal{Kind: KindRewind, Failover: "f1", Base: 2, At: 6})
			res := g.commit(Proposal{Kind: KindOpen, Failover: "f1"})
			return g.point(KindPoint, 4, 3, res.Epoch, res.Seq, two(nil, nil))
		}, want: ErrBaseAhead},
		"exactly here":     {do: func(g *rig) Proposal { p := g.partial(4, 1, 1, 3, 1, 0, nil); p.At = 5; return p }},
		"exactly, too old": {do: func(g *rig) Proposal { p := g.partial(4, 1, 1, 3, 1, 0, nil); p.At = 4; return p }, want: ErrHeadMoved},
	} {
		t.Run(name, func(t *testing.T) {
			g := begun(t)
			p := c.do(g)
			st, err := g.r.Refresh(t.Context())
			require.NoError(t, err)
			head := st.Head
			// A process with a stale view answers the same.
			res, err := g.r.Commit(t.Context(), p)
			after, rerr := g.r.Refresh(t.Context())
			require.NoError(t, rerr)
			switch {
			case c.want != nil:
				require.ErrorIs(t, err, c.want)
				require.True(t, IsRefusal(err))
				require.Equal(t, head, after.Head)
			case c.dup != 0:
				require.NoError(t, err)
				require.Equal(t, AlreadyCommitted, res.Outcome)
				require.Equal(t, c.dup, res.Seq)
				require.Equal(t, head, after.Head)
			default:
				require.NoError(t, err)
				require.Equal(t, Result{Outcome: Committed, Seq: head + 1, Epoch: after.Epoch}, res)
			}
		})
	}
}

func TestPointNeedsABase(t *testing.T) {
	g := newRig(t)
	_, err := g.r.Commit(t.Context(), g.point(KindPoint, 1, 0, 1, 0, two(nil, nil)))
	require.ErrorIs(t, err, ErrNoBase)
}

// TestFailAtEveryCall is I8: a commit that meets one fault at any call, before or after its effect, ends in the
// same history once the task is redelivered.
func TestFailAtEveryCall(t *testing.T) {
	for _, fault := range []blobstoretest.Fault{blobstoretest.Before, blobstoretest.After, blobstoretest.Crash, blobstoretest.CrashAfter} {
		for n := int64(1); ; n++ {
			g := begun(t)
			r, f := g.other(blobstoretest.FailNth(n, fault))
			try := func(r *Replica) (Result, error) {
				d, err := ship(t.Context(), r, KindPoint, 4, 0, NewTx(), two(content{7: 9}, content{0: 9}))
				if err != nil {
					return Result{}, err
				}
				return r.Commit(t.Context(), Proposal{Kind: KindPoint, Epoch: 1, Point: 4, Base: 3, CutTime: testTime,
					Consistency: ConsistencyCrash, Disks: d})
			}
			_, err := try(r)
			quiet := f.Calls() < n
			if err != nil {
				require.False(t, IsRefusal(err), "%v", err)
				r, _ = g.other(nil)
				res, err := try(r)
				require.NoError(t, err)
				require.Equal(t, Seq(5), res.Seq)
			}
			want := two(content{0: 1, 1: 3, 2: 4, 7: 9}, content{0: 9, 5: 4})
			g.wantPoint(g.r, 4, want)
			st, err := g.r.Refresh(t.Context())
			require.NoError(t, err)
			require.Equal(t, Seq(5), st.Head)
			if quiet {
				break
			}
		}
	}
}

// TestHeldTask is proof 3: a task is held, the next point commits, the first is redelivered: nothing changes.
func TestHeldTask(t *testing.T) {
	g := begun(t)
	held := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 50}, nil)) // shipped, but its commit waits
	stale, _ := g.other(nil)
	g.commit(g.point(KindPoint, 5, 3, 2, 0, two(content{2: 60}, nil)))
	a := g.applier(g.r)
	_, err := a.Advance(t.Context(), 0)
	require.NoError(t, err)
	_, err = stale.Commit(t.Context(), held)
	require.ErrorIs(t, err, ErrStaleEpoch)
	_, err = a.Advance(t.Context(), 0)
	require.NoError(t, err)
	g.wantDisks(two(content{0: 1, 1: 3, 2: 60}, content{0: 2, 5: 4}))

	// A redelivery of one that had committed is success and writes nothing.
	again := g.point(KindPoint, 3, 2, 1, 0, two(content{2: 77}, nil))
	res, err := stale.Commit(t.Context(), again)
	require.NoError(t, err)
	require.Equal(t, AlreadyCommitted, res.Outcome)
	g.wantPoint(g.r, 3, at3)
}

// TestTwoShippersOneTask is proof 3: one history, no error.
func TestTwoShippersOneTask(t *testing.T) {
	g := begun(t)
	p1 := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 5}, nil))
	p2 := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 5}, nil))
	r2, _ := g.other(nil)
	res1, err := g.r.Commit(t.Context(), p1)
	require.NoError(t, err)
	res2, err := r2.Commit(t.Context(), p2)
	require.NoError(t, err)
	require.Equal(t, Committed, res1.Outcome)
	require.Equal(t, AlreadyCommitted, res2.Outcome)
	require.Equal(t, res1.Seq, res2.Seq)

	// Racing for real, many times over.
	for o := Ordinal(5); o < 25; o++ {
		results := make(chan Outcome, 2)
		for _, r := range []*Replica{g.r, r2} {
			p := g.point(KindPoint, o, o-1, 1, 0, two(content{2: uint64(o)}, nil))
			go func() {
				res, err := r.Commit(t.Context(), p)
				if err != nil {
					t.Error(err)
				}
				results <- res.Outcome
			}()
		}
		got := []Outcome{<-results, <-results}
		require.ElementsMatch(t, []Outcome{Committed, AlreadyCommitted}, got)
	}
	points, err := g.r.Points(t.Context())
	require.NoError(t, err)
	require.Len(t, points, 24-2+1)
}

// TestAbandonedPointCommitsLate is proof 3: the host kept the older base, so the next delta covers it.
func TestAbandonedPointCommitsLate(t *testing.T) {
	g := begun(t)
	late := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 50}, nil))
	// The scheduler gave 4 up and raised the epoch in its record; the worker does not know.
	g.commit(late)
	g.commit(g.point(KindPoint, 5, 3, 2, 0, two(content{2: 50, 3: 51}, nil))) // everything since base 3
	g.wantPoint(g.r, 4, two(content{0: 1, 1: 3, 2: 50}, content{0: 2, 5: 4}))
	g.wantPoint(g.r, 5, two(content{0: 1, 1: 3, 2: 50, 3: 51}, content{0: 2, 5: 4}))
}

func TestOpenOfNoLineage(t *testing.T) {
	_, err := Open(t.Context(), blobstoretest.NewMemory(), testLineage)
	require.ErrorIs(t, err, ErrNoLineage)
	g := newRig(t)
	var have []Lineage
	for l, err := range Lineages(t.Context(), g.store) {
		require.NoError(t, err)
		have = append(have, l)
	}
	require.Equal(t, []Lineage{testLineage}, have)
}

func TestPassProgress(t *testing.T) {
	g := begun(t)
	g.commit(g.partial(4, 3, 4, 3, 1, 0, nil))
	p, err := g.r.PassProgress(t.Context(), 4, 4)
	require.NoError(t, err)
	require.Equal(t, PassProgress{Ordinal: 4, K: 4, Done: 1, Missing: []uint32{1, 2, 4}, Last: 5}, p)
	p, err = g.r.PassProgress(t.Context(), 1, 2)
	require.NoError(t, err)
	require.True(t, p.Complete)
	p, err = g.r.PassProgress(t.Context(), 9, 2)
	require.NoError(t, err)
	require.Equal(t, []uint32{1, 2}, p.Missing)
}

func TestConfig(t *testing.T) {
	g := newRig(t)
	id, err := g.r.PutConfig(t.Context(), []byte(`{"cpus":2}`))
	require.NoError(t, err)
	again, err := g.r.PutConfig(t.Context(), []byte(`{"cpus":2}`))
	require.NoError(t, err)
	require.Equal(t, id, again)
	b, err := g.r.Config(t.Context(), id)
	require.NoError(t, err)
	require.JSONEq(t, `{"cpus":2}`, string(b))
	_, err = g.r.Config(t.Context(), "../x")
	require.ErrorIs(t, err, ErrInvalid)
}

// TestComparingPassMarksItsPlace is rule 13. An abandoned point is on its way while a pass compares: what is equal
// now would not be sent, so either the mark comes first and the point is refused, or the point and the mark is.
func TestComparingPassMarksItsPlace(t *testing.T) {
	for _, markFirst := range []bool{true, false} {
		g := begun(t)
		late := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 66}, nil))
		src, err := g.r.SourceAt(t.Context(), 4, "disk-a")
		require.NoError(t, err)
		b := make([]byte, testSize)
		require.NoError(t, src.ReadAt(t.Context(), b, 0))
		require.Equal(t, at3["disk-a"], contentOf(b))
		mark := g.partial(5, 1, 2, 3, 2, 0, nil)
		mark.At = 5 // exactly above what was compared with
		if !markFirst {
			g.commit(late)
			_, err := g.r.Commit(t.Context(), mark)
			require.ErrorIs(t, err, ErrHeadMoved)
			continue
		}
		g.commit(mark)
		other, _ := g.other(nil)
		_, err = other.Commit(t.Context(), late)
		require.ErrorIs(t, err, ErrStaleEpoch)
		late.Epoch = 2
		_, err = other.Commit(t.Context(), late)
		require.ErrorIs(t, err, ErrOrdinalUsed)
		g.commit(g.partial(5, 2, 2, 3, 2, 0, parcel{"disk-b": {1: 8}}))
		g.commit(g.point(KindPoint, 6, 5, 2, 0, two(nil, nil)))
		g.wantPoint(g.r, 6, two(at3["disk-a"], content{0: 2, 1: 8, 5: 4}))
	}
}

// TestFailpoints: an error at each named step leaves nothing half-done that a redelivery does not finish.
func TestFailpoints(t *testing.T) {
	for _, name := range failpoint.Names() {
		if !strings.HasPrefix(name, "replica/") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			g := begun(t)
			hits := 0
			disarm := failpoint.ArmFunc(name, func() error {
				if hits++; hits == 1 {
					return failpoint.ErrInjected
				}
				return nil
			})
			defer disarm()
			step := func(fn func() error) {
				if err := fn(); err != nil {
					require.ErrorIs(t, err, failpoint.ErrInjected)
					require.NoError(t, fn())
				}
			}
			step(func() error {
				d, err := ship(t.Context(), g.r, KindPoint, 4, 0, NewTx(), two(content{2: 7}, nil))
				if err == nil {
					_, err = g.r.Commit(t.Context(), Proposal{Kind: KindPoint, Epoch: 1, Point: 4, Base: 3, CutTime: testTime,
						Consistency: ConsistencyCrash, Disks: d})
				}
				return err
			})
			step(func() error { _, err := g.applier(g.r).Advance(t.Context(), 0); return err })
			step(func() error { _, err := g.r.Checkpoint(t.Context(), 5); return err })
			step(func() error {
				_, err := g.r.Retain(t.Context(), RetainOptions{Keep: Keep{All: 1, Hourly: 1, Limit: 1}, OrphanAge: -1, Parallel: 1})
				return err
			})
			require.Positive(t, hits)
			want := two(content{0: 1, 1: 3, 2: 7}, content{0: 2, 5: 4})
			g.wantDisks(want)
			g.wantPoint(g.r, 4, want)
		})
	}
}
