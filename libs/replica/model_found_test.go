package replica

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// What the model found, told directly.

// TestLateReaderIsNotCorruption: a reader without a pin, whose chain is from before retention, meets segments that are gone. That is
// no damage.
func TestLateReaderIsNotCorruption(t *testing.T) {
	g := grown(t)
	late, _ := g.other(nil)
	for s := Seq(6); s <= 8; s++ {
		_, err := late.Manifest(t.Context(), s)
		require.NoError(t, err)
	}
	m, err := g.r.Manifest(t.Context(), 7)
	require.NoError(t, err)
	segment := m.Disks[0].Segments[0].Name

	// Missing and not retired: somebody did damage.
	journal := g.store.Container(testLineage.JournalContainer())
	require.NoError(t, journal.Delete(t.Context(), segment, blobstore.Conditions{}))
	_, err = late.SourceAt(t.Context(), 7, "disk-a")
	require.ErrorIs(t, err, ErrCorrupt)

	g.retire(Retention{Floor: 8, Anchor: g.anchorAt(8)})
	_, err = late.SourceAt(t.Context(), 7, "disk-a")
	require.ErrorIs(t, err, ErrNotReachable)
	require.NotErrorIs(t, err, ErrCorrupt)
}

// unprotected hides that the store can tell its policies.
type unprotected struct{ blobstore.Store }

// TestRefusedDeletionsAreNoProgress: what a policy keeps does not use up the bound of a step, or nothing else would ever go.
func TestRefusedDeletionsAreNoProgress(t *testing.T) {
	g := begun(t)
	require.NoError(t, g.store.ProtectContainer(t.Context(), testLineage.JournalContainer(), blobstore.Protection{WriteOnce: time.Hour}))
	r, err := Open(t.Context(), unprotected{g.store}, testLineage)
	require.NoError(t, err)
	a, err := NewApplier(r, ApplierOptions{Footer: testFooter, Parallel: 1, Stop: func(Entry) bool { return true }})
	require.NoError(t, err)
	for o := Ordinal(4); o < 10; o++ {
		g.store.Advance(time.Minute)
		g.commit(g.point(KindPoint, o, o-1, 1, 0, two(content{1: uint64(o)}, nil)))
		_, err = a.Advance(t.Context(), 0)
		require.NoError(t, err)
	}
	hidden := 0
	for step := 0; ; step++ {
		require.Less(t, step, 100, "retention does not end")
		res, err := r.Retain(t.Context(), RetainOptions{Keep: Keep{All: time.Minute, Hourly: time.Minute, Limit: time.Minute}, OrphanAge: -1, MaxDeletes: 1, Parallel: 1})
		require.NoError(t, err)
		hidden = res.Hidden
		if !res.More {
			break
		}
	}
	require.Positive(t, hidden)
	for range g.store.Container(testLineage.StagingContainer()).List(t.Context(), "seg/", "") {
		t.Fatal("staging is not under the policy and was not tidied")
	}
}
