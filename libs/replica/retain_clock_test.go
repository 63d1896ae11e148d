package replica

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// leapingStore answers one question for the time wrongly.
type leapingStore struct {
	blobstore.Store
	asked atomic.Int64
	wrong int64 // which one
	by    time.Duration
}

func (l *leapingStore) Now(ctx context.Context) (time.Time, error) {
	now, err := l.Store.Now(ctx)
	if l.asked.Add(1) == l.wrong {
		now = now.Add(l.by)
	}
	return now, err
}

// One answer with a wrong date ends no point and no pin.
func TestRetainClockLeaps(t *testing.T) {
	for wrong := range int64(4) {
		s := newStory(t, blobstoretest.NewMemory(), 5)
		s.write(12)
		s.pass()
		s.apply()
		s.points(12, 20*time.Minute)
		now, err := s.store.Now(t.Context())
		require.NoError(t, err)
		require.NoError(t, s.r.Pin(t.Context(), Pin{Seq: s.seq(s.next - 6), Owner: "restore/a", Until: now.Add(time.Hour)}))
		before := s.wantAll()

		r, err := Open(t.Context(), &leapingStore{Store: s.store, wrong: wrong + 1, by: 365 * 24 * time.Hour}, testLineage)
		require.NoError(t, err)
		res, err := r.Retain(t.Context(), RetainOptions{Keep: Keep{All: 5 * time.Hour, Hourly: 5 * time.Hour, Limit: 5 * time.Hour}, Parallel: 1})
		require.NoError(t, err)
		require.Zero(t, res.RetiredPoints)
		require.Empty(t, res.Dropped)
		require.Equal(t, s.wantAll(), before)
	}
}

// Who reads without a pin is told that retention was there, not that something is damaged.
func TestReadOfRetiredCheckpoint(t *testing.T) {
	s := newStory(t, blobstoretest.NewMemory(), 6)
	s.write(12)
	s.pass()
	s.apply()
	s.points(12, 20*time.Minute)
	points, err := s.r.Points(t.Context())
	require.NoError(t, err)
	seen := 0
	for _, p := range points[:len(points)/2] {
		reader := s.other()
		src, err := reader.SourceAt(t.Context(), p.Seq, "disk-a")
		require.NoError(t, err)
		if src.Checkpoint() == 0 {
			continue
		}
		seen++
		s.retainAll(s.other(), RetainOptions{Keep: Keep{All: time.Second, Hourly: time.Second, Limit: time.Second}, OrphanAge: -1, Parallel: 1})
		err = src.copyTo(t.Context(), sinkTarget{s: nil}, 1)
		require.ErrorIs(t, err, ErrNotReachable)
		require.NotErrorIs(t, err, blobstore.ErrNotFound, "it would be taken for damage")
		break
	}
	require.NotZero(t, seen)
}
