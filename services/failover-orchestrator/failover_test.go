package failoverorchestrator_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func latestProcessed() *failoverv1.PointSelector {
	return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestProcessed{LatestProcessed: true}}
}

// A planned failover loses nothing: what the source wrote last is what comes up; commit makes it final.
func TestPlanned(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "up")
	r := takeOver(out, nil)
	r.RequestId = "move-1"
	job := g.failOver(r)
	require.Equal(t, typesv1.JobKind_JOB_KIND_PLANNED_FAILOVER, job.Kind)
	require.Equal(t, job.Name, g.failOver(r).Name, "a repeated request is the same job")
	f := g.awaitPhase(phaseUp)
	g.requireUp(f, m, 5)
	require.Zero(t, f.RewindSequence)
	require.False(t, src.isRunning())
	require.Equal(t, []string{
		"check-target SUCCEEDED", "stop-source SUCCEEDED", "close-lineage SUCCEEDED", "choose-point SUCCEEDED", "claim-target SUCCEEDED",
		"materialise-disks SUCCEEDED", "describe-machine SUCCEEDED", "boot-machine SUCCEEDED", "rewind-replica SKIPPED", "drain-journal SUCCEEDED",
	}, g.steps(job.Name))
	job = g.job(job.Name)
	require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, job.State)
	require.Contains(t, job.RequestedBy, "otto")
	require.Equal(t, "qemu", job.GetFailover().Target)
	require.Equal(t, "guest-agent", job.GetFailover().Boot.Proof)
	require.Equal(t, f.Files, job.GetFailover().Files)
	for _, s := range job.Steps {
		require.NotNil(t, s.StartTime, s.Id)
		require.NotNil(t, s.EndTime, s.Id)
	}
	require.Equal(t, job.Name, g.failOver(r).Name, "and when it is up")
	g.refusedFailover(takeOver(out+"2", latest()), typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE)
	g.refused(request(out+"2", latest()), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	backlog, err := g.bus.Backlog(testkit.Context(t), bus.KindApply, "lab")
	require.NoError(t, err)
	require.EqualValues(t, 1, backlog)

	commit := g.commitFailover()
	f = g.awaitPhase(phaseCommitted)
	require.NotNil(t, f.CommitTime)
	require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, g.job(commit.Name).State)
	require.Equal(t, commit.Name, g.commitFailover().Name)
	require.True(t, g.chain().Closed())
	require.True(t, m.runs(out))
	_, err = g.client.CancelFailover(testkit.Context(t), &failoverv1.CancelFailoverRequest{Failover: f.Name})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_NOT_AT_SAFE_POINT), "%v", err)
	_, err = g.client.CleanUpTestFailover(testkit.Context(t), &failoverv1.CleanUpTestFailoverRequest{Failover: f.Name})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE), "%v", err)

	var phases []string
	testkit.Eventually(t, 10*time.Second, func() error {
		phases = nil
		for _, e := range g.received("failover.changed") {
			var m eventsv1.FailoverChanged
			require.NoError(t, e.Decode(&m))
			require.Equal(t, "planned", m.Kind)
			phases = append(phases, m.Phase)
		}
		if len(phases) < 4 {
			return fmt.Errorf("%v", phases)
		}
		return nil
	})
	require.ElementsMatch(t, []string{"starting", "waiting-commit", "committing", "committed"}, phases)
}

