package replica

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

const modelSteps = 500

// seeds is how many interleavings to run: few by default, LANDFALL_MODEL_SEEDS for the whole.
func seeds(t *testing.T, short int) int {
	s := os.Getenv("LANDFALL_MODEL_SEEDS")
	if s == "" {
		return short
	}
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return n
}

// explore runs seeds on two goroutines until one fails; it returns the first failing seed's error.
func explore(n int, b bugs) (ran int, distinct int, st modelStats, err error) {
	var mu sync.Mutex
	var next atomic.Int64
	var stop atomic.Bool
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			var mine modelStats
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				st.add(mine)
			}()
			for !stop.Load() {
				seed := next.Add(1)
				if seed > int64(n) {
					return
				}
				w := newWorld(uint64(seed), b, &mine)
				werr := w.run(modelSteps)
				mu.Lock()
				ran++
				seen[w.trace.Sum64()] = true
				if werr != nil && err == nil {
					err = fmt.Errorf("seed %d: %w", seed, werr)
					stop.Store(true)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return ran, len(seen), st, err
}

func (s *modelStats) add(o modelStats) {
	s.steps += o.steps
	s.commits += o.commits
	s.points += o.points
	s.refused += o.refused
	s.crashes += o.crashes
	s.faults += o.faults
	s.lates += o.lates
	s.redone += o.redone
	s.checkpoints += o.checkpoints
	s.fences += o.fences
	s.passes += o.passes
	s.leaseLost += o.leaseLost
	s.already += o.already
	s.compared += o.compared
}

// TestModel is the proof that matters most: no interleaving breaks S1 to S7.
func TestModel(t *testing.T) {
	n := seeds(t, 250)
	ran, distinct, st, err := explore(n, bugs{})
	t.Logf("%d interleavings, %d distinct, %+v", ran, distinct, st)
	require.NoError(t, err)
	// The exploration is not empty.
	require.Positive(t, st.points)
	require.Positive(t, st.refused)
	require.Positive(t, st.already)
	require.Positive(t, st.checkpoints)
	require.Positive(t, st.leaseLost)
	require.Positive(t, st.fences)
	require.Positive(t, st.compared)
}

// TestModelCatches plants each bug and needs a violation within the seeds.
func TestModelCatches(t *testing.T) {
	for name, b := range map[string]bugs{
		"progress before pages":         {ProgressBeforePages: true},
		"batch mark without lower mark": {BatchMarkWithoutLowerBound: true},
		"manifest before segments":      {ManifestBeforeSegments: true},
		"no pass ordinal":               {NoPassOrdinal: true},
		"half a pass as base":           {HalfPass: true},
		"self-raised epoch, no open":    {SelfRaisedEpoch: true, NoOpen: true},
		"no epoch, no open":             {NoEpoch: true, NoOpen: true},
		"stale task":                    {StaleTask: true},
		"checkpoint on unfinished work": {CheckpointUnfinished: true},
		"no lease and no number":        {NoLeaseNoNumber: true},
	} {
		t.Run(name, func(t *testing.T) {
			ran, _, _, err := explore(max(seeds(t, 0), 2000), b)
			require.Error(t, err, "not found in %d interleavings", ran)
			t.Logf("found after %d interleavings: %v", ran, err)
		})
	}
}
