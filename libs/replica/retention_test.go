package replica

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// retire stores a record as the retention worker will, and deletes what it retires.
func (g *rig) retire(ret Retention) {
	g.t.Helper()
	ret.V, ret.Lineage = RetentionVersion, testLineage
	b, err := ret.Encode()
	require.NoError(g.t, err)
	ctx := context.Background()
	_, err = g.store.Container(testLineage.ReplicaContainer()).Put(ctx, retentionName, bytes.NewReader(b), int64(len(b)), blobstore.Conditions{})
	require.NoError(g.t, err)
	journal := g.store.Container(testLineage.JournalContainer())
	for s := Seq(1); s < 30; s++ {
		if ret.Retires(s) {
			_ = journal.Delete(ctx, manifestName(s), blobstore.Conditions{})
		}
	}
}

// anchorAt replays the chain up to n.
func (g *rig) anchorAt(n Seq) *Anchor {
	g.t.Helper()
	var st State
	for s := Seq(1); s <= n; s++ {
		b, err := readAll(g.t.Context(), g.r.journal, manifestName(s), MaxManifest)
		require.NoError(g.t, err)
		m, err := DecodeManifest(b)
		require.NoError(g.t, err)
		require.NoError(g.t, st.next(m, hashHex(b), &bugs{}))
	}
	a, err := st.Anchor()
	require.NoError(g.t, err)
	return a
}

// grown is begun with points 4 to 9 (manifests 5 to 10), applied with checkpoints at 3, 5, 8.
func grown(t *testing.T) *rig {
	g := begun(t)
	a, err := NewApplier(g.r, ApplierOptions{Footer: testFooter, Stop: func(e Entry) bool { return e.Seq == 5 || e.Seq == 8 }})
	require.NoError(t, err)
	for o := Ordinal(4); o <= 9; o++ {
		g.commit(g.point(KindPoint, o, o-1, 1, 0, two(content{6: uint64(o)}, content{int64(o): 1})))
	}
	p, err := a.Advance(t.Context(), 0)
	require.NoError(t, err)
	require.Equal(t, []Seq{3, 5, 8}, p.Checkpoints)
	return g
}

// TestSleeperBelowFloor is I7: a process that slept since before retention refills a deleted number; it is no commit,
// no reader sees it, and the task is judged anew.
func TestSleeperBelowFloor(t *testing.T) {
	g := begun(t)
	sleeper, _ := g.other(nil) // its head is 4
	_, err := g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	late := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 66}, nil))
	for o := Ordinal(5); o <= 9; o++ {
		g.commit(g.point(KindPoint, o, o-2+min(1, o-5), 1, 0, two(content{6: uint64(o)}, nil)))
	}
	_, err = g.r.Checkpoint(t.Context(), 9)
	require.ErrorIs(t, err, ErrNotAtRest)
	_, err = g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	_, err = g.r.Checkpoint(t.Context(), 9)
	require.NoError(t, err)
	g.retire(Retention{Floor: 8, Anchor: g.anchorAt(8)})

	_, err = sleeper.Commit(t.Context(), late)
	require.ErrorIs(t, err, ErrOrdinalUsed)
	_, err = readAll(t.Context(), g.r.journal, manifestName(5), MaxManifest)
	require.NoError(t, err, "the number was refilled")
	for _, r := range []*Replica{g.r, sleeper, first(g.other(nil))} {
		st, err := r.Refresh(t.Context())
		require.NoError(t, err)
		require.Equal(t, Seq(9), st.Head)
		require.Equal(t, Ordinal(9), st.StateOrdinal)
		points, err := r.Points(t.Context())
		require.NoError(t, err)
		require.Len(t, points, 1)
		g.wantPoint(r, 9, two(content{0: 1, 1: 3, 2: 4, 6: 9}, content{0: 2, 5: 4}))
		_, err = r.Find(t.Context(), 4)
		require.ErrorIs(t, err, ErrNotFound)
	}
	// And life goes on from the anchor.
	g.commit(g.point(KindPoint, 10, 9, 1, 0, two(content{6: 10}, nil)))
	_, err = g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	g.wantDisks(two(content{0: 1, 1: 3, 2: 4, 6: 10}, content{0: 2, 5: 4}))
}

func first[A, B any](a A, _ B) A { return a }

