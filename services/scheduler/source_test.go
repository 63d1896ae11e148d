package scheduler_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
	"github.com/landfall-dr/landfall/services/scheduler/schedulertest"
)

// appEvery sets how often a point of the fast policy is application-consistent, past the API's bounds.
func (l *lab) appEvery(d time.Duration) {
	kv, err := bus.OpenKV[*schedulerv1.Policy](testkit.Context(l.t), l.Bus, bus.BucketPolicies)
	require.NoError(l.t, err)
	_, _, err = kv.Mutate(testkit.Context(l.t), "fast", func(p *schedulerv1.Policy) error {
		p.AppConsistentInterval = durationpb.New(d)
		return nil
	})
	require.NoError(l.t, err)
}

// appPoints counts the points of the chain that are application-consistent, and all.
func (l *lab) appPoints() (app, all int) {
	resp, err := l.protection.ListRecoveryPoints(testkit.Context(l.t), &schedulerv1.ListRecoveryPointsRequest{Vm: "web01", PageSize: 1000})
	require.NoError(l.t, err)
	for _, p := range resp.GetPoints() {
		if p.GetConsistency() == typesv1.Consistency_CONSISTENCY_APPLICATION {
			app++
		}
	}
	return app, len(resp.GetPoints())
}

// The first point after the interval is application-consistent, the others are not.
func TestApplicationConsistency(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.appEvery(time.Hour)
	vm := l.await("an application-consistent point", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetLastAppPointTime() != nil })
	require.Nil(t, vm.GetAppConsistencyError())
	l.awaitPoints(3)
	app, all := l.appPoints()
	require.Equal(t, 1, app)
	require.Greater(t, all, 3)
	l.appEvery(300 * time.Millisecond)
	testkit.Eventually(t, patien, func() bool { app, _ := l.appPoints(); return app >= 3 })
	l.Check(l.host, vm.GetLineage())
}

// A freeze that fails, and a driver that knows none: points are taken all the same, nothing is given up, and it is said.
func TestApplicationConsistencyMissed(t *testing.T) {
	t.Parallel()
	for mode, reason := range map[schedulertest.AppMode]string{
		schedulertest.AppFails: "DEADLINE_EXCEEDED", schedulertest.AppUnsupported: "CONSISTENCY_UNSUPPORTED",
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			l.host.SetApp(mode)
			missed := make(chan *eventsv1.ApplicationConsistencyMissed, 16)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			go func() {
				_ = l.Bus.As("test").Subscribe(ctx, bus.Subscription{
					Durable: "test-app", Concurrency: 1, RetryDelay: time.Second, RetryDelayMax: time.Second,
					Filters: []bus.Filter{{Type: "recovery-point.application-consistency-missed"}},
				}, func(_ context.Context, e *bus.Received) error {
					var m eventsv1.ApplicationConsistencyMissed
					if err := e.Decode(&m); err != nil {
						return err
					}
					missed <- &m
					return nil
				})
			}()
			l.appEvery(time.Hour)
			vm := l.await("missed", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetAppConsistencyError() != nil })
			require.Equal(t, reason, vm.GetAppConsistencyError().GetReason())
			select {
			case m := <-missed:
				require.Equal(t, reason, m.GetError().GetReason())
				require.NotZero(t, m.GetPoint())
			case <-time.After(patien):
				t.Fatal("no event")
			}
			l.await("warning", func(vm *schedulerv1.ProtectedVm) bool {
				for _, r := range vm.GetHealthReasons() {
					if r.GetReason() == scheduler.HealthAppConsistency {
						return vm.GetHealth() == typesv1.Health_HEALTH_WARNING
					}
				}
				return false
			})
			vm = l.awaitPoints(3)
			require.Nil(t, vm.GetRetry())
			require.Nil(t, vm.GetLastAppPointTime())
			require.Zero(t, vm.GetCounters().GetAbandonedPoints())
			require.Empty(t, missed, "it is not tried at every cycle")
			l.host.SetApp(schedulertest.AppGiven)
			l.appEvery(200 * time.Millisecond)
			vm = l.await("given again", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetLastAppPointTime() != nil })
			require.Nil(t, vm.GetAppConsistencyError())
			l.Check(l.host, vm.GetLineage())
		})
	}
}

