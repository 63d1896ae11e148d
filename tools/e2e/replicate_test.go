package e2e

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/replica"
)

// TestEveryPointIsWhatTheGuestHad protects a machine that is being written to and holds every received point against
// the guest's record, across a resynchronisation and across a kill of everything, in both forms of the product.
func TestEveryPointIsWhatTheGuestHad(t *testing.T) {
	for _, f := range forms {
		t.Run(f.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), overall)
			defer cancel()
			p := f.make(t)
			m := newMachine(p, 1, 32*mib, 16*mib)
			began := time.Now()
			step := func(what string) { t.Logf("%5.1fs %s", time.Since(began).Seconds(), what) }
			p.startAll()
			m.write(5 * time.Millisecond)
			before, _ := m.record.Acked()
			start := time.Now()
			p.protect(ctx)
			step("protected")
			after, _ := m.record.Acked()
			require.Greater(t, after, before, "the guest writes during initial replication")

			points := m.since(start, 5, 60*time.Second)
			require.Equal(t, replica.KindBase, points[0].Kind)
			m.failover(ctx, points[1].Ordinal)
			step("failed over to an older point")

			require.NoError(t, p.landfall(ctx, nil, "resync", machineName, "--wait"))
			m.since(time.Now(), 2, 60*time.Second)
			require.NoError(t, m.only(ctx, 1, 1))
			step("resynchronised")

			p.killAll()
			p.startAll()
			points = m.since(time.Now(), 2, 90*time.Second)
			require.NoError(t, m.only(ctx, 1, 1), "after a kill of everything a delta follows")
			step("killed and back")

			m.failover(ctx, points[len(points)-1].Ordinal)
			m.rest()
			step("failed over to the latest point")
			require.NoError(t, m.verifyNew(ctx, 0))
			require.GreaterOrEqual(t, len(m.verified), mostOnAzurite)
			t.Logf("%d points verified, %d of them read from a checkpoint", len(m.verified), m.based)

			var listed struct {
				Points []struct {
					Ordinal string `json:"ordinal"`
				} `json:"points"`
			}
			require.NoError(t, p.landfall(ctx, &listed, "points", machineName))
			require.GreaterOrEqual(t, len(listed.Points), len(m.verified), "the command line lists them all")
			for i := len(p.order) - 1; i >= 0; i-- {
				require.NoError(t, p.programs[p.order[i]].interrupt(30*time.Second))
			}
		})
	}
}