// TestRetiredRange: manifests between kept checkpoints are gone; what is kept still reads right.
func TestRetiredRange(t *testing.T) {
	g := grown(t)
	old := g.r
	g.retire(Retention{Retired: []RetiredRange{{From: 6, To: 8, Anchor: *g.anchorAt(8)}}})
	for _, r := range []*Replica{old, first(g.other(nil))} {
		points, err := r.Points(t.Context())
		require.NoError(t, err)
		var have []Ordinal
		for _, p := range points {
			have = append(have, p.Ordinal)
		}
		require.Equal(t, []Ordinal{2, 3, 4, 8, 9}, have)
		g.wantPoint(r, 4, two(content{0: 1, 1: 3, 2: 4, 6: 4}, content{0: 2, 4: 1, 5: 4}))
		g.wantPoint(r, 9, two(content{0: 1, 1: 3, 2: 4, 6: 9}, content{0: 2, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}))
		res, err := r.Commit(t.Context(), g.point(KindPoint, 6, 5, 1, 0, two(nil, nil)))
		require.ErrorIs(t, err, ErrOrdinalUsed, "%+v", res)
	}
	g.commit(g.point(KindPoint, 10, 9, 1, 0, two(nil, nil)))
}

// TestNotReachable: without the checkpoint that a floor needs, reading says so instead of answering zeros.
func TestNotReachable(t *testing.T) {
	g := grown(t)
	g.retire(Retention{Floor: 6, Anchor: g.anchorAt(6)}) // no checkpoint at 6; 3 and 5 are below
	_, err := first(g.other(nil)).Materialise(t.Context(), 6, memSink{}, MaterialiseOptions{})
	require.ErrorIs(t, err, ErrNotReachable)
	g.wantPoint(g.r, 8, two(content{0: 1, 1: 3, 2: 4, 6: 8}, content{0: 2, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}))
}

// TestFencesSurviveAnAnchor: a close repeated after its manifest was retired is not a second one.
func TestFencesSurviveAnAnchor(t *testing.T) {
	g := begun(t)
	g.commit(Proposal{Kind: KindClose, Failover: "f1"})
	open := g.commit(Proposal{Kind: KindOpen, Failover: "f1"})
	g.commit(g.point(KindPoint, 4, 3, open.Epoch, open.Seq, two(nil, nil)))
	_, err := g.applier(g.r).Advance(t.Context(), 0)
	require.NoError(t, err)
	g.retire(Retention{Floor: 7, Anchor: g.anchorAt(7)})
	r, _ := g.other(nil)
	res, err := r.Commit(t.Context(), Proposal{Kind: KindClose, Failover: "f1"})
	require.NoError(t, err)
	require.Equal(t, Result{Outcome: AlreadyCommitted, Seq: 5}, res)
	st, err := r.Refresh(t.Context())
	require.NoError(t, err)
	require.Equal(t, open.Seq, st.Open)
	require.False(t, st.Closed())
	_, err = r.Commit(t.Context(), g.point(KindPoint, 5, 4, open.Epoch, open.Seq, two(nil, nil)))
	require.NoError(t, err)
}

func TestRetentionRecord(t *testing.T) {
	g := begun(t)
	a := g.anchorAt(4)
	good := Retention{V: 1, Lineage: testLineage, Floor: 4, Anchor: a, Pins: []Pin{{Seq: 5, Owner: "restore"}}}
	b, err := good.Encode()
	require.NoError(t, err)
	back, err := DecodeRetention(b)
	require.NoError(t, err)
	require.Equal(t, &good, back)
	for name, bad := range map[string]Retention{
		"version":           {V: 2, Lineage: testLineage},
		"floor alone":       {V: 1, Lineage: testLineage, Floor: 4},
		"anchor elsewhere":  {V: 1, Lineage: testLineage, Floor: 5, Anchor: a},
		"pin below floor":   {V: 1, Lineage: testLineage, Floor: 4, Anchor: a, Pins: []Pin{{Seq: 4}}},
		"range under floor": {V: 1, Lineage: testLineage, Floor: 4, Anchor: a, Retired: []RetiredRange{{From: 3, To: 4, Anchor: *a}}},
		"no lineage":        {V: 1},
	} {
		require.ErrorIs(t, bad.Validate(), ErrInvalid, name)
	}
	_, err = DecodeRetention([]byte(`{"v":1,"lineage":"` + string(testLineage) + `","floor":0,"extra":1}`))
	require.ErrorIs(t, err, ErrInvalid)
	// An anchor in the middle of a run would lose which tasks are there.
	g.commit(g.partial(4, 1, 2, 3, 1, 0, nil))
	st, err := g.r.Refresh(t.Context())
	require.NoError(t, err)
	_, err = st.Anchor()
	require.ErrorIs(t, err, ErrInvalid)
}

