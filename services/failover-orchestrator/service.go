package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// leaseName is the singleton's lease in bucket "leases".
const leaseName = "failover-orchestrator"

// rescan is how often the records are looked through for work that no wake-up announced.
const rescan = 10 * time.Second

// Deps is what the service is given. Clock, Logger and the providers have defaults: the system's clock, and none.
type Deps struct {
	Clock          func() time.Time
	Logger         *slog.Logger
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	Bus            *bus.Bus
	Store          blobstore.Store
	// Scheduler says what is wrong with the name of a VM that has no record. Records are read from the bus.
	Scheduler schedulerv1.ProtectionServiceClient
	// Targets are recovery targets beside the built-in ones, or in place of those of the same kind.
	Targets []target.Target
	// Holder names this process in the lease; no other process may have the same.
	Holder string
}

// Service is the failover-orchestrator. Make it with New, Register it on a server, Run it.
type Service struct {
	config    Config
	deps      Deps
	log       *slog.Logger
	tracer    trace.Tracer
	failovers *bus.KV[*failoverv1.Failover]
	jobs      *bus.KV[*typesv1.Job]
	vms       *bus.KV[*schedulerv1.ProtectedVm] // read only
	plans     *bus.KV[*failoverv1.RecoveryPlan]
	targets   map[failoverv1.TargetKind]target.Target
	machine   string // this machine, in records
	metrics   metrics
	wake      chan struct{}
	points    *pointSessions
	holdRenew time.Duration // between two looks at the pin of a point that is being read

	mu      sync.Mutex
	running map[string]bool // failover ids in work here
}

// New checks the configuration and opens the records.
func New(ctx context.Context, c Config, d Deps) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("failover-orchestrator: %w", err)
	}
	if d.Bus == nil || d.Store == nil || d.Scheduler == nil || d.Holder == "" {
		return nil, errors.New("failover-orchestrator: Bus, Store, Scheduler and Holder must be given")
	}
	if d.Clock == nil {
		d.Clock = time.Now
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.TracerProvider == nil {
		d.TracerProvider = tracenoop.NewTracerProvider()
	}
	if d.MeterProvider == nil {
		d.MeterProvider = metricnoop.NewMeterProvider()
	}
	failovers, err := bus.OpenKV[*failoverv1.Failover](ctx, d.Bus, bus.BucketFailovers)
	if err != nil {
		return nil, fmt.Errorf("open failover records: %w", err)
	}
	jobs, err := bus.OpenKV[*typesv1.Job](ctx, d.Bus, bus.BucketJobs)
	if err != nil {
		return nil, fmt.Errorf("open jobs: %w", err)
	}
	vms, err := bus.OpenKV[*schedulerv1.ProtectedVm](ctx, d.Bus, bus.BucketVMs)
	if err != nil {
		return nil, fmt.Errorf("open VM records: %w", err)
	}
	plans, err := bus.OpenKV[*failoverv1.RecoveryPlan](ctx, d.Bus, bus.BucketPlans)
	if err != nil {
		return nil, fmt.Errorf("open plans: %w", err)
	}
	m, err := newMetrics(d.MeterProvider)
	if err != nil {
		return nil, err
	}
	machine, err := thisMachine(c)
	if err != nil {
		return nil, fmt.Errorf("failover-orchestrator: %w", err)
	}
	s := &Service{
		config: c, deps: d, log: d.Logger, tracer: d.TracerProvider.Tracer("failover-orchestrator"),
		failovers: failovers, jobs: jobs, vms: vms, plans: plans, targets: targets(c, d), machine: machine, metrics: m, wake: make(chan struct{}, 1), running: map[string]bool{},
	}
	s.points, s.holdRenew = newPointSessions(s), holdRenew
	return s, nil
}

// Register adds the service's handlers.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	failoverv1.RegisterFailoverServiceServer(r, &server{s: s})
	failoverv1.RegisterPlanServiceServer(r, &planServer{s: s})
	failoverv1.RegisterPointServiceServer(r, &pointServer{s: s})
}

// Run executes failovers while this instance holds the lease, until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		lease, err := s.deps.Bus.Lease(ctx, leaseName, s.deps.Holder, s.config.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.log.WarnContext(ctx, "no lease yet", "error", err)
			s.pause(ctx)
			continue
		}
		s.log.InfoContext(ctx, "active", "generation", lease.Generation())
		err = s.work(lease.Context())
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		if rerr := lease.Release(release); rerr != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "release lease", "error", rerr)
		}
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) && ctx.Err() == nil {
			s.log.WarnContext(ctx, "stopped being active", "error", err)
		}
	}
	return nil
}

// work looks for unfinished failovers and runs them, a bounded number at once.
func (s *Service) work(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		s.watch(ctx)
		return nil
	})
	group.Go(func() error {
		s.cataloguePlans(ctx)
		return nil
	})
	tick := time.NewTicker(rescan)
	defer tick.Stop()
	for {
		entries, err := s.failovers.List(ctx, "")
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			s.log.WarnContext(ctx, "list failovers", "error", err)
			s.pause(ctx)
			continue
		}
		for _, e := range entries {
			if !unfinished(e.Value) || !s.claim(e.Key) {
				continue
			}
			group.Go(func() error {
				defer s.unclaim(e.Key)
				s.run(ctx, e.Key)
				return nil
			})
		}
		select {
		case <-ctx.Done():
		case <-s.wake:
			continue
		case <-tick.C:
			continue
		}
		break
	}
	_ = group.Wait()
	return context.Cause(ctx)
}

// watch wakes the worker when a record changes, also one that another instance wrote while this one is active.
func (s *Service) watch(ctx context.Context) {
	for ctx.Err() == nil {
		for _, err := range s.failovers.Watch(ctx, "") {
			if err != nil {
				if ctx.Err() == nil {
					s.log.WarnContext(ctx, "watch failovers", "error", err)
				}
				break
			}
			s.poke()
		}
		s.pause(ctx)
	}
}

// claim takes a failover if it is not in work and a worker is free; whoever is left out has its turn after unclaim.
func (s *Service) claim(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running[id] || len(s.running) >= s.config.Workers {
		return false
	}
	s.running[id] = true
	return true
}

func (s *Service) unclaim(id string) {
	s.mu.Lock()
	delete(s.running, id)
	s.mu.Unlock()
	s.poke()
}

// poke makes work look again.
func (s *Service) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// pause waits a moment after a failure.
func (s *Service) pause(ctx context.Context) {
	t := time.NewTimer(s.config.RetryDelay)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
