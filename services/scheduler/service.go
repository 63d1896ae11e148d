package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Deps is what the service is joined to. Bus, Store and Hosts are needed; streams and buckets must be declared.
type Deps struct {
	// Bus is the connection; events carry the name "scheduler".
	Bus *bus.Bus
	// Store holds the chains. The scheduler reads them, makes containers and puts the fence that ends a protection.
	Store blobstore.Store
	// Hosts finds the services of a host by its id.
	Hosts Hosts
	// Now is the clock; nil is the machine's.
	Now func() time.Time
	// Logger, TracerProvider and MeterProvider default to none.
	Logger         *slog.Logger
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
}

// Service is the scheduler. Its gRPC handlers answer on every instance; only the holder of the lease reconciles.
type Service struct {
	cfg    Config
	deps   Deps
	bus    *bus.Bus
	store  *store
	jobs   *jobBook
	views  *views
	log    *slog.Logger
	tracer trace.Tracer
	now    func() time.Time
	active atomic.Bool
}

// leaseName is the lease of the active scheduler.
const leaseName = "scheduler"

// New checks the configuration and opens the state. ctx bounds that.
func New(ctx context.Context, cfg Config, deps Deps) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("scheduler configuration: %w", err)
	}
	if deps.Bus == nil || deps.Store == nil || deps.Hosts == nil {
		return nil, errors.New("scheduler: bus, store and hosts are needed")
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	if deps.TracerProvider == nil {
		deps.TracerProvider = tracenoop.NewTracerProvider()
	}
	if deps.MeterProvider == nil {
		deps.MeterProvider = metricnoop.NewMeterProvider()
	}
	if cfg.Instance == "" {
		cfg.Instance = "scheduler-" + uuid.NewString()
	}
	s := &Service{cfg: cfg, deps: deps, bus: deps.Bus.As(serviceName), log: deps.Logger, now: deps.Now,
		tracer: deps.TracerProvider.Tracer("github.com/landfall-dr/landfall/services/scheduler")}
	var err error
	if s.store, err = openStore(ctx, s.bus); err != nil {
		return nil, err
	}
	if s.views, err = newViews(deps.MeterProvider, deps.Now, cfg.MetricVMs); err != nil {
		return nil, fmt.Errorf("scheduler instruments: %w", err)
	}
	s.jobs = &jobBook{bus: s.bus, kv: s.store.jobs, log: s.log, now: s.now}
	return s, nil
}

// Register adds the five gRPC services to a server.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	schedulerv1.RegisterProtectionServiceServer(r, &protectionServer{Service: s})
	schedulerv1.RegisterPolicyServiceServer(r, &policyServer{Service: s})
	schedulerv1.RegisterSiteServiceServer(r, &siteServer{Service: s})
	schedulerv1.RegisterJobServiceServer(r, &jobServer{Service: s})
	schedulerv1.RegisterEventServiceServer(r, &eventServer{Service: s})
}

// Active reports whether this instance holds the lease.
func (s *Service) Active() bool { return s.active.Load() }

