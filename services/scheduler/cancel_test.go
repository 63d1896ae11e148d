package scheduler_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
)

// Cancelled after the close: epoch and open are taken over from the chain, the source is started, and what it wrote on
// its own in the meantime is in the next point: it was tracked all the time.
func TestUnplannedFailoverCancelled(t *testing.T) {
	t.Parallel()
	for _, ranOn := range []bool{false, true} {
		t.Run(fmt.Sprint("source ran on ", ranOn), func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			if ranOn {
				l.host.Stubborn(true)
			}
			f := l.StartFailover(l.host, "f1", unplanned)
			l.awaitState(scheduler.UnplannedFailoverInProgress)
			f.CloseAndSay()
			f.Phase(waiting)
			vm := l.awaitState(scheduler.FailedOver)
			if !ranOn {
				l.awaitReleased()
			}
			l.host.Write(block("os", 7), block("data", 1))
			f.Phase(cancelling)
			l.awaitState(scheduler.CancellingFailover)
			require.Zero(t, l.host.Calls("StartMachine"), "not before the open")
			f.Open()
			f.Phase(cancelled)
			after := l.goesOn(scheduler.Protected)
			require.GreaterOrEqual(t, after.GetEpoch(), vm.GetEpoch())
			require.NotZero(t, after.GetOpen())
			require.Zero(t, after.GetCounters().GetComparePasses())
			off, fence, _ := l.host.Power()
			require.False(t, off)
			require.Empty(t, fence)
		})
	}
}

// Where tracking lives in the hypervisor's process, releasing the machine gave it up: a comparison follows.
func TestCancelledAfterReleaseNeedsResync(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.host.TrackByBitmaps()
	f := l.StartFailover(l.host, "f1", planned)
	l.awaitStage(ready)
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitReleased()
	f.Phase(cancelling)
	f.Open()
	f.Phase(cancelled)
	vm := l.awaitState(scheduler.ResyncRequired)
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, vm.GetResyncReason())
	require.Nil(t, vm.GetFailover())
	_, err := l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	require.NoError(t, err)
	l.goesOn(scheduler.Protected)
}

// A rewind that was not taken back leaves the host's base above the chain's state: never a delta on top of it.
func TestCancelledAfterRewindNeedsResync(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.awaitPoints(2)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitState(scheduler.UnplannedFailoverInProgress)
	f.CloseAndSay()
	chain, err := replica.Open(testkit.Context(t), l.Store, replica.Lineage(l.vm().GetLineage()))
	require.NoError(t, err)
	points := l.Points(l.vm().GetLineage())
	_, err = chain.Commit(testkit.Context(t), replica.Proposal{Kind: replica.KindRewind, Failover: "f1", Base: replica.Ordinal(points[0])})
	if err != nil {
		t.Skipf("a rewind without segments is refused: %v", err)
	}
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
	f.Phase(cancelling)
	f.Open()
	f.Phase(cancelled)
	vm := l.awaitState(scheduler.ResyncRequired)
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BASE_AHEAD, vm.GetResyncReason())
}

// A cancellation that waits for a dead host does not stand in the way of another unplanned failover, and several
// failovers follow each other.
func TestFailoversOneAfterAnother(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitFenced()
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
	l.host.Fail(func(string) error { return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer") })
	f.Phase(cancelling)
	f.Open()
	f.Phase(cancelled)
	l.await("waits", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetState() == scheduler.CancellingFailover && vm.GetRetry().GetAttempt() > 1
	})
	g := l.StartFailover(l.host, "f2", unplanned)
	vm := l.await("the second", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetState() == scheduler.UnplannedFailoverInProgress && vm.GetFailover().GetFailover() == g.Name()
	})
	require.False(t, vm.GetFailover().GetSourceFenced())
	require.Equal(t, scheduler.Protected, vm.GetFailover().GetFrom())
	l.host.Fail(nil)
	l.awaitFenced()
	g.Phase(cancelled) // before its close
	l.goesOn(scheduler.Protected)
	off, fence, _ := l.host.Power()
	require.False(t, off)
	require.Empty(t, fence)
	h := l.StartFailover(l.host, "f3", planned)
	vm = l.awaitStage(ready)
	require.Equal(t, h.Name(), vm.GetFailover().GetFailover())
	l.lastPointIsLive(vm)
}

// A failover that failed after the close is started again under its own record.
func TestFailedFailoverIsStartedAgain(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	f := l.StartFailover(l.host, "f1", planned)
	l.awaitStage(ready)
	f.CloseAndSay()
	l.awaitStage(closed)
	f.Phase(failed)
	l.awaitState(scheduler.FailoverFailed)
	l.await("critical", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() == typesv1.Health_HEALTH_CRITICAL })
	stops := l.host.Calls("StopMachine")
	f.Phase(starting)
	vm := l.awaitState(scheduler.PlannedFailoverInProgress)
	require.Equal(t, closed, vm.GetFailover().GetStage())
	require.True(t, vm.GetFailover().GetSourceFenced() || l.host.Calls("StopMachine") > stops)
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
}

