package bandwidth_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/bandwidth"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// flow sends steps of a class until ctx ends.
func flow(ctx context.Context, wg *sync.WaitGroup, l *bandwidth.Limiter, c bandwidth.Class) {
	wg.Go(func() {
		for l.Wait(ctx, c, l.Step()) == nil {
		}
	})
}

// within runs what start starts for a while of fake time and returns the bytes sent by class.
func within(t *testing.T, l *bandwidth.Limiter, d time.Duration, classes ...bandwidth.Class) (sent [bandwidth.Classes]float64) {
	t.Helper()
	var before [bandwidth.Classes]int64
	for c := range before {
		before[c] = l.Sent(bandwidth.Class(c))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, c := range classes {
		flow(ctx, &wg, l, c)
	}
	time.Sleep(d) //nolint:forbidigo // the clock of the bubble
	cancel()
	wg.Wait()
	for c := range sent {
		sent[c] = float64(l.Sent(bandwidth.Class(c)) - before[c])
	}
	return sent
}

const (
	delta, bulk, resync = bandwidth.Delta, bandwidth.Copy, bandwidth.Resync
)

func TestLimiterKeepsToItsPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bandwidth.NewLimiter()
		require.Zero(t, l.Rate())
		l.Limit(bandwidth.Part{8 * mib, mib, mib})
		require.EqualValues(t, 10*mib, l.Rate())
		const window = 20 * time.Second
		got := within(t, l, window, delta, bulk, resync, delta, bulk)
		require.InEpsilon(t, 8*20*mib, got[delta], 0.02)
		require.InEpsilon(t, 20*mib, got[bulk], 0.02)
		require.InEpsilon(t, 20*mib, got[resync], 0.02)
		// What a class leaves goes to the others, in proportion.
		got = within(t, l, window, bulk, resync)
		require.InEpsilon(t, 5*20*mib, got[bulk], 0.02)
		require.InEpsilon(t, 5*20*mib, got[resync], 0.02)
		require.InEpsilon(t, 200*mib, within(t, l, window, resync)[resync], 0.02)
		require.InEpsilon(t, 160*mib, within(t, l, window, delta, resync, resync, resync)[delta], 0.12)
		require.Positive(t, l.Waited(resync))
		// One that nobody announced yet is not starved.
		l.Limit(bandwidth.Part{0, 10 * mib, 0})
		got = within(t, l, window, delta, bulk)
		require.Greater(t, got[delta], 0.4*200*mib)
		require.Greater(t, got[bulk], 0.4*200*mib)
		// Changed while reads wait.
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		flow(ctx, &wg, l, bulk)
		for _, rate := range []int64{bandwidth.MinLimit, 20 * mib, mib, 1 << 30, bandwidth.MinLimit, 2 * mib} {
			l.Limit(bandwidth.Part{0, rate, 0})
			time.Sleep(5 * time.Second) //nolint:forbidigo // the clock of the bubble: one step of the old rate is on its way
			before := l.Sent(bulk)
			time.Sleep(10 * time.Second) //nolint:forbidigo // the clock of the bubble
			require.InEpsilon(t, rate*10, l.Sent(bulk)-before, 0.05, rate)
		}
		cancel()
		wg.Wait()
	})
}

func TestLimiterBurstIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bandwidth.NewLimiter()
		l.Limit(bandwidth.Part{0, 10 * mib, 0})
		time.Sleep(time.Hour) //nolint:forbidigo // the clock of the bubble
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		flow(ctx, &wg, l, bulk)
		wg.Wait()
		require.LessOrEqual(t, l.Sent(bulk), int64(mib+l.Step()+10*mib/1000), "100 ms, one step, and the millisecond itself")
		require.GreaterOrEqual(t, l.Sent(bulk), int64(mib))
	})
}

func TestLimiterIsFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bandwidth.NewLimiter()
		l.Limit(bandwidth.Part{0, mib, 0})
		require.NoError(t, l.Wait(t.Context(), bulk, 4*mib)) // sent ahead: four seconds nothing goes
		var mu sync.Mutex
		var order []int
		var wg sync.WaitGroup
		gone, leave := context.WithCancel(t.Context())
		for i := range 6 {
			ctx := t.Context()
			if i == 2 {
				ctx = gone
			}
			wg.Go(func() {
				err := l.Wait(ctx, bulk, 1000)
				mu.Lock()
				defer mu.Unlock()
				if i == 2 {
					require.ErrorIs(t, err, context.Canceled)
					return
				}
				require.NoError(t, err)
				order = append(order, i)
			})
			synctest.Wait()
		}
		leave()
		began := time.Now()
		require.NoError(t, l.Wait(t.Context(), delta, 1000), "one step behind what was sent ahead")
		require.InDelta(t, 4*time.Second, time.Since(began), float64(10*time.Millisecond))
		wg.Wait()
		require.Equal(t, []int{0, 1, 3, 4, 5}, order)
		require.ErrorIs(t, l.Wait(gone, bulk, 1), context.Canceled)
		require.EqualValues(t, 4*mib+5000, l.Sent(bulk), "who left took nothing")
	})
}

func TestLimiterUnlimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bandwidth.NewLimiter()
		began := time.Now()
		require.NoError(t, l.Wait(t.Context(), delta, 1<<40))
		l.Limit(bandwidth.Part{bandwidth.MinLimit, 0, 0})
		require.NoError(t, l.Wait(t.Context(), delta, mib))
		require.LessOrEqual(t, time.Since(began), time.Millisecond)
		var wg sync.WaitGroup
		wg.Go(func() { require.NoError(t, l.Wait(t.Context(), delta, mib)) })
		synctest.Wait()
		l.Unlimit()
		wg.Wait()
		require.LessOrEqual(t, time.Since(began), time.Millisecond, "who waits goes at once")
		require.Zero(t, l.Rate())
		_, limited := l.Part()
		require.False(t, limited)
		l.Limit(bandwidth.Part{})
		require.Positive(t, l.Rate(), "no part is not no limit")
		l.Unlimit()
	})
}

// What it costs where there is no limit.
func BenchmarkUnlimited(b *testing.B) {
	l := bandwidth.NewLimiter()
	for b.Loop() {
		_ = l.Wait(b.Context(), delta, 32<<10)
	}
}