// An unplanned failover brings every kind of point up without the scheduler, and a cancellation puts the chain back to
// its newest point, from which the next failover begins.
func TestUnplanned(t *testing.T) {
	g, m := bootRig(t)
	g.stopScheduler()
	g.start(g.store, true)
	for _, c := range []struct {
		name    string
		point   *failoverv1.PointSelector
		want    uint64
		rewinds bool
	}{
		{"latest", latest(), 4, false},
		{"an older one", ordinal(3), 3, true},
		{"latest processed", latestProcessed(), 2, true},
		{"latest again", latest(), 4, false},
	} {
		out := filepath.Join(t.TempDir(), "up")
		job := g.failOver(takeOver(out, c.point))
		f := g.awaitPhase(phaseUp)
		g.requireUp(f, m, c.want)
		require.Equal(t, c.rewinds, f.RewindSequence != 0, c.name)
		require.EqualValues(t, 2, f.Machine.Cpus, "the machine is that of the point")
		require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, g.job(job.Name).State)

		cancel := g.cancelFailover()
		f = g.awaitPhase(phaseCancelled)
		g.requireBack(f, m, 4)
		require.Equal(t, []string{"stop-machine SUCCEEDED", "remove-copy SUCCEEDED", "open-lineage SUCCEEDED"}, g.steps(cancel.Name))
		require.Equal(t, cancel.Name, g.cancelFailover().Name)
		_, err := g.client.CommitFailover(testkit.Context(t), &failoverv1.CommitFailoverRequest{Vm: vmName})
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE), "%v", err)
	}
}

// What cannot work, or must not, is refused before anything happens.
func TestFailoverRefusals(t *testing.T) {
	g, _ := bootRig(t)
	g.start(g.store, true)
	free := filepath.Join(t.TempDir(), "up")
	unfenced := takeOver(free, latest())
	unfenced.AcceptUnfenced = false
	g.refusedFailover(unfenced, typesv1.ErrorReason_ERROR_REASON_SOURCE_NOT_FENCED)
	g.refusedFailover(takeOver(free, ordinal(9)), typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND)
	g.refusedFailover(takeOver(filepath.Join(free, "no", "parent"), latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE)
	chosen := takeOver(free, nil)
	chosen.Point = ordinal(3)
	g.refusedFailover(chosen, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)
	chosen = takeOver(free, nil)
	chosen.AcceptUnfenced = true
	g.refusedFailover(chosen, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)
	g.setState(typesv1.ProtectionState_PROTECTION_STATE_RESYNC_REQUIRED)
	g.refusedFailover(takeOver(free, nil), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	g.setState(typesv1.ProtectionState_PROTECTION_STATE_INITIAL_REPLICATING)
	g.refusedFailover(takeOver(free, latest()), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	g.setState(typesv1.ProtectionState_PROTECTION_STATE_PROTECTED)
	for _, r := range []*failoverv1.StartFailoverRequest{takeOver(free, latest()), takeOver(free, nil)} {
		r.ValidateOnly, r.RequestId = true, "look"
		v, err := g.client.StartFailover(testkit.Context(t), r)
		require.NoError(t, err)
		require.Nil(t, v.Job)
	}
	require.NoDirExists(t, free)
	require.False(t, g.chain().Closed())
	_, err := g.viewer.StartFailover(testkit.Context(t), takeOver(free, latest()))
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED), "%v", err)
	for _, r := range []*failoverv1.CancelFailoverRequest{{Vm: vmName}, {Failover: "failovers/none"}} {
		_, err = g.client.CancelFailover(testkit.Context(t), r)
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND), "%v", err)
	}

	// A drill stands in the way of a planned failover and not of a disaster.
	drill := filepath.Join(t.TempDir(), "drill")
	g.test(request(drill, latest()))
	g.await(ready)
	g.refusedFailover(takeOver(free, nil), typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
	_, err = g.client.CancelFailover(testkit.Context(t), &failoverv1.CancelFailoverRequest{Failover: g.failover().Name})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE), "%v", err)
	g.failOver(takeOver(free, latest()))
	g.awaitPhase(phaseUp)
	g.requirePoint(drill, 4)

	// A fenced source needs nobody's consent.
	g.cancelFailover()
	g.awaitPhase(phaseCancelled)
	g.setVM(vmName, func(vm *schedulerv1.ProtectedVm) { vm.Failover = &schedulerv1.FailoverProgress{SourceFenced: true} })
	unfenced.OutDir = filepath.Join(t.TempDir(), "fenced")
	g.failOver(unfenced)
	g.awaitPhase(phaseUp)
}

