package scheduler_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
)

// retention makes steps of retention fall due after milliseconds.
func retention() scheduler.Config {
	c := quick()
	c.Retention = scheduler.RetentionConfig{Every: 100 * time.Millisecond, Points: 1 << 40, Gap: 50 * time.Millisecond}
	return c
}

// tasks collects the retain tasks that are published.
type tasks struct {
	mu  sync.Mutex
	all []*uploaderv1.RetainTask
}

func (x *tasks) count() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.all)
}

func (x *tasks) last() *uploaderv1.RetainTask {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.all[len(x.all)-1]
}

func (l *lab) retainTasks() *tasks {
	x := &tasks{}
	c, err := l.Bus.As("uploader").Consumer(bus.KindRetain, bus.AllSites, "uploader-retain", bus.ConsumerOptions{Concurrency: 1})
	require.NoError(l.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run(ctx, func(_ context.Context, t *bus.Task) error {
			var task uploaderv1.RetainTask
			if err := t.Decode(&task); err != nil {
				return err
			}
			x.mu.Lock()
			defer x.mu.Unlock()
			x.all = append(x.all, &task)
			return nil
		})
	}()
	l.t.Cleanup(func() { cancel(); <-done })
	return x
}

// more waits for n more tasks.
func (l *lab) more(x *tasks, n int) {
	l.t.Helper()
	from := x.count()
	testkit.Eventually(l.t, patien, func() bool { return x.count() >= from+n }, "more retain tasks")
}

// quietly says that no task is published while several would fall due; points go on meanwhile.
func (l *lab) quietly(x *tasks) {
	l.t.Helper()
	l.awaitPoints(1) // what was on its way has arrived
	from := x.count()
	l.awaitPoints(4)
	require.Equal(l.t, from, x.count(), "no step of retention")
}

// tell publishes an event as another service does.
func (l *lab) tell(typ, id string, payload proto.Message) {
	l.t.Helper()
	rec := l.vm()
	require.NoError(l.t, l.Bus.As("uploader").PublishEvent(testkit.Context(l.t), bus.Event{
		Type: typ, Site: "lab", VM: guid, ID: bus.EventID(rec.GetLineage(), id), Payload: payload,
	}))
}

// A step is asked for again and again, by the tiers of the policy as they are now, and only while it may be.
func TestRetentionIsAskedFor(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	asked := l.retainTasks()
	l.start(retention())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.more(asked, 3)
	task := asked.last()
	require.Equal(t, l.vm().GetLineage(), task.GetLineage())
	require.Equal(t, l.vm().GetName(), task.GetVm())
	require.Equal(t, []time.Duration{4 * time.Hour, 24 * time.Hour, 24 * time.Hour},
		[]time.Duration{task.GetKeepAll().AsDuration(), task.GetKeepHourly().AsDuration(), task.GetRetention().AsDuration()}, "the defaults")
	require.False(t, task.GetEnded())
	require.NotNil(t, l.vm().GetLastRetentionTime())

	kv, err := bus.OpenKV[*schedulerv1.Policy](testkit.Context(t), l.Bus, bus.BucketPolicies)
	require.NoError(t, err)
	_, _, err = kv.Mutate(testkit.Context(t), bus.Key("fast"), func(p *schedulerv1.Policy) error {
		p.Retention, p.ApplyDelay = durationpb.New(time.Hour), durationpb.New(30*time.Second)
		return nil
	})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return asked.last().GetRetention().AsDuration() == time.Hour })
	require.Equal(t, time.Hour, asked.last().GetKeepHourly().AsDuration())
	testkit.Eventually(t, patien, func() bool {
		applied := l.Workers.Applied()
		return len(applied) > 0 && applied[len(applied)-1].GetDelay().AsDuration() == 30*time.Second
	}, "apply tasks carry the policy's delay")

	f := l.StartFailover(l.host, "f1", unplanned)
	l.awaitState(scheduler.UnplannedFailoverInProgress)
	f.CloseAndSay()
	f.Phase(waiting)
	l.awaitState(scheduler.FailedOver)
	from := asked.count()
	l.awaitFenced()
	testkit.Eventually(t, patien, func() bool { _, _, released := l.host.Power(); return released })
	require.Equal(t, from, asked.count(), "every point is somebody's choice now")
	f.Phase(cancelling)
	l.awaitState(scheduler.CancellingFailover)
	f.Open()
	f.Phase(cancelled)
	l.awaitState(scheduler.Protected)
	l.more(asked, 1)
}

