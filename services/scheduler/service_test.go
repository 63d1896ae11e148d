package scheduler_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
	"github.com/landfall-dr/landfall/services/scheduler/schedulertest"
)

// A VM is protected while its guest writes; points follow, and each holds exactly what its cut had.
func TestProtectAndReplicate(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 0), block("os", 5), block("data", 2))
	stopGuest := l.guest()
	l.start(quick())
	job := l.protect()
	require.Equal(t, "landfall.types.v1.Job", string(job.ProtoReflect().Descriptor().FullName()))
	l.awaitState(scheduler.Protected)
	vm := l.awaitPoints(4)
	stopGuest()

	l.Check(l.host, vm.GetLineage())
	require.EqualValues(t, 1, vm.GetCounters().GetFullPasses())
	require.EqualValues(t, 0, vm.GetCounters().GetAbandonedPoints())
	require.Positive(t, vm.GetCounters().GetChangedBytes())
	require.NotZero(t, vm.GetLastPoint())
	l.await("processed", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetProcessedPoint() > 0 })

	var done *typesv1.Job
	testkit.Eventually(t, patien, func() bool {
		resp, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: job.GetName()})
		require.NoError(t, err)
		done = resp.GetJob()
		return done.GetState() == typesv1.JobState_JOB_STATE_SUCCEEDED
	})
	require.Len(t, done.GetSteps(), 4)
	for _, s := range done.GetSteps() {
		require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, s.GetState(), s.GetId())
	}
	require.EqualValues(t, 16*schedulertest.BlockSize, done.GetProgress().GetTotalBytes())
	require.Equal(t, done.GetProgress().GetTotalBytes(), done.GetProgress().GetDoneBytes())
	require.Contains(t, done.GetRequestedBy(), "ada")

	got, err := l.protection.GetProtectedVm(testkit.Context(t), &schedulerv1.GetProtectedVmRequest{Vm: "web01"})
	require.NoError(t, err)
	require.NotNil(t, got.GetVm().GetRpo())
	require.NotZero(t, got.GetVm().GetRevision())
	for _, reason := range got.GetVm().GetHealthReasons() { // a busy machine misses cycles of 100 ms, nothing else
		require.Equal(t, scheduler.HealthMissedCycles, reason.GetReason())
	}

	// Every ordinal was used: none is lost, none came twice.
	require.Equal(t, []uint64{2, 3}, l.Points(vm.GetLineage())[:2])
}

// kill stops the running scheduler at a failpoint as a crash would: nothing after it is written.
func (l *lab) killAt(point string, hit int64) (killed <-chan struct{}) {
	down := make(chan struct{})
	var hits atomic.Int64
	ctxDone := make(chan struct{})
	disarm := failpoint.ArmFunc(point, func() error {
		n := hits.Add(1)
		if n < hit {
			return nil
		}
		if n == hit {
			close(ctxDone)
		}
		return failpoint.ErrInjected // whoever comes by until the process is gone dies here as well
	})
	stop := l.stop
	go func() {
		<-ctxDone
		stop()
		disarm()
		close(down)
	}()
	l.t.Cleanup(disarm)
	return down
}

// Killed at any point of a cycle and started again: no point is lost or wrong, ordinals stay dense, and the next cycle is
// a delta.
func TestKilledAnywhere(t *testing.T) {
	for _, point := range []string{"before-cut", "after-cut", "before-publish", "after-publish", "before-settle", "after-settle", "after-record"} {
		for _, hit := range []int64{1, 4} { // in the pass, and among the cycles
			if hit > 1 && (testing.Short() || os.Getenv("LANDFALL_SCHEDULER_LONG") == "" && strings.HasSuffix(point, "publish")) {
				continue
			}
			t.Run(point, func(t *testing.T) {
				l := newLab(t)
				l.host.Write(block("os", 1), block("data", 7))
				l.guest()
				l.start(quick())
				killed := l.killAt("scheduler/"+point, hit)
				l.protect()
				select {
				case <-killed:
				case <-time.After(patien):
					t.Fatal("the failpoint was never reached")
				}
				l.start(quick())
				l.awaitState(scheduler.Protected)
				vm := l.awaitPoints(3)
				l.stop()
				l.Check(l.host, vm.GetLineage())
				require.EqualValues(t, 1, vm.GetCounters().GetFullPasses(), "the copy was made once")
				require.EqualValues(t, 0, vm.GetCounters().GetAbandonedPoints(), "nothing had to be given up")
				points := l.Points(vm.GetLineage())
				for i, o := range points {
					require.EqualValues(t, i+2, o, "ordinals are dense: the pass is 1, then points %v", points)
				}
				for _, task := range l.Workers.PointTasks()[1:] {
					require.NotZero(t, task.GetBase())
				}
			})
		}
	}
}

