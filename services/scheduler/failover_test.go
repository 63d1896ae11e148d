package scheduler_test

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
	"github.com/landfall-dr/landfall/services/scheduler/schedulertest"
)

const (
	planned   = failoverv1.FailoverKind_FAILOVER_KIND_PLANNED
	unplanned = failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED

	starting   = failoverv1.FailoverPhase_FAILOVER_PHASE_STARTING
	waiting    = failoverv1.FailoverPhase_FAILOVER_PHASE_WAITING_COMMIT
	committing = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTING
	committed_ = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTED
	cancelling = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLING
	cancelled  = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLED
	failed     = failoverv1.FailoverPhase_FAILOVER_PHASE_FAILED

	cancelFailed = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCEL_FAILED

	refusedStage = schedulerv1.FailoverStage_FAILOVER_STAGE_REFUSED
	stopping     = schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE
	ready        = schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE
	closed       = schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED
)

// protectedLab is a lab whose VM is protected and has points.
func protectedLab(t *testing.T) *lab {
	l := newLab(t)
	l.host.Write(block("os", 1), block("data", 2))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	return l
}

func (l *lab) awaitStage(s schedulerv1.FailoverStage) *schedulerv1.ProtectedVm {
	l.t.Helper()
	return l.await(s.String(), func(vm *schedulerv1.ProtectedVm) bool { return vm.GetFailover().GetStage() == s })
}

func (l *lab) awaitFenced() *schedulerv1.ProtectedVm {
	l.t.Helper()
	return l.await("fenced", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetFailover().GetSourceFenced() })
}

func (l *lab) awaitReleased() {
	l.t.Helper()
	testkit.Eventually(l.t, patien, func() bool { _, _, released := l.host.Power(); return released })
}

// lastPointIsLive says that the chain's newest point has everything that the guest ever wrote.
func (l *lab) lastPointIsLive(vm *schedulerv1.ProtectedVm) {
	l.t.Helper()
	points := l.Points(vm.GetLineage())
	final := vm.GetFailover().GetFinalPoint()
	require.Equal(l.t, points[len(points)-1], final)
	require.Equal(l.t, l.host.Live(), l.host.Cuts()[final], "the last point has every write")
	l.Check(l.host, vm.GetLineage())
}

// goesOn says that replication goes on with right deltas and without a copy.
func (l *lab) goesOn(state scheduler.State) *schedulerv1.ProtectedVm {
	l.t.Helper()
	vm := l.awaitState(state)
	require.Nil(l.t, vm.GetFailover())
	require.Equal(l.t, typesv1.ActiveLocation_ACTIVE_LOCATION_PRIMARY, vm.GetActiveLocation())
	l.host.Write(block("os", 6), block("data", 6))
	vm = l.awaitPoints(2)
	l.Check(l.host, vm.GetLineage())
	require.EqualValues(l.t, 1, vm.GetCounters().GetFullPasses())
	return vm
}

// The whole of a planned failover: the guest writes until it is stopped, the last point has all of it, and it is committed.
func TestPlannedFailover(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	stopGuest := l.guest()
	l.awaitPoints(1)
	f := l.StartFailover(l.host, "f1", planned)
	vm := l.awaitStage(ready)
	stopGuest()
	require.Equal(t, scheduler.PlannedFailoverInProgress, vm.GetState())
	require.True(t, vm.GetFailover().GetSourceFenced())
	require.Equal(t, f.Name(), vm.GetFailover().GetFailover())
	require.Nil(t, vm.GetFailover().GetError())
	l.lastPointIsLive(vm)
	off, fence, released := l.host.Power()
	require.True(t, off)
	require.Equal(t, f.Name(), fence)
	require.False(t, released, "nothing is released before the close")
	l.refusesAll()

	f.Close() // found in storage alone
	l.awaitStage(closed)
	l.awaitReleased()
	f.Phase(waiting)
	vm = l.awaitState(scheduler.FailedOver)
	require.Equal(t, typesv1.ActiveLocation_ACTIVE_LOCATION_RECOVERY, vm.GetActiveLocation())
	l.refusesAll()
	f.Phase(committing)
	l.awaitState(scheduler.Committing)
	f.Phase(committed_)
	vm = l.awaitState(scheduler.Committed)
	for _, r := range vm.GetHealthReasons() {
		require.NotEqual(t, scheduler.HealthNotFenced, r.GetReason())
	}

	// Protection can end. The machine is not started, and its fence stays.
	_, err := l.protection.DisableProtection(testkit.Context(t), &schedulerv1.DisableProtectionRequest{Vm: "web01"})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return l.vm() == nil })
	off, fence, _ = l.host.Power()
	require.True(t, off)
	require.Equal(t, f.Name(), fence)
	require.Zero(t, l.host.Calls("StartMachine"))
}

