package resyncengine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/shipping"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
)

// Deps is what the service is given.
type Deps struct {
	// Bus carries tasks and events; its name is the source of events ("resync-engine").
	Bus *bus.Bus
	// Store holds the lineages.
	Store blobstore.Store
	// Hosts finds change trackers.
	Hosts Hosts
	// Clock is the time; nil means the system's.
	Clock func() time.Time
	// Logger; nil discards.
	Logger *slog.Logger
	// MeterProvider; nil means none. Spans come from the bus and from the connections to hosts.
	MeterProvider metric.MeterProvider
}

// Service is one resync-engine.
type Service struct {
	resyncenginev1.UnimplementedResyncServiceServer

	config   Config
	bus      *bus.Bus
	comparer *comparer
	follower *bandwidth.Follower // of the site's bandwidth
	metrics  *metrics
	logger   *slog.Logger
	clock    func() time.Time

	mu     sync.Mutex
	active map[work]string
}

// New builds a resync-engine; Run starts it.
func New(config Config, deps Deps) (*Service, error) {
	errs := []error{config.Validate()}
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what+" is needed"))
		}
	}
	need(deps.Bus != nil, "a bus")
	need(deps.Store != nil, "a store")
	need(deps.Hosts != nil, "a way to hosts")
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("build the resync-engine: %w", err)
	}
	if deps.Clock == nil {
		deps.Clock = time.Now
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(deps.MeterProvider)
	if err != nil {
		return nil, fmt.Errorf("build the resync-engine: %w", err)
	}
	codec, err := shipping.NewCodec(config.Compression, deps.Clock)
	if err == nil && deps.MeterProvider != nil {
		err = codec.Observe(deps.MeterProvider.Meter("github.com/landfall-dr/landfall/services/resync-engine"), "landfall_resync_engine")
	}
	if err != nil {
		return nil, fmt.Errorf("build the resync-engine: %w", err)
	}
	limiter := bandwidth.NewLimiter()
	if deps.MeterProvider != nil {
		err = limiter.Observe(deps.MeterProvider.Meter("github.com/landfall-dr/landfall/services/resync-engine"), "landfall_resync_engine")
		if err != nil {
			return nil, fmt.Errorf("build the resync-engine: %w", err)
		}
	}
	follower, err := bandwidth.NewFollower(bandwidth.FollowerOptions{
		Bus: deps.Bus, Site: config.Site, Service: "resync-engine", Limiter: limiter, Clock: deps.Clock, Logger: deps.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("build the resync-engine: %w", err)
	}
	return &Service{
		config: config, bus: deps.Bus, follower: follower, metrics: m, logger: deps.Logger, clock: deps.Clock, active: map[work]string{},
		comparer: &comparer{
			config: config, store: bandwidth.Store(deps.Store, limiter), hosts: deps.Hosts, pool: shipping.NewPool(config.Buffers, config.SegmentBytes),
			codec: codec, clock: deps.Clock, metrics: m, logger: deps.Logger,
		},
	}, nil
}

// Register offers ResyncService on a server.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	resyncenginev1.RegisterResyncServiceServer(r, s)
}

// Run takes tasks until ctx ends and the tasks in work have stopped. An error is a consumer that cannot be set up.
func (s *Service) Run(ctx context.Context) error {
	consumer, err := s.bus.Consumer(bus.KindResync, s.config.Site, durableCompare, bus.ConsumerOptions{
		Concurrency: s.config.Concurrency,
		RetryDelay:  s.config.RetryDelay, RetryDelayMax: 10 * s.config.RetryDelay,
	})
	if err != nil {
		return fmt.Errorf("run the resync-engine: %w", err)
	}
	s.logger.InfoContext(ctx, "resync-engine runs", "site", s.config.Site)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.follower.Run(ctx) })
	group.Go(func() error {
		select { // a limit that was set before holds for the first segment
		case <-s.follower.Ready():
		case <-ctx.Done():
			return nil
		}
		return consumer.Run(ctx, s.handle)
	})
	if err := group.Wait(); err != nil {
		return fmt.Errorf("run the resync-engine: %w", err)
	}
	return nil
}
