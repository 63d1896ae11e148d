package scheduler

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/protobuf/proto"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// views holds the instruments of the service, and for the gauges the newest record of every VM.
type views struct {
	now   func() time.Time
	limit int

	missedTotal, pointsTotal, abandonedTotal, changedBytes, retainTotal metric.Int64Counter
	registration                                                        metric.Registration

	mu     sync.Mutex
	vms    map[string]*schedulerv1.ProtectedVm
	active bool
}

func newViews(provider metric.MeterProvider, now func() time.Time, limit int) (*views, error) {
	w := &views{now: now, limit: limit, vms: map[string]*schedulerv1.ProtectedVm{}}
	meter := provider.Meter("github.com/landfall-dr/landfall/services/scheduler")
	var err error
	counter := func(name, description string) metric.Int64Counter {
		c, cerr := meter.Int64Counter(name, metric.WithDescription(description))
		if err == nil {
			err = cerr
		}
		return c
	}
	w.missedTotal = counter("landfall_scheduler_cycles_missed", "Cycles that fell due while another ran or failed.")
	w.pointsTotal = counter("landfall_scheduler_points_received", "Recovery points received.")
	w.abandonedTotal = counter("landfall_scheduler_points_abandoned", "Points and cuts given up.")
	w.changedBytes = counter("landfall_scheduler_changed_bytes", "Distinct bytes changed, of received points.")
	w.retainTotal = counter("landfall_scheduler_retention_steps", "Steps of retention asked for.")
	gauge := func(name, unit, description string) metric.Float64ObservableGauge {
		g, gerr := meter.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(description))
		if err == nil {
			err = gerr
		}
		return g
	}
	rpo := gauge("landfall_scheduler_rpo_seconds", "", "Age of the newest received point, of the first VMs by name.")
	worst := gauge("landfall_scheduler_rpo_worst_seconds", "", "Highest RPO of all protected VMs.")
	states := gauge("landfall_scheduler_vms", "", "Protected VMs by state.")
	health := gauge("landfall_scheduler_vms_health", "", "Protected VMs by health.")
	suspected := gauge("landfall_scheduler_suspected_vms", "", "Protected VMs with a suspected point that nobody has looked at.")
	backlog := gauge("landfall_scheduler_apply_backlog_worst_bytes", "By", "Most stored bytes of one VM that wait to be applied.")
	debt := gauge("landfall_scheduler_apply_backlog_worst_seconds", "s", "Longest time that applying what waits of one VM is estimated to take.")
	leader := gauge("landfall_scheduler_active", "", "1 while this process holds the lease.")
	if err != nil {
		return nil, err
	}
	w.registration, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		w.observe(o, rpo, worst, states, health, leader)
		w.observePoints(o, suspected, backlog, debt)
		return nil
	}, rpo, worst, states, health, leader, suspected, backlog, debt)
	return w, err
}

func (w *views) observe(o metric.Observer, rpo, worst, states, health, leader metric.Float64Observable) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.now()
	keys := make([]string, 0, len(w.vms))
	for k := range w.vms {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	byState, byHealth := map[string]float64{}, map[string]float64{}
	most := time.Duration(0)
	for i, k := range keys {
		vm := w.vms[k]
		byState[StateName(vm.GetState())]++
		byHealth[vm.GetHealth().String()]++
		if vm.GetLastPoint() == 0 {
			continue
		}
		age := RPO(vm, now)
		most = max(most, age)
		if i < w.limit {
			o.ObserveFloat64(rpo, age.Seconds(), metric.WithAttributes(attribute.String("vm", vm.GetName())))
		}
	}
	o.ObserveFloat64(worst, most.Seconds())
	for s, n := range byState {
		o.ObserveFloat64(states, n, metric.WithAttributes(attribute.String("state", s)))
	}
	for h, n := range byHealth {
		o.ObserveFloat64(health, n, metric.WithAttributes(attribute.String("health", h)))
	}
	active := 0.0
	if w.active {
		active = 1
	}
	o.ObserveFloat64(leader, active)
}

// observePoints shows what stands in the way of a quick failover, or warns of one.
func (w *views) observePoints(o metric.Observer, suspected, backlog, debt metric.Float64Observable) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var n, bytes, seconds float64
	for _, vm := range w.vms {
		if vm.GetSuspicion() != nil {
			n++
		}
		bytes = max(bytes, float64(vm.GetApplyBacklog().GetBytes()))
		seconds = max(seconds, vm.GetApplyBacklog().GetEstimate().AsDuration().Seconds())
	}
	o.ObserveFloat64(suspected, n)
	o.ObserveFloat64(backlog, bytes)
	o.ObserveFloat64(debt, seconds)
}

func (w *views) show(key string, vm *schedulerv1.ProtectedVm) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.vms[key] = proto.Clone(vm).(*schedulerv1.ProtectedVm)
}

func (w *views) forget(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.vms, key)
}

// term begins or ends a term of the lease: a standby shows no VM.
func (w *views) term(active bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.active = active
	if !active {
		clear(w.vms)
	}
}

func (w *views) retained(ctx context.Context)        { w.retainTotal.Add(ctx, 1) }
func (w *views) missed(ctx context.Context, n int64) { w.missedTotal.Add(ctx, n) }
func (w *views) abandoned(ctx context.Context)       { w.abandonedTotal.Add(ctx, 1) }
func (w *views) received(ctx context.Context, changed int64) {
	w.pointsTotal.Add(ctx, 1)
	w.changedBytes.Add(ctx, changed)
}