// refusesAll says that nothing else may be done with the VM now.
func (l *lab) refusesAll() {
	l.t.Helper()
	ctx := testkit.Context(l.t)
	_, err := l.protection.PauseReplication(ctx, &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	refused(l.t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	_, err = l.protection.ResumeReplication(ctx, &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	refused(l.t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	_, err = l.protection.Resynchronize(ctx, &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	refused(l.t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	_, err = l.protection.DisableProtection(ctx, &schedulerv1.DisableProtectionRequest{Vm: "web01"})
	refused(l.t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
}

// Killed at any failpoint of a planned failover, at several hits, and started again: the last point is right, and there
// is one. LANDFALL_SCHEDULER_LONG=1 runs more hits.
func TestPlannedFailoverKilledAnywhere(t *testing.T) {
	for _, point := range []string{"after-record", "before-stop", "after-stop", "before-cut", "after-cut", "before-publish", "after-publish", "before-settle", "after-settle"} {
		hits := []int64{2}
		switch {
		case os.Getenv("LANDFALL_SCHEDULER_LONG") != "" && point == "after-record":
			hits = []int64{1, 2, 3, 4, 5, 6, 7}
		case os.Getenv("LANDFALL_SCHEDULER_LONG") != "":
			hits = []int64{1, 2}
		case point == "after-record":
			hits = []int64{1, 3, 5}
		}
		for _, hit := range hits {
			t.Run(fmt.Sprint(point, hit), func(t *testing.T) {
				l := protectedLab(t)
				l.policy("policies/fast", time.Hour) // the cycles that are killed are the failover's
				l.await("idle", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCycle() == nil })
				stopGuest := l.guest()
				if hit == 2 && point != "after-record" && point != "after-stop" && point != "before-stop" {
					l.host.Write(block("os", 5))
					l.host.Crash() // a pass before the last cut
				}
				if hit == 2 && (point == "after-stop" || point == "before-stop") {
					l.host.Stubborn(true)
					time.AfterFunc(100*time.Millisecond, func() { l.host.Stubborn(false) })
				}
				killed := l.killAt("scheduler/"+point, hit)
				f := l.StartFailover(l.host, "f1", planned)
				select {
				case <-killed:
				case <-time.After(patien):
					t.Fatal("the failpoint was never reached")
				}
				l.start(quick())
				vm := l.awaitStage(ready)
				stopGuest()
				l.lastPointIsLive(vm)
				require.Equal(t, f.Name(), vm.GetFailover().GetFailover())
				l.stop()
				f.CloseAndSay()
				f.Phase(waiting)
				l.start(quick())
				l.awaitState(scheduler.FailedOver)
				l.awaitReleased()
			})
		}
	}
}

// A guest that does not stop: the failover waits and says so; it goes on as soon as the guest is off.
func TestPlannedFailoverWaitsForTheGuest(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := quick()
	cfg.StopTimeout = 100 * time.Millisecond
	l.start(cfg)
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	l.host.Stubborn(true)
	l.StartFailover(l.host, "f1", planned)
	vm := l.await("does not stop", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetFailover().GetError().GetReason() == "GUEST_DID_NOT_STOP"
	})
	require.Equal(t, stopping, vm.GetFailover().GetStage())
	require.Equal(t, scheduler.PlannedFailoverInProgress, vm.GetState())
	l.host.Write(block("os", 3)) // it still runs
	l.host.Stubborn(false)
	vm = l.awaitStage(ready)
	require.Nil(t, vm.GetFailover().GetError())
	l.lastPointIsLive(vm)
}

// A planned failover is cancelled before the close: the source runs again and replication goes on with deltas.
func TestPlannedFailoverCancelledBeforeClose(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"ready", "stopping", "at once", "after it failed", "while nobody looked"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			if at == "stopping" {
				l.host.Stubborn(true)
			}
			f := l.StartFailover(l.host, "f1", planned)
			switch at {
			case "ready", "while nobody looked", "after it failed":
				l.awaitStage(ready)
			case "stopping":
				l.awaitStage(stopping)
			}
			if at == "while nobody looked" {
				l.stop()
			}
			if at == "after it failed" {
				f.Phase(failed)
				l.awaitState(scheduler.FailoverFailed)
			}
			f.Phase(cancelling)
			f.Phase(cancelled)
			if at == "while nobody looked" {
				l.start(quick())
			}
			l.goesOn(scheduler.Protected)
			off, fence, _ := l.host.Power()
			require.False(t, off)
			require.Empty(t, fence)
		})
	}
}

// A last point that cannot be shipped at first is tried again soon.
func TestPlannedFailoverRetriesTheLastPoint(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	var failures atomic.Int64
	f := l.StartFailover(l.host, "f1", planned)
	_ = f
	l.Workers.Hook(func(_ context.Context, task proto.Message) error {
		if failures.Add(1) <= 4 {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE, "no route to storage")
		}
		return nil
	})
	vm := l.awaitStage(ready)
	require.Nil(t, vm.GetRetry())
	l.lastPointIsLive(vm)
}

// The bitmap is lost before the last cut: the failover is refused with its reason, and cancelling it brings the source
// back, which needs a comparison. Or somebody goes unplanned from there.
func TestPlannedFailoverWithoutBaseline(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"cancel", "unplanned"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			l.host.Stubborn(true)
			f := l.StartFailover(l.host, "f1", planned)
			l.awaitStage(stopping)
			l.host.LoseBitmap(0)
			l.host.Stubborn(false)
			vm := l.awaitStage(refusedStage)
			require.Equal(t, scheduler.PlannedFailoverInProgress, vm.GetState())
			require.Equal(t, "RESYNC_REQUIRED", vm.GetFailover().GetError().GetReason())
			f.Phase(failed)
			l.awaitState(scheduler.FailoverFailed)
			if way == "unplanned" {
				g := l.StartFailover(l.host, "f2", unplanned)
				vm = l.await("the other", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetFailover().GetFailover() == g.Name() })
				require.Equal(t, scheduler.Protected, vm.GetFailover().GetFrom())
				l.awaitFenced() // under the fence of the first one
				g.CloseAndSay()
				g.Phase(waiting)
				l.awaitState(scheduler.FailedOver)
				l.awaitReleased()
				g.Phase(cancelling)
				g.Open()
				g.Phase(cancelled)
			} else {
				f.Phase(cancelling)
				f.Phase(cancelled)
			}
			vm = l.awaitState(scheduler.ResyncRequired)
			require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, vm.GetResyncReason())
			off, fence, _ := l.host.Power()
			require.False(t, off, "the source runs again")
			require.Empty(t, fence)
			_, err := l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01"})
			require.NoError(t, err)
			l.goesOn(scheduler.Protected)
		})
	}
}

