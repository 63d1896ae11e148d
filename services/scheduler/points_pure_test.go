package scheduler

import (
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/pricing"
	"github.com/landfall-dr/landfall/libs/replica"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func hours(n float64) *durationpb.Duration {
	return durationpb.New(time.Duration(n * float64(time.Hour)))
}

// Every problem of a policy's tiers is told, with its field; what is absent fits.
func TestValidateTiers(t *testing.T) {
	good := func(change func(p *schedulerv1.Policy)) *schedulerv1.Policy {
		p := &schedulerv1.Policy{Name: "policies/p", CopyInterval: durationpb.New(30 * time.Second)}
		change(p)
		return p
	}
	for name, c := range map[string]struct {
		change func(p *schedulerv1.Policy)
		fields []string
	}{
		"nothing said":           {func(*schedulerv1.Policy) {}, nil},
		"an hour of all":         {func(p *schedulerv1.Policy) { p.Retention = hours(1) }, nil},
		"all tiers":              {func(p *schedulerv1.Policy) { p.KeepAll, p.KeepHourly, p.Retention = hours(4), hours(48), hours(720) }, nil},
		"longer than ten years":  {func(p *schedulerv1.Policy) { p.Retention = hours(24 * 4000) }, []string{"retention"}},
		"all above retention":    {func(p *schedulerv1.Policy) { p.KeepAll, p.Retention = hours(8), hours(4) }, []string{"keep_all"}},
		"all above the default":  {func(p *schedulerv1.Policy) { p.KeepAll = hours(30) }, []string{"keep_all"}},
		"hourly above retention": {func(p *schedulerv1.Policy) { p.KeepHourly, p.Retention = hours(48), hours(47) }, []string{"keep_hourly"}},
		"hourly below all":       {func(p *schedulerv1.Policy) { p.KeepHourly, p.KeepAll = hours(2), hours(3) }, []string{"keep_hourly"}},
		"negative":               {func(p *schedulerv1.Policy) { p.KeepAll, p.KeepHourly, p.Retention = hours(-1), hours(-1), hours(-1) }, []string{"retention", "keep_all", "keep_hourly"}},
		"factors off":            {func(p *schedulerv1.Policy) { p.SuspicionFactor = 1 }, nil},
		"factor too low":         {func(p *schedulerv1.Policy) { p.SuspicionFactor = 1.5 }, []string{"suspicion_factor"}},
		"no number":              {func(p *schedulerv1.Policy) { p.SuspicionFactor = math.NaN() }, []string{"suspicion_factor"}},
		"endless":                {func(p *schedulerv1.Policy) { p.SuspicionFactor = math.Inf(1) }, []string{"suspicion_factor"}},
		"write-once and delay":   {func(p *schedulerv1.Policy) { p.WriteOnce, p.ApplyDelay = hours(-1), hours(2) }, []string{"write_once", "apply_delay"}},
		"everything at once": {func(p *schedulerv1.Policy) {
			p.KeepAll, p.SuspicionFactor, p.WriteOnce, p.ApplyDelay, p.CopyInterval = hours(30), -3, hours(-1), hours(-1), nil
		}, []string{"copy_interval", "keep_all", "suspicion_factor", "write_once", "apply_delay"}},
	} {
		err := validatePolicy(good(c.change), noon)
		if c.fields == nil {
			require.NoError(t, err, name)
			continue
		}
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_POLICY_INVALID), name)
		var e *errcat.Error
		require.ErrorAs(t, err, &e, name)
		var got []string
		for _, f := range e.Fields {
			got = append(got, f.Path[len("policy."):])
		}
		require.Equal(t, c.fields, got, name)
	}
}

