package failoverorchestrator_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// What the scheduler wrote of the fence does not count once the failover that it held it for is given up: the scheduler
// starts that source now, or has done so already.
func TestFenceOfACancelledFailoverIsNoFence(t *testing.T) {
	g, _ := bootRig(t)
	src := g.follow()
	src.set(func(s *source) { s.hold = schedulerv1.FailoverStage_FAILOVER_STAGE_SENDING_LAST_POINT })
	g.start(g.store, true)
	g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	testkit.Eventually(t, 10*time.Second, func() bool {
		return g.vm().GetFailover().GetStage() == schedulerv1.FailoverStage_FAILOVER_STAGE_SENDING_LAST_POINT
	})
	g.cancelFailover()
	first := g.awaitPhase(phaseCancelled)
	unfenced := takeOver(filepath.Join(t.TempDir(), "up"), latest())
	unfenced.AcceptUnfenced = false
	for _, state := range []typesv1.ProtectionState{
		typesv1.ProtectionState_PROTECTION_STATE_CANCELLING_FAILOVER, typesv1.ProtectionState_PROTECTION_STATE_PLANNED_FAILOVER_IN_PROGRESS,
	} {
		g.setVM(vmName, func(vm *schedulerv1.ProtectedVm) {
			vm.State, vm.Failover = state, &schedulerv1.FailoverProgress{Failover: first.Name, SourceFenced: true}
		})
		g.refusedFailover(unfenced, typesv1.ErrorReason_ERROR_REASON_SOURCE_NOT_FENCED)
	}
}

// One failover takes the place of another that failed, whose source is off: at no instant is the first one over and the
// second not there, or the scheduler would start the source under a disaster's hands.
func TestNoGapBetweenTwoFailovers(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	src.set(func(s *source) {
		s.refuse = errcat.Detail(errcat.New(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, "gone"), time.Now())
	})
	g.start(g.store, true)
	g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	first := g.awaitPhase(phaseFailed)
	g.setVM(vmName, func(vm *schedulerv1.ProtectedVm) {
		vm.State = typesv1.ProtectionState_PROTECTION_STATE_FAILOVER_FAILED
		vm.Failover = &schedulerv1.FailoverProgress{Failover: first.Name, SourceFenced: true}
	})

	kv, err := bus.OpenKV[*failoverv1.Failover](testkit.Context(t), g.bus, bus.BucketFailovers)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(testkit.Context(t))
	current, gap, done := make(chan struct{}), false, make(chan struct{})
	go func() {
		defer close(done)
		phases := map[string]failoverv1.FailoverPhase{}
		for u, err := range kv.Watch(ctx, "") {
			switch {
			case err != nil:
				return
			case u.Kind == bus.Current:
				close(current)
			case u.Kind == bus.Put:
				phases[u.Value.Name] = u.Value.Phase
				gap = gap || phases[first.Name] == phaseCancelled && len(phases) == 1
				if len(phases) > 1 && phases[first.Name] == phaseCancelled {
					return
				}
			}
		}
	}()
	wait(t, current)
	second := takeOver(filepath.Join(t.TempDir(), "up"), latest())
	second.AcceptUnfenced = false
	g.failOver(second)
	f := g.awaitPhase(phaseUp)
	wait(t, done)
	cancel()
	require.False(t, gap, "the first was over before the second was there")
	g.requireUp(f, m, 4)
}

// The new failover is worked on before the handler, which may have died, has ended the one that it replaces.
func TestReplacementFoundHalfDone(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	src.set(func(s *source) {
		s.refuse = errcat.Detail(errcat.New(typesv1.ErrorReason_ERROR_REASON_JOB_IN_PROGRESS, "busy"), time.Now())
	})
	g.start(g.store, true)
	g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	first := g.awaitPhase(phaseFailed)
	g.setState(typesv1.ProtectionState_PROTECTION_STATE_PROTECTED)
	defer failpoint.ArmFunc("failover-orchestrator/before-replace", func() error {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "died")
	})()
	_, err := g.client.StartFailover(testkit.Context(t), takeOver(filepath.Join(t.TempDir(), "up"), latest()))
	require.Error(t, err)
	g.requireUp(g.awaitPhase(phaseUp), m, 4)
	old, err := g.viewer.GetFailover(testkit.Context(t), &failoverv1.GetFailoverRequest{Name: first.Name})
	require.NoError(t, err)
	require.Equal(t, phaseCancelled, old.Failover.Phase)
}

// A source that was found running between its last point and a close that came late has another last point, which is the
// one that comes up.
func TestLastPointAfterTheLast(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	g.start(g.store, true)
	here, hold := make(chan struct{}), make(chan struct{})
	disarm := failpoint.ArmFunc("failover-orchestrator/before-close-lineage", func() error {
		close(here)
		<-hold
		return nil
	})
	g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	wait(t, here)
	disarm()
	require.EqualValues(t, 6, src.lastPoint())
	close(hold)
	g.requireUp(g.awaitPhase(phaseUp), m, 6)
}

// Half a comparison stands above the newest point, failovers to the newest and to an older point come and are cancelled,
// and replication goes on: every point before, between and after is what it was, with and without the replica's pages.
func TestPointsAroundCancelledFailovers(t *testing.T) {
	for _, applies := range []bool{false, true} {
		g, m := bootRig(t)
		g.stopScheduler()
		g.start(g.store, true)
		ctx := testkit.Context(t)
		r, err := replica.Open(ctx, g.store, lineage)
		require.NoError(t, err)
		a, err := replica.NewApplier(r, replica.ApplierOptions{Footer: func(string, int64) []byte { return make([]byte, 512) }})
		require.NoError(t, err)
		apply := func() {
			if applies {
				_, err := a.Advance(ctx, 0)
				require.NoError(t, err)
			}
		}
		takeAndGiveBack := func(point *failoverv1.PointSelector, want, newest uint64) {
			g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), point))
			g.requirePoint(g.awaitPhase(phaseUp).OutDir, want)
			apply()
			g.cancelFailover()
			g.requireBack(g.awaitPhase(phaseCancelled), m, newest)
			apply()
		}
		write := func(kind replica.Kind, o replica.Ordinal) {
			state := g.chain()
			testkit.Fill(g.now["os"][2*mib:2*mib+8192], uint64(o))
			g.epoch, g.open = state.Epoch, state.Open
			g.commit(r, g.config, kind, o, state.StateOrdinal, g.now, change{"os", 2 * mib, 8192})
			apply()
		}
		before := g.now.clone()
		write(replica.KindPartial, 5)
		g.now = before // what a pass carried is no point: the rewinds take it back
		takeAndGiveBack(latest(), 4, 5)
		takeAndGiveBack(ordinal(3), 3, 4)
		write(replica.KindPoint, 6)
		takeAndGiveBack(ordinal(2), 2, 6)
		takeAndGiveBack(ordinal(4), 4, 6)
		write(replica.KindPoint, 7)
		for _, point := range []uint64{2, 3, 4, 6, 7} {
			out := filepath.Join(t.TempDir(), "drill")
			g.test(request(out, ordinal(point)))
			g.await(ready)
			g.requirePoint(out, point)
			g.cleanUp()
			g.await(clean)
		}
	}
}
