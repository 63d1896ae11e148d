package replica

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// TestDamagedChainIsReadBelow: a manifest is missing, or is not what it was. Points below it come up, nothing is written.
func TestDamagedChainIsReadBelow(t *testing.T) {
	for name, damage := range map[string]func(g *rig, journal blobstore.Container){
		"missing": func(g *rig, journal blobstore.Container) {
			require.NoError(g.t, journal.Delete(g.t.Context(), manifestName(5), blobstore.Conditions{}))
		},
		"changed": func(g *rig, journal blobstore.Container) {
			_, err := journal.Put(g.t.Context(), manifestName(5), bytes.NewReader([]byte("{}")), 2, blobstore.Conditions{})
			require.NoError(g.t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			g := begun(t)
			g.commit(g.point(KindPoint, 4, 3, 1, 0, two(content{9: 9}, nil))) // manifest 5
			g.commit(g.point(KindPoint, 5, 4, 1, 0, two(content{9: 8}, nil)))
			whole, broken, err := OpenDamaged(ctx, g.store, testLineage)
			require.NoError(t, err)
			require.NoError(t, broken)
			require.Equal(t, Seq(6), whole.chain.state.Head)

			damage(g, g.store.Container(testLineage.JournalContainer()))
			_, err = Open(ctx, g.store, testLineage)
			require.ErrorIs(t, err, ErrCorrupt)
			r, broken, err := OpenDamaged(ctx, g.store, testLineage)
			require.NoError(t, err)
			require.ErrorIs(t, broken, ErrCorrupt)
			points, err := r.Points(ctx)
			require.NoError(t, err)
			require.Len(t, points, 2)
			g.wantPoint(r, 3, at3)
			g.wantPoint(r, 2, at2)
			_, err = r.Find(ctx, 4)
			require.ErrorIs(t, err, ErrNotFound)

			_, err = r.CloseLineage(ctx, FenceOptions{Failover: "f"})
			require.ErrorIs(t, err, ErrCorrupt)
			_, err = r.Retain(ctx, RetainOptions{})
			require.ErrorIs(t, err, ErrCorrupt)
			require.ErrorIs(t, r.Pin(ctx, Pin{Seq: 4, Owner: "hold/x"}), ErrCorrupt)
			_, err = g.applier(r).Advance(ctx, 4)
			require.ErrorIs(t, err, ErrCorrupt)
		})
	}
	store := newRig(t).store
	_, _, err := OpenDamaged(t.Context(), store, "ffffffffffffffffffffffffffffffff")
	require.ErrorIs(t, err, ErrNoLineage)
}
