package changetracker

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const oneFailover, otherFailover = "failovers/one", "failovers/other"

func (h *host) fence(failover string) error {
	_, err := h.client.FenceMachine(testkit.Context(h.t), &changetrackerv1.FenceMachineRequest{Vm: testVM, Lineage: simLineage, Epoch: 1, Failover: failover})
	return err
}

func (h *host) unfence(failover string) error {
	_, err := h.client.UnfenceMachine(testkit.Context(h.t), &changetrackerv1.UnfenceMachineRequest{Vm: testVM, Lineage: simLineage, Epoch: 1, Failover: failover})
	return err
}

func (h *host) fencedBy() string {
	r, err := h.client.GetTracking(testkit.Context(h.t), &changetrackerv1.GetTrackingRequest{Vm: testVM})
	require.NoError(h.t, err)
	return r.Fence
}

func (h *host) refused(disk string) {
	_, err := nbd.Dial(testkit.Context(h.t), h.uri(disk))
	require.ErrorIs(h.t, err, nbd.ErrNoExport)
	require.ErrorContains(h.t, err, oneFailover)
	_, err = nbd.Dial(testkit.Context(h.t), h.uri(disk), nbd.ContextAllocation)
	require.ErrorIs(h.t, err, nbd.ErrNoExport)
}

// A guest that never stops writing is fenced: every write that it was told of is in the last point, and none comes after.
func TestFencedMachineCannotWriteAndItsLastPointIsWhole(t *testing.T) {
	h := newHost(t)
	h.service.tracker.limitLogs = false // a fast guest fills half of its small disk's size with logs
	require.True(t, errcat.Is(h.fence(oneFailover), typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED))
	r := h.newReplica()
	h.protect(r)
	guest, err := nbd.Dial(testkit.Context(t), h.uri("os"))
	require.NoError(t, err)
	var acked, attempts atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				n := attempts.Add(1)
				if err := guest.WriteAt(context.Background(), bytes.Repeat([]byte{byte(n%255 + 1)}, 4096), n%256*4096, false); err != nil {
					return
				}
				acked.Add(1)
			}
		})
	}
	testkit.Eventually(t, 10*time.Second, func() bool { return acked.Load() > 50 })
	require.NoError(t, h.fence(oneFailover))
	wg.Wait()
	require.NoError(t, guest.Close())
	before := h.imageOf("os")
	h.refused("os")
	h.refused("data")
	require.NoError(t, h.fence(oneFailover), "idempotent")
	require.True(t, errcat.Is(h.fence(otherFailover), typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED))
	require.Equal(t, oneFailover, h.fencedBy())

	h.point(3, r)
	require.True(t, bytes.Equal(before, r["os"]))

	h.stop()
	h.start()
	h.attach()
	h.refused("os")
	require.Equal(t, oneFailover, h.fencedBy())
	h.point(4, r)

	require.True(t, errcat.Is(h.unfence(otherFailover), typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED))
	h.refused("os")
	require.NoError(t, h.unfence(oneFailover))
	require.NoError(t, h.unfence(oneFailover), "idempotent")
	require.Empty(t, h.fencedBy())
	guest, err = nbd.Dial(testkit.Context(t), h.uri("os"))
	require.NoError(t, err)
	require.NoError(t, guest.WriteAt(testkit.Context(t), make([]byte, 512), 0, true))
	require.NoError(t, guest.Close())
	h.point(5, r)
}

// A fence is for the failover, not for the protection: it outlives both an unprotect and a new protection.
func TestFenceOutlivesItsLineage(t *testing.T) {
	h := newHost(t)
	h.protect(h.newReplica())
	require.NoError(t, h.fence(oneFailover))
	ctx := testkit.Context(t)
	_, err := h.client.StopTracking(ctx, &changetrackerv1.StopTrackingRequest{Vm: testVM, Lineage: simLineage, Epoch: 1})
	require.NoError(t, err)
	h.refused("os")
	h.stop()
	h.start()
	h.attach()
	h.refused("os")
	const next = "ffffffffffffffffffffffffffffffff"
	_, err = h.client.StartTracking(ctx, &changetrackerv1.StartTrackingRequest{Vm: testVM, Lineage: next, Epoch: 1})
	require.NoError(t, err)
	h.refused("os")
	_, err = h.client.StopTracking(ctx, &changetrackerv1.StopTrackingRequest{Vm: testVM, Lineage: next, Epoch: 1})
	require.NoError(t, err)
	require.NoError(t, h.unfence(oneFailover))
	require.Empty(t, h.fencedBy())
}

// Death at every operation of a fence, and of its lifting: what was answered holds, and there is no third state.
func TestFenceAgainstDeathAtEveryStep(t *testing.T) {
	for _, power := range []bool{false, true} {
		t.Run(fmt.Sprintf("power=%t", power), func(t *testing.T) {
			for n := 0; ; n++ {
				w := newWorld(testkit.Seed(t)+uint64(n), power, none)
				open := func() *Tracker {
					tr := w.tracker()
					_, err := tr.Attach(w.spec())
					require.NoError(t, err)
					return tr
				}
				mortal := func(do func() error) (answered, died bool) {
					w.fs.mu.Lock()
					w.fs.left = n
					w.fs.mu.Unlock()
					err := do()
					return err == nil, w.fs.isDead()
				}
				closed := func(tr *Tracker) bool {
					_, err := tr.export("vm/os")
					st, serr := tr.Status("vm")
					require.NoError(t, serr)
					require.Equal(t, err != nil, st.Fence == oneFailover)
					return err != nil
				}
				tr := open()
				_, err := tr.Start("vm", simLineage, 1)
				require.NoError(t, err)
				answered, died := mortal(func() error { return tr.Fence("vm", simLineage, 1, oneFailover, func() {}) })
				w.end(tr)
				tr = open()
				if answered {
					require.True(t, closed(tr), "step %d", n)
				}
				require.NoError(t, tr.Fence("vm", simLineage, 1, oneFailover, func() {}))
				require.True(t, closed(tr))
				answered, died2 := mortal(func() error { return tr.Unfence("vm", simLineage, 1, oneFailover) })
				w.end(tr)
				tr = open()
				if answered {
					require.False(t, closed(tr), "step %d", n)
				}
				closed(tr)
				w.end(tr)
				if !died && !died2 {
					require.Positive(t, n)
					return
				}
			}
		})
	}
}
