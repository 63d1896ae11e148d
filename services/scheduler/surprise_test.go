package scheduler_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverorchestratorv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
)

// A host that has seen a higher epoch is not fought: the scheduler, which holds the record, takes it over.
func TestHigherEpochOfTheHostIsAdopted(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	l.host.RaiseEpoch(50)
	l.host.Write(block("os", 2))
	l.await("adopted", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetEpoch() >= 50 })
	vm := l.awaitPoints(2)
	require.Equal(t, scheduler.Protected, vm.GetState())
	l.Check(l.host, vm.GetLineage())
}

// A failover that closed the lineage stops replication; the scheduler follows the fence.
func TestClosedLineageStopsReplication(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	vm := l.awaitState(scheduler.Protected)
	chain, err := replica.Open(testkit.Context(t), l.Store, replica.Lineage(vm.GetLineage()))
	require.NoError(t, err)
	_, err = chain.Commit(testkit.Context(t), replica.Proposal{Kind: replica.KindClose, Failover: "f1"})
	require.NoError(t, err)
	l.Workers.Hook(func(_ context.Context, task proto.Message) error { // as the uploader reports the refusal
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED, "closed by f1")
	})
	vm = l.awaitState(scheduler.ReplicationError)
	require.Equal(t, "LINEAGE_CLOSED", vm.GetRetry().GetError().GetReason())
}

// An open after a failover is adopted: epoch and open stand in the next tasks.
func TestOpenIsAdopted(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	vm := l.awaitState(scheduler.Protected)
	chain, err := replica.Open(testkit.Context(t), l.Store, replica.Lineage(vm.GetLineage()))
	require.NoError(t, err)
	for _, kind := range []replica.Kind{replica.KindClose, replica.KindOpen} {
		_, err = chain.Commit(testkit.Context(t), replica.Proposal{Kind: kind, Failover: "f1"})
		require.NoError(t, err)
	}
	l.await("adopted", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetOpen() != 0 })
	vm = l.awaitPoints(2)
	l.Check(l.host, vm.GetLineage())
}

// A test failover that waits for clean-up stands in the way of what would take its ground away.
func TestTestFailoverBlocks(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	vm := l.awaitState(scheduler.Protected)
	kv, err := bus.OpenKV[*failoverorchestratorv1.Failover](testkit.Context(t), l.Bus, bus.BucketFailovers)
	require.NoError(t, err)
	rev, err := kv.Create(testkit.Context(t), "f1", &failoverorchestratorv1.Failover{
		Name: "failovers/f1", Vm: vm.GetName(), State: typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP,
	})
	require.NoError(t, err)
	ctx := testkit.Context(t)
	_, err = l.protection.DisableProtection(ctx, &schedulerv1.DisableProtectionRequest{Vm: "web01"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
	_, err = l.protection.Resynchronize(ctx, &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
	_, err = l.protection.PauseReplication(ctx, &schedulerv1.PauseReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	require.NoError(t, kv.Delete(ctx, "f1", rev))
	_, err = l.protection.DisableProtection(ctx, &schedulerv1.DisableProtectionRequest{Vm: "web01"})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return l.vm() == nil })
}

// A protection that cannot begin ends after one climb of the ladder, and says why.
func TestEnablingGivesUp(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Fail(func(method string) error {
		if method == "CreateReplicationRelationship" {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE, "the volume is full")
		}
		return nil
	})
	l.start(quick())
	l.protect()
	vm := l.awaitState(scheduler.EnablingFailed)
	require.Equal(t, "LOW_DISK_SPACE", vm.GetRetry().GetError().GetReason())
}

// A refusal of a pass's task that a fresh pass can get past begins another pass; what was there before stays harmless.
func TestRefusedPassBeginsAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 0), block("data", 7))
	l.start(quick())
	var once atomic.Bool
	l.Workers.Hook(func(_ context.Context, task proto.Message) error {
		if task.(*uploaderv1.ShipTask).GetPass().GetIndex() == 5 && once.CompareAndSwap(false, true) {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN, "the host does not know the pass")
		}
		return nil
	})
	l.protect()
	l.awaitState(scheduler.Protected)
	vm := l.awaitPoints(1)
	require.Equal(t, 2, l.host.Calls("BeginPass"))
	l.Check(l.host, vm.GetLineage())
}

// RPO, missed cycles and the states of the fleet are gauges.
func TestMetrics(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	reader := sdkmetric.NewManualReader()
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	dialer := l.Dialer(schedulerIdentity)
	service, err := scheduler.New(testkit.Context(t), quick(), scheduler.Deps{Bus: l.Bus, Store: l.Store, Hosts: l.HostsOf(dialer), MeterProvider: provider})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = service.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	testkit.Eventually(t, patien, service.Active)
	stop := l.start(quick()) // a standby, which serves the API
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	testkit.Eventually(t, patien, func() bool {
		var all metricdata.ResourceMetrics
		require.NoError(t, reader.Collect(context.Background(), &all))
		rpo, points, active := -1.0, int64(0), 0.0
		for _, scope := range all.ScopeMetrics {
			for _, m := range scope.Metrics {
				switch data := m.Data.(type) {
				case metricdata.Gauge[float64]:
					for _, p := range data.DataPoints {
						switch m.Name {
						case "landfall_scheduler_rpo_seconds":
							name, ok := p.Attributes.Value(attribute.Key("vm"))
							require.True(t, ok)
							require.Contains(t, name.AsString(), guid)
							rpo = p.Value
						case "landfall_scheduler_active":
							active = p.Value
						}
					}
				case metricdata.Sum[int64]:
					if m.Name == "landfall_scheduler_points_received" {
						points = data.DataPoints[0].Value
					}
				}
			}
		}
		return rpo >= 0 && rpo < time.Minute.Seconds() && points > 0 && active == 1
	})
	stop()
}
