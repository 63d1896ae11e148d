package pacing_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
)

func TestTimeStandsStillDuringWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := pacing.Timeout(t.Context(), time.Minute)
		defer cancel()
		child, ccancel := pacing.Timeout(ctx, 10*time.Second)
		defer ccancel()
		done := pacing.Wait(child)
		again := pacing.Wait(child) // two reads at once are one wait
		time.Sleep(time.Hour)       //nolint:forbidigo // the clock of the bubble
		done()
		again()
		require.NoError(t, child.Err())
		require.Equal(t, time.Hour, pacing.Waited(ctx))
		time.Sleep(9 * time.Second) //nolint:forbidigo // the clock of the bubble
		synctest.Wait()
		require.NoError(t, child.Err())
		time.Sleep(2 * time.Second) //nolint:forbidigo // the clock of the bubble
		synctest.Wait()
		require.ErrorIs(t, child.Err(), context.DeadlineExceeded)
		require.NoError(t, ctx.Err())
		grandchild, gcancel := context.WithCancel(ctx)
		defer gcancel()
		<-ctx.Done()
		require.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
		<-grandchild.Done()
	})
}

func TestEndsAsOthersDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, stop := context.WithCancel(t.Context())
		ctx, cancel := pacing.Timeout(parent, time.Minute)
		defer cancel()
		stop()
		require.ErrorIs(t, ctx.Err(), context.Canceled)
		ctx, cancel = pacing.Timeout(t.Context(), time.Minute)
		cancel()
		require.ErrorIs(t, ctx.Err(), context.Canceled)
		pacing.Wait(t.Context())()
		require.Zero(t, pacing.Waited(t.Context()))
		body := strings.NewReader("x")
		require.Equal(t, body, pacing.Free(body))
	})
}