// A shipper that fails makes the scheduler give the point up and try again; the data arrives with the next one.
func TestFailedShipIsRetried(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	vm := l.awaitPoints(1)
	epoch := vm.GetEpoch()

	var failures atomic.Int64
	l.Workers.Hook(func(ctx context.Context, task proto.Message) error {
		if failures.Add(1) <= 2 {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE, "no route to storage")
		}
		return nil
	})
	l.host.Write(block("os", 2), block("data", 3))
	vm = l.await("two points given up", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCounters().GetAbandonedPoints() == 2 })
	require.GreaterOrEqual(t, vm.GetEpoch(), epoch+2)
	vm = l.awaitPoints(2)
	l.stop()
	l.Check(l.host, vm.GetLineage())
	require.Nil(t, l.vm().GetRetry(), "the ladder is left after a success")
}

// A task that is delivered for ever to dying workers is parked, and the point given up.
func TestParkedTaskGivesThePointUp(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	var failures atomic.Int64
	l.Workers.Hook(func(ctx context.Context, _ proto.Message) error {
		if failures.Add(1) <= 3 {
			panic("a bug in the worker")
		}
		return nil
	})
	l.await("given up", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCounters().GetAbandonedPoints() >= 1 })
	vm := l.awaitPoints(2)
	l.stop()
	l.Check(l.host, vm.GetLineage())
}

// An abandoned point commits late, before and after the next one: harmless.
func TestAbandonedPointCommitsLate(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	cfg := quick()
	cfg.Republish, cfg.ShipTimeout = 100*time.Millisecond, 200*time.Millisecond
	l.start(cfg)
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)

	release, held := make(chan struct{}), make(chan uint64, 1)
	var once atomic.Bool
	l.Workers.Hook(func(ctx context.Context, task proto.Message) error {
		if p := task.(*uploaderv1.ShipTask).GetPoint(); p != nil && once.CompareAndSwap(false, true) {
			held <- p.GetOrdinal()
			await(ctx, release)
			return nil
		}
		if p := task.(*uploaderv1.ShipTask).GetPoint(); p != nil && !l.released(release) {
			await(ctx, release)
		}
		return nil
	})
	l.host.Write(block("os", 2), block("data", 1))
	ordinal := <-held
	l.await("given up", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCounters().GetAbandonedPoints() >= 1 })
	close(release)
	vm := l.awaitPoints(3)
	l.Workers.Hook(nil)
	l.stop()
	l.Check(l.host, vm.GetLineage())
	t.Logf("point %d was held; chain %v", ordinal, l.Points(vm.GetLineage()))
}

// await waits for a gate to open, or for the worker to be told to stop.
func await(ctx context.Context, gate <-chan struct{}) {
	select {
	case <-gate:
	case <-ctx.Done():
	}
}

func (l *lab) released(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// After a crash of the host the extents that were hot are copied by a pass, not the whole disk, and the next cut is a point.
func TestHostCrashRunsADirtyPass(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1), block("data", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.policy("policies/fast", 2*time.Second) // time to write and crash between two cuts
	l.awaitPoints(1)
	l.host.Write(block("os", 3))
	l.host.Crash()
	l.host.Write(block("data", 4))
	l.policy("policies/fast", 100*time.Millisecond)
	l.await("a dirty pass", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCounters().GetDirtyPasses() == 1 })
	vm := l.awaitPoints(2)
	l.stop()
	l.Check(l.host, vm.GetLineage())
	require.EqualValues(t, 1, vm.GetCounters().GetFullPasses())
	require.EqualValues(t, 0, vm.GetCounters().GetAbandonedPoints())
	for _, task := range l.Workers.PointTasks()[1:] {
		require.Equal(t, typesv1.PointKind_POINT_KIND_POINT, task.GetPoint().GetKind())
	}
}