// The hypervisor is restarted while the first copy runs: a full pass begins again by itself, and once is enough.
func TestBitmapLostDuringInitialReplication(t *testing.T) {
	t.Parallel()
	for _, reading := range []typesv1.ErrorReason{
		typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST, typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID,
		0, // it can be read to its end: found when it is settled
	} {
		t.Run(errcat.Code(reading), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.host.TrackByBitmaps()
			l.host.Write(block("os", 0), block("os", 7), block("data", 7))
			stopGuest := l.guest()
			l.start(quick())
			var once atomic.Bool
			l.Workers.Hook(func(_ context.Context, task proto.Message) error {
				if task.(*uploaderv1.ShipTask).GetPass().GetIndex() == 5 && once.CompareAndSwap(false, true) {
					l.host.LoseBitmap(reading)
				}
				return nil
			})
			l.protect()
			l.awaitState(scheduler.Protected)
			require.Equal(t, 2, l.host.Calls("BeginPass"))
			vm := l.awaitPoints(2)
			stopGuest()
			l.Check(l.host, vm.GetLineage())
		})
	}
}

// The hypervisor is restarted while a comparison runs: it begins again by itself.
func TestBitmapLostDuringResync(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	l.guest()
	l.host.LoseBitmap(0)
	vm := l.awaitState(scheduler.ResyncRequired)
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, vm.GetResyncReason())
	var once atomic.Bool
	l.Workers.Hook(func(_ context.Context, task proto.Message) error {
		if _, ok := task.(*resyncenginev1.CompareTask); ok && once.CompareAndSwap(false, true) {
			l.host.LoseBitmap(0)
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST, "the bitmap is gone")
		}
		return nil
	})
	_, err := l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	require.NoError(t, err)
	l.await("compared", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetCounters().GetComparePasses() == 1 && vm.GetState() == scheduler.Protected
	})
	vm = l.awaitPoints(2)
	l.Check(l.host, vm.GetLineage())
}

// What passes by itself does not stop replication: a machine whose folder is not mounted for a moment, a hypervisor that
// does not run, a frozen copy that broke.
func TestSourceTroubleThatPasses(t *testing.T) {
	t.Parallel()
	for _, reason := range []typesv1.ErrorReason{
		typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE,
		typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN, typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID,
	} {
		t.Run(errcat.Code(reason), func(t *testing.T) {
			t.Parallel()
			l := protectedLab(t)
			switch reason {
			case typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE:
				l.host.Fail(func(string) error { return errcat.New(reason, "not now") })
			default:
				l.Workers.Hook(func(context.Context, proto.Message) error { return errcat.New(reason, "not now") })
			}
			l.host.Write(block("os", 5))
			vm := l.await("third rung", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetRetry().GetAttempt() >= 3 })
			require.Equal(t, scheduler.Protected, vm.GetState())
			if reason == typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE {
				vm = l.await("seventh rung", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetRetry().GetAttempt() >= 7 })
				require.NotEqual(t, typesv1.Health_HEALTH_CRITICAL, vm.GetHealth())
			}
			l.host.Fail(nil)
			l.Workers.Hook(nil)
			l.goesOn(scheduler.Protected)
		})
	}
}

// Two schedulers that both believe to be the active one, as when a lease ran out under a long pause: compare-and-set on
// the record decides, and a planned failover comes to one right end.
func TestTwinsDuringPlannedFailover(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	service, err := scheduler.New(testkit.Context(t), quick(), scheduler.Deps{Bus: l.Bus, Store: l.Store, Hosts: l.HostsOf(l.Dialer(schedulerIdentity)), Logger: testkit.Logger(t)})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = service.RunWithoutLease(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	stopGuest := l.guest()
	l.StartFailover(l.host, "f1", planned)
	vm := l.awaitStage(ready)
	stopGuest()
	l.lastPointIsLive(vm)
	cuts := l.host.Calls("CutPoint")
	require.Positive(t, cuts)
}
