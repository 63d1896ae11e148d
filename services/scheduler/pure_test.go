package scheduler

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestLadder(t *testing.T) {
	for attempt, want := range map[int32]int{0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 10, 6: 30, 7: 30, 1000: 30} {
		require.Equal(t, time.Duration(want)*time.Minute, Gap(attempt, time.Minute), "attempt %d", attempt)
	}
	e := detail(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer", noon)
	r := climb(nil, e, noon, time.Minute)
	require.EqualValues(t, 1, r.GetAttempt())
	require.Equal(t, noon.Add(time.Minute), r.GetNextTime().AsTime())
	r = climb(r, e, noon.Add(time.Hour), time.Minute)
	require.EqualValues(t, 2, r.GetAttempt())
	require.Equal(t, noon, r.GetFirstFailureTime().AsTime(), "the first failure stays")
	require.Equal(t, noon.Add(time.Hour+2*time.Minute), r.GetNextTime().AsTime())
}

// Every reason of the contract has a class, and the classes of the domain model hold.
func TestClassify(t *testing.T) {
	for reason, want := range map[typesv1.ErrorReason]Class{
		typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED:            ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE:            ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE:       ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_HOST_NOT_FOUND:         ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE:         ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_STORAGE_FULL:           ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_INTERNAL:               ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED:          ClassReopen,
		typesv1.ErrorReason_ERROR_REASON_STALE_OPEN:             ClassReopen,
		typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN:        ClassResync,
		typesv1.ErrorReason_ERROR_REASON_DISK_CHANGED_OFFLINE:   ClassResync,
		typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED:        ClassFatal,
		typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED:      ClassFatal,
		typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND:           ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE: ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN:        ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID:  ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_GUEST_DID_NOT_STOP:     ClassRecoverable,
		typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST:            ClassResync,
		typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED:         ClassFatal,
		typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN:           ClassFatal,
		typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED:         ClassFatal,
	} {
		require.Equal(t, want, Classify(reason), reason.String())
	}
	require.Equal(t, "INTERNAL", detailOf(fmt.Errorf("odd"), noon).GetReason())
	long := detailOf(errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "%02000d", 1), noon)
	require.Len(t, long.GetWhat(), maxErrorText)
}

func TestRPO(t *testing.T) {
	vm := &schedulerv1.ProtectedVm{CreateTime: timestamppb.New(noon)}
	require.Equal(t, time.Hour, RPO(vm, noon.Add(time.Hour)))
	vm.LastPointTime = timestamppb.New(noon.Add(50 * time.Minute))
	require.Equal(t, 10*time.Minute, RPO(vm, noon.Add(time.Hour)))
	require.Zero(t, RPO(vm, noon), "a clock that went back does not make it negative")
	require.Equal(t, 15*time.Minute, AlertThreshold(&schedulerv1.Policy{CopyInterval: durationpb.New(30 * time.Second)}))
	require.Equal(t, 25*time.Minute, AlertThreshold(&schedulerv1.Policy{CopyInterval: durationpb.New(5 * time.Minute)}))
	require.Equal(t, time.Minute, AlertThreshold(&schedulerv1.Policy{RpoAlertThreshold: durationpb.New(time.Minute)}))
}

func TestMissed(t *testing.T) {
	for _, c := range []struct {
		late time.Duration
		n    int64
	}{{-time.Second, 0}, {0, 1}, {29 * time.Second, 1}, {30 * time.Second, 2}, {5 * time.Minute, 11}} {
		n, due := missed(noon, noon.Add(c.late), 30*time.Second)
		require.Equal(t, c.n, n)
		require.True(t, due.After(noon.Add(c.late)), "the next one is due later")
	}
	n, due := missed(noon, noon.Add(time.Hour), 0)
	require.Zero(t, n)
	require.Equal(t, noon, due)
}