// Run waits for the lease, works while it lasts, and waits again, until ctx ends; then it returns nil.
func (s *Service) Run(ctx context.Context) error {
	defer func() { _ = s.views.registration.Unregister() }()
	for ctx.Err() == nil {
		lease, err := s.bus.Lease(ctx, leaseName, s.cfg.Instance, s.cfg.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.log.WarnContext(ctx, "no lease yet", "error", err)
			pause(ctx, time.Second)
			continue
		}
		s.log.InfoContext(ctx, "scheduler is active", "instance", s.cfg.Instance, "generation", lease.Generation())
		err = s.term(lease.Context())
		if err != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "scheduler stands by", "error", err)
		}
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second) // the next one need not wait
		if err := lease.Release(release); err != nil {
			s.log.WarnContext(ctx, "lease not released", "error", err)
		}
		cancel()
		if err != nil {
			pause(ctx, infraDelay)
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// term is one term of the lease. Nothing is written after ctx has ended, except what was on its way.
func (s *Service) term(ctx context.Context) error {
	s.active.Store(true)
	s.views.term(true)
	defer func() {
		s.active.Store(false)
		s.views.term(false)
	}()
	r := &reconciler{
		cfg: s.cfg, bus: s.bus, store: s.store, blobs: s.deps.Store, hosts: s.deps.Hosts, now: s.now, log: s.log,
		tracer: s.tracer, views: s.views, jobs: s.jobs, queue: newWorkQueue(),
		mem: map[string]*memory{}, written: map[string]uint64{}, followed: newFailovers(),
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		<-ctx.Done()
		r.queue.close()
		return nil
	})
	for range s.cfg.Workers {
		group.Go(func() error { return r.worker(ctx) })
	}
	group.Go(func() error { return r.watch(ctx) })
	group.Go(func() error { return r.watchPolicies(ctx) })
	group.Go(func() error { return r.watchFailovers(ctx) })
	group.Go(func() error { return r.janitor(ctx) })
	group.Go(func() error { return r.catalogued(ctx) })
	group.Go(func() error { return r.consume(ctx) })
	err := group.Wait()
	for _, m := range r.mem {
		m.endRoot(nil)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return context.Cause(ctx)
	}
	return err
}

// watch wakes up VMs whose records somebody else changed; at its start, all.
func (r *reconciler) watch(ctx context.Context) error {
	for u, err := range r.store.vms.Watch(ctx, "") {
		if err != nil {
			return fmt.Errorf("watch the records: %w", err)
		}
		switch u.Kind {
		case bus.Put:
			r.changed(u.Key, u.Revision)
		case bus.Deleted:
			r.changed(u.Key, 0)
		}
	}
	return nil
}

// sweepEvery is how often jobs are looked through.
const sweepEvery = time.Hour

// janitor sweeps the jobs, now and every hour.
func (r *reconciler) janitor(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		held := map[string]bool{}
		all, err := r.store.vms.List(ctx, "")
		if err == nil {
			for _, e := range all {
				held[e.Value.GetCurrentJob()] = true
			}
			err = r.jobs.sweep(ctx, held)
		}
		if err != nil && ctx.Err() == nil {
			r.log.WarnContext(ctx, "jobs not swept", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// watchPolicies wakes up the VMs of a policy that changed.
func (r *reconciler) watchPolicies(ctx context.Context) error {
	current := false
	for u, err := range r.store.policies.Watch(ctx, "") {
		if err != nil {
			return fmt.Errorf("watch the policies: %w", err)
		}
		if u.Kind == bus.Current {
			current = true
		}
		if !current || u.Kind != bus.Put {
			continue
		}
		all, err := r.store.vms.List(ctx, "")
		if err != nil {
			return fmt.Errorf("list the records: %w", err)
		}
		for _, e := range all {
			if e.Value.GetPolicy() == u.Value.GetName() {
				if err := r.policyChanged(ctx, e.Key, u.Value); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// policyChanged moves the next cycle forward when the new interval says that it is due earlier.
func (r *reconciler) policyChanged(ctx context.Context, key string, p *schedulerv1.Policy) error {
	return r.with(ctx, key, func(v *vmRun) error {
		soonest := v.now().Add(p.GetCopyInterval().AsDuration())
		due := v.rec.GetNextCycleTime()
		if due == nil || !due.AsTime().After(soonest) {
			return nil
		}
		return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.NextCycleTime.Seconds, rec.NextCycleTime.Nanos = soonest.Unix(), int32(soonest.Nanosecond())
		})
	})
}

func invalidState(rec *schedulerv1.ProtectedVm, act Action) error {
	return stateError(rec.GetName(), rec.GetState(), act)
}

// testActive says that a test failover stands in the way.
func testActive(name string, state typesv1.TestFailoverState, act Action) error {
	return reasonError(typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE, name,
		"%s of %s has to wait until its test failover is cleaned up (%s)", act, name, state)
}
