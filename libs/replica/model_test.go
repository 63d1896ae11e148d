package replica

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

const modelSteps = 1000

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

// explore runs n seeds above from on two goroutines until one fails; it returns the first failing seed's error.
func explore(from, n int, b planted) (ran int, distinct int, st modelStats, err error) {
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // the worlds are small and short-lived
	var mu sync.Mutex
	var next atomic.Int64
	next.Store(int64(from))
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
				if seed > int64(from+n) {
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

// TestModel is the proof that matters most: no interleaving breaks S1 to S8.
func TestModel(t *testing.T) {
	short := 400
	if raceEnabled { // one goroutine runs at a time: there is little to race, and it takes ten times as long
		short = 50
	}
	n := seeds(t, short)
	ran, distinct, st, err := explore(0, n, planted{})
	t.Logf("%d interleavings, %d distinct, %s", ran, distinct, &st)
	require.NoError(t, err)
	if n < 400 {
		return
	}
	// The exploration is not empty: each rule's branches were taken.
	missing := st.missing()
	if n >= 10_000 {
		require.Empty(t, missing, "branches never taken")
	} else {
		t.Logf("branches not taken by so few: %q", missing)
	}
}

// TestModelCatches plants each bug and needs a violation within the seeds. Some begin near a seed that is known to find it.
func TestModelCatches(t *testing.T) {
	for name, c := range map[string]struct {
		bugs bugs
		host hostBugs
		from int
	}{
		"progress before pages":         {bugs: bugs{ProgressBeforePages: true}},
		"batch mark without lower mark": {bugs: bugs{BatchMarkWithoutLowerBound: true}},
		"manifest before segments":      {bugs: bugs{ManifestBeforeSegments: true}},
		"no pass ordinal":               {bugs: bugs{NoPassOrdinal: true}, from: 100},
		"half a pass as base":           {bugs: bugs{HalfPass: true}},
		"self-raised epoch, no open":    {bugs: bugs{SelfRaisedEpoch: true, NoOpen: true}},
		"no epoch, no open":             {bugs: bugs{NoEpoch: true, NoOpen: true}},
		"stale task":                    {bugs: bugs{StaleTask: true}},
		"checkpoint on unfinished work": {bugs: bugs{CheckpointUnfinished: true}},
		"no lease and no number":        {bugs: bugs{NoLeaseNoNumber: true}},
		"no base rule":                  {bugs: bugs{NoBaseRule: true}, from: 30},
		"rewind not computed again":     {bugs: bugs{RewindNotComputedAgain: true}, from: 214},
		"rewind misses a pass":          {bugs: bugs{RewindSkipsPartials: true}, from: 40},
		"rewind misses a rewind":        {bugs: bugs{RewindSkipsRewinds: true}},
		"extent cooled by a seal":       {host: hostBugs{CooledBySeal: true}},
		"extent cooled by a flush":      {host: hostBugs{CooledByFlush: true}},
		"log data older than its mark":  {host: hostBugs{OldLogData: true}},
		"cut after it was given up":     {host: hostBugs{CutAfterGiven: true}},
		"any rewind is this one":        {bugs: bugs{RewindTrustsAnyRewind: true}},
	} {
		t.Run(name, func(t *testing.T) {
			ran, _, _, err := explore(c.from, 2000, planted{c.bugs, c.host})
			require.Error(t, err, "not found in %d interleavings", ran)
			t.Logf("found after %d interleavings: %v", ran, err)
		})
	}
}