func TestHealth(t *testing.T) {
	policy := &schedulerv1.Policy{CopyInterval: durationpb.New(30 * time.Second)}
	at := func(s State, age time.Duration, attempt int32) *schedulerv1.ProtectedVm {
		vm := &schedulerv1.ProtectedVm{State: s, LastPointTime: timestamppb.New(noon.Add(-age))}
		if attempt > 0 {
			vm.Retry = &schedulerv1.Retry{Attempt: attempt, FirstFailureTime: timestamppb.New(noon), Error: &typesv1.ErrorDetail{What: "x"}}
		}
		return vm
	}
	const (
		normal, warning, critical = typesv1.Health_HEALTH_NORMAL, typesv1.Health_HEALTH_WARNING, typesv1.Health_HEALTH_CRITICAL
		none                      = typesv1.Health_HEALTH_NOT_APPLICABLE
	)
	for _, c := range []struct {
		name   string
		vm     *schedulerv1.ProtectedVm
		recent Cycles
		want   typesv1.Health
		reason string
	}{
		{"fresh", at(Protected, time.Second, 0), Cycles{}, normal, ""},
		{"behind the threshold", at(Protected, 20*time.Minute, 0), Cycles{}, warning, HealthRPO},
		{"an hour behind", at(Protected, 61*time.Minute, 0), Cycles{}, critical, HealthBehind},
		{"20 % missed", at(Protected, time.Second, 0), Cycles{Due: 10, Missed: 2}, normal, ""},
		{"over 20 % missed", at(Protected, time.Second, 0), Cycles{Due: 10, Missed: 3}, warning, HealthMissedCycles},
		{"first failure", at(Protected, time.Second, 1), Cycles{}, warning, HealthCannotSend},
		{"last rung", at(Protected, time.Second, 6), Cycles{}, critical, HealthCannotSend},
		{"copying", at(InitialReplicating, time.Second, 0), Cycles{}, warning, HealthInitial},
		{"paused", at(Paused, time.Second, 0), Cycles{}, warning, HealthPaused},
		{"stopped", at(ReplicationError, time.Second, 1), Cycles{}, critical, HealthError},
		{"baseline lost", at(ResyncRequired, time.Second, 0), Cycles{}, critical, HealthResyncRequired},
		{"comparing", at(Resynchronizing, time.Second, 0), Cycles{}, warning, HealthResyncing},
		{"failed over", at(FailedOver, time.Second, 0), Cycles{}, warning, HealthNotReversed},
		{"ending", at(Disabling, time.Hour, 3), Cycles{}, none, ""},
	} {
		got, reasons := Assess(c.vm, policy, c.recent, noon)
		require.Equal(t, c.want, got, c.name)
		if c.reason == "" {
			require.Empty(t, reasons, c.name)
			continue
		}
		require.Equal(t, c.reason, reasons[0].GetReason(), c.name)
		require.NotEmpty(t, reasons[0].GetWhat(), c.name)
	}
	// A source that may run beside the recovered machine is critical whatever the state, until its host says that it is off.
	for _, s := range []State{UnplannedFailoverInProgress, FailoverFailed, FailedOver, Committing, CommitFailed, Committed, Disabling} {
		vm := at(s, time.Second, 0)
		vm.Failover = &schedulerv1.FailoverProgress{Failover: "failovers/f1", Stage: schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED}
		got, reasons := Assess(vm, policy, Cycles{}, noon)
		require.Equal(t, critical, got, StateName(s))
		require.Equal(t, HealthNotFenced, reasons[0].GetReason(), StateName(s))
		vm.Failover.SourceFenced = true
		_, reasons = Assess(vm, policy, Cycles{}, noon)
		for _, r := range reasons {
			require.NotEqual(t, HealthNotFenced, r.GetReason(), StateName(s))
		}
	}
	// A machine that is off is not critical for it; one that is behind is.
	off := at(Protected, 30*time.Second, 9)
	off.Retry.Error.Reason = "HYPERVISOR_UNREACHABLE"
	got, _ := Assess(off, policy, Cycles{}, noon.Add(2*time.Hour))
	require.Equal(t, critical, got)
	off.LastPointTime = timestamppb.New(noon.Add(2 * time.Hour))
	got, _ = Assess(off, policy, Cycles{}, noon.Add(2*time.Hour))
	require.Equal(t, warning, got)
	for _, s := range States() {
		Assess(&schedulerv1.ProtectedVm{State: s}, nil, Cycles{}, noon) // no state is forgotten in a way that panics
	}
}

// An application-consistent cut is asked for when it is due, and not at every cycle when it cannot be had.
func TestWantedConsistency(t *testing.T) {
	v := &vmRun{rec: &schedulerv1.ProtectedVm{State: Protected}, policy: &schedulerv1.Policy{}}
	require.Equal(t, crash, v.wantedConsistency(noon))
	v.policy.AppConsistentInterval = durationpb.New(time.Hour)
	require.Equal(t, application, v.wantedConsistency(noon))
	v.rec.AppConsistencyError = &typesv1.ErrorDetail{Time: timestamppb.New(noon)}
	require.Equal(t, crash, v.wantedConsistency(noon.Add(14*time.Minute)))
	require.Equal(t, application, v.wantedConsistency(noon.Add(15*time.Minute)))
	v.rec.LastAppPointTime, v.rec.AppConsistencyError = timestamppb.New(noon), nil
	require.Equal(t, crash, v.wantedConsistency(noon.Add(59*time.Minute)))
	require.Equal(t, application, v.wantedConsistency(noon.Add(time.Hour)))
	v.rec.State = PlannedFailoverInProgress
	require.Equal(t, crash, v.wantedConsistency(noon.Add(time.Hour)))
}

// The bounds of application consistency in a policy.
func TestAppConsistentIntervalIsValidated(t *testing.T) {
	for d, ok := range map[time.Duration]bool{0: false, 59 * time.Second: false, time.Minute: false, 5 * time.Minute: true, 12 * time.Hour: true, 13 * time.Hour: false} {
		p := &schedulerv1.Policy{Name: "policies/p", CopyInterval: durationpb.New(5 * time.Minute), AppConsistentInterval: durationpb.New(d)}
		err := validatePolicy(p, noon)
		require.Equal(t, ok, err == nil, "%s: %v", d, err)
	}
}