// TestBrokenChain is I2: a gap, a broken link, a falling epoch and a foreign manifest are ErrCorrupt.
func TestBrokenChain(t *testing.T) {
	put := func(g *rig, m Manifest) {
		b, err := m.Encode()
		require.NoError(t, err)
		_, err = g.store.Container(testLineage.JournalContainer()).Put(t.Context(), manifestName(m.Seq), bytes.NewReader(b), int64(len(b)), blobstore.Conditions{})
		require.NoError(t, err)
	}
	for name, change := range map[string]func(m *Manifest){
		"link":    func(m *Manifest) { m.Prev = hashHex(nil) },
		"epoch":   func(m *Manifest) { m.Epoch = 1 },
		"lineage": func(m *Manifest) { m.Lineage = "ffffffffffffffffffffffffffffffff" },
		"gap":     func(m *Manifest) { m.Seq += 2 },
	} {
		t.Run(name, func(t *testing.T) {
			g := begun(t)
			g.commit(g.point(KindPoint, 4, 3, 2, 0, two(nil, nil)))
			st, err := g.r.Refresh(t.Context())
			require.NoError(t, err)
			m := g.point(KindPoint, 5, 4, 2, 0, two(nil, nil))
			next := *m.manifest(testLineage, st, &bugs{})
			change(&next)
			put(g, next)
			_, err = g.r.Refresh(t.Context())
			require.ErrorIs(t, err, ErrCorrupt)
			_, err = Open(t.Context(), g.store, testLineage)
			require.ErrorIs(t, err, ErrCorrupt)
		})
	}
}

// TestCorruptSegment: what is not what the manifest names is never applied and never read.
func TestCorruptSegment(t *testing.T) {
	g := begun(t)
	p := g.point(KindPoint, 4, 3, 1, 0, two(content{2: 50}, nil))
	c := g.store.Container(testLineage.JournalContainer())
	name := p.Disks[0].Segments[0].Name
	g.commit(p)
	body, err := readAll(t.Context(), c, name, 1<<20)
	require.NoError(t, err)
	body[300] ^= 1
	_, err = c.Put(t.Context(), name, bytes.NewReader(body), int64(len(body)), blobstore.Conditions{})
	require.NoError(t, err)
	_, err = g.applier(g.r).Advance(t.Context(), 0)
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = g.r.Materialise(t.Context(), 4, memSink{}, MaterialiseOptions{})
	require.ErrorIs(t, err, ErrCorrupt)
	g.wantPoint(g.r, 3, at3)

	// A whole segment of another task under the right hash is refused by its header.
	g = begun(t)
	p = g.point(KindPoint, 4, 3, 1, 0, two(content{2: 50}, nil))
	p.Disks[0].Segments = g.point(KindPoint, 5, 3, 1, 0, two(content{2: 51}, nil)).Disks[0].Segments
	g.commit(p)
	_, err = g.applier(g.r).Advance(t.Context(), 0)
	require.ErrorIs(t, err, ErrCorrupt)
}

// TestListingGap: a listing that misses a name that appeared while it ran is no gap.
func TestListingGap(t *testing.T) {
	g := begun(t)
	slow, f := g.other(nil)
	raced := false
	f.SetHook(func(op blobstoretest.Op, _, _ string) blobstoretest.Fault {
		if op == blobstoretest.OpGet && !raced {
			raced = true
			g.commit(g.point(KindPoint, 4, 3, 1, 0, two(nil, nil)))
			g.commit(g.point(KindPoint, 5, 4, 1, 0, two(nil, nil)))
		}
		return blobstoretest.None
	})
	st, err := slow.Refresh(t.Context())
	require.NoError(t, err)
	require.Equal(t, Seq(6), st.Head)
}