// suspect is the event about a point of the VM.
func (l *lab) suspect(id string, point, good uint64) {
	l.t.Helper()
	rec := l.vm()
	l.tell("recovery-point.suspected", id, &eventsv1.RecoveryPointSuspected{
		Vm: rec.GetName(), Lineage: rec.GetLineage(), Point: point, CutTime: timestamppb.Now(),
		Signals: &typesv1.ChurnSignals{ChangedBytes: 1 << 30, IncompressibleBytes: 1 << 30}, UsualBytes: 1 << 20,
		LastGoodPoint: good, LastGoodTime: timestamppb.Now(),
	})
}

func (l *lab) pins() []replica.Pin {
	l.t.Helper()
	chain, err := replica.Open(testkit.Context(l.t), l.Store, replica.Lineage(l.vm().GetLineage()))
	require.NoError(l.t, err)
	pins, err := chain.Pins(testkit.Context(l.t))
	require.NoError(l.t, err)
	return pins
}

func (l *lab) points() []*schedulerv1.RecoveryPoint {
	l.t.Helper()
	r, err := l.protection.ListRecoveryPoints(testkit.Context(l.t), &schedulerv1.ListRecoveryPointsRequest{Vm: "web01", PageSize: 1000})
	require.NoError(l.t, err)
	return r.GetPoints()
}

// A suspected point freezes retention and pins the last good one until a person has looked, once for an episode.
func TestSuspicion(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	asked := l.retainTasks()
	l.start(retention())
	l.protect()
	l.awaitState(scheduler.Protected)
	vm := l.awaitPoints(4)
	l.more(asked, 1)
	bad := vm.GetLastPoint()
	good := bad - 1
	l.suspect("later", bad+1000, bad)
	l.await("the later one, whose event came first", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetSuspicion().GetPoint() == bad+1000 })
	l.suspect("first", bad, good)
	vm = l.await("pinned", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetSuspicion().GetPoint() == bad && vm.GetSuspicion().GetPinned()
	})
	require.Equal(t, good, vm.GetSuspicion().GetLastGoodPoint())
	vm = l.await("critical", func(vm *schedulerv1.ProtectedVm) bool {
		return len(vm.GetHealthReasons()) > 0 && vm.GetHealthReasons()[0].GetReason() == scheduler.HealthSuspected
	})
	require.Equal(t, typesv1.Health_HEALTH_CRITICAL, vm.GetHealth())
	pin := slices.IndexFunc(l.pins(), func(p replica.Pin) bool { return p.Owner == fmt.Sprintf("suspect/%d", bad) })
	require.GreaterOrEqual(t, pin, 0)
	require.False(t, l.pins()[pin].Until.IsZero(), "a pin that is forgotten ends by itself")
	l.suspect("another of the episode", bad+1, good)
	l.quietly(asked)
	require.Equal(t, bad, l.vm().GetSuspicion().GetPoint())
	for _, p := range l.points() {
		require.Equal(t, p.GetOrdinal() >= bad, p.GetSuspected(), "point %d", p.GetOrdinal())
		if p.GetOrdinal() == good {
			require.Len(t, p.GetPins(), 1)
		}
	}

	// A scheduler that is killed between the record and the pin pins after it.
	l.stop()
	l.start(retention())

	for range 2 { // idempotent
		resp, err := l.protection.ClearSuspicion(testkit.Context(t), &schedulerv1.ClearSuspicionRequest{Vm: "web01"})
		require.NoError(t, err)
		require.Nil(t, resp.GetVm().GetSuspicion())
		require.NotNil(t, resp.GetVm().GetRpo())
	}
	for _, p := range l.pins() {
		require.NotContains(t, p.Owner, fmt.Sprintf("suspect/%d", bad))
	}
	l.more(asked, 1)
	l.suspect("told again", bad, good) // a late redelivery under another id
	l.awaitPoints(2)
	require.Nil(t, l.vm().GetSuspicion(), "that one was looked at")
	next := l.awaitPoints(1).GetLastPoint()
	l.suspect("a new one", next, next-1)
	l.await("a new episode", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetSuspicion().GetPoint() == next })
}

