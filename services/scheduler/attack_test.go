package scheduler_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
)

// healthReasons are the reasons of a VM's health.
func healthReasons(vm *schedulerv1.ProtectedVm) (out []string) {
	for _, r := range vm.GetHealthReasons() {
		out = append(out, r.GetReason())
	}
	return out
}

// awaitHealth waits until a reason stands in a VM's health, which is critical.
func (l *lab) awaitCritical(reason string) *schedulerv1.ProtectedVm {
	l.t.Helper()
	return l.await("critical for "+reason, func(vm *schedulerv1.ProtectedVm) bool {
		for _, r := range healthReasons(vm) {
			if r == reason {
				return vm.GetHealth() == typesv1.Health_HEALTH_CRITICAL
			}
		}
		return false
	})
}

// A source that was off and fenced is started at its host, as by a host that reboots and starts its machines: it is seen,
// said and stopped again, however long ago the failover was.
func TestFencedSourceThatIsStartedIsStoppedAgain(t *testing.T) {
	t.Parallel()
	for _, final := range []failoverv1.FailoverPhase{waiting, committed_} {
		t.Run(final.String(), func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			f := l.StartFailover(l.host, "f1", unplanned)
			l.awaitFenced()
			f.CloseAndSay()
			f.Phase(final)
			if final == waiting {
				l.awaitReleased()
			} // else it is started while it is being released
			l.await("calm", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() != typesv1.Health_HEALTH_CRITICAL })
			l.host.Stubborn(true)
			l.host.TurnOn()
			vm := l.awaitCritical(scheduler.HealthNotFenced)
			require.False(t, vm.GetFailover().GetSourceFenced())
			l.host.Stubborn(false)
			l.awaitFenced()
			off, fence, _ := l.host.Power()
			require.True(t, off)
			require.Equal(t, f.Name(), fence)
		})
	}
}

// A host that does not answer proves nothing about a machine that it said was off.
func TestSilentHostKeepsItsFence(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitFenced()
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitReleased()
	l.host.Fail(func(string) error { return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer") })
	asked := l.host.Calls("StopMachine")
	testkit.Eventually(t, patien, func() bool { return l.host.Calls("StopMachine") > asked+2 })
	require.True(t, l.vm().GetFailover().GetSourceFenced())
}

// The source is started by hand between the last point and the close, which comes late: what it wrote is in the point that
// is the last then.
func TestSourceStartedBeforeTheClose(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.StartFailover(l.host, "f1", planned)
	first := l.awaitStage(ready).GetFailover().GetFinalPoint()
	l.host.Stubborn(true)
	l.host.TurnOn()
	vm := l.awaitStage(stopping)
	require.False(t, vm.GetFailover().GetSourceFenced())
	require.Zero(t, vm.GetFailover().GetFinalPoint())
	l.host.Write(block("os", 3), block("data", 3))
	l.host.Stubborn(false)
	vm = l.awaitStage(ready)
	require.Greater(t, vm.GetFailover().GetFinalPoint(), first)
	l.lastPointIsLive(vm)
}

// A cancellation that failed leaves the recovered machine where it is: the VM is not well, and its source is kept off.
func TestFailedCancellationKeepsTheSourceFenced(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.host.Stubborn(true)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitState(scheduler.UnplannedFailoverInProgress)
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
	f.Phase(cancelling)
	l.awaitState(scheduler.CancellingFailover)
	f.Phase(cancelFailed)
	vm := l.awaitCritical(scheduler.HealthFailoverFailed)
	require.Contains(t, healthReasons(vm), scheduler.HealthNotFenced)
	l.host.Stubborn(false)
	l.awaitFenced()
	l.awaitCritical(scheduler.HealthFailoverFailed)
	_, _, released := l.host.Power()
	require.False(t, released, "what a cancellation needs is kept")
	f.Phase(cancelling)
	l.await("better", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() != typesv1.Health_HEALTH_CRITICAL })
	f.Open()
	f.Phase(cancelled)
	vm = l.goesOn(scheduler.Protected)
	require.Zero(t, vm.GetCounters().GetComparePasses())
	off, _, _ := l.host.Power()
	require.False(t, off)
}

// A request to stop the source that was on its way while the failover was cancelled comes too late: the machine runs on.
func TestStopFromBeforeACancellationIsStale(t *testing.T) {
	t.Parallel()
	for _, closes := range []bool{false, true} {
		l := protectedLab(t)
		f := l.StartFailover(l.host, "f1", unplanned)
		vm := l.awaitFenced()
		late := &hostproviderv1.StopMachineRequest{Vm: guid, Lineage: vm.GetLineage(), Epoch: vm.GetEpoch(), Failover: f.Name()}
		if closes {
			f.CloseAndSay()
			f.Phase(cancelling)
			f.Open()
		}
		f.Phase(cancelled)
		testkit.Eventually(t, patien, func() bool { off, fence, _ := l.host.Power(); return !off && fence == "" })
		_, err := l.host.StopMachine(testkit.Context(t), late)
		require.Truef(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH), "closed %v: %v", closes, err)
		l.goesOn(scheduler.Protected)
	}
}

