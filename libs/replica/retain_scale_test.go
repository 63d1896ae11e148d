package replica

import (
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// TestRetainScale is a lineage with 10,000 points that retention never looked at: 35 days of one every five minutes. It bounds
// the requests and the memory of the steps that bring it down to the policy, and of those after.
func TestRetainScale(t *testing.T) {
	points := 10_000
	if testing.Short() || raceEnabled {
		points = 1_500
	}
	mem := blobstoretest.NewMemory()
	s := newStory(t, mem, 21)
	s.every = 12
	s.write(9)
	s.pass()
	s.apply()
	for i := range points {
		mem.Advance(5 * time.Minute)
		o := s.next
		s.next++
		p := two(nil, nil)
		if i%4 == 0 {
			p = s.write(1)
		}
		d, err := ship(t.Context(), s.r, KindPoint, o, 0, NewTx(), p)
		require.NoError(t, err)
		s.commit(Proposal{Kind: KindPoint, Epoch: 1, Point: o, Base: s.base, CutTime: testTime, Consistency: ConsistencyCrash, Disks: d})
		s.base = o
		if i%600 == 599 {
			s.apply()
		}
	}
	s.apply()

	f := blobstoretest.NewFaulty(mem, nil)
	r, err := Open(t.Context(), f, testLineage)
	require.NoError(t, err)
	o := RetainOptions{Keep: Keep{Limit: 30 * 24 * time.Hour}, Parallel: 1}
	steps, most := 0, int64(0)
	for more := true; more; steps++ {
		before, heap := f.Calls(), heapInUse()
		res, err := r.Retain(t.Context(), o)
		require.NoError(t, err)
		most = max(most, f.Calls()-before)
		require.Less(t, heapInUse()-heap, int64(64<<20))
		more = res.More
		require.Less(t, steps, 100)
	}
	// Per step: at most MaxReads indexes with their manifests, MaxDeletes deletions, and the listings.
	require.Less(t, most, int64(2*2000+1000+500))
	before := f.Calls()
	_, err = r.Retain(t.Context(), o)
	require.NoError(t, err)
	require.Less(t, f.Calls()-before, int64(100), "an idle step")
	t.Logf("%d points: %d steps, at most %d requests each, an idle one %d", points, steps, most, f.Calls()-before)

	f = blobstoretest.NewFaulty(mem, nil)
	_, err = Open(t.Context(), f, testLineage)
	require.NoError(t, err)
	require.Less(t, f.Calls(), int64(250))
	t.Logf("a new process opens the chain with %d requests", f.Calls())
	points2, err := r.Points(t.Context())
	require.NoError(t, err)
	require.Less(t, len(points2), 250)
	s.wantTidy()
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}