// A planned failover is refused where it is not legal, without moving anything; a later one is not held against.
func TestPlannedFailoverRefused(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	_, err := l.protection.PauseReplication(testkit.Context(t), &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	f := l.StartFailover(l.host, "f1", planned)
	vm := l.awaitStage(refusedStage)
	require.Equal(t, scheduler.Paused, vm.GetState())
	require.Equal(t, "INVALID_STATE", vm.GetFailover().GetError().GetReason())
	f.Phase(failed)
	_, err = l.protection.ResumeReplication(testkit.Context(t), &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	l.awaitPoints(2)
	require.Equal(t, scheduler.Protected, l.vm().GetState())
	require.Zero(t, l.host.Calls("StopMachine"))
	g := l.StartFailover(l.host, "f2", planned)
	vm = l.awaitStage(ready)
	require.Equal(t, g.Name(), vm.GetFailover().GetFailover())
}

// A refusal goes from the record when its failover was cancelled.
func TestRefusalIsForgotten(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	_, err := l.protection.PauseReplication(testkit.Context(t), &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	f := l.StartFailover(l.host, "f1", planned)
	l.awaitStage(refusedStage)
	f.Phase(cancelled)
	l.await("forgotten", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetFailover() == nil })
}

// An unplanned failover of a site that is gone needs nobody there; when the host comes back its machine is fenced.
func TestUnplannedFailoverOfALostHost(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	release := make(chan struct{})
	held := make(chan struct{}, 16)
	l.Workers.Hook(func(ctx context.Context, _ proto.Message) error {
		held <- struct{}{}
		await(ctx, release)
		return nil
	})
	<-held // a point is on its way
	before := l.vm()
	l.host.Fail(func(string) error { return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer") })
	f := l.StartFailover(l.host, "f1", unplanned)
	vm := l.awaitState(scheduler.UnplannedFailoverInProgress)
	require.Nil(t, vm.GetCycle())
	require.Greater(t, vm.GetEpoch(), before.GetEpoch(), "the point in hand is given up")
	f.CloseAndSay()
	close(release)
	l.Workers.Hook(nil)
	f.Phase(waiting)
	vm = l.awaitState(scheduler.FailedOver)
	require.False(t, vm.GetFailover().GetSourceFenced())
	vm = l.await("critical", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() == typesv1.Health_HEALTH_CRITICAL })
	require.Equal(t, scheduler.HealthNotFenced, vm.GetHealthReasons()[0].GetReason())
	asked := l.host.Calls("StopMachine")
	testkit.Eventually(t, patien, func() bool { return l.host.Calls("StopMachine") > asked+2 })
	l.host.Stubborn(true) // it comes back running, and does not want to stop
	l.host.Fail(nil)
	testkit.Eventually(t, patien, func() bool { _, fence, _ := l.host.Power(); return fence == f.Name() })
	require.False(t, l.vm().GetFailover().GetSourceFenced())
	f.Phase(committing)
	f.Phase(committed_)
	l.awaitState(scheduler.Committed)
	l.host.Stubborn(false)
	l.awaitFenced()
	l.awaitReleased()
	l.await("not critical", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() != typesv1.Health_HEALTH_CRITICAL })
	require.Zero(t, l.host.Calls("StartMachine"))
}

// Nobody schedules during the whole failover. The record catches up from wherever the failover is.
func TestDeadSchedulerCatchesUp(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		do   func(f *schedulertest.Failover)
		want scheduler.State
	}{
		{"starting", func(f *schedulertest.Failover) {}, scheduler.UnplannedFailoverInProgress},
		{"closed", func(f *schedulertest.Failover) { f.Close() }, scheduler.UnplannedFailoverInProgress},
		{"waiting", func(f *schedulertest.Failover) { f.CloseAndSay(); f.Phase(waiting) }, scheduler.FailedOver},
		{"committing", func(f *schedulertest.Failover) { f.CloseAndSay(); f.Phase(committing) }, scheduler.Committing},
		{"committed", func(f *schedulertest.Failover) { f.CloseAndSay(); f.Phase(committed_) }, scheduler.Committed},
		{"failed after the close", func(f *schedulertest.Failover) { f.CloseAndSay(); f.Phase(failed) }, scheduler.FailoverFailed},
		{"failed before it", func(f *schedulertest.Failover) { f.Phase(failed) }, scheduler.Protected},
		{"cancelling", func(f *schedulertest.Failover) { f.CloseAndSay(); f.Phase(cancelling) }, scheduler.CancellingFailover},
		{"cancelled before the close", func(f *schedulertest.Failover) { f.Phase(cancelled) }, scheduler.Protected},
		{"cancelled", func(f *schedulertest.Failover) { f.CloseAndSay(); f.Open(); f.Phase(cancelled) }, scheduler.Protected},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			l.stop()
			f := l.StartFailover(l.host, "f1", unplanned)
			c.do(f)
			l.host.Write(block("os", 4))
			l.start(quick())
			switch c.want {
			case scheduler.Protected:
				l.goesOn(c.want)
				require.Zero(t, l.host.Calls("StopMachine"))
			case scheduler.CancellingFailover:
				l.awaitState(c.want)
				require.Zero(t, l.host.Calls("StopMachine"))
				f.Open()
				f.Phase(cancelled)
				l.goesOn(scheduler.Protected)
			default:
				l.awaitState(c.want)
				l.awaitFenced()
				if c.name != "starting" {
					l.awaitReleased()
				}
			}
		})
	}
}