// Backlog is taken from whoever measured it last, whatever the order of events.
func TestBacklogOnTheRecord(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	vm := l.awaitPoints(1)
	begin := time.Now()
	at := func(minutes int, bytes int64) *typesv1.ApplyBacklog {
		return &typesv1.ApplyBacklog{Bytes: bytes, Manifests: 3, Estimate: durationpb.New(time.Minute), Time: timestamppb.New(begin.Add(time.Duration(minutes) * time.Minute))}
	}
	l.tell("apply-backlog.raised", "raised", &eventsv1.ApplyBacklogRaised{Vm: vm.GetName(), Backlog: at(2, 200)})
	vm = l.await("warned of", func(vm *schedulerv1.ProtectedVm) bool {
		return slices.ContainsFunc(vm.GetHealthReasons(), func(d *typesv1.ErrorDetail) bool { return d.GetReason() == scheduler.HealthBacklog })
	})
	require.EqualValues(t, 200, vm.GetApplyBacklog().GetBytes())
	l.tell("recovery-point.processed", "older", &eventsv1.RecoveryPointProcessed{Vm: vm.GetName(), Lineage: vm.GetLineage(), Point: 1, Backlog: at(1, 100)})
	l.tell("apply-backlog.cleared", "cleared", &eventsv1.ApplyBacklogCleared{Vm: vm.GetName(), Backlog: at(3, 10)})
	vm = l.await("cleared", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetApplyBacklog().GetBytes() == 10 })
	require.False(t, vm.GetApplyBacklog().GetHigh())
	l.await("health", func(vm *schedulerv1.ProtectedVm) bool {
		return !slices.ContainsFunc(vm.GetHealthReasons(), func(d *typesv1.ErrorDetail) bool { return d.GetReason() == scheduler.HealthBacklog })
	})
}