// The scheduler's refusal is the failover's error; nothing was closed, and another attempt replaces it.
func TestSchedulerRefuses(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	src.set(func(s *source) {
		s.refuse = errcat.Detail(errcat.New(typesv1.ErrorReason_ERROR_REASON_JOB_IN_PROGRESS, "busy"), time.Now())
	})
	g.start(g.store, true)
	job := g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	first := g.awaitPhase(phaseFailed)
	require.Equal(t, "JOB_IN_PROGRESS", first.Error.Reason)
	require.Equal(t, "JOB_IN_PROGRESS", g.job(job.Name).Error.Reason)
	require.False(t, g.chain().Closed())
	testkit.Eventually(t, 10*time.Second, func() bool { // the scheduler of this test is not as strict as the state machine
		vm, _, err := g.vms.Get(testkit.Context(t), bus.Key("lab", vmID))
		require.NoError(t, err)
		return vm.State == typesv1.ProtectionState_PROTECTION_STATE_FAILOVER_FAILED
	})
	again := takeOver(filepath.Join(t.TempDir(), "up"), nil)
	g.refusedFailover(again, typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE)
	g.setState(typesv1.ProtectionState_PROTECTION_STATE_PROTECTED)
	src.set(func(s *source) { s.refuse = nil })
	g.failOver(again)
	f := g.awaitPhase(phaseUp)
	require.NotEqual(t, first.Name, f.Name)
	g.requireUp(f, m, 5)
	old, err := g.viewer.GetFailover(testkit.Context(t), &failoverv1.GetFailoverRequest{Name: first.Name})
	require.NoError(t, err)
	require.Equal(t, phaseCancelled, old.Failover.Phase)
}

// A disaster waits for nobody: an unplanned failover takes the place of a planned one whose source does not stop, and it
// begins while the scheduler still follows one that is over.
func TestUnplannedAfterPlanned(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	src.set(func(s *source) { s.hold = schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE })
	g.start(g.store, true)
	g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	testkit.Eventually(t, 10*time.Second, func() bool {
		return g.vm().GetFailover().GetStage() == schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE
	})
	g.refusedFailover(takeOver(filepath.Join(t.TempDir(), "up"), latest()), typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE)
	g.cancelFailover()
	g.awaitPhase(phaseCancelled)
	testkit.Eventually(t, 10*time.Second, func() bool { return g.vm().State == typesv1.ProtectionState_PROTECTION_STATE_PROTECTED })
	for _, state := range []typesv1.ProtectionState{
		typesv1.ProtectionState_PROTECTION_STATE_PLANNED_FAILOVER_IN_PROGRESS, typesv1.ProtectionState_PROTECTION_STATE_CANCELLING_FAILOVER,
	} {
		g.setState(state)
		g.refusedFailover(takeOver(filepath.Join(t.TempDir(), "up"), nil), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
		g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), latest()))
		g.requireUp(g.awaitPhase(phaseUp), m, 4)
		g.cancelFailover()
		g.awaitPhase(phaseCancelled)
		testkit.Eventually(t, 10*time.Second, func() bool { return g.vm().State == typesv1.ProtectionState_PROTECTION_STATE_PROTECTED })
	}
}

// While the source is being stopped the job says how far that is, and a cancellation is heard at once; the lineage is
// never closed then, and the source may run.
func TestCancelBeforeTheClose(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	src.set(func(s *source) { s.hold = schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE })
	g.start(g.store, true)
	job := g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), nil))
	testkit.Eventually(t, 10*time.Second, func() error {
		if s := g.job(job.Name).Steps[1]; s.Detail != "stopping source" {
			return fmt.Errorf("%v", s)
		}
		return nil
	})
	cancel := g.cancelFailover()
	require.Equal(t, cancel.Name, g.cancelFailover().Name)
	f := g.awaitPhase(phaseCancelled)
	g.requireBack(f, m, 4)
	require.Equal(t, typesv1.JobState_JOB_STATE_CANCELLED, g.job(job.Name).State)
	require.Equal(t, []string{"stop-machine SKIPPED", "remove-copy SUCCEEDED", "open-lineage SKIPPED"}, g.steps(cancel.Name))
	require.Zero(t, g.chain().Fence.Seq)
	testkit.Eventually(t, 10*time.Second, func() bool { return src.isRunning() })
}

