package replica

import (
	"errors"
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
// progress, when set, hears now and then how far it is.
func explore(from, n int, b planted, progress func(ran int)) (ran int, distinct int, st modelStats, err error) {
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
				if progress != nil && ran%1000 == 0 {
					progress(ran)
				}
				seen[w.trace.Sum64()] = true
				if werr != nil && err == nil {
					err = &violated{seed, werr}
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
	short := 200
	if raceEnabled { // one goroutine runs at a time: there is little to race, and it takes ten times as long
		short = 50
	}
	n, from := seeds(t, short), 0
	if s := os.Getenv("LANDFALL_MODEL_FROM"); s != "" { // to look at one seed again: FROM=seed-1, SEEDS=1
		var err error
		from, err = strconv.Atoi(s)
		require.NoError(t, err)
	}
	ran, distinct, st, err := explore(from, n, planted{}, func(ran int) { t.Logf("%d interleavings, no violation", ran) })
	t.Logf("%d interleavings, %d distinct, %s", ran, distinct, &st)
	require.NoError(t, err)
	if n <= short {
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

// violated is the first violation that was found.
type violated struct {
	seed int64
	err  error
}

func (v *violated) Error() string { return fmt.Sprintf("seed %d: %v", v.seed, v.err) }
func (v *violated) Unwrap() error { return v.err }

// violation is what a seed broke.
func violation(err error) string {
	var v *violated
	if errors.As(err, &v) {
		return v.err.Error()
	}
	return err.Error()
}