// The clock was put back between two failovers: the second one is followed all the same, and the source that it needs off
// is not started because the first one is over.
func TestFailoversAcrossAClockThatWentBack(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	f := l.StartFailover(l.host, "f1", planned)
	l.awaitStage(ready)
	f.Phase(failed)
	l.awaitState(scheduler.FailoverFailed)
	g := l.StartFailoverAt(l.host, "f2", unplanned, time.Now().Add(-time.Hour))
	vm := l.await("the second", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetFailover().GetFailover() == g.Name() })
	require.Equal(t, scheduler.UnplannedFailoverInProgress, vm.GetState())
	require.True(t, vm.GetFailover().GetSourceFenced())
	f.Phase(cancelled)
	g.CloseAndSay()
	g.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
	require.Zero(t, l.host.Calls("StartMachine"))
}

// A clock that was put back by a day does not stop replication for a day.
func TestReplicationGoesOnAfterAClockThatWentBack(t *testing.T) {
	t.Parallel()
	for what, set := range map[string]func(vm *schedulerv1.ProtectedVm, later *timestamppb.Timestamp){
		"next cycle": func(vm *schedulerv1.ProtectedVm, later *timestamppb.Timestamp) { vm.NextCycleTime = later },
		"next rung": func(vm *schedulerv1.ProtectedVm, later *timestamppb.Timestamp) {
			vm.Retry = &schedulerv1.Retry{Attempt: 1, FirstFailureTime: later, NextTime: later, Error: &typesv1.ErrorDetail{Reason: "UNAVAILABLE"}}
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			l.stop()
			kv, err := bus.OpenKV[*schedulerv1.ProtectedVm](testkit.Context(t), l.Bus, bus.BucketVMs)
			require.NoError(t, err)
			_, _, err = kv.Mutate(testkit.Context(t), bus.Key("lab", guid), func(vm *schedulerv1.ProtectedVm) error {
				set(vm, timestamppb.New(time.Now().Add(24*time.Hour)))
				return nil
			})
			require.NoError(t, err)
			l.start(quick())
			l.goesOn(scheduler.Protected)
		})
	}
}

// A VM that was paused when it was failed over is paused again when that was cancelled, also after the close.
func TestCancelledAfterTheCloseGoesBackToPaused(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	_, err := l.protection.PauseReplication(testkit.Context(t), &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitFenced()
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
	f.Phase(cancelling)
	f.Open()
	f.Phase(cancelled)
	l.awaitState(scheduler.Paused)
	_, err = l.protection.ResumeReplication(testkit.Context(t), &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	l.goesOn(scheduler.Protected)
}

// A failover whose commit failed is not a VM in good health.
func TestHealthWhereAFailoverHangs(t *testing.T) {
	t.Parallel()
	for _, state := range []scheduler.State{scheduler.CommitFailed, scheduler.Committing} {
		vm := &schedulerv1.ProtectedVm{State: state, Failover: &schedulerv1.FailoverProgress{Stage: closed, SourceFenced: true}}
		health, reasons := scheduler.Assess(vm, nil, scheduler.Cycles{}, time.Now())
		require.NotEqual(t, typesv1.Health_HEALTH_NORMAL, health, scheduler.StateName(state))
		require.NotEmpty(t, reasons)
	}
}

// The record of a failover is lost after its close: the source is not started under it, and the VM says that it is stuck.
func TestLostRecordOfAClosedFailoverIsSaid(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitFenced()
	l.stop()
	f.Close()
	f.Delete()
	l.start(quick())
	vm := l.awaitCritical(scheduler.HealthFailoverFailed)
	require.Equal(t, "LINEAGE_CLOSED", vm.GetFailover().GetError().GetReason())
	require.Zero(t, l.host.Calls("StartMachine"))
}