// A cancellation in any step turns back from there.
func TestCancelInEveryStep(t *testing.T) {
	g, m := bootRig(t)
	all := []string{"check-target", "close-lineage", "close", "choose-point", "claim-target", "materialise-disks", "describe-machine", "boot-machine", "rewind-replica", "rest"}
	for _, step := range sample(t, all, 4) {
		for _, when := range []string{"before-", "after-"} {
			if step == "rest" && when == "after-" {
				continue
			}
			i := g.start(g.store, true)
			here, hold := make(chan struct{}), make(chan struct{})
			failpoint.Disarm()
			failpoint.ArmFunc("failover-orchestrator/"+when+step, func() error {
				failpoint.Disarm()
				close(here)
				<-hold
				return nil
			})
			job := g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), ordinal(3)))
			wait(t, here)
			g.cancelFailover()
			close(hold)
			f := g.awaitPhase(phaseCancelled)
			g.requireBack(f, m, 4)
			if step != "rest" {
				require.Equal(t, typesv1.JobState_JOB_STATE_CANCELLED, g.job(job.Name).State, when+step)
			}
			i.stop()
		}
	}
}

// A machine that ends before it is up fails the failover: what was made goes, the lineage stays closed. It is started
// again under the same id, also at another point, or cancelled.
func TestFailedBootIsTriedAgain(t *testing.T) {
	g, m := bootRig(t)
	src := g.follow()
	g.start(g.store, true)
	m.setDead(true)
	out := filepath.Join(t.TempDir(), "up")
	job := g.failOver(takeOver(out, ordinal(3)))
	first := g.awaitPhase(phaseFailed)
	require.Equal(t, "TARGET_DID_NOT_BOOT", first.Error.Reason)
	require.NoDirExists(t, out)
	require.False(t, m.runs(out))
	require.True(t, g.chain().Closed(), "the source must not go on by itself")
	require.Equal(t, "loading", g.job(job.Name).GetFailover().Boot.ConsoleTail, "what was seen is kept")
	_ = src
	testkit.Eventually(t, 10*time.Second, func() bool {
		vm, _, err := g.vms.Get(testkit.Context(t), bus.Key("lab", vmID))
		require.NoError(t, err)
		return vm.State == typesv1.ProtectionState_PROTECTION_STATE_FAILOVER_FAILED
	})
	g.refusedFailover(takeOver(out, nil), typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE)
	g.refused(request(out, latest()), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	_, err := g.client.CommitFailover(testkit.Context(t), &failoverv1.CommitFailoverRequest{Vm: vmName})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE), "%v", err)

	m.setDead(false)
	r := takeOver(out, latest())
	r.RequestId, r.AcceptUnfenced = "again", false // it was accepted
	second := g.failOver(r)
	require.NotEqual(t, job.Name, second.Name)
	require.Equal(t, second.Name, g.failOver(r).Name)
	f := g.awaitPhase(phaseUp)
	require.Equal(t, first.Name, f.Name)
	require.Equal(t, first.CloseSequence, f.CloseSequence)
	g.requireUp(f, m, 4)
	g.cancelFailover()
	g.requireBack(g.awaitPhase(phaseCancelled), m, 4)
}

// A copy that cannot be removed keeps the cancellation from opening the lineage; it can be asked for again.
func TestCancelFails(t *testing.T) {
	g, m := bootRig(t)
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "up")
	g.failOver(takeOver(out, latest()))
	g.awaitPhase(phaseUp)
	require.NoError(t, os.Remove(filepath.Join(out, "os.vhd")))
	require.NoError(t, os.MkdirAll(filepath.Join(out, "os.vhd", "stubborn"), 0o750))
	job := g.cancelFailover()
	f := g.awaitPhase(phaseCancelFailed)
	require.Equal(t, "TARGET_UNWRITABLE", f.Error.Reason)
	require.Equal(t, typesv1.JobState_JOB_STATE_FAILED, g.job(job.Name).State)
	require.True(t, g.chain().Closed())
	g.refusedFailover(takeOver(out+"2", latest()), typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE)
	require.NoError(t, os.Remove(filepath.Join(out, "os.vhd", "stubborn")))
	require.NotEqual(t, job.Name, g.cancelFailover().Name)
	g.requireBack(g.awaitPhase(phaseCancelled), m, 4)
}