func TestHealthOfPoints(t *testing.T) {
	p := &schedulerv1.Policy{CopyInterval: durationpb.New(30 * time.Second)}
	fresh := func() *schedulerv1.ProtectedVm {
		return &schedulerv1.ProtectedVm{State: Protected, LastPointTime: timestamppb.New(noon)}
	}
	vm := fresh()
	vm.Suspicion = &schedulerv1.Suspicion{
		Point: 41, CutTime: timestamppb.New(noon), LastGoodPoint: 40, LastGoodTime: timestamppb.New(noon.Add(-time.Minute)), Pinned: true,
		Signals: &typesv1.ChurnSignals{ChangedBytes: 3 << 30}, UsualBytes: 5 << 20,
	}
	got, reasons := Assess(vm, p, Cycles{}, noon)
	require.Equal(t, typesv1.Health_HEALTH_CRITICAL, got)
	require.Equal(t, "RANSOMWARE_SUSPECTED", reasons[0].GetReason())
	require.Equal(t, "point 41 of 2026-03-01 12:00:00 UTC changed 3.0 GiB, usual is 5.0 MiB, and hardly compresses; the last good point is 40 of 2026-03-01 11:59:00 UTC", reasons[0].GetWhat())
	require.Contains(t, reasons[0].GetAction(), "landfall points clear-suspicion VM")
	vm.Suspicion.Pinned = false
	_, reasons = Assess(vm, p, Cycles{}, noon)
	require.Contains(t, reasons[0].GetWhat(), "not pinned")
	vm.Suspicion.LastGoodPoint = 0
	_, reasons = Assess(vm, p, Cycles{}, noon)
	require.Contains(t, reasons[0].GetWhat(), "there is no point before it")
	vm.State = FailedOver
	got, _ = Assess(vm, p, Cycles{}, noon)
	require.Equal(t, typesv1.Health_HEALTH_CRITICAL, got, "also while it runs at the recovery side")

	vm = fresh()
	vm.ApplyBacklog = &typesv1.ApplyBacklog{Bytes: 2 << 30, Manifests: 77, Estimate: durationpb.New(9 * time.Minute)}
	got, _ = Assess(vm, p, Cycles{}, noon)
	require.Equal(t, typesv1.Health_HEALTH_NORMAL, got)
	vm.ApplyBacklog.High = true
	got, reasons = Assess(vm, p, Cycles{}, noon)
	require.Equal(t, typesv1.Health_HEALTH_WARNING, got)
	require.Equal(t, "APPLY_BACKLOG_HIGH", reasons[0].GetReason())
	require.Equal(t, "2.0 GiB in 77 manifests wait to be applied: a failover to the newest point waits about 9m0s", reasons[0].GetWhat())

	vm = fresh()
	vm.Retry = &schedulerv1.Retry{Attempt: 1, FirstFailureTime: timestamppb.New(noon), Error: detail(typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS, "the SAS has expired", noon)}
	got, reasons = Assess(vm, p, Cycles{}, noon)
	require.Equal(t, typesv1.Health_HEALTH_CRITICAL, got, "it does not pass by itself")
	require.Equal(t, "STORAGE_CREDENTIALS", reasons[0].GetReason())
	require.Equal(t, ClassRecoverable, Classify(typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS), "and the ladder goes on")

	vm.State = EnablingProtection
	got, reasons = Assess(vm, p, Cycles{}, noon)
	require.Equal(t, typesv1.Health_HEALTH_CRITICAL, got)
	require.Equal(t, "protection does not begin, attempt 1 failed: the SAS has expired", reasons[0].GetWhat())
	vm.State = Protected

	vm.ApplyError = vm.GetRetry().GetError()
	_, reasons = Assess(vm, p, Cycles{}, noon)
	require.Len(t, reasons, 1, "the same is said once")
	for reason, want := range map[typesv1.ErrorReason]typesv1.Health{
		typesv1.ErrorReason_ERROR_REASON_REPLICA_TAMPERED:    typesv1.Health_HEALTH_CRITICAL,
		typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION:  typesv1.Health_HEALTH_CRITICAL,
		typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE: typesv1.Health_HEALTH_WARNING,
	} {
		vm = fresh()
		vm.ApplyError = detail(reason, "disk os", noon)
		got, reasons = Assess(vm, p, Cycles{}, noon)
		require.Equal(t, want, got, reason)
		require.Equal(t, errcat.Code(reason), reasons[0].GetReason())
		require.Equal(t, "points are received and not applied to the replica disks: disk os", reasons[0].GetWhat())
		vm.State = FailedOver
		_, reasons = Assess(vm, p, Cycles{}, noon)
		require.NotEqual(t, errcat.Code(reason), reasons[0].GetReason(), "nobody applies any more")
	}
}