// A hold is there for everybody who retires points, once per name and point, until an administrator releases it.
func TestHolds(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	vm := l.awaitPoints(2)
	point := vm.GetLastPoint()
	req := &schedulerv1.HoldRecoveryPointRequest{Vm: "web01", Point: point, Hold: "case-17", Reason: "the auditors"}
	for range 2 {
		resp, err := l.protection.HoldRecoveryPoint(testkit.Context(t), req)
		require.NoError(t, err)
		require.Equal(t, point, resp.GetPoint().GetOrdinal())
		require.Len(t, resp.GetPoint().GetPins(), 1)
		pin := resp.GetPoint().GetPins()[0]
		require.Equal(t, "hold/case-17", pin.GetOwner())
		require.Nil(t, pin.GetUntil(), "no end")
		require.Contains(t, pin.GetReason(), "ada")
		require.Contains(t, pin.GetReason(), "the auditors")
	}
	require.Len(t, l.pins(), 1)
	_, err := l.protection.HoldRecoveryPoint(testkit.Context(t), &schedulerv1.HoldRecoveryPointRequest{Vm: "web01", Point: point - 1, Hold: "case-17"})
	require.NoError(t, err)
	_, err = l.protection.HoldRecoveryPoint(testkit.Context(t), &schedulerv1.HoldRecoveryPointRequest{Vm: "web01", Point: point, Hold: "other"})
	require.NoError(t, err)
	for _, p := range l.points() {
		switch p.GetOrdinal() {
		case point:
			require.Len(t, p.GetPins(), 2)
		case point - 1:
			require.Len(t, p.GetPins(), 1)
		default:
			require.Empty(t, p.GetPins())
		}
	}
	_, err = l.protection.HoldRecoveryPoint(testkit.Context(t), &schedulerv1.HoldRecoveryPointRequest{Vm: "web01", Point: point + 100_000, Hold: "x"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND)
	_, err = l.protection.HoldRecoveryPoint(testkit.Context(t), &schedulerv1.HoldRecoveryPointRequest{Vm: "web01", Point: 1, Hold: "x"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND) // the pass
	_, err = l.protection.HoldRecoveryPoint(testkit.Context(t), &schedulerv1.HoldRecoveryPointRequest{Vm: "web01", Point: point, Hold: "Not A Name"})
	require.Error(t, err)

	released, err := l.protection.ReleaseRecoveryPoint(testkit.Context(t), &schedulerv1.ReleaseRecoveryPointRequest{Vm: "web01", Hold: "case-17"})
	require.NoError(t, err)
	require.Equal(t, []uint64{point - 1, point}, released.GetPoints())
	released, err = l.protection.ReleaseRecoveryPoint(testkit.Context(t), &schedulerv1.ReleaseRecoveryPointRequest{Vm: "web01", Hold: "case-17"})
	require.NoError(t, err)
	require.Empty(t, released.GetPoints())
	require.Len(t, l.pins(), 1)
	seen := map[string]int{}
	for _, e := range l.stored() {
		seen[e.GetType()]++
	}
	require.Equal(t, 3, seen["recovery-point.held"])
	require.Equal(t, 2, seen["recovery-point.released"])
}

// stored are the events that are stored now.
func (l *lab) stored() (out []*schedulerv1.WatchEventsResponse) {
	l.t.Helper()
	ctx, cancel := context.WithCancel(testkit.Context(l.t))
	defer cancel()
	stream, err := l.events.WatchEvents(ctx, &schedulerv1.WatchEventsRequest{})
	require.NoError(l.t, err)
	for {
		e, err := stream.Recv()
		if err != nil {
			return out
		}
		out = append(out, e)
	}
}

// Usage is priced by the table of the configuration.
func TestStorageUsage(t *testing.T) {
	t.Parallel()
	l := protectedLab(t)
	got, err := l.protection.GetStorageUsage(testkit.Context(t), &schedulerv1.GetStorageUsageRequest{Vm: "web01"})
	require.NoError(t, err)
	require.Equal(t, "USD", got.GetCurrency())
	require.Contains(t, got.GetPriceTable(), "assumed")
	require.Len(t, got.GetUsage(), 5)
	require.Positive(t, got.GetUsage()[0].GetObjects(), "the journal")
	require.Positive(t, got.GetMonthlyRequests())
	require.Positive(t, got.GetMonthlyCost())
	_, err = l.protection.GetStorageUsage(testkit.Context(t), &schedulerv1.GetStorageUsageRequest{Vm: "nobody"})
	require.Error(t, err)
}

// bare hides what a store can do besides.
type bare struct{ blobstore.Store }

// managed is a store whose write-once policies are set elsewhere.
type managed struct {
	*blobstoretest.Memory
	have    atomic.Int64
	refused atomic.Int64
}

func (m *managed) ContainerProtection(context.Context, string) (blobstore.Protection, error) {
	return blobstore.Protection{WriteOnce: time.Duration(m.have.Load())}, nil
}

func (m *managed) ProtectContainer(_ context.Context, container string, _ blobstore.Protection) error {
	m.refused.Add(1)
	return fmt.Errorf("protect %s: a right of the management plane: %w", container, blobstore.ErrPermission)
}

func (l *lab) demandWriteOnce(d time.Duration) {
	l.t.Helper()
	kv, err := bus.OpenKV[*schedulerv1.Policy](testkit.Context(l.t), l.Bus, bus.BucketPolicies)
	require.NoError(l.t, err)
	_, _, err = kv.Mutate(testkit.Context(l.t), bus.Key("fast"), func(p *schedulerv1.Policy) error {
		p.WriteOnce = durationpb.New(d)
		return nil
	})
	require.NoError(l.t, err)
}

func TestWriteOnceIsSet(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.demandWriteOnce(48 * time.Hour)
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	vm := l.awaitPoints(2)
	have, err := l.Store.(blobstore.Protector).ContainerProtection(testkit.Context(t), replica.Lineage(vm.GetLineage()).JournalContainer())
	require.NoError(t, err)
	require.Equal(t, 48*time.Hour, have.WriteOnce)
	have, err = l.Store.(blobstore.Protector).ContainerProtection(testkit.Context(t), replica.Lineage(vm.GetLineage()).ReplicaContainer())
	require.NoError(t, err)
	require.Zero(t, have.WriteOnce, "disks are overwritten")
}

// A store that enforces nothing is refused before anything is made; one whose policy is shorter and cannot be changed from here
// is refused with what to set, and nothing stays on the host.
func TestWriteOnceIsMissing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.demandWriteOnce(48 * time.Hour)
	memory := l.Store.(*blobstoretest.Memory)
	l.Store = bare{memory}
	stop := l.start(quick())
	_, err := l.protection.EnableProtection(testkit.Context(t), &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_STORAGE_NOT_WRITE_ONCE)
	require.Nil(t, l.vm())
	stop()

	store := &managed{Memory: memory}
	store.have.Store(int64(24 * time.Hour))
	l.Store = store
	l.start(quick())
	job := l.protect()
	vm := l.awaitState(scheduler.EnablingFailed)
	e := vm.GetRetry().GetError()
	require.Equal(t, "STORAGE_NOT_WRITE_ONCE", e.GetReason())
	require.Contains(t, e.GetWhat(), replica.Lineage(vm.GetLineage()).JournalContainer())
	require.Contains(t, e.GetWhat(), "has 24h0m0s: set a time-based retention policy of at least 48h0m0s")
	require.Contains(t, e.GetWhat(), "management plane")
	require.EqualValues(t, 1, store.refused.Load(), "it is not tried over and over")
	testkit.Eventually(t, patien, func() bool {
		resp, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: job.GetName()})
		require.NoError(t, err)
		return resp.GetJob().GetState() == typesv1.JobState_JOB_STATE_FAILED
	})
	require.False(t, l.host.Status().GetTracking(), "nothing is left on the host")

	store.have.Store(int64(72 * time.Hour)) // somebody did what the message says
	resp, err := l.protection.EnableProtection(testkit.Context(t), &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast", RequestId: "r2"})
	require.NoError(t, err)
	require.NotNil(t, resp.GetJob())
	l.awaitState(scheduler.Protected)
}