// A lost baseline waits for a person, who starts a comparison; what follows is a base and then points.
func TestResynchronize(t *testing.T) {
	t.Parallel()
	for _, lose := range []struct {
		name string
		do   func(h *schedulertest.Host)
		want typesv1.ResyncReason
	}{
		{"offline edit", func(h *schedulertest.Host) {
			h.LoseBaseline(typesv1.ResyncReason_RESYNC_REASON_DISK_CHANGED_OFFLINE)
		}, typesv1.ResyncReason_RESYNC_REASON_DISK_CHANGED_OFFLINE},
		{"host reinstalled", (*schedulertest.Host).LoseState, typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST},
		{"asked for", nil, 0},
	} {
		t.Run(lose.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.host.Write(block("os", 1), block("data", 1))
			stopGuest := l.guest()
			l.start(quick())
			l.protect()
			l.awaitState(scheduler.Protected)
			l.awaitPoints(1)
			if lose.do != nil {
				lose.do(l.host)
				vm := l.awaitState(scheduler.ResyncRequired)
				require.Equal(t, lose.want, vm.GetResyncReason())
				l.await("critical", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() == typesv1.Health_HEALTH_CRITICAL })
			}
			before := l.vm()
			resp, err := l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01", RequestId: "again"})
			require.NoError(t, err)
			repeat, err := l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01", RequestId: "again"})
			require.NoError(t, err)
			require.Equal(t, resp.GetJob().GetName(), repeat.GetJob().GetName())
			l.await("compared", func(vm *schedulerv1.ProtectedVm) bool {
				return vm.GetCounters().GetComparePasses() == 1 && vm.GetState() == scheduler.Protected
			})
			vm := l.awaitPoints(2)
			stopGuest()
			require.Greater(t, vm.GetEpoch(), before.GetEpoch())
			require.EqualValues(t, 1, vm.GetCounters().GetFullPasses())
			require.Zero(t, vm.GetResyncReason())
			l.Check(l.host, vm.GetLineage())
			testkit.Eventually(t, patien, func() bool {
				job, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: resp.GetJob().GetName()})
				require.NoError(t, err)
				return job.GetJob().GetState() == typesv1.JobState_JOB_STATE_SUCCEEDED && job.GetJob().GetResync().GetComparedBytes() > 0
			})
		})
	}
}

// With resync.auto: immediate nobody has to ask.
func TestResyncStartsByItself(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	cfg := quick()
	cfg.Resync.Auto = scheduler.AutoResyncImmediate
	l.start(cfg)
	l.protect()
	l.awaitState(scheduler.Protected)
	l.host.LoseBaseline(typesv1.ResyncReason_RESYNC_REASON_TRACKING_BROKEN)
	l.await("compared", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetCounters().GetComparePasses() == 1 && vm.GetState() == scheduler.Protected
	})
}

// An error that trying again cannot heal stops replication until somebody resumes it.
func TestFatalErrorStopsReplication(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.host.Fail(func(method string) error {
		if method == "CutPoint" {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED, "the host lets nobody in")
		}
		return nil
	})
	vm := l.awaitState(scheduler.ReplicationError)
	require.Equal(t, "PERMISSION_DENIED", vm.GetRetry().GetError().GetReason())
	l.await("critical", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() == typesv1.Health_HEALTH_CRITICAL })
	cuts := l.host.Calls("CutPoint")
	l.host.Fail(nil)
	l.host.Write(block("os", 6))
	require.Equal(t, cuts, l.host.Calls("CutPoint"), "nobody tries meanwhile")
	_, err := l.protection.ResumeReplication(testkit.Context(t), &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	vm = l.awaitPoints(2)
	l.stop()
	l.Check(l.host, vm.GetLineage())
}

// A host that is away for a while: the ladder, then it goes on as if nothing had been.
func TestUnreachableHost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	l.host.Fail(func(string) error { return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer") })
	l.host.Write(block("data", 0))
	l.await("third rung", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetRetry().GetAttempt() >= 3 })
	l.host.Fail(nil)
	vm := l.awaitPoints(2)
	l.stop()
	l.Check(l.host, vm.GetLineage())
	require.EqualValues(t, 1, vm.GetCounters().GetFullPasses())
}

// Points that the host holds open and nobody knows are settled ABANDONED; their changes are in the next point.
func TestStrangerIsAbandoned(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	l.stop()
	testkit.Eventually(t, patien, func() bool { return l.vm().GetCycle() == nil || l.vm().GetCycle().GetPoint() != 0 })
	if l.vm().GetCycle() == nil {
		l.host.Write(block("data", 5))
		l.host.OpenStranger(40)
	}
	l.start(quick())
	vm := l.awaitPoints(2)
	l.stop()
	l.Check(l.host, vm.GetLineage())
	if slices.ContainsFunc(l.host.Status().GetPoints(), func(p *typesv1.HostPoint) bool { return p.GetOrdinal() == 40 }) {
		require.Greater(t, vm.GetNextOrdinal(), uint64(40), "the next ordinal is above the highest that the host has seen")
	}
}

// Cycles that fall due while one is in hand are counted and never run beside it.
func TestMissedCyclesAreCounted(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	release := make(chan struct{})
	var running, most atomic.Int64
	l.Workers.Hook(func(ctx context.Context, _ proto.Message) error {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		await(ctx, release)
		return nil
	})
	l.await("missed cycles", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCounters().GetMissedCycles() >= 3 })
	require.EqualValues(t, 1, most.Load())
	close(release)
	l.Workers.Hook(nil)
	l.awaitPoints(1)
}