// An unplanned failover ends a comparison, whose job is cancelled; a cancelled one leaves the comparison to be made again.
func TestUnplannedFailoverEndsResync(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.host.LoseBaseline(typesv1.ResyncReason_RESYNC_REASON_TRACKING_BROKEN)
	l.awaitState(scheduler.ResyncRequired)
	release := make(chan struct{})
	l.Workers.Hook(func(ctx context.Context, _ proto.Message) error { await(ctx, release); return nil })
	resp, err := l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	require.NoError(t, err)
	l.await("comparing", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetPass() != nil })
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitState(scheduler.UnplannedFailoverInProgress)
	testkit.Eventually(t, patien, func() bool {
		job, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: resp.GetJob().GetName()})
		require.NoError(t, err)
		return job.GetJob().GetState() == typesv1.JobState_JOB_STATE_CANCELLED
	})
	close(release)
	l.Workers.Hook(nil)
	f.Phase(cancelling)
	f.Phase(cancelled)
	vm := l.awaitState(scheduler.ResyncRequired)
	require.NotZero(t, vm.GetResyncReason())
	_, err = l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	require.NoError(t, err)
	l.goesOn(scheduler.Protected)
}

// A paused VM that was failed over and brought back before the close is paused again.
func TestCancelledGoesBackToPaused(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	_, err := l.protection.PauseReplication(testkit.Context(t), &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitFenced()
	f.Phase(cancelled)
	l.awaitState(scheduler.Paused)
	_, err = l.protection.ResumeReplication(testkit.Context(t), &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	l.goesOn(scheduler.Protected)
}

// The hypervisor of a machine that was off already is gone, with its bitmaps: no last point can be cut, and that is said.
func TestPlannedFailoverWithoutHypervisor(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.host.Fail(func(method string) error {
		if method == "CutPoint" {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, "nothing listens")
		}
		return nil
	})
	f := l.StartFailover(l.host, "f1", planned)
	vm := l.awaitStage(refusedStage)
	require.Equal(t, "HYPERVISOR_UNREACHABLE", vm.GetFailover().GetError().GetReason())
	f.Phase(failed)
	l.awaitState(scheduler.FailoverFailed)
	l.host.Fail(nil)
	f.Phase(cancelling)
	f.Phase(cancelled)
	l.goesOn(scheduler.Protected)
}

// The host's last point was on its way when the unplanned failover began, and committed just before the close. The host
// is told when it is back, and what follows a cancellation stands on that point.
func TestUnplannedFailoverWithAPointOnItsWay(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	release, held := make(chan struct{}), make(chan uint64, 16)
	l.Workers.Hook(func(ctx context.Context, task proto.Message) error {
		held <- task.(*uploaderv1.ShipTask).GetPoint().GetOrdinal()
		await(ctx, release)
		return nil
	})
	point := <-held
	f := l.StartFailover(l.host, "f1", unplanned)
	vm := l.awaitFenced()
	close(release)
	testkit.Eventually(t, patien, func() bool {
		points := l.Points(vm.GetLineage())
		return points[len(points)-1] == point
	})
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitReleased()
	require.Equal(t, point, l.host.Status().GetBase(), "it is in the chain, so it is the host's base")
	f.Phase(cancelling)
	f.Open()
	f.Phase(cancelled)
	l.Workers.Hook(nil)
	l.goesOn(scheduler.Protected)
}

// Of two that began at once the orchestrator takes one record away again; the VM follows the one that stays.
func TestFailoverThatLostAgainstAnother(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	g := l.StartFailover(l.host, "f2", unplanned)
	l.awaitFenced()
	f := l.StartFailover(l.host, "f3", unplanned)
	g.Delete()
	vm := l.await("the other", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetFailover().GetFailover() == f.Name() })
	require.Equal(t, scheduler.Protected, vm.GetFailover().GetFrom())
	l.awaitFenced()
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
}

// Protection of a VM that was committed and never seen off ends: the host is asked once more, the job says what is known,
// and the machine is not started.
func TestDisableOfAnUnfencedVM(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.host.Stubborn(true)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitState(scheduler.UnplannedFailoverInProgress)
	f.CloseAndSay()
	f.Phase(committed_)
	l.awaitState(scheduler.Committed)
	resp, err := l.protection.DisableProtection(testkit.Context(t), &schedulerv1.DisableProtectionRequest{Vm: "web01"})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return l.vm() == nil })
	job, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: resp.GetJob().GetName()})
	require.NoError(t, err)
	require.Contains(t, job.GetJob().GetSteps()[0].GetDetail(), "NOT")
	_, fence, _ := l.host.Power()
	require.Equal(t, f.Name(), fence)
	require.Zero(t, l.host.Calls("StartMachine"))
}