func TestCycleLogForgetsAfterTwelveHours(t *testing.T) {
	var l cycleLog
	l.add(noon, 10, 4)
	l.add(noon.Add(5*time.Hour), 1, 1)
	require.Equal(t, Cycles{Due: 11, Missed: 5}, l.recent(noon.Add(6*time.Hour)))
	require.Equal(t, Cycles{Due: 1, Missed: 1}, l.recent(noon.Add(13*time.Hour)))
	l.add(noon.Add(12*time.Hour), 2, 0)
	require.Equal(t, Cycles{Due: 3, Missed: 1}, l.recent(noon.Add(12*time.Hour)))
}

// Windows cover each disk that has something exactly once, and stay within their bounds.
func TestPlanWindows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		scope := rapid.SampledFrom([]typesv1.PassScope{typesv1.PassScope_PASS_SCOPE_FULL, typesv1.PassScope_PASS_SCOPE_DIRTY}).Draw(t, "scope")
		var disks []*typesv1.DiskChange
		for i := range rapid.IntRange(1, 5).Draw(t, "disks") {
			size := rapid.Int64Range(1, 1<<33).Draw(t, "sectors") * 512
			disks = append(disks, &typesv1.DiskChange{Disk: fmt.Sprint("d", i), SizeBytes: size, ChangeBytes: rapid.Int64Range(0, size).Draw(t, "change")})
		}
		windows := planWindows(scope, disks, rapid.Int64Range(1, 1<<34).Draw(t, "window"))
		require.NotEmpty(t, windows)
		require.LessOrEqual(t, len(windows), maxWindows)
		next := map[string]int64{}
		for _, w := range windows {
			if w.GetDisk() == "" {
				require.Len(t, windows, 1)
				continue
			}
			require.Equal(t, next[w.GetDisk()], w.GetWindow().GetOffset())
			require.Positive(t, w.GetWindow().GetLength())
			next[w.GetDisk()] += w.GetWindow().GetLength()
		}
		for _, d := range disks {
			if scope == typesv1.PassScope_PASS_SCOPE_FULL || d.GetChangeBytes() > 0 {
				require.Equal(t, d.GetSizeBytes(), next[d.GetDisk()])
			} else {
				require.Zero(t, next[d.GetDisk()])
			}
		}
	})
}

// A key is with one worker at a time, comes again when it was added meanwhile, and is never lost.
func TestWorkQueue(t *testing.T) {
	q := newWorkQueue()
	ctx, cancel := context.WithCancel(testkit.Context(t))
	var mu sync.Mutex
	busy, runs := map[string]bool{}, map[string]int{}
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for {
				key, ok := q.get(ctx)
				if !ok {
					return
				}
				mu.Lock()
				if busy[key] {
					t.Errorf("%s is with two workers", key)
				}
				busy[key] = true
				runs[key]++
				first := runs[key] == 1
				mu.Unlock()
				if first {
					q.add(key)
				}
				mu.Lock()
				busy[key] = false
				mu.Unlock()
				q.done(key)
			}
		})
	}
	for i := range 100 {
		q.add(fmt.Sprint("k", i%10))
		q.addAfter(fmt.Sprint("late", i%10), time.Duration(i%5)*time.Millisecond)
	}
	testkit.Eventually(t, 5*time.Second, func() bool {
		mu.Lock()
		defer mu.Unlock()
		for i := range 10 {
			if runs[fmt.Sprint("k", i)] < 2 || runs[fmt.Sprint("late", i)] < 2 {
				return false
			}
		}
		return true
	})
	cancel()
	q.addAfter("never", time.Hour)
	q.close()
	q.add("never")
	workers.Wait()
	require.Zero(t, runs["never"])
}

func TestPaging(t *testing.T) {
	items := []string{"a", "b", "c", "d", "e"}
	self := func(s string) string { return s }
	var got []string
	token := ""
	for range 5 {
		out, next, err := page(items, self, ascending, 2, token)
		require.NoError(t, err)
		got = append(got, out...)
		if token = next; token == "" {
			break
		}
	}
	require.Equal(t, items, got)
	_, _, err := page(items, self, ascending, 2, "%")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT))
}

func TestConfig(t *testing.T) {
	require.NoError(t, Default().Validate())
	err := Config{Resync: ResyncConfig{Auto: "sometimes"}}.Validate()
	for _, key := range []string{"lease_ttl", "workers", "call_timeout", "poll", "retry_unit", "window_bytes", "chunk_bytes", "resync.auto"} {
		require.ErrorContains(t, err, key, "all problems at once")
	}
}

func TestNames(t *testing.T) {
	site, vm, err := splitVM("sites/s1/vms/v")
	require.NoError(t, err)
	require.Equal(t, "s1/v", site+"/"+vm)
	_, vm, err = splitVM("web01")
	require.NoError(t, err)
	require.Equal(t, "web01", vm)
	for _, bad := range []string{"", "sites/s1", "sites//vms/x", "sites/s/vms/", "a/b/c/d"} {
		_, _, err := splitVM(bad)
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), bad)
	}
}