// Rights that were taken away: replication is tried again and again, health says who must act, and it goes on by itself.
func TestStorageRightsComeBack(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	faulty := blobstoretest.NewFaulty(l.Store, nil)
	l.Store = faulty
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	faulty.SetHook(func(op blobstoretest.Op, container, _ string) blobstoretest.Fault {
		if container != replica.CatalogueContainer && !op.Writes() {
			return blobstoretest.Denied
		}
		return blobstoretest.None
	})
	vm := l.await("critical", func(vm *schedulerv1.ProtectedVm) bool {
		return vm.GetHealth() == typesv1.Health_HEALTH_CRITICAL && vm.GetHealthReasons()[0].GetReason() == "STORAGE_PERMISSION"
	})
	require.Contains(t, vm.GetHealthReasons()[0].GetAction(), "landfall storage validate")
	l.await("the ladder is climbed", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetRetry().GetAttempt() >= 3 })
	require.Equal(t, scheduler.Protected, l.vm().GetState())
	_, err := l.protection.ListRecoveryPoints(testkit.Context(t), &schedulerv1.ListRecoveryPointsRequest{Vm: "web01"})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION), "%v", err)
	faulty.SetHook(nil)
	l.awaitPoints(2)
	l.await("well again", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() != typesv1.Health_HEALTH_CRITICAL })
}