// Target vhd boots nothing: the failover is up when its disks are.
func TestFailoverToFolder(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	r := takeOver(filepath.Join(t.TempDir(), "up"), ordinal(3))
	r.Target = failoverv1.TargetKind_TARGET_KIND_VHD
	job := g.failOver(r)
	g.requireUp(g.awaitPhase(phaseUp), nil, 3)
	require.NotContains(t, strings.Join(g.steps(job.Name), " "), "boot-machine")
	cancel := g.cancelFailover()
	g.requireBack(g.awaitPhase(phaseCancelled), nil, 4)
	require.Equal(t, []string{"remove-copy SUCCEEDED", "open-lineage SUCCEEDED"}, g.steps(cancel.Name))
}

// A copy is only taken away where it was made: another machine says so and does not claim success. A folder that both see
// is one for both; a machine that runs is not.
func TestAnotherMachine(t *testing.T) {
	g, m := bootRig(t)
	g.machineName = "alpha"
	first := g.start(g.store, true)
	drill, boots := filepath.Join(t.TempDir(), "drill"), filepath.Join(t.TempDir(), "boots")
	g.test(request(drill, latest()))
	require.Equal(t, "alpha", g.await(ready).MachineHost)
	first.stop()

	g.machineName = "beta"
	second := g.start(g.store, true)
	require.NoError(t, os.Rename(drill, drill+"-elsewhere"))
	job := g.cleanUp()
	f := g.await(cleanupFailed)
	require.Equal(t, "TARGET_UNAVAILABLE", f.Error.Reason)
	require.Contains(t, f.Error.What, "alpha")
	require.Equal(t, typesv1.JobState_JOB_STATE_FAILED, g.job(job.Name).State)
	require.NoError(t, os.Rename(drill+"-elsewhere", drill))
	g.cleanUp()
	g.await(clean)
	require.NoDirExists(t, drill)

	g.failOver(takeOver(boots, latest()))
	require.Equal(t, "beta", g.awaitPhase(phaseUp).MachineHost)
	second.stop()
	g.machineName = "alpha"
	g.start(g.store, true)
	g.cancelFailover()
	f = g.awaitPhase(phaseCancelFailed)
	require.Equal(t, "TARGET_UNAVAILABLE", f.Error.Reason)
	require.True(t, m.runs(boots))
	require.True(t, g.chain().Closed(), "not opened while the copy runs")
}

// Of many requests at once exactly one failover comes up.
func TestRacingFailovers(t *testing.T) {
	g, m := bootRig(t)
	g.start(g.store, true)
	dirs := []string{}
	results := make(chan error)
	for i := range 5 {
		dirs = append(dirs, filepath.Join(t.TempDir(), fmt.Sprint(i)))
		r := takeOver(dirs[i], latest())
		r.RequestId = fmt.Sprint("racer-", i)
		go func() {
			_, err := g.client.StartFailover(context.Background(), r)
			results <- err
		}()
	}
	for range dirs {
		if err := <-results; err != nil {
			require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE), "%v", err)
		}
	}
	testkit.Eventually(t, 20*time.Second, func() error {
		up := 0
		page, err := g.viewer.ListFailovers(testkit.Context(t), &failoverv1.ListFailoversRequest{Vm: vmName})
		require.NoError(t, err)
		for _, f := range page.Failovers {
			switch f.Phase {
			case phaseUp:
				up++
			case phaseStarting:
				return fmt.Errorf("%s is starting", f.Name)
			}
		}
		if up != 1 {
			return fmt.Errorf("%d are up: %v", up, page.Failovers)
		}
		return nil
	})
	running := 0
	for _, d := range dirs {
		if m.runs(d) {
			running++
		}
	}
	require.Equal(t, 1, running)
}