// Initial replication is paused, resumed, killed and goes on where it was; at most the policy's number of tasks is out.
func TestInitialReplicationResumes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	for i := range int64(8) {
		l.host.Write(block("os", i), block("data", i))
	}
	l.start(quick())
	var tasks, running, most atomic.Int64
	gate := make(chan struct{})
	l.Workers.Hook(func(ctx context.Context, task proto.Message) error {
		if task.(*uploaderv1.ShipTask).GetPass() == nil {
			return nil
		}
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		if tasks.Add(1) > 2 {
			await(ctx, gate)
		}
		return nil
	})
	job := l.protect()
	l.await("two windows", func(vm *schedulerv1.ProtectedVm) bool {
		return committed(vm.GetPass()) >= 2 && len(vm.GetPass().GetWindows()) == 8
	})
	_, err := l.protection.PauseReplication(testkit.Context(t), &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool {
		got, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: job.GetName()})
		require.NoError(t, err)
		return got.GetJob().GetState() == typesv1.JobState_JOB_STATE_SUSPENDED && got.GetJob().GetProgress().GetDoneBytes() >= 4*schedulertest.BlockSize
	})
	l.stop()
	close(gate)
	l.start(quick())
	_, err = l.protection.ResumeReplication(testkit.Context(t), &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	vm := l.awaitState(scheduler.Protected)
	require.LessOrEqual(t, most.Load(), int64(3))
	require.EqualValues(t, 1, vm.GetCounters().GetFullPasses())
	l.stop()
	l.Check(l.host, vm.GetLineage())
}

func committed(p *schedulerv1.Pass) (n int) {
	for _, w := range p.GetWindows() {
		if w.GetCommitted() {
			n++
		}
	}
	return n
}

// A failed pass task is published again; the pass is not given up for it.
func TestFailedPassTaskIsRepublished(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 0), block("os", 4), block("data", 7))
	l.start(quick())
	var failures atomic.Int64
	l.Workers.Hook(func(ctx context.Context, task proto.Message) error {
		if task.(*uploaderv1.ShipTask).GetPass().GetIndex() == 3 && failures.Add(1) <= 2 {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE, "no route to storage")
		}
		return nil
	})
	l.protect()
	vm := l.awaitState(scheduler.Protected)
	l.stop()
	require.EqualValues(t, 1, vm.GetCounters().GetFullPasses())
	require.Equal(t, 1, l.host.Calls("BeginPass"))
	l.Check(l.host, vm.GetLineage())
}

// The active scheduler goes; the standby takes over within the lease.
func TestStandbyTakesOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	first := l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)

	spare := &lab{World: l.World, t: t, host: l.host}
	cfg := quick()
	dialer := l.Dialer(schedulerIdentity)
	service, err := scheduler.New(testkit.Context(t), cfg, scheduler.Deps{Bus: l.Bus, Store: l.Store, Hosts: l.HostsOf(dialer)})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = service.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	l.awaitPoints(1)
	require.False(t, service.Active())
	require.True(t, l.service.Active())
	first()
	spare.awaitPoints(2)
	require.True(t, service.Active())
	cancel()
	<-done
	l.Check(l.host, l.vm().GetLineage())
}

// Ending protection stops tracking, closes the lineage and forgets the record; storage stays.
func TestDisable(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	vm := l.awaitState(scheduler.Protected)
	resp, err := l.protection.DisableProtection(testkit.Context(t), &schedulerv1.DisableProtectionRequest{Vm: "web01", RequestId: "end"})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return l.vm() == nil })
	job, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: resp.GetJob().GetName()})
	require.NoError(t, err)
	require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, job.GetJob().GetState())
	require.Contains(t, job.GetJob().GetSteps()[1].GetDetail(), "storage is kept")
	require.Empty(t, l.host.Status().GetLineage())
	chain, err := replica.Open(testkit.Context(t), l.Store, replica.Lineage(vm.GetLineage()))
	require.NoError(t, err)
	state, err := chain.Refresh(testkit.Context(t))
	require.NoError(t, err)
	require.True(t, state.Closed())

	again, err := l.protection.DisableProtection(testkit.Context(t), &schedulerv1.DisableProtectionRequest{Vm: vm.GetName(), RequestId: "end"})
	require.NoError(t, err)
	require.Equal(t, resp.GetJob().GetName(), again.GetJob().GetName())

	// The same VM can be protected again, under another lineage.
	_, err = l.protection.EnableProtection(testkit.Context(t), &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast", RequestId: "r2"})
	require.NoError(t, err)
	next := l.awaitState(scheduler.Protected)
	require.NotEqual(t, vm.GetLineage(), next.GetLineage())
	l.stop()
	l.Check(l.host, next.GetLineage())
}

// Disable with force does not wait for a host that does not answer.
func TestForcedDisable(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.host.Fail(func(string) error { return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer") })
	_, err := l.protection.DisableProtection(testkit.Context(t), &schedulerv1.DisableProtectionRequest{Vm: "sites/lab/vms/" + guid, Force: true})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return l.vm() == nil })
}