// When a step of retention is due.
func TestRetentionDue(t *testing.T) {
	v := &vmRun{reconciler: &reconciler{cfg: Default()}, m: &memory{}, rec: &schedulerv1.ProtectedVm{Counters: &schedulerv1.ReplicationCounters{}}}
	require.Zero(t, v.retentionDue(noon), "never before")
	v.rec.LastRetentionTime = timestamppb.New(noon)
	require.Equal(t, 10*time.Minute, v.retentionDue(noon))
	require.Equal(t, time.Minute, v.retentionDue(noon.Add(9*time.Minute)))
	require.Zero(t, v.retentionDue(noon.Add(10*time.Minute)))
	require.Zero(t, v.retentionDue(noon.Add(-24*time.Hour)), "a clock that was put back does not stop it")
	v.m.checkpointed = true
	require.Equal(t, time.Minute, v.retentionDue(noon), "earlier after a checkpoint, not at once")
	v.m.checkpointed = false
	v.rec.Counters.Points = 200
	require.Equal(t, 30*time.Second, v.retentionDue(noon.Add(30*time.Second)), "earlier after many points")

	for _, s := range States() {
		rec := &schedulerv1.ProtectedVm{State: s, LastPoint: 5}
		may := s == Protected || s == Paused || s == ReplicationError || s == ResyncRequired || s == Resynchronizing || s == ResyncPaused
		require.Equal(t, may, mayRetain(rec), StateName(s))
		rec.Suspicion = &schedulerv1.Suspicion{Point: 5}
		require.False(t, mayRetain(rec), "frozen while a person has to look")
		require.False(t, mayRetain(&schedulerv1.ProtectedVm{State: s}), "no point yet")
	}
}

func TestCheckpointAge(t *testing.T) {
	for kept, want := range map[float64]time.Duration{0: time.Hour, 1: 15 * time.Minute, 0.01: time.Minute, 100: time.Hour} {
		require.Equal(t, want, checkpointAge(&schedulerv1.Policy{Retention: hours(kept)}))
	}
}

func TestPresentUsage(t *testing.T) {
	table := pricing.Table{Name: "mine", Date: "2027-01", Currency: "EUR", BlockGiBMonth: 1, PageGiBMonth: 10, Writes10k: 100, PageWriteBytes: 1 << 20}
	got := presentUsage(replica.Usage{
		Kinds: map[replica.UsageKind]replica.UsageSum{
			replica.UsageJournal: {Objects: 7, Bytes: 2 << 30, HiddenBytes: 1 << 30}, replica.UsageSnapshots: {Objects: 3, Bytes: 1 << 29},
		},
		Points:  map[replica.Tier]int{replica.TierAll: 4, replica.TierNone: 1},
		DayPuts: 10, DayBytes: 5 << 20,
	}, table)
	require.Len(t, got.GetUsage(), 5, "kinds that hold nothing are shown too")
	require.InDelta(t, 2, got.GetUsage()[0].GetMonthlyCost(), 1e-9)
	require.InDelta(t, 5, got.GetUsage()[3].GetMonthlyCost(), 1e-9)
	require.EqualValues(t, 450, got.GetMonthlyRequests())
	require.InDelta(t, 4.5, got.GetMonthlyRequestCost(), 1e-9)
	require.InDelta(t, 11.5, got.GetMonthlyCost(), 1e-9)
	require.Equal(t, "mine, 2027-01", got.GetPriceTable())
	require.Equal(t, map[string]int64{"all": 4, "retiring": 1}, got.GetPoints())
}
