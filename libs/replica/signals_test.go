package replica

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestSignalsAreKept: what the shipper says of a point is in its manifest, and in every reader's lists.
func TestSignalsAreKept(t *testing.T) {
	g := newRig(t)
	ctx := t.Context()
	commit := func(kind Kind, o Ordinal, base Ordinal, s *Signals) {
		p := g.point(kind, o, base, 1, 0, two(content{1: uint64(o)}, nil))
		p.Signals = s
		p.CutTime = testTime.Add(time.Duration(o) * time.Minute)
		_, err := g.r.Commit(ctx, p)
		require.NoError(t, err)
	}
	first := &Signals{Changed: 512}
	commit(KindBase, 1, 0, first)
	for o := Ordinal(2); o <= 6; o++ {
		commit(KindPoint, o, o-1, &Signals{Changed: int64(o) << 20, Zero: 4096, Incompressible: 4096, Stored: 512})
	}
	commit(KindPoint, 7, 6, nil)
	fresh, err := Open(ctx, g.store, testLineage)
	require.NoError(t, err)
	points, err := fresh.Points(ctx)
	require.NoError(t, err)
	require.Len(t, points, 7)
	require.Equal(t, first, points[0].Signals)
	require.EqualValues(t, 5<<20, points[4].Signals.Changed)
	require.Nil(t, points[6].Signals)

	ordinals := func(seq Seq, n int) (out []Ordinal) {
		history, err := fresh.History(ctx, seq, n)
		require.NoError(t, err)
		for _, p := range history {
			out = append(out, p.Ordinal)
		}
		return out
	}
	require.Equal(t, []Ordinal{1, 2, 3, 4, 5, 6, 7}, ordinals(7, 100))
	require.Equal(t, []Ordinal{4, 5}, ordinals(5, 2))
	require.Equal(t, []Ordinal{1}, ordinals(1, 5))
	commit(KindBase, 8, 7, nil)
	commit(KindPoint, 9, 8, nil)
	_, err = fresh.Refresh(ctx)
	require.NoError(t, err)
	require.Equal(t, []Ordinal{8, 9}, ordinals(9, 5), "not across a base")
	require.Equal(t, []Ordinal{6, 7}, ordinals(7, 2))
}
